"""bench.py: that it counts what it says, on models small enough for a test. Times are never
asserted."""

import json
import math
import random
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import bench
from model import Config, TextConfig, VisionConfig
from sparsevila import Dense, SparseVILA
from tiny.scenes import make_needle, question_and_answer

SMALL = Config(
    VisionConfig(64, 128, 2, 4, image_size=32, patch_size=4, class_token=False),
    TextConfig(vocab=512, width=128, mlp=256, layers=3, heads=4, kv_heads=2, head_dim=32),
    stop_ids=(),
)


@pytest.fixture
def small_model():
    return bench.random_model(SMALL, torch.device("cpu"), torch.float32)


def test_speed_prints_one_json_object_last(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(bench.PRESETS, "laptop", bench.Preset(SMALL, 3))
    bench.main(["speed", "--runs", "2", "--answer-tokens", "5", "--json"])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result["visual_tokens"] == 3 * 64 and result["answer_tokens"] == 5
    assert result["decoding"].startswith(("torch.compile", "eager (torch.compile does not work"))
    least, most = result["read_bandwidth_range_gb_per_s"]
    assert 0 < least <= result["read_bandwidth_gb_per_s"] <= most
    row = 3 * 2 * 2 * 32 * 4  # bytes of a row's keys and values in all layers
    # Three frames keep 16 of 64 each; floor(0.9 * 48) of them are left out in decoding.
    for name, visual in (("dense", 192), ("sparse", 48 - 43)):
        attended = result[name]["bytes attended"]
        assert attended == row * (visual + 16 + bench.QUESTION_TOKENS + 2)
        assert all(result[name][stage] >= 0 for stage in bench.STAGES)
        total = sum(result[name][stage] for stage in bench.STAGES)
        assert result[name]["end to end"] == pytest.approx(total, rel=0.2)
    for ratio in ("prefill_speedup", "decode_speedup", "end_to_end_speedup"):
        assert result[ratio] > 0
    assert any(line.startswith("prefill ") for line in printed)
    bench.draw_speed(result, str(tmp_path / "speed.png"))
    assert Image.open(tmp_path / "speed.png").width > 600


def test_decoding_is_compiled_unless_it_cannot_be(small_model, monkeypatch):
    """And is left alone if asked for."""
    assert bench.compile_decoding(small_model, eager=True) == "eager"
    assert small_model.compiled is None
    failed = RuntimeError("torch.compile does not work here: no C++ compiler")
    monkeypatch.setattr(bench.VLM, "compile_decoding", Mock(side_effect=failed))
    assert bench.compile_decoding(small_model, eager=False) == f"eager ({failed})"
    monkeypatch.setattr(bench.VLM, "compile_decoding", Mock())
    assert bench.compile_decoding(small_model, eager=False) == "torch.compile"


def test_figures_follow_from_the_medians():
    """Worked by hand."""
    stages = dict.fromkeys(bench.STAGES, 0.0) | {"bytes attended": 4e6}
    dense = stages | {"prefill": 90.0, "question": 10.0, "decode": 50.0}
    sparse = stages | {"salience": 5.0, "prefill": 40.0, "question": 10.0, "scoring": 6.0}
    sparse |= {"decode": 25.0, "packing": 2.0, "bytes attended": 1e6}
    for run in (dense, sparse):
        run["end to end"] = sum(run[stage] for stage in bench.STAGES)
        run["first token"] = run["end to end"] - run["decode"]
    runs = {"dense": [dense] * 3, "sparse": [sparse, sparse, sparse | {"decode": 99.0}]}
    got = bench.summarise(runs, tokens=6, weights=6_000_000, bandwidth=1e6)
    assert got["prefill_speedup"] == 90 / 45 and got["decode_speedup"] == 50 / 33
    assert got["end_to_end_speedup"] == pytest.approx(150 / 88)
    assert got["dense"]["bound"] == 10 and got["dense"]["reached"] == 1.0
    assert got["milliseconds_and_bytes"]["sparse"]["decode"] == [25.0, 25.0, 99.0]
    assert got["break_even_tokens_first_question"] == 0
    # A later question costs 8 ms more and every token saves 5.
    assert got["break_even_tokens_later_questions"] == pytest.approx(8 / 5)
    runs["sparse"] = [sparse | {"decode": 50.0}]
    assert bench.summarise(runs, 6, 1, 1.0)["break_even_tokens_later_questions"] is None


@pytest.mark.parametrize("kind", [Dense, SparseVILA])
def test_the_static_step_writes_the_same_tokens(small_model, kind):
    script = bench.Script(SMALL, 2)
    answers = []
    for statically in (False, True):
        session = kind(small_model, script)
        session.see([Image.new("RGB", (1, 1))] * 2)
        answer = session.ask("?", max_new_tokens=1 if statically else 9).token_ids
        if statically:
            answer += bench.decode_statically(small_model, session.cache, answer[0], 8)[0]
        answers.append(answer)
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_a_quantised_model_and_one_without_a_tower(small_model):
    bench.quantise(small_model)
    assert small_model.precision == "float32 + W4A16 decoder + W8A8 tower"
    bench.leave_out_tower(small_model, 1, 100)
    run, _ = bench.run_once(SparseVILA(small_model, bench.Script(SMALL, 1)), 1, 3)
    assert run["vision"] > 0 and run["salience"] == 0


def test_presets_are_the_sizes_they_name():
    """Weights in billions, as the models' names say, and visual tokens."""
    sizes = {"longvila-7b": (7.6, 50176), "longvila-1.5b": (1.5, 50176), "laptop": (0.032, 16384)}
    sizes |= {
        "llava-next-7b": (6.7, 2880),
        "qwen2.5-vl-7b": (7.6, 2691),
        "smolvlm-256m": (0.16, 1088),
    }
    for name, (billions, tokens) in sizes.items():
        config, pictures, tokens_each = bench.PRESETS[name]
        with torch.device("meta"):
            model = bench.VLM(config)
        weights = sum(p.numel() for p in model.decoder.parameters())
        weights += 0 if config.text.tied else model.lm_head.weight.numel()
        assert math.isclose(weights / 1e9, billions, rel_tol=0.05), (name, weights)
        assert pictures * (tokens_each or config.visual_tokens) == tokens


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--answer-tokens", "0", "positive integer, got '0'"),
        ("--answer-tokens", "1", "at least 2"),
        ("--visual-tokens", "x", "positive integer, got 'x'"),
        ("--preset", "gpt", "invalid choice: 'gpt'"),
        ("--runs", "-1", "positive integer, got '-1'"),
        ("--prefill-sparsity", "1", "prefill_sparsity must be in [0, 1), got 1.0"),
        ("--device", "abacus", "abacus"),
    ],
)
def test_wrong_arguments_are_one_line(option, value, words, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["speed", option, value])
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


