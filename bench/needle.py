"""`python -m bench needle`: clips of growing length, and a question about a line of one page."""

import argparse
import itertools
import math
import random
import statistics
from collections import defaultdict

import torch

from checkpoints.weights import progress
from tiny.scenes import make_needle, question_and_answer, render, to_images

from . import (
    TINY,
    add_report_arguments,
    check_figure,
    machine,
    positive,
    pyplot,
    report,
)
from .accuracy import METHODS, Method, attended, check_rows, workers

LENGTHS = (1, 2, 3, 4, 6)  # pages of 400 visual tokens
TRAINED = 4  # the longest clips that the tiny model was trained on
DEPTHS = (0, 25, 50, 75, 100)  # per cent of the clip before the needle's frame
NEEDLE_METHODS = (
    "dense", "SparseVILA, 20", "random relevance, 20", "pruning only, 20", "retrieval only, 20",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(NEEDLE_METHODS),
        metavar="ROW",
        help="rows of `bench accuracy` (default: '" + "', '".join(NEEDLE_METHODS) + "')",
    )
    parser.add_argument(
        "--clips", type=positive, default=40, help="for each length and depth (default: 40)"
    )
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    check_figure(arguments.figure)
    check_rows(arguments.methods)
    report(needle(arguments.methods, arguments.clips), print_needle, draw_needle, arguments)


def needle(names: list[str], clips: int) -> dict:
    """Share of right answers about one line, by length of the clip and depth of its page."""
    names = list(dict.fromkeys(names))
    cells = [(name, frames, depth) for name in names for frames in LENGTHS for depth in DEPTHS]
    arguments = [
        (METHODS[name], str(TINY), frames, round(depth / 100 * (frames - 1)), clips)
        for name, frames, depth in cells
    ]
    right: dict[str, dict] = {name: defaultdict(list) for name in names}
    attended: dict[str, dict] = {name: defaultdict(list) for name in names}
    with workers() as pool:
        found = pool.map(find_needle, *zip(*arguments))
        for (name, frames, _), values in progress(
            zip(cells, found), "measuring", " cells", len(cells)
        ):
            right[name][frames].append(values["right"])
            attended[name][frames].append(values["attended"])
    return {
        "machine": machine(), "clips": clips, "lengths": LENGTHS, "depths": DEPTHS,
        "trained": TRAINED, "right": right,
        "attended": {n: {f: statistics.mean(v) for f, v in a.items()} for n, a in attended.items()},
    }  # fmt: skip


def find_needle(
    method: Method, model_path: str, frames: int, depth: int, clips: int
) -> dict[str, float]:
    """Percentage of values by name and names by value told right of page `depth` of clips of that
    many pages, and visual tokens of a clip that a layer attends to."""
    session = method.session(model_path)
    right, read = [], []
    for number in range(clips):
        rng = random.Random(f"needle {frames} {depth} {number}")
        scene, needle = make_needle(rng, frames, depth)
        session.see(to_images(render(scene, rng)))
        question, expected = question_and_answer(("value", "name")[number % 2], scene, rng, needle)
        answer = session.ask(question, max_new_tokens=16)
        right.append(answer.text == expected)
        read.append(attended(session, answer))
    return {"right": 100 * sum(right) / clips, "attended": sum(read) / clips}


def print_needle(result: dict) -> None:
    """A table of lengths, in Markdown."""
    print(result["machine"])
    print(
        f"{result['clips']} clips for each length and depth; mean over depths (worst depth); "
        "* longer than any in training\n"
    )
    heads = [f"{n} pages{' *' if n > result['trained'] else ''}" for n in result["lengths"]]
    print("| method | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for name, lengths in result["right"].items():
        cells = [f"{statistics.mean(v):.0f} ({min(v):.0f})" for v in lengths.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
        cells = [f"{tokens:.0f}" for tokens in result["attended"][name].values()]
        print("| — tokens attended | " + " | ".join(cells) + " |")


def draw_needle(result: dict, file: str) -> None:
    """A heat map for each method: length to the right, depth downwards."""
    plt = pyplot()
    lengths, depths, names = result["lengths"], result["depths"], list(result["right"])
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.4 * rows), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names):
        values = torch.tensor([result["right"][name][frames] for frames in lengths]).T
        image = axes.imshow(values.tolist(), vmin=0, vmax=100, cmap="Greys_r", aspect="auto")
        for row, column in itertools.product(*map(range, values.shape)):
            value = values[row, column]
            shade = "black" if value > 45 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, size=11)
        trained = lengths.index(result["trained"]) + 0.5
        axes.axvline(trained, color="0.5", linewidth=3, linestyle=":")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.tick_params(labelbottom=True)
        axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        axes.set_title(name, fontsize=13)
    figure.supxlabel("pages")
    figure.supylabel("depth of the needle")
    figure.colorbar(image, ax=grid, label="right answers, %", pad=0.02)
    figure.savefig(file, dpi=110)
