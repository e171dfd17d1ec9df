"""Measurements that a reader can repeat. Every command prints the machine it ran on.

    python -m bench speed                     dense and sparse, stage by stage, end to end
    python -m bench accuracy                  SparseVILA, other methods and variants, tiny model
    python -m bench needle                    one page of clips of growing length, tiny model
    python -m bench quantised                 the tiny model's accuracy in four and eight bits
    python -m bench kernels                   every operation beside naive PyTorch and its bound
    python -m bench awq                       four-bit products beside a plain layer's
    python -m bench load                      memory and time of loading 10^9 weights
    python -m bench make smolvlm-256m FOLDER  a checkpoint of random weights in a real model's shape
                                              (LLaVA-NeXT, Qwen2.5-VL and Qwen3-VL too)
    python -m bench versus FOLDER             our dense decoding beside Hugging Face transformers'
    python -m bench adapter                   its own generate beside examples/transformers_vlm.py
    python -m bench real MODEL --image FILE   a real checkpoint, by us and by transformers

`versus`, `adapter`, `real` and `speed --versus transformers` need transformers, `--figure`
matplotlib. To see the stages of a model, give its folder to `python sparsevila.py --model`.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")  # Linux


def machine(device: torch.device = CPU) -> str:
    """Processor, cores, the GPU that is used, torch and date, in one line."""
    name = platform.processor() or platform.machine()
    if CPUINFO.exists():
        lines = CPUINFO.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device)}"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"


def median_and_range(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(values), min(values), max(values)]


def pyplot() -> Any:
    """matplotlib's, without a screen, fonts large enough for a README."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["font.size"] = 13
    from matplotlib import pyplot

    return pyplot


def positive(text: str) -> int:
    """A count given on the command line."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that call `report`."""
    parser.add_argument(
        "--figure", metavar="FILE", help="draw the result there (default: no figure)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )


def check_figure(file: str | None) -> None:
    """Raise ValueError, before anything is measured, for a file that cannot be drawn."""
    if file is None:
        return
    if not Path(file).parent.is_dir():
        raise ValueError(f"no folder to write {file} to")
    formats = pyplot().figure().canvas.get_supported_filetypes()
    if Path(file).suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"--figure must end in one of {', '.join(formats)}, got {file}")


def report(result: dict, show: Callable, draw: Callable, arguments: argparse.Namespace) -> None:
    """Print a result, then its JSON, and draw it, if asked."""
    try:
        show(result)
        if arguments.json:
            print(json.dumps(result), flush=True)
    finally:  # even if nobody reads on
        if arguments.figure:
            draw(result, arguments.figure)
