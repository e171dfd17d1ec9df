"""`python -m bench speed`: dense and sparse sessions on one random model, stage by stage.

Speed-ups are ratios of medians over runs in turn. The bound of a decoding step is the time to read
its weights and its rows of the KV cache, at the bandwidth that is measured after every round.
"""

import argparse
import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sparsevila
from checkpoints.weights import progress, usable_device
from model import VLM, Stopwatch
from sparsevila import Dense, RetrievalCache, SparseVILA, check_sparsity

from . import (
    add_report_arguments,
    check_figure,
    machine,
    median_and_range,
    positive,
    pyplot,
    report,
)
from .load import peak_resident
from .random_models import (
    PRESETS,
    QUESTION_TOKENS,
    TEXT_TOKENS,
    NoiseProcessor,
    check_memory,
    random_model,
)
from .versus import Transformers

# What is measured in a run, in the order of the data; milliseconds.
STAGES = ("vision", "salience", "prune", "prefill", "question", "scoring", "packing", "decode")


SPEEDUPS = {  # of which stages together
    "prefill": ("salience", "prune", "prefill"),
    "decode": ("scoring", "packing", "decode"),
    "first_token": ("first token",),
    "end_to_end": ("end to end",),
}
BEFORE_DECODING = {  # the tower's work is the same, dense and sparse
    "first_question": ("salience", "prune", "prefill", "question", "scoring", "packing"),
    "later_questions": ("question", "scoring", "packing"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="laptop",
        metavar="NAME",
        help=f"shape: {', '.join(PRESETS)} (default: laptop)",
    )
    parser.add_argument(
        "--visual-tokens",
        type=positive,
        metavar="N",
        help="rounded to whole pictures (default: the preset's)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="of each answer (default: 128)",
    )
    parser.add_argument(
        "--prefill-sparsity",
        type=float,
        default=0.75,
        metavar="S",
        help="share of the visual tokens to prune, in [0, 1) (default: 0.75)",
    )
    parser.add_argument(
        "--decode-sparsity",
        type=float,
        default=0.9,
        metavar="S",
        help="share of the kept ones that decoding leaves out, in [0, 1) (default: 0.9)",
    )
    parser.add_argument(
        "--quantised", action="store_true", help="measure a four-bit decoder and an int8 tower"
    )
    parser.add_argument(
        "--eager", action="store_true", help="decode without torch.compile on a CPU"
    )
    parser.add_argument("--runs", type=positive, default=5, help="of each, in turn (default: 5)")
    parser.add_argument(
        "--device", help="where to measure (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"],
        help="of the model (default: float32 on a CPU, float16 on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--versus",
        choices=["transformers", "unquantised"],
        help="measure in turn Hugging Face's dense decoder as well, or, with --quantised, the same "
        "shape without (default: neither)",
    )
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    check_figure(arguments.figure)
    report(speed(arguments), print_speed, draw_speed, arguments)


# --- a run ----------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> dict:
    """Dense and sparse in turn on one random model: the figures of `python -m bench speed`. Raises:
    ValueError for options that mean nothing, or a model that does not fit."""
    # 1. Check the options, and that it fits.
    config, pictures, tokens_each = PRESETS[arguments.preset]
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    sparsity = ("prefill_sparsity", "decode_sparsity")
    settings = {name: getattr(arguments, name) for name in sparsity}
    n = tokens_each or config.vision.visual_tokens
    quantised = [arguments.quantised] + [False] * (arguments.versus == "unquantised")
    pictures = max(1, round((arguments.visual_tokens or pictures * n) / n))
    check_speed(arguments, settings, device, TEXT_TOKENS + pictures * n)
    device = usable_device(device)
    if device.type == "cpu":
        check_memory(config, dtype, pictures, n, quantised)

    # 2. Make the models, and what makes a session with each of them.
    script = NoiseProcessor(config, pictures)
    models = [
        random_model(replace(config, stop_ids=()), device, dtype, quantised=small)
        for small in quantised
    ]
    model, graph = models[0], device.type == "cuda"
    for each in models:
        decoding = "CUDA graph" if graph else compile_decoding(each, arguments.eager)

    def new_session(kind: type[SparseVILA], model: VLM) -> SparseVILA:
        session = kind(model, script, **settings)
        return leave_out_tower(session, pictures, n) if tokens_each else session

    theirs = None
    if arguments.versus == "transformers":
        features, _ = new_session(Dense, model).encode(script.pixels([]))
        theirs = Transformers(model, script, features)
    sessions = {
        name + which: partial(new_session, kind, each)
        for which, each in zip(("", ", unquantised"), models)
        for name, kind in (("dense", Dense), ("sparse", SparseVILA))
    }

    # 3. Run them in turn, and say what follows.
    rounds, bandwidths, eager = run_rounds(sessions, arguments, pictures, theirs)
    result = {
        "machine": machine(device), "preset": arguments.preset, "precision": model.precision,
        "decoding": decoding, "visual_tokens": pictures * n, "question_tokens": QUESTION_TOKENS,
        "answer_tokens": arguments.answer_tokens, "runs": arguments.runs, "tower": not tokens_each,
        **settings,
    }  # fmt: skip
    weights = decoder_bytes(model)
    result |= summarise(rounds[1:], arguments.answer_tokens, weights, bandwidths[1:])
    if eager:
        add_compiling(result, rounds[0], eager)
    for plain in models[1:]:
        result["unquantised"] = beside(rounds[1:], plain)
    return result | ({"transformers": theirs.summary(result["dense"])} if theirs else {})


