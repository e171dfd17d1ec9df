"""`pytest tests/conformance [--impl MODULE_OR_FILE]`: see README.md in this folder."""

import pytest

from .checks import CHECKS

CASES = [(operation, check) for operation, group in CHECKS.items() for check in group]


@pytest.mark.parametrize(
    "operation, check", CASES, ids=[f"{operation}: {check.__name__}" for operation, check in CASES]
)
def test_conformance(lab, operation, check):
    if operation not in lab.operations:
        pytest.skip(f"{operation} not provided")
    try:
        check(lab)
    except NotImplementedError as error:
        pytest.skip(f"{operation} not provided in part: {error}")
