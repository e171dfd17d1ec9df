"""SparseVILA: prune visual tokens once, then retrieve for every question only those it needs.

A vision-language model turns pictures into hundreds or thousands of visual tokens. Reading them
(prefill) is paid once and bound by arithmetic; decoding is paid for every generated token and bound
by reading the KV cache. A choice of tokens made for the first question destroys what the second one
needs. SparseVILA (arXiv 2510.17777) therefore splits the sparsity:

* `prune` (Algorithm 2), between vision tower and projector, before any question is known: keep the
  most salient tokens, those to which the tower's own last layer pays most attention.
* `RetrievalCache` (Algorithm 3), once per question: while the question is read against all kept
  tokens, score how much attention each of them receives in every layer; pack the keys and values of
  the best ones with those of all text into a small buffer; decode from that buffer only. Nothing is
  deleted from the main cache, so the next question finds everything.

`SparseVILA` is the session around the two: `see` pictures once, `ask` any number of questions. Both
are ordinary insertions: override `SparseVILA.prune`, and `cache_type` or `new_cache`, to try
another method; `Dense`, the baseline, does. At sparsity 0 the same code gives the same bits as
`Dense`.

    python sparsevila.py --image photo.jpg --ask "What is on the table?" \\
        --model llava-hf/llava-1.5-7b-hf

Axes: H query heads, G key/value heads, M question rows, N cached rows, D head size, S edge of a
view, C width of a feature, E decoder width, n visual tokens of a view (a picture, a frame or a
tile; an axis "images" counts views), V visual tokens in the cache, K chosen tokens (kept or
retrieved), T tokens of the context.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kernels import attention_colsum, gather_keys_values, gather_tokens
from model import (
    VLM,
    KVCache,
    Processor,
    Stopwatch,
    View,
    check_sampling,
    load,
    open_clip,
    open_picture,
)

ROOM = 256  # cache rows set aside for questions and answers; the caches grow when it is used up

# --- choosing tokens ------------------------------------------------------------------------------


def keep_count(n: int, sparsity: float) -> int:
    """How many of n tokens stay: n - floor(sparsity * n), at least one (of none, none).

    sparsity is in [0, 1). The product is exact: 0.29 means 29/100 and not the nearest binary
    fraction below it, so keep_count(100, 0.29) is 71; keep_count(n, k / n) is n - k.
    Raises: ValueError otherwise. Source: the paper keeps what exceeds the quantile `sparsity`,
    which at sparsity 0 drops the least token and with ties any number; an exact count is our
    choice.
    """
    if type(n) is not int or n < 0:
        raise ValueError(f"n must be an integer of at least 0, got {n!r}")
    check_sparsity("sparsity", sparsity)
    dropped = int(Fraction(sparsity).limit_denominator(10**9) * n)
    return max(n - dropped, min(n, 1))


def check_sparsity(name: str, sparsity: float) -> None:
    """Raise ValueError for a sparsity outside [0, 1)."""
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{name} must be in [0, 1), got {sparsity!r}")


def check_question(question: str) -> None:
    """Raise ValueError for what is no question."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text that is not empty, got {question!r}")


