"""What a RetrievalCache promises: any conversation, beside float64 books of everything it was told.

A conversation is a list of steps: ("text", rows) is read densely, as context is; ("question", rows)
is read densely and scored, then its visual rows are chosen; ("answer", tokens) is read a row at a
time from what was chosen and all text; ("broken question", rows) ends after the first layer and is
truncated; ("refused", rows) is a truncation to that many rows too many; ("truncate", share) forgets
rows down to a share of them, ("forget", turns) back to where the question of that many turns ago
began.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from . import oracle
from .laws import Expected, Lab, Promise, bits, near, played, refused, same
from .oracle import Attention, gamma
from .recipe import Case, laid, numbers

Step = tuple[str, float]

VISUAL = ("one span", "with text between", "from the first row", "single rows", "none")
Q, A = "question", "answer"
CONVERSATIONS: tuple[tuple[Step, ...], ...] = (
    ((Q, 3), (A, 2)),
    ((Q, 1), (A, 1)),
    ((Q, 3), (A, 4), (Q, 1), (A, 2), (Q, 5), (A, 3)),
    ((Q, 40), (A, 2)),
    (("text", 2), (Q, 2), (A, 2), ("text", 1), (Q, 2), (A, 1)),
    ((Q, 4), (A, 3), ("forget", 1), ("text", 1), (Q, 2), (A, 3)),
    ((Q, 2), (A, 2), (Q, 3), (A, 2), ("forget", 1), (Q, 2), (A, 2)),
    ((Q, 2), (A, 2), (Q, 3), (A, 2), ("forget", 2), (Q, 2), (A, 2)),
    (("broken question", 3), (Q, 2), (A, 2)),
    ((Q, 2), (A, 2), ("broken question", 3), (Q, 3), (A, 2)),
    ((Q, 2), (A, 3), ("truncate", 0.95), ("text", 2), (Q, 2), (A, 1)),
    (("truncate", 0.6), ("text", 4), (Q, 2), (A, 2)),
    (("truncate", 0.0), ("text", 4), (Q, 2), (A, 2)),
    ((Q, 2), (A, 0), (Q, 2), (A, 1)),
    ((Q, 2), (Q, 3), (A, 2)),
    ((Q, 2), (A, 1), ("refused", 1), (A, 2), (Q, 1), (A, 1)),
)
# The packed buffer grows twice.
LONG = (((Q, 40), (A, 262), (Q, 300), (A, 3), ("forget", 1), (Q, 70), (A, 2)),)
FIELDS = {
    "steps": CONVERSATIONS,
    "sparsity": (0.5, None, 0.0, 0.3, 0.9, 0.99),
    "context": (12, 18, 40, 100, 300), "visual": VISUAL, "layers": (1, 2, 3),
    "G": (1, 2, 3), "group": (1, 2, 3, 5, 8), "D": (8, 16, 20, 40, 64, 128),
    "capacity": (None, 1, 7, 1000), "scores": ("ordinary", "large", "tied", "heavy"),
    "rows in memory": ("dense", "transposed", "offset"),
}  # fmt: skip


def visual_rows(context: int, kind: str) -> list[int]:
    rows = {
        "one span": range(2, context - 1), "from the first row": range(context),
        "with text between": [n for n in range(1, context) if n % 7 and n % 11],
        "single rows": range(1, context, 5), "none": (),
    }[kind]  # fmt: skip
    return list(rows)


class Books:
    """A cache under test, and what is true."""

    def __init__(self, lab: Lab, case: Case):
        c = self.case = SimpleNamespace(**case)
        self.lab, self.visual, self.drawn = lab, visual_rows(c.context, c.visual), 0
        self.handed_over = torch.tensor(self.visual, dtype=torch.int64).to(lab.device)
        options = {} if c.visual == "none" else {"visual": self.handed_over}
        options |= {} if c.capacity is None else {"capacity": c.capacity}
        sparsity = () if c.sparsity is None else (c.sparsity,)
        self.cache = lab.operations["RetrievalCache"](c.layers, *sparsity, **options)
        self.sparsity = 0.8 if c.sparsity is None else c.sparsity
        empty = torch.zeros(1, c.G, 0, c.D, dtype=getattr(torch, c.dtype))
        self.k, self.v = [empty] * c.layers, [empty] * c.layers
        self.kept: list[tuple[Tensor, Tensor]] = []  # outputs, and their bits when they were new
        self.turns: list[int] = []  # where questions began
        self.hidden: list[set[int]] | None = None  # rows that an answer does not see, per layer

    def compare(self, name: str, layer: int, got: Tensor, expected: Expected) -> None:
        near(got, expected, f"`{name}` of layer {layer}")

    @property
    def length(self) -> int:
        return self.k[-1].shape[2]

    def rows(self, heads: int, M: int, size: float) -> tuple[Tensor, Tensor]:
        """New rows (1, heads, M, D), and their memory."""
        c = self.case
        self.drawn += 1
        values = {"tied": "levels", "heavy": "heavy"}.get(c.scores, "bell")
        recipe = {"values": values, "seed": 4096 * c.seed + self.drawn, "size": size}
        x = numbers(recipe | {"shape": [1, heads, M, c.D], "dtype": c.dtype})
        return laid(x.to(self.lab.device), getattr(c, "rows in memory"))

    def attend(self, M: int, hidden: list[set[int]] | None = None, layers: int = 0) -> list[Tensor]:
        """M rows through the layers, compared with attention over all rows so far but the hidden
        ones; the queries of each layer. What was handed over is overwritten afterwards."""
        c, queries = self.case, []
        size = {"large": 4, "heavy": 0.5}.get(c.scores, 1.5)
        for layer in range(layers or c.layers):
            heads = (c.G * c.group, c.G, c.G)
            made = [self.rows(n, M, s) for n, s in zip(heads, (size, size, 1))]
            q, k, v = (view for view, _ in made)
            was = [x.cpu().clone() for x in (q, k, v)]
            self.k[layer] = torch.cat([self.k[layer], was[1]], 2)
            self.v[layer] = torch.cat([self.v[layer], was[2]], 2)
            got = self.cache.attend(layer, q, k, v)
            for name, x, before in zip("qkv", (q, k, v), was):
                assert torch.equal(x.cpu(), before), f"{name} was changed"
            self.compare("output", layer, got, self.output(layer, was[0], hidden))
            self.kept.append((got, bits(got).clone()))
            for _, buffer in made:
                buffer.fill_(math.nan)
            queries.append(was[0])
        return queries

    def output(self, layer: int, q: Tensor, hidden: list[set[int]] | None) -> Expected:
        N = self.k[layer].shape[2]
        gone = hidden[layer] if hidden else ()
        seen = [n for n in range(N) if n not in gone]
        truth = Attention(q, self.k[layer][:, :, seen], causal=True)
        return Expected(*truth.output(self.v[layer][:, :, seen], q.dtype), q.dtype)

    def question(self, M: int) -> list[set[int]]:
        """Read a question, compare relevance and choice; the rows hidden from its answer."""
        self.turns.append(self.length)
        self.cache.start_question()
        queries = self.attend(M)
        self.cache.start_answer()
        c, hidden = self.case, []
        same(len(self.cache.relevance), c.layers, "the number of layers in `relevance`")
        same(len(self.cache.retrieved), c.layers, "the number of layers in `retrieved`")
        keep, count = oracle.keep_count(len(self.visual), self.sparsity), c.G * c.group * M
        for layer, q in enumerate(queries):
            received, allowed = Attention(q, self.k[layer], causal=True).colsum()
            received, allowed = (x.sum((0, 1))[self.visual] / count for x in (received, allowed))
            right = Expected(received, allowed + gamma(count + 1) * received, torch.float32)
            relevance = self.cache.relevance[layer]
            self.compare("relevance", layer, relevance, right)
            best = oracle.select_tokens(relevance.tolist(), keep)
            chosen = Expected(torch.tensor(best, dtype=torch.int64))
            self.compare("retrieved", layer, self.cache.retrieved[layer], chosen)
            hidden.append(set(self.visual) - {self.visual[i] for i in best})
            self.packed(layer, hidden[-1])
        self.chosen = [x.clone() for x in (*self.cache.relevance, *self.cache.retrieved)]
        return hidden

    def packed(self, layer: int, hidden: set[int]) -> None:
        """If there is a packed buffer, it holds the rows in their order."""
        buffer = getattr(self.cache, "packed", None)
        if buffer is not None:
            rows = [n for n in range(self.length) if n not in hidden]
            for name, mine, whole in (("k", buffer.k, self.k), ("v", buffer.v, self.v)):
                right = Expected(whole[layer][:, :, rows])
                near(mine[layer][:, :, : len(rows)], right, f"`packed.{name}` of layer {layer}")

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)
        self.hidden = None
        self.k, self.v = ([x[:, :, :length] for x in side] for side in (self.k, self.v))
        self.visual = [row for row in self.visual if row < length]
        self.turns = [start for start in self.turns if start < length]

    def step(self, step: str, amount: float) -> None:
        if step == "text":
            if self.hidden:  # an answer may be followed by a question only
                self.truncate(self.length)
            self.attend(amount)
        elif step == "question":
            self.hidden = self.question(amount)
        elif step == "answer":
            for _ in range(amount):
                self.attend(1, self.hidden)
        elif step == "broken question":
            length = self.length
            self.cache.start_question()
            self.attend(amount, layers=1)
            self.truncate(length)
        elif step == "refused":
            refused(step, lambda: self.cache.truncate(self.length + amount))
        elif step == "truncate":
            self.truncate(int(amount * self.length))
        else:  # forget
            self.truncate(self.turns[-amount])
        same(self.cache.length, self.length, "length")

    def play(self, steps: tuple[Step, ...]) -> None:
        played(steps, self.step)
        for got, was in self.kept:
            assert torch.equal(bits(got), was), "an output was changed by a later step"
        rows = visual_rows(self.case.context, self.case.visual)
        same(self.handed_over.tolist(), rows, "the index of visual rows that was handed over")
        if self.hidden is not None:
            for mine, was in zip([*self.cache.relevance, *self.cache.retrieved], self.chosen):
                assert torch.equal(mine, was), "`relevance` or `retrieved` changed by a later step"


def a_conversation(lab: Lab, case: Case) -> None:
    books = Books(lab, case)
    books.play((("text", case["context"]), *case["steps"]))


def two_conversations(lab: Lab, case: Case) -> None:
    """Two caches, used in turn, know nothing of each other."""
    other = case | {"seed": case["seed"] + 1, "sparsity": 0.3}
    books = Books(lab, case), Books(lab, other)
    for step in (("text", case["context"]), *case["steps"]):
        for mine in books:
            mine.play((step,))


def errors(lab: Lab, case: Case) -> None:
    """What the docstrings refuse."""
    books = Books(lab, case)
    books.play((("text", case["context"]),))
    cache, wrong = books.cache, case["wrong"]
    if wrong in ("an answer to an unread question", "a question in two passes"):
        cache.start_question()
        for _ in range(2 if wrong == "a question in two passes" else 0):
            books.attend(2)
    acts = {
        "nothing": lambda: cache.truncate(books.length),
        "truncate beyond the rows": lambda: cache.truncate(books.length + 1),
        "truncate below 0": lambda: cache.truncate(-1),
    }
    refused(wrong, acts.get(wrong, cache.start_answer))
    books.attend(1)  # over all rows, as before


def fits(c: SimpleNamespace) -> bool:
    return c.context * c.layers * c.G * c.group <= 3000


ERRORS = (
    "nothing", "truncate beyond the rows", "truncate below 0", "an answer without a question",
    "an answer to an unread question", "a question in two passes",
)  # fmt: skip
PROMISES = [
    Promise(
        "RetrievalCache", "conversations", a_conversation, FIELDS, fits, count=60,
        written=[{"steps": steps, "layers": 2, "G": 2, "group": 2} for steps in CONVERSATIONS],
    ),
    Promise(
        "RetrievalCache", "large", a_conversation,
        FIELDS | {"steps": LONG, "context": (300,)}, fits,
        written=[{"steps": steps, "layers": 2, "G": 2} for steps in LONG],
    ),
    Promise(
        "RetrievalCache", "apart", two_conversations, FIELDS, fits, count=4,
        written=[{"steps": steps} for steps in CONVERSATIONS[:3]],
    ),
    Promise(
        "RetrievalCache", "errors", errors, FIELDS | {"wrong": ERRORS}, fits,
        written=[{"wrong": wrong} for wrong in ERRORS], dtypes=False,
    ),
]  # fmt: skip
