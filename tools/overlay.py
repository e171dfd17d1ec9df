"""A picture of what was kept and of what each question retrieved."""

import statistics
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from checkpoints.processor import View
from sparsevila import Answer, Dense, SparseVILA, select_tokens

GAP, LINE, WIDEST = 8, 20, 1700  # pixels
FONT = ImageFont.load_default(15)
TITLE = "Pruned once; of what is left, every question reads its own choice."
ONLY, SHARED, ALWAYS = (255, 90, 0), (255, 190, 60), (90, 90, 90)  # colours of outlines
PRUNED = (107, 107, 107)
Words = list[tuple[str, str]]  # lines, each with its colour
Outline = tuple[tuple[int, int, int], int]  # colour and width; 0: filled


class Panel(NamedTuple):
    """Words above the views of a session; `outlines` of its kept tokens, in order."""

    words: Words
    session: SparseVILA
    outlines: list[Outline | None] = []


def overlay(
    session: SparseVILA,
    answers: list[tuple[str, Answer]],
    dense: list[Answer] | None = None,
    pruned: tuple[SparseVILA, list[Answer]] | None = None,
) -> Image.Image:
    """What a session keeps, and a panel for each question with the tokens that it retrieved.

    Pruned tokens are dark. A question's tokens are as many as a layer retrieved (the mean over
    layers), those that the most layers did; outlined, by whether other questions have them as well.
    Answers that are not the dense model's are red.

    answers: questions about what the session sees, and what `ask` returned.
    dense: what the dense model answered. pruned: a session that only prunes, and what it answered.

    Raises: ValueError for no answers or pictures.
    """
    if not answers or not session.views:
        raise ValueError(f"nothing to show: {len(answers)} answers, {len(session.views)} pictures")
    chosen = [_retrieved(session, answer) for _, answer in answers]
    times = torch.stack(chosen).sum(0)  # (K,): by how many questions each kept token is retrieved
    right = dense or [answer for _, answer in answers]

    def told(who: str, number: int, answer: Answer) -> tuple[str, str]:
        if answer.text == right[number].text:
            return f"{who}: {answer.text}", "black"
        return f"{who}: {answer.text} (differs)", "firebrick"

    # 1. The panels. With one question there is nothing to share its tokens with; with two there is
    #    no other but every one.
    most = f"of the {_attended(answers[0][1]):.0f} that most layers read: for this question only"
    looks = {1: (most, (ONLY, 2))}
    looks |= {count: ("for another too", (SHARED, 2)) for count in range(2, len(answers))}
    if len(answers) > 1:
        looks[len(answers)] = ("for every question", (ALWAYS, 1))
    tokens = session.stats["visual_tokens"]
    n, kept = tokens["encoded"], tokens["kept"]
    head = f"Before any question: {kept} of {n} tokens (patches) stay, grey ones go."
    panels = [Panel([(head, "black")], session)]
    for number, (question, answer) in enumerate(answers):
        words = [(question, "navy")]
        words += [told(f"dense, all {n} tokens", number, dense[number])] if dense else []
        who = "dense" if type(session) is Dense else "sparse"
        words.append(told(f"{who}, {_attended(answer):.0f} of {kept}", number, answer))
        outlines = [
            looks[count][1] if mine else None
            for mine, count in zip(chosen[number].tolist(), times.tolist())
        ]
        panels.append(Panel(words, session, outlines))
    if pruned:
        few = pruned[0].stats["visual_tokens"]["kept"]
        words = [(f"Instead, pruned to {few} tokens:", "black")]
        words += [told(answers[i][0], i, answer) for i, answer in enumerate(pruned[1])]
        panels.append(Panel(words, pruned[0]))
    legend = {"pruned": (PRUNED, 0), **dict(looks.values())}
    return _compose(panels, _costs(session, answers, dense), legend)


def _retrieved(session: SparseVILA, answer: Answer) -> Tensor:
    """(K,) bool: of the kept tokens, as many as a layer retrieved, those that the most layers
    did."""
    votes = torch.zeros(session.stats["visual_tokens"]["kept"])
    for tokens in answer.retrieved:
        votes[tokens.cpu()] += 1
    most = select_tokens(votes, round(_attended(answer)))
    return torch.zeros_like(votes, dtype=torch.bool).index_fill(0, most, True)


def _attended(answer: Answer) -> float:
    """Visual tokens that a layer reads, mean over layers."""
    return sum(map(len, answer.retrieved)) / len(answer.retrieved)