def select_tokens(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores along the last axis, ascending; ties go to the lower
    index (our choice).

    scores (..., n) float -> (..., keep) int64. The choice at a smaller keep is a subset of that at
    a larger one. Raises: ValueError for NaN and for keep outside [0, n].
    """
    if type(keep) is not int or not 0 <= keep <= scores.shape[-1]:
        raise ValueError(f"keep must be an integer in [0, {scores.shape[-1]}], got {keep!r}")
    if scores.isnan().any():
        raise ValueError(f"scores must not be NaN, got {int(scores.isnan().sum())} NaN")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def prune(
    features: Tensor, salience: Tensor, sparsity: float, *, scope: str = "frame"
) -> tuple[Tensor, Tensor]:
    """Keep the most salient tokens, in their original order.

    Args:
        features: (images, n, C).
        salience: (images, n), as `VLM.encode` gives it.
        sparsity: share of tokens to drop, in [0, 1); the count is `keep_count`.
        scope: "frame" chooses in every view apart, so that none is emptied; "global" chooses over
            all of them together.

    Returns: the kept features and their index. "frame": (images, K, C) and (images, K), indices
    within the view. "global": (1, K, C) and (1, K), indices into all images * n tokens.
    Raises: ValueError for other shapes, scopes or sparsities, and for NaN in the salience.
    Source: Algorithm 2; the paper leaves the scope open, "frame" is our choice.
    """
    if features.dim() != 3 or salience.shape != features.shape[:2]:
        raise ValueError(
            "features must be (images, n, C) and salience (images, n), "
            f"got {tuple(features.shape)} and {tuple(salience.shape)}"
        )
    if scope not in ("frame", "global"):
        raise ValueError(f"scope must be 'frame' or 'global', got {scope!r}")
    if scope == "global":
        features, salience = features.flatten(0, 1)[None], salience.flatten()[None]
    index = select_tokens(salience, keep_count(salience.shape[1], sparsity))
    return gather_tokens(features, index), index


# --- the retrieval cache --------------------------------------------------------------------------


class RetrievalCache(KVCache):
    """A KV cache that answers every question from a small part of its visual rows.

    Between `start_question` and `start_answer` attention is dense, and every layer scores the
    visual rows:

        relevance_v = sum over heads h and question rows i of A[h, i, v] / (H * M),

    A the softmax over the whole causal key row. `start_answer` selects the best rows of each layer
    (one set for all its heads) and packs them, in order and with all text rows, into `packed`, a
    dense KVCache of its own. From then on attention reads `packed` only; new rows go to both
    caches. Packed keys keep the rotary positions they were cached with.

    Attributes:
        visual: (V,) int64, the rows that hold visual tokens; set it before the first question, on
            the model's device.
        relevance: per layer (V,) float32, of the last question that was read.
        retrieved: per layer (K,) int64, ascending, which of the V tokens the last question
            retrieved.
        packed: the buffer an answer is decoded from; None from `start_question` or `truncate` to
            the next `start_answer`.

    Source: Algorithm 3. That the first answer token is computed densely, that the softmax runs over
    all keys and that keys are not rotated anew is how public readers understand the paper.
    Raises: ValueError for a sparsity outside [0, 1).
    """

    def __init__(self, layers: int, decode_sparsity: float = 0.9, capacity: int = 256):
        check_sparsity("decode_sparsity", decode_sparsity)
        super().__init__(layers, capacity)
        self.decode_sparsity = decode_sparsity
        self.visual = torch.empty(0, dtype=torch.int64)
        self.relevance: list[Tensor] = []
        self.retrieved: list[Tensor] = []
        self.packed: KVCache | None = None
        self.scoring = False

    def start_question(self) -> None:
        self.packed, self.scoring, self.relevance = None, True, []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Dense, and scored while a question is read; over `packed` alone in an answer."""
        if self.packed is not None:
            self.append(layer, k, v)
            return self.packed.attend(layer, q, k, v)
        out = super().attend(layer, q, k, v)
        if self.scoring:
            self.relevance.append(self.score(q, self.k[layer][:, :, : self.filled[layer]]))
        return out

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Relevance (V,) of the visual rows for question rows q (1, H, M, D) and all keys k (1, G,
        N, D)."""
        _, H, M, _ = q.shape
        received = attention_colsum(q, k, causal=True)[0].sum(0)  # (N,)
        return received[self.visual] / (H * M)

    def start_answer(self) -> None:
        """Select the most relevant visual rows of every layer and pack them with all text. Raises:
        ValueError unless the question was read in one pass."""
        V, N, layers = len(self.visual), self.length, len(self.k)
        keep = keep_count(V, self.decode_sparsity)
        if len(self.relevance) != layers:
            reads = len(self.relevance) / layers
            raise ValueError(f"a question must be read in one pass, got {reads:g}")
        retrieved = list(select_tokens(torch.stack(self.relevance), keep))
        packed = KVCache(layers, capacity=N - V + keep + ROOM)
        for layer, chosen in enumerate(retrieved):
            rows = self.packed_rows(chosen)[None]
            k, v = self.k[layer][:, :, :N], self.v[layer][:, :, :N]
            packed.append(layer, *gather_keys_values(k, v, rows))
        self.retrieved, self.packed, self.scoring = retrieved, packed, False

    def packed_rows(self, chosen: Tensor) -> Tensor:
        """Rows of the main cache to pack, ascending: all text and the chosen of the V visual
        tokens."""
        wanted = torch.ones(self.length, dtype=torch.bool, device=chosen.device)
        wanted[self.visual] = False
        wanted[self.visual[chosen]] = True
        return wanted.nonzero()[:, 0]

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.packed, self.scoring = None, False
        self.visual = self.visual[self.visual < length]


# --- the session ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # tensors have no truth value
class Answer:
    """What `SparseVILA.ask` returns.

    Attributes:
        text: the answer without special tokens.
        token_ids: the generated tokens; a stop token, if one came, is the last.
        retrieved: per layer (K,) int64, which of the V kept visual tokens were decoded from.
        timings: milliseconds of the stages "question", "retrieve" and "decode".
        kv_bytes_per_token: bytes of keys and values of context and question, all layers together,
            that every decoding step reads (the tokens generated so far come on top).
    """

    text: str
    token_ids: list[int]
    retrieved: list[Tensor]
    timings: dict[str, float]
    kv_bytes_per_token: int


class SparseVILA:
    """A session: `see` one or more pictures, then `ask` questions about them.

    Args:
        model, processor: as `model.load` returns them.
        prefill_sparsity: share of visual tokens pruned before the decoder sees them, in [0, 1).
        decode_sparsity: share of the *kept* visual tokens that decoding leaves out, in [0, 1).
        scope: pruning per "frame" or "global", see `prune`.
        positions: "contiguous" numbers the kept tokens anew, as if the pruned had never been (the
            paper); "original" keeps every token's rotary position, and the text goes on where it
            would have.
        protocol: "conversation" keeps earlier questions and answers in the cache; "evaluation"
            evicts each turn when it is over, so that no answer can leak into the next (Algorithm
            4).

    Attributes:
        views: the pictures, frames and tiles that the vision tower saw (see `model.View`).
        kept: the index that `prune` returned.
        cache: the KV cache, None before `see`.
        stats: counts ("pictures", "views", "visual_tokens": encoded, kept, attended per layer for
            the last question, None before; "text_tokens" of the context) and "milliseconds" of the
            stages "vision" (with the salience), "prune" and "prefill" (with the projector).

    Raises: ValueError for arguments out of range.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        *,
        prefill_sparsity: float = 0.75,
        decode_sparsity: float = 0.9,
        scope: str = "frame",
        positions: str = "contiguous",
        protocol: str = "conversation",
    ):
        check_sparsity("prefill_sparsity", prefill_sparsity)
        check_sparsity("decode_sparsity", decode_sparsity)
        for name, value, accepted in (
            ("scope", scope, ("frame", "global")),
            ("positions", positions, ("contiguous", "original")),
            ("protocol", protocol, ("conversation", "evaluation")),
        ):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
        self.model, self.processor = model, processor
        self.prefill_sparsity, self.decode_sparsity = prefill_sparsity, decode_sparsity
        self.scope, self.positions, self.protocol = scope, positions, protocol
        self.cache: KVCache | None = None
        self.views: list[View] = []
        self.kept = torch.empty(0, dtype=torch.int64)
        self.stats: dict = {}
        self._turns: list[tuple[int, list[int]]] = []  # (cache length before, tokens not yet read)
        self._busy = False  # while `ask` runs

    # The two insertions of the method. For another one override `prune`, and `cache_type` (a
    # RetrievalCache with another `score`) or `new_cache` (any other KVCache); and `encode` for one
    # that needs more of the tower, or another salience. baselines.py has sixteen examples.

    cache_type = RetrievalCache

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (images, 3, S, S) -> features (images, n, C), salience (images, n)."""
        return self.model.encode(pixels)

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        """features (images, n, C), salience (images, n) -> kept features and index, as `prune`."""
        return prune(features, salience, self.prefill_sparsity, scope=self.scope)

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        """An empty cache, told which of its rows (V,) will hold visual tokens."""
        cache = self.cache_type(self.model.config.text.layers, self.decode_sparsity, capacity)
        cache.visual = visual
        return cache

    def see(
        self,
        images: str | Path | Image.Image | list[str | Path | Image.Image],
        *,
        fps: float | None = None,
    ) -> None:
        """Encode, prune and prefill one picture or a list of pictures; forget everything before.

        fps: None for separate pictures. If they are the frames of a clip, how many there are in a
        second; the model's family decides which of them are shown, and how.

        Raises: ValueError or OSError for what is no picture, and for more visual tokens than the
        model's context holds; RuntimeError while `ask` runs. A call that fails leaves the session
        as it was.
        """
        self._check_idle()
        images = images if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("images must hold at least one picture, got none")
        if fps is not None and (not isinstance(fps, (int, float)) or not 1e-6 <= fps < 2**31):
            raise ValueError(f"fps must be a number from 1e-6 to 2e9 or None, got {fps!r}")
        pictures = [open_picture(image) for image in images]
        views = self.processor.views(pictures, fps=fps)
        pixels = self.processor.pixels(views)
        watch = Stopwatch(self.model.device)
        features, salience = self.encode(pixels)
        watch.lap("vision")
        features, index = self.prune(features, salience)
        watch.lap("prune")
        n = salience.shape[1]  # visual tokens of a view
        visual = self.model.project(features).flatten(0, 1)  # (V, E)
        ids, positions, following = self._context(index, n, views)
        limit = self.model.config.text.max_positions
        if following >= limit:
            raise ValueError(
                f"{len(views)} pictures or tiles with {len(visual)} visual tokens take {following} "
                f"of the model's {limit} positions and leave none for a question: "
                "show fewer or prune more (--sparse leaves out the dense model)"
            )
        rows = (torch.tensor(ids) == self.processor.image_token_id).nonzero()[:, 0]
        cache = self.new_cache(rows.to(self.model.device), capacity=len(ids) + ROOM)
        self.model.read(self.model.embed(ids, visual), cache, positions=positions)
        cache.following[-1] = following  # beyond the last row if the last tokens were pruned
        watch.lap("prefill")
        stats = {
            "pictures": views[-1].number + 1,
            "views": len(views),
            "visual_tokens": {"encoded": salience.numel(), "kept": len(visual), "attended": None},
            "text_tokens": len(ids) - len(visual),
            "milliseconds": watch.milliseconds,
        }
        self.cache, self.kept, self.stats, self._turns = cache, index, stats, []
        self.views = views

    def _context(self, index: Tensor, n: int, views: list[View]) -> tuple[list[int], Tensor, int]:
        """Token ids before the first question, their positions (T,), and the position that
        follows."""
        tokens = self.flat(index, n)
        before, behind = torch.tensor([-1]), torch.tensor([len(views) * n])
        if (tokens.diff(prepend=before, append=behind) <= 0).any():
            raise ValueError(f"kept tokens must be ascending and below {behind[0]}, got {tokens}")
        counts = torch.bincount(tokens // n, minlength=len(views)).tolist()
        ids = self.processor.context(counts, views)
        if self.positions == "contiguous":
            return ids, torch.arange(len(ids)), len(ids)
        everything = torch.tensor(self.processor.context([n] * len(views), views))
        visual = everything == self.processor.image_token_id
        stays = ~visual
        stays[visual.nonzero()[:, 0][tokens]] = True
        return ids, stays.nonzero()[:, 0], len(everything)

    @staticmethod
    def flat(index: Tensor, n: int) -> Tensor:
        """The index from `prune`, (images, K) within each picture of n tokens or (1, K) over all,
        as one list (V,) into images * n tokens, on the CPU."""
        return (index.cpu() + n * torch.arange(len(index))[:, None]).flatten()

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about what was seen.

        on_text is called with every new piece of text; the pieces together are `Answer.text`. The
        other arguments are those of `VLM.generate`. A call that fails or is interrupted leaves the
        session as it was. Raises: RuntimeError before `see` and inside `on_text`; ValueError for an
        empty question, arguments out of range, or a question and answer that do not fit into the
        model's context.
        """
        if self.cache is None:
            raise RuntimeError("nothing to ask about: call see(images) first")
        check_question(question)
        self._check_idle()
        turns, stats, start = self._turns, self.stats, self.cache.length
        unread = turns[-1][1] if turns else []
        ids = unread + self.processor.question(question.strip(), first=not turns, views=self.views)
        text = _TextStream(self.processor, on_text)
        watch = Stopwatch(self.model.device)
        try:
            self._busy = True
            tokens = self.model.generate(
                self.model.embed(ids),
                cache=self.cache,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_token=text.add,
                watch=watch,
            )
            text.finish()
            answer = self._answer(text.text, tokens, start + len(ids), watch.milliseconds)
            # The prompt of the next question begins with the stop token; any other last token was
            # generated but not read yet.
            unread = [] if tokens[-1] in self.model.config.stop_ids else tokens[-1:]
            self._turns, self._busy = [*turns, (start, unread)], False
            if self.protocol == "evaluation":
                self.forget()
            return answer
        except BaseException:
            self._turns, self.stats, self._busy = turns, stats, False
            self.cache.truncate(start)
            raise

    def _answer(self, text: str, tokens: list[int], rows_read: int, timings: dict) -> Answer:
        """The Answer, decoded after `rows_read` rows of context and question; records in `stats`
        what decoding attended to."""
        visual = self.stats["visual_tokens"]
        everything = [torch.arange(visual["kept"])] * len(self.cache.k)
        retrieved = getattr(self.cache, "retrieved", everything)  # a dense cache leaves nothing out
        attended = [len(chosen) for chosen in retrieved]
        self.stats = self.stats | {"visual_tokens": visual | {"attended": attended}}
        row = self.cache.k[0][:, :, 0].nbytes + self.cache.v[0][:, :, 0].nbytes
        rows = sum(rows_read - visual["kept"] + count for count in attended)
        return Answer(text, tokens, retrieved, timings, kv_bytes_per_token=row * rows)

    def forget(self) -> None:
        """Evict the last question and its answer. Without one, nothing happens. Raises:
        RuntimeError while `ask` runs."""
        self._check_idle()
        if self._turns:
            *turns, (start, _) = self._turns
            self.cache.truncate(start)
            self._turns = turns

    def _check_idle(self) -> None:
        if self._busy:
            raise RuntimeError("the session is answering: one call at a time, and none in on_text")


