"""The operations in float64, written down as slowly and as plainly as possible, and how far a
correct implementation may be from them. README.md in this folder derives the tolerances."""

import math
import os
from fractions import Fraction

import torch
from torch import Tensor

U32, U16 = 2.0**-24, 2.0**-11
TINY = 2.0**-126  # what is smaller may be flushed to zero
# Triton's interpreter (3.7) makes bfloat16 of a number by cutting bits off: twice the error.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
UB16 = 2.0**-7 if INTERPRETED else 2.0**-8
ROUNDOFF = {torch.float32: U32, torch.float16: U16, torch.bfloat16: UB16}
STEP = {torch.float32: TINY, torch.float16: 2.0**-24, torch.bfloat16: TINY}  # below: one step or 0


def gamma(n: int) -> float:
    return n * U32 / (1 - n * U32)


class Attention:
    """Everything about one attention in float64: scores, weights, and their allowed errors.

    q (B, H, M, D), k (B, G, N, D). lse (B, H, M): given, in place of the rows' own.
    """

    def __init__(
        self, q: Tensor, k: Tensor, causal: bool = False, scale: float | None = None,
        lse: Tensor | None = None,
    ):  # fmt: skip
        B, H, M, D = q.shape
        G, N = k.shape[1:3]
        # Query head h reads key head h // (H / G): the heads of a group are rows of one product.
        rows, keys = q.double().reshape(B, G, H // G * M, D), k.double().mT
        scale = 1 / math.sqrt(D) if scale is None else scale
        self.scores = scale * (rows @ keys).view(B, H, M, N)
        # The largest sum of absolute products that enters a row's scores, (B, H, M).
        size = abs(scale) * (rows.abs().nan_to_num(posinf=0) @ keys.abs()).view(B, H, M, N).amax(-1)
        if causal:  # right-aligned: row i sees keys 0 .. N - M + i
            hidden = torch.arange(N) > torch.arange(M)[:, None] + (N - M)
            self.scores = self.scores.masked_fill(hidden.to(q.device), -math.inf)
        self.lse = self.scores.logsumexp(-1) if lse is None else lse.double()
        shift = self.lse.masked_fill(self.lse.isinf(), 0)  # a row that sees nothing
        self.weights = (self.scores - shift[..., None]).exp()
        e_s = gamma(D + 2) * size
        finite = self.scores.masked_fill(self.scores.isinf(), 0).abs().amax(-1)
        reach = 1 + finite + self.lse.abs().nan_to_num(0, 0, 0)
        self.lse_error = e_s + gamma(N) + 4 * U32 * reach
        self.weight_error = 2 * e_s + gamma(N) + 8 * U32 * reach  # (B, H, M), relative

    def colsum(self) -> tuple[Tensor, Tensor]:
        """(B, H, N), and the allowed error."""
        expected = self.weights.sum(2)
        M = self.weights.shape[2]
        relative = torch.einsum("bhm,bhmn->bhn", self.weight_error, self.weights)
        return expected, relative + gamma(M) * expected + M * TINY

    def output(self, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, H, M, D), and the allowed error."""
        (B, H, M, N), (G, D) = self.weights.shape, (v.shape[1], v.shape[3])
        v = v.double()

        def mixed(weights: Tensor, values: Tensor) -> Tensor:
            return (weights.view(B, G, H // G * M, N) @ values).view(B, H, M, D)

        relative = self.weight_error[..., None] + gamma(N) + 2 * ROUNDOFF[dtype]
        small = STEP[dtype] * (v.abs().sum(2, keepdim=True) + 1)  # of weights, and of the result
        small = small.repeat_interleave(H // G, 1)
        return mixed(self.weights, v), relative * mixed(self.weights, v.abs()) + small


def keep_count(n: int, sparsity: float) -> int:
    exact = Fraction(sparsity).limit_denominator(10**9)
    return max(n - math.floor(exact * n), 1 if n else 0)


def select_tokens(scores: list[float], keep: int) -> list[int]:
    """By sorting (score descending, index ascending)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:keep])


NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ "gemm": the column of the code at bits 4 i .. 4 i + 3


def pack(codes: Tensor) -> Tensor:
    """Codes (rows, n) to int32 (rows, n / 8)."""
    parts = codes.long().unflatten(1, (-1, 8))[..., NIBBLES]
    total = sum(parts[..., i] * 16**i for i in range(8))
    return torch.where(total >= 2**31, total - 2**32, total).int()


def unpack(packed: Tensor) -> Tensor:
    """Words (rows, n / 8) to codes (rows, n) int8."""
    total = packed.long() % 2**32
    codes = torch.empty(*packed.shape, 8, dtype=torch.int8)
    for i, column in enumerate(NIBBLES):
        codes[..., column] = total // 16**i % 16
    return codes.flatten(1)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """(K, N) float16: (code - zero) * scale of its group, rounded once."""
    codes, zeros = unpack(qweight).double(), unpack(qzeros).double()
    group = len(codes) // len(zeros)
    rows = torch.arange(len(codes)) // group
    return ((codes - zeros[rows]) * scales.double()[rows]).half()
