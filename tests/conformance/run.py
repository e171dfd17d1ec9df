"""Write what an implementation in Python computes for every case, as a program in any other
language would: `python -m tests.conformance.run FOLDER [--impl MODULE_OR_FILE]`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .check import expectations

ROOT = Path(__file__).resolve().parent.parent.parent


def run_cache(
    kind: type, inputs: dict[str, Tensor], decode_sparsity: float, stages: list[tuple[str, int]]
) -> dict[str, Tensor]:
    """A RetrievalCache taken through stages (name, rows); an answer is read row by row."""
    layers = len(inputs["context_q"])
    cache = kind(layers, decode_sparsity, visual=inputs["visual"])
    results = {}
    for stage, M in stages:
        what, _, turn = stage.partition("_")
        if what == "truncate":
            cache.truncate(M)
            continue
        if what == "question":
            cache.start_question()
        steps = []
        for rows in [slice(i, i + 1) for i in range(M)] if what == "answer" else [slice(0, M)]:
            outs = []
            for layer in range(layers):
                q, k, v = (inputs[f"{stage}_{name}"][layer][None, :, rows] for name in "qkv")
                outs.append(cache.attend(layer, q.contiguous(), k.contiguous(), v.contiguous()))
            steps.append(torch.cat(outs))
        results[f"{stage}_out"] = torch.cat(steps, 2)
        if what == "question":
            cache.start_answer()
            results[f"relevance_{turn}"] = torch.stack(list(cache.relevance))
            results[f"retrieved_{turn}"] = torch.stack(list(cache.retrieved))
    return results


def session(
    kind: type, pictures: list[str], questions: list[str], device: str = "cpu", **settings: float
) -> dict[str, Tensor]:
    """A conversation with the tiny model: `kind` is SparseVILA, or a class like it. Every turn is
    forgotten before the next."""
    from checkpoints import load
    from checkpoints.processor import open_picture
    from sparsevila import SparseVILA

    model, processor = load(ROOT / "tiny", device=device)
    made = kind(model, processor, **settings)
    images = [open_picture(ROOT / name) for name in pictures]
    _, salience = SparseVILA(model, processor).encode(processor.pixels(images))
    made.see(images)
    results = {"salience": torch.stack(salience), "kept": torch.stack(list(made.kept))}
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: logits.append(out.clone()))
    for turn, question in enumerate(questions):
        logits.clear()
        answer = made.ask(question)
        generated = len(answer.token_ids) - 1  # the last token is never read
        packed = [rows - generated for rows in made.cache.packed.filled]
        results |= {
            f"relevance_{turn}": torch.stack(made.cache.relevance),
            f"retrieved_{turn}": torch.stack(answer.retrieved),
            f"packed_rows_{turn}": torch.tensor(packed),
            f"logits_{turn}": torch.stack(logits),
            f"tokens_{turn}": torch.tensor(answer.token_ids),
        }
        made.forget()
    return results


def results_of(operations: dict[str, Any]) -> dict[str, Tensor]:
    """All outputs that the operations give, by their tensor's names."""
    manifest, vectors = expectations()
    results = {}
    for case in manifest:
        implementation = operations.get(case["operation"])
        if implementation is None:
            continue
        inputs = {name: vectors[place["tensor"]] for name, place in case["inputs"].items()}
        try:
            made = call(case["operation"], implementation, inputs, case["parameters"])
        except NotImplementedError:
            continue
        if not isinstance(made, dict):
            made = dict(zip(case["outputs"], made if isinstance(made, tuple) else (made,)))
        for name, place in case["outputs"].items():
            views = isinstance(made[name], (list, tuple))  # one tensor for each
            result = torch.stack(list(made[name])) if views else torch.as_tensor(made[name])
            results[place["tensor"]] = result.contiguous()
    return results


def call(operation: str, implementation: Any, inputs: dict[str, Tensor], parameters: dict) -> Any:
    """The outputs of one case: one, a tuple in the manifest's order, or a dict."""
    if operation == "SparseVILA":
        return session(implementation, **parameters)
    if operation == "RetrievalCache":
        return run_cache(implementation, inputs, **parameters)
    return implementation(**inputs, **parameters)


def main() -> None:
    from .conftest import load_implementation

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="to write results to")
    parser.add_argument("--impl", help="module or Python file (default: this project)")
    arguments = parser.parse_args()
    try:
        operations = load_implementation(arguments.impl)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    arguments.folder.mkdir(parents=True, exist_ok=True)
    save_file(results_of(operations), arguments.folder / "results.safetensors")


if __name__ == "__main__":
    main()