class Dense(SparseVILA):
    """The baseline: the same session without sparsity, decoding from the plain KVCache."""

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        images, n = salience.shape
        return features, torch.arange(n).expand(images, n)

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        return KVCache(self.model.config.text.layers, capacity)


class _TextStream:
    """Turns tokens into text as they come; holds back what may be the first bytes of a
    character."""

    def __init__(self, processor: Processor, on_text: Callable[[str], None] | None):
        self.processor, self.on_text = processor, on_text
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        self._emit(self.processor.decode(self.ids).rstrip("\ufffd"))

    def finish(self) -> None:
        self._emit(self.processor.decode(self.ids))

    def _emit(self, text: str) -> None:
        piece = text[len(self.text) :]
        self.text += piece
        if piece and self.on_text:
            self.on_text(piece)


# --- the picture of what was kept and retrieved ---------------------------------------------------


def overlay(
    session: SparseVILA, answers: list[tuple[str, Answer]], dense: list[Answer] | None = None
) -> Image.Image:
    """A panel per question: pruned tokens dimmed, those retrieved for it outlined, the brighter the
    more layers retrieved them; question and answer above. Tiles of a picture stand together, the
    whole picture on their right. `answers` are questions about what the session sees, and what
    `ask` returned; `dense`, if given, what the dense model answered, to be shown as well. Raises:
    ValueError for no answers or pictures."""
    if not answers or not session.views:
        raise ValueError(f"nothing to show: {len(answers)} answers, {len(session.views)} pictures")
    encoded = session.stats["visual_tokens"]["encoded"]
    n = encoded // len(session.views)  # visual tokens of a view
    kept = session.flat(session.kept, n)
    tiled = any(view.rows for view in session.views)
    edge = 160 if tiled else max(session.views[0].picture.width, 320)
    boxes, top = session.model.config.token_boxes(edge), 74 if dense else 52
    places = _places(session.views, edge, top)
    width = max(x for x, _ in places) + edge + 4
    height = max(y for _, y in places) + edge + 4
    font = ImageFont.load_default(16)
    whole = Image.new("RGB", ((width + 4) * len(answers), height), "white")
    for panel, (question, answer) in enumerate(answers):
        left, draw = panel * (width + 4), ImageDraw.Draw(whole)
        lines = [question, answer.text]
        if dense:
            lines = [question, f"dense: {dense[panel].text}", f"sparse: {answer.text}"]
        for number, line in enumerate(lines):
            draw.text((left + 4, 4 + 22 * number), _one_line(line), "black", font)
        votes = torch.zeros(encoded)
        for chosen in answer.retrieved:
            votes[kept[chosen.cpu()]] += 1 / len(answer.retrieved)
        for number, (view, (x, y)) in enumerate(zip(session.views, places)):
            tokens = torch.arange(number * n, (number + 1) * n)
            picture = view.picture.resize((edge, edge))
            marked = _mark(picture, boxes, ~torch.isin(tokens, kept), votes[tokens])
            whole.paste(marked, (left + x, y))
    return whole


