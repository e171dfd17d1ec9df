"""Tensors of safetensors files into a model: shards, names, quantised layers.

A family's name table (`NAMES`) has rows (theirs, ours): how tensors' names begin in the files, and
in `VLM`. `translate` reads such a table in either direction; of several rows that fit a name the
one with the longest beginning counts. In a checkpoint in parts the name of the folder and a dot
stand before the tensor's name.

Four-bit weights come in two layouts, which tensors tell apart: AutoAWQ's "gemm" (qweight, qzeros,
scales), which `awq.W4A16Linear` has as well, and compressed-tensors' "pack-quantized"
(weight_packed, weight_scale, perhaps weight_zero_point), which is repacked as it is read, without
loss. Axes: K inputs, N outputs of a Linear, G groups of inputs that share a scale.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from awq import W4A16Linear, W8A8Linear, pack
from model import VLM

from . import values
from .values import Folder, read_json

Names = list[tuple[str, str]]
# What becomes of the tensors of a "pack-quantized" Linear.
REPACKED = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}

# Tensors that some models use: tables of positions, what follows a tower's last layer.
OPTIONAL = r"(.*\.)?(rotary_emb\.inv_freq|position_ids)|vision_tower\.(post_layernorm|head)\..*"


def translate(name: str, beginnings: Iterable[tuple[str, str]]) -> str:
    """The name with its beginning replaced by a row (old, new); as it is if none fits."""
    fitting = [row for row in beginnings if name.startswith(row[0])]
    old, new = max(fitting, key=lambda row: len(row[0]), default=("", ""))
    return new + name.removeprefix(old)


def hub_names(names: Names) -> Names:
    """The table the other way round, rows (ours, theirs) with the first of theirs for each."""
    return list({ours: theirs for theirs, ours in reversed(names)}.items())


def is_unused(ours: str, model: nn.Module) -> bool:
    """Whether an optional tensor has no place in this model."""
    if not re.fullmatch(OPTIONAL, ours):
        return False
    path, _, leaf = ours.rpartition(".")
    return path not in dict(model.named_modules()) or not hasattr(model.get_submodule(path), leaf)


# --- files ----------------------------------------------------------------------------------------


def weight_files(folder: Folder) -> dict[Path, str]:
    """The safetensors files of a checkpoint, and what stands before the names of their tensors:
    nothing or, in a checkpoint in parts, the name of the file's folder and a dot. Raises:
    ValueError for a checkpoint in parts that is there as a whole, too."""
    if "" not in folder.parts and (whole := folder.path / "model.safetensors").exists():
        raise ValueError(f"{whole} stands beside the parts {', '.join(folder.parts)}: remove one")
    return {
        file: f"{part}." if part else ""
        for part in folder.parts
        for file in _weight_files(folder.path / part)
    }


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the safetensors files that the folder's index names, or all there are.

    In this order, as transformers' from_pretrained looks for them: a model saved whole over one
    saved in shards leaves the old index behind, and the old shards. Adapters do not count.
    """
    index, weight_map = folder / "model.safetensors.index.json", {}
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if re.search(r"[/\\]|^\.\.?$", name):
                raise ValueError(f"{index} names {name!r}, accepted: files in the same folder")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no regular file {file.name!r}")
        if file.suffix != ".safetensors":
            raise ValueError(f"{file.name} refused, accepted: .safetensors (pickles can run code)")
    if not files:
        found = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        what = f"only {', '.join(found)} (refused: pickles can run code)" if found else "none"
        raise FileNotFoundError(f"{folder} must hold .safetensors weights, found {what}")
    for file in files if weight_map else []:
        with _weights(file) as tensors:
            listed = {name for name, place in weight_map.items() if place == file.name}
            if absent := sorted(listed - set(tensors.keys())):
                raise ValueError(f"{index} says that {absent[0]} is in {file.name}, which lacks it")
    return files


def progress(items: Iterable | None, what: str, unit: str, total: int | None = None) -> tqdm:
    """The items, with a bar for somebody who waits at a terminal, from the second second on; None:
    a bar of so many steps to be moved by hand."""
    silent = not (sys.stderr and sys.stderr.isatty())
    return tqdm(items, what, total, unit=unit, delay=1, leave=False, disable=silent)


