"""`python -m bench load`: memory and time of loading 10^9 weights in float16 from four files."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from checkpoints import load_model

from . import ROOT, machine
from .random_models import write_large_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="to load into (default: the stored one)",
    )
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # the process that is measured


def run(arguments: argparse.Namespace) -> None:
    """Make a checkpoint and load it in a process of its own."""
    if arguments.folder:
        load_and_report(arguments.folder, arguments.dtype)
    else:
        load_large(arguments.dtype)


def load_large(dtype: str | None) -> None:
    """Make a checkpoint, load it in a process of its own and print what that took."""
    with tempfile.TemporaryDirectory() as folder:
        total = write_large_checkpoint(Path(folder))
        command = [sys.executable, "-m", "bench", "load", "--folder", folder]
        command += ["--dtype", dtype] if dtype else []
        result = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout
        )
    print(machine())
    print(f"checkpoint   {total / 1e6:8.0f} MB, 4 shards, float16")
    print(f"model        {result['weights'] / 1e6:8.0f} MB, {result['dtype']}")
    print(f"before       {result['before'] / 1e6:8.0f} MB resident, Python and torch imported")
    print(f"peak         {result['peak'] / 1e6:8.0f} MB resident")
    print(f"             {result['peak'] / total:8.2f} x the checkpoint's bytes")
    print(f"limit        {(1.15 * total + 300e6) / 1e6:8.0f} MB: 1.15 x the checkpoint + 300 MB")
    print(f"time         {result['seconds']:8.2f} s (the files are in the system's cache)")


def load_and_report(folder: str, dtype: str | None) -> None:
    """Load, run one token through the decoder, and print one JSON object."""
    before = peak_resident()
    began = time.perf_counter()
    model = load_model(folder, device="cpu", dtype=getattr(torch, dtype) if dtype else None)
    seconds = time.perf_counter() - began
    model(model.embed([1]))
    report = {"before": before, "peak": peak_resident(), "weights": model.weight_bytes}
    print(json.dumps(report | {"seconds": seconds, "dtype": str(model.dtype)[6:]}))


def peak_resident() -> int:
    """Bytes that were resident at most."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage begins with what the parent process held
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS
