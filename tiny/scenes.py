"""The pages and questions that the tiny model is trained and measured on.

A *page* is a receipt, a timetable or a list of telephone numbers: a title, and below it lines with
a name at the left and a value at the right. It is typed on a grid of 20 x 20 cells, one character
a cell; a cell is as large as one of the model's patches. A *scene* is a list of pages, each of them
one picture, and no name occurs on two of them.

An answer is read off the page character by character, each of them a token. SparseVILA computes the
first answer token densely; all later ones must come from the visual tokens that it retrieved.
"""

import argparse
import functools
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GRID = 20  # cells per side
CELL = 12  # pixels per side of a cell
SIDE = GRID * CELL
LINES = 8  # at most on a page
PAGES = 6  # at most in a clip
TITLE_ROW, FIRST_ROW, LINE_PITCH = 1, 3, 2  # line n stands in row FIRST_ROW + (n - 1) * LINE_PITCH
LEFT, RIGHT = 1, 18  # the column where names begin, and the one where values end
LONGEST_NAME, LONGEST_VALUE, LONGEST_TITLE = 8, 6, 10
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.:"


@dataclass(frozen=True)
class PageKind:
    """What stands on pages of a kind, and how people ask: the first wording is the usual one."""

    names: tuple[str, ...]
    titles: tuple[str, ...]
    value: tuple[str, ...]
    name: tuple[str, ...]


PAGE_KINDS = {
    "receipt": PageKind(
        tuple(
            "milk bread eggs tea coffee rice sugar salt beans soap apples pears honey cheese butter"
            " flour pasta corn lemon grapes onion garlic cream yogurt juice water nuts fish ham"
            " soup".split()
        ),
        ("market", "grocery", "bakery", "corner", "pantry", "kiosk"),
        ("how much is the {}?", "what does the {} cost?", "what is the price of {}?"),
        ("what costs {}?", "which one costs {}?"),
    ),
    "timetable": PageKind(
        tuple(
            "paris rome oslo bern lyon milan porto turin genoa basel cork leeds york bath dover"
            " graz linz kiel bonn essen ulm nice lille nantes brest ghent delft malmo turku"
            " riga".split()
        ),
        ("trains", "departures", "station", "buses", "central", "north"),
        ("when is the train to {}?", "when does the train to {} leave?", "what time is {}?"),
        ("which train leaves at {}?", "where does the train at {} go?"),
    ),
    "telephone list": PageKind(
        tuple(
            "anna paul maria peter lucy james emma david laura simon clara oscar irene hugo nora"
            " felix julia karl agnes viktor rosa edgar wanda martin olga".split()
        ),
        ("phones", "staff", "people", "contacts", "office", "clinic"),
        ("what is the number of {}?", "which number has {}?"),
        ("who has the number {}?", "who has {}?"),
    ),
}
WORDINGS = {
    "line": ("what is on line {}?", "read line {}"),
    "title": ("what is the title?", "what is the page called?"),
    "total": ("what is the total?", "how much is the total?"),
    "page": ("which page has the {}?", "on which page is the {}?"),
    "list": ("how many lines are there?", "how many lines?"),
}
KINDS = ("value", "name", "line", "title", "total", "page", "list")  # of questions
ALL_WORDINGS = [w for kind in PAGE_KINDS.values() for w in (*kind.value, *kind.name)]
ALL_WORDINGS += [w for several in WORDINGS.values() for w in several]
READS = (
    f"the tiny model reads only pages of {SIDE} x {SIDE} pixels as tiny/scenes.py draws them, and "
    "answers questions like 'how much is the bread?' and 'what is on line 3?' (tiny/README.md)"
)


class Line(NamedTuple):
    name: str
    value: str


class Cell(NamedTuple):
    """A character on a page. `line` counts from 1, 0 is the title; `slot` is the character's place
    in its word, from 0."""

    row: int
    column: int
    character: str
    line: int
    field: str  # "title", "name" or "value"
    slot: int


@dataclass(frozen=True)
class Page:
    kind: str
    title: str
    lines: tuple[Line, ...]

    def cells(self) -> list[Cell]:
        """Everything that is written on the page, line by line."""
        words = [(TITLE_ROW, (GRID - len(self.title)) // 2, self.title, 0, "title")]
        for number, (name, value) in enumerate(self.lines, 1):
            row = FIRST_ROW + (number - 1) * LINE_PITCH
            words.append((row, LEFT, name, number, "name"))
            words.append((row, RIGHT + 1 - len(value), value, number, "value"))
        return [
            Cell(row, column + slot, character, line, field, slot)
            for row, column, word, line, field in words
            for slot, character in enumerate(word)
        ]


# --- what stands on a page ------------------------------------------------------------------------


def make_scene(rng: random.Random, pages: int = 1) -> list[Page]:
    """Random pages of one kind; the last page of a receipt has the total of all."""
    kind = rng.choice(list(PAGE_KINDS))
    taken = {"".join(sorted("total"))}
    scene = [make_page(rng, kind, taken) for _ in range(pages)]
    if kind == "receipt":
        cents = sum(round(100 * float(line.value)) for page in scene for line in page.lines)
        total = Line("total", f"{cents / 100:.2f}")
        scene[-1] = replace(scene[-1], lines=(*scene[-1].lines, total))
    return scene


def make_needle(rng: random.Random, pages: int, depth: int) -> tuple[list[Page], Line]:
    """A clip, and a line of page `depth` that will be asked for."""
    scene = make_scene(rng, pages)
    return scene, rng.choice(scene[depth].lines)


def make_page(rng: random.Random, kind: str, taken: set[str]) -> Page:
    """A page with 3 to 8 lines, a total included. No name has the letters of another, and no value
    comes twice: `taken` has the sorted letters and the values so far. One name in four is a known
    word, the others are made up, as names often are."""
    items = rng.randint(3, LINES) - (kind == "receipt")
    names: list[str] = []
    while len(names) < items:
        known = rng.random() < 0.25
        name = rng.choice(PAGE_KINDS[kind].names) if known else make_word(rng, 3, LONGEST_NAME - 1)
        if "".join(sorted(name)) not in taken:
            taken.add("".join(sorted(name)))
            names.append(name)
    values: list[str] = []
    while len(values) < items:
        value = make_value(rng, kind)
        if value not in taken:
            taken.add(value)
            values.append(value)
    known = rng.random() < 0.25
    title = rng.choice(PAGE_KINDS[kind].titles) if known else make_word(rng, 4, LONGEST_TITLE)
    return Page(kind, title, tuple(map(Line, names, values)))


def make_word(rng: random.Random, shortest: int, longest: int) -> str:
    """A made-up word: mostly vowels after consonants and consonants after vowels."""
    letters = [rng.choice(CHARACTERS[:26])]
    for _ in range(rng.randint(shortest, longest) - 1):
        vowel_next = letters[-1] not in "aeiou"
        letters.append(
            rng.choice("aeiou" if vowel_next and rng.random() < 0.7 else CHARACTERS[:26])
        )
    return "".join(letters)


def make_value(rng: random.Random, kind: str) -> str:
    """A price, a time or a telephone number."""
    if kind == "receipt":
        euros = rng.randint(1, 9) if rng.random() < 0.6 else rng.randint(10, 13)
        return f"{euros}.{rng.randint(0, 99):02}"
    if kind == "timetable":
        return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    return f"{rng.randint(0, 99999):05}"


# --- questions ------------------------------------------------------------------------------------


def kinds_of(scene: list[Page]) -> tuple[str, ...]:
    """The kinds of questions that can be asked about a scene."""
    if len(scene) > 1:
        return ("value", "name", "page")
    return ("value", "name", "line", "title", "list") + ("total",) * (scene[0].kind == "receipt")


def question_and_answer(
    kind: str, scene: list[Page], rng: random.Random, line: Line | None = None, wording: int = 0
) -> tuple[str, str]:
    """A question of a kind about a scene, and its answer; about one of its lines, by chance if
    none is named. Wordings are counted from 0, and again from the first."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    page = next((p for p in scene if line in p.lines), None) or rng.choice(scene)
    line = line or rng.choice(page.lines)
    number = page.lines.index(line) + 1
    choices = WORDINGS.get(kind) or getattr(PAGE_KINDS[page.kind], kind)
    about, answer = {
        "value": (line.name, line.value),
        "name": (line.value, line.name),
        "line": (number, f"{line.name} {line.value}"),
        "title": ("", page.title),
        "total": ("", page.lines[-1].value),
        "page": (line.name, f"page {scene.index(page) + 1}: {line.value}"),
        "list": ("", f"{len(page.lines)}: " + " ".join(name[0] for name, _ in page.lines)),
    }[kind]
    return choices[wording % len(choices)].format(about), answer


def is_known(question: str) -> bool:
    """Whether a question is worded as one of ours."""
    text = question.strip().lower().rstrip("?")
    patterns = (re.escape(w.rstrip("?")).replace(r"\{\}", "[a-z0-9.:]+") for w in ALL_WORDINGS)
    return any(re.fullmatch(pattern, text) for pattern in patterns)


def needed_patches(kind: str, page: Page, line: Line) -> list[int]:
    """The patches, row by row from 0, that hold the answer's characters; of the kinds that are
    answered from one place."""
    fields = ("name", "value") if kind == "line" else (kind,)
    number = 0 if kind == "title" else page.lines.index(line) + 1
    cells = page.cells()
    return [c.row * GRID + c.column for c in cells if c.line == number and c.field in fields]


# --- pictures -------------------------------------------------------------------------------------


@functools.cache
def glyphs(font: str | None, size: int) -> Tensor:
    """(1 + 38, 12, 12) float32 in 0 .. 1: how much ink a blank and each of the characters puts on
    the pixels of a cell, in capitals. The font is a file, or Pillow's own for None."""
    letters = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
    masks = [torch.zeros(CELL, CELL)]
    for character in CHARACTERS:
        cell = Image.new("L", (CELL, CELL))
        ImageDraw.Draw(cell).text((CELL / 2, 10), character.upper(), 255, letters, anchor="ms")
        masks.append(torch.tensor(list(cell.tobytes())).view(CELL, CELL) / 255)
    return torch.stack(masks)


FONTS = [(None, 11), (None, 12), (None, 13)]  # training has more


def render(
    scene: list[Page], rng: random.Random, fonts: list[tuple[str | None, int]] = FONTS
) -> Tensor:
    """The pictures of a scene, (pages, 3, 240, 240) uint8: paper of some colour in uneven light,
    often on a darker table, often with a coloured stamp; dark ink, a pixel off its place."""
    return torch.stack([render_page(page, rng, fonts) for page in scene])


def render_page(page: Page, rng: random.Random, fonts: list[tuple[str | None, int]]) -> Tensor:
    """(3, 240, 240) uint8; see `render`."""
    noise = torch.Generator().manual_seed(rng.getrandbits(48))
    codes = torch.zeros(GRID, GRID, dtype=torch.int64)
    for cell in page.cells():
        codes[cell.row, cell.column] = 1 + CHARACTERS.index(cell.character)
    ink = glyphs(*rng.choice(fonts))[codes].permute(0, 2, 1, 3).reshape(SIDE, SIDE)
    ink = ink.roll((rng.randint(-1, 1), rng.randint(-1, 1)), (0, 1))
    colour = torch.tensor([rng.uniform(-14, 14) for _ in range(3)])
    picture = (rng.uniform(185, 232) + colour)[:, None, None].expand(3, SIDE, SIDE).clone()
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    if rng.random() < 0.6:
        stamp(picture, codes, rng)
    if rng.random() < 0.5:  # a table shows at some sides of the paper
        margins = [rng.choice([0, rng.randint(2, 10)]) for _ in range(4)]
        table = torch.ones(SIDE, SIDE, dtype=torch.bool)
        table[margins[0] : SIDE - margins[1], margins[2] : SIDE - margins[3]] = False
        picture[:, table] = torch.tensor([[rng.uniform(40, 150)] for _ in range(3)])
    light = rng.uniform(-20, 20) * x + rng.uniform(-20, 20) * y
    blotches = torch.randn(1, 1, 6, 6, generator=noise) * 12
    picture += light + torch.nn.functional.interpolate(blotches, (SIDE, SIDE), mode="bilinear")[0]
    dark = torch.tensor([rng.uniform(10, 80) for _ in range(3)])[:, None, None]
    picture = picture * (1 - ink) + dark * ink
    picture += torch.randn(3, SIDE, SIDE, generator=noise) * rng.uniform(2, 10)
    return picture.clamp(0, 255).to(torch.uint8)


def stamp(picture: Tensor, codes: Tensor, rng: random.Random) -> None:
    """Draw a coloured disc, ring or box, 2 to 5 cells wide, where nothing is written."""
    width = rng.randint(2, 5)
    for _ in range(8):
        row, column = rng.randint(0, GRID - width), rng.randint(0, GRID - width)
        if not codes[row : row + width, column : column + width].any():
            side = width * CELL
            mask = Image.new("L", (side, side))
            draw, box = ImageDraw.Draw(mask), (2, 2, side - 3, side - 3)
            shape = rng.choice([draw.ellipse, draw.rectangle])
            shape(box, **rng.choice([{"fill": 255}, {"outline": 255, "width": rng.randint(2, 5)}]))
            mask = torch.tensor(list(mask.tobytes())).view(side, side) / 255
            colour = torch.tensor([[[rng.uniform(20, 240)]] for _ in range(3)])
            top, left = row * CELL, column * CELL
            place = picture[:, top : top + side, left : left + side]
            place += mask * (colour - place)
            return


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(pages, 3, height, width) uint8 -> Pillow images."""
    size = (pictures.shape[3], pictures.shape[2])
    return [
        Image.frombytes("RGB", size, bytes(picture.permute(1, 2, 0).flatten().tolist()))
        for picture in pictures
    ]


# --- on the command line --------------------------------------------------------------------------


def typed_page(lines: list[str], title: str) -> Page:
    """A page of one's own. Raises: ValueError for lines that are not a name and a value, or do not
    fit."""
    if not 1 <= len(lines) <= LINES:
        raise ValueError(f"a page has 1 to {LINES} lines, got {len(lines)}")
    fields = re.compile(rf"[a-z]{{1,{LONGEST_NAME}}} [0-9.:]{{1,{LONGEST_VALUE}}}")
    for line in lines:
        if not fields.fullmatch(line.lower()):
            raise ValueError(
                f"a line must be a name of at most {LONGEST_NAME} letters and a value of at most "
                f"{LONGEST_VALUE} digits, dots and colons, like 'BREAD 3.10', got {line!r}"
            )
    if not re.fullmatch(rf"[a-z]{{0,{LONGEST_TITLE}}}", title.lower()):
        raise ValueError(f"a title has at most {LONGEST_TITLE} letters, got {title!r}")
    typed = tuple(Line(*line.lower().split()) for line in lines)
    values = "".join(value for _, value in typed)
    kind = "timetable" if ":" in values else "receipt" if "." in values else "telephone list"
    return Page(kind, title.lower(), typed)


def save(scene: list[Page], rng: random.Random, file: Path) -> None:
    """Write the pictures of a scene, and print a question about it with its right answer."""
    first, *others = to_images(render(scene, rng))
    first.save(file, save_all=bool(others), append_images=others, duration=1000)
    question, answer = question_and_answer("value", scene, rng)
    print(f"wrote {file}; {question} {answer}")


def sample_pages() -> dict[str, list[Page]]:
    """The scenes of the sample pictures, by file name: two pages, and a clip of three."""
    receipt = "milk 2.49,bread 3.10,coffee 8.75,apples 4.20,honey 6.95,total 25.49"
    trains = "paris 08:15,turin 09:40,basel 11:05,genoa 12:30,lyon 16:55"
    lists = {
        "office": "anna 41720,oscar 90315,lucy 77264",
        "clinic": "peter 18853,nora 60421,felix 35907",
        "staff": "clara 24186,hugo 59130,emma 83049",
    }
    return {
        "receipt.png": [typed_page(receipt.split(","), "corner")],
        "timetable.png": [typed_page(trains.split(","), "departures")],
        "clip.png": [typed_page(lines.split(","), title) for title, lines in lists.items()],
    }


def main() -> None:
    """Without arguments, the samples of this folder."""
    parser = argparse.ArgumentParser(
        description="Draw a page that the tiny model can read, and print a question about it with "
        "its right answer. Without arguments: the samples of this folder."
    )
    parser.add_argument("file", nargs="?", type=Path, help="the picture to write, like page.png")
    parser.add_argument("--seed", type=int, default=0, help="of a random page (default: 0)")
    parser.add_argument(
        "--lines", nargs="+", metavar="LINE", help="a page of your own: 'BREAD 3.10' ..., then FILE"
    )
    parser.add_argument("--title", default="", help="of a page of your own (default: none)")
    arguments = parser.parse_args()
    if arguments.lines and not arguments.file:  # the last one is the file
        arguments.file = Path(arguments.lines.pop())
        if arguments.file.suffix.lower() not in Image.registered_extensions():
            parser.error(f"the last argument must be a file like page.png, got {arguments.file}")
    if arguments.title and not arguments.lines:
        parser.error("--title needs --lines")
    if not arguments.file:
        for name, scene in sample_pages().items():
            file = Path(__file__).resolve().parent / "samples" / name
            file.parent.mkdir(exist_ok=True)
            save(scene, random.Random(file.stem), file)
        return
    rng = random.Random(f"page {arguments.seed}")
    try:
        page = typed_page(arguments.lines, arguments.title) if arguments.lines is not None else None
        save([page] if page else make_scene(rng), rng, arguments.file)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
