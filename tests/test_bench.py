"""bench/: that it counts what it says, on models small enough for a test. Times are never
asserted."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench import CPU, accuracy, needle, random_models, speed
from bench.__main__ import main
from model import VLM, Config, TextConfig, VisionConfig
from sparsevila import SparseVILA
from tiny.scenes import make_needle, question_and_answer

SMALL = Config(
    VisionConfig(64, 128, 2, 4, image_size=32, patch_size=4, class_token=False),
    TextConfig(vocab=512, width=128, mlp=256, layers=3, heads=4, kv_heads=2, head_dim=32),
    stop_ids=(),
)


@pytest.fixture
def small_model():
    return random_models.random_model(SMALL, torch.device("cpu"), torch.float32)


def test_speed_prints_one_json_object_last(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(random_models.PRESETS, "laptop", random_models.Preset(SMALL, 3))
    main(["speed", "--device", "cpu", "--runs", "2", "--answer-tokens", "5", "--json"])
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
        # Four steps; the row of the token that is read is attended to as well.
        assert attended == row * (visual + 16 + speed.QUESTION_TOKENS + (1 + 2 + 3 + 4) / 4)
        assert all(result[name][stage] >= 0 for stage in speed.STAGES)
        total = sum(result[name][stage] for stage in speed.STAGES)
        assert result[name]["end to end"] == pytest.approx(total, rel=0.2)
        least, most = result[name]["reached_range"]
        assert 0 < least <= most
    for ratio in ("prefill_speedup", "decode_speedup", "end_to_end_speedup"):
        least, most = result[f"{ratio}_range"]
        assert 0 < least <= most and result[ratio] > 0
    assert ("compile_seconds" in result) == (result["decoding"] == "torch.compile")
    assert any(line.startswith("prefill ") for line in printed)
    speed.draw_speed(result, str(tmp_path / "speed.png"))
    assert Image.open(tmp_path / "speed.png").width > 600


def test_decoding_is_compiled_unless_it_cannot_be(small_model, monkeypatch):
    """And is left alone if asked for."""
    assert speed.compile_decoding(small_model, eager=True) == "eager"
    assert small_model.compiled is None
    failed = RuntimeError("torch.compile does not work here: no C++ compiler")
    monkeypatch.setattr(VLM, "compile_decoding", Mock(side_effect=failed))
    assert speed.compile_decoding(small_model, eager=False) == f"eager ({failed})"
    monkeypatch.setattr(VLM, "compile_decoding", Mock())
    assert speed.compile_decoding(small_model, eager=False) == "torch.compile"


def test_figures_follow_from_the_medians():
    """Worked by hand."""
    stages = dict.fromkeys(speed.STAGES, 0.0) | {"bytes attended": 4e6}
    dense = stages | {"prefill": 90.0, "question": 10.0, "decode": 50.0}
    sparse = stages | {"salience": 5.0, "prefill": 40.0, "question": 10.0, "scoring": 6.0}
    sparse |= {"decode": 25.0, "packing": 2.0, "bytes attended": 1e6}
    for run in (dense, sparse):
        run["end to end"] = sum(run[stage] for stage in speed.STAGES)
        run["first token"] = run["end to end"] - run["decode"]
    slow = sparse | {"decode": 99.0}
    rounds = [{"dense": dense, "sparse": run} for run in (sparse, sparse, slow)]
    got = speed.summarise(rounds, tokens=6, weights=6_000_000, bandwidths=[1e6, 0.5e6, 2e6])
    assert got["prefill_speedup"] == 90 / 45 and got["decode_speedup"] == 50 / 33
    assert got["prefill_speedup_range"] == [2, 2]
    assert got["decode_speedup_range"] == pytest.approx([50 / 107, 50 / 33])
    assert got["end_to_end_speedup"] == pytest.approx(150 / 88)
    assert got["step_speedup"] == 2 and got["step_speedup_by_bytes"] == pytest.approx(10 / 7)
    assert got["dense"]["bound"] == 10 and got["dense"]["reached"] == 1.0
    assert got["dense"]["reached_range"] == [0.5, 2.0]  # 10 MB a step of 10 ms
    assert got["sparse"]["reached_range"] == pytest.approx([3.5 / 19.8, 14 / 5])  # 7 MB
    assert got["read_bandwidth_range_gb_per_s"] == [0.5, 2]
    assert got["milliseconds_and_bytes"]["sparse"]["decode"] == [25.0, 25.0, 99.0]
    assert got["break_even_tokens_first_question"] == 1
    # A later question costs 8 ms more and every token after the first saves 5.
    assert got["break_even_tokens_later_questions"] == pytest.approx(1 + 8 / 5)


@pytest.mark.parametrize(
    "cost, saved, expected",
    [
        (8.0, 5.0, (2.6, None)),
        (8.0, 0.0, (None, None)),
        (8.0, -5.0, (None, None)),
        (-8.0, 5.0, (1, None)),
        (0.0, 0.0, (1, None)),
        (-8.0, -5.0, (1, 2.6)),
    ],
)
def test_sparsity_pays_where_cost_is_less_than_what_is_saved(cost, saved, expected):
    start, stop = speed.break_even(cost, saved)
    assert (start, stop) == expected
    for tokens in (1, 2, 100):
        pays = start is not None and start <= tokens and (stop is None or tokens <= stop)
        assert pays == (cost <= (tokens - 1) * saved)


def test_a_quantised_model_and_one_without_a_tower():
    model = random_models.random_model(SMALL, CPU, torch.float32, quantised=True)
    assert model.precision == "float32 + W4A16 decoder + W8A8 tower"
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    session = SparseVILA(model, random_models.NoiseProcessor(SMALL, 1))
    run, _ = speed.run_once(speed.leave_out_tower(session, 1, 100), 1, 3)
    assert run["vision"] > 0 and run["salience"] == 0


def test_a_quantised_model_beside_the_same_shape_without(monkeypatch, capsys):
    """Both run in every round. The unquantised one takes twice as long, or in one round thrice."""
    monkeypatch.setitem(random_models.PRESETS, "laptop", random_models.Preset(SMALL, 3))
    run_once, calls = speed.run_once, []

    def run(session, *arguments):
        run, tokens = run_once(session, *arguments)
        quantised = "W4A16" in session.model.precision
        calls.append((type(session).__name__, quantised))
        run |= dict.fromkeys(("vision", "decode"), 10 if quantised else 20 + 10 * (len(calls) > 12))
        return run, tokens

    monkeypatch.setattr(speed, "run_once", run)
    options = "--runs 3 --answer-tokens 3 --eager --device cpu --json"
    main(["speed", *options.split(), "--quantised", "--versus", "unquantised"])
    each = {(kind, quantised) for kind in ("Dense", "SparseVILA") for quantised in (True, False)}
    assert [set(calls[i : i + 4]) for i in range(0, 16, 4)] == [each] * 4
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    other = result["unquantised"]
    assert other["precision"] == "float32" and "W4A16" in result["precision"]
    assert other["decoder_weight_bytes"] > 4 * result["decoder_weight_bytes"]
    for name in ("dense", "sparse"):
        assert other[name]["vision"] == other[name]["decode"] == [2, 2, 3]
    assert "  sparse, decode: 2.00 x (2.00 to 3.00) as long" in printed


def test_a_random_model_has_finite_answers_and_tied_weights():
    text = replace(SMALL.text, tied=True)
    model = random_models.random_model(replace(SMALL, text=text), CPU, torch.float32)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    assert model.decoder.norm.weight.eq(1).all()
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in model.parameters())
    logits = model(model.embed([1, 2, 3]))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    """On a machine where 24 GB are free."""
    meminfo = Mock(exists=lambda: True, read_text=lambda: "MemAvailable:   24000000 kB\n")
    monkeypatch.setattr(random_models, "Path", lambda name: meminfo)
    config, frames, _ = random_models.PRESETS["longvila-7b"]
    size = torch.float32, frames, config.vision.visual_tokens
    random_models.check_memory(config, *size, quantised=[True])
    random_models.check_memory(config, torch.bfloat16, *size[1:], quantised=[False])
    with pytest.raises(ValueError, match="needs at least"):
        random_models.check_memory(config, torch.bfloat16, *size[1:], quantised=[True, False])
    random_models.check_memory(
        random_models.PRESETS["laptop"].config, torch.float32, 64, 256, quantised=[False]
    )
    # 7.6e9 weights of 4 bytes; 50,176 rows of 28 layers, keys and values, 4 heads of 128
    least = 7.6e9 * 4 + 50176 * 28 * 2 * 4 * 128 * 4
    with pytest.raises(ValueError, match="needs at least ([0-9.]+) GB, 24.6 GB are free") as error:
        random_models.check_memory(config, *size, quantised=[False])
    said = float(str(error.value).split()[4]) * 1e9
    assert least < said < 1.3 * least


def test_presets_are_the_sizes_they_name():
    """Weights in billions, as the models' names say, and visual tokens."""
    sizes = {"longvila-7b": (7.6, 50176), "longvila-1.5b": (1.5, 50176), "laptop": (0.032, 16384)}
    sizes |= {
        "llava-next-7b": (6.7, 2880),
        "qwen2.5-vl-7b": (7.6, 2691),
        "smolvlm-256m": (0.16, 1088),
    }
    for name, (billions, tokens) in sizes.items():
        config, pictures, tokens_each = random_models.PRESETS[name]
        with torch.device("meta"):
            model = VLM(config)
        weights = sum(p.numel() for p in model.decoder.parameters())
        weights += 0 if config.text.tied else model.lm_head.weight.numel()
        assert math.isclose(weights / 1e9, billions, rel_tol=0.05), (name, weights)
        assert pictures * (tokens_each or config.vision.visual_tokens) == tokens


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
        ("--answer-tokens", "2000000", "at most 1,048,576 fit"),
        ("--visual-tokens", "2000000000", "at most 1,048,576 fit"),
        ("--figure", "", "must end in one of"),
    ],
)
def test_wrong_arguments_are_one_line(option, value, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["speed", option, value])
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


