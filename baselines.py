"""Other methods, as users of SparseVILA's insertion points: a session that overrides `encode`,
`prune` or the cache is all that any of them is.

    Blind, RandomPruning, Uniform, Pool, Downsample    what every method must beat
    VisionZip, PruMerge                                tokens merged after the vision tower
    FastV, SparseVLM                                   tokens dropped inside the decoder
    FirstTurnOracle                                    the best tokens for the first answer
    RandomSalience, RandomRetrieval, FromTheQuestion,  SparseVILA with one thing changed
    MeanSalience, OneIndexSet, VisualSoftmax,
    Reselect, ReselectEveryTwo

`prefill_sparsity` says how many tokens a method may keep: keep_count(n, sparsity) of n. Where a
definition cannot give that number exactly, `session.stats` and `Answer.retrieved` have what came
out (SparseVLM's cluster means come on top). Except in SparseVILA and its variants what is dropped
is lost for every later question, and decoding reads all that is left.

VisionZip, PruMerge and Downsample look deeper into the tower than its seam lets them: they are for
`model.VisionTower` and views of one piece, not for Qwen and LLaVA-NeXT.
Definitions follow the papers that a class names and their public code; the others are ours. Axes as
in sparsevila.py; T tower tokens, summary token included.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.processor import Processor
from kernels import attention_colsum, attention_lse, gather_tokens
from model import VLM, KVCache, causal_attention, inference
from sparsevila import (
    Answer,
    Dense,
    PerView,
    RetrievalCache,
    SparseVILA,
    keep_count,
    merge_salience,
    patch_salience,
    select_tokens,
)


class PerViewMethod(SparseVILA):
    """A method with a choice of its own, made within each view. `decode_sparsity` means nothing
    to it. Raises: ValueError for another scope, and for original positions where tokens have
    none."""

    has_places = True  # every token it keeps has a place in the picture

    def __init__(self, model: VLM, processor: Processor, **settings):
        name = type(self).__name__
        if settings.get("scope", "frame") != "frame":
            raise ValueError(f"{name} knows no scope but 'frame', got {settings['scope']!r}")
        if not self.has_places and settings.get("positions", "contiguous") != "contiguous":
            raise ValueError(f"tokens of {name} have contiguous positions only")
        super().__init__(model, processor, **settings)


class Pruned(PerViewMethod):
    """Prunes by `prune`, decodes from all that is left."""

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        return KVCache(self.model.config.text.layers, capacity)

    def budget(self, view: Tensor) -> int:
        """Tokens of a view to keep, of features (n, C) or scores (n,)."""
        return keep_count(len(view), self.prefill_sparsity)

    def prune_by(self, features: PerView, scores: PerView) -> tuple[PerView, PerView]:
        """The tokens of highest score in each view, as many as the budget allows, in order; and
        their index."""
        index = [select_tokens(each, self.budget(each)) for each in scores]
        return gather_each(features, index), index


# --- what every method must beat ------------------------------------------------------------------


class Blind(Pruned):
    """No visual token at all: what the question and the training give away."""

    encode = Dense.encode

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        return [x[:0] for x in features], [torch.arange(0) for _ in features]


class RandomPruning(Pruned):
    """A random choice; seed it with `torch.manual_seed`."""

    encode = Dense.encode

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        return self.prune_by(features, [torch.rand(len(x), device=x.device) for x in features])


class Uniform(Pruned):
    """Every k-th token, in the order of reading: the middle one of each stretch."""

    encode = Dense.encode

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        index = []
        for x in features:
            n, keep = len(x), self.budget(x)
            middles = [(2 * i + 1) * n // (2 * keep) for i in range(keep)]
            index.append(torch.tensor(middles, device=x.device))
        return gather_each(features, index), index


class Pool(Pruned):
    """Means over a k x k grid of blocks, k = round(sqrt(budget)); each stands at the first patch of
    its block. Views are squares of tokens."""

    encode = Dense.encode

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        pooled, index = [], []
        for x in features:
            side, k = math.isqrt(len(x)), round(math.sqrt(self.budget(x)))
            grid = x.mT.unflatten(1, (side, side))  # (C, side, side)
            pooled.append(F.adaptive_avg_pool2d(grid, k).flatten(1).mT)
            first = torch.arange(k) * side // k
            index.append((first[:, None] * side + first).flatten())
        return pooled, index


class Downsample(Pruned):
    """The picture itself made smaller: fewer patches for the tower, whose table of positions is
    interpolated."""

    has_places = False

    def encode(self, pixels: Sequence[Tensor]) -> tuple[PerView, PerView]:
        model, tower, vision = self.model, self.model.vision_tower, self.model.config.vision
        table, summary = tower.position_embedding, tower.summary_tokens
        side = math.isqrt(vision.patches)
        keep = keep_count(vision.visual_tokens, self.prefill_sparsity)
        k = min(round(math.sqrt(keep)) * vision.merge, side)
        small = F.interpolate(
            torch.stack(list(pixels)), k * vision.patch_size, mode="bicubic", antialias=True
        )
        grid = table.weight[summary:].float().T.unflatten(1, (side, side))[None]
        grid = F.interpolate(grid, k, mode="bicubic", antialias=True)[0].flatten(1).T
        grid = torch.cat([table.weight[:summary], grid.to(table.weight)])
        full_size = tower.config
        try:
            tower.position_embedding = torch.nn.Embedding.from_pretrained(grid)
            tower.config = replace(full_size, image_size=k * vision.patch_size)
            return model.encode(small), []
        finally:
            tower.position_embedding, tower.config = table, full_size

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        return Dense.prune(self, features, salience)


def gather_each(features: PerView, index: PerView) -> PerView:
    """The chosen rows of every view."""
    return [gather_tokens(x[None], i[None])[0] for x, i in zip(features, index)]


# --- tokens merged after the vision tower ---------------------------------------------------------


class VisionZip(Pruned):
    """Dominant tokens, those most attended by the class token in the layer that feeds the
    projector, and that token itself; then contextual ones, means of similar tokens among the rest.

    Every k-th of the rest is a target; each other token joins the target whose key, the mean
    over heads, is most similar; a target becomes itself plus the mean of those that joined it.
    Without a class token, dominant are those that receive most attention from all. Of 64 tokens 10
    are contextual, as in the paper. `average` halves a contextual token, whose norm is else about
    twice that of the others. `last_layer` takes the attention from where SparseVILA does.
    The smallest budgets degenerate: of three tokens one is the class token, one dominant, one
    contextual. Source: VisionZip (arXiv 2412.04467).
    """

    has_places = False
    average = False
    last_layer = False

    def encode(self, pixels: Sequence[Tensor]) -> tuple[PerView, PerView]:
        tower, features, salience = self.model.vision_tower, [], []
        s, self.summary, self.keys = tower.summary_tokens, [], []
        feeding = max(tower.feature_layer - 1, 0)  # the block whose output feeds the projector
        with inference(self.model.device):
            for batch in self.model.batches(pixels):
                states, q, k = tower(batch, feeding)
                features += tower.merge(states[:, s:])
                self.summary += states[:, : min(s, 1)]  # (1, C), or (0, C) without a class token
                self.keys += tower.merge(k.mean(1)[:, s:])  # (n, merge^2 D)
                if self.last_layer:
                    _, q, k = tower(batch, -1)
                salience += merge_salience(patch_salience(q, k, s), tower.merge)
        return features, salience

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        views = zip(features, salience, self.summary, self.keys)
        kept, index = zip(*(self.zipped(*view) for view in views))
        return list(kept), list(index)

    def zipped(
        self, x: Tensor, scores: Tensor, summary: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens (K, C) of one view's features (n, C), and places (K,) for them."""
        keep, lead = self.budget(x), len(summary)
        contextual = max(1, round(keep * 10 / 64)) if keep > 1 + lead else 0
        dominant = select_tokens(scores, keep - contextual - lead)
        chosen = dominant.tolist()
        rest = [i for i in range(len(x)) if i not in set(chosen)]
        targets = rest[:: max(1, len(rest) // max(contextual, 1))][:contextual]
        others = [i for i in rest if i not in set(targets)]
        merged = self.merged(x, keys, targets, others).to(x)
        # One place for each token; which token stands where is not kept.
        places = torch.tensor(sorted(chosen + targets + others[:lead]))
        return torch.cat([summary.to(x) if lead else x[:0], x[dominant], merged]), places

    def merged(self, x: Tensor, keys: Tensor, targets: list[int], others: list[int]) -> Tensor:
        """Contextual tokens (targets, C) of one view's features (n, C)."""
        similar = F.normalize(keys[others], dim=-1) @ F.normalize(keys[targets], dim=-1).T
        joins = F.one_hot(similar.argmax(-1), len(targets)).to(x) if targets else similar
        sums, counts = joins.T @ x[others], joins.sum(0)[:, None].clamp(min=1)
        return (x[targets] + sums / counts) / (2 if self.average else 1)


class VisionZipLastLayer(VisionZip):
    """VisionZip by the attention of the tower's last layer."""

    last_layer = True


class PruMerge(Pruned):
    """The tokens most attended by the class token, each with its neighbours added; and one token
    for all the others.

    Scores are softmax(q_cls . k / sqrt(C)) with the full-width vectors of the last layer; without a
    class token, the attention received. A kept token becomes itself plus the sum of score_j x_j
    over the tokens of most similar key, 32 of 576 or as large a share of others; the last token is
    the score-weighted sum of all that was not kept. Left out are the number of tokens chosen by
    outliers, for the budget is given, and PruMerge+. Source: LLaVA-PruMerge (arXiv 2403.15388).
    """

    has_places = False

    def encode(self, pixels: Sequence[Tensor]) -> tuple[PerView, PerView]:
        self.keys: PerView = []
        return super().encode(pixels)

    def salience(self, q: Tensor, k: Tensor) -> Tensor:
        tower = self.model.vision_tower
        s = tower.summary_tokens
        wide_q, wide_k = (x.transpose(1, 2).flatten(2) for x in (q, k))  # (views, T, C)
        self.keys += tower.merge(wide_k[:, s:])  # (n, merge^2 C)
        if not s:
            return patch_salience(q, k, 0)
        scores = wide_q[:, :1] @ wide_k.mT / math.sqrt(wide_k.shape[2])
        return scores.softmax(-1)[:, 0, s:]

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        kept, index = zip(*map(self.merged, features, salience, self.keys))
        return list(kept), list(index)

    def merged(self, x: Tensor, scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (K, C) of one view's features (n, C), and places (K,) for them."""
        n, keep = len(x), max(self.budget(x) - 1, 1)
        index = select_tokens(scores, keep)
        weighted = scores[:, None].to(x) * x
        similar = F.normalize(keys, dim=-1)
        similar = similar[index] @ similar.T  # (keep, n)
        similar.scatter_(1, index[:, None], -math.inf)  # not itself
        near = similar.topk(min(max(round(32 * n / 576), 1), n - 1), -1).indices
        joins = torch.zeros_like(similar).scatter_(1, near, 1).to(x)
        others = torch.ones_like(scores).scatter_(0, index, 0)
        whole = (others[:, None].to(x) * weighted).sum(0, keepdim=True)
        return torch.cat([x[index] + joins @ weighted, whole]), select_tokens(scores, keep + 1)


# --- tokens dropped inside the decoder ------------------------------------------------------------


class InsideCache(KVCache):
    """Visual rows dropped for good inside the decoder while the first question is read.

    stages: {layer: keep}: when this layer has attended, the `keep` visual rows with the highest
    attention from the `raters` (rows of the question), a mean over them and the heads, stay for the
    layers that follow. recycle: of those dropped, the best three tenths are put in clusters, one
    for every ten, and the clusters' mean keys and values stay as well.

    In the papers pictures and question are read together, so that what stays has not seen what was
    dropped before it; here the pictures were read before the question, which is kinder.
    """

    def __init__(self, layers: int, capacity: int, visual: Tensor, stages: dict[int, int],
                 recycle: bool = False):  # fmt: skip
        super().__init__(layers, capacity)
        self.visual, self.stages, self.recycle = visual, stages, recycle
        self.raters = slice(-1, None)
        self.reading = False
        self.see_everything()

    def see_everything(self) -> None:
        """As before the first question: nothing is dropped."""
        layers, everything = len(self.k), torch.arange(len(self.visual), device=self.visual.device)
        self.retrieved = [everything] * layers  # which of the visual rows a layer sees
        self.clusters: list[list[Tensor]] = [[] for _ in range(layers)]  # rows of each

    def start_question(self) -> None:
        self.reading = len(self.stages) > 0 and all(
            len(r) == len(self.visual) for r in self.retrieved
        )

    def start_answer(self) -> None:
        self.reading = False

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if self.reading:  # the question failed: nothing was chosen
            self.see_everything()
            self.reading = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.append(layer, k, v)
        N = self.filled[layer]
        seen = torch.ones(N, dtype=torch.bool, device=k.device)
        seen[self.visual] = False
        seen[self.visual[self.retrieved[layer]]] = True
        keys, values = (t[layer][:, :, :N] for t in (self.k, self.v))
        merged = [[t[:, :, c].mean(2, keepdim=True) for c in self.clusters[layer]]
                  for t in (keys, values)]  # fmt: skip
        keys = torch.cat([*merged[0], keys[:, :, seen]], 2)
        values = torch.cat([*merged[1], values[:, :, seen]], 2)
        if self.reading and layer in self.stages:
            first = len(merged[0])
            self.drop(layer, q, keys[:, :, first:], seen.nonzero()[:, 0])
        return causal_attention(q, keys, values)

    def drop(self, layer: int, q: Tensor, keys: Tensor, rows: Tensor) -> None:
        """Choose for the layers that follow, by the attention of the raters among the question's
        rows q (1, H, M, D) to keys (1, G, N, D), which are `rows` (N,) of the cache."""
        lse = attention_lse(q, keys, causal=True)[:, :, self.raters]  # of all that a rater sees
        received = attention_colsum(q[:, :, self.raters], keys, lse=lse).mean((0, 1))  # (N,)
        old = self.retrieved[layer]
        scores = received[torch.isin(rows, self.visual)]
        stay = select_tokens(scores, min(self.stages[layer], len(old)))
        gone = torch.ones(len(old), dtype=torch.bool, device=old.device)
        gone[stay] = False
        clusters = list(self.clusters[layer])
        if self.recycle and (count := int(0.3 * int(gone.sum()))):
            best = scores.masked_fill(~gone, -math.inf).topk(count).indices
            again = self.visual[old[best]]
            x = self.k[layer][0, :, again].transpose(0, 1).flatten(1)
            groups = density_peaks(x, math.ceil(count / 10))
            clusters += [again[groups == g] for g in groups.unique()]
        for later in range(layer + 1, len(self.k)):
            self.retrieved[later], self.clusters[later] = old[stay], clusters


def density_peaks(x: Tensor, clusters: int, neighbours: int = 5) -> Tensor:
    """Cluster numbers (m,) of points x (m, size); centres have the largest density times distance
    to a denser point. Source: SparseVLM."""
    x = x.float()
    distance = torch.cdist(x, x) / math.sqrt(x.shape[1])
    near = distance.topk(min(neighbours, len(x)), largest=False).values
    density = (-near.square().mean(-1)).exp()
    denser = density[None] > density[:, None]
    gap = distance.masked_fill(~denser, math.inf).amin(-1)  # to the nearest denser point
    gap = torch.where(gap.isinf(), distance.amax(-1), gap)
    centres = (density * gap).topk(clusters).indices
    return distance[:, centres].argmin(-1)


class FastV(PerViewMethod):
    """Layers up to `after` see everything, the others the tokens that the prompt's last row attends
    to most in layer `after`. Chosen for the first question, for good. Raises: ValueError for
    decoders of no more layers. Source: FastV (arXiv 2403.06764), whose K is `after`."""

    after = 2
    encode = Dense.encode

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        return Dense.prune(self, features, salience)

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        keep = keep_count(len(visual), self.prefill_sparsity)
        layers = self.model.config.text.layers
        if layers <= self.after:
            raise ValueError(f"FastV drops nothing in a decoder of {layers} layers")
        return InsideCache(layers, capacity, visual, {self.after - 1: keep})


class SparseVLM(FastV):
    """Tokens dropped after layers 2, 6 and 15 of 32, by the attention of raters: the words of the
    question that are most like the picture. The budget is reached in three equal steps; some of
    what is dropped comes back as cluster means. Chosen for the first question, for good.

    Raters are the rows t of the question with mean_v softmax_t(v . t) above average, v and t
    embeddings of visual and text tokens. Source: SparseVLM (arXiv 2410.04417); keys and values are
    merged here where the paper merges hidden states.
    """

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        self.visual = self.model.project(torch.cat(features))  # (V, E)
        return super().prune(features, salience)

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        layers, V = self.model.config.text.layers, len(visual)
        keep = keep_count(V, self.prefill_sparsity)
        stages = {}
        for step, part in enumerate((2, 6, 15), 1):
            layer = min(max(math.ceil(layers * part / 32), step), layers - 1) - 1
            stages[layer] = V - (V - keep) * step // 3
        return InsideCache(layers, capacity, visual, stages, recycle=True)

    def ask(self, question: str, **options: Any) -> Answer:
        if isinstance(self.cache, InsideCache) and isinstance(question, str):
            ids = self.processor.question(question.strip(), first=not self._turns, views=self.views)
            text = self.model.embed(ids)[0]
            alike = (self.visual.to(text) @ text.T).softmax(-1).mean(0)  # (question rows,)
            self.cache.raters = (alike > alike.mean()).nonzero()[:, 0] - len(alike)  # from the end
        return super().ask(question, **options)


# --- the best tokens for the first answer ---------------------------------------------------------


class WatchedCache(KVCache):
    """Adds up the attention that visual rows receive from the rows that choose the answer's
    words: the last of the question and all of the answer."""

    def __init__(self, layers: int, capacity: int, visual: Tensor):
        super().__init__(layers, capacity)
        self.visual, self.watching = visual, False
        self.received = torch.zeros(len(visual), device=visual.device)

    def start_question(self) -> None:
        self.watching = True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(layer, q, k, v)
        if self.watching:
            keys = self.k[layer][:, :, : self.filled[layer]]
            self.received += attention_colsum(q[:, :, -1:], keys).sum((0, 1))[self.visual]
        return out


class Watched(Dense):
    """The dense model, its attention watched."""

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        return WatchedCache(self.model.config.text.layers, capacity, visual)


class FirstTurnOracle(Pruned):
    """Prunes to the tokens that the dense model attends to most in its first answer (which is run
    for that): no choice made before the decoder could know the first question better. Chosen once,
    for good."""

    received: Tensor | None = None
    encode = Dense.encode

    def see(self, images: Any, *, fps: float | None = None) -> None:
        received, self.received = self.received, None  # all tokens, until the first question
        try:
            super().see(images, fps=fps)
        except BaseException:
            self.received = received
            raise
        self.seen = images, fps

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        if self.received is None:  # no question yet
            return Dense.prune(self, features, salience)
        return self.prune_by(features, list(self.received.split([len(x) for x in features])))

    def ask(self, question: str, **options: Any) -> Answer:
        if self.received is None and self.cache is not None:
            images, fps = self.seen
            watched = Watched(self.model, self.processor)
            watched.see(images, fps=fps)
            watched.ask(question, max_new_tokens=options.get("max_new_tokens", 128))
            self.received = watched.cache.received
            super().see(images, fps=fps)
        return super().ask(question, **options)


# --- SparseVILA with one thing changed ------------------------------------------------------------


class RandomCache(RetrievalCache):
    """See `RandomRetrieval`."""

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.rand(len(self.visual), device=q.device)


class RandomRetrieval(SparseVILA):
    """A relevance that means nothing."""

    cache_type = RandomCache


class TextCache(RetrievalCache):
    """See `FromTheQuestion`."""

    def start_answer(self) -> None:
        super().start_answer()
        self.retrieved = [chosen[:0] for chosen in self.retrieved]

    def packed_rows(self, chosen: Tensor) -> Tensor:
        return super().packed_rows(chosen[:0])


class FromTheQuestion(SparseVILA):
    """Decodes from text alone: from what the rows of the question, which saw all that was kept,
    brought along."""

    cache_type = TextCache


class RandomSalience(SparseVILA):
    """A salience that means nothing."""

    encode = Dense.encode

    def prune(self, features: PerView, salience: PerView) -> tuple[PerView, PerView]:
        return super().prune(features, [torch.rand(len(x), device=x.device) for x in features])


class MeanSalience(SparseVILA):
    """Salience as without a class token: the attention received from all rows of the tower."""

    def salience(self, q: Tensor, k: Tensor) -> Tensor:
        return patch_salience(q, k, 0)[:, self.model.vision_tower.summary_tokens :]


class SharedCache(RetrievalCache):
    """See `OneIndexSet`."""

    def start_answer(self) -> None:
        self.relevance = [torch.stack(self.relevance).mean(0)] * len(self.relevance)
        super().start_answer()


class OneIndexSet(SparseVILA):
    """The same visual tokens in all layers, by the mean of their relevances."""

    cache_type = SharedCache


class VisualSoftmaxCache(RetrievalCache):
    """See `VisualSoftmax`."""

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        received = attention_colsum(q, k[:, :, self.visual])[0].sum(0)  # (V,)
        return received / (q.shape[1] * q.shape[2])


class VisualSoftmax(SparseVILA):
    """Relevance by a softmax over visual keys only."""

    cache_type = VisualSoftmaxCache


class ReselectCache(RetrievalCache):
    """See `Reselect`."""

    every = 8

    def start_answer(self) -> None:
        super().start_answer()
        self.queries: list[list[Tensor]] = [[] for _ in self.k]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.packed is not None:
            if layer == 0 and len(self.queries[0]) == self.every:
                self.relevance = [
                    self.score(torch.cat(rows, 2), keys[:, :, : self.length])
                    for rows, keys in zip(self.queries, self.k)
                ]
                self.start_answer()
            self.queries[layer].append(q)
        return super().attend(layer, q, k, v)


class Reselect(SparseVILA):
    """Retrieves anew every eight tokens of an answer, by the attention of those eight."""

    cache_type = ReselectCache


class ReselectEveryTwoCache(ReselectCache):
    """See `ReselectEveryTwo`."""

    every = 2


class ReselectEveryTwo(SparseVILA):
    """Retrieves anew every two tokens, for answers too short to show what eight do."""

    cache_type = ReselectEveryTwoCache
