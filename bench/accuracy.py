"""`python -m bench accuracy`: SparseVILA, other methods and variants on unseen pages.

Every page is asked for a value, a name, its title, a line, and for the names of all its lines, in
random order in one session; every clip of three pages which page has a name. Answers are generated
freely, token by token, and must be right to the last character. Of value, name and title together
are also counted: the *first token* (computed densely, straight after the question), the *later
tokens* (decoded from what was retrieved), each compared with the right answer's at its place, and
the first and the later questions of a session.
"""

import argparse
import difflib
import importlib.util
import multiprocessing
import os
import random
import re
import signal
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import baselines
from checkpoints import load
from checkpoints.weights import progress
from sparsevila import Answer, Dense, SparseVILA
from tiny.scenes import make_scene, needed_patches, question_and_answer, render, to_images

from . import (
    TINY,
    add_report_arguments,
    check_figure,
    machine,
    positive,
    pyplot,
    report,
)

LOOKUPS = ("value", "name", "title")
KINDS = (*LOOKUPS, "line", "list")
CLIP = 3  # pages


class Method(NamedTuple):
    """A session, its class or "FILE:CLASS", and its settings."""

    kind: type[SparseVILA] | str
    prefill_sparsity: float = 0.75
    decode_sparsity: float = 0.8
    options: dict = {}

    def session(self, model_path: str, seed: int = 0) -> SparseVILA:
        """A session with a checkpoint, each turn evicted unless told otherwise, on one thread of a
        process of its own."""
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        kind = own_class(self.kind) if isinstance(self.kind, str) else self.kind
        return kind(
            *load(model_path, device="cpu"),
            prefill_sparsity=self.prefill_sparsity,
            decode_sparsity=self.decode_sparsity,
            **{"protocol": "evaluation"} | self.options,
        )


def own_class(name: str) -> type[SparseVILA]:
    """The session class that "FILE:CLASS" names. Raises: ValueError if there is none."""
    file, _, wanted = name.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"--method must be FILE:CLASS, got {name!r}: no file {file!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, wanted, None)
    if not (isinstance(found, type) and issubclass(found, SparseVILA)):
        raise ValueError(f"{file} must hold a SparseVILA class {wanted!r}, got {found!r}")
    return found


# --- the methods ----------------------------------------------------------------------------------


