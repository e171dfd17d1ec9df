"""What holds for every function, whatever it computes, and how a promise is held against somebody's
implementation: on cases that are written down, and on cases drawn at random."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .check import bits
from .recipe import Case, Fields, Maker, drawn, simplest, simplified, told


@dataclass
class Lab:
    """The implementation under test, and where and on what it is tested. share: of the cases
    that is tried."""

    operations: dict[str, Any]
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    share: float = 1.0
    notes: list[str] = field(default_factory=list)  # what is not wrong, but worth knowing


@dataclass(frozen=True, eq=False)
class Promise:
    """One law of one operation. check: raises AssertionError, with words, for a case that it fails;
    written: cases beside the `count` random ones, what differs from the simplest."""

    operation: str
    law: str
    check: Callable[[Lab, Case], None]
    fields: Fields = field(default_factory=dict)
    fits: Callable[[SimpleNamespace], bool] = lambda c: True
    count: int = 0
    written: Sequence[Case] = ({},)
    dtypes: bool = True  # whether it is tried in every dtype

    def __str__(self) -> str:
        return f"{self.operation}: {self.law}"

    def cases(self, dtype: str, share: float) -> list[Case]:
        fields = self.fields | {"dtype": (dtype,)}
        base, seed = simplest(fields), hash_of(f"{self} {dtype}")
        written = [base | {"seed": number} | case for number, case in enumerate(self.written)]
        cases = [*written, *drawn(fields, self.fits, seed, self.count)]
        return cases[:: round(1 / share)]


def hash_of(text: str) -> int:
    """The same in every run, which Python's hash is not."""
    return int.from_bytes(text.encode(), "big") % 1_000_003


@dataclass
class Fault(AssertionError):
    """A case that fails, made as simple as possible, and what is wrong with it."""

    promise: Promise
    case: Case
    words: str
    failed: int
    tried: int

    def __str__(self) -> str:
        if self.promise.law == "errors":
            return f"{self.failed} of {self.tried} refusals are missing: {self.words}"
        dtype = f", {self.case['dtype']}" if self.promise.dtypes else ""
        many = f"{self.failed} of {self.tried} cases are wrong. The simplest found: "
        return f"{many}{told(self.case, self.promise.fields)}{dtype}: {self.words}"


def hold(promise: Promise, lab: Lab, dtype: torch.dtype, *, report: bool = True) -> None:
    """Try a promise in one dtype. Raises: Fault; NotImplementedError, which is the implementation's
    word for "not provided", if it says so of every case. report: go on after a fault, and look for
    its simplest case."""
    cases, tried, failed = promise.cases(str(dtype).removeprefix("torch."), lab.share), 0, []
    refusal = None
    for case in cases:
        try:
            words = wrong(promise, lab, case)
        except NotImplementedError as error:
            refusal = error
            continue
        tried += 1
        if words:
            failed.append((case, words))
            if not report or len(failed) == 20:
                break
    if refusal and not tried:
        raise refusal
    if refusal:
        lab.notes.append(f"{promise}: not provided in part: {refusal}")
    if not failed:
        return
    case, words = failed[0]
    if promise.law == "errors":  # each is one of its own
        words = "; ".join(f"{case['wrong']}: {words}" for case, words in failed)
    elif report:
        case = simplified(case, promise.fields, lambda c: fails(promise, lab, c))
        words = wrong(promise, lab, case) or words
    raise Fault(promise, case, words, len(failed), tried)


def fails(promise: Promise, lab: Lab, case: Case) -> bool:
    try:
        return promise.fits(SimpleNamespace(**case)) and wrong(promise, lab, case) is not None
    except NotImplementedError:
        return False


def wrong(promise: Promise, lab: Lab, case: Case) -> str | None:
    """What is wrong with a case; whatever an implementation raises is wrong as well."""
    try:
        promise.check(lab, case)
    except NotImplementedError as error:  # torch's own is about a dtype that is promised
        if "not implemented for '" not in str(error):
            raise
        return f"raises NotImplementedError: {error}"
    except AssertionError as error:
        return str(error) or "an assertion of its own failed"
    except Exception as error:
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


