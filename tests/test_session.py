"""The session and the command line: what they return, and what they refuse."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, TINY, command_line, random_model, random_pictures
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageStat

from checkpoints.processor import TextStream
from sparsevila import Answer, Dense, RetrievalCache, SparseVILA
from tools import ask, command, quantise
from tools.overlay import overlay

SAMPLES = TINY / "samples"


def run(*arguments, stdin=""):
    return command_line(ask.main, *arguments, stdin=stdin)


# --- the session ----------------------------------------------------------------------------------


def test_a_session_counts_what_it_does(tiny, page):
    session = SparseVILA(*tiny)
    session.see([page, page])
    assert session.stats["visual_tokens"] == {"encoded": 800, "kept": 200, "attended": None}
    answer = session.ask("how much is the coffee?")
    assert isinstance(answer, Answer)
    layers = tiny[0].config.text.layers
    assert session.stats["visual_tokens"]["attended"] == [40] * layers
    assert set(session.stats["milliseconds"]) == {"vision", "prune", "prefill"}
    assert set(answer.timings) == {"question", "retrieve", "decode"}
    assert all(chosen.shape == (40,) and chosen.dtype == torch.int64 for chosen in answer.retrieved)
    text = session.cache.packed.length - 40 - (len(answer.token_ids) - 1)
    head = 2 * tiny[0].config.text.kv_heads * tiny[0].config.text.head_dim * 4  # bytes of a row
    assert answer.kv_bytes_per_token == layers * (text + 40) * head


def test_dense_reads_everything(tiny, page):
    session = Dense(*tiny)
    session.see(page)
    answer = session.ask("how much is the coffee?")
    attended = [400] * tiny[0].config.text.layers
    assert [len(chosen) for chosen in answer.retrieved] == attended
    assert session.stats["visual_tokens"] == {"encoded": 400, "kept": 400, "attended": attended}


def test_seeing_again_forgets_all_before(tiny, page):
    session, other = SparseVILA(*tiny), SparseVILA(*tiny)
    session.see(random_pictures(0, 3, 160))
    session.ask("how many lines?")
    for s in (session, other):
        s.see(page)
    assert session.ask("what is on line 5?").token_ids == other.ask("what is on line 5?").token_ids
    assert session.cache.length == other.cache.length


def test_a_failed_see_leaves_the_session_as_it_was(tiny, page, tmp_path):
    session = SparseVILA(*tiny)
    session.see(page)
    cache, stats, kept = session.cache, session.stats, session.kept
    for images in ([], [page, tmp_path / "missing.png"], [page] * 90, 3):
        with pytest.raises((ValueError, OSError)):
            session.see(images)
    assert session.cache is cache and session.stats is stats and session.kept is kept


def test_ask_refuses(tiny, page):
    session = SparseVILA(*tiny)
    with pytest.raises(RuntimeError, match="call see"):
        session.ask("what?")
    session.forget()
    session.see(page)
    length = session.cache.length
    for question in ("", "  \n", None, 3):
        with pytest.raises(ValueError, match="question must be a text that is not empty"):
            session.ask(question)
    with pytest.raises(ValueError, match="cannot be tokenized"):
        session.ask("what \udc80?")
    with pytest.raises(ValueError, match="max_new_tokens"):
        session.ask("what?", max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        session.ask("what?", temperature=float("nan"))
    with pytest.raises(ValueError, match="the model has 8192 positions"):
        session.ask("what? " * 5000)
    for sampling in ({"temperature": "x"}, {"temperature": None}, {"top_p": "x"}):
        with pytest.raises(ValueError, match=next(iter(sampling))):
            session.ask("what?", **sampling)
    assert session.cache.length == length and not session.cache.relevance


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefill_sparsity": 1.0}, r"prefill_sparsity must be in \[0, 1\), got 1.0"),
        ({"prefill_sparsity": float("nan")}, "got nan"),
        ({"decode_sparsity": -0.5}, r"decode_sparsity must be in \[0, 1\), got -0.5"),
        ({"decode_sparsity": "0.5"}, "got '0.5'"),
        ({"scope": "clip"}, "scope must be one of frame, global, got 'clip'"),
        ({"positions": None}, "positions must be one of contiguous, original, got None"),
        ({"protocol": "chat"}, "protocol must be one of conversation, evaluation, got 'chat'"),
    ],
)
def test_a_session_refuses_settings_out_of_range(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        SparseVILA(*tiny, **options)


@pytest.mark.parametrize(
    "features, index",
    [
        (2, [[5, 3]]), (2, [[3, 3]]), (2, [[398, 400]]), (2, [[-1, 3]]),
        (3, [[3, 5]]), (2, []), (2, [[3, 5], [3, 5]]),
    ],
)  # fmt: skip
def test_a_wrong_prune_of_ones_own_is_named(tiny, page, features, index):
    class Odd(SparseVILA):
        def prune(self, views, salience):
            return [x[:features] for x in views], [torch.tensor(i) for i in index]

    message = r"prune must return features and ascending indices below n, of 1 views each, got \["
    with pytest.raises(ValueError, match=message + f"{features}"):
        Odd(*tiny).see(page)


@pytest.mark.parametrize("shape", [(1, 401), (400,), (1, 400, 1), ()])
def test_a_wrong_salience_of_ones_own_is_named(tiny, page, shape):
    class Odd(SparseVILA):
        def salience(self, q, k):
            return torch.zeros(shape)

    message = f"salience must return (1, 400), a number a patch, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Odd(*tiny).see(page)


@pytest.mark.parametrize("shape", [(99,), (100, 1), (2, 100), ()])
def test_a_wrong_score_of_ones_own_is_named(tiny, page, shape):
    class Odd(SparseVILA):
        class cache_type(RetrievalCache):
            def score(self, q, k):
                return torch.zeros(shape)

    session = Odd(*tiny)
    session.see(page)
    length = session.cache.length
    message = f"score must return {torch.Size([100])}, got {torch.Size(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        session.ask("what?")
    assert session.cache.length == length


def test_a_diverged_model_is_named_not_ranked(tiny, page):
    """NaN in the salience or in the relevance must not silently pick the first tokens."""
    vlm, processor = random_model(0)
    vlm.vision_tower.layers[-1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores must not be NaN"):
        SparseVILA(vlm, processor).see(page)
    vlm, processor = random_model(0)
    session = SparseVILA(vlm, processor)
    session.see(page)
    length = session.cache.length
    vlm.decoder.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores must not be NaN"):
        session.ask("what?")
    assert session.cache.length == length


def test_a_session_answers_one_question_at_a_time(tiny, page):
    session, refused = SparseVILA(*tiny), []
    session.see(page)
    alone = session.ask("how much is the coffee?")
    session.forget()

    def interfere(text):
        for call in (lambda: session.ask("why?"), lambda: session.see(page), session.forget):
            with pytest.raises(RuntimeError, match="one call at a time"):
                call()
            refused.append(text)

    answer = session.ask("how much is the coffee?", on_text=interfere)
    assert answer.token_ids == alone.token_ids and refused
    session.forget()


def test_sampling_with_a_seed_is_repeatable(tiny, page):
    session = SparseVILA(*tiny, protocol="evaluation")
    session.see(page)
    draw = lambda seed: session.ask("how many lines?", temperature=5.0, seed=seed).token_ids  # noqa
    assert draw(1) == draw(1) != draw(2)


@given(st.lists(st.integers(5, 300), max_size=40))
def test_streamed_text_is_the_final_text(tiny, ids):
    """Bytes in any order: characters split across tokens, and invalid ones."""
    pieces = []
    stream = TextStream(tiny[1], pieces.append)
    for token in ids:
        stream.add(token)
    stream.finish()
    assert "".join(pieces) == stream.text == tiny[1].decode(ids)
    assert "" not in pieces


@given(st.text("aé漢😀 ?\n", max_size=30))  # one to four bytes, each byte a token
def test_streamed_text_never_shows_half_a_character(tiny, text):
    ids = tiny[1].tokenizer.encode(text, add_special_tokens=False).ids
    pieces = []
    stream = TextStream(tiny[1], pieces.append)
    for token in ids:
        stream.add(token)
    stream.finish()
    assert "".join(pieces) == text.lstrip()
    assert "\ufffd" not in "".join(pieces)


def test_an_answer_streams_what_it_returns(tiny, page):
    session, pieces = SparseVILA(*tiny), []
    session.see(page)
    answer = session.ask("how much is the coffee?", on_text=pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) > 2


# --- the command line -----------------------------------------------------------------------------


def test_without_arguments_it_shows_dense_and_sparse():
    result = run()
    assert result.returncode == 0 and result.stderr == ""
    for words in (*ask.SAMPLE_QUESTIONS, "dense", "sparse", "KV bytes read per token"):
        assert words in result.stdout
    kept = next(line for line in result.stdout.split("\n") if "kept" in line).split()
    assert kept[-2:] == ["400", "100"]


def test_json_is_one_object_and_nothing_else():
    questions = ["how much is the coffee?", "what is on line 5?"]
    asked = [word for question in questions for word in ("--ask", question)]
    result = run("--image", SAMPLES / "receipt.png", *asked, "--seed", "3", "--json")
    content = json.loads(result.stdout)
    assert [a["question"] for a in content["answers"]] == questions
    for answer in content["answers"]:
        assert answer["answer"] and all(type(i) is int for i in answer["token_ids"])
    assert content["settings"]["prefill_sparsity"] == 0.75 and content["settings"]["seed"] == 3
    assert content["visual_tokens"] == {"encoded": 400, "kept": 100, "attended": [20] * 6}
    stages = {"vision", "prune", "prefill", "question", "retrieve", "decode"}
    assert set(content["milliseconds"]) == stages
    assert content["kv_bytes_per_token"] > 0 and content["tokens_per_second"] > 0


def test_dense_alone():
    content = json.loads(run("--dense", "--json").stdout)
    assert content["visual_tokens"] == {"encoded": 400, "kept": 400, "attended": [400] * 6}
    settings = content["settings"]
    assert settings["prefill_sparsity"] == settings["decode_sparsity"] == 0


def test_a_clip_as_a_file_and_as_a_folder(tmp_path):
    with Image.open(SAMPLES / "clip.png") as clip:
        for n in range(clip.n_frames):
            clip.seek(n)
            clip.convert("RGB").save(tmp_path / f"{n}.png")
    question = ["--ask", "which page has the hugo?", "--json"]
    file, folder = (
        json.loads(run("--video", v, *question).stdout) for v in (SAMPLES / "clip.png", tmp_path)
    )
    assert file["answers"] == folder["answers"]
    assert file["visual_tokens"]["encoded"] == 1200
    images = [x for n in range(3) for x in ("--image", tmp_path / f"{n}.png")]
    assert json.loads(run(*images, *question).stdout)["answers"] == file["answers"]


def test_overlay_dims_pruned_patches_and_outlines_retrieved_ones(tmp_path):
    file = tmp_path / "overlay.png"
    assert run("--overlay", file, "--ask", "how much is the coffee?").returncode == 0
    with Image.open(file) as picture, Image.open(SAMPLES / "receipt.png") as page:
        assert picture.width >= 320 and picture.height > 320
        panel = picture.crop((4, 94, 324, 414))
        dimmed, whole = (ImageStat.Stat(image.convert("L")).mean[0] for image in (panel, page))
        assert dimmed < 0.7 * whole


def test_an_overlay_needs_pictures_and_answers(tiny, page):
    session = SparseVILA(*tiny)
    with pytest.raises(ValueError, match="nothing to show: 1 answers, 0 pictures"):
        overlay(session, [("what?", None)])
    session.see(page)
    with pytest.raises(ValueError, match="nothing to show: 0 answers, 1 pictures"):
        overlay(session, [])
    answer = session.ask("what\ncolor is the 7?")
    assert answer == answer and answer in [answer]
    assert overlay(session, [("what\ncolor?", answer)]).size == (8 + 2 * 328, 472)
    long = overlay(session, [("what? " * 60, answer)], [answer])  # wrapped
    assert long.width == 8 + 2 * 328 and long.height > 500
    session.see([page] * 3)
    answers = [("what?", session.ask("what?"))] * 2
    clip = overlay(session, answers)  # three panels of three pages each, one below the other
    assert clip.width == 3 * 328 + 8 and clip.height > 3 * 328


def test_an_overlay_too_large_for_its_format_is_one_error():
    for name in ("a.gif", "a.jpg", "a.sgi"):
        with pytest.raises(ValueError, match=f"{name}: a 70000 x 9 picture cannot be written so"):
            ask.encode_picture(Image.new("RGB", (70000, 9)), name)


@pytest.mark.parametrize("end", ["", "/quit\nhow much is the milk?\n"])
def test_chat_streams_answers_and_survives_bad_questions(end):
    asked = ["how much is the coffee?", "", "/help", "what is on line 5?", "why?", "no " * 9000]
    result = run("--chat", stdin="\n".join(asked) + "\n" + end)
    assert result.returncode == 0 and result.stderr.startswith("note: ")  # for "why?"
    greeting, *answers, summary = (line.strip() for line in result.stdout.split(">"))
    assert "decode_sparsity 0.8" in greeting and "400 visual tokens, 100 kept" in greeting
    first, empty, command, last, why, long = answers
    assert (first, empty, last) == ("8.75", "", "honey 6.95") and why
    assert "but /quit is a question" in command and "error: the model has 8192" in long
    assert summary == "3 answers; the last read 20 visual tokens"
    assert "answers" not in run("--chat", stdin=end.split("\n")[0]).stdout


def test_what_may_not_be_as_expected_is_noted():
    several = run("--image", SAMPLES / "clip.png", "--sparse", "--ask", "which page has the hugo?")
    assert several.returncode == 0 and "only the first frame of" in several.stderr
    plain = run("--image", SAMPLES / "receipt.png", "--ask", "what costs 3.10?", "why?")
    assert plain.stderr.count("note: ") == 1 and plain.stdout.count("\n  sparse ") == 2


def test_the_authors_sampling_is_told_and_not_applied(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    for drawn, told in ((True, "temperature 0.6, top_k 20"), (False, "repetition_penalty 1.05")):
        sampling = {"do_sample": drawn, "temperature": 0.6, "top_k": 20, "top_p": 1.0}
        sampling |= {} if drawn else {"repetition_penalty": 1.05}
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | sampling))
        asked = ["--model", folder, "--ask", "what costs 3.10?", "--sparse"]
        result = run(*asked)
        assert f"sample with {told};" in result.stderr and "bread" in result.stdout
        assert "sample with" not in run(*asked, "--temperature", "0.01").stderr


def test_times_are_medians_and_printed_only_when_asked_for():
    for options, shown in (([], False), (["--time"], True)):
        result = run("--ask", "how much is the milk?", "--max-new-tokens", 2, *options)
        assert ("decode, ms per question" in result.stdout) == shown
    runs = iter(
        [{"milliseconds": {"vision": t}, "tokens_per_second": 100 - t} for t in (99, 5, 1, 4, 2, 3)]
    )
    with patch("tools.ask.times_of", lambda *_: next(runs)), patch("tools.ask.see_all"):
        with patch("tools.ask.ask_all", lambda *_, **__: {"sparse": []}):
            (medians,) = ask.timed({"sparse": None}, [], [], {}).values()
    assert medians == {"milliseconds": {"vision": 3}, "tokens_per_second": 97}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", ROOT / "README.md"], "is not a picture"),
        (["--image", "missing.png"], "no picture missing.png"),
        (["--video", "missing.gif"], "no picture missing.gif"),
        (
            ["--video", "holiday.MP4"],
            "'mkdir frames; ffmpeg -i holiday.MP4 -vf fps=1 frames/%05d.png'",
        ),
        (["--prefill-sparsity", "1"], "prefill_sparsity must be in [0, 1), got 1.0"),
        (["--decode-sparsity", "nan"], "decode_sparsity must be in [0, 1), got nan"),
        (["--prefill-sparsity", "x"], "invalid float value: 'x'"),
        (["--max-new-tokens", "0"], "max_new_tokens must be an integer of at least 1, got 0"),
        (["--max-new-tokens", "9999"], "the model has 8192 positions"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--ask", " "], "question must be a text that is not empty"),
        (["--model", "missing/folder/here"], "no folder missing/folder/here"),
        (["--device", "toaster"], "toaster"),
        (["--chat", "--json"], "--json and --overlay need --ask"),
        (["--image", "a.png", "--video", "b"], "not allowed with argument"),
        (["--overlay", "/no/such/folder/x.png"], "no folder to write /no/such/folder/x.png to"),
        (
            ["--overlay", "x.unknown"],
            "--overlay must end like a picture that can be written, in .png",
        ),
        (["--overlay", ""], "a path must not be empty"),
        (["--image", ""], "a path must not be empty"),
        (["--dense", "--sparse"], "not allowed with argument"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--device", ""], "device '' cannot be used"),
        (["--video", ""], "a path must not be empty"),
        (["--fps", "3"], "--fps needs --video, got 3.0"),
        (["--image", "holiday.avi"], "ffmpeg -i holiday.avi"),
        (["--image", SAMPLES / "receipt.png"], "pictures of your own need a question"),
        (
            ["--video", SAMPLES / "clip.png", "--fps", "nan"],
            "fps must be a number from 1e-6 to 2e9 or None, got nan",
        ),
        (["--prompt-template", "{question}"], "a prompt template must hold {image}, {question}, {"),
        # Each of these is noticed before the model is loaded:
        (["--ask", "what?", "--ask", " ", "--model", "nowhere"], "question must be a text"),
        (["--top-p", "0", "--model", "nowhere"], "top_p must be in (0, 1], got 0.0"),
        (["--decode-sparsity", "1", "--model", "nowhere"], "decode_sparsity must be in [0, 1)"),
        (["--image", "missing.png", "--model", "nowhere"], "no picture missing.png"),
        (["--chat", "--max-new-tokens", "0"], "max_new_tokens must be an integer of at least 1"),
        (["--ask", "two\nlines", "--model", "no\nsuch"], "no folder no such"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    line = result.stderr.strip().split("\n")[-1]
    assert "error: " in line and message in line
    assert "Traceback" not in result.stderr


def test_a_failed_overlay_leaves_the_old_file(tmp_path):
    for name in ("old.psd", "old.xbm"):  # formats that Pillow reads only, or not from RGB
        (tmp_path / name).write_text("old")
        assert run("--overlay", tmp_path / name).returncode == 2
        assert (tmp_path / name).read_text() == "old"


def test_a_clip_too_long_for_dense_can_be_asked_sparsely(tmp_path):
    images = ["--image", SAMPLES / "receipt.png"] * 25
    question = ["--ask", "which page has the hugo?", "--max-new-tokens", 2]
    assert "show fewer or prune more" in run(*images, *question).stderr
    result = run(*images, "--sparse", *question)
    assert result.returncode == 0 and "dense" not in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    "shell, status, words",
    [
        ("{} | true", 141, ""),
        ("{} > /dev/full", 2, "No space left on device"),
        ("{} >&-", 2, "standard output must be open"),
        ("{} --chat <&-", 2, "standard input must be open"),
        ("echo what? | {} --chat > /dev/full", 2, "No space left on device"),
    ],
)
def test_closed_and_full_outputs(shell, status, words):
    command = shell.format(f"{sys.executable} {ROOT / 'sparsevila.py'} --max-new-tokens 2")
    command = command if status == 2 else "(" + command.replace(" | ", "; echo $? >&2) | ")
    users = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=120, env=users
    )
    assert str(status) in (str(result.returncode), result.stderr.strip())
    assert words in result.stderr and len(result.stderr.strip().split("\n")) == 1


def test_an_empty_folder_of_frames_is_refused(tmp_path):
    result = run("--video", tmp_path)
    assert result.returncode == 2 and "holds no frames" in result.stderr


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "plain": nullcontext,
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another device": lambda: torch.device("meta"),  # as set_default_device sets it
}


@pytest.mark.parametrize("kind", [SparseVILA, Dense])
def test_the_callers_mode_changes_nothing(tiny, kind):
    """`see` and two questions, each call in one of torch's modes, give the tokens of the plain
    session. The cache grows in every call."""

    def answers(*modes):
        session, tokens = kind(*tiny), []
        with modes[0]():
            session.see(SAMPLES / "receipt.png")
        for question, mode in zip(("how much is the coffee?", "what is on line 5?"), modes[1:]):
            with mode():
                tokens.append(session.ask(question, max_new_tokens=8).token_ids)
        return tokens

    with patch("sparsevila.SPARE_ROWS", 1):
        expected = answers(nullcontext, nullcontext, nullcontext)
        everywhere = ([name] * 3 for name in MODES)
        for names in [*itertools.product(["plain", "inference"], repeat=3), *everywhere]:
            assert answers(*(MODES[name] for name in names)) == expected, names


def test_too_little_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, command("ask"):
        bytearray(2**62)
    assert stop.value.code == 2 and capsys.readouterr().err == "ask: error: MemoryError\n"


def test_frames_are_in_the_order_a_person_counts(tmp_path):
    """Names as they come from ffmpeg, cameras and people, in the order that they were taken in."""
    for names in (
        [f"{n}.png" for n in range(1, 13)],
        [f"frame{n}.png" for n in (0, 9, 10, 99, 100)],
        ["a9b10.png", "a10b2.png", "a10b11.png", "b.png", "b1.png"],
        ["01.png", "1.png", "002.png"],  # the same number: by name
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for shade, name in reversed(list(enumerate(names))):
            Image.new("RGB", (2, 2), (shade, 0, 0)).save(folder / name)
        (folder / ".DS_Store").write_bytes(b"")
        clip = ask.read_clip(folder, None)
        assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == list(range(len(names)))
        assert clip.rate == 1
        pictures, _, _ = quantise.calibration_set(folder, None, 3)
        assert [picture.getpixel((0, 0))[0] for picture in pictures] == [0, 1, 2]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_that_cannot_show_a_character_loses_nothing_else(tmp_path, encoding):
    """The answer to a Chinese question is printed, the picture is written; a chat goes on."""
    picture = tmp_path / "overlay.png"
    for options, words in (
        (["--ask", "什么 7?", "--overlay", picture], ["?? 7?", "dense", "weights:"]),
        (["--chat"], ["> ", "\n"]),
    ):
        typed, printed = b"" if "--ask" in options else "什么 7?\n".encode(), io.BytesIO()
        streams = [io.TextIOWrapper(x, encoding, "strict") for x in (io.BytesIO(typed), printed)]
        with patch("sys.stdin", streams[0]), redirect_stdout(streams[1]):
            ask.main(list(map(str, options)))
        assert all(word in printed.getvalue().decode(encoding) for word in words)
    assert picture.exists()