def check_speed(
    arguments: argparse.Namespace, settings: dict, device: torch.device, context: int
) -> None:
    """Raise ValueError or ImportError, before anything is made, for options that mean nothing."""
    for name, sparsity in settings.items():
        check_sparsity(name, sparsity)
    if arguments.answer_tokens < 2:
        raise ValueError("--answer-tokens must be at least 2, for there to be a decoding step")
    rows = context + QUESTION_TOKENS + arguments.answer_tokens
    most = PRESETS[arguments.preset].config.text.max_positions
    if rows > most:
        raise ValueError(f"context, question and answer are {rows:,} tokens, at most {most:,} fit")
    if arguments.eager and device.type == "cuda":
        raise ValueError("--eager is for a CPU: a GPU decodes by a CUDA graph")
    if arguments.versus == "unquantised" and not arguments.quantised:
        raise ValueError("--versus unquantised needs --quantised, to compare with")
    if arguments.versus == "transformers":
        if arguments.quantised:
            raise ValueError("transformers' decoder is not quantised: leave out --quantised")
        importlib.import_module(arguments.versus)


def compile_decoding(model: VLM, eager: bool) -> str:
    """Compile the decoding of the model unless `eager`, or in vain; how it decodes."""
    if eager:
        return "eager"
    try:
        model.compile_decoding()
    except RuntimeError as error:
        return f"eager ({error})"
    return "torch.compile"


def run_rounds(
    sessions: dict[str, Callable[[], SparseVILA]],
    arguments: argparse.Namespace,
    pictures: int,
    theirs: Transformers | None,
) -> tuple[list[dict[str, dict]], list[float], dict[str, float]]:
    """Of every round, the first of which warms up, a run by a new session of each name, and the
    bandwidth after it in bytes per millisecond; of "dense" and "sparse", where they decode by
    torch.compile, milliseconds of a step that is not compiled."""
    rounds: list[dict[str, dict]] = []
    bandwidths, eager = [], {}
    for number in progress(range(arguments.runs + 1), "measuring", " rounds"):
        tokens = arguments.answer_tokens if number else 9
        runs, made = {}, {}
        for name in list(sessions)[:: -1 if number % 2 else 1]:  # neither is always first
            session = sessions[name]()
            runs[name], made[name] = run_once(session, pictures, tokens)
            if number == arguments.runs and name in ("dense", "sparse") and session.model.compiled:
                eager[name] = eager_step(session)
        rounds.append(runs)
        bandwidths.append(read_bandwidth(session.model.device))
        if theirs:
            theirs.run(made["dense"])
    return rounds, bandwidths, eager


def leave_out_tower(session: SparseVILA, pictures: int, n: int) -> SparseVILA:
    """Let the session's `encode` give noise for n visual tokens a picture, in no time."""
    model = session.model
    width = model.config.vision.merge**2 * model.config.vision.width
    new = {"device": model.device, "generator": torch.Generator(model.device).manual_seed(2)}
    features = torch.randn(pictures, n, width, dtype=model.dtype, **new)
    salience = torch.rand(pictures, n, **new)
    session.encode = lambda pixels: (list(features), list(salience))
    return session


