"""The implementation under test, as --impl names it."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from .checks import CHECKS, Lab


def load_implementation(name: str | None) -> dict:
    """The operations that a module (or a Python file) defines; ours without a name."""
    if name is None:
        import awq
        import kernels
        import sparsevila

        modules = [kernels, awq, sparsevila]
    elif name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or not Path(name).is_file():
            raise pytest.UsageError(f"--impl: no file {name}")
        modules = [importlib.util.module_from_spec(spec)]
        sys.modules[spec.name] = modules[0]
        spec.loader.exec_module(modules[0])
    else:
        try:
            modules = [importlib.import_module(name)]
        except ModuleNotFoundError as error:
            raise pytest.UsageError(f"--impl: {error}") from None
    operations = {op: getattr(m, op) for op in CHECKS for m in modules if hasattr(m, op)}
    if not operations:
        raise pytest.UsageError(f"--impl {name} defines none of {', '.join(CHECKS)}")
    return operations


@pytest.fixture(scope="session")
def lab(request) -> Lab:
    option = request.config.getoption
    dtypes = tuple(getattr(torch, name) for name in option("impl_dtypes").split(","))
    return Lab(load_implementation(option("impl")), option("impl_device"), dtypes)
