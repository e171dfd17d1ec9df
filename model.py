"""A Llama-style vision-language model (VLM) from scratch, and real checkpoints loaded into it.

    picture -> Processor -> VisionTower -> (features, salience) -> Projector -> Decoder -> text

* `VisionTower`  CLIP (with a class token) and SigLIP: pre-norm blocks, learned positions. Beside
                 patch features it returns each patch's *salience*: the attention it receives.
* `Projector`    from the tower's width, or that of a block of merged patches, to the decoder's.
* `Decoder`      Llama, Mistral and Qwen2: RMSNorm, rotary positions, grouped-query attention,
                 SwiGLU. Its attention calls `cache.attend(layer, q, k, v)` and knows no more of
                 what is cached.
* `KVCache`      the dense cache. SparseVILA's retrieval (sparsevila.py) is a subclass of it, and so
                 may your own method be: the decoder stays as it is.
* `VLM`          the three together: encode, project, embed, forward, generate, from_pretrained.
* `Processor`    pictures to pixels, text to token ids and back, in the family's own format.

Families, in their own files' layout: LLaVA-1.5 (arXiv 2310.03744); SmolVLM and SmolVLM2 (arXiv
2504.05299); VILA-1.5, LongVILA and NVILA-Lite (arXiv 2312.07533, 2408.10188, 2412.04468).

Axes: B batch (1 wherever there is a cache), T tokens, E decoder width, C tower width, H query
heads, G key/value heads (G divides H), D head size, M query rows, N key rows, V visual tokens,
L decoder layers, S edge of the tower's square pictures, n visual tokens of one of them.
"""

import json
import math
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageMath, ImageOps, ImageSequence, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from awq import W4A16Linear, W8A8Linear, group_size_of
from kernels import attention_colsum, decode_attention

# --- layers that PyTorch lacks --------------------------------------------------------------------