@contextmanager
def _weights(file: Path) -> Iterator[safe_open]:
    """An open safetensors file; anything wrong with it becomes one clear error."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None


# --- into the model -------------------------------------------------------------------------------


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device to load to: the given one, or the GPU if there is one. Raises: ValueError for one
    that cannot hold values here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # the "meta" device has no values
        return probe.device
    except Exception as error:  # torch raises almost anything for what it was not built for
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def fill(
    model: VLM, folder: Folder, names: Names, device: torch.device, dtype: torch.dtype
) -> None:
    """Give every parameter and buffer of a model on the meta device its tensor, one at a time.
    Raises: ValueError for tensors that are missing, left over, there twice, or of a wrong shape or
    dtype; FileNotFoundError for missing files."""
    # 1. Make a place for every tensor: quantised layers, and a head of its own even if the
    #    configuration ties it, for a head in the files wins.
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    files, shapes = weight_files(folder), {}
    for file, prefix in files.items():
        with _weights(file) as tensors:
            for name in tensors.keys():
                ours = translate(prefix + name, names)
                shapes[ours] = tuple(tensors.get_slice(name).get_shape())
    _make_quantised(model, values.group_size(folder), shapes)
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())

    # 2. Fill every place once; what symmetric weights leave out is there already.
    filled = {name: "" for name, tensor in wanted.items() if not tensor.is_meta}
    for name in filled:
        _set_tensor(model, name, wanted[name].to(device))
    for file, prefix in files.items():
        with _weights(file) as tensors:
            for name in progress(tensors.keys(), f"reading {file.name}", " tensors"):
                ours = translate(prefix + name, names)
                if is_unused(ours, model):
                    continue
                tensor = tensors.get_tensor(name)
                path, _, leaf = ours.rpartition(".")
                if f"{path}.weight_packed" in shapes and leaf != "bias":
                    if leaf == "weight_shape":  # known
                        continue
                    tensor = _repacked(file, name, tensor, wanted.get(f"{path}.scales"))
                    ours = f"{path}.{REPACKED[leaf]}"
                _check_tensor(file, name, ours, tuple(tensor.shape), wanted, filled)
                tensor = _checked_dtype(file, name, tensor, wanted[ours])
                cast = dtype if isinstance(wanted[ours], nn.Parameter) else tensor.dtype
                _set_tensor(model, ours, tensor.to(device, cast))
                filled[ours] = name

    # 3. Everything is filled; a tied head may be absent.
    if model.config.text.tied and "lm_head.weight" not in filled:
        model.lm_head.weight = model.decoder.embed_tokens.weight
        del wanted["lm_head.weight"]
    missing = sorted(wanted.keys() - filled.keys())
    if missing:
        raise ValueError(
            f"{folder.path} lacks {len(missing)} tensors, the first: {', '.join(missing[:3])}"
        )


def _make_quantised(model: VLM, group_size: int | None, shapes: dict[str, tuple[int, ...]]) -> None:
    """Replace the Linears whose tensors in the files, of these shapes, are quantised, and only
    those: lists of modules in configurations are often out of date."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in shapes:
        path, _, leaf = name.rpartition(".")
        if path not in linears or leaf not in ("qweight", "weight_packed", "weight_scale"):
            continue
        if leaf == "weight_scale" and f"{path}.weight_packed" in shapes:
            continue
        if path == "lm_head":
            raise ValueError(f"{name}: a quantised output head is not supported")
        linear = linears[path]
        outputs, inputs = linear.weight.shape
        bias = linear.bias is not None
        if leaf == "qweight" and group_size is None:
            raise ValueError(
                f"{name} is quantised, but config.json has no quantization_config of AWQ"
            )
        try:
            if leaf == "qweight":
                layer = W4A16Linear(inputs, outputs, group_size, bias, device="meta")
            elif leaf == "weight_packed":
                groups = shapes.get(f"{path}.weight_scale", (outputs, 0))[-1]
                if not groups or inputs % groups:
                    raise ValueError(f"{groups} groups of scales for {inputs} inputs")
                layer = W4A16Linear(inputs, outputs, inputs // groups, bias, device="meta")
                if f"{path}.weight_zero_point" not in shapes:
                    layer.qzeros = pack(torch.full((groups, outputs), 8, device="cpu"))
            else:
                layer = W8A8Linear(inputs, outputs, bias, device="meta")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _repacked(file: Path, name: str, tensor: Tensor, scales: Tensor | None) -> Tensor:
    """A tensor of a "pack-quantized" Linear as `W4A16Linear` has it: weight_packed (N, ceil(K / 8))
    int32, eight inputs a word, the first lowest; weight_zero_point (ceil(N / 8), G) int32, likewise
    eight outputs; weight_scale (N, G). scales: those of the layer, (G, N). Raises: ValueError for
    other tensors, and for scales that float16 does not hold exactly. Source: the library
    compressed-tensors."""
    leaf = name.rpartition(".")[2]
    if leaf not in REPACKED or scales is None or tensor.dim() != 2:
        raise ValueError(f"{file}: {name} {tuple(tensor.shape)} is no part of four-bit weights")
    if leaf == "weight_scale":
        half = tensor.to(torch.float16)
        if not torch.equal(half.to(tensor.dtype), tensor):
            raise ValueError(f"{file}: {name} holds scales that float16 cannot, {tensor.dtype}")
        return half.T.contiguous()
    if tensor.dtype != torch.int32:
        raise ValueError(f"{file}: {name} must be torch.int32, got {tensor.dtype}")
    nibble = 4 * torch.arange(8, dtype=torch.int32, device="cpu")
    if leaf == "weight_zero_point":
        zeros = (tensor[:, None] >> nibble[:, None] & 0xF).flatten(0, 1)[: scales.shape[1]]
        return pack(zeros.T)
    # By blocks of outputs: a word of 4 bytes for every weight would take too much memory.
    blocks = ((part[..., None] >> nibble & 0xF).flatten(1) for part in tensor.split(512))
    return torch.cat([pack(codes.T) for codes in blocks], 1)


def _check_tensor(
    file: Path,
    name: str,
    ours: str,
    shape: tuple[int, ...],
    wanted: dict[str, Tensor],
    filled: dict[str, str],
) -> None:
    if ours not in wanted:
        raise ValueError(f"{file}: {name} has no place in this model")
    if ours in filled:
        raise ValueError(f"{file}: {name} is there twice, also as {filled[ours]}")
    if shape != tuple(wanted[ours].shape):
        raise ValueError(f"{file}: {name} must have shape {tuple(wanted[ours].shape)}, got {shape}")


def _checked_dtype(file: Path, name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """Parameters may have any floating dtype that needs no scale; packed codes and their scales are
    taken as stored and must be finite."""
    if isinstance(wanted, nn.Parameter):
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # float8 goes with scales
            raise ValueError(
                f"{file}: {name} must be floating point of at least 16 bits, got {tensor.dtype}"
            )
    elif tensor.dtype != wanted.dtype:
        raise ValueError(f"{file}: {name} must be {wanted.dtype}, got {tensor.dtype}")
    elif not tensor.isfinite().all():
        raise ValueError(f"{file}: {name} must be finite, got NaN or infinity")
    return tensor


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)
