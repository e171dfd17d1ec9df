"""A Llama-style vision-language model (VLM) from scratch, and real checkpoints loaded into it.

    picture -> Processor -> VisionTower -> (features, salience) -> Projector -> Decoder -> text

* `VisionTower`  CLIP: a class token, pre-norm blocks, learned positions. Beside the patch features
                 it returns each patch's *salience*: the attention that the class token pays it.
* `Projector`    two linear layers from the tower's width to the decoder's.
* `Decoder`      Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Its attention
                 calls `cache.attend(layer, q, k, v)` and knows no more of what is cached or read.
* `KVCache`      the dense cache. SparseVILA's retrieval (sparsevila.py) is a subclass of it, and so
                 may your own method be: the decoder stays as it is.
* `VLM`          the three together: encode, project, embed, forward, generate, from_pretrained.
* `Processor`    pictures to pixels, text to token ids and back, in the family's own format.

The family read today is LLaVA-1.5 (arXiv 2310.03744) in its Hugging Face folder layout.

Axes: B batch (1 wherever there is a cache), T tokens, E decoder width, C tower width, H query
heads, G key/value heads (G divides H), D head size, M query rows, N key rows, V visual tokens,
L decoder layers.
"""

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageMath, ImageOps, ImageSequence, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from awq import W4A16Linear, W8A8Linear, group_size_of
from kernels import attention_colsum, decode_attention

# --- configuration --------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. Defaults as in Hugging Face's CLIPVisionConfig."""

    width: int = 768  # C
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    activation: str = "quick_gelu"
    eps: float = 1e-5
    feature_layer: int = -2  # index into [embeddings, after block 0, ..., after the last block]

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
    max_positions: int = 2048
    qkv_bias: bool = False
    tied: bool = False  # the output head is the embedding table