# --- comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a result must be: value, in float64 where it is rounded; allowed: the absolute error,
    None if there is none; dtype: of the result."""

    value: Tensor
    allowed: Tensor | None = None
    dtype: torch.dtype | None = None


def near(got: Any, expected: Expected, what: str) -> None:
    """Raise AssertionError unless a result is what is expected."""
    assert isinstance(got, Tensor), f"{what} must be a tensor, got {type(got).__name__}"
    value, dtype = expected.value, expected.dtype or expected.value.dtype
    assert got.dtype == dtype, f"{what} must be {dtype}, got {got.dtype}"
    assert got.shape == value.shape, (
        f"{what} must have shape {tuple(value.shape)}, got {tuple(got.shape)}"
    )
    got = got.detach().cpu()
    if expected.allowed is None:
        off = bits(got) != bits(value.to(dtype))
        allowed = torch.zeros(())
    else:
        assert not got.isnan().any() or value.isnan().any(), f"{what} has NaN"
        got, allowed = got.double(), expected.allowed.double()
        # Of two infinities there is no difference.
        off = (got != value) & (((got - value).abs() > allowed) | got.isinf())
    if off.any():
        at = int(off.flatten().int().argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), value.shape))
        limit = float(allowed.expand(value.shape).flatten()[at])
        raise AssertionError(
            f"{what} is {got.flatten()[at].item():.9g} in place of "
            f"{value.flatten()[at].item():.9g} at {index}, allowed are {limit:.3g}; "
            f"{int(off.sum())} of {off.numel()} are wrong"
        )


def same(got: Any, expected: Any, what: str) -> None:
    assert got == expected, f"{what} must be {expected}, got {got}"


def played(steps: Sequence[tuple], act: Callable) -> None:
    """Act step by step; what is wrong is told with the steps that came before."""
    for number, step in enumerate(steps):
        try:
            act(*step)
        except AssertionError as error:
            told, *before = (" ".join(map(str, s)) for s in (step, *steps[:number]))
            after = f" (after {' -> '.join(before)})" if before else ""
            raise AssertionError(f"{told}{after}: {error}") from None


# --- functions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """The contract of a function.

    results: names of what it returns. arguments: makes the named arguments of a case. expected:
    what the results must be, by name, for arguments that lie on the CPU and are contiguous; `got`
    are the results, for what is promised relative to each other, or None for what must hold of any.
    refused: in words, what to change in right arguments so that ValueError is promised.
    """

    operation: str
    results: Sequence[str]
    fields: Fields
    arguments: Callable[[SimpleNamespace, Maker], dict[str, Any]]
    expected: Callable[[SimpleNamespace, dict[str, Tensor] | None], dict[str, Expected]]
    refused: dict[str, Callable[[dict], dict]] = field(default_factory=dict)
    refused_on: Case = field(default_factory=dict)  # a case in which all these can be told
    fits: Callable[[SimpleNamespace], bool] = lambda c: True
    written: Sequence[Case] = ({},)
    large: Fields | None = None  # the fields of a few large cases
    large_fits: Callable[[SimpleNamespace], bool] = lambda c: True
    written_large: Sequence[Case] = ()
    memory_of: dict[str, Sequence[str]] = field(default_factory=dict)  # argument -> its LAYOUTS
    counts: tuple[int, int, int] = (120, 40, 6)
    dtypes: bool = True
    positional: int = 1  # arguments that are given by place
    detached: bool = False  # no gradients flow
    per_view: bool = False  # each result is one tensor for every view

    def promises(self) -> list[Promise]:
        memory = {f"{name} in memory": layouts for name, layouts in self.memory_of.items()}
        every = ("nothing", *self.refused)
        wrong = [self.refused_on | {"wrong": words} for words in every]
        values = Promise(
            self.operation, "values", self.values, self.fields, self.fits,
            self.counts[0], self.written, self.dtypes,
        )  # fmt: skip
        listed = [
            values,
            replace(
                values, law="memory", check=self.memory, fields=self.fields | memory,
                count=self.counts[1],
            ),
        ]  # fmt: skip
        if self.large:
            large = replace(
                values, law="large", fields=self.fields | self.large, fits=self.large_fits,
                count=self.counts[2], written=self.written_large,
            )  # fmt: skip
            listed.append(large)
        if self.detached:
            listed.append(replace(values, law="gradients", check=self.gradients, count=0))
        errors = replace(
            values, law="errors", check=self.errors, count=0, written=wrong,
            fields=self.fields | {"wrong": every}, dtypes=False,
        )  # fmt: skip
        return [*listed, errors]

    def call(self, lab: Lab, arguments: dict) -> dict[str, Tensor]:
        """The results by name. Those of several views are numbered."""
        return self.named(self.apply(lab.operations[self.operation], arguments))

    def apply(self, implementation: Callable, arguments: dict) -> Any:
        """What it returns. The first arguments need not have the names that they have here."""
        first = list(arguments)[: self.positional]
        rest = {name: x for name, x in arguments.items() if name not in first}
        return implementation(*(arguments[name] for name in first), **rest)

    def named(self, result: Any) -> dict[str, Any]:
        """Results by name; of several views as NAME.0, NAME.1 and so on."""
        results = result if len(self.results) > 1 else (result,)
        assert isinstance(results, (tuple, list)) and len(results) == len(self.results), (
            f"must return {', '.join(self.results)}, got {type(result).__name__}"
        )
        flat = {}
        for name, value in zip(self.results, results):
            views = {f"{name}.{i}": x for i, x in enumerate(value)} if self.per_view else {}
            flat |= views or {name: value}
        return flat

    def compare(self, arguments: dict, got: dict[str, Tensor]) -> None:
        expected = self.expected(SimpleNamespace(**plain(arguments)), got)
        assert len(got) == len(expected), f"{len(got)} results in place of {len(expected)}"
        for name, right in expected.items():
            near(got[name], right, name)

    def values(self, lab: Lab, case: Case) -> None:
        """The results have the shape, the dtype and the values that are promised."""
        arguments = self.arguments(SimpleNamespace(**case), Maker(case, lab.device))
        self.compare(arguments, self.call(lab, arguments))

    def memory(self, lab: Lab, case: Case) -> None:
        """Tensors of any strides are read and left as they are; results are new tensors; the same
        input gives the same bits; what was changed in place is read anew."""
        made = Maker(case, lab.device)
        arguments = self.arguments(SimpleNamespace(**case), made)
        before = {name: bits(buffer).clone() for name, buffer in made.buffers.items()}
        inputs = {buffer.untyped_storage().data_ptr() for buffer in made.buffers.values()}
        first = self.call(lab, arguments)
        first_bits = {name: bits(x).clone() for name, x in first.items() if isinstance(x, Tensor)}
        self.compare(arguments, first)
        for name, buffer in made.buffers.items():
            assert torch.equal(bits(buffer), before[name]), f"the argument {name} was changed"
        for name, x in first.items():
            if isinstance(x, Tensor) and x.numel():
                assert x.untyped_storage().data_ptr() not in inputs, (
                    f"{name} shares an input's memory"
                )
                assert x.is_contiguous(), f"{name} must be contiguous, got strides {x.stride()}"
        second = self.call(lab, arguments)
        for name, right in first_bits.items():
            assert torch.equal(bits(second[name]), right), f"{name} differs in a second call"
        for x in first.values():
            if isinstance(x, Tensor) and not x.is_inference():
                x.zero_()  # results are the caller's own
        third = self.call(lab, arguments)
        for name, right in first_bits.items():
            assert torch.equal(bits(third[name]), right), (
                f"{name} is wrong once a result was changed"
            )
            assert torch.equal(bits(second[name]), right), (
                f"{name} shares memory with another result"
            )
        other = Maker(case | {"seed": case["seed"] + 1}, lab.device)
        self.arguments(SimpleNamespace(**other.case), other)
        for name, buffer in made.buffers.items():
            if buffer.shape != other.buffers[name].shape:
                return  # sizes depend on the seed
            buffer.copy_(other.buffers[name])
        try:
            self.compare(arguments, self.call(lab, arguments))
        except AssertionError as error:
            raise AssertionError(f"after a change in place: {error}") from None
        for name, right in first_bits.items():
            assert torch.equal(bits(second[name]), right), f"{name} is changed by a later call"

    def gradients(self, lab: Lab, case: Case) -> None:
        """None flow, though the first argument asks for them."""
        arguments = self.arguments(SimpleNamespace(**case), Maker(case, lab.device))
        name = next(iter(arguments))
        arguments[name] = arguments[name].detach().requires_grad_()
        for result, x in self.call(lab, arguments).items():
            assert not x.requires_grad, f"gradients flow through {result}"

    def errors(self, lab: Lab, case: Case) -> None:
        """What the docstring refuses raises ValueError, and arguments are left as they are."""
        made = Maker(case, lab.device)
        arguments = self.arguments(SimpleNamespace(**case), made)
        before = {name: bits(buffer).clone() for name, buffer in made.buffers.items()}
        act = self.refused.get(case["wrong"], lambda right: right)
        refused(case["wrong"], lambda: self.call(lab, act(arguments)))
        for name, buffer in made.buffers.items():
            assert torch.equal(bits(buffer), before[name]), f"the argument {name} was changed"


def refused(wrong: str, act: Callable, error: type[Exception] = ValueError) -> None:
    """Raise AssertionError unless an act raises what is promised (nothing if nothing is wrong)."""
    try:
        act()
    except NotImplementedError:
        raise
    except Exception as raised:
        kind, words = type(raised).__name__, str(raised).split("\n")[0]
        right = wrong != "nothing" and isinstance(raised, error)
        assert right, f"{error.__name__} is promised, raised is {kind}: {words[:200]}"
    else:
        assert wrong == "nothing", f"{error.__name__} is promised, nothing was raised"


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors on the CPU, contiguous; the rest as it is."""
    return {
        name: [x.cpu().contiguous() for x in value]
        if isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value)
        else value.cpu().contiguous()
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
