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


def gamma(n: int) -> float:
    return n * U32 / (1 - n * U32)


class Attention:
    """Everything about one attention in float64: scores, weights, and their allowed errors."""

    def __init__(self, q: Tensor, k: Tensor, causal: bool = False, scale: float | None = None):
        B, H, M, D = q.shape
        G, N = k.shape[1:3]
        q64, k64 = q.double(), torch.stack([k[:, h // (H // G)] for h in range(H)], 1).double()
        scale = 1 / math.sqrt(D) if scale is None else scale
        self.scores = scale * torch.einsum("bhmd,bhnd->bhmn", q64, k64)
        size = abs(scale) * torch.einsum("bhmd,bhnd->bhmn", q64.abs(), k64.abs())
        if causal:  # right-aligned: row i sees keys 0 .. N - M + i
            hidden = [[n > m + N - M for n in range(N)] for m in range(M)]
            hidden = torch.tensor(hidden, device=q.device)
            self.scores = self.scores.masked_fill(hidden, -math.inf)
            size = size.masked_fill(hidden, 0)
        self.lse = self.scores.logsumexp(-1)
        self.weights = (self.scores - self.lse[..., None]).exp().nan_to_num(0)
        e_s = gamma(D + 2) * (size.amax((-1,)) if N else size.sum(-1))  # (B, H, M)
        finite = self.scores.masked_fill(self.scores.isinf(), 0).abs()
        reach = 1 + (finite.amax(-1) if N else 0) + self.lse.abs().nan_to_num(0, 0, 0)
        self.lse_error = e_s + gamma(N) + 4 * U32 * reach
        self.weight_error = (2 * e_s + gamma(N) + 8 * U32 * reach).amax(-1)  # (B, H), relative

    def colsum(self) -> tuple[Tensor, Tensor]:
        """(B, H, N), and the allowed error."""
        expected = self.weights.sum(2)
        M = self.weights.shape[2]
        return expected, (self.weight_error[..., None] + gamma(M)) * expected + M * TINY

    def output(self, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, H, M, D), and the allowed error."""
        H, N = self.weights.shape[1], v.shape[2]
        v = torch.stack([v[:, h // (H // v.shape[1])] for h in range(H)], 1).double()
        relative = self.weight_error[..., None, None] + gamma(N) + 2 * ROUNDOFF[dtype]
        return self.weights @ v, relative * (self.weights @ v.abs())


def keep_count(n: int, sparsity: float) -> int:
    exact = Fraction(sparsity).limit_denominator(10**9)
    return max(n - math.floor(exact * n), 1 if n else 0)


def select_tokens(scores: list[float], keep: int) -> list[int]:
    """By sorting (score descending, index ascending)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:keep])


NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ "gemm": the code at bits 4 i .. 4 i + 3


def pack(codes: list[list[int]]) -> list[list[int]]:
    """Codes (rows, n) to int32 (rows, n / 8), as Python integers of two's complement."""
    packed = []
    for row in codes:
        words = []
        for start in range(0, len(row), 8):
            word = sum(row[start + column] << (4 * bits) for bits, column in enumerate(NIBBLES))
            words.append(word - 2**32 if word >= 2**31 else word)
        packed.append(words)
    return packed


def unpack(packed: list[list[int]]) -> list[list[int]]:
    rows = []
    for row in packed:
        codes = [0] * (8 * len(row))
        for number, word in enumerate(row):
            for bits, column in enumerate(NIBBLES):
                codes[8 * number + column] = (word >> (4 * bits)) & 15
        rows.append(codes)
    return rows


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """(K, N) float64: (code - zero) * scale of its group, rounded to float16 once."""
    codes, zeros = unpack(qweight.tolist()), unpack(qzeros.tolist())
    group = len(codes) // len(zeros)
    values = [
        [(code - zero) * scale for code, zero, scale in zip(row, zeros[i // group], s)]
        for i, row in enumerate(codes)
        for s in (scales[i // group].double().tolist(),)
    ]
    return torch.tensor(values, dtype=torch.float64).half().double()
