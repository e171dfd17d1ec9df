"""Qwen2.5-VL (arXiv 2502.13923), and Cosmos-Reason1 (2503.15558), which is one: pictures in their
own size, pairs of frames, positions on three axes (M-RoPE).

Source: the files of Qwen/Qwen2.5-VL-7B-Instruct, its model and Pillow processor in Hugging Face
transformers, and qwen_vl_utils for what is taken of a clip.

A view is a picture, or two frames of a clip that the tower sees as one. Its patches come in blocks
of merge x merge, block by block, row by row; a block becomes a visual token. Most of the tower's
layers attend within windows, some within the whole view, the last always: its column means are the
salience. Axes as in model.py and processor.py; in addition R rows and U columns of visual tokens in
a view, T = 4 R U patches (merge is 2), P numbers of a patch (3 channels, 2 frames, p x p pixels),
K visual tokens that stay.

Positions. Text has one position on all three axes (time, row, column), a visual token of a span
that begins at s has (s + time, s + row, s + column), and what follows goes on after the highest. A
span is a picture, or all pairs of a clip; the time of pair i is floor(i * tokens a second * seconds
a pair). "contiguous" is the smallest grid that keeps the order: rows, columns and pairs of which
nothing is left do not count, and the text that follows moves up. "original" keeps all positions.
Where everything stays the two are the same. In public code vLLM's pruning of clips (EVS) keeps
original positions for Qwen3-VL, and methods that prune before the decoder mostly number what is
left anew; which of the two is more accurate was not measured here on real weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kernels import linear
from model import Config, Embedding, Linear, TextConfig, VisionConfig, rotate

from . import networks, processor, values
from .processor import Clip, Layout, View
from .values import Folder

MODEL_TYPES = ("qwen2_5_vl",)
NAMES = [
    ("model.", "decoder."),
    ("lm_head.", "lm_head."),
    ("visual.patch_embed.proj.", "vision_tower.patch_embedding."),
    ("visual.blocks.", "vision_tower.layers."),
    ("visual.merger.ln_q.", "vision_tower.post_layernorm."),
    ("visual.merger.mlp.", "projector.layers."),
]
NAMES += [  # as transformers hold them in memory since 4.52
    ("model.language_model.", "decoder."),
    *((f"model.{theirs}", ours) for theirs, ours in NAMES if theirs.startswith("visual.")),
]


@dataclass(frozen=True)
class QwenVision(VisionConfig):
    """Sizes of Qwen's tower; image_size has no meaning."""

    window: int = 0  # edge of a window in visual tokens
    whole_layers: tuple[int, ...] = ()  # of attention within the whole view; all if empty
    gated: bool = True  # RMSNorm and SwiGLU; LayerNorm and GELU (Qwen3) if False
    table: int = 0  # edge of a table of learned positions, Qwen3
    deepstack: tuple[int, ...] = ()  # layers whose outputs are projected too, Qwen3
    tokens_per_second: int = 0  # of positions in time; 0: time is told in text, Qwen3


def read(path: Path, raw: dict) -> Folder:
    """config.json with the decoder's settings in a section of their own, as in newer files."""
    if "text_config" not in raw:
        flat = {key: value for key, value in raw.items() if key != "vision_config"}
        raw = raw | {"text_config": flat | {"model_type": "qwen2_5_vl_text"}}
    return Folder(path, raw)


def config(folder: Folder) -> Config:
    """The sizes of a Qwen2.5-VL checkpoint. Raises: ValueError for an option that is not
    implemented."""
    raw = values.section(folder.config, "vision_config")
    values.choice(raw, "hidden_act", "silu", ["silu"], what="vision hidden_act")
    patch = values.size(raw, "patch_size", values.size(raw, "spatial_patch_size", 14))
    vision = QwenVision(
        width=values.size(raw, "hidden_size", 3584),
        mlp=values.size(raw, "intermediate_size", 3420),
        layers=values.size(raw, "depth", 32, most=1000),
        heads=values.size(raw, "num_heads", 16),
        patch_size=patch,
        tokens_per_second=values.size(raw, "tokens_per_second", 4),
        window=values.size(raw, "window_size", 112) // (2 * patch),
        whole_layers=values.layer_numbers(raw, "fullatt_block_indexes", (7, 15, 23, 31)),
    )
    text = networks.text_config(folder.config)
    section = mrope_section(folder, text.head_dim, [16, 24, 24])
    axes = tuple(axis for axis, pairs in enumerate(section) for _ in range(pairs))
    return qwen_config(folder, vision, replace(text, rope_axes=axes))