# --- accuracy and needle --------------------------------------------------------------------------


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_a_checkpoint_by_us_and_by_transformers(name, capsys, tmp_path):
    """What verify_real.sh runs, on a golden checkpoint; the file says what was printed."""
    folder, file = ROOT / "tests" / "golden" / name, tmp_path / "real.json"
    page = str(TINY / "samples" / "receipt.png")
    main(["real", str(folder), "--image", page, page, "--tokens", "5", "--out", str(file)])
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert result["answers"] == 6 and len(result["turns"]) == 4 * 6
    assert result["same_tokens"]["dense = transformers, dense"] == 6
    assert result["same_tokens"]["sparse = transformers, sparse"] == 6
    different = result["same_tokens"]["dense = sparse"]
    assert f"dense = sparse: the same tokens in {different} of 6 answers" in printed
    script = (ROOT / "verify_real.sh").read_text()
    assert "python -m bench real" in script and "--out verify_real.json" in script


def test_a_method_of_ones_own_stands_beside_the_others(capsys, tmp_path):
    """Here dense decoding under another name."""
    file, figure = tmp_path / "own.py", tmp_path / "accuracy.svg"
    file.write_text("from sparsevila import Dense\n\n\nclass Mine(Dense):\n    pass\n")
    arguments = ["accuracy", "--methods", "dense", "blind", "--method", f"{file}:Mine"]
    arguments += ["--questions", "2", "--seeds", "2", "--figure", str(figure), "--json"]
    main(arguments)
    methods = json.loads(capsys.readouterr().out.splitlines()[-1])["methods"]
    assert set(methods) == {"dense", "blind", f"{file}:Mine"}
    of_both = [
        {column: x for column, x in methods[name].items() if not column.startswith("CPU")}
        for name in ("dense", f"{file}:Mine")
    ]
    assert of_both[0] == of_both[1]
    drawn = figure.read_text()
    assert "<!-- Mine -->" in drawn and "<!-- In the table alone: blind. -->" in drawn


