"""What checkpoints on the hub look like: the one home of family knowledge.

A family is a module with

    MODEL_TYPES      the model_type values of config.json that mean it
    NAMES            rows (theirs, ours): how tensors' names begin in the files, and in `VLM`; where
                     several of theirs mean one of ours, the first is the one to write
    config(folder)   a `model.Config` from a `values.Folder`
    Processor        pictures to pixels, text to token ids (see processor.py)

and, only if it needs them,

    read(path, raw)  the `values.Folder` of a checkpoint in several folders, raw its config.json
    tower(config)    a vision tower of its own in place of `model.VisionTower`

To add one, write its file and put it into FAMILIES.
"""

import re
from pathlib import Path
from types import ModuleType

import torch

from model import VLM, Config

from . import llava, llava_next, qwen2_5_vl, qwen3_vl, smolvlm, values, vila, weights
from .processor import Processor

FAMILIES: dict[str, ModuleType] = {
    kind: family
    for family in (llava, llava_next, qwen2_5_vl, qwen3_vl, smolvlm, vila)
    for kind in family.MODEL_TYPES
}


def load(
    path_or_repo: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    template: str | None = None,
) -> tuple[VLM, Processor]:
    """`load_model` and `load_processor` of one checkpoint, which is read once."""
    device = weights.usable_device(device)
    family, folder = open_folder(path_or_repo, revision)
    config = family.config(folder)
    processor = family.Processor.from_folder(folder, config, template)  # it fails more cheaply
    return make_model(family, folder, config, device, dtype), processor


def load_model(
    path_or_repo: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> VLM:
    """The model of a checkpoint folder, or of a hub repository at a revision (branch, tag or
    commit). No tokenizer is needed.

    device: "cuda" if there is one, else "cpu", if None. dtype: the checkpoint's own if None.
    Raises: FileNotFoundError and ValueError, naming what was found.
    """
    device = weights.usable_device(device)
    family, folder = open_folder(path_or_repo, revision)
    return make_model(family, folder, family.config(folder), device, dtype)


def load_processor(
    path_or_repo: str | Path, *, revision: str | None = None, template: str | None = None
) -> Processor:
    """The processor of a checkpoint. template: a prompt in place of the family's, see `Processor`.
    Raises: FileNotFoundError and ValueError, naming what was found."""
    family, folder = open_folder(path_or_repo, revision)
    return family.Processor.from_folder(folder, family.config(folder), template)


def make_model(
    family: ModuleType,
    folder: values.Folder,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
) -> VLM:
    """A family's network, filled with the tensors of a folder."""
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float16, bfloat16 or None, got {dtype!r}")
    with torch.device("meta"):  # shapes only: nothing is initialised just to be overwritten
        tower = family.tower(config) if hasattr(family, "tower") else None
        model = VLM(config, tower)
    weights.fill(model, folder, family.NAMES, device, dtype or values.stored_dtype(folder))
    return model.eval()


def open_folder(
    path_or_repo: str | Path, revision: str | None = None
) -> tuple[ModuleType, values.Folder]:
    """The family of a checkpoint, and its folder."""
    path = fetch(path_or_repo, revision)
    raw = values.read_json(path / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {kind!r} is not supported, accepted: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    return family, getattr(family, "read", values.Folder)(path, raw)


def fetch(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one as it is, or a hub repository's safetensors, JSON and
    tokenizer files through huggingface_hub's cache. `revision` applies to the hub only.

    Raises: FileNotFoundError if there is neither; ValueError for a file.
    """
    if not isinstance(path_or_repo, (str, Path)):
        raise ValueError(f"a checkpoint must be a folder or a repository, got {path_or_repo!r}")
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file, accepted: a checkpoint folder or a hub repository")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_repo)):
        raise FileNotFoundError(f"no folder {path_or_repo}, and no name of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*merges.txt"]
        return Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=files))
    except Exception as error:  # besides the hub's errors those of proxies, addresses, the disk
        reason = " ".join(str(error).split()) or type(error).__name__
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            reason += " Log in with `hf auth login`, or set HF_TOKEN."
        raise FileNotFoundError(
            f"no folder {path_or_repo}, and no repository of that name from the hub: {reason}"
        ) from error
