"""Values of a checkpoint's JSON files, checked: every "must be X, got Y" about them is made here.

A `Folder` is what was read of a checkpoint; the functions take a value out of one of its objects
and answer with the value, the default where it is missing, or a ValueError that names the key, what
is accepted and what was received.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder and the content of its config.json.

    parts: the sub-folders that hold its networks, weights and all; "" is the folder itself. A
    family whose checkpoints come in parts puts their configurations into `config`, where others
    have them.
    """

    path: Path
    config: dict[str, Any]
    parts: tuple[str, ...] = ("",)

    def read(self, name: str) -> list[dict[str, Any]]:
        """The contents of the JSON files of this name, the folder's own first, then its parts'."""
        files = [self.path / part / name for part in dict.fromkeys(("", *self.parts))]
        return [read_json(file) for file in files if file.is_file()]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: FileNotFoundError; ValueError for anything else."""
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def section(raw: dict, key: str) -> dict[str, Any]:
    """An object within config.json."""
    if not isinstance(raw.get(key), dict):
        raise ValueError(f"config.json has no {key}")
    return raw[key]


def size(raw: dict, key: str, default: int | None, most: int = 2**24) -> int:
    """A count or a width, in [1, most]; null means missing."""
    value = raw.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{key} must be an integer in [1, {most}], got {value!r}")
    return value


def number(raw: dict, key: str, default: float | None) -> float:
    """A positive number, finite in float32; null is refused."""
    value = raw.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 2**127:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def flag(raw: dict, key: str, default: bool) -> bool:
    """True or false; null means missing."""
    value = raw.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def choice(raw: dict, key: str, default: Any, accepted: Iterable, *, what: str = "") -> Any:
    """One of the accepted values; null is refused. what: how messages call the key."""
    value, accepted = raw.get(key, default), list(accepted)  # a list, for what cannot be hashed
    if value not in accepted:
        names = ", ".join(str(name) for name in accepted)
        raise ValueError(f"{what or key} must be one of {names}, got {value!r}")
    return value


def integer_in(raw: dict, keys: Iterable[str], default: int, low: int, high: int) -> int:
    """An integer in [low, high) under the first of some spellings that is there."""
    keys = list(keys)
    value = next((raw[key] for key in keys if key in raw), default)
    if type(value) is not int or not low <= value < high:
        bound = "2**31" if high == 2**31 else high
        raise ValueError(f"{keys[0]} must be an integer in [{low}, {bound}), got {value!r}")
    return value


def edge(raw: dict, key: str, keys: set[str], most: int = 2**16) -> int:
    """One edge length: a number, or an object with exactly these keys and one value."""
    value = raw.get(key)
    if isinstance(value, dict) and set(value) == keys:
        edges = list(value.values())
        value = edges[0] if edges == edges[:1] * len(edges) else value
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(
            f"{key} in preprocessor_config.json must be one edge in [1, {most}], got {value!r}"
        )
    return value


def per_channel(raw: dict, key: str, default: list[float]) -> Tensor:
    """One number for each of red, green and blue, (3, 1, 1)."""
    values = raw.get(key, default)
    numbers = isinstance(values, list) and all(
        type(value) in (int, float) and abs(value) < 2**127 for value in values
    )
    if not numbers or len(values) != 3 or (key == "image_std" and 0 in values):
        raise ValueError(f"{key} in preprocessor_config.json must be 3 numbers, got {values!r}")
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)


def pinpoints(raw: dict, default: list[list[int]], tile: int) -> list[list[int]]:
    """Heights and widths of the canvases that a picture may be cut from, whole tiles each."""
    found = raw.get("image_grid_pinpoints", default)
    pairs = isinstance(found, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(edge) is int and 0 < edge <= 64 * tile and edge % tile == 0 for edge in pair)
        for pair in found
    )
    if not pairs or not 1 <= len(found) <= 1000:
        raise ValueError(
            f"image_grid_pinpoints must be pairs of heights and widths, multiples of {tile} up to "
            f"{64 * tile}, got {found!r}"
        )
    return found


def pixel_bounds(raw: dict, default: tuple[int, int]) -> tuple[int, int]:
    """How many pixels a picture has, at least and at most: min_pixels and max_pixels, or in newer
    files shortest_edge and longest_edge of `size`, which are no edges."""
    edges = raw.get("size") if isinstance(raw.get("size"), dict) else {}
    newer = {"min_pixels": edges.get("shortest_edge"), "max_pixels": edges.get("longest_edge")}
    raw = newer | {key: raw[key] for key in newer if raw.get(key) is not None}
    low, high = (size(raw, *pair, most=2**40) for pair in zip(newer, default))
    if low > high:
        raise ValueError(f"min_pixels must be at most max_pixels, got {low} and {high}")
    return low, high


def layer_numbers(raw: dict, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending numbers of layers, from 0 on."""
    found = raw.get(key, list(default))
    counts = isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)
    if not counts or found != sorted(set(found)):
        raise ValueError(f"{key} must be ascending numbers of layers, got {found!r}")
    return tuple(found)


