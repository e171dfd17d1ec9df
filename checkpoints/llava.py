"""LLaVA-1.5 (arXiv 2310.03744): a CLIP tower, a two-layer MLP, Llama; one square view a picture.

Source: the files of llava-hf/llava-1.5-7b-hf, and CLIP's and LLaVA's processors in Hugging Face
transformers, whose resizing this repeats in Pillow.
"""

from collections.abc import Sequence

from PIL import Image

from model import ACTIVATIONS, Config

from . import networks, processor, values
from .processor import Clip, View
from .values import Folder

MODEL_TYPES = ("llava",)
NAMES = [
    ("multi_modal_projector.linear_1.", "projector.layers.0."),
    ("multi_modal_projector.linear_2.", "projector.layers.2."),
    ("language_model.model.", "decoder."),
    ("language_model.lm_head.", "lm_head."),
    *networks.tower_names(theirs=["vision_tower.vision_model.", "vision_tower."]),
    # As transformers hold them in memory since 4.52:
    ("model.multi_modal_projector.linear_1.", "projector.layers.0."),
    ("model.multi_modal_projector.linear_2.", "projector.layers.2."),
    ("model.language_model.", "decoder."),
    ("lm_head.", "lm_head."),
    *networks.tower_names(theirs=["model.vision_tower.vision_model.", "model.vision_tower."]),
]


def config(folder: Folder) -> Config:
    """The sizes of a LLaVA checkpoint. Raises: ValueError for an option that model.py does not
    implement."""
    raw = folder.config
    if "mm_vision_tower" in raw and "text_config" not in raw:
        raise ValueError(
            "config.json has the layout of LLaVA's authors (mm_vision_tower), accepted: the "
            "converted one, as of llava-hf/llava-1.5-7b-hf"
        )
    vision = networks.vision_config(raw, "clip_vision_model", "vision_feature_layer")
    accepted = networks.select_words(vision)  # only checked: patches alone feed the projector
    values.choice(raw, "vision_feature_select_strategy", "default", accepted)
    return Config(
        vision=vision,
        text=networks.text_config(raw),
        image_token_id=networks.image_token_id(raw, 32000),
        projector="mlp2x_gelu",
        projector_activation=values.choice(raw, "projector_hidden_act", "gelu", ACTIVATIONS),
        projector_bias=values.flag(raw, "multimodal_projector_bias", True),
        stop_ids=values.stop_ids(folder),
    )


class Processor(processor.Processor):
    """A picture becomes one square: its middle, or all of it padded (`do_pad`); the frames of a
    clip are separate pictures."""

    template = "USER: {image}\n{question} ASSISTANT:{answer}</s>USER: {question} ASSISTANT:"
    required_steps, size_key = ("do_center_crop",), "crop_size"

    def read_settings(self, settings: dict) -> None:
        super().read_settings(settings)
        self.resize_edge = values.edge(settings, "size", {"shortest_edge"})
        # LLaVA's own class pads; the older files name CLIP's, which knows no such setting.
        clip = str(settings.get("image_processor_type")).startswith("CLIP")
        self.pad = False if clip else values.flag(settings, "do_pad", False)

    def views(self, pictures: Sequence[Image.Image] | Clip) -> list[View]:
        pictures = processor.pictures_of(pictures)
        return [View(self._square(picture), number) for number, picture in enumerate(pictures)]

    def _square(self, picture: Image.Image) -> Image.Image:
        """A picture in the model's size, rounded as by CLIP's processor."""
        # 1. Pad, if the checkpoint says so: then nothing is cut off.
        if self.pad:
            picture = processor.pad_to_square(picture, self.mean)

        # 2. Resize the shorter side.
        short = min(picture.size)
        size = tuple(int(self.resize_edge * side / short) for side in picture.size)
        picture = processor.resized(picture, size, self.resample)

        # 3. Cut out the centre.
        left, top = ((side - self.image_size) // 2 for side in size)
        return picture.crop((left, top, left + self.image_size, top + self.image_size))
