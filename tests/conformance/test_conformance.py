"""`pytest tests/conformance [--impl MODULE_OR_FILE]`: see README.md in this folder."""

import pytest

from .checks import CHECKS, in_every_dtype

CASES = [(operation, check) for operation, group in CHECKS.items() for check in group]


@pytest.mark.parametrize(
    "operation, check", CASES, ids=[f"{operation}: {check.__name__}" for operation, check in CASES]
)
def test_conformance(lab, operation, check):
    if operation not in lab.operations:
        pytest.skip(f"{operation} not provided")
    refused = in_every_dtype(check, lab)
    if len(refused) == len(lab.dtypes):
        pytest.skip(f"{operation} not provided in part: {refused[0]}")
