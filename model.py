"""A Llama-style vision-language model (VLM) from scratch: the network.

    pixels -> VisionTower -> features -> Projector -> Decoder -> logits
                                                      |    ^
                                                      KVCache

* `VisionTower`  CLIP (with a class token) and SigLIP: pre-norm blocks, learned positions. On
                 request it returns the queries and keys of one layer's attention.
* `Projector`    from the tower's width, or that of a block of merged patches, to the decoder's.
* `Decoder`      Llama, Mistral and Qwen2: RMSNorm, rotary positions, grouped-query attention,
                 SwiGLU. Its attention calls `cache.attend(layer, q, k, v)` and knows no more of
                 what is cached.
* `KVCache`      the dense cache. SparseVILA's retrieval (sparsevila.py) is a subclass of it, and so
                 may your own method be: the decoder stays as it is.
* `VLM`          the three together: encode, project, embed, read, decode, generate.

Nothing here knows of sparsity, of files or of quantised weights (a quantised layer is any module
called like a Linear). The folder checkpoints/ makes these networks out of files.

Axes: B batch (1 wherever there is a cache), T tokens of a sequence (tower: summary tokens and
patches; decoder: the new rows, which are the M query rows of attention), E decoder width, C tower
width, H query heads, G key/value heads (G divides H), D head size, M query rows, N key rows, V
visual tokens, L decoder layers, S edge of the tower's square pictures, n visual tokens of one view
(a picture, a frame or a tile; an axis "views" counts them).
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import MAX_HEAD_DIM, decode_attention, linear, triton

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
    merge: int = 1  # a visual token is a block of merge x merge patches
    merge_by_columns: bool = False  # the order of merged tokens; row by row if False

    @property
    def patches(self) -> int:
        """Patches of one view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one view."""
        return math.ceil(math.isqrt(self.patches) / self.merge) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder. Defaults as in Hugging Face's LlamaConfig, but that a head's size does
    not follow from the width."""

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
    # M-RoPE (multimodal, Qwen): for each of the D/2 pairs the axis (0 time, 1 row, 2 column) whose
    # position rotates it.
    rope_axes: tuple[int, ...] = ()
    max_positions: int = 2048
    qkv_bias: bool = False
    qk_norm: bool = False  # Qwen3: queries and keys of every head are normalised
    tied: bool = False  # the output head is the embedding table


@dataclass(frozen=True)
class Config:
    """Everything `VLM` needs to know."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 32000  # the placeholder of a visual token; may lie beyond the table
    projector: str = "mlp2x_gelu"  # a name that Projector knows
    projector_activation: str = "gelu"
    projector_bias: bool = True
    stop_ids: tuple[int, ...] = (2,)
    # The id of an embedding beyond the table, which no text has: `VLM.image_newline`, at the end of
    # every row of a picture (LLaVA-NeXT).
    newline_id: int | None = None
    # DeepStack (Qwen3-VL): a patch has so many vectors beside that which becomes a visual token;
    # projected, they are added to what the first decoder layers give for it.
    deepstack: int = 0


# --- small layers ---------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """CLIP's activation: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
}


class Linear(nn.Linear):
    """x (..., inputs) -> x W^T + b (..., outputs), see `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding; on the meta device, where PyTorch would import its compiler for a second to
    draw numbers that are not there, nothing is drawn."""

    def reset_parameters(self) -> None:
        """N(0, 1)."""
        if not self.weight.is_meta:
            super().reset_parameters()


# --- vision tower ---------------------------------------------------------------------------------