def run_once(session: SparseVILA, pictures: int, tokens: int) -> tuple[dict[str, float], list[int]]:
    """One clip, one question and its answer: milliseconds by stage, bytes of keys and values, peak
    of memory in bytes; and the tokens of the answer."""
    device, blank = session.model.device, Image.new("RGB", (1, 1))
    reset_peak(device)
    with (
        timed(sparsevila, "patch_salience", device) as salience,
        timed(RetrievalCache, "score", device) as scoring,
    ):
        session.see([blank] * pictures)
        answer = session.ask("?", max_new_tokens=tokens)
    laps, cache = session.stats["milliseconds"] | answer.timings, session.cache
    laps["vision"] -= sum(salience)
    laps["question"] -= sum(scoring)
    laps |= {"salience": sum(salience), "scoring": sum(scoring), "packing": laps["retrieve"]}
    run = {stage: laps[stage] for stage in STAGES}
    run["end to end"] = sum(run.values())
    run["first token"] = run["end to end"] - run["decode"]
    buffers = [*cache.k, *cache.v]
    row = sum(buffer[:, :, 0].nbytes for buffer in buffers)
    run["bytes attended"] = answer.kv_bytes_per_token + row * tokens / 2  # each row is read too
    if isinstance(cache, RetrievalCache):
        buffers += [*cache.packed.k, *cache.packed.v]
    run["bytes held"] = sum(buffer.nbytes for buffer in buffers)
    return run | {"peak bytes": peak(device)}, answer.token_ids


def eager_step(session: SparseVILA) -> float:
    """Milliseconds of a decoding step that is not compiled: the session answers once more."""
    model = session.model
    compiled, model.compiled = model.compiled, None
    milliseconds = session.ask("?", max_new_tokens=9).timings["decode"]
    model.compiled = compiled
    return milliseconds / 8


@contextmanager
def timed(owner: Any, name: str, device: torch.device) -> Iterator[list[float]]:
    """While open, every call of owner.name adds its milliseconds to a list."""
    function, times = getattr(owner, name), []

    def measured(*arguments, **options):
        watch = Stopwatch(device)
        result = function(*arguments, **options)
        watch.lap("call")
        times.append(watch.milliseconds["call"])
        return result

    setattr(owner, name, measured)
    try:
        yield times
    finally:
        setattr(owner, name, function)


def reset_peak(device: torch.device) -> None:
    """Begin to watch the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):  # Linux
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident


def peak(device: torch.device) -> int:
    """Bytes that were in use at most: allocated on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def read_bandwidth(device: torch.device) -> float:
    """Bytes per millisecond at which a large tensor is read and added up: the best of a few."""
    big = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    watch, times = Stopwatch(device), []
    for _ in range(6):
        big.sum()
        watch.lap("sum")
        times.append(watch.milliseconds["sum"])
    return big.nbytes / min(times)


def decoder_bytes(model: VLM) -> int:
    """Bytes of all weights that a decoding step reads: blocks, last norm and output head."""
    parts = (model.decoder.layers, model.decoder.norm, model.lm_head)
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    return sum(t.nbytes for t in tensors)


# --- what follows from the runs -------------------------------------------------------------------


def summarise(
    rounds: list[dict[str, dict]], tokens: int, weights: int, bandwidths: list[float]
) -> dict:
    """Medians with the least and the most, and what follows from the medians; of ratios and of the
    bound's share also the least and the most of a round. rounds: a dense and a sparse run each;
    weights: bytes; bandwidths: bytes per millisecond, after each round."""
    spread = {
        name: {
            key: median_and_range([runs[name][key] for runs in rounds]) for key in rounds[0][name]
        }
        for name in ("dense", "sparse")
    }
    dense, sparse = ({key: value[0] for key, value in each.items()} for each in spread.values())
    bandwidth, least, most = median_and_range(bandwidths)

    def bound(run: dict, rate: float) -> float:
        return (weights + run["bytes attended"]) / rate

    def reached(run: dict, rate: float) -> float:
        return bound(run, rate) / (run["decode"] / (tokens - 1))

    for name, one in (("dense", dense), ("sparse", sparse)):
        one["decode a token"] = one["decode"] / (tokens - 1)
        one["bound"], one["reached"] = bound(one, bandwidth), reached(one, bandwidth)
        shares = [reached(runs[name], rate) for runs, rate in zip(rounds, bandwidths)]
        one["reached_range"] = [min(shares), max(shares)]
    saved = dense["decode a token"] - sparse["decode a token"]
    result = {
        "read_bandwidth_gb_per_s": bandwidth / 1e6,
        "read_bandwidth_range_gb_per_s": [least / 1e6, most / 1e6],
        "decoder_weight_bytes": weights, "milliseconds_and_bytes": spread, "dense": dense,
        "sparse": sparse,
    }  # fmt: skip
    # A step's own speed-up, without scoring and packing, and what the bytes it reads allow.
    result["step_speedup"] = dense["decode a token"] / sparse["decode a token"]
    result["step_speedup_by_bytes"] = dense["bound"] / sparse["bound"]
    for name, stages in SPEEDUPS.items():
        result[f"{name}_speedup"] = _ratio(dense, sparse, stages)
        ratios = [_ratio(runs["dense"], runs["sparse"], stages) for runs in rounds]
        result[f"{name}_speedup_range"] = [min(ratios), max(ratios)]
    for which, stages in BEFORE_DECODING.items():
        cost = sum(sparse[stage] - dense[stage] for stage in stages)
        start, stop = break_even(cost, saved)
        result[f"break_even_tokens_{which}"], result[f"pays_up_to_tokens_{which}"] = start, stop
    return result


