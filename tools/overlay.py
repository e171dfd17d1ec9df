"""A picture of what was kept and retrieved."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from checkpoints.processor import View
from sparsevila import Answer, SparseVILA

Boxes = list[tuple[int, int, int, int]]


def overlay(
    session: SparseVILA, answers: list[tuple[str, Answer]], dense: list[Answer] | None = None
) -> Image.Image:
    """A panel per question: pruned tokens dimmed, those retrieved for it outlined, the brighter the
    more layers retrieved them; question and answer above. Tiles of a picture stand together, the
    whole picture on their right. `answers` are questions about what the session sees, and what
    `ask` returned; `dense`, if given, what the dense model answered, to be shown as well. Raises:
    ValueError for no answers or pictures."""
    if not answers or not session.views:
        raise ValueError(f"nothing to show: {len(answers)} answers, {len(session.views)} pictures")
    # 1. One panel's geometry, the same for all questions.
    tiled = any(view.rows for view in session.views)
    edge = 160 if tiled else max(session.views[0].picture.width, 320)
    places = _places(session.views, edge, top=74 if dense else 52)
    width = max(x for x, _ in places) + edge + 4
    height = max(y for _, y in places) + edge + 4
    whole = Image.new("RGB", ((width + 4) * len(answers), height), "white")
    font = ImageFont.load_default(16)
    for panel, (question, answer) in enumerate(answers):
        left, draw = panel * (width + 4), ImageDraw.Draw(whole)
        # 2. The words.
        lines = [question, answer.text]
        if dense:
            lines = [question, f"dense: {dense[panel].text}", f"sparse: {answer.text}"]
        for number, line in enumerate(lines):
            draw.text((left + 4, 4 + 22 * number), " ".join(line.split()), "black", font)

        # 3. The share of layers that retrieved each kept token; the kept tokens of every view.
        votes = torch.zeros(sum(map(len, session.kept)))
        for chosen in answer.retrieved:
            votes[chosen.cpu()] += 1 / len(answer.retrieved)
        votes = votes.split([len(index) for index in session.kept])

        # 4. The pictures.
        for view, kept, share, (x, y) in zip(session.views, session.kept, votes, places):
            scale = edge / max(view.picture.size)
            picture = view.picture.resize(tuple(round(scale * side) for side in view.picture.size))
            boxes = session.processor.token_boxes(view, picture.size)
            whole.paste(_mark(picture, boxes, kept, share), (left + x, y))
    return whole


def _places(views: list[View], edge: int, top: int) -> list[tuple[int, int]]:
    """The upper left corner of each view below `top`: pictures side by side, tiles in their
    grid."""
    places, left = [], 4
    for view in views:
        if view.row:
            places.append((left + (view.column - 1) * edge, top + (view.row - 1) * edge))
        else:
            places.append((left + view.columns * edge + (8 if view.columns else 0), top))
            left = places[-1][0] + edge + 8
    return places


def _mark(picture: Image.Image, boxes: Boxes, kept: Tensor, shares: Tensor) -> Image.Image:
    """Dim the boxes of tokens that were not kept and outline those of kept ones (K,) with a share
    (K,) above 0."""
    shade = Image.new("L", picture.size, 0)
    for number, box in enumerate(boxes):
        ImageDraw.Draw(shade).rectangle(box, 0 if number in set(kept.tolist()) else 175)
    picture = Image.composite(Image.new("RGB", picture.size, (40, 40, 40)), picture, shade)
    draw = ImageDraw.Draw(picture)
    for token, share in zip(kept.tolist(), shares.tolist()):
        if share:
            level = round(90 + 165 * share)
            draw.rectangle(boxes[token], outline="black", width=4)
            draw.rectangle(boxes[token], outline=(level, level, 0), width=3)
    return picture