# oneDNN's product, as torch.compile uses it; not in every build.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
MKL = torch.backends.mkl.is_available()
CPUINFO = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` names the processor
AMD = "AuthenticAMD" in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


class Linear(nn.Linear):
    """x (..., inputs) -> x W^T + b (..., outputs).

    In float32 on a CPU nn.Linear calls MKL, which is slow on AMD's processors: half as fast as
    oneDNN for many rows. With a single row, where reading W takes all the time, it uses one core.
    MKL's batched product, W cut into blocks of outputs, uses all of them and reads at the speed of
    memory: as W x on AMD's processors, as x W^T by the code that MKL has for Intel's (which was
    measured on an AMD, made to run it); the other way round it is up to four times slower. Small
    layers do not earn back what these calls cost more (some 10 us).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        W, inputs = self.weight, self.in_features
        on_cpu = W.device.type == "cpu" and W.dtype == x.dtype == torch.float32
        if not on_cpu or W.numel() < 2**17 or torch.is_grad_enabled():
            return F.linear(x, W, self.bias)
        if MKL and x.numel() == inputs:
            n = math.gcd(len(W), 16)
            blocks = W.view(n, -1, inputs)  # (n, rows, inputs)
            row = x.reshape(1, 1, inputs).expand(n, 1, inputs)
            y = torch.bmm(blocks, row.mT) if AMD else torch.bmm(row, blocks.mT)
            y = y.view(*x.shape[:-1], len(W))
            return y if self.bias is None else y + self.bias
        if ONEDNN_LINEAR:
            return ONEDNN_LINEAR(x, W, self.bias, "none", [], "")
        return F.linear(x, W, self.bias)


class QuickGELU(nn.Module):
    """CLIP's activation: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
}


# --- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. Defaults as in Hugging Face's CLIPVisionConfig."""

    width: int = 768  # C
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    image_size: int = 224  # S
    patch_size: int = 32
    activation: str = "quick_gelu"
    eps: float = 1e-5
    feature_layer: int = -2  # index into [embeddings, after block 0, ..., after the last block]
    class_token: bool = True  # CLIP; it comes with a norm before the blocks, and without patch bias
    last_norm: bool = False  # SmolVLM: the features are normalised

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder. Defaults as in Hugging Face's LlamaConfig."""

    vocab: int = 32000
    width: int = 4096  # E
    mlp: int = 11008
    layers: int = 32  # L
    heads: int = 32  # H
    kv_heads: int = 32  # G
    head_dim: int = 128  # D
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # positions are divided by it
    max_positions: int = 2048
    qkv_bias: bool = False
    tied: bool = False  # the output head is the embedding table


# Towers by their model_type, with the defaults of Hugging Face's classes: hub files leave many out.
_SIGLIP = VisionConfig(patch_size=16, activation="gelu_pytorch_tanh", eps=1e-6, class_token=False)
_IDEFICS = replace(_SIGLIP, width=1152, heads=16, patch_size=32)
TOWERS = {
    "clip_vision_model": VisionConfig(),
    "siglip_vision_model": _SIGLIP,
    "idefics3": _IDEFICS,
    "idefics3_vision": _IDEFICS,
    "smolvlm_vision": _IDEFICS,
}
# Decoders likewise, but for what depends on other values of the file.
DECODERS = {
    "llama": TextConfig(),
    "mistral": TextConfig(mlp=14336, kv_heads=8, max_positions=131072),
    "qwen2": TextConfig(mlp=22016, max_positions=32768, qkv_bias=True),
}
# Families by the model_type of config.json, with the tower that is meant where none is named.
FAMILIES = {
    "llava": ("LLaVA", "clip_vision_model"),
    "idefics3": ("SmolVLM", "idefics3_vision"),
    "smolvlm": ("SmolVLM", "smolvlm_vision"),
    "llava_llama": ("VILA", "siglip_vision_model"),
    "llava_qwen2": ("VILA", "siglip_vision_model"),
    "vila": ("VILA", "siglip_vision_model"),
    "nvila": ("VILA", "siglip_vision_model"),
    "nvila_lite": ("VILA", "siglip_vision_model"),
}
# Projectors by name: how many patches, along each side, make a visual token ("linear" is SmolVLM's
# too, whose files name the number).
PROJECTORS = {
    "linear": 1,
    "mlp2x_gelu": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}


@dataclass(frozen=True)
class Config:
    """Everything `VLM` needs to know; `Config.from_folder` reads it from a checkpoint."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 32000
    projector: str = "mlp2x_gelu"  # one of PROJECTORS
    projector_activation: str = "gelu"
    projector_bias: bool = True
    merge: int = 1  # a visual token is a block of merge x merge patches
    stop_ids: tuple[int, ...] = (2,)
    dtype: torch.dtype = torch.float32  # of the stored weights
    group_size: int | None = None  # of the decoder's four-bit weights, if the files hold such

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one picture (or tile)."""
        return math.ceil(math.isqrt(self.vision.patches) / self.merge) ** 2

    def token_boxes(self, edge: int) -> list[tuple[int, int, int, int]]:
        """Where each visual token lies in a picture of edge x edge pixels: left, top, right and
        bottom, all of them inside, in the order of the tokens."""
        side = math.isqrt(self.visual_tokens)
        cell = edge * self.merge * self.vision.patch_size / self.vision.image_size
        cuts = [min(round(i * cell), edge) for i in range(side + 1)]
        boxes = [
            (cuts[x], cuts[y], cuts[x + 1] - 1, cuts[y + 1] - 1)
            for y in range(side)
            for x in range(side)
        ]
        return [box for x in range(side) for box in boxes[x::side]] if self.by_columns else boxes

    @property
    def by_columns(self) -> bool:
        """VILA's first projector leaves the merged tokens column by column, as its code did when
        its checkpoints came out (commit 253d0a9). Later code (33b4f1a) orders them row by row, like
        the "_fix" ones: to have that, write "mlp_downsample_2x2_fix" into the checkpoint's
        configuration."""
        return self.projector == "mlp_downsample"

    @classmethod
    def from_folder(cls, folder: Path) -> "Config":
        """Read config.json (of VILA's folder layout, one in each folder) and, for the stop tokens,
        generation_config.json.

        Raises: FileNotFoundError without config.json; ValueError for a family, a size or an option
        that this file does not implement, naming it.
        """
        raw = read_config(folder)
        family, _ = family_of(folder, raw)
        text = _text_config(raw)
        vision = _vision_config(raw)
        own = {"LLaVA": "mlp2x_gelu", "SmolVLM": "linear", "VILA": raw.get("mm_projector_type")}
        projector, smolvlm = own[family], family == "SmolVLM"
        if projector not in list(PROJECTORS):
            raise ValueError(
                f"{folder}: mm_projector_type must be one of {', '.join(PROJECTORS)}, "
                f"got {projector!r}"
            )
        merge = _size(raw, "scale_factor", 2, most=64) if smolvlm else PROJECTORS[projector]
        if smolvlm and math.isqrt(vision.patches) % merge:
            side = math.isqrt(vision.patches)
            raise ValueError(f"scale_factor must divide the {side} patches of a side, got {merge}")
        return cls(
            vision=vision,
            text=text,
            image_token_id=_image_token_id(raw, text.vocab),
            projector=projector,
            projector_activation=_activation(raw, "projector_hidden_act", "gelu"),
            projector_bias=_flag(raw, "multimodal_projector_bias", not smolvlm),
            merge=merge,
            stop_ids=_stop_ids(folder, raw),
            dtype=_dtype(folder, raw),
            group_size=_group_size(folder, raw),
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. In VILA's layout the parts have folders and files of their own
    (llm/, vision_tower/, mm_projector/): they stand where other families write them."""
    raw = _read_json(folder / "config.json")
    if (folder / "llm").is_dir():
        tower = _read_json(folder / "vision_tower" / "config.json")
        raw |= {
            "text_config": _read_json(folder / "llm" / "config.json"),
            "vision_config": tower.get("vision_config", tower),
            **_read_json(folder / "mm_projector" / "config.json", only="mm_projector_type"),
        }
    return raw


def family_of(folder: Path, raw: dict) -> tuple[str, str]:
    """Family of a config.json, one of FAMILIES, and the tower that it means by default."""
    kind = raw.get("model_type")
    if kind not in list(FAMILIES):  # a list, for what cannot be hashed
        raise ValueError(
            f"{folder}: model_type {kind!r} is not supported, accepted: {', '.join(FAMILIES)}"
        )
    scales = [key for key in ("s2", "dynamic_s2") if raw.get(key)]
    if scales or "s2" in str(raw.get("image_aspect_ratio")):
        raise ValueError(f"{folder}: dynamic_s2, features of several scales, is not supported")
    return FAMILIES[kind]


def _dtype(folder: Path, raw: dict) -> torch.dtype:
    places = raw.get("torch_dtype"), raw.get("dtype"), raw.get("model_dtype")
    text = raw["text_config"]
    places += text.get("torch_dtype"), text.get("dtype")
    name = next((place for place in places if place is not None), "float32")
    accepted = ("float32", "float16", "bfloat16")
    if not isinstance(name, str) or name.removeprefix("torch.") not in accepted:
        raise ValueError(f"{folder}: dtype must be one of {', '.join(accepted)}, got {name!r}")
    return getattr(torch, name.removeprefix("torch."))


def _group_size(folder: Path, raw: dict) -> int | None:
    """The group size of a quantised checkpoint, whose settings stand in one of three places."""
    older = folder / "quant_config.json"
    settings = raw.get("quantization_config") or raw["text_config"].get("quantization_config")
    settings = settings or (_read_json(older) if older.exists() else None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder}: quantization_config must be an object, got {settings!r}")
    return group_size_of(settings)


def _vision_config(raw: dict) -> VisionConfig:
    family, kind = FAMILIES[raw["model_type"]]
    section = _section(raw, "vision_config")
    kind = section.get("model_type", kind)
    if kind not in list(TOWERS):
        raise ValueError(f"vision model_type must be one of {', '.join(TOWERS)}, got {kind!r}")
    default, smolvlm = TOWERS[kind], family == "SmolVLM"
    layer = raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2))
    vision = replace(
        default,
        width=_size(section, "hidden_size", default.width),
        mlp=_size(section, "intermediate_size", default.mlp),
        layers=_size(section, "num_hidden_layers", default.layers, most=1000),
        heads=_size(section, "num_attention_heads", default.heads),
        image_size=_size(section, "image_size", default.image_size, most=2**16),
        patch_size=_size(section, "patch_size", default.patch_size),
        activation=_activation(section, "hidden_act", default.activation),
        eps=_number(section, "layer_norm_eps", default.eps),
        feature_layer=-1 if smolvlm else layer,
        last_norm=smolvlm,
    )
    # LLaVA and VILA have words of their own for "without" and "with the first token".
    accepted = ("default", "patch") if vision.class_token else ("full", "cls_patch")
    for key in ("vision_feature_select_strategy", "mm_vision_select_feature"):
        default_word = "default" if family == "LLaVA" and key.startswith("vision") else accepted[0]
        if (word := raw.get(key, default_word)) not in accepted:
            raise ValueError(f"{key} must be one of {', '.join(accepted)}, got {word!r}")
    if vision.width % vision.heads:
        raise ValueError(f"vision width {vision.width} is not a multiple of {vision.heads} heads")
    if vision.patch_size > vision.image_size:
        raise ValueError(
            f"patch_size {vision.patch_size} is larger than image_size {vision.image_size}"
        )
    states = vision.layers + 1
    if type(vision.feature_layer) is not int or not -states <= vision.feature_layer < states:
        raise ValueError(
            f"vision_feature_layer must be an integer in [{-states}, {states}), "
            f"got {vision.feature_layer!r}"
        )
    return vision


def _text_config(raw: dict) -> TextConfig:
    section = _section(raw, "text_config")
    kind = section.get("model_type", "llama")
    if kind not in list(DECODERS):
        raise ValueError(f"text model_type must be one of {', '.join(DECODERS)}, got {kind!r}")
    default = DECODERS[kind]
    if section.get("sliding_window") and section.get("use_sliding_window", kind == "mistral"):
        raise ValueError("sliding-window attention is not supported")
    if section.get("hidden_act", "silu") != "silu":
        raise ValueError(f"the decoder's hidden_act must be 'silu', got {section['hidden_act']!r}")
    rope = section.get("rope_parameters") or section.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "linear") or (scaling == "default" and "factor" in rope):
        raise ValueError(f"rope scaling must be 'default' or 'linear', got {rope!r}")
    factor = _number(rope, "factor", None) if scaling == "linear" else 1.0
    width = _size(section, "hidden_size", default.width)
    heads = _size(section, "num_attention_heads", default.heads)
    text = TextConfig(
        vocab=_size(section, "vocab_size", default.vocab),
        width=width,
        mlp=_size(section, "intermediate_size", default.mlp),
        layers=_size(section, "num_hidden_layers", default.layers, most=1000),
        heads=heads,
        kv_heads=_size(
            section, "num_key_value_heads", heads if kind == "llama" else default.kv_heads
        ),
        head_dim=_size(section, "head_dim", width // heads),
        eps=_number(section, "rms_norm_eps", default.eps),
        rope_theta=_number(section | rope, "rope_theta", default.rope_theta),
        rope_factor=factor,
        max_positions=int(
            _size(section, "max_position_embeddings", default.max_positions, most=2**28) * factor
        ),
        qkv_bias=default.qkv_bias,
        tied=_flag(raw, "tie_word_embeddings", False)
        or _flag(section, "tie_word_embeddings", False),
    )
    if text.heads % text.kv_heads or text.head_dim % 2:
        raise ValueError(
            f"the key/value heads must divide the query heads and the head size must be even, "
            f"got {text.kv_heads}, {text.heads} and {text.head_dim}"
        )
    return text


def _image_token_id(raw: dict, vocab: int) -> int:
    """The placeholder of a visual token. VILA's stand beyond the table of embeddings."""
    default = {"LLaVA": 32000, "SmolVLM": 128257, "VILA": vocab}[FAMILIES[raw["model_type"]][0]]
    token = raw.get("image_token_index", raw.get("image_token_id", default))
    if type(token) is not int or not 0 <= token < 2**31:
        raise ValueError(f"image_token_index must be an integer in [0, 2**31), got {token!r}")
    return token


def _stop_ids(folder: Path, raw: dict) -> tuple[int, ...]:
    """End-of-text ids, from the first place that names them."""
    files = [part / "generation_config.json" for part in (folder, folder / "llm")]
    places = [_read_json(file) for file in files if file.exists()]
    places += [raw, raw["text_config"], {"eos_token_id": 2}]
    ids = next(p["eos_token_id"] for p in places if p.get("eos_token_id") is not None)
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id must be an id or a list of ids, got {ids!r}")
    return tuple(ids)


def _section(raw: dict, key: str) -> dict:
    if not isinstance(raw.get(key), dict):
        raise ValueError(f"config.json has no {key}")
    return raw[key]


def _size(section: dict, key: str, default: int, most: int = 2**24) -> int:
    value = section.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{key} must be an integer in [1, {most}], got {value!r}")
    return value


def _number(section: dict, key: str, default: float | None) -> float:
    value = section.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 2**127:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def _flag(section: dict, key: str, default: bool) -> bool:
    value = section.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _activation(section: dict, key: str, default: str) -> str:
    name = section.get(key, default)
    if name not in list(ACTIVATIONS):
        raise ValueError(f"{key} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name


# --- the cache ------------------------------------------------------------------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last M of N rows over all rows before and including them.

    q (B, H, M, D), k and v (B, G, N, D), M <= N -> (B, H, M, D). The mask is right-aligned: query
    row i sees keys 0 .. N - M + i.
    """
    B, H, M, D = q.shape
    G, N = k.shape[1], k.shape[2]
    if M == N:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # SDPA's own causal flag is aligned top-left, so M < N needs the mask written out. The heads of
    # a group become rows of one head: keys and values are read once, not once per query head.
    mask = torch.ones(M, N, dtype=torch.bool, device=q.device).tril(N - M)
    rows = q.reshape(B, G, H // G * M, D)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(H // G, 1))
    return out.reshape(B, H, M, D)


class KVCache:
    """Keys and values of every row read so far, per layer, in buffers that grow by doubling.

    The decoder calls `attend(layer, q, k, v)` once per layer; a subclass may answer from whatever
    it keeps. `VLM.generate` announces the stages through `start_question` and `start_answer`, which
    mean nothing to this dense cache.

    Args:
        layers: number of decoder layers.
        capacity: rows to make room for at the first `attend` (more are added when needed).
    """

    def __init__(self, layers: int, capacity: int = 256):
        self.capacity = capacity
        self.k: list[Tensor | None] = [None] * layers  # (1, G, rows, D) each, made when used
        self.v: list[Tensor | None] = [None] * layers
        self.filled = [0] * layers  # rows in use, per layer
        self.following = [0]  # following[n]: the position after the first n rows

    @property
    def length(self) -> int:
        """Rows that every layer holds."""
        return min(self.filled)

    @property
    def next_position(self) -> int:
        """Rotary position of the next row: beyond all so far, those of pruned tokens included."""
        return self.following[-1]

    def start_question(self) -> None:
        """The next rows are a question."""

    def start_answer(self) -> None:
        """The question has been read; the next rows are the tokens of its answer, one at a time."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append the rows k, v (1, G, M, D), then let q (1, H, M, D) attend causally to all rows:
        (1, H, M, D)."""
        self.append(layer, k, v)
        keys, values, N = self.k[layer], self.v[layer], self.filled[layer]
        if q.shape[2] == 1:
            return decode_attention(q, keys, values, length=N)
        return causal_attention(q, keys[:, :, :N], values[:, :, :N])

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the rows k, v (1, G, M, D) after the last row of a layer."""
        start, stop = self.filled[layer], self.filled[layer] + k.shape[2]
        if self.v[layer] is None or stop > self.v[layer].shape[2]:
            rows = max(stop, self.capacity, 2 * start)
            # Whole multiples of 64 rows keep every head's rows aligned in memory, whatever the
            # capacity, so that the same rows give the same bits from any buffer.
            rows = math.ceil(rows / 64) * 64
            grown = _grown(self.k[layer], k, start, rows), _grown(self.v[layer], v, start, rows)
            self.k[layer], self.v[layer] = grown  # both or, out of memory, neither
        self.k[layer][:, :, start:stop] = k
        self.v[layer][:, :, start:stop] = v
        self.filled[layer] = stop

    def advance(self, positions: Tensor) -> None:
        """Note the positions (M,) of the rows just appended in all layers."""
        last = self.next_position - 1
        for position in positions.tolist():
            last = max(last, position)
            self.following.append(last + 1)

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on. Raises: ValueError if length is not in [0,
        self.length]."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in [0, {self.length}], got {length}")
        self.filled = [length] * len(self.filled)
        del self.following[length + 1 :]


def _grown(old: Tensor | None, like: Tensor, used: int, rows: int) -> Tensor:
    """A buffer of so many rows that starts with the used rows of the old one."""
    new = like.new_empty(*like.shape[:2], rows, like.shape[3])
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


# --- vision tower and projector -------------------------------------------------------------------


def token_salience(q: Tensor, k: Tensor, summary_tokens: int) -> Tensor:
    """How much attention every patch receives: A = softmax(q k^T / sqrt(D)), over all keys, then
    salience_j = mean over heads and over the contributing query rows i of A[., i, j].

    The contributing rows are those of the summary tokens; without any, all rows.

    Args:
        q, k: (images, H, summary tokens + patches, D) of one attention layer, summary tokens first.
        summary_tokens: 1 for CLIP's class token, several for RADIO, 0 for SigLIP.

    Returns: (images, patches) float32. Source: SparseVILA, Algorithm 2.
    """
    rows = q[:, :, :summary_tokens] if summary_tokens else q
    salience = attention_colsum(rows, k).mean(1) / rows.shape[2]
    return salience[:, summary_tokens:]


def merge_patches(x: Tensor, side: int, *, by_columns: bool = False) -> Tensor:
    """One row for every block of side x side patches ("space to depth", "pixel shuffle").

    x (images, p * p, C), row by row -> (images, k * k, side * side * C), k = ceil(p / side), row by
    row or, `by_columns`, column by column. A row holds the block's patches row by row; patches
    beyond the edge are zeros.
    """
    p = math.isqrt(x.shape[1])
    k = math.ceil(p / side)
    beyond = k * side - p
    x = F.pad(x.unflatten(1, (p, p)), (0, 0, 0, beyond, 0, beyond))
    blocks = x.unflatten(2, (k, side)).unflatten(1, (k, side))  # (images, k, side, k, side, C)
    order = (0, 3, 1, 2, 4, 5) if by_columns else (0, 1, 3, 2, 4, 5)
    return blocks.permute(order).flatten(3).flatten(1, 2)


def merge_salience(salience: Tensor, side: int, *, by_columns: bool = False) -> Tensor:
    """Salience (images, k * k) of merged tokens: the mean over the real patches of each block, of
    salience (images, p * p). The paper leaves open how; this is our choice."""
    blocks = merge_patches(salience[..., None], side, by_columns=by_columns)
    real = merge_patches(torch.ones_like(salience[:1, :, None]), side, by_columns=by_columns)
    return blocks.sum(-1) / real.sum(-1)


class VisionAttention(nn.Module):
    """Multi-head attention without a mask. x (images, T, C) -> (images, T, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.q_proj = Linear(C, C)
        self.k_proj = Linear(C, C)
        self.v_proj = Linear(C, C)
        self.out_proj = Linear(C, C)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (images, H, T, D) of x, all that the salience needs."""
        q, k = self.q_proj(x), self.k_proj(x)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k))

    def forward(self, x: Tensor, query_key: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """query_key: of x, if known already."""
        q, k = query_key or self.query_key(x)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """C -> mlp -> C. x (images, T, C) -> (images, T, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]()
        self.fc1 = Linear(config.width, config.mlp)
        self.fc2 = Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm: x plus attention, then plus MLP. x (images, T, C) -> (images, T, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, config.eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = VisionMLP(config)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys that the attention makes of x."""
        return self.self_attn.query_key(self.layer_norm1(x))

    def forward(self, x: Tensor, query_key: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), query_key)
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """CLIP's or SigLIP's vision transformer. pixels (images, 3, S, S) -> features (images, patches,
    C) of the layer that feeds the projector, and salience (images, patches) float32 from the last
    layer's attention."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, p = config.width, config.patch_size
        self.feature_layer = config.feature_layer % (config.layers + 1)
        self.summary_tokens = int(config.class_token)
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.randn(C))
            self.pre_layrnorm = nn.LayerNorm(C, config.eps)  # the checkpoints spell it so
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=p, stride=p, bias=not config.class_token)
        self.position_embedding = nn.Embedding(self.summary_tokens + config.patches, C)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        if config.last_norm:
            self.post_layernorm = nn.LayerNorm(C, config.eps)

    def embed(self, pixels: Tensor) -> Tensor:
        """Class token, if there is one, and patches with their positions, (images, T, C)."""
        x = self.patch_embedding(pixels).flatten(2).mT  # (images, patches, C)
        if not self.summary_tokens:
            return x + self.position_embedding.weight
        summary = self.class_embedding.expand(len(pixels), 1, -1)
        return self.pre_layrnorm(torch.cat([summary, x], 1) + self.position_embedding.weight)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (images, 3, S, S) -> features (images, patches, C), salience (images, patches)."""
        x = self.embed(pixels)
        features, last = x, self.layers[-1]
        for depth, block in enumerate(self.layers[:-1], 1):
            x = block(x)
            if depth == self.feature_layer:
                features = x
        query_key = last.query_key(x)  # all of the last block that the salience needs
        if self.feature_layer == len(self.layers):
            features = last(x, query_key)
            if hasattr(self, "post_layernorm"):
                features = self.post_layernorm(features)
        salience = token_salience(*query_key, self.summary_tokens)
        return features[:, self.summary_tokens :], salience


class Projector(nn.Module):
    """Features (..., merge * merge * C) to visual tokens (..., E): the perceptrons of PROJECTORS.

    In VILA's files layer 0 of the downsampling ones merges patches. `VLM.encode` has done it here,
    so that pruning comes before the projector's work.
    """

    def __init__(self, config: Config):
        super().__init__()
        C, E, activation = config.vision.width, config.text.width, config.projector_activation
        merged, activation = config.merge**2 * C, ACTIVATIONS[activation]
        linear = partial(Linear, bias=config.projector_bias)
        if config.projector == "linear":
            layers = [linear(merged, E)]
        elif config.projector == "mlp2x_gelu":
            layers = [linear(merged, E), activation(), linear(E, E)]
        elif config.projector == "mlp_downsample_3x3_fix":
            narrow = [nn.LayerNorm(merged), linear(merged, 3 * C), activation()]
            widen = [nn.LayerNorm(3 * C), linear(3 * C, E), activation(), linear(E, E)]
            layers = [nn.Identity(), *narrow, *widen]
        else:
            widen = [nn.LayerNorm(merged), linear(merged, E), activation(), linear(E, E)]
            layers = [nn.Identity(), *widen]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


# --- decoder --------------------------------------------------------------------------------------

# attend(layer, q, k, v): q (B, H, M, D), k and v (B, G, M, D) of the new rows -> (B, H, M, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def attend_uncached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention among the rows alone; used where there is no cache, as in training."""
    return causal_attention(q, k, v)


def rotary_table(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """cos and +-sin (..., T, D) float32 of the angles position * theta^(-2i/D) / factor, at
    positions (..., T), i = 0 .. D/2 - 1. Each angle stands twice: pair i is the elements i and
    i + D/2 (the "halves" layout of Llama checkpoints in Hugging Face's format). The sine is
    negative in the first half, as `rotate` wants it."""
    D = config.head_dim
    exponent = torch.arange(0, D, 2, dtype=torch.float32, device=positions.device) / D
    frequency = config.rope_theta**-exponent / config.rope_factor  # (D/2,)
    angles = positions[..., None].float() * frequency  # (..., T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (a, b) of x (B, heads, T, D) by its angle: (a cos - b sin, b cos + a sin)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class DecoderAttention(nn.Module):
    """Grouped-query attention. What is attended to is the business of `attend`, not of the
    layer."""

    def __init__(self, config: TextConfig):
        super().__init__()
        E, D, bias = config.width, config.head_dim, config.qkv_bias
        self.head_dim = D
        self.q_proj = Linear(E, config.heads * D, bias=bias)
        self.k_proj = Linear(E, config.kv_heads * D, bias=bias)
        self.v_proj = Linear(E, config.kv_heads * D, bias=bias)
        self.o_proj = Linear(config.heads * D, E, bias=False)

    def forward(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (B, T, E), cos and sin from `rotary_table` -> (B, T, E)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # q (B, H, T, D), k and v (B, G, T, D)
        out = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DecoderMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). x (B, T, E) -> (B, T, E)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp, bias=False)
        self.up_proj = Linear(config.width, config.mlp, bias=False)
        self.down_proj = Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """Pre-norm: x plus attention, then plus MLP."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.eps)
        self.mlp = DecoderMLP(config)

    def forward(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layer, cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Llama, Mistral or Qwen2: token embeddings, blocks, a last norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """embeddings (B, T, E) at positions (T,) or (B, 1, T) -> hidden states (B, T, E)."""
        x = embeddings
        cos, sin = (table.to(x.dtype) for table in rotary_table(positions, self.config))
        for layer, block in enumerate(self.layers):
            x = block(x, layer, cos, sin, attend)
        return self.norm(x)


# --- the whole model ------------------------------------------------------------------------------


class VLM(nn.Module):
    """Vision tower, projector, decoder and output head.

    `VLM(config)` has random weights, `VLM.from_pretrained(path_or_repo)` a checkpoint's.
    """

    ENCODE_BATCH = 16  # pictures on the device at a time; bounds the memory of long clips

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config.text)
        self.lm_head = Linear(config.text.width, config.text.vocab, bias=False)
        self.compiled: Callable | None = None  # Decoder.forward, see `compile_decoding`
        if config.text.tied:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def compile_decoding(self) -> None:
        """Read single rows, that is the tokens of an answer, by torch.compile from now on: all that
        a layer does beside attention is fused into a few loops. The first answer from a cache of
        each type takes longer, by some two seconds a layer; results may differ in the last bits.
        Whatever has more rows is read as before.

        Raises: RuntimeError where torch.compile does not work (on a CPU it needs a C++ compiler).
        """
        try:
            torch.compile(torch.square)(torch.ones(64, device=self.device))
        except Exception as error:  # of many kinds, none of them public
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise RuntimeError(f"torch.compile does not work here: {reason}") from error
        self.compiled = torch.compile(Decoder.forward, dynamic=True)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "VLM":
        """Load a checkpoint folder, or a hub repository at a revision (branch, tag or commit).

        device: "cuda" if there is one, else "cpu", if None. dtype: the checkpoint's own if None.
        No tokenizer is needed. Raises: FileNotFoundError and ValueError, naming what was found.
        """
        device = _pick_device(device)
        if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype must be torch.float32, float16, bfloat16 or None, got {dtype!r}"
            )
        folder = fetch(path_or_repo, revision)
        config = Config.from_folder(folder)
        with torch.device("meta"):  # shapes only: nothing is initialised just to be overwritten
            model = cls(config)
        _fill(model, folder, device, dtype or config.dtype)
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are held, quantised or not."""
        tensors = {id(t): t for t in (*self.parameters(), *self.buffers())}  # a tied head once
        return sum(tensor.nbytes for tensor in tensors.values())

    @property
    def precision(self) -> str:
        """The dtype of the weights, and which parts are quantised."""
        quantised = [
            f"{kind} {part}"
            for kind, part, layer in (
                ("W4A16", "decoder", W4A16Linear), ("W8A8", "tower", W8A8Linear),
            )
            if any(isinstance(module, layer) for module in self.modules())
        ]  # fmt: skip
        return " + ".join([str(self.dtype)[6:], *quantised])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Run the vision tower on pixels (images, 3, S, S).

        Returns: features (images, n, merge * merge * C) as the projector wants them, and salience
        (images, n) float32, one score per token that `project` will return; without merging n is
        the number of patches.
        Raises: ValueError for pixels of another size than the tower's.
        """
        S = self.config.vision.image_size
        if pixels.shape[1:] != (3, S, S):
            raise ValueError(f"pixels must be (images, 3, {S}, {S}), got {tuple(pixels.shape)}")
        batches = pixels.split(self.ENCODE_BATCH)
        parts = [self.vision_tower(batch.to(self.device, self.dtype)) for batch in batches]
        features, salience = (torch.cat(part) for part in zip(*parts))
        return self.merge_patches(features), self.merge_salience(salience)

    def merge_patches(self, x: Tensor) -> Tensor:
        """Patches (images, patches, C) to visual tokens (images, n, merge * merge * C), as this
        model merges them."""
        return merge_patches(x, self.config.merge, by_columns=self.config.by_columns)

    def merge_salience(self, salience: Tensor) -> Tensor:
        """Salience of patches (images, patches) to that of visual tokens (images, n)."""
        return merge_salience(salience, self.config.merge, by_columns=self.config.by_columns)

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """Project features (images, n, merge * merge * C) to visual tokens (images, n, E)."""
        return self.projector(features)

    @torch.no_grad()
    def embed(self, input_ids: Tensor | list[int], visual: Tensor | None = None) -> Tensor:
        """Embeddings (1, T, E) of input_ids (T,), with the rows of visual (V, E) at the image
        placeholders, in order.

        The placeholder id is never looked up: it may lie beyond the table.
        Raises: ValueError if V is not the number of placeholders, or an id lies beyond the table.
        """
        ids = torch.as_tensor(input_ids, device=self.device, dtype=torch.int64).flatten()
        placeholder = ids == self.config.image_token_id
        rows = 0 if visual is None else visual.shape[0]
        if int(placeholder.sum()) != rows:
            raise ValueError(
                f"{int(placeholder.sum())} image placeholders for {rows} visual tokens"
            )
        ids = ids.masked_fill(placeholder, 0)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.text.vocab:
            raise ValueError(
                f"token ids must be in [0, {self.config.text.vocab}), "
                f"got {int(ids.min())} .. {int(ids.max())}"
            )
        embeddings = self.decoder.embed_tokens(ids)
        if rows:
            embeddings[placeholder] = visual.to(embeddings)
        return embeddings[None]

    def read(
        self, embeddings: Tensor, cache: KVCache | None = None, *, positions: Tensor | None = None
    ) -> Tensor:
        """Hidden states (1, T, E) of embeddings (1, T, E), which continue what the cache holds.

        positions: (T,) integers; from `cache.next_position` on if None. Without a cache the rows
        attend to themselves only, causally, and gradients flow. A call that fails truncates the
        cache to what it held before. Raises: ValueError for positions of another shape.
        """
        start = 0 if cache is None else cache.next_position
        if positions is None:
            positions = torch.arange(start, start + embeddings.shape[1])
        if positions.shape != embeddings.shape[1:2]:
            raise ValueError(
                f"positions must be ({embeddings.shape[1]},), got {tuple(positions.shape)}"
            )
        if cache is None:
            return self.decoder(embeddings, positions.to(self.device), attend_uncached)
        length = cache.length
        decoder = self.decoder
        if self.compiled and len(positions) == 1:
            decoder = partial(self.compiled, decoder)
        try:
            with torch.no_grad():
                hidden = decoder(embeddings, positions.to(self.device), cache.attend)
            cache.advance(positions)
            return hidden
        except BaseException:
            cache.truncate(length)
            raise

    def forward(
        self, embeddings: Tensor, cache: KVCache | None = None, *, positions: Tensor | None = None
    ) -> Tensor:
        """Logits (1, T, vocabulary) of embeddings (1, T, E); arguments as for `read`."""
        return self.lm_head(self.read(embeddings, cache, positions=positions))

    @torch.no_grad()
    def generate(
        self,
        embeddings: Tensor,
        *,
        cache: KVCache | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        on_token: Callable[[int], None] | None = None,
        watch: "Stopwatch | None" = None,
    ) -> list[int]:
        """Read the prompt embeddings (1, T, E) and answer it token by token.

        Args:
            cache: what was read before; the prompt and the answer are added to it, but for the
                answer's last token, which nothing follows. A new dense cache if None.
            max_new_tokens: at least 1.
            temperature: 0 takes the likeliest token, t > 0 draws from softmax(logits / t).
            top_p: draw only from the likeliest tokens that together reach this probability, in
                (0, 1].
            seed: makes the draws repeatable.
            stop_ids: tokens that end the answer; the checkpoint's if None.
            on_token: called with every token as soon as it is known.
            watch: takes the milliseconds of the stages "question", "retrieve" and "decode".

        Returns: the new token ids; a stop token, if one came, is the last.
        Raises: ValueError for arguments out of range and for a context over the model's limit, both
        before anything is written; for NaN logits.
        """
        check_sampling(max_new_tokens, temperature, top_p, seed)
        T = embeddings.shape[1]
        if cache is None:
            cache = KVCache(self.config.text.layers, capacity=T + max_new_tokens)
        needed, limit = cache.next_position + T + max_new_tokens - 1, self.config.text.max_positions
        if T == 0 or needed > limit:
            raise ValueError(
                f"the model has {limit} positions: {cache.next_position} are taken, the prompt "
                f"needs {T} (at least 1) and the answer up to {max_new_tokens - 1}"
            )
        stop = set(self.config.stop_ids if stop_ids is None else stop_ids)
        generator = torch.Generator()  # its own, so that nobody else's draws change
        generator.seed() if seed is None else generator.manual_seed(seed)
        watch = watch or Stopwatch(self.device)
        cache.start_question()
        hidden = self.read(embeddings, cache)
        watch.lap("question")
        cache.start_answer()
        watch.lap("retrieve")
        tokens: list[int] = []
        while True:
            logits = self.lm_head(hidden[0, -1])
            if self.config.image_token_id < len(logits):
                logits[self.config.image_token_id] = -torch.inf  # a placeholder is no answer
            tokens.append(sample(logits, temperature, top_p, generator))
            if on_token:
                on_token(tokens[-1])
            if tokens[-1] in stop or len(tokens) == max_new_tokens:
                watch.lap("decode")
                return tokens
            hidden = self.read(self.embed(tokens[-1:]), cache)


class Stopwatch:
    """Milliseconds per stage; every lap ends one and begins the next, when the GPU has caught
    up."""

    def __init__(self, device: torch.device):
        self.device = device
        self.milliseconds: dict[str, float] = {}
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = self._now()
        self.milliseconds[stage] = 1000 * (now - self.last)
        self.last = now


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Raise ValueError for arguments of `VLM.generate` that mean nothing."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < 2**127:
        raise ValueError(f"temperature must be 0 or more, got {temperature!r}")
    if not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits (vocabulary,): the likeliest at temperature 0, else a draw. Raises:
    ValueError for NaN logits."""
    if logits.isnan().any():
        raise ValueError(
            f"the logits are NaN: damaged weights, or an overflow in {str(logits.dtype)[6:]}"
        )
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    probabilities, ids = probabilities.sort(descending=True)
    before = probabilities.cumsum(0) - probabilities  # mass of the likelier tokens
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


# --- loading --------------------------------------------------------------------------------------

# How checkpoint names begin, and how ours do; first match wins. Among them are the names of files
# on the hub and those that newer transformers hold in memory. In VILA's layout the name of the
# folder comes before the tensor's.
NAMES = [
    (r"(model\.)?multi_modal_projector\.linear_1\.", "projector.layers.0."),  # LLaVA
    (r"(model\.)?multi_modal_projector\.linear_2\.", "projector.layers.2."),
    (r"(model\.)?connector\.modality_projection\.proj\.", "projector.layers.0."),  # SmolVLM
    (r"mm_projector\.layers\.(?=weight|bias)", "projector.layers.0."),  # VILA
    (r"mm_projector\.", "projector."),
    (r"(model\.)?((vision_tower|vision_model)\.)+((embeddings|encoder)\.)?", "vision_tower."),
    (r"((language_model|llm)\.)?lm_head\.", "lm_head."),
    (r"(language_model\.model|llm\.model|model\.(language_model|text_model))\.", "decoder."),
]
# Known, and of use to some models only: tables of positions, what follows a tower's last layer.
OPTIONAL = r"(.*\.)?(rotary_emb\.inv_freq|position_ids)|vision_tower\.(post_layernorm|head)\..*"
PARTS = ("llm", "vision_tower", "mm_projector")  # folders of VILA's layout


def our_name(name: str) -> str:
    """The name in `VLM` of a checkpoint's tensor; itself if it is unknown."""
    for pattern, ours in NAMES:
        if match := re.match(pattern, name):
            return ours + name[match.end() :]
    return name


def not_needed(ours: str, model: nn.Module) -> bool:
    """Whether a tensor is known to be of no use to this model."""
    if not re.fullmatch(OPTIONAL, ours):
        return False
    path, _, leaf = ours.rpartition(".")
    return path not in dict(model.named_modules()) or not hasattr(model.get_submodule(path), leaf)


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


def _pick_device(device: str | torch.device | None) -> torch.device:
    """The device to load to: what was asked for, or the GPU if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # the "meta" device has no values
        return probe.device
    except Exception as error:  # torch raises almost anything for what it was not built for
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def _read_json(path: Path, only: str | None = None) -> dict[str, Any]:
    """The object in a JSON file; `only` this key of it, if it is there."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return {key: value[key] for key in value if only in (None, key)}


def weight_files(folder: Path) -> dict[Path, str]:
    """The safetensors files of a checkpoint, and what stands before the names of their tensors:
    nothing or, in VILA's layout, the name of the file's folder and a dot."""
    if (folder / "llm").is_dir():
        return {file: f"{part}." for part in PARTS for file in _weight_files(folder / part)}
    return dict.fromkeys(_weight_files(folder), "")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names, or model.safetensors, or all there
    are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if re.search(r"[/\\]|^\.\.?$", name):
                raise ValueError(f"{index} names {name!r}, accepted: files in the same folder")
        files = [folder / name for name in names]
    elif (folder / "model.safetensors").exists():  # whatever else is there, adapters say
        files = [folder / "model.safetensors"]
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
    return files


def _fill(model: VLM, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter and buffer of a model on the meta device its tensor, one at a time."""
    # A head stored in the files wins over the configuration's word that it is tied.
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    files = weight_files(folder)
    for file, prefix in files.items():
        with _weights(file) as tensors:
            _make_quantised(model, [our_name(prefix + name) for name in tensors.keys()])
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    filled: dict[str, str] = {}
    for file, prefix in files.items():
        with _weights(file) as tensors:
            for name in tensors.keys():
                ours = our_name(prefix + name)
                if not_needed(ours, model):
                    continue
                shape = tuple(tensors.get_slice(name).get_shape())
                _check_tensor(file, name, ours, shape, wanted, filled)
                tensor = _checked_dtype(file, name, tensors.get_tensor(name), wanted[ours])
                cast = dtype if isinstance(wanted[ours], nn.Parameter) else tensor.dtype
                _set_tensor(model, ours, tensor.to(device, cast))
                filled[ours] = name
    if model.config.text.tied and "lm_head.weight" not in filled:
        model.lm_head.weight = model.decoder.embed_tokens.weight
        del wanted["lm_head.weight"]
    missing = sorted(wanted.keys() - filled.keys())
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors, the first: {', '.join(missing[:3])}"
        )


@contextmanager
def _weights(file: Path) -> Iterator[safe_open]:
    """A safetensors file; whatever is wrong with it becomes one clear error."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None


def _make_quantised(model: VLM, names: list[str]) -> None:
    """Replace the Linears whose tensors in a file are quantised, and only those: lists of modules
    in configurations are often out of date."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in names:
        path, _, leaf = name.rpartition(".")
        if path not in linears or leaf not in ("qweight", "weight_scale"):
            continue
        if path == "lm_head":
            raise ValueError(f"{name}: a quantised output head is not supported")
        linear = linears[path]
        N, K = linear.weight.shape
        bias = linear.bias is not None
        if leaf == "qweight" and model.config.group_size is None:
            raise ValueError(f"{name} is quantised, but config.json has no quantization_config")
        try:
            if leaf == "qweight":
                layer = W4A16Linear(K, N, model.config.group_size, bias, device="meta")
            else:
                layer = W8A8Linear(K, N, bias, device="meta")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


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
    """Parameters may have any floating dtype; packed codes and their scales are taken as stored."""
    if isinstance(wanted, nn.Parameter):
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} must be floating point, got {tensor.dtype}")
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


# --- pictures and text ----------------------------------------------------------------------------


CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def open_picture(source: str | Path | Image.Image) -> Image.Image:
    """A picture as upright 8-bit RGB: a path, or a Pillow image of any mode.

    Transparent parts become white, 16-bit values lose their low byte, EXIF rotation is applied.
    Raises: ValueError or OSError for what Pillow cannot read, for an empty picture, for
    floating-point pixels (their range is not in the file), and for a file with more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    with _opened(source) as image:
        return _upright_rgb(image)


def open_clip(path: str | Path) -> tuple[list[Image.Image], float | None]:
    """The frames of an animated picture, each as `open_picture` gives it, and how many there are in
    a second, None if the file does not say. Raises: as there."""
    frames, milliseconds = [], 0
    with _opened(path) as animation:
        for frame in ImageSequence.Iterator(animation):
            limit = Image.MAX_IMAGE_PIXELS  # Pillow itself checks the first frame only
            if limit and frame.width * frame.height > limit:
                raise Image.DecompressionBombError(f"frame {len(frames) + 1} exceeds limit {limit}")
            frames.append(_upright_rgb(frame))
            milliseconds += frame.info.get("duration", 0)
    return frames, 1000 * len(frames) / milliseconds if milliseconds else None


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture file; whatever Pillow raises on a bad one becomes one clear error."""
    if not isinstance(path, (str, Path)):
        raise ValueError(f"a picture must be a path or a Pillow image, got {type(path).__name__}")
    if not Path(path).is_file():  # a pipe would be waited for
        what = f"{path} is not a regular file" if Path(path).exists() else f"no picture {path}"
        raise FileNotFoundError(what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that Pillow can read") from None
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ValueError(f"{path} cannot be read: {error!r}") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"a picture must have pixels, got {image.width} x {image.height}")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range, convert them to 8 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, in a 16- or 32-bit container
        wide, clear = image.convert("I"), image.info.get("transparency")
        image = wide.point(lambda value: value * (1 / 256)).convert("L")
        image.info.clear()
        if clear is not None:  # one 16-bit value means transparent
            mask = ImageMath.lambda_eval(lambda of: (of["wide"] == clear) * 255, wide=wide)
            image.paste(255, mask=mask.convert("L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class View(NamedTuple):
    """What the vision tower sees at once: a picture, or a tile of one."""

    picture: Image.Image  # S x S
    number: int = 0  # of the picture among all that are shown
    rows: int = 0  # of tiles in that picture; 0 if it is not cut
    columns: int = 0  # likewise
    row: int = 0  # of this tile, from 1; 0 if this is the whole picture
    column: int = 0  # likewise
    second: float | None = None  # of a frame: when it comes in its clip
    duration: float | None = None  # of the clip, in seconds


class Processor:
    """Pictures to pixels and text to token ids, as LLaVA-1.5 was trained with; other families are
    subclasses.

    Text from users is encoded by a tokenizer that knows no special tokens: "<image>" or "</s>" in a
    question is text, never a command.

    A template is a conversation of two turns: {image} stands for all pictures, {question} for a
    question, {answer} for the generated text without its stop token. Special tokens are written as
    text.
    """

    template = "USER: {image}\n{question} ASSISTANT:{answer}</s>USER: {question} ASSISTANT:"
    frame = "{image}"  # one of several pictures; {n} counts from 1
    default_resample, default_mean, default_std = 3, CLIP_MEAN, CLIP_STD  # 3: bicubic
    steps: tuple[str, ...] = ("do_center_crop",)  # settings that must not be off
    size_key = "crop_size"  # the setting that holds the edge of a view
    marks: list[str] = []  # special tokens that pictures need

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_token_id: int,
        settings: dict,
        template: str | None = None,
        frame: str | None = None,
    ):
        """settings: of preprocessor_config.json, and VILA's of config.json."""
        tokenizer.no_truncation()  # a checkpoint may carry its training's settings
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        image = tokenizer.id_to_token(image_token_id)
        if image is not None and image not in added:
            raise ValueError(
                f"the image token must be a special one, got {image_token_id}: {image!r}"
            )
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        plain = json.loads(tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
        plain = json.dumps(plain)
        self._plain_at_start = Tokenizer.from_str(plain)  # some mark the start of a text by a space
        plain = re.sub(r'("prepend_scheme": )"first"', r'\1"never"', plain)
        self._plain = Tokenizer.from_str(plain)
        self._begin = tokenizer.encode("").ids  # the begin-of-text token, where the family has one
        self.set_template(self.template if template is None else template)
        for token in self.marks + re.findall(r"<[^<>\s]+>", "" if template else self.template):
            if token not in added:
                raise ValueError(
                    f"the tokenizer has no special token {token!r}, which the family's prompt needs"
                )
        self.frame = self.frame if frame is None else frame
        if not isinstance(self.frame, str) or self.frame.count("{image}") != 1:
            raise ValueError(f"the text of a frame must hold one {{image}}, got {frame!r}")
        for step in ("do_resize", "do_rescale", "do_normalize", *self.steps):
            if not _flag(settings, step, True):
                raise ValueError(f"{step} in preprocessor_config.json must be true, got false")
        resample = settings.get("resample", self.default_resample)
        if type(resample) is not int or not 0 <= resample <= 5:
            raise ValueError(
                f"resample in preprocessor_config.json must be in [0, 5], got {resample!r}"
            )
        self.resample = Image.Resampling(resample)
        self.rescale = _number(settings, "rescale_factor", 1 / 255)
        self.mean = _per_channel(settings, "image_mean", self.default_mean)
        self.std = _per_channel(settings, "image_std", self.default_std)
        self.read_settings(settings)

    def read_settings(self, settings: dict) -> None:
        """The family's own settings, and `image_size`, the edge of a view."""
        self.image_size = _edge(settings, self.size_key, {"height", "width"})
        self.resize_edge = _edge(settings, "size", {"shortest_edge"})
        # LLaVA's own class pads; the older files name CLIP's, which knows no such setting.
        clip = str(settings.get("image_processor_type")).startswith("CLIP")
        self.pad = _flag(settings, "do_pad", False) and not clip

    def set_template(self, template: str) -> None:
        """Raises: ValueError for a template that is not a conversation of two turns."""
        form = r"(.*)\{image\}(.*)\{question\}(.*)\{answer\}(.*)\{question\}(.*)"
        found = isinstance(template, str) and re.fullmatch(form, template, re.DOTALL)
        used = re.findall(r"\{(?:image|question|answer)\}", template) if found else []
        if len(used) != 4:
            raise ValueError(
                "a prompt template must hold {image}, {question}, {answer} and {question}, in this "
                f"order, each once, got {template!r}"
            )
        image = self.tokenizer.id_to_token(self.image_token_id)
        if image and image in template:
            raise ValueError(f"a prompt template must not hold {image!r}, got {template!r}")
        self._start, self._lead, self._reply, self._close, self._last = found.groups()

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, *, revision: str | None = None, template: str | None = None
    ) -> "Processor":
        """Read the tokenizer, preprocessor_config.json and config.json of a checkpoint.

        template: in place of the family's. A `prompt` object in config.json may hold `template`
        and `frame` as well. Raises: FileNotFoundError and ValueError, naming what was found.
        """
        folder = fetch(path_or_repo, revision)
        raw, config = read_config(folder), Config.from_folder(folder)
        family, _ = family_of(folder, raw)
        texts = raw.get("prompt", {})
        if not isinstance(texts, dict) or not texts.keys() <= {"template", "frame"}:
            raise ValueError(
                f"{folder}: prompt in config.json must hold texts for template or frame, "
                f"got {texts!r}"
            )
        if template is not None:
            texts = texts | {"template": template}
        kind = {"LLaVA": Processor, "SmolVLM": SmolVLMProcessor, "VILA": VILAProcessor}[family]
        settings = _image_settings(folder) | {key: raw[key] for key in VILA_KEYS if key in raw}
        try:
            processor = kind(read_tokenizer(folder), config.image_token_id, settings, **texts)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        if processor.image_size != config.vision.image_size:
            raise ValueError(
                f"{folder}: {processor.size_key} must be the tower's image_size "
                f"{config.vision.image_size}, got {processor.image_size}"
            )
        return processor

    # --- pictures

    def views(self, pictures: list[Image.Image], *, fps: float | None = None) -> list[View]:
        """What the model sees of upright RGB pictures, in order.

        fps: None for separate pictures; for the frames of a clip, how many there are in a second. A
        family may then take some of the frames. LLaVA-1.5 knows no clips: all are pictures.
        """
        return [View(self._square(picture), number) for number, picture in enumerate(pictures)]

    def pixels(self, pictures: list[Image.Image] | list[View]) -> Tensor:
        """Pictures, or their views -> (views, 3, S, S) float32, scaled and normalised per
        channel."""
        views = pictures if isinstance(pictures[0], View) else self.views(pictures)
        return torch.stack([self._normalise(view.picture) for view in views])

    def _square(self, picture: Image.Image) -> Image.Image:
        """The shorter side resized to the model's size, then the centre cut out, as CLIP's
        processor does it in Pillow."""
        if self.pad:
            picture = _pad_to_square(picture, self.mean)
        short = min(picture.size)
        size = tuple(int(self.resize_edge * side / short) for side in picture.size)
        picture = _resized(picture, size, self.resample)
        left, top = ((side - self.image_size) // 2 for side in size)
        return picture.crop((left, top, left + self.image_size, top + self.image_size))

    def _normalise(self, image: Image.Image) -> Tensor:
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x = raw.view(image.height, image.width, 3).permute(2, 0, 1)
        return ((x.double() * self.rescale).float() - self.mean) / self.std

    # --- text

    end_of_view: tuple[int, ...] = ()  # token ids that follow the visual tokens of every view

    def _text(self, views: list[View]) -> str:
        """The text that stands for the views, {image} for each."""
        if len(views) == 1:
            return "{image}"
        frames = [self.frame.replace("{n}", str(n + 1)) for n in range(len(views))]
        return "\n".join(frames)

    def context(self, visual_tokens: list[int], views: list[View] | None = None) -> list[int]:
        """Token ids of everything up to the last picture, with `image_token_id` repeated as often
        as each view has visual tokens. views: separate whole pictures if None."""
        views = _whole(len(visual_tokens)) if views is None else views
        before, *after = (self._start + self._text(views)).split("{image}")
        ids = self._begin + self._encode(before, start=True)
        for count, text in zip(visual_tokens, [*after[:-1], ""], strict=True):
            ids += [self.image_token_id] * count + list(self.end_of_view) + self._encode(text)
        return ids

    def question(self, text: str, *, first: bool, views: list[View] | None = None) -> list[int]:
        """Token ids of a question: `first` right after the context of these views (one whole
        picture if None), otherwise after an answer."""
        if not first:
            return self._encode(self._close + "{question}" + self._last, text)
        after = self._text(_whole(1) if views is None else views).split("{image}")[-1]
        return self._encode(after + self._lead + "{question}" + self._reply, text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens and leading white space."""
        return self.tokenizer.decode(ids).lstrip()

    def _encode(self, template: str, question: str = "", *, start: bool = False) -> list[int]:
        """Ids of a template: its own special tokens are commands, everything in the question is
        text. start: nothing comes before it."""
        ids: list[int] = []
        position = 0
        for match in [*self._special.finditer(template), None]:
            text = template[position : match.start() if match else None]
            if text:
                text = text.replace("{question}", question)
                plain = self._plain_at_start if start and position == 0 else self._plain
                try:
                    ids += plain.encode(text, add_special_tokens=False).ids
                except Exception as error:  # tokenizers raises TypeError and bare Exception
                    raise ValueError(f"text that cannot be tokenized: {text!r} ({error})") from None
            if match:
                ids.append(self.tokenizer.token_to_id(match.group()))
                position = match.end()
        return ids


def _whole(count: int) -> list[View]:
    return [View(None, number) for number in range(count)]


def _resized(
    picture: Image.Image, size: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Raises: ValueError for a size beyond Pillow's limit: a narrow picture would explode."""
    if Image.MAX_IMAGE_PIXELS and math.prod(size) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"a picture of {picture.width} x {picture.height} is too narrow: "
            f"it would be resized to {size[0]} x {size[1]}"
        )
    return picture.resize(size, resample)


def _pad_to_square(picture: Image.Image, mean: Tensor) -> Image.Image:
    """The picture in the middle of a square of the mean colour (original LLaVA)."""
    edge = max(picture.size)
    square = Image.new("RGB", (edge, edge), tuple(int(255 * m) for m in mean.flatten().double()))
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return square


def _tiles(picture: Image.Image, edge: int, number: int) -> list[View]:
    """A picture of whole tiles cut into them, row by row."""
    rows, columns = picture.height // edge, picture.width // edge
    return [
        View(
            picture.crop((column * edge, row * edge, (column + 1) * edge, (row + 1) * edge)),
            number, rows, columns, row + 1, column + 1,
        )
        for row in range(rows)
        for column in range(columns)
    ]  # fmt: skip


def _spread(first: int, last: int, count: int) -> list[float]:
    """So many numbers from first to last, evenly spread, rounded as numpy.linspace rounds them."""
    step = (last - first) / max(count - 1, 1)
    return [first + step * number for number in range(count - 1)] + [last if count > 1 else first]


class SmolVLMProcessor(Processor):
    """SmolVLM and SmolVLM2: a picture is cut into tiles, the whole of it comes last; frames of a
    clip are not cut. Source: Idefics3's and SmolVLM's processors in Hugging Face transformers,
    whose resizing this repeats in Pillow."""

    template = (
        "<|im_start|>User:{image}{question}<end_of_utterance>\nAssistant:"
        "{answer}<end_of_utterance>\nUser: {question}<end_of_utterance>\nAssistant:"
    )
    default_resample = 1  # Lanczos
    default_mean = default_std = [0.5, 0.5, 0.5]
    steps, size_key = (), "max_image_size"
    marks = ["<fake_token_around_image>"]

    def read_settings(self, settings: dict) -> None:
        self.image_size = _edge(settings, self.size_key, {"longest_edge"})
        self.longest_edge = _edge(settings, "size", {"longest_edge"}, most=4096)
        self.split = _flag(settings, "do_image_splitting", True)
        video = settings.get("video_sampling")
        self.clip_frames = self.clip_fps = None  # SmolVLM: frames are pictures
        if isinstance(video, dict):
            self.clip_frames = _size(video, "max_frames", 64)
            self.clip_fps = _number(video, "fps", 1)
            self.clip_edge = _edge(video, "video_size", {"longest_edge"}, most=4096)

    def views(self, pictures: list[Image.Image], *, fps: float | None = None) -> list[View]:
        if fps is None:
            views = (self._cut(picture, number) for number, picture in enumerate(pictures))
            return [view for of_one in views for view in of_one]
        if self.clip_fps is None:
            return [View(self._squash(p, self.longest_edge), n) for n, p in enumerate(pictures)]
        return [
            View(
                self._squash(pictures[index], self.clip_edge), number,
                second=index / fps, duration=len(pictures) / fps,
            )
            for number, index in enumerate(self._sampled(len(pictures), fps))
        ]  # fmt: skip

    def _cut(self, picture: Image.Image, number: int) -> list[View]:
        """Resized to the longest edge, then up to whole tiles, then cut; the whole picture last."""
        if not self.split:
            return [View(self._squash(picture, self.longest_edge), number)]
        S = self.image_size
        picture = self._longest(picture, self.longest_edge)
        width, height = picture.size
        if width >= height:
            wide = math.ceil(width / S) * S
            size = wide, math.ceil(int(wide / (width / height)) / S) * S
        else:
            high = math.ceil(height / S) * S
            size = math.ceil(int(high * (width / height)) / S) * S, high
        picture = _resized(picture, size, self.resample)
        if size == (S, S):
            return [View(picture, number)]
        whole = View(picture.resize((S, S), self.resample), number, size[1] // S, size[0] // S)
        return [*_tiles(picture, S, number), whole]

    def _longest(self, picture: Image.Image, longest: int) -> Image.Image:
        """The longer side becomes `longest`, the other follows and is made even."""
        ratio = picture.width / picture.height
        other = int(longest / ratio if ratio >= 1 else longest * ratio)
        other = max(other + other % 2, 1)
        size = (longest, other) if ratio >= 1 else (other, longest)
        return _resized(picture, size, self.resample)

    def _squash(self, picture: Image.Image, longest: int) -> Image.Image:
        """Resized to the longest edge, then to one tile."""
        S = self.image_size
        return self._longest(picture, longest).resize((S, S), self.resample)

    def _sampled(self, frames: int, fps: float) -> list[int]:
        """Which frames are shown: `clip_fps` in a second, `clip_frames` at most, evenly spread. Of
        a long clip, by transformers' rule, the first and the last second are left out."""
        duration = frames / fps
        wanted = max(1, min(round(self.clip_fps * duration), self.clip_frames))
        first, last = 0, frames - 1
        if duration - 2 > self.clip_frames * self.clip_fps:
            first, last = int(fps), min(int(frames - fps), frames - 1)
        if first >= last:
            first, last = 0, frames - 1
        return sorted({int(at) for at in _spread(first, last, wanted)})

    def _text(self, views: list[View]) -> str:
        fake, texts = "<fake_token_around_image>", []
        whole = f"{fake}<global-img>{{image}}{fake}"
        if views[0].second is not None:
            span = int(views[0].duration)
            texts.append(
                f" You are provided the following series of {in_words(len(views))} frames from a "
                f"{span // 3600}:{span // 60 % 60:02}:{span % 60:02} [H:MM:SS] video.\n"
            )
        for view in views:
            if view.second is not None:
                at = int(view.second)
                texts.append(f"\nFrame from {at // 60:02}:{at % 60:02}:{whole}")
            elif view.row == 0:
                texts.append(("\n" if view.rows else "") + whole)
            else:
                end = "\n" if view.column == view.columns else ""
                texts.append(f"{fake}<row_{view.row}_col_{view.column}>{{image}}{end}")
        return "".join(texts) + ("\n\n" if views[0].second is not None else "")


def in_words(n: int) -> str:
    """A number in English words, from a hundred on in digits."""
    small = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen"
    ).split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    if n < 20 or n >= 100:
        return small[n] if n < 20 else str(n)
    return tens[n // 10 - 2] + (f"-{small[n % 10]}" if n % 10 else "")


VILA_KEYS = (  # of config.json
    "model_type", "image_aspect_ratio", "min_tiles", "max_tiles", "num_video_frames",
    "image_encoder", "video_encoder",
)  # fmt: skip


class VILAProcessor(Processor):
    """VILA-1.5, LongVILA and NVILA-Lite: a single picture is cut into the grid of tiles nearest to
    its shape, several pictures and the frames of a clip are squashed. Source: VILA's public code.
    """

    template = (  # Vicuna
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: {image}{question} ASSISTANT:{answer}</s>USER: {question} ASSISTANT:"
    )
    by_token = {  # templates of tokenizers that know this token
        "<|im_start|>": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
        "{answer}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "<|eot_id|>": "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language "
        "and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{image}{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    }
    default_mean = default_std = [0.5, 0.5, 0.5]
    steps, size_key = (), "size"

    def __init__(self, tokenizer: Tokenizer, *arguments, template: str | None = None, **texts):
        known = [token for token in self.by_token if tokenizer.token_to_id(token) is not None]
        if known:
            self.template = self.by_token[known[-1]]
        super().__init__(tokenizer, *arguments, template=template, **texts)
        # VILA-1.5 wrote a new line into the text behind every picture; later code appends its token
        # to the picture, which with Llama's tokenizer is not the same.
        self.end_of_view = tuple(self._encode("\n")) if known else ()

    def read_settings(self, settings: dict) -> None:
        self.image_size = _edge(settings, self.size_key, {"height", "width"})
        single = str(settings.get("model_type")).startswith("nvila")  # those files leave it out
        self.shape = settings.get("image_aspect_ratio", "dynamic" if single else None)
        accepted = ("dynamic", "resize", "pad", None)
        if self.shape not in accepted:
            raise ValueError(f"image_aspect_ratio must be one of {accepted}, got {self.shape!r}")
        self.min_tiles = _size(settings, "min_tiles", 1, most=64)
        self.max_tiles = _size(settings, "max_tiles", 12, most=64)
        self.clip_frames = _size(settings, "num_video_frames", 8, most=2**16)
        for key in ("image_encoder", "video_encoder"):
            encoder = settings.get(key) or "Basic"
            if "Basic" not in str(encoder) or "_tokens" in str(encoder):
                raise ValueError(f"{key} must be VILA's basic one, got {encoder!r}")

    def views(self, pictures: list[Image.Image], *, fps: float | None = None) -> list[View]:
        if fps is None and len(pictures) == 1 and self.shape == "dynamic":
            return self._cut(pictures[0])
        if fps is None:
            return [View(self._squash(picture), number) for number, picture in enumerate(pictures)]
        sampled = [round(at) for at in _spread(0, len(pictures) - 1, self.clip_frames)]
        return [
            View(self._squash(pictures[index]), number, second=index / fps)
            for number, index in enumerate(sampled)
        ]

    def _squash(self, picture: Image.Image) -> Image.Image:
        if self.shape == "pad":
            picture = _pad_to_square(picture, self.mean)
        resample = Image.Resampling.BICUBIC if self.shape == "resize" else self.resample
        return picture.resize((self.image_size, self.image_size), resample)

    def _cut(self, picture: Image.Image) -> list[View]:
        S, area = self.image_size, picture.width * picture.height
        grids = [
            (columns, rows)
            for tiles in range(self.min_tiles, self.max_tiles + 1)
            for columns in range(1, tiles + 1)
            for rows in range(1, tiles + 1)
            if columns * rows == tiles
        ]
        best, nearest = (1, 1), math.inf
        for columns, rows in grids:  # the nearest shape; of equal ones a larger, if it is filled
            distance = abs(picture.width / picture.height - columns / rows)
            larger = distance == nearest and area > 0.5 * S * S * columns * rows
            if distance < nearest or larger:
                best, nearest = (columns, rows), distance
        cut = _tiles(picture.resize((S * best[0], S * best[1])), S, 0)  # bicubic, as in VILA
        if len(cut) == 1:
            return [View(cut[0].picture)]
        return [*cut, View(picture.resize((S, S)), 0, best[1], best[0])]

    def _text(self, views: list[View]) -> str:
        one = views[-1].number == 0 and views[0].second is None
        written = not self.end_of_view or (one and self.shape == "dynamic")
        return ("{image}\n" if written else "{image}") * len(views)


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a checkpoint, or what vocab.json, merges.txt and added_tokens.json of Qwen2
    say. Raises: FileNotFoundError without either; ValueError for damaged files."""
    folders = [part for part in (folder, folder / "llm") if part.is_dir()]
    for part in folders:
        if (part / "tokenizer.json").is_file():
            build, file = Tokenizer.from_file, part / "tokenizer.json"
            break
        if (part / "vocab.json").is_file() and (part / "merges.txt").is_file():
            build, file = _qwen2_tokenizer, part / "vocab.json"
            break
    else:
        found = [str(p.relative_to(folder)) for part in folders for p in part.glob("*.model")]
        hint = f" (only {found[0]}, which transformers can convert)" if found else ""
        raise FileNotFoundError(f"no tokenizer.json in {folder}{hint}")
    try:
        return build(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file} is damaged: {error}") from None


def _qwen2_tokenizer(vocab: str) -> Tokenizer:
    """Byte-level BPE with Qwen2's rule for splitting text, and special tokens with the ids that
    added_tokens.json gives them."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    folder = Path(vocab).parent
    tokenizer = Tokenizer(models.BPE.from_file(vocab, str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, number in sorted(_added_tokens(folder).items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(f"the added tokens leave a gap before {token!r}, {number}")
    return tokenizer


def _added_tokens(folder: Path) -> dict[str, int]:
    """Special tokens and their ids, from added_tokens.json or else tokenizer_config.json."""
    added, settings = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if added.exists():
        tokens = _read_json(added)
    elif settings.exists():
        listed = _read_json(settings).get("added_tokens_decoder", {})
        tokens = {entry["content"]: int(number) for number, entry in listed.items()}
    else:
        tokens = {}
    if not all(type(number) is int for number in tokens.values()):
        raise ValueError(f"the ids of added tokens must be integers, got {tokens}")
    return tokens


def _image_settings(folder: Path) -> dict:
    """The settings for pictures; newer transformers write them into processor_config.json."""
    newer = folder / "processor_config.json"
    for file in (folder, folder / "vision_tower"):
        if (file / "preprocessor_config.json").is_file():
            return _read_json(file / "preprocessor_config.json")
    if newer.is_file() and isinstance(section := _read_json(newer).get("image_processor"), dict):
        return section
    raise FileNotFoundError(f"no preprocessor_config.json in {folder}")


def _edge(image_config: dict, key: str, *spellings: set[str], most: int = 2**16) -> int:
    """One edge length: a number, or an object with exactly these keys and one value."""
    value = image_config.get(key)
    if isinstance(value, dict) and set(value) in spellings:
        edges = list(value.values())
        value = edges[0] if edges == edges[:1] * len(edges) else value
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(
            f"{key} in preprocessor_config.json must be one edge in [1, {most}], got {value!r}"
        )
    return value


def _per_channel(image_config: dict, key: str, default: list[float]) -> Tensor:
    """One number for each of red, green and blue, (3, 1, 1)."""
    values = image_config.get(key, default)
    numbers = isinstance(values, list) and all(
        type(value) in (int, float) and abs(value) < 2**127 for value in values
    )
    if not numbers or len(values) != 3 or (key == "image_std" and 0 in values):
        raise ValueError(f"{key} in preprocessor_config.json must be 3 numbers, got {values!r}")
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def load(
    path_or_repo: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    template: str | None = None,
) -> tuple[VLM, Processor]:
    """`VLM.from_pretrained` and `Processor.from_pretrained` of one checkpoint, fetched once."""
    device = _pick_device(device)
    folder = fetch(path_or_repo, revision)
    processor = Processor.from_pretrained(folder, template=template)  # the cheaper one to fail
    return VLM.from_pretrained(folder, device=device, dtype=dtype), processor