def test_accuracy_of_two_methods(capsys, tmp_path):
    file = tmp_path / "accuracy.png"
    main(
        ["accuracy", "--methods", "dense", "blind", "uniform, 100", "--questions", "8", "--seeds"]
        + ["2", "--json", "--figure", str(file)]
    )  # fmt: skip
    result = last_json(capsys)
    methods = result["methods"]
    assert result["questions_of_each_kind"] == 8
    for values in methods.values():
        both = {column for column in accuracy.COLUMNS if not column.endswith("conversation")}
        both |= {f"needed, layer {layer}" for layer in range(1, 7)}
        assert values.keys() == both | {f"{column}, conversation" for column in both}
    assert [methods[name]["entering"][0] for name in methods] == [400, 0, 100]
    # Six layers, keys and values, two heads of 32, float32: 3072 bytes a row; text comes on top.
    visual, text = 400 * 3.072, methods["blind"]["KV kB"][0]
    assert methods["dense"]["KV kB"][0] == pytest.approx(visual + text)
    assert methods["uniform, 100"]["KV kB"][0] == pytest.approx(visual / 4 + text)
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
            assert function is accuracy.measure and set(counts) == {50}
            for method, first in zip(methods, firsts):
                offset = 10 * (method.options["protocol"] == "conversation")
                yield {"value": 80 + first / 50, "later turns": 60 + first / 50 + offset}

    monkeypatch.setattr(accuracy, "workers", Pool)
    values = accuracy.accuracy(["dense"], 150, 3)["methods"]["dense"]
    assert values["value"] == [81, 1] and values["later turns"] == [61, 1]
    assert values["later turns, conversation"] == [71, 1]


