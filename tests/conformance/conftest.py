"""The implementation under test, as --impl names it."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import awq
import kernels
import model
import sparsevila

from .contracts import PROMISES
from .laws import Fault, Lab, wrong
from .oracle import INTERPRETED, ROUNDOFF

OURS = (kernels, model, awq, sparsevila)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ROUNDOFF}


def load_implementation(name: str | None) -> dict:
    """The operations that a module (or a Python file) defines itself; ours without a name.
    Raises: ValueError if there is no such module, or nothing in it."""
    ours = {op: getattr(m, op) for op in PROMISES for m in OURS if hasattr(m, op)}
    if name is None:
        return ours
    try:
        module = load_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever somebody's code does
        kind = type(error).__name__
        raise ValueError(f"--impl {name!r} cannot be imported: {kind}: {error}") from None
    theirs = {op: getattr(module, op) for op in PROMISES if hasattr(module, op)}
    theirs = {op: made for op, made in theirs.items() if made is not ours[op]}
    if not theirs:
        raise ValueError(f"--impl {name} defines none of {', '.join(PROMISES)}")
    return theirs


def load_file(path: Path) -> ModuleType:
    """Run a file. What it imports comes from its own folder first: a changed copy of our
    sparsevila.py meets the kernels.py beside it, not ours."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location("implementation_under_test", path)
    module = importlib.util.module_from_spec(spec)
    names = [ours.__name__ for ours in OURS if path.with_name(f"{ours.__name__}.py").exists()]
    hidden = {name: sys.modules.pop(name) for name in names}
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        sys.path.append(str(path.parent))  # for what is imported later, inside functions
        sys.modules |= hidden
    return module


def pytest_configure(config: pytest.Config) -> None:
    """Options that are wrong end pytest with one line."""
    names, device = config.getoption("impl_dtypes").split(","), config.getoption("impl_device")
    if unknown := [name for name in names if name not in DTYPES]:
        known = ", ".join(DTYPES)
        raise pytest.UsageError(f"--impl-dtypes: {unknown[0]!r} is none of {known}")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # no such device, or torch without it
        raise pytest.UsageError(f"--impl-device: {str(error).splitlines()[0]}") from None
    try:
        operations = load_implementation(config.getoption("impl"))
    except ValueError as error:
        raise pytest.UsageError(" ".join(str(error).split())) from None
    share = 0.1 if config.getoption("quick") else 1.0
    config.lab = Lab(operations, device, tuple(DTYPES[name] for name in names), share)
    config.faults = {}  # promise -> the faults found, one for each dtype that is wrong
    if config.getoption("impl") and config.option.tbstyle == "auto":
        config.option.tbstyle = "no"  # `pytest_terminal_summary` says it in a line each


def pytest_report_header() -> str | None:
    """What is not as usual."""
    if INTERPRETED:
        return "Triton's interpreter cuts bfloat16 off: results may be wrong by twice as much"
    return None


def usual_reasons(fault: Fault) -> list[str]:
    """Mistakes of mutants/ that give the same wrong number in the same place of this case, four at
    most."""
    from .mutants import mutants

    def rounded(words: str) -> str:
        return re.sub(r"-?\d+\.\d+(e[-+]\d+)?", lambda number: f"{float(number[0]):.4g}", words)

    ours, operation, reasons = load_implementation(None), fault.promise.operation, []
    for mutant in mutants():
        if mutant.operation == operation:
            lab = Lab(ours | {operation: mutant.implementation})
            words = wrong(fault.promise, lab, fault.case)
            if words and rounded(words) == rounded(fault.words):
                reasons.append(mutant.mistake)
    return reasons[:4]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """What is wrong with somebody's implementation: a few lines for each promise, in the order of
    computation, and what is most often the reason."""
    if not config.getoption("impl"):
        return
    line = terminalreporter.line
    for number, (promise, faults) in enumerate(config.faults.items()):
        if number == 0:
            terminalreporter.section("wrong, in the order of computation")
        line(str(promise))
        for fault in faults:
            line("    " + str(fault))
        if promise.law != "errors" and (reasons := usual_reasons(faults[0])):
            line("    the same number comes of: " + "; ".join(reasons))
    if config.faults:
        first = next(iter(config.faults)).operation
        line(f"Start with {first}: what comes after it may build on it.")
    for note in dict.fromkeys(config.lab.notes):
        line(f"note: {note}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """An implementation of which nothing passed is not all right."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("impl") and exitstatus == 0 and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def lab(pytestconfig: pytest.Config) -> Lab:
    return pytestconfig.lab


@pytest.fixture
def faults(pytestconfig: pytest.Config) -> dict[str, list[Fault]]:
    return pytestconfig.faults
