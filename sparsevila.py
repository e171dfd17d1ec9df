"""SparseVILA: prune visual tokens once, then retrieve for every question only those it needs.

A vision-language model turns pictures into hundreds or thousands of visual tokens. Reading them
(prefill) is paid once and bound by arithmetic; decoding is paid for every generated token and bound
by reading the KV cache. A choice of tokens made for the first question destroys what the second one
needs. SparseVILA (arXiv 2510.17777, whose numbers of algorithms are meant here) therefore splits
the sparsity:

* `prune` (Algorithm 2), between vision tower and projector, before any question is known: keep the
  most salient tokens, those that the tower's own last layer attends to most.
* `RetrievalCache` (Algorithm 3), once per question: while the question is read against all kept
  tokens, score how much attention each of them receives in every layer; pack the keys and values of
  the best ones with those of all text into a small buffer; decode from that buffer only. Nothing is
  deleted from the main cache, so the next question finds everything.

`SparseVILA` is the session around the two: `see` pictures once, `ask` any number of questions.
Another method replaces either by overriding a few short methods of the session; `Dense`, the
baseline, shows how. At sparsity 0 the same code gives the same bits as `Dense`.

Axes: H query heads, G key/value heads, M question rows, N cached rows, D head size, E decoder
width, n visual tokens of a view (a picture, a frame or a tile; an axis "views" counts them; every
view may have an n of its own), V visual tokens in the cache, K chosen tokens (kept or retrieved).
A row of features has the width merge^2 C of model.py.
"""

from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from checkpoints.processor import Clip, Pictures, Processor, TextStream, View, pictures_of
from kernels import attention_colsum, gather_keys_values, gather_tokens
from model import VLM, KVCache, Stopwatch, check_sampling, inference

SPARE_ROWS = 256  # of a cache, for questions and answers; it grows when they are used up
PerView = list[Tensor]  # one tensor for each view


# --- Algorithm 2: pruning, once per view ----------------------------------------------------------


def prune(
    features: Sequence[Tensor], salience: Sequence[Tensor], sparsity: float, *, scope: str = "frame"
) -> tuple[PerView, PerView]:
    """Keep the most salient tokens of each view, in their original order.

    Args:
        features: (n, width) of every view; n may differ. A tensor (views, n, width) will do.
        salience: (n,) of every view.
        sparsity: share of tokens to drop, in [0, 1); the count is `keep_count`.
        scope: "frame" (the paper's word for a view) ranks the tokens of each view separately, so
            that every view keeps some; "global" ranks all of them together.

    Returns: of every view the kept features (K, width), new and contiguous, and their index (K,)
    int64 within it, which is on the CPU: a prompt is laid out by it.
    Raises: ValueError for other shapes, scopes or sparsities, and for NaN in the salience.
    Source: Algorithm 2; the paper leaves the scope open, "frame" is our choice.
    """
    if not 0 < len(features) == len(salience) or any(
        x.dim() != 2 or s.shape != x.shape[:1] for x, s in zip(features, salience)
    ):
        found = " and ".join(str([tuple(x.shape) for x in xs]) for xs in (features, salience))
        raise ValueError(f"each view must have features (n, width) and salience (n,), got {found}")
    sizes = [len(x) for x in features]
    every = torch.cat(list(salience)).cpu()  # at once: a GPU is waited for once
    if scope == "frame":
        index = []
        for n, equal in groupby(every.split(sizes), key=len):
            index += select_tokens(torch.stack(list(equal)), keep_count(n, sparsity))
    elif scope == "global":
        chosen = torch.zeros_like(every, dtype=torch.bool)
        chosen[select_tokens(every, keep_count(len(every), sparsity))] = True
        index = [stays.nonzero()[:, 0] for stays in chosen.split(sizes)]
    else:
        raise ValueError(f"scope must be 'frame' or 'global', got {scope!r}")
    rows = torch.cat([i + start for i, start in zip(index, accumulate(sizes, initial=0))])
    tokens = torch.cat(list(features))
    kept = gather_tokens(tokens[None], rows[None].to(tokens.device))[0]
    return list(kept.split([len(i) for i in index])), index


