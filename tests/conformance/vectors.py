"""Cases for programs in any language: `python -m tests.conformance.vectors` writes manifest.json
and vectors.safetensors. Every expected value comes from float64 (oracle.py); README.md describes
the files."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import cache, conversation, oracle, other
from .check import FOLDER, VERSION
from .contracts import FUNCTIONS, PROMISES, sparsity_of
from .laws import Expected, Function, Lab, plain
from .recipe import Case, Maker, simplest, told
from .run import ROOT

DTYPES = ("float32", "float16", "bfloat16")
SMALL = 4096  # bytes; an input that is larger is written as a recipe, if it has one
MOST = 6_000  # bytes that a random case stores
CHANGES = {
    1: "the first",
    2: "large inputs are recipes; lists of views; steps of caches and sessions in place of stages; "
    "more cases",
}


@dataclass
class FileCase:
    """One call, or one conversation."""

    operation: str
    about: str
    parameters: dict[str, Any]
    inputs: dict[str, Tensor]
    recipes: dict[str, dict | None]
    outputs: dict[str, Expected]

    def stored(self) -> int:
        """Bytes in the file."""
        inputs = [x for name, x in self.inputs.items() if not self.as_recipe(name)]
        outputs = [x for e in self.outputs.values() for x in (e.value, e.allowed) if x is not None]
        return sum(x.nbytes for x in inputs) + sum(4 * x.numel() for x in outputs)

    def as_recipe(self, name: str) -> bool:
        plain = self.inputs[name].dtype in (torch.float32, torch.int32)  # which any language has
        return plain and self.recipes.get(name) is not None and self.inputs[name].nbytes > SMALL


# --- functions ------------------------------------------------------------------------------------


def function_case(function: Function, case: Case, about: str) -> FileCase:
    maker = Maker(case)
    arguments = plain(function.arguments(SimpleNamespace(**case), maker))
    expected = function.expected(SimpleNamespace(**arguments), None)
    inputs, parameters = {}, {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            inputs[name] = value
        elif isinstance(value, list):
            inputs |= {f"{name}.{i}": x for i, x in enumerate(value)}
        else:
            parameters[name] = value
    return FileCase(function.operation, about, parameters, inputs, maker.recipes, expected)


def function_cases(function: Function) -> Iterator[FileCase]:
    """The cases that are written down, and of the random ones those that show something new: an
    option of a field that no case before had in this dtype."""
    for promise in PROMISES[function.operation]:
        if promise.law not in ("values", "large"):
            continue
        for dtype in DTYPES if promise.dtypes else DTYPES[:1]:
            shown: set = set()
            for number, case in enumerate(promise.cases(dtype, 1)):
                written = number < len(promise.written)
                options = {(name, case[name]) for name in promise.fields}
                if case.get("x in memory") == "far":
                    continue  # which files do not show
                if written or promise.law == "values" and not options <= shown:
                    about = f"{promise.law}: {told(case, promise.fields)}"
                    made = function_case(function, case, about)
                    codes = [e for e in made.outputs.values() if e.dtype == torch.int8]
                    if any(e.allowed is not None and e.allowed.any() for e in codes):
                        continue  # a number lies between two, and others follow from it
                    most = MOST if not written else 4 * MOST if dtype != DTYPES[0] else 100 * MOST
                    if made.stored() <= most:
                        shown |= options
                        yield made


def count_cases() -> Iterator[FileCase]:
    promise = PROMISES["keep_count"][0]
    for case in promise.cases("float32", 1):
        n, sparsity = case["n"], sparsity_of(case)
        if isinstance(sparsity, (int, float)):
            count = Expected(torch.tensor(oracle.keep_count(n, sparsity)))
            parameters = {"n": n, "sparsity": sparsity}
            yield FileCase("keep_count", promise.law, parameters, {}, {}, {"count": count})


# --- conversations --------------------------------------------------------------------------------


class Doubtful(Exception):
    """A choice so close that rounding may decide it: no case for files."""


def decided(scores: Expected, keep: int) -> None:
    """Raise Doubtful if what is chosen and what is not lie too close together."""
    if 0 < keep < len(scores.value):
        ranked = scores.value.sort(descending=True).values
        if ranked[keep - 1] - ranked[keep] <= 2 * scores.allowed.max():
            raise Doubtful


class WrittenCache(cache.Books):
    """Collects what goes in and what must come out, of each step."""

    def __init__(self, case: Case):
        super().__init__(Lab({"RetrievalCache": other.RetrievalCache}), case)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Expected] = {}
        if self.visual:
            self.inputs["visual"] = torch.tensor(self.visual)

    def rows(self, *how: Any) -> tuple[Tensor, Tensor]:
        view, buffer = super().rows(*how)
        self.made.append(view.clone())
        return view, buffer

    def compare(self, name: str, layer: int, got: Tensor, expected: Expected) -> None:
        self.found.setdefault(name, {}).setdefault(layer, []).append(expected)
        if name == "relevance":
            decided(expected, oracle.keep_count(len(self.visual), self.sparsity))

    def write(self, steps: tuple[cache.Step, ...]) -> list[tuple[str, int]]:
        """The steps, truncations by their length."""
        written = []
        for step, amount in steps:
            if step == "text" and self.hidden or step in ("truncate", "forget"):
                self.step(*(("truncate", 1.0) if step == "text" else (step, amount)))
                written.append(("truncate", self.length))
            if step in ("truncate", "forget", "refused") or amount == 0:
                continue
            self.made, self.found, number = [], {}, len(written)
            self.step(step, amount)
            written.append((step, amount))
            layers = 1 if step == "broken question" else self.case.layers
            for i, name in enumerate("qkv"):
                passes = [
                    torch.cat(self.made[start + i : start + 3 * layers : 3])
                    for start in range(0, len(self.made), 3 * layers)
                ]
                self.inputs[f"{number}_{name}"] = along_rows(passes)
            outs = [joined(self.found["output"][layer], along_rows) for layer in range(layers)]
            self.outputs[f"{number}_out"] = joined(outs, torch.cat)
            for name in ("relevance", "retrieved"):
                if name in self.found:
                    parts = [self.found[name][layer][0] for layer in range(layers)]
                    self.outputs[f"{number}_{name}"] = joined(parts, torch.stack)
        return written


def along_rows(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 2)


def joined(parts: list[Expected], join: Any) -> Expected:
    allowed = None if parts[0].allowed is None else join([e.allowed for e in parts])
    return Expected(join([e.value for e in parts]), allowed, parts[0].dtype)


def cache_cases() -> Iterator[FileCase]:
    """In float32 every conversation that is written down, small random ones and a long one; some in
    16 bits."""
    for promise, dtype in product(cache.PROMISES[:2], DTYPES):
        for number, case in enumerate(promise.cases(dtype, 1)):
            if dtype != DTYPES[0] and (number > 3 or promise.law == "large"):
                break
            books = WrittenCache(case)
            try:
                steps = books.write((("text", case["context"]), *case["steps"]))
            except Doubtful:
                continue
            parameters = {"layers": case["layers"], "steps": steps}
            if case["sparsity"] is not None:
                parameters["decode_sparsity"] = case["sparsity"]
            fields = {name: x for name, x in promise.fields.items() if name != "steps"}
            about = f"{promise.law}: {told(case, fields)}"
            made = FileCase("RetrievalCache", about, parameters, books.inputs, {}, books.outputs)
            if number < len(promise.written) or made.stored() < 4 * MOST:
                yield made


SAMPLES = ("tiny/samples/receipt.png", "tiny/samples/timetable.png")
SESSIONS = (
    {
        "prefill_sparsity": 0.75, "decode_sparsity": 0.9,
        "steps": [
            ["see", SAMPLES[0]], ["ask", "how much is the coffee?", 8], ["forget"],
            ["ask", "what is on line 5?", 16], ["ask", "how much is the bread?", 3],
            ["ask", "what is the title?", 1], ["ask", "what is the title?", 8],
            ["forget"], ["ask", "what costs 3.10?", 8],
            ["ask", "what costs 3.10?", 8],
        ],
    },
    {
        "prefill_sparsity": 0.7, "decode_sparsity": 0.85,
        "steps": [
            ["see", SAMPLES[1], SAMPLES[0]], ["ask", "what is on line 5?", 16],
            ["see", SAMPLES[0]], ["ask", "what is on line 2?", 12],
        ],
    },
)  # fmt: skip


class WrittenSession(conversation.Session):
    """Ours in float32, of which nothing is written but that it decides as float64 does."""

    def __init__(self, settings: dict):
        from sparsevila import SparseVILA

        case = simplest(conversation.FIELDS) | {"model": "tiny", "dtype": "float32"}
        case |= {name: settings[f"{name}_sparsity"] for name in ("prefill", "decode")}
        super().__init__(Lab({"SparseVILA": SparseVILA}), case)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Expected] = {}

    def _best(self, kept: list[Tensor], salience: list[Tensor], low: list[Tensor]) -> None:
        for view, (exact, rounded, index) in enumerate(zip(salience, low, kept)):
            right = conversation.Pair.expected(exact, rounded, torch.float32)
            keep = oracle.keep_count(len(exact), self.prefill)
            decided(right, keep)
            best = oracle.select_tokens(exact.tolist(), keep)
            assert best == index.tolist()
            self.outputs[f"{self.number}_kept.{view}"] = Expected(torch.tensor(best))

    def compare(self, name: str, number: int, got: Tensor, expected: Expected) -> None:
        self.found.setdefault(name, []).append(expected)
        if name == "relevance":
            decided(expected, oracle.keep_count(len(expected.value), self.decode))
        if name == "logits":
            decided(expected, 1)

    def write(self, steps: list[list]) -> None:
        from checkpoints.processor import open_picture

        for self.number, (step, *how) in enumerate(steps):
            self.found = {}
            if step == "see":
                self.seen += 1
                self.shown = self.given = [open_picture(ROOT / name) for name in how]
                self.look()
                for view, pixels in enumerate(self.processor.pixels(self.shown)):
                    self.inputs[f"{self.number}_pixels.{view}"] = pixels
                counts = [len(index) for index in self.made.kept]
                ids = self.processor.context(counts, self.pair.exact.views)
                self.inputs[f"{self.number}_context_ids"] = torch.tensor(ids)
            elif step == "forget":
                self.step("forget")
            else:
                start = self.pair.exact.length
                self.ask(*how)
                answer = self.answers[-1][1]
                for name, parts in self.found.items():
                    self.outputs[f"{self.number}_{name}"] = joined(parts, torch.stack)
                self.outputs[f"{self.number}_tokens"] = Expected(torch.tensor(answer))
                read = self.read_ids
                assert start + len(read) + len(answer) - 1 == self.pair.exact.length
                self.inputs[f"{self.number}_question_ids"] = torch.tensor(read)


def session_cases() -> Iterator[FileCase]:
    for settings in SESSIONS:
        session = WrittenSession(settings)
        session.write(settings["steps"])
        inputs, outputs = session.inputs, session.outputs
        yield FileCase("SparseVILA", "a conversation", settings, inputs, {}, outputs)


# --- files ----------------------------------------------------------------------------------------


def all_cases() -> Iterator[FileCase]:
    for operation in PROMISES:
        if operation in FUNCTIONS:
            yield from function_cases(FUNCTIONS[operation])
        elif operation == "keep_count":
            yield from count_cases()
    yield from cache_cases()
    yield from session_cases()


def stored(expected: Expected) -> tuple[Tensor, Tensor | None]:
    """What is expected in its dtype; the rounding to it is added to what is allowed."""
    value = expected.value.to(expected.dtype or expected.value.dtype)
    if expected.allowed is None:
        return value, None
    off = (value.double() - expected.value.double()).abs().nan_to_num(0)
    return value, (expected.allowed.expand_as(expected.value) + off).float()


def write(folder: Path = FOLDER) -> None:
    tensors, cases, counts, known = {}, [], {}, {}
    for case in all_cases():
        number = counts[case.operation] = counts.get(case.operation, -1) + 1
        prefix = f"{case.operation}/{number}"

        def entry(name: str, tensor: Tensor, prefix: str = prefix) -> dict:
            tensor = tensor.clone().contiguous()
            if name.startswith("in."):  # once in the file, however often it is given
                raw = bytes(tensor.flatten().view(torch.uint8).tolist())
                content = tensor.dtype, tensor.shape, raw
                prefix, name = known.setdefault(content, (prefix, name))
            tensors[f"{prefix}/{name}"] = tensor
            described = {"tensor": f"{prefix}/{name}", "shape": list(tensor.shape)}
            return described | {"dtype": str(tensor.dtype).removeprefix("torch.")}

        inputs, outputs = {}, {}
        for name, tensor in case.inputs.items():
            recipe = case.recipes.get(name)
            inputs[name] = recipe if case.as_recipe(name) else entry(f"in.{name}", tensor)
        for name, expected in case.outputs.items():
            value, allowed = stored(expected)
            outputs[name] = entry(name, value) | {"tolerance": "exact"}
            if allowed is not None:
                outputs[name]["tolerance"] = entry(f"{name}.allowed", allowed)["tensor"]
        cases.append(
            {
                "operation": case.operation, "about": case.about, "parameters": case.parameters,
                "inputs": inputs, "outputs": outputs,
            }
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps({"version": VERSION, "changes": CHANGES})[:-1]
    (folder / "manifest.json").write_text(f'{head}, "cases": [\n{lines}\n]}}\n')
    save_file(tensors, folder / "vectors.safetensors")
    print(f"{len(cases)} cases, {sum(t.nbytes for t in tensors.values()):,} bytes in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="default: tests/golden/conformance"
    )
    write(parser.parse_args().out)
