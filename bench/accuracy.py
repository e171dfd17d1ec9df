"""`python -m bench accuracy`: SparseVILA, other methods and variants on unseen scenes.

Every picture is asked for a colour, a digit, a place and a count, in random order in one session;
every clip which frame shows a digit. Answers are generated freely, token by token, and must be
right to the last character. For colour, digit and place together, the *first* word (computed
densely, straight after the question) and the *later* ones (decoded from what was retrieved) are
also counted separately, and so are the first and the later questions of a session.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import re
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import baselines
from checkpoints import load
from sparsevila import Answer, Dense, SparseVILA
from tiny.scenes import make_scene, question_and_answer, render, to_images

from . import (
    TINY,
    add_report_arguments,
    check_figure,
    machine,
    positive,
    pyplot,
    report,
    show_progress,
)

LOOKUPS = ("color", "digit", "place")


class Method(NamedTuple):
    """A session and its settings."""

    kind: type[SparseVILA]
    prefill_sparsity: float = 0.75
    decode_sparsity: float = 0.9
    options: dict = {}

    def session(self, model_path: str, seed: int = 0) -> SparseVILA:
        """A session with a checkpoint, each turn evicted unless told otherwise, on one thread of a
        process of its own."""
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        return self.kind(
            *load(model_path, device="cpu"),
            prefill_sparsity=self.prefill_sparsity,
            decode_sparsity=self.decode_sparsity,
            **{"protocol": "evaluation"} | self.options,
        )


# --- the methods ----------------------------------------------------------------------------------


# Of 100 visual tokens SparseVILA keeps 25 and attends to 3 while it decodes. Methods that only
# prune appear with either budget: 25 tokens, and 3 for the same cost of decoding. FastV and
# SparseVLM cannot go below half of the tokens in four layers: 62 are for comparison with them.
VARIANTS = {
    "global scope": Method(SparseVILA, options={"scope": "global"}),
    "original positions": Method(SparseVILA, options={"positions": "original"}),
    "mean-attention salience": Method(baselines.MeanSalience),
    "random salience": Method(baselines.RandomSalience),
    "random relevance": Method(baselines.RandomRetrieval),
    "one index set for all layers": Method(baselines.OneIndexSet),
    "relevance over visual keys only": Method(baselines.VisualSoftmax),
    "retrieved anew every 8 tokens": Method(baselines.Reselect),
    "retrieved anew every 2 tokens": Method(baselines.ReselectEveryTwo),
}


PRUNERS = {
    "pruning only": SparseVILA,
    "random": baselines.RandomPruning,
    "uniform": baselines.Uniform,
    "pool": baselines.Pool,
    "downsample": baselines.Downsample,
    "VisionZip": baselines.VisionZip,
    "VisionZip, last layer": baselines.VisionZipLastLayer,
    "PruMerge": baselines.PruMerge,
    "FastV": baselines.FastV,
    "SparseVLM": baselines.SparseVLM,
    "first-turn oracle": baselines.FirstTurnOracle,
}
METHODS = {
    "dense": Method(Dense, 0, 0),
    "SparseVILA": Method(SparseVILA),
    "blind": Method(baselines.Blind, 0, 0),
    **{
        f"{name}, {keep}": Method(kind, sparsity, 0)
        for name, kind in PRUNERS.items()
        for keep, sparsity in ((25, 0.75), (3, 0.975))
    },
    **{
        f"{name}, 62": Method(PRUNERS[name], 0.38, 0)
        for name in ("pruning only", "random", "uniform")
    },
    **{f"retrieval only, {n}": Method(SparseVILA, 0, 1 - n / 100) for n in (62, 3)},
    **{f"SparseVILA, {name}": method for name, method in VARIANTS.items()},
}
# What it costs (see `measure`), then per cent right.
COSTS = ("entering", "attended", "KV kB", "CPU ms")
COLUMNS = (
    *COSTS, "color", "digit", "place", "first word", "later words", "first turn", "later turns",
    "later turns, conversation", "count", "frame",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="ROW"
    )
    parser.add_argument("--questions", type=positive, default=500, help="of each kind, in all")
    parser.add_argument("--seeds", type=positive, default=5)
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    check_figure(arguments.figure)
    if arguments.seeds < 2 or arguments.questions < arguments.seeds:
        raise ValueError("--seeds must be at least 2, and --questions at least as many")
    result = accuracy(arguments.methods, arguments.questions, arguments.seeds)
    report(result, print_accuracy, draw_accuracy, arguments)


# --- measuring ------------------------------------------------------------------------------------


def accuracy(names: list[str], questions: int, seeds: int) -> dict:
    """Every method on the same unseen scenes, in both protocols: for every column, and again as
    "..., conversation", the mean over seeds and its standard deviation. A seed has scenes and
    random choices of its own."""
    each = questions // seeds
    names = list(dict.fromkeys(names))
    jobs = [
        (name, protocol, seed)
        for name in names
        for protocol in ("evaluation", "conversation")
        for seed in range(seeds)
    ]
    arguments = []
    for name, protocol, seed in jobs:
        method = METHODS[name]._replace(options=METHODS[name].options | {"protocol": protocol})
        arguments.append((method, str(TINY), each, (1, 4), seed * each))
    results: dict[str, dict] = {name: defaultdict(list) for name in names}
    with workers() as pool:
        measured = pool.map(measure, *zip(*arguments))
        for done, ((name, protocol, _), values) in enumerate(zip(jobs, measured), 1):
            end = ", conversation" if protocol == "conversation" else ""
            for column, value in values.items():
                results[name][column + end].append(value)
            show_progress(done, len(jobs))
    summary = {
        name: {c: [statistics.mean(v), statistics.stdev(v)] for c, v in columns.items()}
        for name, columns in results.items()
    }
    where = {"machine": machine(), "questions_of_each_kind": each * seeds, "seeds": seeds}
    return where | {"methods": summary}


def measure(
    method: Method,
    model_path: str,
    questions: int,
    pictures: tuple[int, ...] = (1, 4),
    first: int = 0,
) -> dict[str, float]:
    """Percentages of right answers by question kind and part, for one method; as many scenes of
    each number of pictures, from the `first` on. And what look-ups cost, means: "entering" and
    "attended", visual tokens of a picture that a layer reads in prefill and for every generated
    token; "KV kB", kilobytes of keys and values, of text too, that all layers read for it; "CPU
    ms", milliseconds of the processor for a picture and its questions."""
    session = method.session(model_path, seed=first)
    right: dict[str, list[bool]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    for number in range(len(pictures) * questions):
        frames = pictures[number // questions]
        rng = random.Random(f"evaluate {first + number % questions + 10**6 * (frames - 1)}")
        scene = make_scene(rng, frames)
        images, began = to_images(render(scene, rng)), time.process_time()
        session.see(images)
        kinds = rng.sample(("color", "digit", "place", "count"), 4) if frames == 1 else ["frame"]
        for turn, kind in enumerate(kinds):
            question, expected = question_and_answer(kind, scene, rng)
            answer = session.ask(question, max_new_tokens=32)
            words = zip(parts(answer.text), parts(expected))
            first_word, later_words = (got == wanted for got, wanted in words)
            right[kind].append(answer.text == expected)
            if kind in LOOKUPS:
                right["first word"].append(first_word)
                right["later words"].append(later_words)
                which = "first turn" if turn == 0 else "later turns"
                right[which].append(answer.text == expected)
                costs["entering"].append(session.stats["visual_tokens"]["kept"])
                costs["attended"].append(tokens_of(session, answer))
                costs["KV kB"].append(kv_bytes(session, answer) / 1000)
        if frames == 1:
            costs["CPU ms"].append(1000 * (time.process_time() - began))
    percentages = {column: 100 * statistics.mean(values) for column, values in right.items()}
    return percentages | {column: statistics.mean(values) for column, values in costs.items()}


def parts(answer: str) -> tuple[str, str]:
    """The first word of an answer, and the rest."""
    first, *rest = re.split(r"[,:]", answer, maxsplit=1)
    return first, "".join(rest)


def tokens_of(session: SparseVILA, answer: Answer) -> float:
    """Visual tokens that a layer attends to, cluster means included; mean over layers."""
    counts = [len(chosen) for chosen in answer.retrieved]
    return (sum(counts) + clusters_of(session)) / len(counts)


def clusters_of(session: SparseVILA) -> int:
    """Rows that are means of a cluster, in all layers."""
    return sum(len(means) for means in getattr(session.cache, "clusters", []))


def kv_bytes(session: SparseVILA, answer: Answer) -> int:
    """Keys and values that all layers read for every generated token, cluster means included."""
    row = session.cache.k[0][:, :, 0].nbytes + session.cache.v[0][:, :, 0].nbytes
    return answer.kv_bytes_per_token + row * clusters_of(session)


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """Processes, one a core, that end at once when something goes wrong here, or when this process
    is asked to end."""
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=_default_signals)
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def _exit(*_: Any) -> None:
    raise SystemExit(143)


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


# --- showing --------------------------------------------------------------------------------------


def print_accuracy(result: dict) -> None:
    """A table of all methods, in Markdown."""
    print(result["machine"])
    print(
        f"{result['questions_of_each_kind']} questions of each kind, {result['seeds']} seeds: means"
        " and standard deviations over seeds\n"
    )
    print("| method | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, values in result["methods"].items():
        cells = []
        for column in COLUMNS:
            mean, deviation = values[column]
            cells.append(f"{mean:.1f}" + ("" if column in COSTS else f" ± {deviation:.1f}"))
        print(f"| {name} | " + " | ".join(cells) + " |")


OURS = ("SparseVILA", "pruning only", "retrieval only")  # drawn in black


def draw_accuracy(result: dict, file: str) -> None:
    """Right answers in later turns against visual tokens attended to, all methods; the variants
    of SparseVILA, most of which would lie on it, if nothing else was measured."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5.5))
    markers = itertools.cycle("s*xoD^v<>PXd+1p")
    variants = {f"SparseVILA, {variant}" for variant in VARIANTS}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in [name for name in result["methods"] if name not in variants]:
        groups[name.rsplit(",", 1)[0]].append(name)
    for group, names in (groups or {name: [name] for name in result["methods"]}).items():
        points = sorted(
            [result["methods"][name] for name in names], key=lambda point: point["attended"]
        )
        x = [max(point["attended"][0], 0.7) for point in points]  # blind has no place on a log axis
        y, error = zip(*(point["later turns"] for point in points))
        ours = group in OURS
        axes.errorbar(
            x, y, error, label=group, marker=next(markers), linestyle=":", capsize=3,
            color="black" if ours else "0.45", markersize=16 if group == OURS[0] else 8,
            markerfacecolor="black" if ours else "white",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.7, 3, 10, 25, 50, 100], ["0", "3", "10", "25", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens of 100 that a layer attends to for each generated token")
    axes.set_ylabel("right answers in later turns, %")
    axes.set_ylim(-3, 105)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")