def _costs(
    session: SparseVILA, answers: list[tuple[str, Answer]], dense: list[Answer] | None
) -> str:
    """What is read for every token of an answer, mean over answers."""
    columns = {"dense": dense or [], "sparse": [answer for _, answer in answers]}
    costs = []
    for name, of_one in columns.items():
        if of_one:
            tokens = statistics.mean(map(_attended, of_one))
            read = statistics.mean(answer.kv_bytes_per_token for answer in of_one)
            costs.append(f"{name} {tokens:.0f} visual tokens, {read:,.0f} bytes")
    both = "; ".join(costs)
    return f"Keys and values that a token of the answer reads, those of text included: {both}."


def _compose(panels: list[Panel], costs: str, legend: dict[str, Outline]) -> Image.Image:
    """All panels in rows, below them the legend and the costs."""
    # 1. Places: of the views in a panel, of the panels in the picture.
    views = panels[0].session.views
    edge = 160 if any(view.rows for view in views) else max(views[0].picture.width, 320)
    places = _places(views, edge)
    drawn = [_scaled(view.picture, edge) for view in views]
    width, tall = (max(p[i] + size[i] for p, size in zip(places, drawn)) for i in (0, 1))
    width = max(width, 320)  # for the words above
    heads = [
        [(line, colour) for text, colour in panel.words for line in _wrapped(text, width)]
        for panel in panels
    ]
    top = max(map(len, heads)) * LINE + GAP
    columns = max(1, min(len(panels), WIDEST // (width + GAP)))
    rows = -(-len(panels) // columns)
    total = columns * (width + GAP) + GAP
    title = _wrapped(TITLE, total - 2 * GAP)
    foot = _wrapped(costs, total - 2 * GAP)
    above = GAP + len(title) * LINE
    below = above + rows * (top + tall + GAP)
    whole = Image.new("RGB", (total, below + (1 + len(foot)) * LINE + GAP), "white")
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(title):
        draw.text((GAP, 4 + number * LINE), line, "black", FONT, stroke_width=0.4)

    # 2. The panels.
    for number, (head, panel) in enumerate(zip(heads, panels)):
        row, column = divmod(number, columns)
        left, upper = GAP + column * (width + GAP), above + row * (top + tall + GAP)
        for line, (text, colour) in enumerate(head):
            draw.text((left, upper + line * LINE), text, colour, FONT)
        first = 0
        for view, kept, (x, y) in zip(views, panel.session.kept, places):
            picture = view.picture.resize(_scaled(view.picture, edge))
            boxes = panel.session.processor.token_boxes(view, picture.size)
            outlines = panel.outlines[first : first + len(kept)]
            first += len(kept)
            whole.paste(_mark(picture, boxes, kept, outlines), (left + x, upper + top + y))

    # 3. The legend and the costs.
    left = GAP
    for label, (colour, line) in legend.items():
        box = (left, below + 3, left + 12, below + 15)
        draw.rectangle(box, colour if not line else None, colour, line or 1)
        draw.text((left + 18, below), label, "black", FONT)
        left += 18 + int(FONT.getlength(label)) + 3 * GAP
    for number, line in enumerate(foot, 1):
        draw.text((GAP, below + number * LINE), line, "black", FONT)
    return whole


def _scaled(picture: Image.Image, edge: int) -> tuple[int, int]:
    """The size of a picture whose longer side is drawn so many pixels long."""
    return tuple(max(1, round(edge * side / max(picture.size))) for side in picture.size)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        while FONT.getlength(word) > width:  # a word wider than the line is cut
            cut = next(n for n in range(len(word), 0, -1) if FONT.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if FONT.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line] or [""]


def _places(views: list[View], edge: int) -> list[tuple[int, int]]:
    """The upper left corner of each view: pictures side by side, tiles in their grid."""
    places, left = [], 0
    for view in views:
        if view.row:
            places.append((left + (view.column - 1) * edge, (view.row - 1) * edge))
        else:  # beside its tiles, where it has some
            tiles = any(other.row and other.number == view.number for other in views)
            places.append((left + tiles * (view.columns * edge + GAP), 0))
            left = places[-1][0] + edge + GAP
    return places


def _mark(
    picture: Image.Image,
    boxes: list[tuple[int, int, int, int]],
    kept: Tensor,
    outlines: list[Outline | None],
) -> Image.Image:
    """Dim the boxes of tokens that were not kept, and outline those of kept ones."""
    shade = Image.new("L", picture.size, 0)
    for number in set(range(len(boxes))) - set(kept.tolist()):
        ImageDraw.Draw(shade).rectangle(boxes[number], 175)
    picture = Image.composite(Image.new("RGB", picture.size, (40, 40, 40)), picture, shade)
    draw = ImageDraw.Draw(picture)
    for number, outline in zip(kept.tolist(), outlines):
        if outline:
            draw.rectangle(boxes[number], outline=outline[0], width=outline[1])
    return picture
