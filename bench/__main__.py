"""The command line: `python -m bench --help` lists the commands."""

import argparse

from tools import command

from . import (
    accuracy,
    adapter,
    awq,
    kernels,
    load,
    needle,
    quantised,
    random_models,
    real,
    speed,
    versus,
)

COMMANDS = {
    "speed": (speed, "dense and sparse, stage by stage, random weights"),
    "accuracy": (accuracy, "all methods on the tiny model's unseen pages (two hours)"),
    "needle": (needle, "one page of clips of growing length, tiny model (hours)"),
    "quantised": (quantised, "the tiny model in four and eight bits"),
    "kernels": (kernels, "every operation beside naive PyTorch and its bound"),
    "awq": (awq, "four-bit products beside a plain layer's"),
    "load": (load, "memory and time of loading 10^9 weights"),
    "make": (random_models, "a checkpoint of random weights in a real model's shape"),
    "versus": (versus, "dense decoding beside transformers'"),
    "real": (real, "a real checkpoint by us and by transformers, in one file"),
    "adapter": (adapter, "transformers' generate with and without examples/transformers_vlm.py"),
}


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="bench", description="Measurements to repeat.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, words) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=words))
    arguments = parser.parse_args(argv)
    with command("bench"):
        COMMANDS[arguments.command][0].run(arguments)


if __name__ == "__main__":
    main()
