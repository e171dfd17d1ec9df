"""Measure the tiny model on scenes it never saw. `measure` and `find_needle` serve bench.py;
`python tiny/evaluate.py` prints the tables of quantised weights in README.md.

Every picture is asked for a colour, a digit, a place and a count, in random order in one session;
every clip which frame shows a digit. Answers are generated freely, token by token, and must be
right to the last character. For colour, digit and place together, the *first* word (computed
densely, straight after the question) and the *later* ones (decoded from what was retrieved) are
also counted apart, and so are the first and the later questions of a session.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import awq  # noqa: E402
from model import VLM, Processor, load  # noqa: E402
from sparsevila import Answer, Dense, SparseVILA  # noqa: E402
from tiny.scenes import make_needle, make_scene, question_and_answer, render, to_images  # noqa: E402

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


def parts(answer: str) -> tuple[str, str]:
    """The first word of an answer, and the rest."""
    first, *rest = re.split(r"[,:]", answer, maxsplit=1)
    return first, "".join(rest)


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
    percentages = {column: 100 * mean(values) for column, values in right.items()}
    return percentages | {column: mean(values) for column, values in costs.items()}


def find_needle(
    method: Method, model_path: str, frames: int, depth: int, clips: int
) -> dict[str, float]:
    """Percentage of look-ups answered right about a glyph in frame `depth` of clips of so many
    frames, and visual tokens of a clip that a layer attends to."""
    session = method.session(model_path)
    right, attended = [], []
    for number in range(clips):
        rng = random.Random(f"needle {frames} {depth} {number}")
        scene, needle = make_needle(rng, frames, depth)
        session.see(to_images(render(scene, rng)))
        question, expected = question_and_answer(LOOKUPS[number % 3], scene, rng, needle)
        answer = session.ask(question, max_new_tokens=16)
        right.append(answer.text == expected)
        attended.append(tokens_of(session, answer))
    return {"right": 100 * sum(right) / clips, "attended": sum(attended) / clips}


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


# --- quantised ------------------------------------------------------------------------------------

EQUIVALENTS = 16  # models with the same function, for the last table
NEAREST = {"grid": 1, "clip": False}
# name: (arguments of awq.quantize or None, is the tower quantised too, are outliers planted before)
VARIANTS = {
    "full precision": (None, False, False),
    "round to nearest": (NEAREST, False, False),
    "AWQ without clip": ({"clip": False}, False, False),
    "AWQ": ({}, False, False),
    "AWQ, W8A8 tower": ({}, True, False),
    "planted outliers, round to nearest": (NEAREST, False, True),
    "planted outliers, AWQ": ({}, False, True),
}


def rescale(model: VLM, scale: Callable[[], Tensor]) -> None:
    """Divide the outputs of the decoder's norms by scales (E,) and multiply the weights that read
    them: the model computes what it did."""
    for block in model.decoder.layers:
        for producer, linears, _, _ in awq.folds_of(block):
            if isinstance(producer, torch.nn.RMSNorm):
                awq.fold(producer, linears, scale())


def plant_outliers(model: VLM, factor: float = 30.0) -> None:
    """Blow up every 16th output of the decoder's norms, as in large models, the model's function
    unchanged."""
    s = torch.ones(model.config.text.width)
    s[::16] = 1 / factor
    rescale(model, lambda: s)


def make_variant(name: str, source: Path, target: Path, group_size: int = 32) -> Path:
    """Quantise a checkpoint in one of the ways, calibrated on the same unseen scenes; its
    folder."""
    options, tower, outliers = VARIANTS[name]
    if options is None:
        return source
    model, processor = load(source, device="cpu")
    if outliers:
        plant_outliers(model)
    pixels, batches = calibrate(model, processor)
    awq.quantize(model, batches, group_size=group_size, **options)
    if tower:
        awq.quantize_tower(model.vision_tower, pixels)
    awq.save(model, source, target, group_size)
    return target


def calibrate(model: VLM, processor: Processor) -> tuple[list[Tensor], list[Tensor]]:
    """Pixels and embeddings as `python awq.py` takes them by default."""
    pictures, prompts, _ = awq.calibration_set(None, None, 32)
    return awq.calibration(model, processor, pictures, prompts, 32)


def answer_log_probabilities(
    model: VLM, pixels: Tensor, prompt: list[int], answer: list[int]
) -> Tensor:
    """ln p of the next word (rows, vocabulary) at the end of the prompt and after each word of the
    answer."""
    visual = model.project(model.encode(pixels)[0])[0]
    logits = model(model.embed(prompt + answer, visual))[0]
    return logits.log_softmax(-1)[-len(answer) - 1 :]


def divergence(reference: Path, others: list[VLM], scenes: int = 1000) -> Tensor:
    """Kullback-Leibler divergence, in nats, of the next word's distribution at the rows of right
    answers, (rows, others): sum_w p(w) ln(p(w) / q(w)), p of the reference, q of another model."""
    p_model, processor = load(reference, device="cpu")
    rows = []
    for number in range(scenes):
        rng = random.Random(f"diverge {number}")
        scene = make_scene(rng, 1)
        question, answer = question_and_answer(LOOKUPS[number % 3], scene, rng)
        pixels = processor.pixels(to_images(render(scene, rng)))
        ids = processor.tokenizer.encode(answer, add_special_tokens=False).ids
        prompt = processor.context([100]) + processor.question(question, first=True)
        log_p, *log_q = (
            answer_log_probabilities(model, pixels, prompt, ids) for model in (p_model, *others)
        )
        rows.append((log_p.exp() * (log_p - torch.stack(log_q))).sum(-1).T)
    return torch.cat(rows)


def mean_and_error(values: Tensor) -> str:
    """Mean of values (n,) and its standard error, in thousandths."""
    return f"{1000 * values.mean():.1f} ± {1000 * values.std() / len(values) ** 0.5:.1f}"


def equivalent_models(source: Path, seed: int) -> list[VLM]:
    """One model that computes what the source does, its decoder's norms rescaled at random by about
    5 %, quantised in each of three ways."""
    models = []
    for name in ("round to nearest", "AWQ without clip", "AWQ"):
        model, processor = load(source, device="cpu")
        batches = calibrate(model, processor)[1]
        noise = torch.Generator().manual_seed(seed)
        rescale(model, lambda noise=noise: (0.05 * torch.randn(128, generator=noise)).exp())
        awq.quantize(model, batches, group_size=32, **VARIANTS[name][0])
        models.append(model)
    return models


@torch.no_grad()
def evaluate_quantised(source: Path, questions: int) -> None:
    """Print the table of quantised variants, dense and sparse."""
    sessions = {"dense": Method(Dense, 0, 0), "SparseVILA": Method(SparseVILA)}
    heads = [f"{session}: {kind}" for session in sessions for kind in LOOKUPS]
    print("| weights (group 32) | bytes on disk | KL, millinats | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 3) + "|")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        for number, name in enumerate(VARIANTS):
            path = make_variant(name, source, Path(folder) / str(number))
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            divergences = divergence(source, [load(path, device="cpu")[0]])
            jobs = [(method, str(path), questions, (1,)) for method in sessions.values()]
            results = list(pool.map(measure, *zip(*jobs)))
            cells = [f"{result[kind]:.1f}" for result in results for kind in LOOKUPS]
            cells = [name, f"{size:,}", mean_and_error(divergences[:, 0]), *cells]
            print("| " + " | ".join(cells) + " |", flush=True)
    draws = []
    for seed in range(EQUIVALENTS):
        models = equivalent_models(source, seed)
        draws.append(divergence(source, models, scenes=500).mean(0))
        print(f"\r{seed + 1} of {EQUIVALENTS} equivalent models", end="", file=sys.stderr)
    nearest, without_clip, full = torch.stack(draws).T
    print(f"\n\n| over {EQUIVALENTS} equivalent models | KL, millinats | less than nearest by |")
    print("|---|---|---|")
    print(f"| round to nearest | {mean_and_error(nearest)} | |")
    for name, values in (("AWQ without clip", without_clip), ("AWQ", full)):
        print(f"| {name} | {mean_and_error(values)} | {mean_and_error(nearest - values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quantised variants of the tiny model.")
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--questions", type=int, default=500, help="of each kind")
    arguments = parser.parse_args()
    evaluate_quantised(arguments.model, arguments.questions)


if __name__ == "__main__":
    main()