def qwen_config(folder: Folder, vision: QwenVision, text: TextConfig) -> Config:
    """What both families have in common."""
    raw = values.section(folder.config, "vision_config")
    for key in ("spatial_merge_size", "temporal_patch_size"):
        values.choice(raw, key, 2, [2])
    values.choice(raw, "in_channels", 3, [3])
    values.choice(raw, "out_hidden_size", text.width, [text.width])
    if vision.width % (4 * vision.heads):
        raise ValueError(f"vision width {vision.width} must be a multiple of 4 x {vision.heads}")
    return Config(
        vision=replace(
            vision, image_size=2 * vision.patch_size, merge=2, class_token=False, eps=1e-6,
            feature_layer=-1, last_norm=True,
        ),
        text=text,
        image_token_id=networks.image_token_id(folder.config, 151655),
        projector="merger",
        stop_ids=values.stop_ids(folder),
        deepstack=len(vision.deepstack),
    )  # fmt: skip


def mrope_section(folder: Folder, head_dim: int, default: list[int]) -> list[int]:
    """How many of the head_dim / 2 pairs are rotated by time, row and column."""
    text = values.section(folder.config, "text_config")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = rope.get("mrope_section", default)
    counts = isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)
    if not counts or len(found) != 3 or sum(found) != head_dim // 2:
        raise ValueError(f"mrope_section must be 3 counts of {head_dim // 2} pairs, got {found!r}")
    return found


# --- tower ----------------------------------------------------------------------------------------


def tower(config: Config) -> nn.Module:
    """Qwen's tower."""
    return Tower(config.vision)


