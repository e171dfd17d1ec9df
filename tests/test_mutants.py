"""The conformance suite rejects every mutant, and accepts two correct implementations.

`pytest tests/test_mutants.py -s` prints which check caught which mutant."""

import pytest
from conformance import other
from conformance.checks import CHECKS, Lab
from conformance.conftest import load_implementation
from conformance.mutants import MUTANTS


def caught_by(operations: dict) -> str | None:
    """The first check that rejects these operations."""
    lab = Lab(load_implementation(None) | operations)
    for operation in operations:
        for check in CHECKS[operation]:
            try:
                check(lab)
            except Exception as error:  # a mutant may also crash
                first = str(error).split("\n")[0]
                return f"{operation}: {check.__name__} ({first[:90]})"
    return None


@pytest.mark.parametrize("mistake", MUTANTS)
def test_every_mutant_is_caught(mistake, record_property):
    check = caught_by(MUTANTS[mistake])
    print(f"\n{mistake:48} {check}", end="")
    assert check is not None, f"no check sees: {mistake}"


def test_there_are_thirty_mutants_and_each_operation_has_some():
    assert len(MUTANTS) >= 30
    changed = {operation for operations in MUTANTS.values() for operation in operations}
    assert changed == CHECKS.keys()


@pytest.mark.parametrize("operation", CHECKS)
def test_another_correct_implementation_is_accepted(operation):
    assert caught_by({operation: getattr(other, operation)}) is None
