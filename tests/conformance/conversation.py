"""What a session promises: any conversation about random pictures, with a tiny random model of
every kind of family, beside the same model in float64.

A conversation is a list of steps: ("ask", question, tokens), ("sample", question, tokens) at a
temperature, with the question's number as seed, ("stop", question, tokens) with the last answer's
second token as a stop token, ("forget",), ("see", pictures), ("see again",), and what must leave no
trace: ("break", question, where) is interrupted while the question is read or after so many tokens,
("refused", argument) raises.
"""

import copy
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import oracle
from .laws import Expected, Lab, Promise, bits, near, played, refused, same
from .oracle import Attention
from .recipe import Case, words

ROOT = Path(__file__).resolve().parent.parent.parent
SLACK = 16  # times the difference between the same in the model's dtype and in float64
QUESTIONS = ("what is this?", "where?", "name all that you see in this picture, please", "why")

Step = tuple
SCRIPTS: tuple[tuple[Step, ...], ...] = (
    (("ask", 0, 5),),
    (("ask", 0, 4), ("ask", 1, 3)),
    (("ask", 0, 3), ("forget",), ("ask", 1, 3), ("forget",), ("ask", 0, 3)),
    (("ask", 2, 3), ("ask", 1, 1), ("ask", 3, 4), ("forget",), ("ask", 0, 3)),
    (("ask", 0, 3), ("ask", 1, 2), ("forget",), ("forget",), ("forget",), ("ask", 2, 3)),
    (("ask", 0, 3), ("see", 1), ("ask", 0, 3), ("ask", 1, 2)),
    (("ask", 0, 3), ("see again",), ("ask", 0, 3), ("ask", 1, 2)),
    (("ask", 0, 3), ("break", 1, 0), ("ask", 2, 3)),
    (("ask", 0, 3), ("break", 1, 2), ("ask", 1, 3), ("forget",), ("ask", 2, 2)),
    (("break", 0, 1), ("ask", 0, 3)),
    (("ask", 0, 2), ("refused", "question"), ("refused", "pictures"), ("ask", 1, 2)),
    (("ask", 0, 2), ("refused", "tokens"), ("refused", "no pictures"), ("forget",), ("ask", 1, 2)),
    (("ask", 0, 6), ("forget",), ("stop", 0, 6), ("forget",), ("ask", 0, 6), ("ask", 1, 2)),
    (("ask", 0, 3), ("ask", 0, 3), ("ask", 0, 3)),
    (("sample", 0, 4), ("forget",), ("sample", 0, 4), ("ask", 1, 2)),
    (("sample", 1, 4), ("forget",), ("sample", 1, 4)),
)
FIELDS = {
    "given": ("pictures", "files"),
    "model": ("llava", "smolvlm2", "llava_next_mistral", "qwen2_5_vl", "qwen3_vl", "nvila_hf"),
    "pictures": (1, 2, 3), "script": SCRIPTS,
    "prefill": (0.5, None, 0.0, 0.3, 0.8), "decode": (0.5, None, 0.0, 0.3, 0.9),
    "scope": ("frame", "global"), "positions": ("contiguous", "original"),
    "protocol": ("conversation", "evaluation"),
}  # fmt: skip
SIZES = ((60, 40), (40, 40), (30, 70), (90, 56), (1100, 36))


def pictures(seed: int, count: int) -> list[Image.Image]:
    made = []
    for number in range(count):
        width, height = SIZES[(seed + number) % len(SIZES)]
        noise = words(7 * seed + number, width * height * 3) >> 24
        made.append(Image.frombytes("RGB", (width, height), bytes(noise.tolist())))
    return made


def in_milliseconds(stages: dict[str, float], begin: float) -> None:
    """What was measured inside is most of what was measured outside."""
    total, outside = sum(stages.values()), 1000 * (time.perf_counter() - begin)
    assert 0.02 * outside < total <= outside, f"{total:.3g} milliseconds, measured {outside:.3g}"


