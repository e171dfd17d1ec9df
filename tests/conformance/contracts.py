"""What every function promises: what its cases are drawn from, what its results must be, what it
refuses. laws.py holds that against an implementation; the promises are those of the docstrings in
kernels.py, awq.py and sparsevila.py."""

import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import cache, conversation, oracle
from .laws import Expected, Function, Lab, Promise, refused, same
from .oracle import ROUNDOFF, STEP, U16, Attention, gamma
from .recipe import LAYOUTS, SIZES, Case, Maker

PROMISES: dict[str, list[Promise]] = {}  # operation -> its laws, in the order of computation
FUNCTIONS: dict[str, Function] = {}


def contract(operation: str, *results: str, **promised: Any) -> None:
    function = FUNCTIONS[operation] = Function(operation, results, **promised)
    PROMISES[operation] = function.promises()


def given(**values: Any) -> dict[str, Any]:
    """Named arguments; those that are None are left out, so that the default is met."""
    return {name: value for name, value in values.items() if value is not None}


def anyhow(*names: str) -> dict[str, tuple[str, ...]]:
    """These arguments may lie in memory in any way."""
    return dict.fromkeys(names, LAYOUTS)


def change(name: str, by: Any) -> Any:
    """Arguments of which one is changed."""
    return lambda arguments: arguments | {name: by(arguments[name])}


def refusals(
    shapes: dict[str, str], dtypes: dict[str, tuple[str, ...]], bound: str = ""
) -> dict[str, Callable[[dict], dict]]:
    """Arguments that do not fit, by words, as they follow from the shapes of a docstring: a tensor
    with one more along an axis that others have as well (or that is bound by something else), with
    one where it would be broadcast, with an axis more or less, in another dtype."""
    wrong = {}
    for name, axes in shapes.items():
        letters = axes.split()
        for number, letter in enumerate(letters):
            axis, shared = number - len(letters), sum(letter in s.split() for s in shapes.values())
            if letter != "..." and (shared > 1 or letter in bound):
                wrong[f"{name} with one more {letter}"] = change(
                    name, lambda x, a=axis: torch.cat([x, x.narrow(a, 0, 1)], a)
                )
                if letter != "1" and (letter != "G" or shared > 1):
                    wrong[f"{name} with one {letter}"] = change(
                        name, lambda x, a=axis: x.narrow(a, 0, 1)
                    )
        if "..." not in letters:
            wrong[f"{name} with an axis less"] = change(name, lambda x: x[0])
            wrong[f"{name} with an axis more"] = change(name, lambda x: x[None])
        for dtype in dtypes.get(name, ()):
            wrong[f"{name} in {dtype}"] = change(name, lambda x, d=dtype: in_another(x, d))
    return wrong


def in_another(x: Tensor, dtype: str) -> Tensor:
    """x in this dtype; if it has it already, in one that no argument may have."""
    other = getattr(torch, dtype)
    return x.to(torch.float64 if x.dtype == other else other)


OTHERS = ("float16", "float64", "int64")  # dtypes that a single tensor must not have


# --- attention ------------------------------------------------------------------------------------

SCORES = {  # kind of scores: values of q and of k, and the size of both
    "ordinary": ("bell", "bell", 1),
    "of one sign": ("positive", "positive", 1),
    "rising": ("positive", "rising", 1),  # a running maximum changes with every block
    "falling": ("positive", "falling", 1),
    "sink": ("positive", "sink", 1),  # one key far above the others, which add up
    "heavy": ("heavy", "heavy", 0.5),
    "large": ("bell", "bell", 8),
    "tied": ("levels", "levels", 1),
    "equal": ("bell", "zero", 1),
    "beyond float16": ("positive", "positive", 40),  # their sums of products
    "far beyond float16": ("positive", "rising", 100),  # the scores themselves
    "blind": ("bell", "bell", 1),  # some rows have scores of -inf only
}
HEADS = {
    "B": (1, 2, 3, 5), "G": (1, 2, 3), "group": (1, 2, 3, 4, 5, 8, 17, 32),
    "D": (8, 16, 1, 3, 20, 33, 64, 72, 80, 96, 100, 128, 192, 256),
    "scale": (None, 1.0, 0.01, 0.0, 3.0, -0.5), "scores": tuple(SCORES),
}  # fmt: skip
ATTENTION = HEADS | {"M": SIZES, "N": SIZES, "causal": (False, True)}
LARGE_ATTENTION = {
    "B": (1, 2, 5, 70), "M": (1, 3, 40, 300, 520, 700, 1100, 2500),
    "N": (1, 40, 700, 3000, 5001, 20_000, 70_000),
}  # fmt: skip


def queries_and_keys(c: SimpleNamespace, make: Maker, M: int, N: int) -> tuple[Tensor, Tensor]:
    of_q, of_k, size = SCORES[c.scores]
    q = make("q", (c.B, c.G * c.group, M, c.D), of_q, size)
    k = make("k", (c.B, c.G, N, c.D), of_k, size)
    if c.scores == "blind":
        q, k = q.clone(), k.clone()
        H = q.shape[1]  # not the same rows in every head
        rows = (torch.arange(M) + torch.arange(H)[:, None]) % 3 == (M > 1)
        q[:, rows], k[..., 0] = 0, 1
        q[..., 0] = q[..., 0].masked_fill(rows.to(q.device), -math.inf)
        q, k = make.keep("q", q), make.keep("k", k)
    return q, k