class VisionTower(nn.Module):
    """CLIP's or SigLIP's vision transformer.

    A family may bring its own: a module with the attribute `summary_tokens` and this class's
    `forward` and `merge`. Each call gets views of one shape; n may differ between calls. A row of
    features may hold several vectors side by side, such as those that feed deeper layers of the
    decoder; pruning keeps or drops whole rows.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, patch = config.width, config.patch_size
        self.config = config
        self.feature_layer = config.feature_layer % (config.layers + 1)
        self.summary_tokens = int(config.class_token)  # they come before the patches
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.randn(C))
            self.pre_layrnorm = nn.LayerNorm(C, config.eps)  # the checkpoints spell it so
        self.patch_embedding = nn.Conv2d(3, C, patch, patch, bias=not config.class_token)
        self.position_embedding = Embedding(self.summary_tokens + config.patches, C)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.post_layernorm = nn.LayerNorm(C, config.eps) if config.last_norm else nn.Identity()

    def embed(self, pixels: Tensor) -> Tensor:
        """Class token, if there is one, and patches with their positions, (views, T, C)."""
        conv, wide = self.patch_embedding, pixels.dtype
        if pixels.device.type == "cpu":  # there half precision may take forty times as long
            wide = torch.promote_types(wide, torch.float32)
        weight, bias = (w if w is None else w.to(wide) for w in (conv.weight, conv.bias))
        x = F.conv2d(pixels.to(wide), weight, bias, conv.stride).to(pixels.dtype)
        # (views, patches, C), a patch's numbers side by side: all states are laid out like these.
        x = x.flatten(2).mT.contiguous()
        if not self.summary_tokens:
            return x + self.position_embedding.weight
        summary = self.class_embedding.expand(len(pixels), 1, -1)
        return self.pre_layrnorm(torch.cat([summary, x], 1) + self.position_embedding.weight)

    def forward(
        self, pixels: Tensor, attention_layer: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the blocks, no further than is asked for.

        pixels (views, 3, S, S) -> states (views, T, C) of the layer that feeds the projector, T =
        summary tokens + patches; and queries and keys (views, H, T, D) of one layer's attention
        (-1: of the last), None and None if attention_layer is None. Raises: ValueError for pixels
        of another size than the tower's.
        """
        S = self.config.image_size
        if pixels.shape[1:] != (3, S, S):
            raise ValueError(f"pixels must be (views, 3, {S}, {S}), got {tuple(pixels.shape)}")
        wanted = None if attention_layer is None else attention_layer % len(self.layers)
        x, states, q, k = self.embed(pixels), None, None, None
        for depth, block in enumerate(self.layers):  # x is what block `depth` reads
            if depth == self.feature_layer:
                states = x
            if depth == wanted:
                q, k = block.query_key(x)
            if states is not None and (wanted is None or q is not None):
                return states, q, k  # all that was asked for: later blocks do not run
            x = block(x, (q, k) if depth == wanted else None)  # projected once, used twice
        return self.post_layernorm(x), q, k  # the last block's output feeds the projector

    def merge(self, patches: Tensor) -> Tensor:
        """Rows of patches (views, patches, C) to rows of visual tokens (views, n, merge * merge *
        C)."""
        config = self.config
        return merge_patches(patches, config.merge, by_columns=config.merge_by_columns)


class VisionBlock(nn.Module):
    """Pre-norm: x plus attention, then plus MLP. x (views, T, C) -> (views, T, C)."""

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

    def readers(self) -> dict[nn.Module, list[nn.Linear]]:
        """By norm, all Linears that read what it gives."""
        attention = self.self_attn
        first = [attention.q_proj, attention.k_proj, attention.v_proj]
        return {self.layer_norm1: first, self.layer_norm2: [self.mlp.fc1]}


