"""A family made up for the tests, in one file: whatever a family may differ in, this one does.

Views are not square and have different numbers of tokens; the tower is its own; every token has
three positions (time, row, column) as in Qwen2.5-VL's M-RoPE. `write_checkpoint` makes a folder.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints import processor, values
from checkpoints.processor import Clip, Layout, View
from checkpoints.values import Folder
from checkpoints.weights import hub_names, translate
from model import VLM, Config, TextConfig, VisionBlock, VisionConfig

PATCH = 8  # pixels

MODEL_TYPES = ("ragged",)
NAMES = [("lm.", "decoder."), ("head.", "lm_head."), ("bridge.", "projector.layers."),
         ("eyes.", "vision_tower.")]  # fmt: skip


def config(folder: Folder) -> Config:
    width = values.size(folder.config, "width", 16)
    vision = VisionConfig(width=width, mlp=24, layers=1, heads=2, image_size=PATCH,
                          patch_size=PATCH, feature_layer=-1, class_token=False)  # fmt: skip
    text = TextConfig(
        vocab=values.size(folder.config, "vocab", None), width=32, mlp=48, layers=2, heads=4,
        kv_heads=2, head_dim=12, rope_axes=(0, 1, 2, 0, 1, 2),
    )  # fmt: skip
    return Config(vision, text, image_token_id=folder.config["image"])


def tower(config: Config) -> nn.Module:
    return Tower(config.vision)


class Tower(nn.Module):
    """One block over as many patches as a view has, each with its row and column."""

    summary_tokens = 0

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patches = nn.Conv2d(3, config.width, PATCH, PATCH)
        self.rows, self.columns = (nn.Embedding(9, config.width) for _ in range(2))
        self.block = VisionBlock(config)

    def forward(self, pixels: Tensor, attention_layer: int | None = None) -> tuple:
        x = self.patches(pixels)  # (views, C, rows, columns)
        rows, columns = (table.weight.T for table in (self.rows, self.columns))
        x = x + rows[:, : x.shape[2], None] + columns[:, None, : x.shape[3]]
        x = x.flatten(2).mT
        q, k = self.block.query_key(x)
        return (self.block(x, (q, k)), *((None, None) if attention_layer is None else (q, k)))

    def merge(self, patches: Tensor) -> Tensor:
        return patches


class Processor(processor.Processor):
    """A picture becomes a view of 1 to 8 patches a side, as many as it has whole ones."""

    template = "USER: {image}\n{question} ASSISTANT:{answer}</s>USER: {question} ASSISTANT:"

    def read_settings(self, settings: dict) -> None:
        self.image_size = PATCH

    def views(self, pictures: Sequence[Image.Image] | Clip) -> list[View]:
        pictures = processor.pictures_of(pictures)
        sizes = [tuple(PATCH * min(max(s // PATCH, 1), 8) for s in p.size) for p in pictures]
        return [View(p.resize(s), number) for number, (p, s) in enumerate(zip(pictures, sizes))]

    def token_boxes(self, view: View, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        columns, rows = (side // PATCH for side in view.picture.size)
        x, y = ([i * edge // n for i in range(n + 1)] for edge, n in zip(size, (columns, rows)))
        return [
            (x[i], y[j], x[i + 1] - 1, y[j + 1] - 1) for j in range(rows) for i in range(columns)
        ]

    def layout(
        self, views: list[View], sizes: list[int], kept: list[Tensor], positions: str
    ) -> Layout:
        """Text has one position on all axes; a token of a view that begins at p has (p, p + row, p
        + column). "contiguous": rows and columns of which nothing is left do not count."""
        ids, axes, p, spans = self.context([len(i) for i in kept], views), [], 0, []
        for view, index in zip(views, kept):
            columns = view.picture.width // PATCH
            row, column = index // columns, index % columns
            extent = max(view.picture.height // PATCH, columns)
            if positions == "contiguous":
                row, column = (x.unique(return_inverse=True)[1] for x in (row, column))
                extent = int(torch.cat([row, column]).max()) + 1 if len(index) else 0
            spans.append((torch.stack([torch.zeros_like(row), row, column]), extent))
        at, spans = 0, [span for span in spans if span[0].shape[1]]
        while at < len(ids):
            if ids[at] == self.image_token_id:
                place, extent = spans.pop(0)
                axes.append(p + place)
                at, p = at + place.shape[1], p + extent
            else:
                axes.append(torch.full((3, 1), p))
                at, p = at + 1, p + 1
        return Layout(ids, torch.cat(axes, 1), p)


def write_checkpoint(folder: Path, tokenizer: Path) -> Path:
    """A checkpoint of random weights, with a tokenizer.json that knows <image>."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.read_text())
    vocab = json.loads(tokenizer.read_text())["model"]["vocab"]
    raw = {"model_type": "ragged", "vocab": len(vocab), "image": vocab["<image>"],
           "text_config": {"eos_token_id": 2}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "preprocessor_config.json").write_text("{}")
    made = config(Folder(folder, raw))
    torch.manual_seed(3)
    model, names = VLM(made, tower(made)), hub_names(NAMES)
    tensors = {
        translate(name, names): 2 * p.detach() if p.dim() > 1 else p.detach().clone()
        for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder
