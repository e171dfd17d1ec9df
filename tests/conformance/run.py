"""Write what an implementation in Python computes for every case, as a program in any other
language would: `python -m tests.conformance.run FOLDER [--impl MODULE_OR_FILE]`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent


def run_cache(kind: type, inputs: dict[str, Tensor], decode_sparsity: float) -> tuple[Tensor, ...]:
    """Context, question, answer: the stages of a RetrievalCache."""
    layers = len(inputs["context_q"])
    cache = kind(layers, decode_sparsity)
    cache.visual = inputs["visual"]

    def attend(stage: str, rows: slice = slice(None)) -> Tensor:
        parts = []
        for layer in range(layers):
            q, k, v = (inputs[f"{stage}_{what}"][layer][None, :, rows] for what in "qkv")
            parts.append(cache.attend(layer, q.contiguous(), k.contiguous(), v.contiguous()))
        return torch.cat(parts)

    attend("context")
    cache.start_question()
    question = attend("question")
    cache.start_answer()
    steps = range(inputs["answer_q"].shape[2])
    answer = torch.cat([attend("answer", slice(step, step + 1)) for step in steps], 2)
    return question, answer, torch.stack(list(cache.relevance)), torch.stack(list(cache.retrieved))


def session(
    prefill_sparsity: float, decode_sparsity: float, kind: type | None = None
) -> dict[str, Tensor]:
    """The conversation of the case "session" with SparseVILA, or a class like it."""
    from model import load, open_picture
    from sparsevila import SparseVILA

    from .vectors import QUESTIONS

    model, processor = load(ROOT / "tiny", device="cpu")
    made = (kind or SparseVILA)(
        model, processor, prefill_sparsity=prefill_sparsity, decode_sparsity=decode_sparsity
    )
    picture = open_picture(ROOT / "tiny" / "samples" / "board.png")
    results = {"salience": model.encode(processor.pixels([picture]))[1][0]}
    made.see(picture)
    results["kept"] = made.kept[0]
    logits: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, out: logits.append(out.clone())
    )
    for turn, question in enumerate(QUESTIONS):
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
    hook.remove()
    return results


def results_of(operations: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """All outputs, by their tensor's names."""
    manifest = json.loads((folder / "manifest.json").read_text())
    vectors = load_file(folder / "vectors.safetensors")
    results = {}
    for case in manifest:
        implementation = operations.get(case["operation"])
        if implementation is None:
            continue
        inputs = {name: vectors[place["tensor"]] for name, place in case["inputs"].items()}
        if case["operation"] == "session":
            made = implementation(**case["parameters"])
        elif case["operation"] == "RetrievalCache":
            values = run_cache(implementation, inputs, **case["parameters"])
            made = dict(zip(("question_out", "answer_out", "relevance", "retrieved"), values))
        else:
            values = implementation(**inputs, **case["parameters"])
            values = values if isinstance(values, tuple) else (values,)
            made = dict(zip(case["outputs"], values))
        for name, place in case["outputs"].items():
            results[place["tensor"]] = torch.as_tensor(made[name]).contiguous()
    return results


def main() -> None:
    from .conftest import load_implementation
    from .vectors import FOLDER

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--impl", help="module or Python file; this project if none is named")
    arguments = parser.parse_args()
    operations = load_implementation(arguments.impl)
    if arguments.impl is None:
        operations["session"] = session
    arguments.folder.mkdir(parents=True, exist_ok=True)
    save_file(results_of(operations, FOLDER), arguments.folder / "results.safetensors")


if __name__ == "__main__":
    main()