@dataclass(frozen=True)
class Config:
    """Everything `VLM` needs to know; `Config.from_folder` reads it from a checkpoint."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 32000
    projector_activation: str = "gelu"
    projector_bias: bool = True
    stop_ids: tuple[int, ...] = (2,)
    dtype: torch.dtype = torch.float32  # of the stored weights
    group_size: int | None = None  # of the decoder's four-bit weights, if the files hold such

    @classmethod
    def from_folder(cls, folder: Path) -> "Config":
        """Read config.json and, for the stop tokens, generation_config.json.

        Raises: FileNotFoundError without config.json; ValueError for a family, a size or an option
        that this file does not implement, naming it.
        """
        raw = _read_json(folder / "config.json")
        _family(folder, raw)
        text = _text_config(raw)
        dtype = raw.get("torch_dtype") or raw.get("dtype") or "float32"
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"{folder}: dtype must be float32, float16 or bfloat16, got {dtype!r}")
        return cls(
            vision=_vision_config(raw),
            text=text,
            image_token_id=_image_token_id(raw),
            projector_activation=_activation(raw, "projector_hidden_act", "gelu"),
            projector_bias=_flag(raw, "multimodal_projector_bias", True),
            stop_ids=_stop_ids(folder, raw),
            dtype=getattr(torch, dtype),
            group_size=_group_size(folder, raw),
        )


def _family(folder: Path, raw: dict) -> str:
    """The model_type of a config.json, if it is one that this file reads."""
    family = raw.get("model_type")
    if family not in list(PROMPTS):  # a list, for what cannot be hashed
        raise ValueError(
            f"{folder}: model_type {family!r} is not supported, accepted: {', '.join(PROMPTS)}"
        )
    return family


def _group_size(folder: Path, raw: dict) -> int | None:
    """The group size of a quantised checkpoint, whose settings stand in either of two files."""
    older = folder / "quant_config.json"
    settings = raw.get("quantization_config") or (_read_json(older) if older.exists() else None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder}: quantization_config must be an object, got {settings!r}")
    return group_size_of(settings)


def _vision_config(raw: dict) -> VisionConfig:
    section = _section(raw, "vision_config")
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise ValueError(f"vision_feature_select_strategy must be 'default', got {strategy!r}")
    vision = VisionConfig(
        width=_size(section, "hidden_size", 768),
        mlp=_size(section, "intermediate_size", 3072),
        layers=_size(section, "num_hidden_layers", 12, most=1000),
        heads=_size(section, "num_attention_heads", 12),
        image_size=_size(section, "image_size", 224, most=2**16),
        patch_size=_size(section, "patch_size", 32),
        activation=_activation(section, "hidden_act", "quick_gelu"),
        eps=_number(section, "layer_norm_eps", 1e-5),
        feature_layer=raw.get("vision_feature_layer", -2),
    )
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
    family = section.get("model_type", "llama")
    if family not in ("llama", "mistral", "qwen2"):
        raise ValueError(f"text model_type must be llama, mistral or qwen2, got {family!r}")
    if section.get("sliding_window") and section.get("use_sliding_window", family == "mistral"):
        raise ValueError("sliding-window attention is not supported")
    if section.get("hidden_act", "silu") != "silu":
        raise ValueError(f"the decoder's hidden_act must be 'silu', got {section['hidden_act']!r}")
    rope = section.get("rope_parameters") or section.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}")
    if rope.get("rope_type", rope.get("type", "default")) != "default" or "factor" in rope:
        raise ValueError(f"rope scaling is not supported, got {rope!r}")
    width = _size(section, "hidden_size", 4096)
    heads = _size(section, "num_attention_heads", 32)
    text = TextConfig(
        vocab=_size(section, "vocab_size", 32000),
        width=width,
        mlp=_size(
            section, "intermediate_size", {"llama": 11008, "mistral": 14336}.get(family, 22016)
        ),
        layers=_size(section, "num_hidden_layers", 32, most=1000),
        heads=heads,
        kv_heads=_size(section, "num_key_value_heads", 8 if family == "mistral" else heads),
        head_dim=_size(section, "head_dim", width // heads),
        eps=_number(section, "rms_norm_eps", 1e-6),
        rope_theta=_number(section | rope, "rope_theta", 10000.0),
        max_positions=_size(section, "max_position_embeddings", 2048),
        qkv_bias=family == "qwen2",
        tied=_flag(raw, "tie_word_embeddings", False)
        or _flag(section, "tie_word_embeddings", False),
    )
    if text.heads % text.kv_heads or text.head_dim % 2:
        raise ValueError(
            f"the key/value heads must divide the query heads and the head size must be even, "
            f"got {text.kv_heads}, {text.heads} and {text.head_dim}"
        )
    return text


def _image_token_id(raw: dict) -> int:
    token = raw.get("image_token_index", raw.get("image_token_id", 32000))
    if type(token) is not int or not 0 <= token < 2**31:
        raise ValueError(f"image_token_index must be an integer in [0, 2**31), got {token!r}")
    return token


def _stop_ids(folder: Path, raw: dict) -> tuple[int, ...]:
    """End-of-text ids, from the first place that names them."""
    generation = folder / "generation_config.json"
    places = [_read_json(generation)] if generation.exists() else []
    places += [raw, raw["text_config"], {"eos_token_id": 2}]
    ids = next(p["eos_token_id"] for p in places if p.get("eos_token_id") is not None)
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"eos_token_id must be an integer or a list of integers, got {ids!r}")
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


def _number(section: dict, key: str, default: float) -> float:
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
        """Rotary position of the next row: the largest position so far, plus one."""
        return self.following[-1]

    def start_question(self) -> None:
        """The next rows are a question."""

    def start_answer(self) -> None:
        """The question has been read; the next rows are the tokens of its answer, one at a time."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append the rows k, v (1, G, M, D), then let q (1, H, M, D) attend causally to all
        rows."""
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


class VisionAttention(nn.Module):
    """Multi-head attention without a mask. x (images, T, C) -> (images, T, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.q_proj = nn.Linear(C, C)
        self.k_proj = nn.Linear(C, C)
        self.v_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (images, H, T, D) of x, all that the salience needs."""
        q, k = self.q_proj(x), self.k_proj(x)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query_key(x)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, config.eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """CLIP's vision transformer. pixels (images, 3, S, S) -> features (images, patches, C) of the
    layer that feeds the projector, and salience (images, patches) float32 from the last layer's
    attention."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, p = config.width, config.patch_size
        self.feature_layer = config.feature_layer % (config.layers + 1)
        self.class_embedding = nn.Parameter(torch.randn(C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=p, stride=p, bias=False)
        self.position_embedding = nn.Embedding(1 + config.patches, C)
        self.pre_layrnorm = nn.LayerNorm(C, config.eps)  # the checkpoints spell it so
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))

    def embed(self, pixels: Tensor) -> Tensor:
        """Class token and patches with their positions, (images, 1 + patches, C)."""
        patches = self.patch_embedding(pixels).flatten(2).mT  # (images, patches, C)
        summary = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([summary, patches], 1) + self.position_embedding.weight
        return self.pre_layrnorm(x)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (images, 3, S, S) -> features (images, patches, C), salience (images, patches)."""
        x = self.embed(pixels)
        before_last = len(self.layers) - 1
        states = {0: x}  # by depth; only the two that are needed are kept
        # The last block runs only if its output is asked for: salience needs no more of it than q
        # and k.
        for depth in range(1, max(self.feature_layer, before_last) + 1):
            x = self.layers[depth - 1](x)
            if depth in (self.feature_layer, before_last):
                states[depth] = x
        last = self.layers[-1]
        q, k = last.self_attn.query_key(last.layer_norm1(states[before_last]))
        return states[self.feature_layer][:, 1:], token_salience(q, k, summary_tokens=1)


class Projector(nn.Module):
    """LLaVA-1.5's two-layer perceptron. features (..., C) -> (..., E)."""

    def __init__(self, config: Config):
        super().__init__()
        C, E, bias = config.vision.width, config.text.width, config.projector_bias
        self.activation = ACTIVATIONS[config.projector_activation]
        self.linear_1 = nn.Linear(C, E, bias=bias)
        self.linear_2 = nn.Linear(E, E, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(features)))


