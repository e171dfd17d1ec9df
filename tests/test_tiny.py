"""The shipped model, the scenes it was made for, and the script that trains it."""

import itertools
import json
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, command_line, same_bits
from PIL import Image
from safetensors.torch import load_file

from baselines import FromTheQuestion, RandomRetrieval, RandomSalience
from bench import accuracy
from sparsevila import Dense, SparseVILA
from tiny import scenes, train
from tiny.scenes import (
    CELL,
    FIRST_ROW,
    GRID,
    LINE_PITCH,
    LINES,
    kinds_of,
    make_scene,
    needed_patches,
    question_and_answer,
    render,
    to_images,
    typed_page,
)
from tools import ask


def test_no_two_names_or_values_of_a_scene_can_be_taken_for_each_other():
    rng = random.Random("test")
    for pages in (1, 3):
        for _ in range(200):
            scene = make_scene(rng, pages)
            names, values = zip(*(line for page in scene for line in page.lines))
            assert len({"".join(sorted(name)) for name in names}) == len(names)
            assert len(set(values)) == len(values)
            for page in scene:
                assert 2 <= len(page.lines) <= LINES and page.kind == scene[0].kind
                cells = [(c.row, c.column) for c in page.cells()]
                assert len(set(cells)) == len(cells) and max(max(cell) for cell in cells) < GRID


def test_a_receipt_adds_up():
    rng = random.Random("sum")
    made = [make_scene(rng, 1 + n % 3) for n in range(60)]
    receipts = [scene for scene in made if scene[0].kind == "receipt"]
    for scene in receipts:
        *items, total = (line for page in scene for line in page.lines)
        cents = sum(int(value.replace(".", "")) for _, value in items)
        assert total.name == "total" and int(total.value.replace(".", "")) == cents
    assert len(receipts) > 9


