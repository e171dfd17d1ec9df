"""Qwen3-VL (arXiv 2511.21631), dense models, and Cosmos-Reason2, which is one: Qwen2.5-VL with a
tower without windows, features of earlier layers for the decoder's first ones (DeepStack), and the
times of a clip written into the text.

Source: the files of Qwen/Qwen3-VL-8B-Instruct, its model and processors in Hugging Face
transformers. Axes and terms as in qwen2_5_vl.py.

DeepStack: the patches' states after a few of the tower's layers are projected like the last ones,
and added to the hidden rows of the visual tokens after the decoder's first layers, while they are
read; a token that is pruned takes all its vectors with it. Every pair of frames is a span of its
own, so that time moves no position.
"""

from dataclasses import replace

from PIL import Image
from torch import nn

from model import Config

from . import networks, qwen2_5_vl, values
from .processor import Clip, View
from .qwen2_5_vl import QwenVision
from .values import Folder

MODEL_TYPES = ("qwen3_vl",)
MERGERS = 8  # of DeepStack, at most; the models have three
NAMES = [
    ("model.language_model.", "decoder."),
    ("lm_head.", "lm_head."),
    ("model.visual.patch_embed.proj.", "vision_tower.patch_embedding."),
    ("model.visual.pos_embed.", "vision_tower.position_embedding."),
    ("model.visual.blocks.", "vision_tower.layers."),
    ("model.visual.merger.norm.", "vision_tower.post_layernorm."),
    ("model.visual.merger.linear_fc1.", "projector.layers.0."),
    ("model.visual.merger.linear_fc2.", "projector.layers.2."),
    *(
        (f"model.visual.deepstack_merger_list.{n}.{theirs}.", f"projector.deepstack.{n}.{ours}.")
        for n in range(MERGERS)
        for theirs, ours in (("norm", 0), ("linear_fc1", 1), ("linear_fc2", 3))
    ),
]


def config(folder: Folder) -> Config:
    """The sizes of a Qwen3-VL checkpoint. Raises: ValueError for an option that is not
    implemented."""
    raw = values.section(folder.config, "vision_config")
    gelu = "gelu_pytorch_tanh"
    values.choice(raw, "hidden_act", gelu, [gelu], what="vision hidden_act")
    layers = values.size(raw, "depth", 27, most=1000)
    table = values.size(raw, "num_position_embeddings", 2304)
    if round(table**0.5) ** 2 != table:
        raise ValueError(f"num_position_embeddings must be a square, got {table}")
    deepstack = values.layer_numbers(raw, "deepstack_visual_indexes", (8, 16, 24))
    text = networks.text_config(folder.config)
    if len(deepstack) > min(MERGERS, text.layers) or any(n >= layers for n in deepstack):
        raise ValueError(
            f"deepstack_visual_indexes must name at most {min(MERGERS, text.layers)} of "
            f"{layers} layers, got {deepstack}"
        )
    vision = QwenVision(
        width=values.size(raw, "hidden_size", 1152),
        mlp=values.size(raw, "intermediate_size", 4304),
        layers=layers,
        heads=values.size(raw, "num_heads", 16),
        patch_size=values.size(raw, "patch_size", 16),
        gated=False,
        table=round(table**0.5),
        deepstack=deepstack,
    )
    section = qwen2_5_vl.mrope_section(folder, text.head_dim, [24, 20, 20])
    axes = [0] * (text.head_dim // 2)
    for axis in (1, 2):  # time, row and column by turns, as long as there are any
        axes[axis : 3 * section[axis] : 3] = [axis] * len(axes[axis : 3 * section[axis] : 3])
    return qwen2_5_vl.qwen_config(folder, vision, replace(text, rope_axes=tuple(axes)))


def tower(config: Config) -> nn.Module:
    """Qwen's tower."""
    return qwen2_5_vl.Tower(config.vision)


class Processor(qwen2_5_vl.Processor):
    """As Qwen2.5-VL's, without a system's turn; a pair of frames comes with its time."""

    template = qwen2_5_vl.Processor.template.removeprefix(qwen2_5_vl.Processor.system)
    default_mean = default_std = [0.5, 0.5, 0.5]
    default_pixels = (65536, 16777216)
    frame_pixels = (128 * 32 * 32, 768 * 32 * 32)  # of a whole clip, transformers' default

    def _sampled(self, clip: Clip) -> list[int]:
        """Which frames are shown, by transformers' rule: two a second, evenly spread."""
        total = len(clip.frames)
        wanted = max(int(self.clip_fps * clip.duration), self.clip_least)
        return self._spread(clip, min(wanted, self.clip_most, total))

    def _frame(self, picture: Image.Image, frames: int) -> Image.Image:
        """The bounds are those of all frames together."""
        fewest, most = (bound / frames for bound in self.clip_bounds)
        return self._resized(picture, fewest, most)

    def _text(self, views: list[View]) -> str:
        if views[0].second is None:
            return super()._text(views)
        return "".join(
            f"<{view.second:.1f} seconds><|vision_start|>{{image}}<|vision_end|>" for view in views
        )