class VisionAttention(nn.Module):
    """Multi-head attention without a mask. x (views, T, C) -> (views, T, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.q_proj = Linear(C, C)
        self.k_proj = Linear(C, C)
        self.v_proj = Linear(C, C)
        self.out_proj = Linear(C, C)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (views, H, T, D) of x, all that column sums need."""
        q, k = self.q_proj(x), self.k_proj(x)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k))

    def forward(self, x: Tensor, query_key: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """query_key: of x, if known already."""
        q, k = query_key or self.query_key(x)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """C -> mlp -> C. x (views, T, C) -> (views, T, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]()
        self.fc1 = Linear(config.width, config.mlp)
        self.fc2 = Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def merge_patches(x: Tensor, block: int, *, by_columns: bool = False) -> Tensor:
    """One row for every block of block x block patches ("space to depth", "pixel shuffle").

    x (views, side * side, C), row by row -> (views, blocks * blocks, block * block * C), blocks =
    ceil(side / block), row by row or, `by_columns`, column by column. A row holds the block's
    patches row by row; patches beyond the edge are zeros.
    """
    side = math.isqrt(x.shape[1])
    blocks = math.ceil(side / block)
    missing = blocks * block - side
    x = F.pad(x.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
    x = x.unflatten(2, (blocks, block))
    x = x.unflatten(1, (blocks, block))  # (views, blocks, block, blocks, block, C)
    order = (0, 3, 1, 2, 4, 5) if by_columns else (0, 1, 3, 2, 4, 5)
    return x.permute(order).flatten(3).flatten(1, 2)


# --- projector ------------------------------------------------------------------------------------


class Projector(nn.Module):
    """Features (..., merge * merge * C) to visual tokens (..., E); with DeepStack (..., merge *
    merge * (1 + deepstack) * C), patch by patch, to (..., (1 + deepstack) * E)."""

    def __init__(self, config: Config):
        super().__init__()
        C, E = config.vision.width, config.text.width
        width = config.vision.merge**2 * C
        dense = partial(Linear, bias=config.projector_bias)
        activation = ACTIVATIONS[config.projector_activation]
        if config.projector == "linear":
            layers = [dense(width, E)]
        elif config.projector == "mlp2x_gelu":
            layers = [dense(width, E), activation(), dense(E, E)]
        elif config.projector == "merger":  # Qwen's, behind its norm, which is the tower's last
            layers = [dense(width, width), activation(), dense(width, E)]
        else:  # VILA's mlp_downsample*, whose layer 0 merges patches: the tower's `merge` does it
            layers = [nn.Identity()]
            if config.projector == "mlp_downsample_3x3_fix":
                layers += [nn.LayerNorm(width), dense(width, 3 * C), activation()]
                width = 3 * C
            layers += [nn.LayerNorm(width), dense(width, E), activation(), dense(E, E)]
        self.layers = nn.Sequential(*layers)
        self.patches = config.vision.merge**2
        self.deepstack = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, config.vision.eps),
                dense(width, width), activation(), dense(width, E),
            )
            for _ in range(config.deepstack)
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        vectors = features.unflatten(-1, (self.patches, 1 + len(self.deepstack), -1))
        first, *others = vectors.transpose(-2, -3).flatten(-2).unbind(-2)
        deeper = [part(x) for part, x in zip(self.deepstack, others)]
        return torch.cat([self.layers(first), *deeper], -1)


# --- decoder --------------------------------------------------------------------------------------


GRAPH_TOKENS = 4  # on a GPU fewer steps of decoding do not earn back the capture of a graph

# attend(layer, q, k, v): q (B, H, M, D), k and v (B, G, M, D) of the new rows -> (B, H, M, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """Llama, Mistral or Qwen2: token embeddings, blocks, a last norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """embeddings (B, T, E) at positions (T,), (B, 1, T) or, M-RoPE, (3, T) -> hidden states (B,
        T, E). Of wider embeddings (B, T, (1 + n) E) the further parts are added to the outputs of
        the first n layers (DeepStack)."""
        x, *deeper = embeddings.split(self.config.width, -1)
        cos, sin = (table.to(x.dtype) for table in rotary_table(positions, self.config))
        for layer, block in enumerate(self.layers):
            x = block(x, layer, cos, sin, attend)
            if layer < len(deeper):
                x = x + deeper[layer]
        return self.norm(x)


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
        self.q_norm, self.k_norm = (
            nn.RMSNorm(D, config.eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (B, T, E), cos and sin from `rotary_table` -> (B, T, E)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # q (B, H, T, D), k and v (B, G, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
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


def rotary_table(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """cos and +-sin (..., T, D) float32 of the angles position * theta^(-2i/D) / factor, at
    positions (..., T), i = 0 .. D/2 - 1. Each angle stands twice: pair i is the elements i and
    i + D/2 (the "halves" layout of Llama checkpoints in Hugging Face's format). The sine is
    negative in the first half, as `rotate` wants it.

    With M-RoPE positions may be (3, T), and pair i is rotated by the position on axis rope_axes[i].
    Text has the same position on all axes; (T,) stands for that."""
    D = config.head_dim
    exponent = torch.arange(0, D, 2, dtype=torch.float32, device=positions.device) / D
    frequency = config.rope_theta**-exponent / config.rope_factor  # (D/2,)
    if config.rope_axes and positions.dim() == 2:
        position = positions[list(config.rope_axes)].mT  # (T, D/2)
    else:
        position = positions[..., None]
    angles = position.float() * frequency  # (..., T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (a, b) of x (B, heads, T, D) by its angle: (a cos - b sin, b cos + a sin)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


# --- the cache ------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every row read so far, per layer, in buffers that grow by doubling.

    The decoder calls `attend(layer, q, k, v)` once per layer; a subclass may answer from fewer
    rows. A session (sparsevila.py) announces the stages of a turn by `start_question` and
    `start_answer`, which mean nothing to this dense cache.

    Args:
        layers: number of decoder layers.
        capacity: rows to make room for at the first `attend` (more are added when needed).
    """

    def __init__(self, layers: int, capacity: int = 256):
        self.capacity = capacity
        self.k: list[Tensor | None] = [None] * layers  # (1, G, rows, D) each, made when used
        self.v: list[Tensor | None] = [None] * layers
        self.filled = [0] * layers  # rows in use, per layer
        self.position_after = [0]  # entry n: the position that follows the first n rows

    # Whether reading a token does no more than to append its row to `written` and to attend to the
    # last of these, as `StaticStep` does on a GPU; a subclass that overrides `attend` must say so.
    steady = True

    def __init_subclass__(cls) -> None:
        if "attend" in vars(cls) and "steady" not in vars(cls):
            cls.steady = False

    @property
    def written(self) -> "list[KVCache]":
        """The caches that the rows of an answer go to."""
        return [self]

    @property
    def length(self) -> int:
        """Rows that every layer holds."""
        return min(self.filled)

    @property
    def next_position(self) -> int:
        """Rotary position of the next row: beyond all so far, those of pruned tokens included."""
        return self.position_after[-1]

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
        self._make_room(layer, k, v, stop)
        self.k[layer][:, :, start:stop] = k
        self.v[layer][:, :, start:stop] = v
        self.filled[layer] = stop

    def reserve(self, rows: int) -> None:
        """Make room for that many rows behind those that are there."""
        for layer, (k, v, filled) in enumerate(zip(self.k, self.v, self.filled)):
            self._make_room(layer, k, v, filled + rows)

    def _make_room(self, layer: int, k: Tensor, v: Tensor, rows: int) -> None:
        """Let a layer's buffers have at least that many rows, like those of k and v."""
        if self.v[layer] is None or rows > self.v[layer].shape[2]:
            used = self.filled[layer]
            # Whole multiples of 64 rows keep every head's rows aligned in memory at any
            # capacity, so that the same rows give the same bits from any buffer.
            rows = math.ceil(max(rows, self.capacity, 2 * used) / 64) * 64
            # Both are allocated before either is replaced: out of memory, neither changes.
            grown = _grown(self.k[layer], k, used, rows), _grown(self.v[layer], v, used, rows)
            self.k[layer], self.v[layer] = grown

    def advance(self, positions: Tensor, next_position: int | None = None) -> None:
        """Note the positions (M,), or (3, M) on three axes, of the rows just appended in all
        layers. next_position: of what follows them; one beyond the highest so far if None."""
        highest = self.next_position - 1
        for position in (positions.amax(0) if positions.dim() == 2 else positions).tolist():
            highest = max(highest, position)
            self.position_after.append(highest + 1)
        if next_position is not None:
            self.position_after[-1] = next_position

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on. Raises: ValueError if length is not in [0,
        self.length]."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in [0, {self.length}], got {length}")
        self.filled = [length] * len(self.filled)
        del self.position_after[length + 1 :]


def _grown(old: Tensor | None, like: Tensor, used: int, rows: int) -> Tensor:
    """A buffer of `rows` rows that starts with the first `used` rows of `old`; a normal tensor,
    which may be written to inside torch.inference_mode() and outside."""
    with torch.inference_mode(False):
        new = like.new_empty(*like.shape[:2], rows, like.shape[3])
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


def attend_uncached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention among the rows alone; used where there is no cache, as in training."""
    return causal_attention(q, k, v)


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


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Within, no gradients, and arithmetic in the dtype of the weights: a caller's autocast would
    give the cache rows of another one."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


# --- the whole model ------------------------------------------------------------------------------


class VLM(nn.Module):
    """Vision tower, projector, decoder and output head, with random weights.

    vision_tower: a module to use in place of `VisionTower(config.vision)`. From pixels (views, 3,
    S, S) and the token ids of a question to those of an answer:

        visual = vlm.project(torch.cat(vlm.encode(pixels)))
        ids = [vlm.config.image_token_id] * len(visual) + question_ids
        answer_ids = vlm.generate(vlm.embed(ids, visual), max_new_tokens=20)
    """

    ENCODE_BATCH = 16  # views on the device at a time; bounds the memory of long clips

    def __init__(self, config: Config, vision_tower: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.vision_tower = vision_tower or VisionTower(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config.text)
        self.lm_head = Linear(config.text.width, config.text.vocab, bias=False)
        if config.newline_id is not None:
            self.image_newline = nn.Parameter(torch.randn(config.text.width))
        self.compiled: Callable | None = None  # Decoder.forward, see `compile_decoding`
        if config.text.tied:
            self.lm_head.weight = self.decoder.embed_tokens.weight

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
        """The dtype of the weights, then the format of each part's quantised layers, which these
        name themselves: "float32 + W4A16 decoder"."""
        names = [str(self.dtype).removeprefix("torch.")]
        for part, module in (("decoder", self.decoder), ("tower", self.vision_tower)):
            kinds = (getattr(layer, "precision", None) for layer in module.modules())
            names += dict.fromkeys(f"{kind} {part}" for kind in kinds if kind)
        return " + ".join(names)

    # --- pictures

    def batches(self, pixels: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pixels of all views, in order, in batches (views, ...) that the tower takes at once:
        equal shapes, at most ENCODE_BATCH, on the model's device and in its dtype."""
        for _, equal in groupby(pixels, key=lambda view: view.shape):
            views = list(equal)
            for start in range(0, len(views), self.ENCODE_BATCH):
                batch = torch.stack(views[start : start + self.ENCODE_BATCH])
                yield batch.to(self.device, self.dtype)

    def encode(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Features (n, merge * merge * C) of every view, as the projector wants them, for pixels
        (views, 3, S, S) or one tensor for each view."""
        tower, features = self.vision_tower, []
        with inference(self.device):
            for batch in self.batches(pixels):
                states = tower(batch)[0][:, tower.summary_tokens :]
                features.extend(tower.merge(states))  # one entry per view
        return features

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens (..., E) of features (..., merge * merge * C); both are wider with
        DeepStack, see `Projector`."""
        with inference(self.device):
            return self.projector(features)

    # --- text

    @torch.no_grad()
    def embed(self, input_ids: Tensor | list[int], visual: Tensor | None = None) -> Tensor:
        """Embeddings (1, T, E) of input_ids (T,), with the rows of visual (V, E) at the image
        placeholders, in order; with DeepStack both are (1 + deepstack) times as wide, text with
        zeros.

        The placeholder id is never looked up: it may lie beyond the table.
        Raises: ValueError if V is not the number of placeholders, or an id lies beyond the table.
        """
        ids = torch.as_tensor(input_ids, dtype=torch.int64, device="cpu").flatten()
        V, vocab = 0 if visual is None else len(visual), self.config.text.vocab
        placeholder = ids == self.config.image_token_id
        if (count := int(placeholder.sum())) != V:
            raise ValueError(f"{count} image placeholders for {V} visual tokens")
        newline = torch.full_like(placeholder, False)
        if self.config.newline_id is not None:
            newline = ids == self.config.newline_id
        ids = ids.masked_fill(placeholder | newline, 0)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            found = f"{int(ids.min())} .. {int(ids.max())}"
            raise ValueError(f"token ids must be in [0, {vocab}), got {found}")
        embeddings = self.decoder.embed_tokens(ids.to(self.device))
        embeddings = F.pad(embeddings, (0, self.config.deepstack * self.config.text.width))
        if V:
            embeddings[placeholder.to(self.device)] = visual.to(embeddings)
        if newline.any():
            embeddings[newline.to(self.device)] = self.image_newline
        return embeddings[None]

    def read(
        self,
        embeddings: Tensor,
        cache: KVCache | None = None,
        *,
        positions: Tensor | None = None,
        next_position: int | None = None,
    ) -> Tensor:
        """Hidden states (1, T, E) of embeddings (1, T, E), which continue what the cache holds.

        Args:
            cache: holds the earlier rows and receives these. None: the rows attend causally to
                themselves only, and gradients flow.
            positions: (T,) integers, or (3, T) for M-RoPE; from `cache.next_position` on if None.
            next_position: of the row that is read after these; highest + 1 if None.

        A call that fails truncates the cache to its former length. Raises: ValueError for positions
        of another shape.
        """
        T = embeddings.shape[1]
        if positions is None:
            start = 0 if cache is None else cache.next_position
            positions = torch.arange(start, start + T, device="cpu")
        if tuple(positions.shape) not in ((T,), (3, T)):
            raise ValueError(f"positions must be ({T},) or (3, {T}), got {tuple(positions.shape)}")
        if cache is None:
            return self.decoder(embeddings, positions.to(self.device), attend_uncached)
        if len(cache.filled) != self.config.text.layers:
            found, layers = len(cache.filled), self.config.text.layers
            raise ValueError(f"a cache for this model has {layers} layers, got {found}")
        length = cache.length
        decoder = self.decoder
        if self.compiled and T == 1:
            decoder = partial(self.compiled, decoder)
        try:
            with inference(self.device):
                hidden = decoder(embeddings, positions.to(self.device), cache.attend)
            cache.advance(positions, next_position)
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
        stop_ids: Collection[int] | None = None,
    ) -> list[int]:
        """Read the prompt embeddings (1, T, E) and answer it token by token.

        Args:
            cache: what was read before; the prompt and the answer are added, except the answer's
                last token, which is generated but not read. A new dense cache if None.
            max_new_tokens: at least 1.
            temperature: 0 takes the likeliest token, t > 0 draws from softmax(logits / t).
            top_p: draw only from the likeliest tokens that together reach this probability, in
                (0, 1].
            seed: makes the draws repeatable.
            stop_ids: tokens that end the answer; the checkpoint's if None.

        Returns: the new token ids; a stop token, if one came, is the last.
        Raises: ValueError before anything is written, if an argument is out of range or the context
        would exceed the model's limit; ValueError while decoding, if the largest logit is not
        finite.
        """
        check_sampling(max_new_tokens, temperature, top_p, seed, stop_ids)
        E = (1 + self.config.deepstack) * self.config.text.width
        shape = tuple(embeddings.shape)
        if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != E:
            raise ValueError(f"embeddings must be (1, T, {E}) with T at least 1, got {shape}")
        T = shape[1]
        if cache is None:
            cache = KVCache(self.config.text.layers, capacity=T + max_new_tokens)
        self.check_room(cache, T, max_new_tokens)
        hidden = self.read(embeddings, cache)
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop_ids": stop_ids}
        return list(self.decode(hidden, cache, max_new_tokens=max_new_tokens, **sampling))

    def check_room(self, cache: KVCache, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise ValueError if a prompt and its answer do not fit behind what the cache holds."""
        used, limit = cache.next_position, self.config.text.max_positions
        if prompt_tokens == 0 or used + prompt_tokens + max_new_tokens - 1 > limit:
            raise ValueError(
                f"the model has {limit} positions: {used} are taken, the prompt needs "
                f"{prompt_tokens} (at least 1) and the answer up to {max_new_tokens - 1}"
            )

    @torch.no_grad()
    def decode(
        self,
        hidden: Tensor,
        cache: KVCache,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yield the answer's tokens one by one, each as soon as it is known. hidden (1, T, E): what
        `read` returned for the prompt; cache: holds the prompt; the others as for `generate`."""
        stop = set(self.config.stop_ids if stop_ids is None else stop_ids)
        temperature, top_p = float(temperature), float(top_p)
        generator = torch.Generator("cpu")  # its own, so that nobody else's draws change
        generator.seed() if seed is None else generator.manual_seed(int(seed))
        for number in range(1, max_new_tokens + 1):
            with inference(self.device):
                logits = self.lm_head(hidden[0, -1])
            if self.config.image_token_id < len(logits):
                logits[self.config.image_token_id] = -torch.inf  # a placeholder is no answer
            token = sample(logits, temperature, top_p, generator)
            yield token
            if token in stop or number == max_new_tokens:
                return
            if number == 1:
                read = self._reader(cache, max_new_tokens - 1)
            hidden = read(token)

    def _reader(self, cache: KVCache, tokens: int) -> Callable[[int], Tensor]:
        """What reads a token behind what the cache holds and returns its hidden state (1, 1, E)."""
        kernels = triton and self.config.text.head_dim <= MAX_HEAD_DIM  # nothing waits for the GPU
        if self.device.type == "cuda" and kernels and cache.steady and tokens >= GRAPH_TOKENS:
            return StaticStep(self, cache, tokens)
        return lambda token: self.read(self.embed([token]), cache)

    def compile_decoding(self) -> None:
        """Read single rows, that is the tokens of an answer, by torch.compile from now on: all that
        a layer does beside attention is fused into a few loops. The first answer from a cache of
        each type takes longer, by two to seven seconds a layer; results may differ in the last
        bits. Prompts still run eagerly.

        Raises: RuntimeError where torch.compile does not work (it needs a C++ compiler), and on a
        GPU, which decodes by a CUDA graph (`StaticStep`) anyway.
        """
        if self.device.type == "cuda":
            raise RuntimeError("a GPU decodes by a CUDA graph, which needs no torch.compile")
        try:
            torch.compile(torch.square)(torch.ones(64, device=self.device))
        except Exception as error:  # of many kinds, none of them public
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise RuntimeError(f"torch.compile does not work here: {reason}") from error
        self.compiled = torch.compile(Decoder.forward, dynamic=True)


class StaticStep:
    """Reads the tokens of an answer one by one, as `VLM.read` does, by a CUDA graph on a GPU.

    A decoding step is some thousand small kernels, which take longer to launch than to run. A graph
    launches all of them at once, if nothing changes from step to step but numbers on the device: so
    the token, its position, the rows it is written to and the length that is attended to are
    tensors. The kernels and the bits are those of `VLM.read`.

    Args:
        cache: holds what comes before the answer, and is `steady`.
        tokens: that many are read at most.
    """

    def __init__(self, model: VLM, cache: KVCache, tokens: int):
        self.model, self.cache = model, cache
        new = {"device": model.device, "dtype": torch.int64}
        self.token = torch.zeros(1, **new)
        self.position = torch.tensor([cache.next_position], **new)
        self.rows = [torch.tensor([each.length], **new) for each in cache.written]
        self.length = self.rows[-1][0] + 1
        for each in cache.written:
            each.reserve(tokens)
        self.launch, self.steps = self._step, 0

    def __call__(self, token: int) -> Tensor:
        """Hidden state (1, 1, E), which the next call overwrites."""
        self.token.fill_(token)
        if self.steps == 1 and self.model.device.type == "cuda":
            self.launch = self._captured()  # the first step has compiled the kernels
        self.launch()
        self.steps += 1
        for each in self.cache.written:
            each.filled = [filled + 1 for filled in each.filled]
        self.cache.advance(torch.tensor([self.cache.next_position], device="cpu"))
        return self.hidden

    def _step(self) -> None:
        config = self.model.config
        with inference(self.model.device):
            embedding = self.model.decoder.embed_tokens(self.token)[None]
            embedding = F.pad(embedding, (0, config.deepstack * config.text.width))
            self.hidden = self.model.decoder(embedding, self.position, self._attend)
            for number in (self.position, self.length, *self.rows):
                number += 1

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write one row into every cache; attention over the last of them."""
        for cache, row in zip(self.cache.written, self.rows):
            cache.k[layer].index_copy_(2, row, k)
            cache.v[layer].index_copy_(2, row, v)
        return decode_attention(q, cache.k[layer], cache.v[layer], length=self.length)

    def _captured(self) -> Callable[[], None]:
        """The step as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.model.device), torch.cuda.graph(graph):
            self._step()
        return graph.replay


class Stopwatch:
    """Milliseconds per stage; `lap` ends one and begins the next, when the GPU has caught up."""

    def __init__(self, device: torch.device):
        self.device, self.milliseconds = device, {}
        self.last = self._now()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = self._now()
        self.milliseconds[stage] = now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * time.perf_counter()


# --- sampling -------------------------------------------------------------------------------------


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    stop_ids: Collection[int] | None = None,
) -> None:
    """Raise ValueError for arguments of `VLM.generate` that mean nothing."""
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    if not isinstance(temperature, Real) or not 0 <= float(temperature) < 2**127:
        raise ValueError(f"temperature must be 0 or more, got {temperature!r}")
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
    if seed is not None and (not isinstance(seed, Integral) or not 0 <= seed < 2**63):
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
    if stop_ids is not None and not (
        isinstance(stop_ids, Collection)
        and getattr(stop_ids, "ndim", 1) == 1
        and all(isinstance(i, Integral) for i in stop_ids)
    ):
        raise ValueError(f"stop_ids must be token ids, got {stop_ids!r}")


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits (vocabulary,): the likeliest at temperature 0, else a draw. Raises:
    ValueError, at every temperature, if the largest logit is NaN or infinite."""
    highest = logits.max()
    if not highest.isfinite():
        dtype = str(logits.dtype).removeprefix("torch.")
        raise ValueError(
            f"the largest logit is {float(highest)}: damaged weights, or an overflow in {dtype}"
        )
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    probabilities, ids = probabilities.sort(descending=True)
    before = probabilities.cumsum(0) - probabilities  # mass of the likelier tokens
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