def heads_fit(c: SimpleNamespace) -> bool:
    """No infinity times 0, and scores whose rounding in float32 is small."""
    of_k, size = SCORES[c.scores][1:]
    scale = c.D**-0.5 if c.scale is None else abs(c.scale)
    score = scale * c.D * size**2 * {"rising": 8, "falling": 8, "sink": 5}.get(of_k, 1)
    doubt = score * gamma(c.D + 2) < (0.2 if c.scores == "far beyond float16" else 5e-3)
    return doubt and (c.scores != "blind" or c.scale not in (0.0, -0.5))


def attention_arguments(c: SimpleNamespace, make: Maker) -> dict:
    q, k = queries_and_keys(c, make, c.M, c.N)
    options = given(causal=c.causal or None, scale=c.scale)
    if getattr(c, "lse", None) == "given":
        own = Attention(q.cpu(), k.cpu(), c.causal, c.scale).lse.float()
        options["lse"] = make.keep("lse", own)
    return {"q": q, "k": k} | options


def truth_of(a: SimpleNamespace) -> Attention:
    options = {name: x for name, x in vars(a).items() if name in ("causal", "scale", "lse")}
    return Attention(a.q, a.k, **options)


def expected_lse(a: SimpleNamespace, got: Any) -> dict[str, Expected]:
    truth = truth_of(a)
    return {"lse": Expected(truth.lse, truth.lse_error, torch.float32)}


def expected_colsum(a: SimpleNamespace, got: Any) -> dict[str, Expected]:
    return {"colsum": Expected(*truth_of(a).colsum(), torch.float32)}


QK, QK_DTYPES = {"q": "B H M D", "k": "B G N D"}, {"q": OTHERS, "k": OTHERS}
REFUSED_HEADS = refusals(QK, QK_DTYPES, "HG") | {
    "no keys": change("k", lambda k: k[:, :, :0]),
    "no rows": change("q", lambda q: q[:, :, :0]),
    "integers": lambda a: a | {name: a[name].to(torch.int64) for name in ("q", "k")},
    "float64": lambda a: a | {name: a[name].double() for name in ("q", "k")},
}
SMALL_HEADS = {"B": 2, "G": 2, "group": 2, "M": 3, "N": 5}
WRITTEN = (
    {},
    {"M": 5, "N": 3, "causal": True},  # the first rows see nothing
    {"G": 2, "group": 2, "M": 7, "N": 20, "causal": True},
    {"G": 2, "group": 3, "M": 40, "N": 129, "scores": "rising", "D": 64},
    {"M": 31, "N": 70, "scores": "blind"},
    {"M": 3, "N": 9, "scores": "far beyond float16"},
    {"M": 9, "N": 20, "causal": True, "scores": "far beyond float16"},
    {"M": 5, "N": 9, "D": 64, "scale": 0.01, "scores": "beyond float16"},
)


def small_attention(c: SimpleNamespace) -> bool:
    return heads_fit(c) and c.B * c.G * c.group * c.M * c.N <= 30_000


def large_attention(c: SimpleNamespace) -> bool:
    work = c.B * c.G * c.group * c.M * c.N
    return heads_fit(c) and 100_000 < work <= 2_000_000 and work // min(c.M, c.N) * c.D <= 4_000_000


contract(
    "attention_lse", "lse", positional=2,
    fields=ATTENTION, large=LARGE_ATTENTION, memory_of=anyhow("q", "k"), written=WRITTEN,
    written_large=(
        {"N": 70_000}, {"M": 700, "N": 700, "causal": True}, {"N": 5001, "scores": "sink"},
        {"M": 2500, "N": 40}, {"B": 70, "M": 3, "N": 700}, {"N": 70_000, "group": 17},
    ),
    fits=small_attention, large_fits=large_attention,
    arguments=attention_arguments, expected=expected_lse, refused=REFUSED_HEADS,
    refused_on=SMALL_HEADS,
)  # fmt: skip
contract(
    "attention_colsum", "colsum", positional=2,
    fields=ATTENTION | {"lse": ("none", "given")}, large=LARGE_ATTENTION,
    memory_of=anyhow("q", "k") | {"lse": LAYOUTS[:-1]},
    written=(*WRITTEN, {"M": 5, "N": 3, "causal": True, "lse": "given"}),
    written_large=(
        {"N": 70_000}, {"M": 1100, "N": 700, "causal": True, "scores": "of one sign"},
        {"M": 520, "N": 3000, "scores": "sink"}, {"M": 2500, "N": 40, "scores": "rising"},
        {"B": 70, "M": 3, "N": 700}, {"N": 70_000, "group": 17},
    ),
    fits=small_attention, large_fits=large_attention,
    arguments=attention_arguments, expected=expected_colsum,
    refused_on=SMALL_HEADS | {"lse": "given"},
    refused=REFUSED_HEADS | refusals(QK | {"lse": "B H M"}, {"lse": OTHERS}, "HG"),
)  # fmt: skip


