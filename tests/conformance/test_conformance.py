"""`pytest tests/conformance [--impl MODULE_OR_FILE]`: see README.md in this folder."""

from dataclasses import replace

import pytest

from .checks import CHECKS

CASES = [(operation, check) for operation, group in CHECKS.items() for check in group]


@pytest.mark.parametrize(
    "operation, check", CASES, ids=[f"{operation}: {check.__name__}" for operation, check in CASES]
)
def test_conformance(lab, operation, check):
    if operation not in lab.operations:
        pytest.skip(f"{operation} not provided")
    refused = []
    for dtype in lab.dtypes:  # apart, so that one that is refused hides nothing in the others
        try:
            check(replace(lab, dtypes=(dtype,)))
        except NotImplementedError as error:
            assert "not implemented for '" not in str(error), f"{dtype}: {error}"  # torch's own
            refused.append(f"{dtype}: {error}")
    if len(refused) == len(lab.dtypes):
        pytest.skip(f"{operation} not provided in part: {refused[0]}")
