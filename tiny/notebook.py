"""What tutorial.ipynb needs beside the project's own functions: printing, checking and drawing."""

import ast
import inspect
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from checkpoints.processor import open_picture

from .scenes import GRID, Page, sample_pages

plt.rcParams |= {"figure.dpi": 110, "font.size": 12, "image.cmap": "cividis"}
ORANGE = "#ff7f0e"  # of what the method adds

# --- words ----------------------------------------------------------------------------------------


def show(*things: Any, folded: str = "") -> None:
    """Print the source of functions and classes, without their docstrings; folded: a line to open
    it by."""
    for thing in things:
        code = textwrap.dedent(inspect.getsource(getattr(thing, "fn", thing)))
        first, lines = ast.parse(code).body[0].body[0], code.splitlines()
        if isinstance(first, ast.Expr):  # the docstring
            del lines[first.lineno - 1 : first.end_lineno]
        text = "```python\n" + "\n".join(lines) + "\n```"
        if folded:
            text = f"<details><summary>{folded}</summary>\n\n{text}\n\n</details>"
        display(Markdown(text))


def check(claim: str, holds: Any) -> None:
    """Print whether a claim holds; an error if it does not."""
    print(f"{bool(holds)}: {claim}")
    assert holds, claim


def off(result: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return float((result.double() - expected).abs().max() / expected.abs().max())


def milliseconds(call: Callable, *arguments: Any, repeats: int = 15) -> float:
    """The median of some calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call(*arguments)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def in_a_process(script: str, *arguments: Any, **environment: str) -> str:
    """What a script prints that runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


# --- the sample -----------------------------------------------------------------------------------


def sample() -> tuple[Image.Image, Page, list[int]]:
    """The picture that the notebook is about, its page, and the patches with characters."""
    page = sample_pages()["receipt.png"][0]
    picture = open_picture(Path(__file__).parent / "samples" / "receipt.png")
    return picture, page, [cell.row * GRID + cell.column for cell in page.cells()]


# --- pictures -------------------------------------------------------------------------------------


def draw_chain() -> None:
    """The three networks, and in orange what SparseVILA adds."""
    figure, axes = plt.subplots(figsize=(10, 2.6))
    boxes = {  # left, bottom, width
        "picture": (0, 1, 1.2), "vision tower": (1.7, 1, 1.6), "prune": (3.8, 1, 1),
        "projector": (5.3, 1, 1.4), "decoder": (7.2, 1, 1.3), "answer": (9, 1, 1.1),
        "retrieve": (7.2, 0, 1.3), "KV cache": (5.3, 0, 1.4), "question": (7.2, 2, 1.3),
    }  # fmt: skip
    for name, (left, bottom, width) in boxes.items():
        colour = ORANGE if name in ("prune", "retrieve") else "0.92"
        place = (left, bottom + 0.2)
        axes.add_patch(plt.Rectangle(place, width, 0.6, facecolor=colour, edgecolor="black"))
        axes.text(left + width / 2, bottom + 0.5, name, ha="center", va="center")
    arrows = [((a, 1.5), (b, 1.5)) for a, b in ((1.2, 1.7), (3.3, 3.8), (4.8, 5.3), (6.7, 7.2))]
    arrows += [((8.5, 1.5), (9, 1.5)), ((7.85, 2.2), (7.85, 1.8)), ((7.85, 0.8), (7.85, 1.2))]
    arrows += [((6.7, 0.5), (7.2, 0.5)), ((7.2, 1.3), (6.4, 0.8))]
    for start, end in arrows:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->"})
    axes.text(4.3, 0.85, "once per picture", ha="center", color="0.3", size=10)
    axes.text(8.6, 0.5, "once per question", va="center", color="0.3", size=10)
    axes.set_xlim(-0.1, 10.6)
    axes.set_ylim(0, 3)
    axes.axis("off")
    plt.show()


def number_patches(axes: Axes) -> None:
    """Every fifth row and column of patches, from 0."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([i + 0.5 for i in range(0, GRID, 5)], range(0, GRID, 5))
    axes.tick_params(length=0, labelsize=9)
    axes.set_xlabel("column of patches")


def frame(axes: Axes, patches: Iterable[int], **style: Any) -> None:
    """A rectangle around each patch."""
    for patch in map(int, patches):
        axes.add_patch(plt.Rectangle((patch % GRID, patch // GRID), 1, 1, **style))


def draw_page(axes: Axes, picture: Image.Image, title: str, dropped: Iterable[int] = ()) -> None:
    """The picture, dropped patches dark."""
    axes.imshow(picture, extent=(0, GRID, GRID, 0))
    frame(axes, dropped, color="black", alpha=0.8, linewidth=0)
    axes.set_title(title)
    number_patches(axes)


def draw_pages(picture: Image.Image, dropped: dict[str, Iterable[int]]) -> None:
    """The picture once for each title, the patches of that title dark."""
    figure, panels = plt.subplots(1, len(dropped), figsize=(12, 3.5), squeeze=False)
    for axes, (title, patches) in zip(panels[0], dropped.items()):
        draw_page(axes, picture, title, patches)
    panels[0, 0].set_ylabel("row of patches")
    plt.tight_layout()
    plt.show()


def draw_measures(picture: Image.Image, measures: dict[str, Tensor]) -> None:
    """The picture, and a heat map of its patches for each measure; those of attention on a
    logarithmic scale."""
    figure, panels = plt.subplots(1, 1 + len(measures), figsize=(15, 4))
    draw_page(panels[0], picture, "the picture")
    for axes, (name, values) in zip(panels[1:], measures.items()):
        scale, label = ("linear", "number") if name == "random" else ("log", "share of attention")
        image = axes.imshow(values.view(GRID, GRID), extent=(0, GRID, GRID, 0), norm=scale)
        number_patches(axes)
        axes.set_title(name)
        figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    panels[0].set_ylabel("row of patches")
    plt.tight_layout()
    plt.show()


def draw_relevance(
    questions: list[str], kept: Tensor, relevance: list[Tensor], retrieved: list[list[Tensor]]
) -> None:
    """Of each question (a row) and layer (a column) a heat map of the kept patches, those that were
    retrieved framed and those that were pruned grey."""
    rows, layers = len(questions), len(relevance[0])
    size = (2.7 * layers, 2.8 * rows + 0.4)
    figure, panels = plt.subplots(rows, layers, figsize=size, layout="constrained")
    for row, (question, scores, chosen) in enumerate(zip(questions, relevance, retrieved)):
        for layer, axes in enumerate(panels[row]):
            heat = torch.full((GRID**2,), float("nan"))
            heat[kept] = scores[layer]
            axes.set_facecolor("0.85")
            axes.imshow(heat.view(GRID, GRID), extent=(0, GRID, GRID, 0), norm="log")
            frame(axes, kept[chosen[layer]], fill=False, edgecolor="red", linewidth=1.5)
            number_patches(axes)
            axes.set_xlabel("")
            axes.set_title(f"layer {layer + 1}")
        panels[row, 0].set_ylabel(question)
    figure.suptitle(
        "relevance, brighter is more (logarithmic); retrieved tokens framed, pruned ones grey"
    )
    plt.show()


def draw_curves(
    axes: Axes, curves: dict[str, tuple[Iterable, Iterable, str]], x: str, y: str, **options: Any
) -> None:
    """Curves by label: (x values, y values, style). options: "log" ("x", "xy"), "ticks", "title",
    "legend" (its place), "ylim"."""
    for label, (xs, ys, style) in curves.items():
        axes.plot(xs, ys, style, label=label)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "x" in options.get("log", ""):
        axes.set_xscale("log")
    if "y" in options.get("log", ""):
        axes.set_yscale("log")
    else:
        axes.set_ylim(*options.get("ylim", (0, None)))
    if ticks := options.get("ticks"):
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
    axes.set_title(options.get("title", ""))
    axes.legend(loc=options.get("legend", "best"))


def draw_bars(bars: dict[str, dict[str, float]], y: str, top: float) -> None:
    """Bars in groups: {group: {label: height}}, with their heights above them."""
    figure, axes = plt.subplots(figsize=(max(8, 2.6 * len(bars)), 4))
    labels = list(next(iter(bars.values())))
    width = 0.76 / len(labels)
    for number, label in enumerate(labels):
        shade = ("#9ecae1", "#08519c")[number]  # light and dark, in grey as well
        places = [i + width * number for i in range(len(bars))]
        heights = [group[label] for group in bars.values()]
        drawn = axes.bar(places, heights, 0.95 * width, color=shade, edgecolor="black", label=label)
        axes.bar_label(drawn, fmt="%.0f")
    axes.set_xticks([i + width * (len(labels) - 1) / 2 for i in range(len(bars))], bars)
    axes.set_ylabel(y)
    axes.set_ylim(0, top)
    axes.legend(loc="upper center", ncols=2)
    plt.show()


def draw_cache(rows: list[Tensor], parts: dict[str, tuple[int, int]]) -> None:
    """A strip for each layer's rows of the cache, dark where they are attended to; parts of the
    cache between dotted lines."""
    figure, axes = plt.subplots(figsize=(9, 3))
    for layer, attended in enumerate(rows, 1):
        place = (0, len(attended), layer + 0.4, layer - 0.4)
        axes.imshow(attended[None], extent=place, aspect="auto", cmap="Greys", vmin=0, vmax=1.3)
    axes.set_ylim(len(rows) + 0.6, 0.4)
    axes.set_yticks(range(1, len(rows) + 1))
    for number, (name, (start, stop)) in enumerate(parts.items()):
        axes.axvline(start, color="black", linestyle=":")
        above = 0.35 - 0.6 * (number % 2)  # narrow parts follow one another
        axes.text((start + stop) / 2, above, name, ha="center", va="bottom", fontsize=9)
    axes.set_xlabel("row of the cache")
    axes.set_ylabel("layer")
    plt.show()


def draw_word(places: list[int]) -> None:
    """A 32-bit word, the highest bit left: column c of eight in four bits from places[c] on."""
    figure, axes = plt.subplots(figsize=(10, 1.9))
    for column, shift in enumerate(places):
        shade = str(0.95 - 0.07 * column)
        axes.add_patch(plt.Rectangle((28 - shift, 0), 4, 1, facecolor=shade, edgecolor="black"))
        axes.text(30 - shift, 0.5, f"column {column}", ha="center", va="center", fontsize=11)
    axes.set_xlim(0, 32)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(0, 33, 4), range(32, -1, -4))
    axes.set_yticks([])
    axes.set_xlabel("bit of the 32-bit word")
    plt.tight_layout()
    plt.show()


def draw_channels(values: dict[str, Tensor]) -> None:
    """A bar for every channel, one chart for each of the values."""
    figure, panels = plt.subplots(1, len(values), figsize=(12, 3.6))
    for axes, (name, heights) in zip(panels, values.items()):
        axes.bar(range(len(heights)), heights, color="#08519c", width=1)
        axes.set_ylabel(name)
        axes.set_xlabel("input channel of the MLP")
    plt.tight_layout()
    plt.show()


def draw_stages(seconds: dict[str, list[float]], names: list[str], y: str) -> None:
    """Stacked horizontal bars: seconds of each stage, a bar for each name."""
    figure, axes = plt.subplots(figsize=(10, 3.4))
    left = [0.0] * len(names)
    looks = zip(("#440154", "#31688e", "#35b779", "#fde725"), ("", "//", "", ".."))
    for (stage, widths), (shade, hatch) in zip(seconds.items(), looks):
        style = {"color": shade, "hatch": hatch, "edgecolor": "black", "height": 0.6}
        axes.barh(names, widths, left=left, label=stage, **style)
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_ylabel(y)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    plt.show()


def draw_needles(
    found: dict[str, Tensor], pages: list[int], depths: list[float], trained: int
) -> None:
    """A heat map (depths, pages) of percentages for each method; clips longer than those `trained`
    are right of the dotted line."""
    figure, panels = plt.subplots(1, len(found), figsize=(12, 3.4), sharey=True)
    for axes, (name, values) in zip(panels, found.items()):
        image = axes.imshow(values, vmin=0, vmax=100, aspect="auto")
        for row in range(len(depths)):
            for column in range(len(pages)):
                value = float(values[row, column])
                color = "black" if value > 50 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
        border = pages.index(trained) + 0.5
        axes.axvline(border, color="white", linewidth=5)
        axes.axvline(border, color="black", linewidth=3, linestyle=":")
        axes.set_xticks(range(len(pages)), pages)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("pages")
        axes.set_title(name)
    panels[0].set_ylabel("place of the needle in the clip")
    figure.colorbar(image, ax=panels, label="right answers, %")
    plt.show()