def lse_is_used(lab: Lab, case: Case) -> None:
    """Twice the rows' exponential halves the sums. Whoever does not use it gets the sums right as
    well, for an lse that is; that is noted."""
    function, mine = FUNCTIONS["attention_colsum"], lab.operations["attention_colsum"]
    arguments = function.arguments(SimpleNamespace(**case), Maker(case))
    arguments = {n: x.to(lab.device) if isinstance(x, Tensor) else x for n, x in arguments.items()}
    arguments["lse"] = arguments["lse"] + math.log(2)
    half = function.apply(mine, arguments)
    del arguments["lse"]
    if torch.equal(half, function.apply(mine, arguments)):
        lab.notes.append("attention_colsum does not use lse=: right, but it saves no pass")


PROMISES["attention_colsum"].append(
    Promise(
        "attention_colsum", "lse", lse_is_used, ATTENTION | {"lse": ("given",)},
        written=({"M": 9, "N": 20},),
    )
)  # fmt: skip

DECODE = HEADS | {
    "capacity": SIZES, "read": ("all", "half", "all but one", "one"),
    "length": ("none", "int", "tensor", "int32", "int16", "uint8"),
    "v": ("bell", "positive", "heavy", "beyond float16", "tiny"),
}  # fmt: skip


def decode_arguments(c: SimpleNamespace, make: Maker) -> dict:
    """Rows from the length on are poison. A length that is a tensor differs with the seed."""
    q, k = queries_and_keys(c, make, 1, c.capacity)
    size = {"tiny": 2.0**-20, "beyond float16": 2.0**17}.get(c.v, 1)
    size = 2.0**12 if size > 1 and c.dtype == "float16" else size
    kind = c.v if c.v in ("positive", "heavy") else "bell"
    v = make("v", tuple(k.shape), kind, size)
    if c.length == "none":
        return given(q=q, k=k, v=v, scale=c.scale)
    rows = {"all": c.capacity, "half": c.capacity // 2, "all but one": c.capacity - 1, "one": 1}
    length = max(1, rows[c.read] - (c.seed % 2 if c.length != "int" else 0))
    k, v = k.clone(), v.clone()
    k[:, :, length:], v[:, :, length:] = math.nan, math.nan
    k, v = make.keep("k", k), make.keep("v", v)
    if c.length != "int":
        dtype = torch.int64 if c.length == "tensor" else getattr(torch, c.length)
        length = make.keep("length", torch.tensor(length, dtype=dtype))
    return given(q=q, k=k, v=v, length=length, scale=c.scale)


def decode_fits(c: SimpleNamespace) -> bool:
    most = {"uint8": 255, "int16": 32_767}.get(c.length, math.inf)
    return heads_fit(c) and c.capacity <= most


def expected_output(a: SimpleNamespace, got: Any) -> dict[str, Expected]:
    length = int(getattr(a, "length", a.k.shape[2]))
    truth = Attention(a.q, a.k[:, :, :length], scale=getattr(a, "scale", None))
    return {"out": Expected(*truth.output(a.v[:, :, :length], a.q.dtype), a.q.dtype)}


contract(
    "decode_attention", "out", positional=3,
    fields=DECODE, large={"B": (1, 2, 5, 70), "capacity": (700, 5001, 20_000, 70_000)},
    memory_of=anyhow("q", "k", "v"),
    written=(
        {}, {"capacity": 64, "read": "all but one", "length": "int", "G": 2, "group": 2},
        {"capacity": 250, "length": "uint8"}, {"capacity": 9, "scores": "far beyond float16"},
        {"capacity": 9, "D": 64, "scale": 0.01, "scores": "beyond float16"},
    ),
    written_large=(
        {"capacity": 70_000, "scores": "rising", "v": "positive"},
        {"capacity": 5001, "scores": "sink", "v": "positive"}, {"B": 5, "capacity": 5001},
        {"capacity": 70_000, "length": "int", "read": "all but one", "v": "positive"},
        {"capacity": 32_760, "length": "int16"},
    ),
    fits=decode_fits,
    large_fits=lambda c: decode_fits(c) and c.B * c.G * c.capacity * c.D <= 2_000_000,
    arguments=decode_arguments, expected=expected_output,
    refused_on={"B": 2, "G": 2, "group": 2, "capacity": 5},
    refused=refusals(
        {"q": "B H 1 D", "k": "B G N D", "v": "B G N D"}, QK_DTYPES | {"v": OTHERS}, "HG1"
    ) | {
        "a length of 0": lambda a: a | {"length": 0},
        "a negative length": lambda a: a | {"length": -1},
        "a length beyond the buffer": lambda a: a | {"length": a["k"].shape[2] + 1},
        "a length that is no integer": lambda a: a | {"length": 1.0},
        "a tensor that is no integer": lambda a: a | {"length": a["q"].new_ones(())},
        "lengths of one dimension": lambda a: a | {"length": a["q"].new_ones(1).long()},
        "a length for each entry": lambda a: a | {"length": a["q"][:, 0, 0, 0].long() * 0 + 1},
    },
)  # fmt: skip


# --- choosing and copying -------------------------------------------------------------------------


def dtype_of(c: SimpleNamespace) -> str:
    return c.dtype if c.kind == "of the dtype" else c.kind


def gather_arguments(c: SimpleNamespace, make: Maker) -> dict:
    """Among the numbers are NaN, infinity and -0."""
    shape = (c.B, c.N, c.E) if c.heads == 0 else (c.B, c.heads, c.N, c.E)
    dtype = getattr(torch, dtype_of(c))
    kind = ("bell", "float64") if dtype.is_floating_point else ("words", "int64")
    values = make.raw(shape, kind[0], 1, kind[1])
    if dtype.is_floating_point:
        for number, value in enumerate((math.nan, -0.0, math.inf)):
            values.flatten()[number :: 7 + number] = value
    values = values > 0 if dtype == torch.bool else values.to(dtype)
    x = make.keep("x", values)
    index = make.raw((c.B, c.K), "words", 1, "int64") % c.N
    if c.order in ("ascending", "descending"):
        index = index.sort(descending=c.order == "descending").values
    index = index // 3 if c.order == "repeated" else index
    return {"x": x, "index": make.keep("index", index)}


def expected_rows(a: SimpleNamespace, got: Any) -> dict[str, Expected]:
    rows = [x[..., index.tolist(), :] for x, index in zip(a.x, a.index)]
    return {"rows": Expected(torch.stack(rows))}


contract(
    "gather_tokens", "rows", positional=2,
    fields={
        "B": (1, 2, 3, 5), "heads": (0, 1, 2, 3), "N": SIZES, "E": (1, 2, 5, 8, 33, 64, 128),
        "K": (1, 2, 3, 0, 8, 17, 100, 300), "order": ("any", "ascending", "descending", "repeated"),
        "kind": ("of the dtype", "float64", "int8", "int32", "int64", "bool"),
    },
    large={"N": (5000, 40_000, 70_000), "K": (3, 300, 40_000), "x in memory": ("dense", "far")},
    memory_of=anyhow("x", "index"),
    large_fits=lambda c: c.B * max(c.heads, 1) * c.N * c.E <= 1_000_000
    and getattr(c, "x in memory") == "dense",
    written=({}, {"B": 2, "N": 9, "E": 5, "K": 8}), detached=True,
    written_large=(
        {"N": 70_000, "K": 300}, {"N": 40, "K": 8, "E": 8, "kind": "int8", "x in memory": "far"},
    ),
    arguments=gather_arguments, expected=expected_rows,
    refused_on={"B": 2, "heads": 3, "N": 5, "K": 2},
    refused=refusals(
        {"x": "B G N E", "index": "B K"}, {"index": ("int32", "float32", "bool")}
    ) | {
        "x of two dimensions": change("x", lambda x: x[0, 0]),
        "an index for each head": change("index", lambda i: i[:, None].expand(-1, 3, -1)),
        "an index of -1": change("index", lambda i: i * 0 - 1),
        "an index beyond the rows": lambda a: a | {"index": a["index"] * 0 + a["x"].shape[-2]},
    },
)  # fmt: skip


def sparsity_of(case: Case) -> float | Fraction:
    """ "k / n" is a random share of the n tokens."""
    n, sparsity = case["n"], case["sparsity"]
    return (case["seed"] % n / n if n else 0.0) if sparsity == "k / n" else sparsity


def counts_are_exact(lab: Lab, case: Case) -> None:
    n, sparsity = case["n"], sparsity_of(case)
    got = lab.operations["keep_count"](n, sparsity)
    assert type(got) is int, f"must be an int, got {type(got).__name__}"
    same(got, oracle.keep_count(n, sparsity), f"n {n}, sparsity {sparsity!r}: the count")


REFUSED_COUNTS: dict[str, tuple] = {
    f"n {n!r}, sparsity {s!r}": (n, s)
    for n, s in ((-1, 0.5), (1.5, 0.5), ("4", 0.5), (4, 1.0), (4, -0.1), (4, math.nan), (4, "0"))
}


def counts_are_refused(lab: Lab, case: Case) -> None:
    wrong = REFUSED_COUNTS[case["wrong"]]
    refused(case["wrong"], lambda: lab.operations["keep_count"](*wrong))


PROMISES["keep_count"] = [
    Promise(
        "keep_count", "values", counts_are_exact,
        {
            "n": (1, 0, 2, 3, 7, 10, 49, 81, 93, 100, 121, 196, 576, 1000, 4096, 10_000, 1_000_000),
            "sparsity": (
                0.0, 0.5, 0, 0.29, 0.1, 0.7, 0.3, 0.75, 0.8, 0.9, 0.333, 0.36, 0.999, 1 / 3,
                "k / n", 0.12345, 0.699999, 0.29999999, 0.123456789, 1e-9, 0.9999999999,
                Fraction(2, 7),
            ),
        },
        count=400, written=({}, {"n": 100, "sparsity": 0.29}), dtypes=False,
    ),
    Promise(
        "keep_count", "errors", counts_are_refused, {"wrong": tuple(REFUSED_COUNTS)},
        written=[{"wrong": wrong} for wrong in REFUSED_COUNTS], dtypes=False,
    ),
]  # fmt: skip

SPECIAL = (0.0, -0.0, math.inf, -math.inf, 1e-41, -1e-41, 1e-38, 0.5, -0.5)  # and +- the largest


def scores(make: Maker, shape: tuple, kind: str, dtype: str) -> Tensor:
    if kind in ("bell", "levels", "equal", "rising", "falling"):
        x = make.raw((*shape, 1), kind, 1, dtype)[..., 0]
    else:
        numbers = make.raw(shape, "words", 1, "int64")
        if kind == "special":
            largest = torch.finfo(getattr(torch, dtype)).max
            special = torch.tensor([*SPECIAL, largest, -largest], dtype=torch.float64)
            x = special[numbers % len(special)]
        else:  # "close": they differ in the last bits
            eps = torch.finfo(getattr(torch, dtype)).eps
            x = 1 + (numbers.double() % min(10**6, 0.9 / eps)) * eps
    return x.to(getattr(torch, dtype))


def select_arguments(c: SimpleNamespace, make: Maker) -> dict:
    shape = (*c.lead, c.n)
    keep = {"some": -(-c.n // 3), "none": 0, "all": c.n, "one": 1, "all but one": c.n - 1}[c.keep]
    x = make.keep("scores", scores(make, shape, c.scores, dtype_of(c)))
    return {"scores": x, "keep": keep}


def expected_index(a: SimpleNamespace, got: Any) -> dict[str, Expected]:
    rows = a.scores.double().reshape(-1, a.scores.shape[-1]).tolist()
    best = torch.tensor([oracle.select_tokens(row, a.keep) for row in rows], dtype=torch.int64)
    index = best.view(*a.scores.shape[:-1], a.keep)
    return {"index": Expected(index)}


contract(
    "select_tokens", "index", positional=2,
    fields={
        "n": SIZES, "lead": ((), (1,), (3,), (2, 2)),
        "keep": ("some", "one", "all", "all but one", "none"),
        "scores": ("bell", "levels", "equal", "close", "special", "rising", "falling"),
        "kind": ("of the dtype", "float64"),
    },
    large={"n": (3000, 5001, 40_000, 70_000)}, memory_of=anyhow("scores"),
    large_fits=lambda c: c.n * math.prod(c.lead) <= 150_000,
    written=(
        {}, {"n": 40, "scores": "levels"}, {"n": 40, "scores": "special", "keep": "all but one"},
        {"n": 40, "scores": "close", "kind": "float64"},
    ),
    written_large=({"n": 70_000}, {"n": 5001, "scores": "equal"}),
    arguments=select_arguments, expected=expected_index,
    refused={
        "a scalar": change("scores", lambda s: s.flatten()[0]),
        "NaN": change("scores", lambda s: s * math.nan),
        "keep beyond n": lambda a: a | {"keep": a["scores"].shape[-1] + 1},
        "keep below 0": lambda a: a | {"keep": -1},
        "keep that is no integer": lambda a: a | {"keep": 0.5},
    },
)  # fmt: skip


def prune_arguments(c: SimpleNamespace, make: Maker) -> dict:
    """Views of one size as one tensor or several, or of different sizes; in "uneven" salience the
    later views have more."""
    sizes = [c.n] * c.views
    if c.sizes == "ragged":
        sizes = [c.n, c.n // 2 + 1, c.n, c.n + 3, 1][: c.views]
    kind = "bell" if c.salience == "uneven" else c.salience
    features = [make.raw((n, c.width), "bell", 1, c.dtype) for n in sizes]
    salience = [scores(make, (n,), kind, "float32") for n in sizes]
    if c.salience == "uneven":
        salience = [s + view for view, s in enumerate(salience)]
    if c.given == "tensors":
        features = make.keep("features", torch.stack(features))
        salience = make.keep("salience", torch.stack(salience))
    else:
        features = [make.keep(f"features.{view}", x) for view, x in enumerate(features)]
        salience = [make.keep(f"salience.{view}", s) for view, s in enumerate(salience)]
    options = given(scope=None if c.scope == "frame" else c.scope)
    return {"features": features, "salience": salience, "sparsity": c.sparsity} | options


def expected_kept(a: SimpleNamespace, got: Any) -> dict[str, Expected]:
    sizes = [len(s) for s in a.salience]
    if getattr(a, "scope", "frame") == "frame":
        chosen = [
            oracle.select_tokens(s.tolist(), oracle.keep_count(len(s), a.sparsity))
            for s in a.salience
        ]
    else:
        every = [x for s in a.salience for x in s.tolist()]
        best = oracle.select_tokens(every, oracle.keep_count(len(every), a.sparsity))
        starts = [sum(sizes[:view]) for view in range(len(sizes))]
        chosen = [
            [i - start for i in best if start <= i < start + n] for start, n in zip(starts, sizes)
        ]
    index = [torch.tensor(i, dtype=torch.int64) for i in chosen]
    kept = {f"kept.{v}": Expected(x[i]) for v, (x, i) in enumerate(zip(a.features, index))}
    return kept | {f"index.{view}": Expected(i) for view, i in enumerate(index)}


contract(
    "prune", "kept", "index", positional=3,
    fields={
        "views": (1, 2, 3, 5), "n": SIZES, "width": (1, 4, 7, 64), "sizes": ("equal", "ragged"),
        "given": ("list", "tensors"), "sparsity": (0.5, 0.0, 0.75, 0.3, 0.29, 0.6, 0.99),
        "scope": ("frame", "global"),
        "salience": ("bell", "levels", "equal", "uneven", "close", "special"),
    },
    large={"n": (1, 20, 700, 3000, 40_000), "views": (1, 2, 3, 40)},
    fits=lambda c: c.sizes == "equal" or c.given == "list",
    large_fits=lambda c: c.sizes == "equal" and c.views * c.n * c.width <= 500_000,
    memory_of=anyhow("features", "salience"), per_view=True,
    written=(
        {"n": 8}, {"views": 3, "n": 20, "width": 4, "given": "tensors", "salience": "uneven"},
        {"views": 5, "n": 20, "salience": "close"}, {"views": 3, "n": 20, "scope": "global"},
        {"views": 3, "n": 20, "sizes": "ragged"},
    ),
    written_large=({"n": 40_000}, {"n": 20, "views": 40}),
    arguments=prune_arguments, expected=expected_kept, refused_on={"n": 5, "views": 2},
    refused={
        "no views": lambda a: a | {"features": [], "salience": []},
        "salience of one token": lambda a: a | {"salience": [s[:1] for s in a["salience"]]},
        "salience of one more token": lambda a: a | {
            "salience": [torch.cat([s, s[:1]]) for s in a["salience"]]
        },
        "salience of fewer views": lambda a: a | {"salience": a["salience"][1:]},
        "salience of more views": lambda a: a | {"salience": [*a["salience"], a["salience"][0]]},
        "salience of two dimensions": lambda a: a | {
            "salience": [s[:, None] for s in a["salience"]]
        },
        "NaN": lambda a: a | {"salience": [s * math.nan for s in a["salience"]]},
        "a sparsity of 1": lambda a: a | {"sparsity": 1.0},
        "a sparsity below 0": lambda a: a | {"sparsity": -0.1},
        "an unknown scope": lambda a: a | {"scope": "video"},
    },
)  # fmt: skip


# --- four-bit weights -----------------------------------------------------------------------------


def pack_arguments(c: SimpleNamespace, make: Maker) -> dict:
    codes = make.raw((c.rows, 8 * c.words), "codes", 1, c.kind)
    codes = {"15": codes * 0 + 15, "from 8 on": codes // 2 + 8}.get(c.codes, codes)
    return {"codes": make.keep("codes", codes)}


contract(
    "pack", "packed",
    fields={
        "rows": (1, 2, 5, 33), "words": (1, 2, 3, 9, 64), "codes": ("any", "15", "from 8 on"),
        "kind": ("int8", "uint8", "int16", "int32", "int64"),
    },
    large={"rows": (300, 1000), "words": (100, 300)},
    memory_of=anyhow("codes"), dtypes=False, counts=(60, 40, 1),
    arguments=pack_arguments,
    expected=lambda a, got: {"packed": Expected(oracle.pack(a.codes))},
    refused={
        "a code of 16": change("codes", lambda codes: codes * 0 + 16),
        "a code of -1": change("codes", lambda codes: codes * 0 - 1),
    } | refusals({"codes": "R C"}, {"codes": ("float32",)}, "C"),
)  # fmt: skip
contract(
    "unpack", "codes",
    fields={"rows": (1, 2, 5, 33), "words": (1, 2, 3, 9, 64)},
    large={"rows": (300, 1000), "words": (20, 100, 300)}, written_large=({},),
    memory_of=anyhow("packed"), dtypes=False, counts=(60, 40, 1),
    arguments=lambda c, make: {"packed": make("packed", (c.rows, c.words), "words", 1, "int32")},
    expected=lambda a, got: {"codes": Expected(oracle.unpack(a.packed))},
    refused=refusals({"packed": "R W"}, {"packed": ("int64", "int16", "float32")}),
)  # fmt: skip

PACKED = {
    "groups": (1, 2, 3, 5), "g": (8, 32, 64, 128, 16, 48, 96), "words": (1, 2, 3, 5, 8, 17),
    "codes": ("any", "near zero", "zero", "all 0"),
    "scales": ("ordinary", "powers of two", "tiny", "large", "uneven"),
}  # fmt: skip
LARGE_PACKED = {"groups": (8, 16, 28, 40), "g": (64, 128), "words": (64, 200, 400)}


def packed_weights(c: SimpleNamespace, make: Maker) -> dict[str, Tensor]:
    """Codes and zeros apart, or at most one apart; scales of all sizes that float16 has."""
    K, N = c.groups * c.g, 8 * c.words
    codes = make.raw((K, N), "codes", 1, "int64")
    zeros = make.raw((c.groups, N), "codes", 1, "int64")
    each = zeros.repeat_interleave(c.g, 0)
    codes = {
        "any": codes, "near zero": (each + codes % 3 - 1).clamp(0, 15), "zero": each,
        "all 0": codes * 0,
    }[c.codes]  # fmt: skip
    zeros = zeros * 0 if c.codes == "all 0" else zeros
    scales = make.raw((c.groups, N), "positive", 0.01) + 0.001
    scales = {
        "powers of two": 2.0 ** scales.log2().round(), "tiny": scales * 2.0**-10,
        "large": scales * 2.0**15, "overflowing": scales * 2.0**20,
        "uneven": scales * 8.0 ** (zeros % 4),
    }.get(c.scales, scales)  # fmt: skip
    packed = {"qweight": oracle.pack(codes), "qzeros": oracle.pack(zeros), "scales": scales.half()}
    packed["scales"].clamp_(max=65504)
    return {name: make.keep(name, x) for name, x in packed.items()}


AXES = {"qweight": "K W", "qzeros": "L W", "scales": "L N"}  # N = 8 W, L divides K
WORDS = ("int64", "int16", "float32")
PACKED_DTYPES = {"qweight": WORDS, "qzeros": WORDS, "scales": ("float32", "bfloat16", "int32")}
contract(
    "dequantize", "weight", positional=3,
    fields=PACKED | {"scales": (*PACKED["scales"], "overflowing")}, large=LARGE_PACKED,
    large_fits=lambda c: c.groups * c.g * c.words <= 200_000,
    memory_of=anyhow("qweight", "qzeros", "scales"), dtypes=False, counts=(120, 40, 2),
    written=({"groups": 2},),
    written_large=({"groups": 4, "g": 128, "words": 33}, {"groups": 40, "g": 128, "words": 3}),
    arguments=packed_weights,
    expected=lambda a, got: {"weight": Expected(oracle.dequantize(a.qweight, a.qzeros, a.scales))},
    refused=refusals(AXES, PACKED_DTYPES, "KN"), refused_on={"groups": 2, "words": 2},
)  # fmt: skip


def weights(c: SimpleNamespace, make: Maker) -> dict:
    """Rows of both signs or one, with an outlier, all alike, or too small for a scale."""
    shape = (c.rows, c.groups * c.g)
    kind = {"positive": "positive", "negative": "negative", "levels": "levels", "heavy": "heavy"}
    size = {"tiny": 2.0**-20, "zero": 0, "large": 2.0**12}.get(c.weights, 1)
    w = make("weight", shape, kind.get(c.weights, "bell"), size)
    if c.weights in ("outlier", "zero group"):
        w = w.clone()
        w[:, :: c.g] = 40.0
        if c.weights == "zero group":
            w[:, : c.g] = 0.0
        w = make.keep("weight", w)
    group_size = {128: None, c.groups * c.g: -1}.get(c.g, c.g)
    return given(weight=w, group_size=group_size)


def expected_codes(a: SimpleNamespace, got: dict[str, Tensor] | None) -> dict[str, Expected]:
    """Scales follow from the weights, zeros from weights and scales, codes from all three; where a
    number lies between two, both are right."""
    rows, inputs = a.weight.shape
    size = getattr(a, "group_size", 128)
    w = a.weight.double().view(rows, -1, inputs if size == -1 else size)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scales = (high - low).clamp(min=1e-5) / 15
    found, mine = scales.half(), None
    if got and got["scales"].shape == scales.shape and (got["scales"] > 0).all():
        found, mine = got["scales"].cpu(), got["zeros"].cpu().double()
    zeros = (-low / found.double()).clamp(0, 15)
    mine = zeros.round() if mine is None or mine.shape != zeros.shape else mine
    codes = (w / found.double()[..., None] + mine[..., None]).clamp(0, 15)

    def whole(x: Tensor) -> Expected:
        doubt = (x - x.floor() - 0.5).abs() < 1e-4 * (1 + x)
        return Expected(x.round(), doubt.double(), torch.int8)

    return {
        "codes": whole(codes.flatten(1)),
        "scales": Expected(scales, 2 * U16 * scales + 2.0**-25, torch.float16),
        "zeros": whole(zeros),
    }


contract(
    "quantize_groups", "codes", "scales", "zeros",
    fields={
        "rows": (1, 2, 9, 40), "groups": (1, 2, 3), "g": (8, 32, 128, 64, 16, 96),
        "weights": (
            "bell", "positive", "negative", "outlier", "heavy", "levels", "tiny", "zero", "large",
            "zero group",
        ),
    },
    large={"rows": (300, 1000), "groups": (8,)}, memory_of=anyhow("weight"), counts=(100, 40, 2),
    written=({}, {"g": 128, "groups": 2}, {"g": 32, "groups": 2, "rows": 9}),
    arguments=weights, expected=expected_codes,
    refused={
        "NaN": change("weight", lambda w: w * math.nan),
        "infinity": change("weight", lambda w: w + math.inf),
        "scales beyond float16": lambda a: a | {"weight": a["weight"].float() * 0 - 2e6},
        "a group size that does not divide": lambda a: a | {"group_size": 7},
        "a group size of 0": lambda a: a | {"group_size": 0},
        "a group size of -2": lambda a: a | {"group_size": -2},
        "a group size beyond the inputs": lambda a: a | {"group_size": 2 * a["weight"].shape[1]},
    } | refusals({"weight": "O I"}, {"weight": ("int32", "int8")}),
    refused_on={"rows": 2, "g": 32},
)  # fmt: skip


def product_arguments(c: SimpleNamespace, make: Maker) -> dict:
    packed = packed_weights(c, make)
    K, N = c.groups * c.g, 8 * c.words
    size = 2.0**17 if c.x == "beyond float16" else 32 if c.x == "positive" else 1
    kind = c.x if c.x in ("positive", "heavy", "zero") else "bell"
    x = make("x", (*c.lead, K), kind, 1 if c.dtype == "float16" else size)
    if c.x == "rows apart" and len(c.lead):
        factors = 16.0 ** -(torch.arange(c.lead[-1], device=x.device)[:, None] % 6)
        x = make.keep("x", x * factors.to(x.dtype))
    bias = {"none": None, "large": 100.0, "small": 0.01}[c.bias]
    bias = bias and make("bias", (N,), "bell", bias)
    return {"x": x} | packed | given(bias=bias)


def expected_product(a: SimpleNamespace, got: Any) -> dict[str, Expected]:
    """A weight may be used before or after its rounding to float16; in 16 bits it may be rounded to
    x's dtype, the result is, and it may be before a bias is added. In bfloat16 scales and offsets
    may be rounded apart, if what an offset is off is taken back up to 2^-15 steps of quantisation a
    weight (a step is a scale). Weights that need no rounding show TF32."""
    x, dtype = a.x.double(), a.x.dtype
    w = oracle.dequantize(a.qweight, a.qzeros, a.scales).double()
    steps = a.scales.double().repeat_interleave(len(w) // len(a.scales), 0)
    bias = a.bias.double() if hasattr(a, "bias") else torch.zeros(w.shape[1], dtype=torch.float64)
    exact = bool((a.scales.double().log2() % 1 == 0).all()) and bool((a.scales >= 2**-14).all())
    sixteen = 0.0 if dtype == torch.float32 else (2 + hasattr(a, "bias")) * ROUNDOFF[dtype]
    relative = gamma(len(w) + 1) + sixteen + (0.0 if exact else U16)
    small = ((w != 0) & (w.abs() < 2.0**-14)).double() * 2.0**-24  # float16's steps below that
    allowed = relative * (x.abs() @ w.abs() + bias.abs()) + x.abs() @ small
    if dtype == torch.bfloat16:
        allowed = allowed + 2.0**-15 * (x.abs() @ steps)
    return {"y": Expected(x @ w + bias, allowed + STEP[dtype], dtype)}


contract(
    "w4a16_matmul", "y", positional=4,
    fields=PACKED | {
        "lead": ((1,), (), (3,), (17,), (2, 3), (65,), (130,), (300,), (0,), (1, 2, 2)),
        "x": ("bell", "positive", "heavy", "beyond float16", "zero", "rows apart"),
        "bias": ("none", "large", "small"),
    },
    large=LARGE_PACKED | {"lead": ((1,), (3,), (64,), (300,), (2100,))},
    fits=lambda c: c.scales != "large" or c.dtype != "float16",
    large_fits=lambda c: c.groups * c.g * c.words <= 100_000
    and (c.scales != "large" or c.dtype != "float16"),
    memory_of=anyhow("x", "qweight", "qzeros", "scales", "bias"), counts=(100, 40, 3),
    written=(
        {"groups": 2}, {"groups": 5, "g": 32, "words": 3, "scales": "powers of two", "lead": (9,)},
        {"groups": 2, "g": 128, "words": 4, "codes": "near zero", "x": "positive", "lead": (5,)},
        {"groups": 2, "x": "rows apart", "lead": (17,)},
    ),
    written_large=(
        {"groups": 28, "g": 128, "words": 20, "x": "positive"},
        {"groups": 40, "g": 128, "words": 3, "lead": (3,)},
        {"groups": 2, "words": 1, "lead": (2100,)},
    ),
    arguments=product_arguments, expected=expected_product,
    refused_on={"groups": 2, "words": 2, "lead": (3,), "bias": "small"},
    refused=refusals(
        AXES | {"x": "... K", "bias": "N"}, PACKED_DTYPES | {
            "x": ("float64", "int32"), "bias": ("float16", "float64", "int32"),
        }, "KN",
    ),
)  # fmt: skip

PROMISES["RetrievalCache"] = cache.PROMISES
PROMISES["SparseVILA"] = conversation.PROMISES