# --- accuracy and needle --------------------------------------------------------------------------


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_accuracy_of_two_methods(capsys, tmp_path):
    file = tmp_path / "accuracy.png"
    bench.main(
        ["accuracy", "--methods", "dense", "blind", "uniform, 25", "--questions", "8", "--seeds"]
        + ["2", "--json", "--figure", str(file)]
    )  # fmt: skip
    result = last_json(capsys)
    methods = result["methods"]
    assert result["questions_of_each_kind"] == 8
    assert all(values.keys() == set(bench.COLUMNS) for values in methods.values())
    assert [methods[name]["entering"][0] for name in methods] == [100, 0, 25]
    assert methods["dense"]["later turns"][0] > 90 > 50 > methods["blind"]["later turns"][0]
    assert Image.open(file).width > 600


def test_every_column_is_the_mean_over_seeds(monkeypatch):
    """Worked by hand, with runs that are made up."""

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, methods, paths, counts, pictures, firsts):
            assert function is bench.measure and set(counts) == {50}
            for method, first in zip(methods, firsts):
                offset = 10 * (method.options["protocol"] == "conversation")
                yield {"color": 80 + first / 50, "later turns": 60 + first / 50 + offset}

    monkeypatch.setattr(bench, "workers", Pool)
    values = bench.accuracy(["dense"], 150, 3)["methods"]["dense"]
    assert values["color"] == [81, 1] and values["later turns"] == [61, 1]
    assert values["later turns, conversation"] == [71, 1]


def test_needle(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LENGTHS", (2, 4, 6))
    monkeypatch.setattr(bench, "DEPTHS", (0, 100))
    file = tmp_path / "needle.png"
    options = ["--methods", "SparseVILA", "blind", "--clips", "4", "--json"]
    bench.main(["needle", *options, "--figure", str(file)])
    result = last_json(capsys)
    assert result["attended"]["SparseVILA"] == {"2": 5, "4": 10, "6": 15}
    assert min(result["right"]["SparseVILA"]["4"]) > 50 > max(result["right"]["blind"]["4"])
    assert Image.open(file).width > 400


@given(st.integers(0, 10**6), st.integers(1, 20), st.data())
def test_a_needle_is_one_of_six_in_its_frame(seed, frames, data):
    depth = data.draw(st.integers(0, frames - 1))
    scene, needle = make_needle(random.Random(seed), frames, depth)
    assert len(scene.glyphs) == 8 and needle in scene.glyphs and needle.frame == depth
    assert len({g.digit for g in scene.glyphs}) == len({g.color for g in scene.glyphs}) == 8
    assert len({(g.frame, g.row, g.column) for g in scene.glyphs}) == 8
    assert sum(g.frame == depth for g in scene.glyphs) == (6 if frames > 1 else 8)
    question, answer = question_and_answer("place", scene, random.Random(0), needle)
    assert question == f"where is the {needle.digit}?" and answer.startswith(needle.cell)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["accuracy", "--methods", "magic"], "invalid choice: 'magic'"),
        (["accuracy", "--seeds", "1"], "--seeds must be at least 2"),
        (["accuracy", "--questions", "3"], "--questions at least as many"),
        (["needle", "--clips", "0"], "positive integer, got '0'"),
        (["needle", "--figure", "no/such/folder.png"], "no folder"),
        (["speed", "--figure", "stages.abc"], "abc"),
    ],
)
def test_wrong_arguments_of_the_tables_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(arguments)
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