def patch_salience(q: Tensor, k: Tensor, summary_tokens: int) -> Tensor:
    """How much attention every patch receives:

        salience_j = mean over heads h and rows i of A[h, i, j], A = softmax(q k^T / sqrt(D))

    with the softmax over all tokens. Rows i are the summary tokens; in a tower without summary
    tokens, all patches.

    Args:
        q, k: (views, H, summary tokens + patches, D) of the tower's last attention layer, summary
            tokens first.
        summary_tokens: 1 for CLIP's class token, several for RADIO, 0 for SigLIP.

    Returns: (views, patches) float32. Source: SparseVILA, Algorithm 2.
    """
    rows = q[:, :, :summary_tokens] if summary_tokens else q
    salience = attention_colsum(rows, k).mean(1) / rows.shape[2]  # mean over heads, over rows
    return salience[:, summary_tokens:]


def merge_salience(salience: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """Salience of visual tokens, each a block of patches: salience (views, patches) -> (views, n),
    the mean over a block's patches.

    merge: the tower's, (views, patches, 1) -> (views, n, block size), with zeros beyond the edge of
    the picture, which do not count. Source: the paper leaves this open; our choice.
    """
    sums = merge(salience[..., None]).sum(-1)
    counts = merge(torch.ones_like(salience[:1, :, None])).sum(-1)
    return sums / counts


# --- Algorithm 3: retrieval, once per question ----------------------------------------------------


class RetrievalCache(KVCache):
    """A KV cache that answers every question from a small part of its visual rows.

    A `KVCache` holds of every layer k and v (1, G, rows with room to spare, D), of which `filled`
    are in use; `append` adds rows, `attend` does so and attends, `truncate` forgets the last.

    Between `start_question` and `start_answer` attention is dense, and every layer scores the
    visual rows:

        relevance_j = sum over heads h and question rows i of A[h, i, j] / (H * M),

    A the softmax over the whole causal key row and j a visual row. `start_answer` selects the best
    rows of each layer (one set for all its heads) and packs them, in order and with all text rows,
    into `packed`, a dense KVCache of its own. From then on attention reads `packed` only; new rows
    go to both caches. Packed keys keep the rotary positions they were cached with.

    Args:
        layers: number of decoder layers.
        decode_sparsity: share of the visual rows that an answer leaves out, in [0, 1).
        visual: (V,) int64, the rows that will hold visual tokens, ascending, on the model's device;
            none if None.
        capacity: rows to make room for at the first `attend` (more are added when needed).

    Attributes:
        relevance: per layer (V,) float32, of the last question that was read.
        retrieved: per layer (K,) int64, ascending, which of the V tokens the last question
            retrieved.
        packed: the buffer an answer is decoded from; None from `start_question` or `truncate` to
            the next `start_answer`.

    Source: Algorithm 3. Our reading where the paper is silent: the first answer token is computed
    densely; the softmax runs over all keys; packed keys are not rotated again.
    """

    def __init__(
        self,
        layers: int,
        decode_sparsity: float = 0.8,
        *,
        visual: Tensor | None = None,
        capacity: int = 256,
    ):
        super().__init__(layers, capacity)
        self.decode_sparsity = decode_sparsity
        self.visual = torch.empty(0, dtype=torch.int64, device="cpu") if visual is None else visual
        self.relevance: list[Tensor] = []
        self.retrieved: list[Tensor] = []
        # Stages: context (None, False), question (None, True), answer (a cache, False).
        self.packed: KVCache | None = None
        self.scoring = False

    steady = True

    @property
    def written(self) -> list[KVCache]:
        return [self] if self.packed is None else [self, self.packed]

    def start_question(self) -> None:
        self.packed, self.scoring, self.relevance = None, True, []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Context: dense attention. Question: dense, and the visual rows are scored. Answer:
        attention over `packed` alone; the main cache only records the rows."""
        if self.packed is not None:
            self.append(layer, k, v)
            return self.packed.attend(layer, q, k, v)
        out = super().attend(layer, q, k, v)
        if self.scoring:
            relevance = self.score(q, self.k[layer][:, :, : self.filled[layer]])
            if relevance.shape != self.visual.shape:
                raise ValueError(f"score must return {self.visual.shape}, got {relevance.shape}")
            self.relevance.append(relevance)  # layers come in order
        return out

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Relevance (V,) of the visual rows for question rows q (1, H, M, D) and all keys k (1, G,
        N, D)."""
        _, H, M, _ = q.shape
        received = attention_colsum(q, k, causal=True)[0].sum(0)  # (N,)
        return received[self.visual] / (H * M)

    def start_answer(self) -> None:
        """Select the most relevant visual rows of every layer and pack them with all text. Raises:
        ValueError unless the question was read in one pass; then nothing is changed."""
        V, N, layers = len(self.visual), self.length, len(self.k)
        keep = keep_count(V, self.decode_sparsity)
        if len(self.relevance) != layers:
            reads = len(self.relevance) / layers
            raise ValueError(f"a question must be read in one pass, got {reads:g}")
        retrieved = list(select_tokens(torch.stack(self.relevance), keep))
        packed = KVCache(layers, capacity=N - V + keep + SPARE_ROWS)
        for layer, chosen in enumerate(retrieved):
            rows = self.packed_rows(chosen)[None]
            k, v = self.k[layer][:, :, :N], self.v[layer][:, :, :N]
            packed.append(layer, *gather_keys_values(k, v, rows))
        self.retrieved, self.packed, self.scoring = retrieved, packed, False

    def packed_rows(self, chosen: Tensor) -> Tensor:
        """Rows of the main cache to pack, ascending: all text and the chosen (K,) of the V visual
        tokens."""
        wanted = torch.ones(self.length, dtype=torch.bool, device=chosen.device)
        wanted[self.visual] = False
        wanted[self.visual[chosen]] = True
        return wanted.nonzero()[:, 0]

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on; those that come in place of visual rows are text."""
        super().truncate(length)
        self.packed, self.scoring = None, False
        self.visual = self.visual[self.visual < length]


# --- the session ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # == on tensors gives a tensor, not a bool
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


class _Turn(NamedTuple):
    """A question and its answer."""

    start: int  # cache length before the question
    unread: list[int]  # generated, but read only together with the next question


class SparseVILA:
    """A session: `see` one or more pictures, then `ask` questions about them.

    Args:
        model, processor: as `checkpoints.load` returns them.
        prefill_sparsity: share of visual tokens pruned before the decoder sees them, in [0, 1).
        decode_sparsity: share of the *kept* visual tokens that decoding leaves out, in [0, 1).
        scope: of pruning, "frame" or "global", see `prune`.
        positions: "contiguous" numbers kept tokens anew, as if the pruned had never been (the
            paper); "original" keeps their rotary positions, and text goes on where it would have.
        protocol: "conversation" keeps earlier turns in the cache; "evaluation" evicts each turn
            when it is over, so that no answer leaks into the next (Algorithm 4).

    Attributes:
        views: the pictures, frames and tiles that the vision tower saw (see `View`).
        kept: of each view the index (K,) that `prune` returned.
        cache: the KV cache, None before `see`.
        stats: counts ("pictures", "views", "visual_tokens": encoded, kept, attended per layer for
            the last question; "text_tokens" of the context) and "milliseconds" of the stages
            "vision" (with the salience), "prune" and "prefill" (with the projector).

    Raises: ValueError for arguments out of range.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        *,
        prefill_sparsity: float = 0.75,
        decode_sparsity: float = 0.8,
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
        self.kept: list[Tensor] = []
        self.stats: dict = {}
        self._turns: list[_Turn] = []
        self._busy = False  # while `ask` runs

    def see(
        self,
        images: str | Path | Image.Image | list[str | Path | Image.Image] | Clip,
        *,
        fps: float | None = None,
    ) -> None:
        """Encode, prune and prefill a picture, several or a clip; forget everything before.

        fps: frames per second of a clip's frames in a list, or in place of a clip's own times.
        The model's family decides which frames are shown, and how; no others are opened.

        Raises: OSError or ValueError if an image cannot be opened; ValueError if fps is out of
        range, or if the kept tokens leave no position for a question; RuntimeError while `ask`
        runs. A call that fails leaves the session as it was.
        """
        self._check_idle()
        check_fps(fps)
        if not isinstance(images, Clip):
            images = Pictures(images if isinstance(images, (list, tuple)) else [images])
        if fps:
            images = Clip.even(pictures_of(images), fps)
        if not len(pictures_of(images)):
            raise ValueError("images must hold at least one picture, got none")

        # 1. Make views of the pictures: the family cuts them into tiles or samples frames.
        views = self.processor.views(images)
        pixels = self.processor.pixels(views)

        # 2. Encode every view; the attention of the tower's last layer is the salience.
        watch = Stopwatch(self.model.device)
        features, salience = (self.processor.join(views, x) for x in self.encode(pixels))
        watch.lap("vision")

        # 3. Prune (Algorithm 2), before any question is known. The method may be another's.
        sizes = [len(x) for x in features]
        features, kept = self.prune(features, salience)
        kept = [index.cpu() for index in kept]  # for the layout
        chosen, counts = [index.tolist() for index in kept], [len(x) for x in features]
        right = [sorted({*index} & {*range(n)}) for index, n in zip(chosen, sizes)]  # each once
        if len(chosen) != len(sizes) or chosen != right or counts != [*map(len, chosen)]:
            raise ValueError(
                f"prune must return features and ascending indices below n, of {len(sizes)} views "
                f"each, got {counts} features and {kept}"
            )
        watch.lap("prune")

        # 4. Lay out the prompt: text, and a placeholder for every kept token.
        ids, positions, next_position = self.processor.layout(views, sizes, kept, self.positions)
        V, limit = sum(map(len, kept)), self.model.config.text.max_positions
        if next_position >= limit:
            raise ValueError(
                f"{len(views)} pictures or tiles with {V} visual tokens take {next_position} of "
                f"{limit} positions and leave none for a question: show fewer or prune more"
            )

        # 5. Prefill once: what is cached now is never written again.
        embeddings = self.model.embed(ids, self.model.project(torch.cat(features)))
        rows = [row for row, token in enumerate(ids) if token == self.processor.image_token_id]
        visual = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        cache = self.new_cache(visual, capacity=len(ids) + SPARE_ROWS)
        self.model.read(embeddings, cache, positions=positions, next_position=next_position)
        watch.lap("prefill")

        # 6. Replace the session's state, only now that nothing can fail.
        stats = {
            "pictures": views[-1].number + 1,
            "views": len(views),
            "visual_tokens": {"encoded": sum(sizes), "kept": V, "attended": None},
            "text_tokens": len(ids) - V,
            "milliseconds": watch.milliseconds,
        }
        # (One call, for Ctrl-C may come between two assignments.)
        vars(self).update(cache=cache, views=views, kept=kept, stats=stats, _turns=[])

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about what was seen.

        stop_ids end the answer as well as the checkpoint's and the token that closes a turn of the
        prompt. on_text is called with every new piece of text; the pieces together are
        `Answer.text`. The other arguments are those of `VLM.generate`. A call that fails or is
        interrupted leaves the session as it was. Raises: RuntimeError before `see` and inside
        `on_text`; ValueError for an empty question, arguments out of range, or a question and
        answer that do not fit into the model's context.
        """
        # 0. Refuse what cannot be answered, before anything is written.
        if self.cache is None:
            raise RuntimeError("nothing to ask about: call see(images) first")
        check_question(question)
        self._check_idle()
        check_sampling(max_new_tokens, temperature, top_p, seed, stop_ids)
        model, cache = self.model, self.cache
        turns, stats, start = self._turns, self.stats, cache.length
        unread = turns[-1].unread if turns else []
        ids = unread + self.processor.question(question.strip(), first=not turns, views=self.views)
        model.check_room(cache, len(ids), max_new_tokens)
        closing = {*model.config.stop_ids, *self.processor.stop_ids}
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        sampling["stop_ids"] = {*closing, *stop_ids}
        text, tokens = TextStream(self.processor, on_text), []
        chosen = ("relevance", "retrieved", "packed")  # by the last question
        # (An answer makes new ones; copies, for another method may change its lists in place.)
        last = {name: copy(x) for name, x in vars(cache).items() if name in chosen}
        try:
            self._busy = True
            # 1. Question: read it against everything that was kept; the cache scores it.
            watch = Stopwatch(model.device)
            cache.start_question()
            hidden = model.read(model.embed(ids), cache)
            watch.lap("question")

            # 2. Retrieve (Algorithm 3): select and pack, in every layer.
            cache.start_answer()
            watch.lap("retrieve")

            # 3. Decode. The first token follows from the question, the others from what was packed.
            for token in model.decode(hidden, cache, max_new_tokens=max_new_tokens, **sampling):
                tokens.append(token)
                text.add(token)
            watch.lap("decode")
            text.finish()

            # 4. Keep the turn, or evict it (Algorithm 4). The last token was generated, not read. A
            #    stop token is written again by the template, before the next question; any other is
            #    read together with that question.
            answer = self._answer(text.text, tokens, start + len(ids), watch.milliseconds)
            attended = [len(chosen) for chosen in answer.retrieved]
            self.stats = stats | {"visual_tokens": stats["visual_tokens"] | {"attended": attended}}
            unread = [] if tokens[-1] in closing else tokens[-1:]
            self._turns, self._busy = [*turns, _Turn(start, unread)], False
            if self.protocol == "evaluation":
                self.forget()
            return answer
        except BaseException:
            self._turns, self.stats, self._busy = turns, stats, False
            cache.truncate(start)
            vars(cache).update(last)
            raise

    def forget(self) -> None:
        """Evict the last question and its answer. Without one, nothing happens. Raises:
        RuntimeError while `ask` runs."""
        self._check_idle()
        if self._turns:
            *turns, last = self._turns
            try:
                self.cache.truncate(last.start)
                self._turns = turns
            except BaseException:  # what was begun is ended: half a turn would be read
                self._turns = turns
                self.cache.truncate(last.start)
                raise

    # Extension points: override `prune` or `salience` for another choice of tokens, `cache_type` (a
    # RetrievalCache with another `score`) or `new_cache` (any KVCache) for another cache, `encode`
    # if more of the tower is needed. baselines.py has examples.
    cache_type = RetrievalCache

    def encode(self, pixels: Sequence[Tensor]) -> tuple[PerView, PerView]:
        """Features (n, width) and salience (n,) of every view, for the pixels of every view (of
        every piece, in families that cut views into pieces; `see` joins them)."""
        tower, features, salience = self.model.vision_tower, [], []
        with inference(self.model.device):
            for batch in self.model.batches(pixels):
                states, q, k = tower(batch, attention_layer=-1)
                patches, received = states[:, tower.summary_tokens :], self.salience(q, k)
                if received.shape != patches.shape[:2]:
                    shape, found = tuple(patches.shape[:2]), tuple(received.shape)
                    raise ValueError(f"salience must return {shape}, a number a patch, got {found}")
                features.extend(tower.merge(patches))  # a view each
                salience.extend(merge_salience(received, tower.merge))
        return features, salience

    def salience(self, q: Tensor, k: Tensor) -> Tensor:
        """Salience (views, patches) by queries and keys of the tower's last layer."""
        return patch_salience(q, k, self.model.vision_tower.summary_tokens)

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        """What `encode` returned -> kept features (K, width) and index (K,) of every view."""
        return prune(features, salience, self.prefill_sparsity, scope=self.scope)

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        """An empty cache, told which of its rows (V,) will hold visual tokens."""
        layers = self.model.config.text.layers
        return self.cache_type(layers, self.decode_sparsity, visual=visual, capacity=capacity)

    def _answer(self, text: str, tokens: list[int], rows_read: int, timings: dict) -> Answer:
        """The Answer, decoded after `rows_read` rows of context and question."""
        kept, layers = self.stats["visual_tokens"]["kept"], len(self.cache.k)
        everything = [torch.arange(kept, device="cpu")] * layers  # a dense cache leaves nothing out
        retrieved = getattr(self.cache, "retrieved", everything)
        row_bytes = self.cache.k[0][:, :, 0].nbytes + self.cache.v[0][:, :, 0].nbytes
        rows_over_layers = sum(rows_read - kept + len(chosen) for chosen in retrieved)
        return Answer(text, tokens, retrieved, timings, row_bytes * rows_over_layers)

    def _check_idle(self) -> None:
        if self._busy:
            raise RuntimeError("the session is answering: one call at a time, and none in on_text")


class Dense(SparseVILA):
    """The baseline: the same session, decoding from the plain KVCache. It accepts sparsities and
    scope, which have no effect."""

    def encode(self, pixels: Sequence[Tensor]) -> tuple[PerView, PerView]:
        return self.model.encode(pixels), []  # Dense.prune reads no salience

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        return features, [torch.arange(len(x), device="cpu") for x in features]

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        return KVCache(self.model.config.text.layers, capacity)


# --- choosing, counting, checking -----------------------------------------------------------------


def select_tokens(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores along the last axis, ascending; ties go to the lower
    index (our choice).

    scores (..., n) float -> (..., keep) int64, contiguous. The choice at a smaller keep is a subset
    of that at a larger one. Raises: ValueError for a scalar, for NaN and for keep outside [0, n].
    """
    if scores.dim() == 0:
        raise ValueError(f"scores must be (..., n), got {scores}")
    if not isinstance(keep, Integral) or not 0 <= keep <= scores.shape[-1]:
        raise ValueError(f"keep must be an integer in [0, {scores.shape[-1]}], got {keep!r}")
    if scores.isnan().any():
        raise ValueError(f"scores must not be NaN, got {int(scores.isnan().sum())} NaN")
    order = scores.contiguous().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def keep_count(n: int, sparsity: float) -> int:
    """How many of n tokens stay: n - floor(sparsity * n), which is at least 1 if n is.

    The product is exact: 0.29 means 29/100 and not the nearest binary fraction below it, so that
    keep_count(100, 0.29) is 71; keep_count(n, k / n) is n - k. Raises: ValueError for n that is not
    an integer of at least 0, or a sparsity outside [0, 1). Source: our choice; the paper keeps what
    exceeds the quantile `sparsity`, a count that ties change and that at sparsity 0 is n - 1.
    """
    if not isinstance(n, Integral) or n < 0:
        raise ValueError(f"n must be an integer of at least 0, got {n!r}")
    check_sparsity("sparsity", sparsity)
    dropped = int(Fraction(str(+sparsity)).limit_denominator(10**9) * n)  # str: numpy's 0.9, too
    return max(n - dropped, min(n, 1))  # a sparsity within 1e-9 of 1 was rounded to 1


def check_sparsity(name: str, sparsity: float) -> None:
    """Raise ValueError for a sparsity outside [0, 1)."""
    if not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"{name} must be in [0, 1), got {sparsity!r}")


def check_question(question: str) -> None:
    """Raise ValueError unless the question is a string with more in it than white space."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text that is not empty, got {question!r}")


def check_fps(fps: float | None) -> None:
    """Raise ValueError unless fps is None or frames per second that a clip may have."""
    if fps is not None and (not isinstance(fps, Real) or not 1e-6 <= float(fps) < 2**31):
        raise ValueError(f"fps must be a number from 1e-6 to 2e9 or None, got {fps!r}")


if __name__ == "__main__":  # the command line is tools/ask.py
    from tools.ask import main

    main()
