"""LLaVA-NeXT (llava-v1.6, arXiv 2310.03744 and its authors' report of January 2024): LLaVA-1.5 that
sees a picture twice, whole and as a grid of tiles.

Source: the files of llava-hf/llava-v1.6-vicuna-7b-hf and -mistral-7b-hf, and LlavaNext's model and
Pillow processor in Hugging Face transformers.

A picture is two views. The first is all of it in one square. The second is the picture, its shape
kept, on a canvas of rows x columns tiles; the tower sees the tiles one by one, and their patches
are joined to one grid again, less the canvas beside the picture. Every row of that grid ends with
the embedding `image_newline`: that is text to us, and stays whatever is pruned. Salience is the
class token's, of its own tile. The frames of a clip, which the model was not trained on, are seen
whole only. Axes as in processor.py; "rows" and "columns" of a view count tiles.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from model import Config

from . import llava, processor, values
from .processor import Clip, View
from .values import Folder

MODEL_TYPES = ("llava_next",)
NAMES = [*llava.NAMES, ("image_newline", "image_newline"), ("model.image_newline", "image_newline")]

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # height, width
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
)


def config(folder: Folder) -> Config:
    """The sizes of a LLaVA-NeXT checkpoint. Raises: ValueError as for LLaVA."""
    made = llava.config(folder)
    beyond = max(made.text.vocab, made.image_token_id + 1)  # no token has this id
    return replace(made, newline_id=beyond)


class Processor(processor.Processor):
    """A picture becomes a whole view and a view of tiles, the frame of a clip a whole one."""

    template = f"{SYSTEM}USER: {{image}}\n{{question}} ASSISTANT:"
    template += "{answer}</s>USER: {question} ASSISTANT:"
    mistral = "[INST] {image}\n{question} [/INST]{answer}</s>[INST] {question} [/INST]"
    required_steps, size_key = ("do_center_crop", "do_pad"), "crop_size"
    config_keys = ("text_config", "image_grid_pinpoints")

    def __init__(self, tokenizer, config: Config, settings: dict, *texts, **named):
        if values.section(settings, "text_config").get("model_type") == "mistral":
            self.template = self.mistral
        super().__init__(tokenizer, config, settings, *texts, **named)

    def read_settings(self, settings: dict) -> None:
        super().read_settings(settings)
        whole = values.edge(settings, "size", {"shortest_edge"})
        if whole != self.image_size:
            raise ValueError(f"size must be crop_size, {self.image_size}, got {whole}")
        self.pinpoints = values.pinpoints(settings, PINPOINTS, self.image_size)

    # --- pictures

    def views(self, pictures: Sequence[Image.Image] | Clip) -> list[View]:
        views, S = [], self.image_size
        for number, picture in enumerate(processor.pictures_of(pictures)):
            whole = View(picture.resize((S, S), self.resample), number)
            if isinstance(pictures, Clip):
                views.append(whole)
            else:
                views += [whole._replace(original=picture.size), self._on_canvas(picture, number)]
        return views

    def _on_canvas(self, picture: Image.Image, number: int) -> View:
        """The picture in the middle of a black canvas of whole tiles."""
        height, width = self._best_canvas(picture)
        w, h = picture.size
        if width / w < height / h:
            size = width, min(math.ceil(h * (width / w)), height)
        else:
            size = min(math.ceil(w * (height / h)), width), height
        canvas = Image.new("RGB", (width, height))
        corner = (width - size[0]) // 2, (height - size[1]) // 2
        canvas.paste(processor.resized(picture, size, self.resample), corner)
        tiles = height // self.image_size, width // self.image_size
        return View(canvas, number, *tiles, original=picture.size)

    def _best_canvas(self, picture: Image.Image) -> list[int]:
        """Height and width of the canvas that keeps most of the picture's pixels; of equal ones
        that which leaves least of itself empty, the first of these."""

        def worth(canvas: list[int]) -> tuple[int, int]:
            height, width = canvas
            scale = min(width / picture.width, height / picture.height)
            shown = int(picture.width * scale) * int(picture.height * scale)
            shown = min(shown, picture.width * picture.height)
            return shown, shown - height * width

        return max(self.pinpoints, key=worth)

    def pixels_of(self, view: View) -> list[Tensor]:
        tiles = processor.tiles(view.picture, self.image_size, view.number)  # of a whole view, one
        return [self._normalise(tile.picture) for tile in tiles]

    # --- tokens

    def _grid(self, view: View) -> tuple[int, int, int, int]:
        """Of the patches of a view's canvas, those that show the picture: left, top, right, bottom
        (exclusive)."""
        side = math.isqrt(self.config.vision.visual_tokens)
        if not view.rows:
            return 0, 0, side, side
        (w, h), W, H = view.original, view.columns * side, view.rows * side
        if w / h > W / H:
            beside = (H - int(round(h * (W / w), 7))) // 2
            return 0, beside, W, H - beside
        beside = (W - int(round(w * (H / h), 7))) // 2
        return beside, 0, W - beside, H

    def join(self, views: list[View], rows: list[Tensor]) -> list[Tensor]:
        side, first, joined = math.isqrt(self.config.vision.visual_tokens), 0, []
        for view in views if rows else []:
            down, across = max(1, view.rows), max(1, view.columns)
            left, top, right, bottom = self._grid(view)
            patches = torch.cat(rows[first : first + down * across])
            patches = patches.view(down, across, side, side, *patches.shape[1:]).transpose(1, 2)
            patches = patches.flatten(2, 3).flatten(0, 1)  # of the canvas, (rows, columns, ...)
            joined.append(patches[top:bottom, left:right].flatten(0, 1))
            first += down * across
        return joined

    def ids_of_view(self, view: View, kept: Tensor) -> list[int]:
        left, top, right, bottom = self._grid(view)
        if view.rows:
            in_rows = (kept // max(1, right - left)).bincount(minlength=bottom - top).tolist()
        else:
            in_rows = [len(kept)]
        ids = [i for n in in_rows for i in (*[self.image_token_id] * n, self.config.newline_id)]
        followed = not view.rows and view.original is not None  # by the view of tiles
        return ids[:-1] if followed else ids

    def token_boxes(self, view: View, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        left, top, right, bottom = self._grid(view)
        patch = self.config.vision.patch_size

        def edges(first: int, last: int, whole: int, drawn: int) -> list[int]:
            return [min(round(i * patch * drawn / whole), drawn) for i in range(first, last + 1)]

        x = edges(left, right, view.picture.width, size[0])
        y = edges(top, bottom, view.picture.height, size[1])
        return processor.boxes_between(x, y)

    def _text(self, views: list[View]) -> str:
        pictures = views[-1].number + 1
        frames = [self.frame.replace("{n}", str(n + 1)) for n in range(pictures)]
        each = "{image}" * (len(views) // pictures)
        return "\n".join(frame.replace("{image}", each) for frame in frames)
