"""The conformance suite rejects every mutant, and accepts right implementations that are written
differently. pytest's last lines say which promise rejected what."""

from functools import lru_cache

import pytest
from conformance import check, online, other, recipe
from conformance.conftest import load_implementation
from conformance.contracts import PROMISES
from conformance.laws import Fault, Lab, hold
from conformance.mutants import CORRECT, Mutant, mutants
from conformance.run import case_by_case, results_of

import model
import sparsevila

OURS = load_implementation(None)
SEEN_IN_FILES = ("values", "large", "conversations")  # laws; the others need calls in Python
NOT_IN_FILES = {  # though these laws see them
    # The order of rows in `packed`, and when `relevance` is given back.
    "chosen rows packed behind the text", "text packed before the visual rows",
    "relevance gone after packing",
    # Refused calls, changed arguments, draws, stop tokens, other positions, no turn to forget.
    "truncate beyond the end does nothing", "refused truncate ends the answer",
    "int32 codes shifted in place", "generator of a seed goes on",
    "result written over the query", "answer's rows add to the question's relevance",
    "stop_ids of an earlier question stay", "original: question follows the last kept",
    "forget without a turn fails",
    # What is told of an answer beside its tokens.
    "pieces lose their leading space", "on_text gets the text so far",
    "generated tokens in kv_bytes_per_token", "four bytes a number in every dtype",
    "an answer's timings in seconds", "last piece of text not handed over",
    "evicted only at the next question", "caller's picture shrunk in place",
    # Two calls of one shape; cases that are too large for a file, or that rounding may decide.
    "buffers of the first capture", "blocks of no rows", "zero divided in float16",
    "one sort by view number plus salience",
}  # fmt: skip
ACCEPTED = [
    (name, operation, implementation)
    for name, style in (("other.py", vars(other)), ("online.py", vars(online)), ("plain", CORRECT))
    for operation, implementation in style.items()
    if operation in PROMISES
]


@pytest.fixture(autouse=True, scope="module")
def numbers_are_kept():
    """Every mutant gets the same cases, of which the first few mostly do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "bell", lru_cache(512)(recipe.bell))
        yield


def rejected(operation: str, implementation, laws: tuple[str, ...] = ()) -> Fault | None:
    """The first fault, dtype by dtype. laws: the others are left out."""
    lab = Lab(OURS | {operation: implementation})
    for dtype in lab.dtypes:
        for promise in PROMISES[operation]:
            if (promise.dtypes or dtype == lab.dtypes[0]) and (not laws or promise.law in laws):
                try:
                    hold(promise, lab, dtype, report=False)
                except Fault as fault:
                    return fault
    return None


def right_through_files(operation: str, implementation) -> bool:
    lines, well = check.compare(results_of({operation: implementation}))
    print("\n".join(lines))
    return well


def wrong_in_a_file(operation: str, implementation) -> bool:
    """Whether a case of the files gives it away; those behind the first that does are left out."""
    _, vectors = check.expectations()
    return any(
        check.fault(results.get(place["tensor"]), place, vectors)
        for case, results in case_by_case({operation: implementation})
        for place in case["outputs"].values()
    )


@pytest.mark.parametrize("mutant", list(mutants()), ids=str)
def test_every_mutant_is_rejected(mutant: Mutant, record_property):
    fault = rejected(mutant.operation, mutant.implementation)
    record_property("mutant", (str(mutant), fault and str(fault.promise)))  # for conftest.py
    assert fault is not None, f"no promise rejects: {mutant}"
    # Rejected for what it computes, not for how it is called.
    assert "keyword argument" not in fault.words and "positional" not in fault.words, fault.words
    if fault.promise.law in SEEN_IN_FILES and mutant.mistake not in NOT_IN_FILES:
        assert wrong_in_a_file(mutant.operation, mutant.implementation)


def test_there_are_enough_mutants_of_every_operation():
    counts = [sum(m.operation == operation for m in mutants()) for operation in PROMISES]
    assert min(counts) >= 5 and sum(counts) >= 240


@pytest.mark.parametrize("style, operation, implementation", ACCEPTED)
def test_other_right_implementations_are_accepted(style, operation, implementation):
    """All but errors, which they do not care for."""
    laws = tuple(p.law for p in PROMISES[operation] if p.law != "errors")
    if style == "plain":
        laws = ("values",)
    fault = rejected(operation, implementation, laws)
    assert fault is None, str(fault)
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
    fault = rejected("SparseVILA", sparsevila.SparseVILA)
    assert fault is None, str(fault)
    assert right_through_files("SparseVILA", sparsevila.SparseVILA)


def test_ours_is_accepted_through_files():
    lines, well = check.compare(results_of(OURS))
    assert well and sum(line.endswith(" right") for line in lines) == len(PROMISES), lines
