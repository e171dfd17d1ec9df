"""`python -m bench quantised`: the tiny model in four and eight bits, dense and sparse.

Two tables: accuracy and Kullback-Leibler divergence of quantised variants; and the divergence over
models with the same function, since the order of 4-bit methods on one model may be chance.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import awq
from checkpoints import load, load_model
from checkpoints.processor import Processor
from checkpoints.weights import progress
from model import VLM
from sparsevila import Dense, SparseVILA
from tiny.scenes import make_scene, question_and_answer, render, to_images
from tools import quantise

from . import TINY, machine, positive
from .accuracy import LOOKUPS, Method, measure

EQUIVALENTS = 8  # models with the same function, for the last table
CALIBRATION_TURNS = 32
SCENES = 400  # for a divergence; half as many for each of the equivalent models
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", type=Path, default=TINY, help="folder (default: tiny)")
    parser.add_argument(
        "--questions", type=positive, default=500, help="of each kind (default: 500)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    evaluate_quantised(arguments.model, arguments.questions)


@torch.no_grad()
def evaluate_quantised(source: Path, questions: int) -> None:
    """Print the table of quantised variants, dense and sparse."""
    print(machine())
    sessions = {"dense": Method(Dense, 0, 0), "SparseVILA": Method(SparseVILA)}
    heads = [f"{session}: {kind}" for session in sessions for kind in LOOKUPS]
    print("| weights (group 32) | bytes on disk | KL, millinats | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 3) + "|")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        for number, name in enumerate(VARIANTS):
            path = make_variant(name, source, Path(folder) / str(number))
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            divergences = divergence(source, [load_model(path, device="cpu")], SCENES)
            jobs = [(method, str(path), questions, (1,)) for method in sessions.values()]
            results = list(pool.map(measure, *zip(*jobs)))
            cells = [f"{result[kind]:.1f}" for result in results for kind in LOOKUPS]
            cells = [name, f"{size:,}", mean_and_error(divergences[:, 0]), *cells]
            print("| " + " | ".join(cells) + " |", flush=True)
    draws = []
    for seed in progress(range(EQUIVALENTS), "measuring", " models"):
        models = equivalent_models(source, seed)
        draws.append(divergence(source, models, SCENES // 2).mean(0))
    nearest, without_clip, full = torch.stack(draws).T
    print(f"\n\n| over {EQUIVALENTS} equivalent models | KL, millinats | less than nearest by |")
    print("|---|---|---|")
    print(f"| round to nearest | {mean_and_error(nearest)} | |")
    for name, values in (("AWQ without clip", without_clip), ("AWQ", full)):
        print(f"| {name} | {mean_and_error(values)} | {mean_and_error(nearest - values)} |")


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
    quantise.save(model, source, target, group_size)
    return target


def calibrate(model: VLM, processor: Processor) -> tuple[list[Tensor], list[dict]]:
    """Pixels and turns as `python awq.py` takes them by default."""
    pictures, prompts, _ = quantise.calibration_set(None, None, CALIBRATION_TURNS)
    return quantise.calibration(model, processor, pictures, prompts, CALIBRATION_TURNS)


def divergence(reference: Path, others: list[VLM], scenes: int) -> Tensor:
    """Kullback-Leibler divergence, in nats, of the next word's distribution at the rows of right
    answers, (rows, others): sum_w p(w) ln(p(w) / q(w)), p of the reference, q of another model."""
    p_model, processor = load(reference, device="cpu")
    rows = []
    for number in range(scenes):
        rng = random.Random(f"diverge {number}")
        scene = make_scene(rng)
        question, answer = question_and_answer(LOOKUPS[number % 3], scene, rng)
        pixels = processor.pixels(to_images(render(scene, rng)))
        ids = processor.tokenizer.encode(" " + answer, add_special_tokens=False).ids
        prompt = processor.context([400]) + processor.question(question, first=True)
        log_p, *log_q = (
            answer_log_probabilities(model, pixels, prompt, ids) for model in (p_model, *others)
        )
        rows.append((log_p.exp() * (log_p - torch.stack(log_q))).sum(-1).T)
    return torch.cat(rows)


def answer_log_probabilities(
    model: VLM, pixels: Tensor, prompt: list[int], answer: list[int]
) -> Tensor:
    """ln p of the next word (rows, vocabulary) at the end of the prompt and after each word of the
    answer."""
    visual = model.project(torch.cat(model.encode(pixels)))
    logits = model(model.embed(prompt + answer, visual))[0]
    return logits.log_softmax(-1)[-len(answer) - 1 :]


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


def plant_outliers(model: VLM, factor: float = 30.0) -> None:
    """Blow up every 16th output of the decoder's norms, as in large models, the model's function
    unchanged."""
    s = torch.ones(model.config.text.width)
    s[::16] = 1 / factor
    rescale(model, lambda: s)


def rescale(model: VLM, scale: Callable[[], Tensor]) -> None:
    """Divide the outputs of the decoder's norms by scales (E,) and multiply the weights that read
    them: the model computes what it did."""
    for block in model.decoder.layers:
        for fold in awq.folds_of(block):
            if isinstance(fold.producer, torch.nn.RMSNorm):
                awq.fold(fold.producer, fold.consumers, scale())
