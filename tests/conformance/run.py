"""Write what an implementation in Python computes for every case, as a program in any other
language would: `python -m tests.conformance.run FOLDER [--impl MODULE_OR_FILE]`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .check import expectations, given
from .recipe import numbers

ROOT = Path(__file__).resolve().parent.parent.parent


def run_cache(
    kind: type, inputs: dict[str, Tensor], layers: int, steps: list[list], **options: Any
) -> dict[str, Tensor]:
    """A RetrievalCache taken through the steps that README.md describes; outputs of step n are
    named n_out and so on."""
    if "visual" in inputs:
        options["visual"] = inputs["visual"]
    sparsity = [options.pop("decode_sparsity")] if "decode_sparsity" in options else []
    cache, results = kind(layers, *sparsity, **options), {}

    def attend(number: int, rows: slice, layers: int) -> Tensor:
        outs = []
        for layer in range(layers):
            q, k, v = (inputs[f"{number}_{name}"][layer][None, :, rows] for name in "qkv")
            outs.append(cache.attend(layer, q.contiguous(), k.contiguous(), v.contiguous()))
        return torch.cat(outs)

    for number, (step, amount) in enumerate(steps):
        if step == "truncate":
            cache.truncate(amount)
        elif step == "answer":
            rows = [attend(number, slice(i, i + 1), layers) for i in range(amount)]
            results[f"{number}_out"] = torch.cat(rows, 2)
        elif step == "broken question":
            length = cache.length
            cache.start_question()
            results[f"{number}_out"] = attend(number, slice(None), 1)
            cache.truncate(length)
        elif step == "question":
            cache.start_question()
            results[f"{number}_out"] = attend(number, slice(None), layers)
            cache.start_answer()
            results[f"{number}_relevance"] = torch.stack(list(cache.relevance))
            results[f"{number}_retrieved"] = torch.stack(list(cache.retrieved))
        else:
            results[f"{number}_out"] = attend(number, slice(None), layers)
    return results


def run_session(kind: type, steps: list[list], **settings: Any) -> dict[str, Tensor]:
    """A conversation with the tiny model: `kind` is SparseVILA, or a class like it. Outputs of step
    n are named n_kept and so on."""
    from checkpoints import load
    from checkpoints.processor import open_picture

    model, processor = load(ROOT / "tiny", device="cpu")
    made, results = kind(model, processor, **settings), {}
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: logits.append(out.clone()))
    for number, (step, *how) in enumerate(steps):
        if step == "see":
            made.see([open_picture(ROOT / name) for name in how])
            results |= {f"{number}_kept.{view}": i for view, i in enumerate(made.kept)}
        elif step == "forget":
            made.forget()
        else:
            logits.clear()
            answer = made.ask(how[0], max_new_tokens=how[1])
            results |= {
                f"{number}_relevance": torch.stack(list(made.cache.relevance)),
                f"{number}_retrieved": torch.stack(list(answer.retrieved)),
                f"{number}_logits": torch.stack(logits),
                f"{number}_tokens": torch.tensor(answer.token_ids),
            }
    return results


def inputs_of(case: dict, vectors: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs of a case; NAME.0, NAME.1 and so on are a list NAME."""
    inputs: dict[str, Any] = {}
    for name, place in case["inputs"].items():
        x = vectors[place["tensor"]] if "tensor" in place else numbers(place)
        name, _, view = name.partition(".")
        if view:
            inputs.setdefault(name, []).append(x)
        else:
            inputs[name] = x
    return inputs


def results_of(operations: dict[str, Any]) -> dict[str, Tensor]:
    """All outputs that the operations give, by their tensor's names."""
    return {name: x for _, results in case_by_case(operations) for name, x in results.items()}


def case_by_case(operations: dict[str, Any]) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """Every case of the operations, and its outputs by their tensor's names; none if it fails."""
    from .contracts import FUNCTIONS

    manifest, vectors = expectations()
    cases = [case for case in manifest if case["operation"] in operations]
    places = [place for case in cases for place in case["inputs"].values() if "tensor" in place]
    vectors = {place["tensor"]: vectors[place["tensor"]].clone() for place in places}
    for case in cases:
        operation, parameters = case["operation"], case["parameters"]
        implementation, results = operations[operation], {}
        inputs = inputs_of(case, vectors)
        try:
            if operation == "SparseVILA":
                made = run_session(implementation, **parameters)
            elif operation == "RetrievalCache":
                made = run_cache(implementation, inputs, **parameters)
            elif operation == "keep_count":
                count = implementation(parameters["n"], parameters["sparsity"])
                made = {"count": torch.tensor(count)}
            else:
                function = FUNCTIONS[operation]
                made = function.named(function.apply(implementation, inputs | parameters))
            for name, place in case["outputs"].items():
                results[place["tensor"]] = torch.as_tensor(made[name]).contiguous().clone()
        except NotImplementedError:
            pass
        except Exception as error:  # the others may be right
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"{operation} ({given(case)}) raises {words}", file=sys.stderr)
        yield case, results


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