# --- decoder --------------------------------------------------------------------------------------

# attend(layer, q, k, v): q (B, H, M, D), k and v (B, G, M, D) of the new rows -> (B, H, M, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def attend_uncached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The rows attend to each other only; used where there is no cache, as in training."""
    return causal_attention(q, k, v)


def rotary_table(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, D) float32 of the angles position * theta^(-2i/D), i = 0 .. D/2 - 1, at
    positions (..., T). Each angle stands twice: pair i is the elements i and i + D/2 (the "halves"
    layout of Llama checkpoints in Hugging Face's format)."""
    D = config.head_dim
    exponent = torch.arange(0, D, 2, dtype=torch.float32, device=positions.device) / D
    angles = positions[..., None].float() * config.rope_theta**-exponent  # (..., T, D/2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of x (B, heads, T, D) by its angle."""
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)


class DecoderAttention(nn.Module):
    """Grouped-query attention. What is attended to is the business of `attend`, not of the
    layer."""

    def __init__(self, config: TextConfig):
        super().__init__()
        E, D, bias = config.width, config.head_dim, config.qkv_bias
        self.head_dim = D
        self.q_proj = nn.Linear(E, config.heads * D, bias=bias)
        self.k_proj = nn.Linear(E, config.kv_heads * D, bias=bias)
        self.v_proj = nn.Linear(E, config.kv_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.heads * D, E, bias=False)

    def forward(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (B, T, E), cos and sin from `rotary_table` -> (B, T, E)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # q (B, H, T, D), k and v (B, G, T, D)
        out = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DecoderMLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
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
    """Llama: token embeddings, blocks, a last norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """embeddings (B, T, E) at positions (T,) or (B, 1, T) -> hidden states (B, T, E)."""
        cos, sin = rotary_table(positions, self.config)
        x = embeddings
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
        self.lm_head = nn.Linear(config.text.width, config.text.vocab, bias=False)
        if config.text.tied:
            self.lm_head.weight = self.decoder.embed_tokens.weight

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

        Returns: features (images, n, C) as the projector wants them, and salience (images, n)
        float32, one score per token that `project` will return (here n = patches).
        Raises: ValueError for pixels of another size than the tower's.
        """
        S = self.config.vision.image_size
        if pixels.shape[1:] != (3, S, S):
            raise ValueError(f"pixels must be (images, 3, {S}, {S}), got {tuple(pixels.shape)}")
        batches = pixels.split(self.ENCODE_BATCH)
        parts = [self.vision_tower(batch.to(self.device, self.dtype)) for batch in batches]
        features, salience = zip(*parts)
        return torch.cat(features), torch.cat(salience)

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """Project features (images, n, C) to visual tokens (images, n, E)."""
        return self.projector(features)

    @torch.no_grad()
    def embed(self, input_ids: Tensor | list[int], visual: Tensor | None = None) -> Tensor:
        """Token embeddings (1, T, E) with the rows of visual (V, E) at the image placeholders, in
        order.

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
        attend to each other only, and gradients flow. A call that fails truncates the cache to what
        it held before.
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
        try:
            with torch.no_grad():
                hidden = self.decoder(embeddings, positions.to(self.device), cache.attend)
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

# Checkpoint names to ours, first match wins; None: known, and not needed. Hub files write
# `language_model.model.`, models saved from transformers' memory `model.language_model.`.
NAMES: list[tuple[str, str | None]] = [
    (r"(.*\.)?rotary_emb\.inv_freq", None),
    (r"(.*\.)?position_ids", None),
    (r"(model\.)?vision_tower\.(vision_model\.)?post_layernorm\..*", None),  # after the last layer
    (
        r"(model\.)?vision_tower\.(vision_model\.)?(?:embeddings\.|encoder\.)?(.*)",
        r"vision_tower.\3",
    ),
    (r"(model\.)?multi_modal_projector\.(.*)", r"projector.\2"),
    (r"(language_model\.)?lm_head\.(.*)", r"lm_head.\2"),
    (r"(language_model\.model|model\.language_model)\.(.*)", r"decoder.\2"),
]


def our_name(name: str) -> str | None:
    """The name of a checkpoint's tensor in `VLM`, None if it is not needed, itself if unknown."""
    for pattern, ours in NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours) if ours else None
    return name


