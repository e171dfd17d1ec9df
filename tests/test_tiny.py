"""The shipped model, the scenes it was made for, and the script that trains it."""

import json
import random

import pytest
import torch
from conftest import TINY, same_bits
from safetensors.torch import load_file

from baselines import RandomSalience
from bench import accuracy
from sparsevila import Dense, SparseVILA
from tiny import train
from tiny.scenes import BOARD, KINDS, make_scene, question_and_answer, render, to_images


def test_a_scene_names_every_glyph_by_digit_and_by_color():
    rng = random.Random("test")
    for frames in (1, 3):
        for _ in range(200):
            glyphs = make_scene(rng, frames).glyphs
            assert 2 <= len(glyphs) <= 8
            assert len({g.digit for g in glyphs}) == len({g.color for g in glyphs}) == len(glyphs)
            places = [(g.frame, g.row, g.column) for g in glyphs]
            assert places == sorted(set(places))
            assert all(0 <= g.frame < frames for g in glyphs)


def test_cells_are_named_as_on_a_chess_board():
    rng = random.Random("chess")
    cells = {(g.row, g.column): g.cell for _ in range(900) for g in make_scene(rng).glyphs}
    corners = ((BOARD - 1, 0), (0, 0), (BOARD - 1, BOARD - 1), (0, BOARD - 1))
    assert [cells[corner] for corner in corners] == ["a1", "a10", "j1", "j10"]


def test_glyphs_are_drawn_in_their_cells_and_pictures_are_repeatable():
    scene = make_scene(random.Random(5), 2)
    a, b = (render(scene, random.Random(9)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (2, 3, 160, 160) and a.dtype == torch.uint8
    empty = render(type(scene)(2, ()), random.Random(9))
    changed = (a != empty).any(1).unflatten(1, (BOARD, 16)).unflatten(3, (BOARD, 16)).any(4).any(2)
    expected = torch.zeros(2, BOARD, BOARD, dtype=torch.bool)
    for glyph in scene.glyphs:
        expected[glyph.frame, glyph.row, glyph.column] = True
    assert torch.equal(changed, expected)
    labels = train.patch_labels(scene).view(2, BOARD, BOARD, 4)
    assert torch.equal(labels[..., 0] > 0, expected)
    assert all(labels[g.frame, g.row, g.column, 0] == 1 + g.digit for g in scene.glyphs)
    assert labels[:, 3, 7, 2:].tolist() == [[3, 7]] * 2  # row and column, glyph or not


def test_answers_have_several_words():
    scene = make_scene(random.Random(3), 2)
    for kind in KINDS:
        question, answer = question_and_answer(kind, scene, random.Random(1))
        assert question.endswith("?") and len(answer.split()) >= 2 and answer.endswith(".")
    with pytest.raises(ValueError, match="kind must be one of"):
        question_and_answer("size", scene, random.Random(1))


def test_the_shipped_files_are_small_and_complete(tiny):
    assert (TINY / "model.safetensors").stat().st_size <= 8e6
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "llava" and tiny[0].config.vision.patches >= 100
    assert len(tiny[1].tokenizer.encode(" c4").ids) == 2  # <s> and one word


def share_right(session, kinds):
    """The share of right answers about 25 unseen scenes, a question of each kind."""
    right = []
    for number in range(25):
        rng = random.Random(f"unseen {number}")
        scene = make_scene(rng)
        session.see(to_images(render(scene, rng)))
        for kind in kinds:
            question, expected = question_and_answer(kind, scene, rng)
            right.append(session.ask(question, max_new_tokens=16).text == expected)
    return sum(right) / len(right)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("session_type", [Dense, SparseVILA])
def test_the_tiny_model_answers_unseen_scenes(tiny, session_type, positions):
    """The card has the accuracy on 500."""
    session = session_type(*tiny, protocol="evaluation", positions=positions)
    assert share_right(session, accuracy.LOOKUPS) >= 0.95


def test_the_right_tokens_are_what_matters(tiny):
    """At the same budgets, pruning at random loses most answers."""
    session = RandomSalience(*tiny, protocol="evaluation")
    torch.manual_seed(0)
    assert share_right(session, ["color"]) <= 0.6


def test_parts_of_an_answer():
    assert accuracy.parts("red, c4.") == ("red", " c4.")
    assert accuracy.parts("4: 7 2 9 1.") == ("4", " 7 2 9 1.")
    assert accuracy.parts("nothing") == ("nothing", "")


class Stop(Exception):
    pass


def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """A few tiny steps, straight through and in three pieces, end with the same bits."""
    small = {"TOWER_STEPS": 3, "TOWER_BATCH": 2, "DECODER_STEPS": 4, "DECODER_BATCH": 2}
    for name, value in (small | {"CLIP_BATCH": 1, "SAVE_EVERY": 1, "CLIP_SHARE": 0.5}).items():
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
    assert all(same_bits(straight[name], pieces[name]) for name in straight)