# Of 400 visual tokens SparseVILA keeps 100 and attends to 40, 20 or 10 of them while it decodes.
# Methods that only prune appear with either budget: 100 tokens, and 40 or less for the same cost of
# decoding. FastV and SparseVLM read the first layers whole: of six layers they attend to no less
# than a third.
VARIANTS = {
    "global scope": Method(SparseVILA, options={"scope": "global"}),
    "original positions": Method(SparseVILA, options={"positions": "original"}),
    "mean-attention salience": Method(baselines.MeanSalience),
    "random salience": Method(baselines.RandomSalience),
    "one index set for all layers": Method(baselines.OneIndexSet),
    "relevance over visual keys only": Method(baselines.VisualSoftmax),
    "retrieved anew every 8 tokens": Method(baselines.Reselect),
    "retrieved anew every 2 tokens": Method(baselines.ReselectEveryTwo),
}
PRUNERS = {
    "random": baselines.RandomPruning,
    "uniform": baselines.Uniform,
    "pool": baselines.Pool,
    "downsample": baselines.Downsample,
    "VisionZip": baselines.VisionZip,
    "VisionZip, last layer": baselines.VisionZipLastLayer,
    "PruMerge": baselines.PruMerge,
    "FastV": baselines.FastV,
    "SparseVLM": baselines.SparseVLM,
}
BUDGETS = {40: 0.6, 20: 0.8, 10: 0.9}  # tokens of a kept hundred: decode sparsity
METHODS = {
    "dense": Method(Dense, 0, 0),
    **{f"SparseVILA, {n}": Method(SparseVILA, 0.75, s) for n, s in BUDGETS.items()},
    **{
        f"random relevance, {n}": Method(baselines.RandomRetrieval, 0.75, s)
        for n, s in BUDGETS.items()
    },
    "no visual token behind the first": Method(baselines.FromTheQuestion),
    "blind": Method(baselines.Blind, 0, 0),
    **{f"pruning only, {n}": Method(SparseVILA, 1 - n / 400, 0) for n in (100, *BUDGETS)},
    **{
        f"first-turn oracle, {n}": Method(baselines.FirstTurnOracle, 1 - n / 400, 0)
        for n in BUDGETS
    },
    **{f"retrieval only, {n}": Method(SparseVILA, 0, 1 - n / 400) for n in BUDGETS},
    **{
        f"{name}, {n}": Method(kind, 1 - n / 400, 0)
        for name, kind in PRUNERS.items()
        for n in (100, 20)
    },
    **{f"SparseVILA, 20, {name}": method for name, method in VARIANTS.items()},
}
# The rows that are measured unless others are named: the method, what it is compared with, and what
# must fail if choosing the right tokens matters.
MAIN = (
    "dense", "pruning only, 100",
    "SparseVILA, 40", "SparseVILA, 20", "SparseVILA, 10",
    "random relevance, 40", "random relevance, 20", "random relevance, 10",
    "no visual token behind the first", "blind", "SparseVILA, 20, random salience",
    "SparseVILA, 20, one index set for all layers",
    "pruning only, 40", "pruning only, 20", "pruning only, 10",
    "first-turn oracle, 40", "first-turn oracle, 20", "retrieval only, 20",
)  # fmt: skip
# What it costs (see `measure`), then per cent right.
COSTS = ("entering", "attended", "KV kB", "CPU ms")
COLUMNS = (
    *COSTS, *LOOKUPS, "first token", "later tokens", "first turn", "later turns",
    "later turns, conversation", "line", "list", "page",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    main = "', '".join(MAIN)
    others = "', '".join(name for name in METHODS if name not in MAIN)
    parser.add_argument(
        "--methods", nargs="+", metavar="ROW",
        help="of the table, or 'all' (default: with --method 'dense' and 'SparseVILA, 20', else "
        f"{len(MAIN)} main rows: '{main}'; others: '{others}')",
    )  # fmt: skip
    parser.add_argument(
        "--method", action="append", default=[], metavar="FILE:CLASS",
        help="a method of your own, a subclass of SparseVILA, at 75 %% / 80 %% (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--questions", type=positive, default=500, metavar="N",
        help="of each kind, over all seeds (default: 500)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=5, help="at least 2 (default: 5)")
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    check_figure(arguments.figure)
    if arguments.seeds < 2 or arguments.questions < arguments.seeds:
        raise ValueError(
            "--seeds must be at least 2, and --questions at least as many, "
            f"got {arguments.seeds} and {arguments.questions}"
        )
    for name in arguments.method:
        own_class(name)
    names = arguments.methods or (["dense", "SparseVILA, 20"] if arguments.method else MAIN)
    names = list(METHODS) if "all" in names else names
    check_rows(names)
    result = accuracy([*arguments.method, *names], arguments.questions, arguments.seeds)
    report(result, print_accuracy, draw_accuracy, arguments)


def check_rows(names: Iterable[str]) -> None:
    """Raise ValueError for a row that the table does not have."""
    for name in names:
        if name not in METHODS:
            near = [row for row in METHODS if row.startswith(name)]
            near = near or difflib.get_close_matches(name, METHODS)
            which = f"did you mean '{near[0]}'?" if near else "--help names all"
            raise ValueError(f"no row {name!r}: {which}")


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
        method = METHODS.get(name) or Method(name)
        method = method._replace(options=method.options | {"protocol": protocol})
        arguments.append((method, str(TINY), each, (1, CLIP), seed * each))
    results: dict[str, dict] = {name: defaultdict(list) for name in names}
    with workers() as pool:
        measured = pool.map(measure, *zip(*arguments))
        finished = progress(zip(jobs, measured), "measuring", " jobs", len(jobs))
        for (name, protocol, _), values in finished:
            end = ", conversation" if protocol == "conversation" else ""
            for column, value in values.items():
                results[name][column + end].append(value)
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
    pages: tuple[int, ...] = (1, CLIP),
    first: int = 0,
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, float]:
    """Percentages of right answers by question kind and part, for one method; as many scenes of
    each number of pages, from the `first` on; about a single page, questions of these kinds.
    "needed, layer 1" and so on is the share of the patches with the characters of look-ups'
    answers that a layer attends to. And what look-ups cost, means: "entering" and "attended",
    visual tokens of a page that a layer reads in prefill and for every generated token; "KV kB",
    kilobytes of keys and values, of text too, that all layers read for it; "CPU ms", milliseconds
    of the processor for a page and its questions."""
    try:
        return _measure(method.session(model_path, seed=first), questions, pages, first, kinds)
    except Exception as error:
        if not isinstance(method.kind, str):
            raise
        traceback.print_exc()  # somebody's own: they need to see where
        raise ValueError(f"{method.kind} failed: {error!r}") from None


def _measure(
    session: SparseVILA,
    questions: int,
    pages: tuple[int, ...],
    first: int,
    kinds: tuple[str, ...],
) -> dict[str, float]:
    right: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    for number in range(len(pages) * questions):
        count = pages[number // questions]
        rng = random.Random(f"evaluate {first + number % questions + 10**6 * (count - 1)}")
        scene = make_scene(rng, count)
        images, began = to_images(render(scene, rng)), time.process_time()
        session.see(images)
        for turn, kind in enumerate(rng.sample(kinds, len(kinds)) if count == 1 else ["page"]):
            line = rng.choice(rng.choice(scene).lines)
            question, expected = question_and_answer(kind, scene, rng, line)
            answer = session.ask(question, max_new_tokens=32)
            right[kind].append(answer.text == expected)
            if kind in LOOKUPS:
                which = "first turn" if turn == 0 else "later turns"
                right[which].append(answer.text == expected)
                wanted = tokens_of_text(session, expected)
                same = [a == b for a, b in zip(answer.token_ids, wanted)]
                same += [False] * (len(wanted) - len(same))
                right["first token"].append(same[0])
                right["later tokens"] += same[1:]
                needed = torch.tensor(needed_patches(kind, scene[0], line))
                for layer, share in enumerate(attended_shares(session, answer, needed), 1):
                    right[f"needed, layer {layer}"].append(share)
                costs["entering"].append(session.stats["visual_tokens"]["kept"])
                costs["attended"].append(attended(session, answer))
                costs["KV kB"].append(kv_bytes(session, answer) / 1000)
        if count == 1:
            costs["CPU ms"].append(1000 * (time.process_time() - began))
    percentages = {column: 100 * statistics.mean(values) for column, values in right.items()}
    return percentages | {column: statistics.mean(values) for column, values in costs.items()}


def tokens_of_text(session: SparseVILA, text: str) -> list[int]:
    """An answer's tokens, the stop token left out."""
    return session.processor.tokenizer.encode(" " + text, add_special_tokens=False).ids


def attended_shares(session: SparseVILA, answer: Answer, patches: Tensor) -> list[float]:
    """In every layer, the share of these patches (n,) of a single page whose tokens were read."""
    kept = session.kept[0]
    return [
        float(torch.isin(patches, kept[chosen.cpu()]).float().mean()) for chosen in answer.retrieved
    ]


def attended(session: SparseVILA, answer: Answer) -> float:
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


NEEDED = r"needed, layer \d+"  # columns that --json and the figure have
CURVES = ("SparseVILA", "retrieval only", "first-turn oracle", "pruning only", "random relevance")


def draw_accuracy(result: dict, file: str) -> None:
    """Left, right answers in later turns against visual tokens attended to; right, the share of the
    patches with the answer that each layer attends to. Of the methods that the table has, those of
    `CURVES`, labelled at their lines, the dense model as a dotted one, and methods of one's own as
    stars; a line below names all that are in the table alone."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    looks = zip(CURVES, ("C0", "C2", "C4", "C1", "0.5"), "os^Dx")
    methods, drawn = result["methods"], ["dense"]
    for curve, colour, marker in looks:
        names = [name for name in methods if re.fullmatch(rf"{curve}, \d+", name)]
        if not names:
            continue
        drawn += names
        points = [methods[name] for name in names]
        points.sort(key=lambda point: point["attended"])
        x = [point["attended"][0] for point in points]
        y, error = zip(*(point["later turns"] for point in points))
        left.errorbar(x, y, error, color=colour, marker=marker, capsize=3)
        place = (8, -30) if curve == "retrieval only" else (8, -14)  # it ends beside another
        left.annotate(curve, (x[-1], y[-1]), place, "data", "offset points", color=colour)
    for name in (name for name in methods if name not in METHODS):  # one's own
        drawn.append(name)
        x, (y, error) = methods[name]["attended"][0], methods[name]["later turns"]
        left.errorbar(x, y, error, color="C3", marker="*", markersize=14, capsize=3)
        left.annotate(
            name.rpartition(":")[2], (x, y), (8, -14), "data", "offset points", color="C3"
        )
    if "dense" in methods:
        left.axhline(methods["dense"]["later turns"][0], color="black", linestyle=":")
    left.set_xscale("log")
    left.set_xticks([10, 20, 40, 100], ["10", "20", "40", "100"])
    left.set_xlim(8, 400)
    left.minorticks_off()
    left.set_xlabel("visual tokens, of 400, that a layer attends to")
    left.set_ylabel("right answers in later turns, %")
    for curve, colour, marker in zip(("SparseVILA", "random relevance"), ("C0", "0.5"), "ox"):
        for name in (name for name in methods if re.fullmatch(rf"{curve}, \d+", name)):
            columns = [column for column in methods[name] if re.fullmatch(NEEDED, column)]
            shares = [methods[name][column][0] for column in columns]
            right.plot(range(1, len(shares) + 1), shares, color=colour, marker=marker)
            end = len(shares), shares[-1]
            right.annotate(name, end, (8, -4), "data", "offset points", color=colour)
            right.set_xticks(range(1, len(shares) + 1))
            right.set_xlim(0.6, 1.6 * len(shares))
    right.set_xlabel("layer")
    right.set_ylabel("patches with the answer that are attended to, %")
    for axes in (left, right):
        axes.set_ylim(-3, 105)
        axes.grid(alpha=0.3)
    if left_out := [name for name in methods if name not in drawn]:
        figure.supxlabel(f"In the table alone: {'; '.join(left_out)}.", fontsize=8, wrap=True)
    figure.savefig(file, dpi=110)