def add_compiling(result: dict, first: dict[str, dict], eager: dict[str, float]) -> None:
    """Add what torch.compile took when the `first` round decoded, and the length of an answer from
    which on that pays. eager: milliseconds of a step that is not compiled."""
    result["compile_seconds"] = sum(first[name]["decode"] for name in eager) / 1000
    for name, milliseconds in eager.items():
        saved = milliseconds - result[name]["decode a token"]
        start, _ = break_even(1000 * result["compile_seconds"], saved)
        result[name] |= {"eager a token": milliseconds, "compiling_pays_from_tokens": start}


def beside(rounds: list[dict[str, dict]], plain: VLM) -> dict:
    """How many times as long as the quantised model the plain one takes: for dense and sparse and
    every part of a turn the median over rounds, the least and the most."""
    result = {"precision": plain.precision, "decoder_weight_bytes": decoder_bytes(plain)}
    for name in ("dense", "sparse"):
        result[name] = {
            part: median_and_range(
                [runs[f"{name}, unquantised"][part] / runs[name][part] for runs in rounds]
            )
            for part in ("vision", "prefill", "question", "decode", "end to end")
        }
    return result


def break_even(cost: float, saved: float) -> tuple[float | None, float | None]:
    """Lengths of an answer, in tokens, from which on and up to which sparsity saves time, if it
    costs this much before decoding and saves that much in every step (either may be negative); the
    first token takes no step. (None, None): at no length; (x, None): from x on."""
    if cost > 0:
        return 1 + cost / saved if saved > 0 else None, None
    return 1.0, 1 + cost / saved if saved < 0 else None


def _ratio(dense: dict, sparse: dict, stages: tuple[str, ...]) -> float:
    return sum(dense[stage] for stage in stages) / sum(sparse[stage] for stage in stages)


def print_speed(result: dict) -> None:
    """A table of the stages, and what follows from it."""
    print(result["machine"])
    print(
        f"{result['preset']}, {result['precision']}, {result['visual_tokens']:,} visual tokens, "
        f"question of {result['question_tokens']}, answer of {result['answer_tokens']}; sparsity "
        f"{result['prefill_sparsity']:.0%} / {result['decode_sparsity']:.0%}; decoding: "
        f"{result['decoding']}; medians of {result['runs']} runs in turn (least to most)\n"
    )
    if not result["tower"]:
        print("without a vision tower: this model's is not one of ours\n")
    _print_stages(result)
    _print_ratios(result)
    if "unquantised" in result:
        other = result["unquantised"]
        megabytes = other["decoder_weight_bytes"] / 1e6
        print(f"{other['precision']} ({megabytes:.0f} MB of decoder weights) takes, in turn,")
        for name in ("dense", "sparse"):
            for part, times in other[name].items():
                print("  {}, {}: {:.2f} x ({:.2f} to {:.2f}) as long".format(name, part, *times))
    if "transformers" in result:
        theirs = result["transformers"]
        print(
            f"transformers {theirs['version']}, dense decoder: first token "
            f"{theirs['first_token_ms']:,.1f} ms, {theirs['first_token_ratio']:.2f} x ours, then "
            f"{theirs['decode_ms_a_token']:.2f} ms a token, {theirs['decode_ratio']:.2f} x ours; "
            f"same tokens: {theirs['same_tokens']}"
            + (" (theirs without a CUDA graph)" if result["decoding"] == "CUDA graph" else "")
        )


