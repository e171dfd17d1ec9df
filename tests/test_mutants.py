"""The conformance suite rejects every mutant, in Python and through files, and accepts correct
implementations that are written differently. pytest's last lines say which check caught what."""

import pytest
from conformance import other
from conformance.check import compare
from conformance.checks import CHECKS, Lab, in_every_dtype
from conformance.conftest import load_implementation
from conformance.mutants import CORRECT, MUTANTS
from conformance.run import results_of

import model
import sparsevila

CASES = [(operation, mistake) for operation in MUTANTS for mistake in MUTANTS[operation]]
ACCEPTED = [(operation, "other.py", getattr(other, operation, None)) for operation in CHECKS]
ACCEPTED += [(operation, "mutants.py", CORRECT[operation]) for operation in CORRECT]
ACCEPTED = [case for case in ACCEPTED if case[2]]


def caught_by(operation: str, implementation) -> str | None:
    """The first check that rejects it."""
    lab = Lab(load_implementation(None) | {operation: implementation})
    for check in CHECKS[operation]:
        try:
            in_every_dtype(check, lab)
        except AssertionError:
            return f"{operation}: {check.__name__}"
    return None


def right_through_files(operation: str, implementation) -> bool:
    lines, well = compare(results_of({operation: implementation}))
    print("\n".join(lines))
    return well


@pytest.mark.parametrize("operation, mistake", CASES)
def test_every_mutant_is_caught(operation, mistake, record_property):
    check = caught_by(operation, MUTANTS[operation][mistake])
    record_property("mutant", (mistake, check))  # printed by conftest.py
    assert check is not None, f"no check sees: {mistake}"


# One run does not show a random order.
@pytest.mark.parametrize("operation, mistake", [c for c in CASES if "random order" not in c[1]])
def test_mutants_are_caught_through_files(operation, mistake):
    assert not right_through_files(operation, MUTANTS[operation][mistake])


def test_there_are_thirty_mutants_and_each_operation_has_some():
    assert len(CASES) >= 30 and MUTANTS.keys() == CHECKS.keys()


@pytest.mark.parametrize("operation, where, implementation", ACCEPTED)
def test_other_correct_implementations_are_accepted(operation, where, implementation):
    assert caught_by(operation, implementation) is None
    assert right_through_files(operation, implementation)


def test_a_session_on_other_kernels_is_accepted(monkeypatch):
    """The same session, every attention of the decoder and every choice by other.py."""

    def attention(q, k, v, **options):
        cache = other.RetrievalCache(1)
        return cache.attend(0, q, k, v)

    monkeypatch.setattr(model, "decode_attention", other.decode_attention)
    monkeypatch.setattr(model, "causal_attention", attention)
    for name in ("attention_colsum", "gather_tokens", "select_tokens", "keep_count"):
        monkeypatch.setattr(sparsevila, name, getattr(other, name))
    assert caught_by("SparseVILA", sparsevila.SparseVILA) is None
    assert right_through_files("SparseVILA", sparsevila.SparseVILA)


def test_ours_is_accepted_through_files():
    lines, well = compare(results_of(load_implementation(None)))
    assert well and sum(line.endswith(" right") for line in lines) == len(CHECKS), lines