def switched_on(raw: dict, key: str) -> None:
    """A step of the picture processor that must not be false."""
    if not flag(raw, key, True):
        raise ValueError(f"{key} in preprocessor_config.json must be true, got false")


def resample(raw: dict, default: int) -> int:
    """Pillow's number of a resampling filter."""
    value = raw.get("resample", default)
    if type(value) is not int or not 0 <= value <= 5:
        raise ValueError(f"resample in preprocessor_config.json must be in [0, 5], got {value!r}")
    return value


def prompt_texts(folder: Folder) -> dict[str, Any]:
    """The `prompt` object of config.json: texts in place of the family's, none if it is missing."""
    texts = folder.config.get("prompt", {})
    if not isinstance(texts, dict) or not texts.keys() <= {"template", "frame"}:
        raise ValueError(
            f"{folder.path}: prompt in config.json must hold texts for template or frame, "
            f"got {texts!r}"
        )
    return texts


def stop_ids(folder: Folder) -> tuple[int, ...]:
    """End-of-text ids, from the first place that names them: generation_config.json, config.json,
    the decoder's section; 2 where none does."""
    places = [*folder.read("generation_config.json"), folder.config]
    places += [section(folder.config, "text_config"), {"eos_token_id": 2}]
    ids = next(p["eos_token_id"] for p in places if p.get("eos_token_id") is not None)
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id must be an id or a list of ids, got {ids!r}")
    return tuple(ids)


def sampling(folder: Folder) -> dict[str, Any]:
    """How generation_config.json wants tokens drawn, where that is not transformers' default.
    Nothing here applies it."""
    raw = next(iter(folder.read("generation_config.json")), {})
    default = {"repetition_penalty": 1.0}
    if raw.get("do_sample"):
        default |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    return {k: raw[k] for k, plain in default.items() if raw.get(k) not in (None, plain)}


def stored_dtype(folder: Folder) -> torch.dtype:
    """The dtype of the weights in the files; float32 if none is named."""
    raw, text = folder.config, section(folder.config, "text_config")
    places = raw.get("dtype"), raw.get("torch_dtype"), raw.get("model_dtype")
    places += text.get("dtype"), text.get("torch_dtype")
    name = next((place for place in places if place is not None), "float32")
    accepted = ("float32", "float16", "bfloat16")
    if not isinstance(name, str) or name.removeprefix("torch.") not in accepted:
        raise ValueError(f"{folder.path}: dtype must be one of {', '.join(accepted)}, got {name!r}")
    return getattr(torch, name.removeprefix("torch."))


def group_size(folder: Folder) -> int | None:
    """How many inputs share a scale in the four-bit weights of a quantised checkpoint, -1: all;
    None if its files name no quantisation.

    The settings stand in config.json, in the decoder's section of it or in AutoAWQ's older
    quant_config.json, with its own spellings. Raises: ValueError for anything but AWQ with 4 bits,
    zero points and the "gemm" layout, or compressed-tensors' "pack-quantized", whose tensors tell
    the group sizes: None.
    """
    raw = folder.config
    settings = raw.get("quantization_config")
    settings = settings or section(raw, "text_config").get("quantization_config")
    settings = settings or next(iter(folder.read("quant_config.json")), None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder.path}: quantization_config must be an object, got {settings!r}")
    if settings.get("quant_method") == "compressed-tensors":
        return _check_compressed(settings)
    for key, found, accepted in (
        ("quant_method", settings.get("quant_method", "awq"), "awq"),
        ("bits", settings.get("bits", settings.get("w_bit")), 4),
        ("zero_point", settings.get("zero_point", True), True),
        ("version", str(settings.get("version", "gemm")).lower(), "gemm"),
    ):
        _check_quantization(key, found, accepted)
    inputs = settings.get("group_size", settings.get("q_group_size"))
    if type(inputs) is not int or not (inputs == -1 or inputs >= 1):
        raise ValueError(f"quantization group_size must be -1 or at least 1, got {inputs!r}")
    return inputs


def _check_compressed(settings: dict) -> None:
    """Raise ValueError for anything of compressed-tensors but four-bit weights."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"quantization config_groups must be objects, got {groups!r}")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group.get("weights"), dict) else {}
        for key, found, accepted in (
            ("format", group.get("format") or settings.get("format"), "pack-quantized"),
            ("num_bits", weights.get("num_bits"), 4),
            ("type", weights.get("type", "int"), "int"),
            ("actorder", weights.get("actorder"), None),
            ("input_activations", group.get("input_activations"), None),
        ):
            _check_quantization(key, found, accepted)
        _check_quantization("strategy", weights.get("strategy"), "group", "channel")


def _check_quantization(key: str, found: Any, *accepted: Any) -> None:
    if found not in accepted:
        names = " or ".join(map(repr, accepted))
        raise ValueError(f"quantization {key} must be {names}, got {found!r}")