def _print_stages(result: dict) -> None:
    dense, sparse = result["dense"], result["sparse"]

    def cell(name: str, key: str) -> str:
        middle, least, most = result["milliseconds_and_bytes"][name][key]
        return f"{middle:,.1f} ({least:,.1f} to {most:,.1f})"

    def line(label: str, dense: str, sparse: str) -> None:
        print(f"{label:36}{dense:>32}{sparse:>32}")

    line("", "dense", "sparse")
    for stage in (*STAGES, "first token", "end to end"):
        line(f"{stage}, ms", *(cell(name, stage) for name in ("dense", "sparse")))
    for label, key in (
        ("KV read a token, MB", "bytes attended"), ("KV held, MB", "bytes held"),
        ("peak memory, MB" + ", both models" * ("unquantised" in result), "peak bytes"),
    ):  # fmt: skip
        line(label, *(f"{one[key] / 1e6:,.1f}" for one in (dense, sparse)))
    for label, key in (("decode, ms a token", "decode a token"), ("  its bound, ms", "bound")):
        line(label, *(f"{one[key]:.2f}" for one in (dense, sparse)))
    shares = ((one["reached"], *one["reached_range"]) for one in (dense, sparse))
    line("  bound reached", *("{:.0%} ({:.0%} to {:.0%})".format(*share) for share in shares))


def _print_ratios(result: dict) -> None:
    least, most = result["read_bandwidth_range_gb_per_s"]
    print(
        f"\nbound: decoder weights ({result['decoder_weight_bytes'] / 1e6:.0f} MB) and KV read, at "
        f"{result['read_bandwidth_gb_per_s']:.1f} GB/s, measured after every round "
        f"({least:.1f} to {most:.1f})"
    )
    if "compile_seconds" in result:
        pays = []
        for name in ("dense", "sparse"):
            start, ms = (result[name][k] for k in ("compiling_pays_from_tokens", "eager a token"))
            length = f"from {math.ceil(start):,} tokens on" if start else "at no length"
            pays.append(f"{name} {length} ({ms:.2f} ms a token without)")
        print(
            f"compiling, once, in none of the stages: {result['compile_seconds']:.1f} s; it pays "
            + ", ".join(pays)
        )

    def times(name: str) -> str:
        least, most = result[f"{name}_speedup_range"]
        return f"{result[f'{name}_speedup']:.2f} x ({least:.2f} to {most:.2f})"

    print(
        f"prefill {times('prefill')}, with salience and prune; decode {times('decode')}, with "
        f"scoring and packing; first token {times('first_token')}; end to end "
        f"{times('end_to_end')}"
    )
    step, allowed = result["step_speedup"], result["step_speedup_by_bytes"]
    print(
        f"a decoding step alone {step:.2f} x, {step / allowed:.0%} of the {allowed:.2f} x that its "
        "bytes allow"
    )
    for which in BEFORE_DECODING:
        start, stop = result[f"break_even_tokens_{which}"], result[f"pays_up_to_tokens_{which}"]
        if start is None:
            text = "at no length"
        elif stop is not None:
            text = f"up to {math.floor(stop)} tokens"
        else:
            text = f"from {math.ceil(start)} tokens on" if start > 1 else "at any length"
        print(f"break-even length of an answer, {which.replace('_', ' ')}: sparsity pays {text}")


BARS = {  # stages drawn as one, and their colours, from dark to light in grey as well
    "vision": (("vision",), "#440154"),
    "prefill": (SPEEDUPS["prefill"], "#3b528b"),
    "question": (("question",), "#21918c"),
    "retrieve": (("scoring", "packing"), "#5ec962"),
    "decode": (("decode",), "#fde725"),
}


def draw_speed(result: dict, file: str) -> None:
    """Seconds by stage, dense above sparse: names in the bars that are wide enough, all numbers
    below them."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(10, 3))
    whole = max(sum(result[name][s] for s in STAGES) for name in ("dense", "sparse")) / 1000
    for row, name in enumerate(("dense", "sparse")):
        left, words = 0.0, []
        for bar, (stages, colour) in BARS.items():
            width = sum(result[name][stage] for stage in stages) / 1000
            axes.barh(row, width, left=left, height=0.5, color=colour, edgecolor="black")
            if width > 0.01 * len(bar) * whole:
                text = "white" if bar in ("vision", "prefill", "question") else "black"
                axes.text(left + width / 2, row, bar, color=text, ha="center", va="center", size=11)
            words.append(f"{bar} {width:.2f}")
            left += width
        axes.text(left, row, f" {left:.1f} s", va="center")
        axes.text(0, row + 0.4, ", ".join(words), fontsize=11, va="center")
    axes.set_yticks([0, 1], ["dense", "sparse"])
    axes.set_ylim(1.6, -0.4)
    axes.set_xlim(0, 1.12 * whole)
    axes.set_xlabel(f"seconds, {result['visual_tokens']:,} visual tokens")
    figure.savefig(file, dpi=110, bbox_inches="tight")
