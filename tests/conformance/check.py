"""Compare what a program wrote with what is expected: `python -m tests.conformance.check FOLDER`.

README.md in this folder says what to write. Exit status: 0 if every operation of which there is
anything is complete and right, else 1.
"""

import argparse
import json
import os
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

VERSION = 2  # of the files; vectors.py says what changed
FOLDER = Path(__file__).resolve().parent.parent / "golden" / "conformance"


def read_results(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's .safetensors files. Raises: ValueError naming what is wrong."""
    try:
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else None
    except OSError as error:
        raise ValueError(f"the folder cannot be read: {error}") from None
    if files is None:
        raise ValueError(f"no folder {folder}")
    if not files:
        raise ValueError(f"{folder} holds no .safetensors files")
    results: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError(f"{file} is no regular file")
        try:
            content = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None
        if twice := sorted(results.keys() & content.keys()):
            raise ValueError(f"{file}: {twice[0]} is in another file, too")
        results |= content
    return results


@cache
def expectations() -> tuple[list[dict], dict[str, Tensor]]:
    """The manifest's cases, and all tensors that they name: read once, and nobody's to change."""
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    return manifest["cases"], load_file(FOLDER / "vectors.safetensors")


def bits(x: Tensor) -> Tensor:
    """Numbers that are equal only if all bits of x are, of NaN and -0 as well."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(kind)


def fault(got: Tensor | None, place: dict, vectors: dict[str, Tensor]) -> str | None:
    """What is wrong with a result, None if nothing is."""
    expected = vectors[place["tensor"]]
    if got is None:
        return "missing"
    if list(got.shape) != place["shape"]:
        return f"shape must be {place['shape']}, got {list(got.shape)}"
    dtype = str(got.dtype).removeprefix("torch.")
    if dtype != place["dtype"]:
        return f"dtype must be {place['dtype']}, got {dtype}"
    if place["tolerance"] == "exact":
        wrong = bits(got) != bits(expected)
        allowed = torch.zeros(())
    else:
        if got.isnan().any():
            return f"{int(got.isnan().sum())} NaN"
        allowed = vectors[place["tolerance"]].double()
        off = (got.double() - expected.double()).abs()
        wrong = (off > allowed) & (got != expected)  # infinities that agree have no difference
    if not wrong.any():
        return None
    at = int(wrong.flatten().int().argmax())
    limit = float(allowed.expand(expected.shape).flatten()[at])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), got.shape))
    return (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, the first at {index}: "
        f"{got.flatten()[at].item():.9g} in place of {expected.flatten()[at].item():.9g}, "
        f"allowed are {limit:.3g}"
    )


def given(case: dict) -> str:
    """The parameters of a case and the shapes of its inputs, in a few words."""
    shapes = {name: list(place["shape"]) for name, place in case["inputs"].items()}
    text = ", ".join(f"{name} {value}" for name, value in (case["parameters"] | shapes).items())
    return text if len(text) < 160 else text[:160] + " ..."


def compare(results: dict[str, Tensor]) -> tuple[list[str], bool]:
    """Lines of a table, and whether all is well."""
    manifest, vectors = expectations()
    wanted = {place["tensor"] for case in manifest for place in case["outputs"].values()}
    faults: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    provided = {name.split("/")[0] for name in results}
    for case in manifest:
        operation = case["operation"]
        faults.setdefault(operation, [])
        counts[operation] = counts.get(operation, 0) + 1
        if operation in provided:
            for place in case["outputs"].values():
                if words := fault(results.get(place["tensor"]), place, vectors):
                    faults[operation].append(f"{place['tensor']} ({given(case)}): {words}")
    lines = [f"{'operation':20}{'cases':>6}  result"]
    for operation, found in faults.items():
        verdict = "right" if not found else f"{len(found)} wrong"
        verdict = verdict if operation in provided else "not provided"
        lines.append(f"{operation:20}{counts[operation]:6}  {verdict}")
        lines += [f"    {words}" for words in found]
    extra = sorted(results.keys() - wanted)
    lines += [f"extra tensor, expected by no case: {name!r}" for name in extra[:20]]
    if len(extra) > 20:
        lines.append(f"and {len(extra) - 20} more extra tensors")
    return lines, not any(faults.values()) and not extra


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="with .safetensors files of results")
    arguments = parser.parse_args(argv)
    try:
        results = read_results(arguments.folder)
        if not results:
            raise ValueError(f"the files in {arguments.folder} hold no tensors")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines, well = compare(results)
    print("\n".join(lines))
    return 0 if well else 1


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