def _places(views: list[View], edge: int, top: int) -> list[tuple[int, int]]:
    """The upper left corner of each view below `top`: pictures side by side, tiles in their
    grid."""
    places, left = [], 4
    for view in views:
        if view.row:
            places.append((left + (view.column - 1) * edge, top + (view.row - 1) * edge))
        else:
            places.append((left + view.columns * edge + (8 if view.columns else 0), top))
            left = places[-1][0] + edge + 8
    return places


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _mark(
    picture: Image.Image, boxes: list[tuple[int, int, int, int]], dropped: Tensor, votes: Tensor
) -> Image.Image:
    """Dim the boxes of dropped tokens and outline those with votes (a share in [0, 1])."""
    shade = Image.new("L", picture.size, 0)
    for box, gone in zip(boxes, dropped.tolist()):
        ImageDraw.Draw(shade).rectangle(box, 175 if gone else 0)
    picture = Image.composite(Image.new("RGB", picture.size, (40, 40, 40)), picture, shade)
    draw = ImageDraw.Draw(picture)
    for box, share in zip(boxes, votes.tolist()):
        if share:
            level = round(90 + 165 * share)
            draw.rectangle(box, outline="black", width=4)
            draw.rectangle(box, outline=(level, level, 0), width=3)
    return picture


