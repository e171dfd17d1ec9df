"""How a case is made. A case is a dict of plain values: sizes, options, a seed. It is written down,
or drawn from fields, which list for every value what it may be, *the simplest first*; a case that
fails is made simpler by going back in these lists. Its tensors are recipes too, README.md in this
folder says how: any language can make the same numbers.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Fields = dict[str, Sequence]
Case = dict[str, Any]

# The sizes of an axis: small ones, and those around the ends of blocks.
SIZES = (
    1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 40, 63, 64, 65, 70, 100, 127, 128, 129,
    200, 257, 300,
)  # fmt: skip

# --- numbers --------------------------------------------------------------------------------------

PART = 2**17  # words at a time: to ask for larger tensors, step after step, takes longer


def mixed(x: Any) -> Any:
    """A 32-bit integer -> another that looks random, in Python or in an int64 tensor. Source: the
    constants and shifts are those of "lowbias32", C. Wellons, Prospecting for Hash Functions
    (2018)."""
    x = x & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def words(seed: int, count: int) -> Tensor:
    """Random integers (count,) in [0, 2^32), int64: word i is mixed(mixed(seed) + i)."""
    first = mixed(seed)
    return torch.cat([mixed(first + i) for i in torch.arange(count).split(PART)])


def bell(seed: int, shape: Sequence[int]) -> Tensor:
    """Numbers of mean 0, spread 1.15 and size below 4, float64: element i in row-major order is (b0
    + b1 + b2 + b3 - 510 + w / 2^32) / 128, b0 .. b3 the bytes of word 2 i and w word 2 i + 1."""
    parts = []
    for part in words(seed, 2 * math.prod(shape)).split(PART):
        w = part.view(-1, 2)
        pairs = (w[:, 0] & 0xFF00FF) + (w[:, 0] >> 8 & 0xFF00FF)  # b0 + b1, and b2 + b3
        total = (pairs & 0xFFFF) + (pairs >> 16) - 510
        parts.append((total + w[:, 1].double() / 2**32) / 128)
    return torch.cat(parts).view(*shape)


def _steps(z: Tensor) -> Tensor:
    """j / N along the last axis but one, which in keys and values counts the tokens."""
    return (torch.arange(z.shape[-2], dtype=torch.float64) / z.shape[-2])[:, None]


VALUES: dict[str, Callable[[Tensor], Tensor]] = {  # what becomes of numbers from `bell`
    "bell": lambda z: z,
    "positive": lambda z: z.abs(),
    "negative": lambda z: -z.abs(),
    "heavy": lambda z: z * z * z,
    "levels": lambda z: z.floor(),  # many are equal
    "equal": torch.ones_like,
    "zero": torch.zeros_like,
    "rising": lambda z: z + 8 * _steps(z),
    "falling": lambda z: z - 8 * _steps(z),
    "sink": lambda z: z / 16 + 5 * (_steps(z) == 0),  # the first token
}


def numbers(recipe: dict) -> Tensor:
    """The tensor of a recipe: {"values", "seed", "size", "shape", "dtype"} is size * what VALUES
    makes of `bell`, rounded to dtype once; "codes" are words & 15; "words" are words as int32, in
    int64 times 2^31 + 1."""
    seed, shape, values = recipe["seed"], recipe["shape"], recipe["values"]
    dtype = getattr(torch, recipe["dtype"])
    if values in ("codes", "words"):
        x = words(seed, math.prod(shape)).view(*shape)
        x = x & 15 if values == "codes" else (x + 2**31) % 2**32 - 2**31
        x = x * (2**31 + 1) if values == "words" and dtype == torch.int64 else x
    else:
        x = VALUES[values](bell(seed, tuple(shape))) * recipe["size"]
    return x.to(dtype)


# --- tensors in memory ----------------------------------------------------------------------------

LAYOUTS = ("dense", "transposed", "strided", "offset", "expanded")
FAR = 3 * 2**30  # elements between the first row and the last, in the layout "far"


def laid(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """x (for "expanded" its first entry, again and again) as a view of a buffer, and the buffer.
    What of it is not in the view is poison: NaN or 127."""
    poison = math.nan if x.is_floating_point() else 127  # which is True, too
    if layout == "transposed" and x.dim() > 1:
        axis = -3 if x.dim() > 2 else -2  # tokens before heads, as a projection gives them
        buffer = x.transpose(axis, -2 if x.dim() > 2 else -1).contiguous()
        return buffer.transpose(axis, -2 if x.dim() > 2 else -1), buffer
    if layout == "strided":
        buffer = x.new_full((*x.shape, 2), poison)
        buffer[..., 0] = x
        return buffer[..., 0], buffer
    if layout == "offset":
        buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 5), poison)
        buffer[..., 3:-2] = x
        return buffer[..., 3:-2], buffer
    if layout == "expanded" and x.dim() > 1 and x.numel():
        axis = 1 if x.dim() > 2 and x.shape[1] > 1 else 0
        buffer = x.narrow(axis, 0, 1).contiguous()
        return buffer.expand(x.shape), buffer
    if layout == "far" and x.shape[-2] > 1:  # pages of a buffer that are not used cost nothing
        stride = -(-FAR // (x.shape[-2] - 1))
        buffer = x.new_empty(stride * (x.shape[-2] - 1) + x[..., 0, :].numel())
        view = buffer.as_strided(x.shape, (*x[..., 0, :].stride()[:-1], stride, 1))
        return view.copy_(x), buffer
    buffer = x.clone(memory_format=torch.contiguous_format)
    return buffer, buffer


class Maker:
    """Makes the tensors of a case, and remembers how.

    recipes: of every tensor made, by name, what `numbers` needs; None where it was changed after.
    buffers: the memory of every tensor, by name.
    """

    def __init__(self, case: Case, device: str = "cpu"):
        self.case, self.device, self.drawn = case, device, 0
        self.recipes: dict[str, dict | None] = {}
        self.buffers: dict[str, Tensor] = {}

    def recipe(self, shape: Sequence[int], values: str, size: float, dtype: str) -> dict:
        """Of the next tensor."""
        self.drawn += 1
        recipe = {"values": values, "seed": 64 * self.case["seed"] + self.drawn, "size": size}
        return recipe | {"shape": list(shape), "dtype": dtype or self.case["dtype"]}

    def __call__(
        self,
        name: str,
        shape: Sequence[int],
        values: str = "bell",
        size: float = 1,
        dtype: str = "",
    ) -> Tensor:
        """A tensor as an argument of this name."""
        recipe = self.recipe(shape, values, size, dtype)
        return self.keep(name, numbers(recipe), recipe)

    def raw(
        self, shape: Sequence[int], values: str = "bell", size: float = 1, dtype: str = "float64"
    ) -> Tensor:
        """Numbers that something is made of, on the CPU."""
        return numbers(self.recipe(shape, values, size, dtype))

    def keep(self, name: str, x: Tensor, recipe: dict | None = None) -> Tensor:
        """x as an argument of this name, in memory as the case wants it."""
        self.recipes[name] = recipe
        layout = self.case.get(f"{name} in memory", "dense")
        view, self.buffers[name] = laid(x.to(self.device), layout)
        return view


# --- drawing and making simpler -------------------------------------------------------------------


def simplest(fields: Fields) -> Case:
    return {name: options[0] for name, options in fields.items()} | {"seed": 0}


def drawn(
    fields: Fields, fits: Callable[[SimpleNamespace], bool], seed: int, count: int
) -> Iterator[Case]:
    """Random cases that fit. Every value is the simplest of its field in one case of four, so that
    what is unusual is met alone as well as together."""
    rng = random.Random(seed)
    while count:
        case = {
            name: rng.choice(options) if rng.random() < 0.75 else options[0]
            for name, options in fields.items()
        }
        case["seed"] = rng.randrange(2**20)
        if fits(SimpleNamespace(**case)):
            count -= 1
            yield case


def simplified(
    case: Case, fields: Fields, fails: Callable[[Case], bool], seconds: float = 3.0
) -> Case:
    """The simplest case that still fails and that is found by changing one value at a time, within
    some seconds."""
    end = time.monotonic() + seconds
    changed = True
    while changed:
        changed = False
        for name, options in fields.items():
            simpler = itertools.takewhile(lambda option, now=case[name]: option != now, options)
            for option in simpler:
                if time.monotonic() > end:
                    return case
                if fails(case | {name: option}):
                    case, changed = case | {name: option}, True
                    break
    return case


def told(case: Case, fields: Fields) -> str:
    """A case in words: what is not the simplest."""
    parts = [f"{name} {case[name]}" for name in fields if case[name] != fields[name][0]]
    return ", ".join(parts) or "the simplest case"