class Model:
    """A model in some dtype, read with attention from oracle.py: of the project's files its layers
    and its processor are used, nothing of sparsevila.py and kernels.py."""

    def __init__(self, vlm: Any, processor: Any):
        self.vlm, self.processor = vlm, processor
        self.dtype = vlm.dtype

    @torch.no_grad()
    def encode(self, views: list) -> tuple[list[Tensor], list[Tensor]]:
        """Features and salience of every view."""
        tower, features, salience = self.vlm.vision_tower, [], []
        for batch in self.vlm.batches(self.processor.pixels(views)):
            states, q, k = tower(batch, attention_layer=-1)
            skip = tower.summary_tokens
            rows = q[:, :, :skip] if skip else q
            received = Attention(rows, k).weights.mean((1, 2))[:, skip:].to(self.dtype)
            features.extend(tower.merge(states[:, skip:]))
            sums = tower.merge(received[..., None]).sum(-1)
            salience.extend(sums / tower.merge(torch.ones_like(received[:1, :, None])).sum(-1))
        return tuple(self.processor.join(views, rows) for rows in (features, salience))

    @torch.no_grad()
    def see(self, views: list, features: list[Tensor], kept: list[Tensor], positions: str) -> None:
        layers = self.vlm.config.text.layers
        self.views, self.k, self.v = views, [None] * layers, [None] * layers
        self.queries, self.hidden = [None] * layers, [set() for _ in range(layers)]
        sizes = [len(x) for x in features]
        ids, places, following = self.processor.layout(views, sizes, kept, positions)
        visual = self.vlm.project(torch.cat([x[i] for x, i in zip(features, kept)]))
        self.visual = [row for row, i in enumerate(ids) if i == self.processor.image_token_id]
        self.after = [0] * len(ids) + [following]  # entry n: position of what follows n rows
        self._read(self.vlm.embed(ids, visual), places)

    @property
    def length(self) -> int:
        return self.k[0].shape[2]

    def truncate(self, length: int) -> None:
        self.k, self.v = ([x[:, :, :length] for x in side] for side in (self.k, self.v))
        del self.after[length + 1 :]

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """Logits after these tokens, which follow what was read."""
        places = self.after[-1] + torch.arange(len(ids))
        self.after += (places + 1).tolist()
        return self._read(self.vlm.embed(ids), places)

    def _read(self, embeddings: Tensor, places: Tensor) -> Tensor:
        return self.vlm.lm_head(self.vlm.decoder(embeddings, places, self._attend)[0, -1])

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = self.k[layer] is None
        self.k[layer] = k if first else torch.cat([self.k[layer], k], 2)
        self.v[layer] = v if first else torch.cat([self.v[layer], v], 2)
        self.queries[layer] = q
        seen = [n for n in range(self.k[layer].shape[2]) if n not in self.hidden[layer]]
        weights = Attention(q, self.k[layer][:, :, seen], causal=True).weights
        values = self.v[layer][:, :, seen]
        values = values.repeat_interleave(q.shape[1] // values.shape[1], 1)
        return weights.to(self.dtype) @ values

    def relevance(self) -> list[Tensor]:
        """Of the visual rows for the rows read last, of every layer."""
        received = [
            Attention(q, k, causal=True).weights.mean((0, 1, 2))
            for q, k in zip(self.queries, self.k)
        ]
        return [x[self.visual].to(self.dtype) for x in received]


class Pair:
    """The same in float64 and in the model's dtype: what is expected, and what may be off."""

    def __init__(self, exact: Model, rounded: Model):
        self.exact, self.rounded = exact, rounded

    def both(self, method: str, *arguments: Any) -> tuple[Any, Any]:
        return tuple(getattr(model, method)(*arguments) for model in (self.exact, self.rounded))

    @staticmethod
    def expected(exact: Tensor, rounded: Tensor, dtype: torch.dtype) -> Expected:
        off = (rounded.double() - exact).abs().max() if exact.numel() else torch.tensor(0.0)
        allowed = SLACK * off + 2 * oracle.ROUNDOFF[dtype] * exact.abs() + 1e-12
        return Expected(exact, allowed.expand_as(exact), dtype)


@functools.cache
def _loaded(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A checkpoint in float64 and in a dtype, both of the rounded weights, and its processor;
    nobody's to change."""
    from checkpoints import load

    vlm, processor = load(folder, device="cpu", dtype=dtype)
    return copy.deepcopy(vlm).double(), vlm, processor


class Session:
    """A session under test, beside a `Pair` that goes through the same."""

    def __init__(self, lab: Lab, case: Case, beside: "Session | None" = None):
        c = self.case = SimpleNamespace(**case)
        self.dtype = getattr(torch, c.dtype)
        folder = ROOT / "tiny" if c.model == "tiny" else ROOT / "tests" / "golden" / c.model
        exact, vlm, processor = _loaded(folder, self.dtype)
        self.processor = copy.copy(processor)
        self.pair = Pair(Model(exact, self.processor), Model(vlm, self.processor))
        self.vlm = beside.vlm if beside else copy.deepcopy(vlm).to(lab.device)
        self.logits: list[Tensor] = []
        self.stop_at = -1  # which call of the output head is interrupted
        self.vlm.lm_head.register_forward_hook(self._record)
        self.vlm.decoder.layers[-1].register_forward_pre_hook(self._break)
        settings = {"prefill_sparsity": c.prefill, "decode_sparsity": c.decode}
        settings = {name: value for name, value in settings.items() if value is not None}
        defaults = {"scope": "frame", "positions": "contiguous", "protocol": "conversation"}
        settings |= {
            n: getattr(c, n) for n, default in defaults.items() if getattr(c, n) != default
        }
        self.prefill = 0.75 if c.prefill is None else c.prefill
        self.decode = 0.8 if c.decode is None else c.decode
        self.made = lab.operations["SparseVILA"](self.vlm, self.processor, **settings)
        self.turns: list[tuple] = []  # (start, unread, question, tokens) of what is in the cache
        self.seen, self.folder = 0, tempfile.TemporaryDirectory()
        self.answers: list[tuple[Any, list[int], list[Tensor]]] = []
        self.before: dict[tuple, list[Tensor]] = {}  # what was asked, after what -> all results

    def _record(self, module, inputs, output) -> None:
        self.logits.append(output.detach().cpu().flatten().clone())
        if len(self.logits) == self.stop_at:
            raise KeyboardInterrupt

    def _break(self, module, inputs) -> None:
        if self.stop_at == 0:
            raise KeyboardInterrupt

    def compare(self, name: str, number: int, got: Tensor, expected: Expected) -> None:
        near(got, expected, f"`{name}` of {'token' if name == 'logits' else 'layer'} {number}")

    # --- steps

    def see(self, count: int) -> None:
        """Files have the same names every time."""
        self.seen += 1
        shown = self.shown = pictures(self.case.seed + 100 * self.seen, count)
        self.given = shown
        if self.case.given == "files":
            self.given = [Path(self.folder.name) / f"{number}.png" for number in range(count)]
            for picture, path in zip(shown, self.given):
                picture.save(path)
        self.look()

    def look(self) -> None:
        shown, count = self.shown, len(self.shown)
        self.bytes = [(picture.size, picture.tobytes()) for picture in shown]
        begin = time.perf_counter()
        self.made.see(self.given if count > 1 else self.given[0])
        stages = self.made.stats["milliseconds"]
        same({*stages}, {"vision", "prune", "prefill"}, "the stages of `see`")
        in_milliseconds(stages, begin)
        for picture, (size, raw) in zip(shown, self.bytes):
            assert picture.size == size and picture.tobytes() == raw, "a picture was changed"
        views = self.processor.views(shown)
        (features, salience), (low_features, low_salience) = self.pair.both("encode", views)
        kept = [index.cpu() for index in self.made.kept]
        same(len(kept), len(salience), "the number of views in `kept`")
        self._best(kept, salience, low_salience)
        for model, rows in ((self.pair.exact, features), (self.pair.rounded, low_features)):
            model.see(views, rows, kept, self.case.positions)
        self.turns = []
        sizes, V = [len(x) for x in features], sum(map(len, kept))
        stats = self.made.stats
        same(stats["pictures"], count, "stats['pictures']")
        same(stats["views"], len(views), "stats['views']")
        visual = {"encoded": sum(sizes), "kept": V, "attended": None}
        same(stats["visual_tokens"], visual, "stats['visual_tokens']")
        same(stats["text_tokens"], self.pair.exact.length - V, "stats['text_tokens']")

    def _best(self, kept: list[Tensor], salience: list[Tensor], low: list[Tensor]) -> None:
        """What is kept is as many as it must be, ascending, and nothing that was dropped is more
        salient, up to rounding."""
        off = SLACK * float((torch.cat(salience) - torch.cat(low).double()).abs().max()) + 1e-9
        stays = [torch.zeros(len(x), dtype=torch.bool).index_fill(0, i, True)
                 for x, i in zip(salience, kept)]  # fmt: skip
        for index in kept:
            same(index.dtype, torch.int64, "the dtype of `kept`")
            same(index.tolist(), sorted(set(index.tolist())), "`kept` of a view")
        groups = list(zip(salience, stays))
        if self.case.scope == "global":
            groups = [(torch.cat(salience), torch.cat(stays))]
        for scores, mine in groups:
            keep = oracle.keep_count(len(scores), self.prefill)
            same(int(mine.sum()), keep, "the number of tokens kept")
            if keep < len(scores):
                worst, best = float(scores[mine].min()), float(scores[~mine].max())
                assert worst >= best - off, (
                    f"a token of salience {worst:.6g} is kept, one of {best:.6g} is not"
                )

    def ask(self, question: str, tokens: int, step: str = "ask", seed: int = 0) -> None:
        """Every second question is asked with on_text."""
        options: dict[str, Any] = {"max_new_tokens": tokens}
        closing = {*self.vlm.config.stop_ids, *self.processor.stop_ids}
        pieces: list[str] = []
        if step == "sample":
            options |= {"temperature": 1.0, "seed": seed}
        if step == "stop":
            options["stop_ids"] = [self.answers[-1][1][:2][-1]]
        if len(self.answers) % 2 == 1:
            options["on_text"] = pieces.append
        self.logits.clear()
        begin = time.perf_counter()
        answer = self.made.ask(question, **options)
        in_milliseconds(answer.timings, begin)
        self._generated(answer, tokens, closing.union(options.get("stop_ids", ())), step)
        if "on_text" in options:
            same("".join(pieces), answer.text, "the pieces of text together")
        results = self._followed(answer, question)
        # What stays of it.
        ids = answer.token_ids
        same_before = (self.seen, *((t[2], t[3]) for t in self.turns), question, tokens, step)
        known = self.before.setdefault(same_before, results)
        for one, other in zip(known, results):
            assert torch.equal(bits(one), bits(other)), "the same question has another answer now"
        self.answers.append((answer, list(ids), [x.cpu().clone() for x in answer.retrieved]))
        unread = [] if ids[-1] in closing else ids[-1:]
        self.turns.append((self.start, unread, question, tokens))
        if self.case.protocol == "evaluation":
            self._evict()

    def _generated(self, answer: Any, tokens: int, stop: set[int], step: str) -> None:
        """Of the answer by itself: its tokens follow from the logits, and end where they must."""
        ids, got = answer.token_ids, self.logits
        assert 1 <= len(ids) <= tokens, f"{len(ids)} tokens where {tokens} are the most"
        ends = [i in stop for i in ids]
        assert not any(ends[:-1]), f"{ids}: goes on after a stop token"
        assert ends[-1] or len(ids) == tokens, f"{ids}: ends without a stop token"
        same(len(got), len(ids), "steps of decoding")
        if step != "sample":
            for logits, token in zip(got, ids):
                logits = logits.clone()
                if self.processor.image_token_id < len(logits):
                    logits[self.processor.image_token_id] = -torch.inf
                same(token, int(logits.argmax()), "the most likely token")
        same(answer.text, self.processor.decode(ids), "the text")
        same({*answer.timings}, {"question", "retrieve", "decode"}, "the names of timings")

    def _followed(self, answer: Any, question: str) -> list[Tensor]:
        """What the answer was generated from, read by the pair as well; all that was computed."""
        got, ids, cache = list(self.logits), answer.token_ids, self.made.cache
        exact, rounded, dtype = self.pair.exact, self.pair.rounded, self.dtype
        self.start, unread = exact.length, self.turns[-1][1] if self.turns else []
        read = {"first": not self.turns, "views": exact.views}
        asked = self.read_ids = unread + self.processor.question(question.strip(), **read)
        for model in (exact, rounded):
            model.hidden = [set() for _ in model.hidden]
        logits = [self.pair.both("read", asked)]
        keep = oracle.keep_count(len(exact.visual), self.decode)
        received = self.pair.both("relevance")
        same(len(answer.retrieved), len(exact.k), "layers in `retrieved`")
        results = [*got, torch.tensor(ids)]
        bytes_read = 0
        for layer, chosen in enumerate(answer.retrieved):
            chosen, relevance = chosen.cpu(), cache.relevance[layer].cpu()
            right = Pair.expected(*(x[layer] for x in received), torch.float32)
            self.compare("relevance", layer, relevance, right)
            best = torch.tensor(oracle.select_tokens(relevance.tolist(), keep), dtype=torch.int64)
            self.compare("retrieved", layer, chosen, Expected(best))
            gone = set(range(len(exact.visual))) - set(chosen.tolist())
            for model in (exact, rounded):
                model.hidden[layer] = {model.visual[i] for i in gone}
            results += [relevance, chosen]
            k = exact.k[layer]
            row = 2 * k.shape[1] * k.shape[3] * dtype.itemsize
            bytes_read += row * (self.start + len(asked) - len(gone))
        same(answer.kv_bytes_per_token, bytes_read, "kv_bytes_per_token")
        same(self.made.stats["visual_tokens"]["attended"], [keep] * len(exact.k), "attended")
        logits += [self.pair.both("read", [token]) for token in ids[:-1]]
        for place, (mine, right) in enumerate(zip(got, logits)):
            self.compare("logits", place, mine, Pair.expected(*right, dtype))
        return results

    def _evict(self) -> None:
        if self.turns:
            for model in (self.pair.exact, self.pair.rounded):
                model.truncate(self.turns[-1][0])
            self.turns.pop()

    def raises(self, what: str, kinds: tuple, act: Callable) -> None:
        """An act that must raise and leave no trace."""
        made, cache = self.made, self.made.cache
        was = made.kept, copy.deepcopy(made.stats), made.views
        try:
            act()
        except kinds:
            pass
        else:
            raise AssertionError(f"{what}: {kinds[0].__name__} is promised, nothing was raised")
        finally:
            self.stop_at = -1
        assert made.cache is cache, "the cache is another one"
        same([x.tolist() for x in made.kept], [x.tolist() for x in was[0]], "`kept`")
        same(made.stats, was[1], "`stats`")
        same(len(made.views), len(was[2]), "the number of views")

    def step(self, name: str, *how: Any) -> None:
        if name == "see":
            self.see(*how)
        elif name == "see again":
            self.look()
        elif name in ("ask", "sample", "stop"):
            self.ask(QUESTIONS[how[0]], how[1], step=name, seed=how[0])
        elif name == "forget":
            self.made.forget()
            self._evict()
        elif name == "break":
            self.logits.clear()
            number, self.stop_at = how
            ask = lambda: self.made.ask(QUESTIONS[number], max_new_tokens=4)  # noqa: E731
            self.raises("an interruption", (KeyboardInterrupt,), ask)
        else:
            refused = {
                "question": lambda: self.made.ask("  \n"),
                "tokens": lambda: self.made.ask("why?", max_new_tokens=0),
                "no pictures": lambda: self.made.see([]),
                "pictures": lambda: self.made.see("no/such/picture.png"),
            }[how[0]]  # fmt: skip
            self.raises(how[0], (ValueError, OSError), refused)
        same(self.made.cache.length, self.pair.exact.length, "the length of the cache")

    def play(self, steps: tuple[Step, ...]) -> None:
        played(steps, self.step)
        for answer, ids, retrieved in self.answers:
            same(answer.token_ids, ids, "the token ids of an earlier answer")
            for mine, was in zip(answer.retrieved, retrieved):
                same(mine.tolist(), was.tolist(), "`retrieved` of an earlier answer")


def a_conversation(lab: Lab, case: Case) -> None:
    Session(lab, case).play((("see", case["pictures"]), *case["script"]))


def two_conversations(lab: Lab, case: Case) -> None:
    """Two sessions with one model, used in turn, know nothing of each other."""
    other = {"seed": case["seed"] + 1, "prefill": 0.3, "decode": 0.8, "positions": "original"}
    first = Session(lab, case)
    both = first, Session(lab, case | other, beside=first)
    for step in (("see", case["pictures"]), *case["script"]):
        for session in both:
            session.play((step,))


def errors(lab: Lab, case: Case) -> None:
    """What the docstrings refuse."""
    wrong, kind = case["wrong"], lab.operations["SparseVILA"]
    session = Session(lab, case)
    settings = {"prefill_sparsity": 1.0, "decode_sparsity": -0.1, "scope": "video",
                "positions": "new", "protocol": "chat"}  # fmt: skip
    if wrong in settings:
        setting = {wrong: settings[wrong]}
        refused(wrong, lambda: kind(session.vlm, session.processor, **setting))
        return
    if wrong != "a question before pictures":
        session.see(1)
    if wrong.startswith("fps"):
        fps = {"fps of 0": 0, "fps below 0": -1.0, "fps of NaN": float("nan")}[wrong]
        refused(wrong, lambda: session.made.see(session.given, fps=fps))
        return
    inside = {"ask in on_text": lambda piece: session.made.ask("why?"),
              "forget in on_text": lambda piece: session.made.forget()}.get(wrong)  # fmt: skip
    tokens = 10**6 if wrong == "too many tokens" else 30
    ask = lambda: session.made.ask("what is this?", max_new_tokens=tokens, on_text=inside)  # noqa: E731
    refused(wrong, ask, ValueError if wrong == "too many tokens" else RuntimeError)


ERRORS = (
    "nothing",
    "prefill_sparsity", "decode_sparsity", "scope", "positions", "protocol",
    "a question before pictures", "too many tokens", "ask in on_text", "forget in on_text",
    "fps of 0", "fps below 0", "fps of NaN",
)  # fmt: skip
PROMISES = [
    Promise(
        "SparseVILA", "conversations", a_conversation, FIELDS, count=10,
        written=[
            {"script": script, "given": given} for script in SCRIPTS for given in FIELDS["given"]
            if given == "pictures" or any("see" in step[0] for step in script)
        ],
    ),
    Promise(
        "SparseVILA", "apart", two_conversations, FIELDS, dtypes=False,
        written=[{"script": SCRIPTS[2]}, {"script": SCRIPTS[1], "model": "qwen2_5_vl"}],
    ),
    Promise(
        "SparseVILA", "errors", errors, FIELDS | {"wrong": ERRORS},
        written=[{"wrong": wrong} for wrong in ERRORS], dtypes=False,
    ),
]  # fmt: skip
