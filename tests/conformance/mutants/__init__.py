"""Wrong implementations of the operations, one mistake each: the suite must reject all of them.
`pytest tests/test_mutants.py -s` says which promise rejected which.

first.py was written beside the checks, with a plain implementation in which one thing at a time can
be changed. The rounds were written from the docstrings alone, without a look at the checks, as
ports of what went wrong in public code and of what a hurried reader of the docstrings would miss;
README.md tells how many were rejected at first sight.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import first, round_1, round_2, round_3, round_4, round_5, round_6
from .first import CORRECT  # noqa: F401 - the plain implementations, nothing changed

ROUNDS = {
    "first": first.MUTANTS, "round 1": round_1.MUTANTS, "round 2": round_2.MUTANTS,
    "round 3": round_3.MUTANTS, "round 4": round_4.MUTANTS, "round 5": round_5.MUTANTS,
    "round 6": round_6.MUTANTS,
}  # fmt: skip


class Mutant(NamedTuple):
    round: str
    operation: str
    mistake: str
    implementation: Any

    def __str__(self) -> str:
        return f"{self.round}, {self.operation}: {self.mistake}"


def mutants() -> Iterator[Mutant]:
    for name, operations in ROUNDS.items():
        for operation, mistakes in operations.items():
            for mistake, implementation in mistakes.items():
                yield Mutant(name, operation, mistake, implementation)