def fetch(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one as it is, or a hub repository's JSON and safetensors
    files through huggingface_hub's cache. `revision` applies to the hub only.

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
        files = ["*.json", "*.safetensors"]
        return Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=files))
    except Exception as error:  # besides the hub's errors those of proxies, addresses, the disk
        reason = " ".join(str(error).split()) or type(error).__name__
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are."""
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
    for file in files:
        with _weights(file) as tensors:
            _make_quantised(model, [our_name(name) for name in tensors.keys()])
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    filled: dict[str, str] = {}
    for file in files:
        with _weights(file) as tensors:
            for name in tensors.keys():
                ours = our_name(name)
                if ours is None:
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


def _make_quantised(model: VLM, names: list[str | None]) -> None:
    """Replace the Linears whose tensors in a file are quantised, and only those: lists of modules
    in configurations are often out of date."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in filter(None, names):
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


@dataclass(frozen=True)
class Prompt:
    """A family's prompt. Special tokens are written as text; {image}, {n} and {question} are filled
    in.

    The context is `start`, then the pictures separated by `separator`; it is read once. `first`
    follows it for a question right after the context, `next` for one after an answer.
    """

    start: str
    image: str  # a single picture
    frame: str  # one of several, {n} counts from 1
    separator: str
    first: str
    next: str


PLACES = {"image": "{image}", "frame": "{image}", "first": "{question}", "next": "{question}"}

PROMPTS = {
    "llava": Prompt(
        start="USER: ",
        image="{image}",
        frame="{image}",
        separator="\n",
        first="\n{question} ASSISTANT:",
        next="</s>USER: {question} ASSISTANT:",
    ),
}


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


def open_clip(path: str | Path) -> list[Image.Image]:
    """The frames of an animated picture, each as `open_picture` gives it. Raises: as there."""
    frames = []
    with _opened(path) as animation:
        for frame in ImageSequence.Iterator(animation):
            limit = Image.MAX_IMAGE_PIXELS  # Pillow itself checks the first frame only
            if limit and frame.width * frame.height > limit:
                raise Image.DecompressionBombError(f"frame {len(frames) + 1} exceeds limit {limit}")
            frames.append(_upright_rgb(frame))
    return frames


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