def test_needle(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(needle, "LENGTHS", (2, 4, 6))
    monkeypatch.setattr(needle, "DEPTHS", (0, 100))
    file = tmp_path / "needle.png"
    options = ["--methods", "SparseVILA, 20", "blind", "--clips", "4", "--json"]
    main(["needle", *options, "--figure", str(file)])
    result = last_json(capsys)
    assert result["attended"]["SparseVILA, 20"] == {"2": 40, "4": 80, "6": 120}
    assert sum(result["right"]["SparseVILA, 20"]["2"]) > 50 > max(result["right"]["blind"]["4"])
    assert Image.open(file).width > 400


@given(st.integers(0, 10**6), st.integers(1, 6), st.data())
def test_a_needle_is_on_its_page_and_on_no_other(seed, pages, data):
    depth = data.draw(st.integers(0, pages - 1))
    scene, needle = make_needle(random.Random(seed), pages, depth)
    assert len(scene) == pages
    assert [needle.name in {name for name, _ in page.lines} for page in scene] == [
        number == depth for number in range(pages)
    ]
    question, answer = question_and_answer("value", scene, random.Random(0), needle)
    assert needle.name in question and answer == needle.value


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["accuracy", "--methods", "magic"], "no row 'magic': --help names all"),
        (["needle", "--methods", "SparseVILA"], "'SparseVILA': did you mean 'SparseVILA, 40'?"),
        (["accuracy", "--method", "magic"], "FILE:CLASS, got 'magic': no file ''"),
        (["accuracy", "--method", f"{__file__}:SMALL"], "hold a SparseVILA class 'SMALL', got"),
        (["accuracy", "--seeds", "1"], "--seeds must be at least 2"),
        (["accuracy", "--questions", "3"], "--questions at least as many, got 5 and 3"),
        (["needle", "--clips", "0"], "positive integer, got '0'"),
        (["needle", "--figure", "no/such/folder.png"], "no folder"),
        (["speed", "--figure", "stages.abc"], "abc"),
    ],
)
def test_wrong_arguments_of_the_tables_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_options_that_exclude_each_other(capsys, monkeypatch):
    """Before anything is made."""
    monkeypatch.setattr(speed, "random_model", None)
    for arguments, words in (
        (["--eager", "--device", "cuda"], "--eager is for a CPU"),
        (["--versus", "transformers", "--quantised"], "leave out --quantised"),
        (["--versus", "unquantised"], "needs --quantised"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["speed", *arguments])
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_output_that_nobody_reads(tmp_path):
    """The figure is drawn all the same; a closed output is refused at once."""
    figure = tmp_path / "needle.png"
    options = "needle --clips 1 --methods blind".split()
    command = [sys.executable, "-m", "bench", *options]
    with subprocess.Popen(
        [*command, "--figure", str(figure)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141 and b"Error" not in errors and figure.exists()
    closed = subprocess.run(
        command, cwd=ROOT, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE
    )
    assert closed.returncode == 2 and b"standard output must be open" in closed.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_ends_at_once_with_its_workers(number, code):
    """A signal to the parent alone. A shell's background job, as pytest may be, would ignore
    SIGINT, and with it what it starts."""
    command = [sys.executable, "-m", "bench", "needle", "--clips", "10000"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    with process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(workers := children.read_text().split()) < os.cpu_count():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(number)
        try:
            process.communicate(timeout=20)  # until the last of them has closed its output
        finally:
            for pid in [*workers, process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        assert process.returncode == code