# --- the command line -----------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "tiny" / "samples" / "board.png"
ANSWER_STAGES = ("question", "retrieve", "decode")
SAMPLE_QUESTIONS = ["what color is the 7?", "which digit is red?", "where is the 4?"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line; `python sparsevila.py --help` lists them."""
    parser = argparse.ArgumentParser(
        description="Ask pictures several questions with SparseVILA, beside the dense model. "
        "Without arguments: a sample picture and the tiny model of this folder."
    )
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--image",
        type=nonempty_path,
        action="append",
        metavar="FILE",
        help="a picture (repeatable)",
    )
    pictures.add_argument(
        "--video",
        type=nonempty_path,
        metavar="PATH",
        help="a folder of frames, or an animated picture",
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames per second of the clip (default: what the file says, else 1)",
    )
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--ask", action="append", metavar="TEXT", help="a question (repeatable)")
    questions.add_argument("--chat", action="store_true", help="questions from the terminal")
    parser.add_argument(
        "--model",
        type=nonempty_path,
        default=HERE / "tiny",
        help="checkpoint folder or hub repository",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="two turns with {image}, {question}, {answer}, {question} in place of the family's "
        "prompt; \\n is a new line",
    )
    parser.add_argument("--prefill-sparsity", type=float, default=0.75, metavar="S")
    parser.add_argument("--decode-sparsity", type=float, default=0.9, metavar="S")
    parser.add_argument("--positions", choices=["contiguous", "original"], default="contiguous")
    parser.add_argument("--scope", choices=["frame", "global"], default="frame")
    parser.add_argument(
        "--protocol",
        choices=["conversation", "evaluation"],
        help="keep or evict earlier turns (default: evaluation, with --chat conversation)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int)
    columns = parser.add_mutually_exclusive_group()
    columns.add_argument("--dense", action="store_true", help="the dense model only")
    columns.add_argument(
        "--sparse", action="store_true", help="the sparse model only (for clips too long for dense)"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: as stored"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, of the sparse model unless --dense"
    )
    parser.add_argument(
        "--overlay",
        type=nonempty_path,
        metavar="FILE",
        help="write a picture of what was kept and retrieved",
    )
    return parser.parse_args(argv)


def nonempty_path(text: str) -> str:
    """A path given on the command line; an empty one comes from a shell variable that is not
    set."""
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    return text


def read_frames(path: str) -> tuple[list[Image.Image], float | None]:
    """The frames of a clip, pictures of a folder in the order of their names or an animated file,
    and how many there are in a second, if the file says so. Raises: ValueError for an empty folder,
    and as `open_picture`."""
    if not Path(path).is_dir():
        return open_clip(path)
    files = sorted(p for p in Path(path).iterdir() if not p.is_dir() and not p.name.startswith("."))
    if not files:
        raise ValueError(f"the folder {path} holds no frames")
    return [open_picture(file) for file in files], None


def encode_picture(picture: Image.Image, path: str) -> bytes:
    """The content of a picture file in the format that its name asks for. Raises: ValueError if
    Pillow cannot write it."""
    encoded = io.BytesIO()
    try:
        picture.save(encoded, Image.registered_extensions()[Path(path).suffix.lower()])
    except Exception as error:  # no such format, or too large for it: Pillow raises almost anything
        size = f"{picture.width} x {picture.height}"
        raise ValueError(f"{path}: a {size} picture cannot be written so: {error!r}") from None
    return encoded.getvalue()


def ask_all(
    session: SparseVILA, images: list, fps: float | None, questions: list[str], sampling: dict
) -> list[Answer]:
    """Show the images, ask all questions."""
    session.see(images, fps=fps)
    return [session.ask(question, **sampling) for question in questions]


def chat(session: SparseVILA, sampling: dict) -> None:
    """Questions from standard input, answers streamed. Ctrl-C stops an answer; at the prompt it
    ends the chat."""
    while True:
        try:
            question = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            session.ask(question, on_text=lambda text: print(text, end="", flush=True), **sampling)
        except KeyboardInterrupt:
            print(" [interrupted, forgotten]", end="")
        except ValueError as error:
            print(f"error: {error}", end="")
        print()


def summary(session: SparseVILA, questions: list[str], answers: list[Answer]) -> dict:
    """Answers, counts, bytes and milliseconds as one JSON-ready object."""
    decoded = sum(len(answer.token_ids) - 1 for answer in answers)
    decode = sum(answer.timings["decode"] for answer in answers)
    stages = dict(session.stats["milliseconds"])
    for stage in ANSWER_STAGES:
        stages[stage] = sum(answer.timings[stage] for answer in answers) / len(answers)
    return {
        "answers": [
            {"question": question, "answer": answer.text, "token_ids": answer.token_ids}
            for question, answer in zip(questions, answers)
        ],
        "visual_tokens": session.stats["visual_tokens"],
        "kv_bytes_per_token": round(sum(a.kv_bytes_per_token for a in answers) / len(answers)),
        "milliseconds": stages,
        "tokens_per_second": 1000 * decoded / decode if decoded else None,
    }


def print_comparison(columns: dict[str, dict]) -> None:
    """Answers, then counts and times, one column for each summary."""
    names = list(columns)
    for answers in zip(*(columns[name]["answers"] for name in names)):
        print(answers[0]["question"])
        for name, answer in zip(names, answers):
            print(f"  {name:8}{_one_line(answer['answer'])}")
        print()

    def line(label: str, value: Callable[[dict], str]) -> None:
        print(f"{label:34}" + "".join(f"{value(columns[name]):>12}" for name in names))

    print(" " * 34 + "".join(f"{name:>12}" for name in names))
    line("visual tokens encoded", lambda c: str(c["visual_tokens"]["encoded"]))
    line("  kept", lambda c: str(c["visual_tokens"]["kept"]))
    line("  attended, mean per layer", lambda c: f"{_mean(c['visual_tokens']['attended']):.4g}")
    line("KV bytes read per token", lambda c: f"{c['kv_bytes_per_token']:,}")
    for stage in ("vision", "prune", "prefill", "question", "retrieve", "decode"):
        unit = "ms per question" if stage in ANSWER_STAGES else "ms"
        line(f"{stage}, {unit}", lambda c, stage=stage: f"{c['milliseconds'][stage]:.1f}")
    line("decoded tokens/s", lambda c: f"{c['tokens_per_second'] or float('nan'):.1f}")


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line on standard error and exit status 2."""
    arguments = parse_arguments(argv)
    try:
        if sys.stdout is None or arguments.chat and sys.stdin is None:
            raise ValueError("standard input and output must be open")
        run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # nobody reads on, as in `| head`
        raise SystemExit(141) from None
    except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        print(f"sparsevila.py: error: {_one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        drop_output_that_cannot_be_written()


def drop_output_that_cannot_be_written() -> None:
    """Python would try once more at exit, and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        sys.stdout = None


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises: ValueError or OSError for bad input, as much of it
    as possible before the model is loaded."""
    questions = arguments.ask or ([] if arguments.chat else SAMPLE_QUESTIONS)
    settings, sampling = checked_settings(arguments, questions)
    images, fps = [], None
    if arguments.video:
        images, rate = read_frames(arguments.video)
        fps = arguments.fps or rate or 1.0
    else:
        images = [open_picture(file) for file in arguments.image or [SAMPLE]]
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    template = arguments.prompt_template and arguments.prompt_template.replace("\\n", "\n")
    model, processor = load(
        arguments.model, device=arguments.device, dtype=dtype, revision=arguments.revision,
        template=template,
    )  # fmt: skip
    session = (Dense if arguments.dense else SparseVILA)(model, processor, **settings)
    if arguments.chat:
        session.see(images, fps=fps)
        return chat(session, sampling)

    sessions = {"dense" if arguments.dense else "sparse": session}
    if not (arguments.dense or arguments.sparse or arguments.json):
        sessions = {"dense": Dense(model, processor, **settings)} | sessions
    for warm_up in sessions.values():  # first calls pay for thread pools and memory
        ask_all(warm_up, images, fps, questions[:1], sampling | {"max_new_tokens": 2})
    answers, columns = {}, {}
    for name, each in sessions.items():
        answers[name] = ask_all(each, images, fps, questions, sampling)
        columns[name] = summary(each, questions, answers[name])
    where = {
        "model": str(arguments.model),
        "device": str(model.device),
        "precision": model.precision,
    }
    if arguments.json:
        where |= {"weight_bytes": model.weight_bytes, "settings": settings | sampling}
        print(json.dumps(where | columns.popitem()[1], indent=2))
    else:
        print(", ".join([*where.values(), *(f"{k} {v}" for k, v in settings.items())]) + "\n")
        print_comparison(columns)
        print(f"weights: {model.weight_bytes:,} bytes, {model.precision}")
    if arguments.overlay:
        shown = list(zip(questions, answers.pop(name)))  # of the last session, `session`
        picture = overlay(session, shown, answers.get("dense"))
        Path(arguments.overlay).write_bytes(encode_picture(picture, arguments.overlay))


def checked_settings(arguments: argparse.Namespace, questions: list[str]) -> tuple[dict, dict]:
    """Settings of the session and of the sampling. Raises: ValueError for what can be known to be
    wrong without a model."""
    if arguments.chat and (arguments.json or arguments.overlay):
        raise ValueError("--json and --overlay need --ask, not --chat")
    if arguments.overlay:
        encode_picture(Image.new("RGB", (1, 1)), arguments.overlay)
        if not Path(arguments.overlay).parent.is_dir():
            raise ValueError(f"no folder to write {arguments.overlay} to")
    if arguments.fps is not None and not (arguments.video and 1e-6 <= arguments.fps < 2**31):
        raise ValueError(f"--fps must be from 1e-6 to 2e9, with --video, got {arguments.fps}")
    for question in questions:
        check_question(question)
    settings = {
        "prefill_sparsity": 0.0 if arguments.dense else arguments.prefill_sparsity,
        "decode_sparsity": 0.0 if arguments.dense else arguments.decode_sparsity,
        "scope": arguments.scope,
        "positions": arguments.positions,
        "protocol": arguments.protocol or ("conversation" if arguments.chat else "evaluation"),
    }
    for name in ("prefill_sparsity", "decode_sparsity"):
        check_sparsity(name, settings[name])
    sampling = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    check_sampling(**sampling)
    return settings, sampling


if __name__ == "__main__":
    main()