class Processor:
    """Pictures to pixels and text to token ids, as the checkpoint was trained with.

    Text from users is encoded by a tokenizer that knows no special tokens: "<image>" or "</s>" in a
    question is text, never a command.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, image_token_id: int, image_config: dict
    ):
        tokenizer.no_truncation()  # a checkpoint may carry its training's settings
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.image_token_id = image_token_id
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        plain = json.loads(tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._begin = tokenizer.encode("").ids  # the begin-of-text token, where the family has one
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not _flag(image_config, step, True):
                raise ValueError(f"{step} in preprocessor_config.json must be true, got false")
        self.image_size = _edge(image_config, "crop_size", {"height", "width"})
        self.resize_edge = _edge(image_config, "size", {"shortest_edge"})
        resample = image_config.get("resample", 3)
        if type(resample) is not int or not 0 <= resample <= 5:
            raise ValueError(
                f"resample in preprocessor_config.json must be in [0, 5], got {resample!r}"
            )
        self.resample = Image.Resampling(resample)
        self.rescale = _number(image_config, "rescale_factor", 1 / 255)
        self.mean = _per_channel(image_config, "image_mean", CLIP_MEAN)
        self.std = _per_channel(image_config, "image_std", CLIP_STD)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, *, revision: str | None = None
    ) -> "Processor":
        """Read tokenizer.json, preprocessor_config.json and config.json of a checkpoint.

        A `prompt` object in config.json replaces fields of the family's prompt (see `Prompt`).
        Raises: FileNotFoundError and ValueError, naming what was found.
        """
        folder = fetch(path_or_repo, revision)
        raw = _read_json(folder / "config.json")
        fields, changes = vars(PROMPTS[_family(folder, raw)]), raw.get("prompt", {})
        if not isinstance(changes, dict) or not all(
            key in fields and isinstance(text, str) for key, text in changes.items()
        ):
            raise ValueError(
                f"{folder}: prompt in config.json must hold texts for some of {', '.join(fields)}, "
                f"got {changes!r}"
            )
        prompt = Prompt(**fields | changes)
        for field, word in PLACES.items():
            if getattr(prompt, field).count(word) != 1:
                raise ValueError(f"{folder}: prompt {field} must hold one {word}, got {changes!r}")
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file} is damaged: {error}") from None
        image_config = _read_json(folder / "preprocessor_config.json")
        processor = cls(tokenizer, prompt, _image_token_id(raw), image_config)
        size = _vision_config(raw).image_size
        if processor.image_size != size:
            raise ValueError(
                f"{folder}: crop_size must be the tower's image_size {size}, "
                f"got {processor.image_size}"
            )
        return processor

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Upright RGB pictures -> (images, 3, S, S) float32: the shorter side resized to the
        model's size, the centre cut out, values scaled and normalised per channel."""
        return torch.stack([self._normalise(self.square(image)) for image in images])

    def square(self, image: Image.Image) -> Image.Image:
        """What the model sees of a picture: the shorter side resized, then the centre cut out, as
        CLIP's processor does it in Pillow. Raises: ValueError for one so narrow that resizing would
        explode."""
        short = min(image.size)
        size = tuple(int(self.resize_edge * side / short) for side in image.size)
        if Image.MAX_IMAGE_PIXELS and math.prod(size) > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"a picture of {image.width} x {image.height} is too narrow: "
                f"it would be resized to {size[0]} x {size[1]}"
            )
        image = image.resize(size, self.resample)
        left, top = ((side - self.image_size) // 2 for side in size)
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _normalise(self, image: Image.Image) -> Tensor:
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x = raw.view(image.height, image.width, 3).permute(2, 0, 1)
        return ((x.double() * self.rescale).float() - self.mean) / self.std

    def context(self, visual_tokens: list[int]) -> list[int]:
        """Token ids of everything before the first question, with `image_token_id` repeated as
        often as each picture has visual tokens."""
        one = len(visual_tokens) == 1
        form = self.prompt.image if one else self.prompt.frame
        frames = [form.replace("{n}", str(n + 1)) for n in range(len(visual_tokens))]
        text = self.prompt.start + self.prompt.separator.join(frames)
        before, *after = text.split("{image}")
        ids = self._begin + self._encode(before)
        for count, piece in zip(visual_tokens, after, strict=True):
            ids += [self.image_token_id] * count + self._encode(piece)
        return ids

    def question(self, text: str, *, first: bool) -> list[int]:
        """Token ids of a question: `first` right after the context, otherwise after an answer."""
        return self._encode(self.prompt.first if first else self.prompt.next, text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens and leading white space."""
        return self.tokenizer.decode(ids).lstrip()

    def _encode(self, template: str, question: str = "") -> list[int]:
        """Ids of a template: its own special tokens are commands, everything in the question is
        text."""
        ids: list[int] = []
        position = 0
        for match in [*self._special.finditer(template), None]:
            text = template[position : match.start() if match else None]
            if text:
                text = text.replace("{question}", question)
                try:
                    ids += self._plain.encode(text, add_special_tokens=False).ids
                except Exception as error:  # tokenizers raises TypeError and bare Exception
                    raise ValueError(f"text that cannot be tokenized: {text!r} ({error})") from None
            if match:
                ids.append(self.tokenizer.token_to_id(match.group()))
                position = match.end()
        return ids


def _edge(image_config: dict, key: str, *spellings: set[str]) -> int:
    """One edge length: a number, or an object with exactly these keys and one value."""
    value = image_config.get(key)
    if isinstance(value, dict) and set(value) in spellings:
        edges = list(value.values())
        value = edges[0] if edges == edges[:1] * len(edges) else value
    if type(value) is not int or not 1 <= value <= 2**16:
        raise ValueError(
            f"{key} in preprocessor_config.json must be one edge in [1, 65536], got {value!r}"
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
) -> tuple[VLM, Processor]:
    """`VLM.from_pretrained` and `Processor.from_pretrained` of one checkpoint, fetched once."""
    device = _pick_device(device)
    folder = fetch(path_or_repo, revision)
    model = VLM.from_pretrained(folder, device=device, dtype=dtype)
    return model, Processor.from_pretrained(folder)
