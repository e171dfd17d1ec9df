"""VILA-1.5, LongVILA and NVILA-Lite (arXiv 2312.07533, 2408.10188, 2412.04468): SigLIP's last layer
but one, merged patches, Llama or Qwen2; a grid of tiles, or frames spread over a clip.

Their checkpoints come in three folders, llm/, vision_tower/ and mm_projector/, or in one. Source:
VILA's public code. Axes as in processor.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer

from model import ACTIVATIONS, Config

from . import networks, processor, values
from .processor import Clip, View
from .values import Folder

MODEL_TYPES = ("llava_llama", "llava_qwen2", "vila", "nvila", "nvila_lite")
NAMES = [
    ("mm_projector.", "projector."),
    ("mm_projector.layers.weight", "projector.layers.0.weight"),  # a single layer
    ("mm_projector.layers.bias", "projector.layers.0.bias"),
    ("llm.model.", "decoder."),
    ("llm.lm_head.", "lm_head."),
    *networks.tower_names(theirs=["vision_tower.vision_model.", "vision_tower."]),
]
PARTS = ("llm", "vision_tower", "mm_projector")  # folders
PROJECTORS = {  # patches along each side of the block that becomes one visual token
    "linear": 1,
    "mlp2x_gelu": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}


def read(path: Path, raw: dict) -> Folder:
    """The folder with the parts' configurations where other families write them. As in VILA's code
    they are what counts: sections of the root's config.json that repeat them are not read."""
    if not (path / "llm").is_dir():
        return Folder(path, raw)
    llm, tower, projector = (values.read_json(path / part / "config.json") for part in PARTS)
    sections = {"text_config": llm, "vision_config": tower.get("vision_config", tower)}
    kind = {key: projector[key] for key in ("mm_projector_type",) if key in projector}
    return Folder(path, raw | sections | kind, PARTS)


def config(folder: Folder) -> Config:
    """The sizes of a VILA checkpoint. Raises: ValueError for an option that model.py does not
    implement."""
    raw = folder.config
    scales = [key for key in ("s2", "dynamic_s2") if raw.get(key)]
    if scales or "s2" in str(raw.get("image_aspect_ratio")):
        raise ValueError(f"{folder.path}: dynamic_s2, features of several scales, is not supported")
    vision = networks.vision_config(raw, "siglip_vision_model", "mm_vision_select_layer")
    accepted = networks.select_words(vision)  # only checked: patches alone feed the projector
    values.choice(raw, "mm_vision_select_feature", accepted[0], accepted)
    kind = values.choice(raw, "mm_projector_type", None, PROJECTORS)
    text = networks.text_config(raw)
    # The first projector leaves merged tokens column by column, as VILA's code did when its
    # checkpoints came out (commit 253d0a9). Later code (33b4f1a) orders them row by row, like the
    # "_fix" ones: to have that, write "mlp_downsample_2x2_fix" into the checkpoint's configuration.
    vision = replace(vision, merge=PROJECTORS[kind], merge_by_columns=kind == "mlp_downsample")
    return Config(
        vision=vision,
        text=text,
        image_token_id=networks.image_token_id(raw, text.vocab),
        projector=kind,
        projector_activation=values.choice(raw, "projector_hidden_act", "gelu", ACTIVATIONS),
        projector_bias=values.flag(raw, "multimodal_projector_bias", True),
        stop_ids=values.stop_ids(folder),
    )


class Processor(processor.Processor):
    """A single picture is cut into the grid of tiles nearest to its shape; several pictures and the
    frames of a clip are squeezed into a square."""

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
    config_keys = (
        "model_type", "image_aspect_ratio", "min_tiles", "max_tiles", "num_video_frames",
        "image_encoder", "video_encoder",
    )  # fmt: skip

    def __init__(self, tokenizer: Tokenizer, *arguments, template: str | None = None, **texts):
        known = [token for token in self.by_token if tokenizer.token_to_id(token) is not None]
        if known:
            self.template = self.by_token[known[-1]]
        super().__init__(tokenizer, *arguments, template=template, **texts)
        # VILA-1.5 wrote a new line into the text behind every picture; later code appends its token
        # to the picture, which with Llama's tokenizer is not the same.
        self.end_of_view = tuple(self._encode("\n")) if known else ()

    def read_settings(self, settings: dict) -> None:
        super().read_settings(settings)
        single = str(settings.get("model_type")).startswith("nvila")  # those files leave it out
        accepted = ("dynamic", "resize", "pad", None)
        default = "dynamic" if single else None
        self.shape = values.choice(settings, "image_aspect_ratio", default, accepted)
        self.min_tiles = values.size(settings, "min_tiles", 1, most=64)
        self.max_tiles = values.size(settings, "max_tiles", 12, most=64)
        self.clip_frames = values.size(settings, "num_video_frames", 8, most=2**16)
        for key in ("image_encoder", "video_encoder"):
            encoder = settings.get(key) or "Basic"
            if "Basic" not in str(encoder) or "_tokens" in str(encoder):
                raise ValueError(f"{key} must be VILA's basic one, got {encoder!r}")

    def views(self, pictures: Sequence[Image.Image] | Clip) -> list[View]:
        if isinstance(pictures, Clip):
            clip, last = pictures, pictures.begins[-1]
            spread = processor.evenly_spaced(0, last, self.clip_frames)
            sampled = [round(clip.place(tick)) for tick in spread]
            return [
                View(self._squash(clip.frames[frame]), number, second=clip.second(frame))
                for number, frame in enumerate(sampled)
            ]
        if len(pictures) == 1 and self.shape == "dynamic":
            return self._cut(pictures[0])
        return [View(self._squash(picture), number) for number, picture in enumerate(pictures)]

    def _squash(self, picture: Image.Image) -> Image.Image:
        if self.shape == "pad":
            picture = processor.pad_to_square(picture, self.mean)
        resample = Image.Resampling.BICUBIC if self.shape == "resize" else self.resample
        return picture.resize((self.image_size, self.image_size), resample)

    def _cut(self, picture: Image.Image) -> list[View]:
        # 1. Choose the grid of tiles whose shape is nearest to the picture's.
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

        # 2. Resize the picture to that grid and cut it; the whole picture comes last.
        size = S * best[0], S * best[1]
        large = processor.resized(picture, size, Image.Resampling.BICUBIC)  # as in VILA
        cut = processor.tiles(large, S, 0)
        if len(cut) == 1:
            return [View(cut[0].picture)]
        return [*cut, View(picture.resize((S, S)), 0, best[1], best[0])]

    def _text(self, views: list[View]) -> str:
        one = views[-1].number == 0 and views[0].second is None
        written = not self.end_of_view or (one and self.shape == "dynamic")
        return ("{image}\n" if written else "{image}") * len(views)
