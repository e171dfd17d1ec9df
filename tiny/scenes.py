"""The pictures and questions that the tiny model is trained and measured on.

A *scene* is one picture, or a clip of several frames, of coloured digits on a noisy grey
background. The picture is a board of 10 x 10 cells, each the size of one of the model's patches,
named as in chess: a1 is bottom left, j10 top right. Within a scene every digit and every colour
occurs at most once, so that each of them names one glyph.

Every answer has several words: the first answers the question, the later ones say more about the
same glyph or, for a count, list the digits. SparseVILA computes the first answer token densely;
only later ones show whether retrieval works.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

BOARD = 10  # cells per side
CELL = 16  # pixels per side of a cell
SIDE = BOARD * CELL

COLORS = {
    "red": (222, 30, 36),
    "green": (28, 150, 52),
    "blue": (36, 66, 228),
    "yellow": (246, 226, 40),
    "purple": (150, 50, 200),
    "orange": (250, 134, 10),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}

# Seven rows of five dots for each digit; a dot is drawn as 2 x 2 pixels.
GLYPHS = [
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ..##. .#... #.... #####",
    "####. ....# ....# .###. ....# ....# ####.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ..#.. ..#.. .#... .#...",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
]
GLYPH_MASKS = (
    torch.tensor([[[dot == "#" for dot in row] for row in glyph.split()] for glyph in GLYPHS])
    .repeat_interleave(2, 1)
    .repeat_interleave(2, 2)
)  # (10, 14, 10)

KINDS = ("color", "digit", "place", "count", "frame")


@dataclass(frozen=True)
class Glyph:
    digit: int
    color: str
    row: int  # from the top, 0 .. 9
    column: int  # from the left, 0 .. 9
    frame: int  # from 0

    @property
    def cell(self) -> str:
        return f"{'abcdefghij'[self.column]}{BOARD - self.row}"


@dataclass(frozen=True)
class Scene:
    frames: int
    glyphs: tuple[Glyph, ...]  # by frame, then in reading order


def make_scene(rng: random.Random, frames: int = 1) -> Scene:
    """A random scene of 2 to 8 glyphs, anywhere in the frames."""
    count = rng.randint(2, 8)
    digits, colors = rng.sample(range(10), count), rng.sample(list(COLORS), count)
    places = rng.sample(range(frames * BOARD**2), count)
    glyphs = (
        Glyph(digit, color, place // BOARD % BOARD, place % BOARD, place // BOARD**2)
        for digit, color, place in zip(digits, colors, sorted(places))
    )
    return Scene(frames, tuple(glyphs))


def make_needle(rng: random.Random, frames: int, depth: int) -> tuple[Scene, Glyph]:
    """A clip with six glyphs in frame `depth`, of which one is returned as well, and two anywhere
    else. Which of the six will be asked for, nobody can know from the clip."""
    digits, colors = rng.sample(range(10), 8), rng.sample(list(COLORS), 8)
    elsewhere = [frame for frame in range(frames) if frame != depth] or [depth]
    cells = rng.sample(range(BOARD**2), 8)  # all different, also across frames
    places = [(depth, cell) for cell in cells[:6]]
    places += [(rng.choice(elsewhere), cell) for cell in cells[6:]]
    glyphs = [
        Glyph(digit, color, cell // BOARD, cell % BOARD, frame)
        for digit, color, (frame, cell) in zip(digits, colors, places)
    ]
    order = sorted(glyphs, key=lambda glyph: (glyph.frame, glyph.row, glyph.column))
    return Scene(frames, tuple(order)), glyphs[0]


def render(scene: Scene, rng: random.Random) -> Tensor:
    """The frames of a scene, (frames, 3, 160, 160) uint8: noise in two scales, then the glyphs,
    each somewhere inside its cell and a little off its colour."""
    noise = torch.Generator().manual_seed(rng.getrandbits(48))
    size = (scene.frames, 3, SIDE, SIDE)
    blotches = torch.randn(scene.frames, 3, 7, 7, generator=noise) * 16
    picture = torch.nn.functional.interpolate(blotches, size=size[2:], mode="bilinear")
    picture += 128 + 12 * torch.randn(scene.frames, 1, 1, 1, generator=noise)
    picture += 14 * torch.randn(size, generator=noise)
    for glyph in scene.glyphs:
        mask = GLYPH_MASKS[glyph.digit]
        height, width = mask.shape
        top = glyph.row * CELL + rng.randint(0, CELL - height)
        left = glyph.column * CELL + rng.randint(0, CELL - width)
        color = torch.tensor([value + rng.uniform(-12, 12) for value in COLORS[glyph.color]])
        picture[glyph.frame, :, top : top + height, left : left + width].mul_(~mask).add_(
            color[:, None, None] * mask
        )
    return picture.clamp(0, 255).to(torch.uint8)


def to_images(frames: Tensor) -> list[Image.Image]:
    """(frames, 3, height, width) uint8 -> Pillow images."""
    size = (frames.shape[3], frames.shape[2])
    return [
        Image.frombytes("RGB", size, bytes(frame.permute(1, 2, 0).flatten().tolist()))
        for frame in frames
    ]


def question_and_answer(
    kind: str, scene: Scene, rng: random.Random, glyph: Glyph | None = None
) -> tuple[str, str]:
    """A question of a kind about a scene, and its answer; about one of its glyphs, by chance if
    none is named."""
    glyph = glyph or rng.choice(scene.glyphs)
    if kind == "color":
        return f"what color is the {glyph.digit}?", f"{glyph.color}, {glyph.cell}."
    if kind == "digit":
        return f"which digit is {glyph.color}?", f"{glyph.digit}, {glyph.cell}."
    if kind == "place":
        return f"where is the {glyph.digit}?", f"{glyph.cell}, {glyph.color}."
    if kind == "frame":
        return f"which frame shows the {glyph.digit}?", f"{glyph.frame + 1}, {glyph.cell}."
    if kind == "count":
        digits = " ".join(str(glyph.digit) for glyph in scene.glyphs)
        return "how many digits?", f"{len(scene.glyphs)}: {digits}."
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def write_samples(folder: Path) -> None:
    """The sample pictures of this folder: two boards and a clip of four frames."""
    for name, seed, frames in (("board", 9, 1), ("busy", 30, 1), ("clip", 4, 4)):
        rng = random.Random(f"sample {seed}")
        scene = make_scene(rng, frames)
        images = to_images(render(scene, rng))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.png"
        images[0].save(file, save_all=frames > 1, append_images=images[1:], duration=800)
        print(
            file,
            *(f"{g.color} {g.digit} at {g.cell} in {g.frame + 1}" for g in scene.glyphs),
            sep="; ",
        )


if __name__ == "__main__":
    write_samples(Path(__file__).resolve().parent / "samples")
