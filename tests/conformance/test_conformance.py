"""`pytest tests/conformance [--impl MODULE_OR_FILE]`: see README.md in this folder."""

import pytest

from .contracts import PROMISES
from .laws import hold

LISTED = [promise for promises in PROMISES.values() for promise in promises]


@pytest.mark.parametrize("promise", LISTED, ids=str)
def test_conformance(lab, faults, promise):
    """In every dtype, so that one that is refused or wrong hides nothing in the others."""
    if promise.operation not in lab.operations:
        pytest.skip(f"{promise.operation} not provided")
    if promise.law == "large" and lab.share < 1:
        pytest.skip("large cases are left out by --quick")
    found, absent = [], []
    dtypes = lab.dtypes if promise.dtypes else lab.dtypes[:1]
    for dtype in dtypes:
        try:
            hold(promise, lab, dtype)
        except NotImplementedError as error:
            absent.append(f"{dtype}: {error}")
        except AssertionError as fault:
            found.append(fault)
    if found:
        faults[promise] = found
        raise found[0]
    if len(absent) == len(dtypes):
        pytest.skip(f"{promise.operation} not provided in part: {absent[0]}")