class Tower(nn.Module):
    """Pixels (views, R, U, 4, P) -> states (views, T, (1 + n) C): of every patch the last layer's,
    normalised, and those of the n DeepStack layers. Otherwise as `model.VisionTower`."""

    summary_tokens = 0

    def __init__(self, config: QwenVision):
        super().__init__()
        self.config, C, p = config, config.width, config.patch_size
        self.patch_embedding = nn.Conv3d(3, C, (2, p, p), (2, p, p), bias=not config.gated)
        if config.table:
            self.position_embedding = Embedding(config.table**2, C)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.post_layernorm = norm(config)

    def forward(
        self, pixels: Tensor, attention_layer: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config, (R, U) = self.config, pixels.shape[1:3]
        wanted = None if attention_layer is None else attention_layer % len(self.layers)
        weight = self.patch_embedding.weight.flatten(1)  # kernel and stride are the same
        x = linear(pixels.flatten(1, 3), weight, self.patch_embedding.bias)
        if config.table:
            x = x + self.learned_positions(R, U)
        turns = rotary(places(R, U).to(x.device), config.width // config.heads)
        window = windows(R, U, config.window).to(x.device) if config.window else None
        q = k = None
        states = []
        for depth, block in enumerate(self.layers):
            x, *projected = block(x, turns, None if depth in config.whole_layers else window)
            if depth == wanted:
                q, k = projected
            if depth in config.deepstack:
                states.append(x)
        return torch.cat([self.post_layernorm(x), *states], -1), q, k

    def merge(self, patches: Tensor) -> Tensor:
        """(views, T, C) -> (views, R U, 4 C)."""
        return patches.unflatten(1, (-1, 4)).flatten(2)

    def learned_positions(self, R: int, U: int) -> Tensor:
        """The table of positions stretched over a view's patches, corner on corner, (T, C)."""
        n, C = self.config.table, self.config.width
        table = self.position_embedding.weight.float().T.view(1, C, n, n)
        size = (2 * R, 2 * U)
        grid = F.interpolate(table, size, mode="bilinear", align_corners=True)[0]  # (C, rows, ...)
        row, column = places(R, U).to(grid.device)
        return grid[:, row, column].T.to(self.position_embedding.weight.dtype)


class Block(nn.Module):
    """Pre-norm: x plus attention, then plus MLP. x (views, T, C) -> (views, T, C), and the queries
    and keys (views, H, T, D) of the attention."""

    def __init__(self, config: QwenVision):
        super().__init__()
        self.norm1, self.norm2 = norm(config), norm(config)
        self.attn = Attention(config)
        self.mlp = GatedMLP(config) if config.gated else MLP(config)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor], window: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.attn.query_key_value(self.norm1(x), turns)
        x = x + self.attn(q, k, v, window)
        return x + self.mlp(self.norm2(x)), q, k

    def readers(self) -> dict[nn.Module, list[nn.Linear]]:
        """By norm, all Linears that read what it gives."""
        return {self.norm1: [self.attn.qkv], self.norm2: self.mlp.first()}


class Attention(nn.Module):
    """Attention within the view, or within its windows."""

    def __init__(self, config: QwenVision):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def query_key_value(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Queries and keys, turned, and values, (views, H, T, D) each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return [*(rotate(part.float(), *turns).to(x.dtype) for part in (q, k)), v]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: Tensor | None) -> Tensor:
        """q, k, v (views, H, T, D) -> (views, T, C)."""
        if window is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            there = window >= 0  # (windows, patches of one); the others lie beyond the edge
            q, k, v = (part[:, :, window.clamp(min=0)].transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
            out = out.transpose(1, 2)[:, :, there]  # (views, H, T, D), window by window
            out = out[:, :, window[there].argsort()]
        return self.proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU with biases."""

    def __init__(self, config: QwenVision):
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp)
        self.up_proj = Linear(config.width, config.mlp)
        self.down_proj = Linear(config.mlp, config.width)

    def first(self) -> list[nn.Linear]:
        """The layers that read x."""
        return [self.gate_proj, self.up_proj]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """Two layers and GELU (tanh), Qwen3's."""

    def __init__(self, config: QwenVision):
        super().__init__()
        self.linear_fc1 = Linear(config.width, config.mlp)
        self.linear_fc2 = Linear(config.mlp, config.width)

    def first(self) -> list[nn.Linear]:
        """The layers that read x."""
        return [self.linear_fc1]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


def norm(config: QwenVision) -> nn.Module:
    """The norm of all places in a tower."""
    return (nn.RMSNorm if config.gated else nn.LayerNorm)(config.width, config.eps)


def places(R: int, U: int) -> Tensor:
    """Row and column of every patch, (2, T), in the order of blocks."""
    sides = (torch.arange(2 * n, device="cpu") for n in (R, U))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    blocks = torch.stack([rows, columns]).view(2, R, 2, U, 2)
    return blocks.transpose(2, 3).flatten(1)


def rotary(place: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """cos and +-sin (T, D) as `model.rotate` wants them: the first quarter of a head is turned by
    the row, the second by the column, with angles position * 10000^(-4i/D), i = 0 .. D/4 - 1."""
    frequency = 10000 ** -(torch.arange(0, D // 2, 2, device=place.device).float() / (D // 2))
    angles = (place[..., None].float() * frequency).transpose(0, 1).flatten(1)  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def windows(R: int, U: int, edge: int) -> Tensor:
    """Which patches (windows, 4 * edge * edge) attend to one another: windows of edge x edge visual
    tokens, row by row; -1 for places beyond the view's edge."""
    token = torch.arange(R * U, device="cpu").view(R, U)
    token = F.pad(token, (0, -U % edge, 0, -R % edge), value=-1)
    token = token.view(-(-R // edge), edge, -(-U // edge), edge).transpose(1, 2).flatten(2)
    patches = 4 * token.flatten(0, 1)[..., None] + torch.arange(4, device="cpu")
    return patches.masked_fill(patches < 0, -1).flatten(1)


# --- pictures and text ----------------------------------------------------------------------------


class Processor(processor.Processor):
    """Pictures in whole blocks of patches, near their own size; clips as pairs of frames."""

    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    template = system + (
        "<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
        "{answer}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    picture_tokens = ["<|vision_start|>", "<|vision_end|>"]
    default_pixels = (56 * 56, 28 * 28 * 1280)  # of a picture, fewest and most
    frame_pixels = (128 * 28 * 28, 768 * 28 * 28)  # of a frame, by qwen_vl_utils

    def read_settings(self, settings: dict) -> None:
        vision = self.config.vision
        self.image_size, self.block = vision.image_size, 2 * vision.patch_size
        for key, accepted in (
            ("patch_size", vision.patch_size), ("merge_size", 2), ("temporal_patch_size", 2),
        ):  # fmt: skip
            values.choice(settings, key, accepted, [accepted])
        self.pixels_bounds = values.pixel_bounds(settings, self.default_pixels)
        clips = settings.get("video_processor", {})
        clips = {key: value for key, value in clips.items() if value is not None}
        self.clip_bounds = values.pixel_bounds(clips, self.frame_pixels)
        self.clip_fps = values.number(clips, "fps", 2)
        self.clip_least = values.size(clips, "min_frames", 4, most=2**16)
        self.clip_most = values.size(clips, "max_frames", 768, most=2**16)

    def views(self, pictures: Sequence[Image.Image] | Clip) -> list[View]:
        if not isinstance(pictures, Clip):
            return [
                View(self._resized(picture, *self.pixels_bounds), number)
                for number, picture in enumerate(pictures)
            ]
        clip, numbers = pictures, self._sampled(pictures)
        numbers += numbers[-1:] * (len(numbers) % 2)
        views = []
        for first, second in zip(numbers[::2], numbers[1::2]):
            pair = (self._frame(clip.frames[n], len(numbers)) for n in (first, second))
            views.append(
                View(
                    next(pair), len(views), second=(clip.second(first) + clip.second(second)) / 2,
                    duration=clip.duration, second_picture=next(pair),
                )
            )  # fmt: skip
        return views

    def _sampled(self, clip: Clip) -> list[int]:
        """Which frames are shown, by the rule of qwen_vl_utils: two a second and an even number of
        them, evenly spread."""
        total = len(clip.frames)
        wanted = min(max(self.clip_fps * clip.duration, self.clip_least), self.clip_most, total)
        return self._spread(clip, max(2, int(wanted) // 2 * 2))

    def _spread(self, clip: Clip, count: int) -> list[int]:
        """The numbers of `count` frames, evenly spread."""
        ticks = processor.evenly_spaced(0, clip.begins[-1], count)
        return [round(clip.place(tick)) for tick in ticks]

    def _frame(self, picture: Image.Image, frames: int) -> Image.Image:
        """A frame of a clip of which so many are shown, in its size."""
        return self._resized(picture, *self.clip_bounds)

    def _resized(self, picture: Image.Image, fewest: float, most: float) -> Image.Image:
        """In whole blocks, of about the same shape, the number of pixels within bounds. Raises:
        ValueError for a picture more than 200 times as long as wide."""
        w, h, block = *picture.size, self.block
        if max(w, h) > 200 * min(w, h):
            raise ValueError(f"a picture may be 200 times as long as wide, got {w} x {h}")
        size = [round(side / block) * block for side in (w, h)]
        if size[0] * size[1] > most:
            by = math.sqrt(w * h / most)
            size = [max(block, math.floor(side / by / block) * block) for side in (w, h)]
        elif size[0] * size[1] < fewest:
            by = math.sqrt(fewest / (w * h))
            size = [math.ceil(side * by / block) * block for side in (w, h)]
        return processor.resized(picture, tuple(size), self.resample)

    def pixels_of(self, view: View) -> list[Tensor]:
        """(R, U, 4, P): of every patch its channels, frames, rows and columns of pixels."""
        p = self.config.vision.patch_size
        pair = [view.picture, view.second_picture or view.picture]
        x = torch.stack([self._normalise(picture) for picture in pair])  # (2, 3, height, width)
        x = x.unflatten(3, (-1, 2, p)).unflatten(2, (-1, 2, p))  # (2, 3, R, 2, p, U, 2, p)
        return [x.permute(2, 5, 3, 6, 1, 0, 4, 7).flatten(4).flatten(2, 3)]

    def token_boxes(self, view: View, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        edges = (
            [round(i * drawn / (whole // self.block)) for i in range(whole // self.block + 1)]
            for drawn, whole in zip(size, view.picture.size)
        )
        return processor.boxes_between(*edges)

    def _text(self, views: list[View]) -> str:
        if views[0].second is not None:
            return "<|vision_start|>" + "{image}" * len(views) + "<|vision_end|>"
        image = "<|vision_start|>{image}<|vision_end|>"
        frames = (self.frame.replace("{n}", str(n + 1)) for n in range(len(views)))
        return "".join(frame.replace("{image}", image) for frame in frames)

    # --- positions

    def layout(
        self, views: list[View], sizes: list[int], kept: list[Tensor], positions: str
    ) -> Layout:
        text, *rest = self.parts(kept, views)
        axes, ids, start = [torch.arange(len(text), device="cpu").expand(3, -1)], [*text], len(text)
        spans, span = [], []
        for view, index, shown, after in zip(views, kept, rest[::2], rest[1::2]):
            span.append((view, index))
            ids += shown + after
            if after or view is views[-1]:  # views with no text between are one span
                spans.append((span, len(after)))
                span = []
        for span, length in spans:
            place, extent = self._places(span, positions)
            axes += [place + start]
            start += extent
            axes += [torch.arange(start, start + length, device="cpu").expand(3, -1)]
            start += length
        return Layout(ids, torch.cat(axes, 1), start)

    def _places(self, span: list[tuple[View, Tensor]], positions: str) -> tuple[Tensor, int]:
        """Time, row and column (3, K) of what stays of a span, and how many positions it takes."""
        place, whole = [], [0, 0, 0]
        for number, (view, index) in enumerate(span):
            U, R = (side // self.block for side in view.picture.size)
            place.append(torch.stack([torch.full_like(index, number), index // U, index % U]))
            whole = [number, max(whole[1], R - 1), max(whole[2], U - 1)]
        place = torch.cat(place, 1)
        if positions == "contiguous":
            place = torch.stack([axis.unique(return_inverse=True)[1] for axis in place])
            whole = place.amax(1).tolist() if place.numel() else [-1, -1, -1]
        seconds = (span[0][0].duration or 0) / len(span)  # of a pair
        interval = self.config.vision.tokens_per_second * seconds
        place = torch.cat([(place[:1] * interval).floor().to(place.dtype), place[1:]])
        whole[0] = math.floor(whole[0] * interval) if whole[0] > 0 else whole[0]
        return place, 1 + max(whole)