def test_characters_are_drawn_in_their_cells_and_pictures_are_repeatable(monkeypatch):
    page = make_scene(random.Random(5))[0]
    a, b = (render([page], random.Random(9)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (1, 3, 240, 240) and a.dtype == torch.uint8
    monkeypatch.setattr(scenes, "stamp", lambda *_: None)  # its place depends on what is written
    empty = replace(page, title="", lines=())
    ink = render([page], random.Random(9)) != render([empty], random.Random(9))
    inked = {(c.row, c.column) for c in page.cells()}
    cells = ink[0].any(0).unflatten(1, (GRID, CELL)).unflatten(0, (GRID, CELL)).transpose(1, 2)
    middles = cells[:, :, 3:9, 3:9].flatten(2).any(2)  # ink may be a pixel off
    assert {tuple(cell) for cell in middles.nonzero().tolist()} == inked
    labels, letters, has_ink = train.patch_labels(page)
    assert {divmod(patch, GRID) for patch in has_ink.nonzero()[:, 0].tolist()} == inked
    for cell in page.cells():
        patch = cell.row * GRID + cell.column
        assert scenes.CHARACTERS[labels[patch, 0]] == cell.character
        assert (
            labels[patch, 1]
            == cell.line
            == (cell.row >= FIRST_ROW) * (1 + (cell.row - FIRST_ROW) // LINE_PITCH)
        )
        name = page.lines[cell.line - 1].name if cell.line else ""
        assert {chr(97 + n) for n in letters[patch].nonzero()[:, 0].tolist()} == set(name)


def test_answers_are_read_off_the_patches_that_they_need():
    for seed in range(40):
        rng = random.Random(seed)
        scene = make_scene(rng)
        page, written = scene[0], {c.row * GRID + c.column: c.character for c in scene[0].cells()}
        for kind in ("value", "name", "title", "line"):
            line = rng.choice(page.lines)
            question, answer = question_and_answer(kind, scene, rng, line)
            read = "".join(written[patch] for patch in needed_patches(kind, page, line))
            assert question.endswith("?") and read == answer.replace(" ", "")
    with pytest.raises(ValueError, match="kind must be one of"):
        question_and_answer("size", scene, random.Random(1))


def test_an_answer_has_four_tokens_and_more(tiny):
    """Or three, a short name; all but the first must come from what was retrieved."""

    def count(text):
        return len(tiny[1].tokenizer.encode(" " + text, add_special_tokens=False).ids)

    rng = random.Random(3)
    for pages in (1, 1, 1, 1, 3):
        scene = make_scene(rng, pages)
        for kind in kinds_of(scene):
            _, answer = question_and_answer(kind, scene, rng)
            assert count(answer) >= (3 if kind == "name" else 4), answer


@pytest.mark.parametrize(
    "lines, title, message",
    [
        ([], "", "a page has 1 to 8 lines, got 0"),
        (["milk 2.49"] * 9, "", "a page has 1 to 8 lines, got 9"),
        (["milk"], "", "like 'BREAD 3.10', got 'milk'"),
        (["milk 2,49"], "", "got 'milk 2,49'"),
        (["marmelade 2.49"], "", "a name of at most 8 letters"),
        (["milk 2.49"], "the corner", "a title has at most 10 letters, got 'the corner'"),
    ],
)
def test_a_page_of_ones_own_that_does_not_fit(lines, title, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        typed_page(lines, title)


def test_a_page_of_ones_own_is_read(tmp_path):
    """As README and the card show it."""
    file, script = tmp_path / "page.png", [sys.executable, "tiny/scenes.py"]
    lines = ["MILK 2.49", "BREAD 3.10", "GLORP 7.77"]
    made = subprocess.run(
        [*script, "--lines", *lines, file], cwd=ROOT, capture_output=True, text=True
    )
    assert made.stdout.startswith(f"wrote {file}; ")
    questions = {"how much is the bread?": "3.10", "what is on line 3?": "glorp 7.77"}
    asked = [word for question in questions for word in ("--ask", question)]
    options = ["--decode-sparsity", "0.6", "--json"]
    shown = json.loads(command_line(ask.main, "--image", file, *asked, *options).stdout)
    assert [answer["answer"] for answer in shown["answers"]] == list(questions.values())
    refused = subprocess.run([*script, "--lines", "milk", file], capture_output=True, cwd=ROOT)
    assert refused.returncode == 2 and b"got 'milk'" in refused.stderr


def test_the_shipped_files_are_small_and_complete(tiny):
    assert (TINY / "model.safetensors").stat().st_size <= 8e6
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "llava" and tiny[0].config.vision.patches == 400


def share_right(session, kinds, pages=25):
    """The share of right answers about unseen pages, a question of each kind."""
    right = []
    for number in range(pages):
        rng = random.Random(f"unseen {number}")
        scene = make_scene(rng)
        session.see(to_images(render(scene, rng)))
        for kind in kinds:
            question, expected = question_and_answer(kind, scene, rng)
            right.append(session.ask(question, max_new_tokens=16).text == expected)
    return sum(right) / len(right)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("session_type", [Dense, SparseVILA])
def test_the_tiny_model_reads_unseen_pages(tiny, session_type, positions):
    """The card has the accuracy on 500."""
    session = session_type(*tiny, decode_sparsity=0.6, protocol="evaluation", positions=positions)
    assert share_right(session, accuracy.LOOKUPS) >= 0.85


@pytest.mark.parametrize("kind", [RandomSalience, RandomRetrieval, FromTheQuestion])
def test_the_right_tokens_are_what_matters(tiny, kind):
    """At the same budgets a choice that means nothing loses nearly all answers."""
    session = kind(*tiny, decode_sparsity=0.6, protocol="evaluation")
    torch.manual_seed(0)
    assert share_right(session, ["value"]) <= 0.4


class Stop(Exception):
    pass


def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """A few tiny steps, straight through and in three pieces, end with the same bits."""
    small = {"TOWER_STEPS": 3, "TOWER_BATCH": 2, "DECODER_STEPS": 4, "DECODER_BATCH": 2}
    for name, value in (small | {"SIMPLE_STEPS": 1, "SAVE_EVERY": 1, "CLIP_SHARE": 0.5}).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "STATE", tmp_path / "state.pt")
    train.train(0, tmp_path / "straight")
    assert not train.STATE.exists()
    for loss, limit in (("tower_loss", 2), ("decoder_loss", 3)):
        real = getattr(train, loss)

        def interrupted(*arguments, real=real, limit=limit):
            if arguments[-1] == limit:
                raise Stop
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(train, loss, interrupted)
            train.train(0, tmp_path / "pieces")
    with pytest.raises(SystemExit, match="of seed 0"):
        train.train(1, tmp_path / "pieces")
    train.train(0, tmp_path / "pieces")
    straight, pieces = (
        load_file(tmp_path / n / "model.safetensors") for n in ("straight", "pieces")
    )
    assert straight.keys() == load_file(TINY / "model.safetensors").keys()
    for shipped in (*TINY.glob("*.json"), *TINY.glob("*.jinja")):
        assert (tmp_path / "straight" / shipped.name).read_text() == shipped.read_text()
    assert all(same_bits(straight[name], pieces[name]) for name in straight)


def test_what_the_model_cannot_read_is_said(tmp_path):
    """For every question that training can ask, nothing."""
    rng = random.Random("known")
    for pages in (1, 1, 1, 2) * 5:
        scene = make_scene(rng, pages)
        for kind, wording in itertools.product(kinds_of(scene), range(3)):
            assert scenes.is_known(question_and_answer(kind, scene, rng, wording=wording)[0])
    Image.new("RGB", (640, 480), "red").save(tmp_path / "photo.jpg")
    photo, page = tmp_path / "photo.jpg", TINY / "samples" / "receipt.png"
    known, unknown = "how much is the milk?", "how much is this?"
    for picture, question, said in (
        (page, known, ""),
        (page, unknown, "note"),
        (photo, known, "note"),
    ):
        result = command_line(ask.main, "--image", picture, "--ask", question, "--sparse")
        assert result.returncode == 0 and result.stderr[:4] == said
        assert result.stderr.count("\n") == bool(said)
