"""SmolVLM (model_type idefics3) and SmolVLM2 (smolvlm), arXiv 2504.05299: SigLIP's last layer,
merged patches, one linear projection, Llama; tiles and the whole picture.

Source: Idefics3's and SmolVLM's configurations and processors in Hugging Face transformers,
whose resizing this repeats in Pillow. Axes as in processor.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from model import ACTIVATIONS, Config

from . import networks, processor, values
from .processor import Clip, View
from .values import Folder

MODEL_TYPES = ("idefics3", "smolvlm")
NAMES = [
    ("model.connector.modality_projection.proj.", "projector.layers.0."),
    ("model.text_model.", "decoder."),
    ("lm_head.", "lm_head."),
    *networks.tower_names(theirs=["model.vision_model.", "model.vision_model.vision_model."]),
]


def config(folder: Folder) -> Config:
    """The sizes of a SmolVLM checkpoint. Raises: ValueError for an option that model.py does not
    implement."""
    raw = folder.config
    tower = "smolvlm_vision" if raw["model_type"] == "smolvlm" else "idefics3_vision"
    vision = networks.vision_config(raw, tower)
    side, merge = math.isqrt(vision.patches), values.size(raw, "scale_factor", 2, most=64)
    if side % merge:
        raise ValueError(f"scale_factor must divide the {side} patches of a side, got {merge}")
    return Config(
        vision=replace(vision, merge=merge, last_norm=True),
        text=networks.text_config(raw),
        image_token_id=networks.image_token_id(raw, 128257),
        projector="linear",
        projector_activation=values.choice(raw, "projector_hidden_act", "gelu", ACTIVATIONS),
        projector_bias=values.flag(raw, "multimodal_projector_bias", False),
        stop_ids=values.stop_ids(folder),
    )


class Processor(processor.Processor):
    """A picture is cut into tiles, the whole of it comes last; frames of a clip are not cut."""

    template = (
        "<|im_start|>User:{image}{question}<end_of_utterance>\nAssistant:"
        "{answer}<end_of_utterance>\nUser: {question}<end_of_utterance>\nAssistant:"
    )
    default_resample = 1  # Lanczos
    default_mean = default_std = [0.5, 0.5, 0.5]
    size_key = "max_image_size"
    picture_tokens = ["<fake_token_around_image>"]

    def read_settings(self, settings: dict) -> None:
        self.image_size = values.edge(settings, self.size_key, {"longest_edge"})
        self.longest_edge = values.edge(settings, "size", {"longest_edge"}, most=4096)
        self.split = values.flag(settings, "do_image_splitting", True)
        section = settings.get("video_processor", settings)
        video = section.get("video_sampling")
        if video is None and {"fps", "num_frames"} & section.keys():  # newer files
            names = {"max_frames": "num_frames", "fps": "fps", "video_size": "size"}
            video = {name: section[theirs] for name, theirs in names.items() if theirs in section}
        for name, ours in (("image_mean", self.mean), ("image_std", self.std)):
            if not values.per_channel(section, name, ours.flatten().tolist()).equal(ours):
                raise ValueError(f"{name} of clips must be that of pictures, got {section[name]!r}")
        self.clip_frames = self.clip_fps = None  # SmolVLM: frames are pictures
        if isinstance(video, dict):
            self.clip_frames = values.size(video, "max_frames", 64)
            self.clip_fps = values.number(video, "fps", 1)
            self.clip_edge = values.edge(video, "video_size", {"longest_edge"}, most=4096)

    def views(self, pictures: Sequence[Image.Image] | Clip) -> list[View]:
        if not isinstance(pictures, Clip):
            views = (self._cut(picture, number) for number, picture in enumerate(pictures))
            return [view for of_one in views for view in of_one]
        clip = pictures
        if self.clip_fps is None:
            return [View(self._squash(p, self.longest_edge), n) for n, p in enumerate(clip.frames)]
        return [
            View(
                self._squash(clip.frames[frame], self.clip_edge), number,
                second=clip.second(frame), duration=clip.duration,
            )
            for number, frame in enumerate(self._sampled(clip))
        ]  # fmt: skip

    def _cut(self, picture: Image.Image, number: int) -> list[View]:
        """Resized to the longest edge, then up to whole tiles, then cut; the whole picture last."""
        if not self.split:
            return [View(self._squash(picture, self.longest_edge), number)]

        # 1. Resize the longer side to the longest edge, then both to whole tiles.
        S = self.image_size
        picture = self._longest(picture, self.longest_edge)
        width, height = picture.size
        if width >= height:
            wide = math.ceil(width / S) * S
            size = wide, math.ceil(int(wide / (width / height)) / S) * S
        else:
            high = math.ceil(height / S) * S
            size = math.ceil(int(high * (width / height)) / S) * S, high
        picture = processor.resized(picture, size, self.resample)

        # 2. Cut it; the whole picture comes last.
        if size == (S, S):
            return [View(picture, number)]
        whole = View(picture.resize((S, S), self.resample), number, size[1] // S, size[0] // S)
        return [*processor.tiles(picture, S, number), whole]

    def _longest(self, picture: Image.Image, longest: int) -> Image.Image:
        """The longer side becomes `longest`, the other follows and is made even."""
        ratio = picture.width / picture.height
        other = int(longest / ratio if ratio >= 1 else longest * ratio)
        other = max(other + other % 2, 1)
        size = (longest, other) if ratio >= 1 else (other, longest)
        return processor.resized(picture, size, self.resample)

    def _squash(self, picture: Image.Image, longest: int) -> Image.Image:
        """Resized to the longest edge, then to one tile."""
        S = self.image_size
        return self._longest(picture, longest).resize((S, S), self.resample)

    def _sampled(self, clip: Clip) -> list[int]:
        """Which frames are shown: `clip_fps` in a second, `clip_frames` at most, evenly spread in
        time. Of a long clip, by transformers' rule, the first and the last second are left out."""
        wanted = max(1, min(round(self.clip_fps * clip.duration), self.clip_frames))
        first, last = 0, clip.begins[-1]
        if clip.duration - 2 > self.clip_frames * self.clip_fps:
            first, last = int(clip.rate), min(int(clip.end - clip.rate), last)
        if first >= last:
            first, last = 0, clip.begins[-1]
        ticks = processor.evenly_spaced(first, last, wanted)
        return sorted({int(clip.place(tick)) for tick in ticks})

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
