"""Other methods, as users of SparseVILA's insertion points: a session that overrides `encode`,
`prune` or the cache is all that any of them is.

    Blind, RandomPruning, Uniform, Pool, Downsample    what every method must beat
    VisionZip, PruMerge                                tokens merged after the vision tower
    FastV, SparseVLM                                   tokens dropped inside the decoder
    FirstTurnOracle                                    the best tokens for the first answer
    RandomSalience, RandomRetrieval, MeanSalience,     SparseVILA with one thing changed
    OneIndexSet, VisualSoftmax, Reselect, ReselectEveryTwo

`prefill_sparsity` says how many tokens a method may keep: keep_count(n, sparsity) of n. Where a
definition cannot give that number exactly, `session.stats` and `Answer.retrieved` have what came
out (SparseVLM's cluster means come on top). Except in SparseVILA and its variants what is dropped
is lost for every later question, and decoding reads all that is left.

Definitions follow the papers that a class names and their public code; the others are ours. Axes as
in sparsevila.py; T tower tokens, summary token included.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_colsum, attention_lse, gather_tokens
from model import VLM, KVCache, Processor, causal_attention, token_salience
from sparsevila import Answer, Dense, RetrievalCache, SparseVILA, keep_count, select_tokens


class Other(SparseVILA):
    """A method with a choice of its own: always per picture. `decode_sparsity` means nothing to it.
    Raises: ValueError for another scope, and for original positions where tokens have none."""

    has_places = True  # every token it keeps has a place in the picture

    def __init__(self, model: VLM, processor: Processor, **settings):
        name = type(self).__name__
        if settings.get("scope", "frame") != "frame":
            raise ValueError(f"{name} knows no scope but 'frame', got {settings['scope']!r}")
        if not self.has_places and settings.get("positions", "contiguous") != "contiguous":
            raise ValueError(f"tokens of {name} have contiguous positions only")
        super().__init__(model, processor, **settings)


class Pruned(Other):
    """Prunes by `prune`, decodes from all that is left."""

    def new_cache(self, visual: Tensor, capacity: int) -> KVCache:
        return KVCache(self.model.config.text.layers, capacity)

    def budget(self, salience: Tensor) -> int:
        """Tokens of a picture to keep, salience (images, n)."""
        return keep_count(salience.shape[1], self.prefill_sparsity)


# --- what every method must beat ------------------------------------------------------------------


class Blind(Pruned):
    """No visual token at all: what the question and the training give away."""

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        return prune_to(features, salience, 0)


class RandomPruning(Pruned):
    """A random choice; seed it with `torch.manual_seed`."""

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        return prune_to(features, torch.rand_like(salience), self.budget(salience))


class Uniform(Pruned):
    """Every so many tokens one, in the order of reading."""

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        keep, n = self.budget(salience), salience.shape[1]
        chosen = torch.zeros(n, device=salience.device)
        chosen[[(2 * i + 1) * n // (2 * keep) for i in range(keep)]] = 1
        return prune_to(features, chosen.expand_as(salience), keep)


class Pool(Pruned):
    """Means over a k x k grid of blocks, k = round(sqrt(budget)); each stands at the first patch of
    its block."""

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        side = math.isqrt(salience.shape[1])  # of a square of tokens
        k = round(math.sqrt(self.budget(salience)))
        grid = features.mT.unflatten(2, (side, side))
        pooled = F.adaptive_avg_pool2d(grid, k).flatten(2).mT
        first = torch.arange(k, device=salience.device) * side // k
        index = (first[:, None] * side + first).flatten()
        return pooled, index.expand(len(features), -1)


class Downsample(Pruned):
    """The picture itself made smaller: fewer patches for the tower, whose table of positions is
    interpolated."""

    has_places = False

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        config, tower = self.model.config, self.model.vision_tower
        table, summary = tower.position_embedding, tower.summary_tokens
        side = math.isqrt(config.vision.patches)
        keep = keep_count(config.visual_tokens, self.prefill_sparsity)
        k = min(round(math.sqrt(keep)) * config.merge, side)
        small = F.interpolate(pixels, k * config.vision.patch_size, mode="bicubic", antialias=True)
        grid = table.weight[summary:].float().T.unflatten(1, (side, side))[None]
        grid = F.interpolate(grid, k, mode="bicubic", antialias=True)[0].flatten(1).T
        grid = torch.cat([table.weight[:summary], grid.to(table.weight)])
        try:
            tower.position_embedding = torch.nn.Embedding.from_pretrained(grid)
            with torch.no_grad():
                features, salience = tower(small.to(self.model.device, self.model.dtype))
        finally:
            tower.position_embedding = table
        return self.model.merge_patches(features), self.model.merge_salience(salience)

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        return prune_to(features, salience, salience.shape[1])


def prune_to(features: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` tokens of highest score in each picture, in order, and their index."""
    index = select_tokens(scores, keep)
    return gather_tokens(features, index), index


# --- tokens merged after the vision tower ---------------------------------------------------------


@contextmanager
def tower_calls(block: torch.nn.Module) -> Iterator[dict[str, list]]:
    """While open, notes of every call of a tower's block its queries and keys (images, H, T, D),
    and its output (images, T, C)."""
    calls: dict[str, list] = {"queries": [], "keys": [], "outputs": []}
    attention = block.self_attn
    query_key = attention.query_key

    def noted(x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = query_key(x)
        calls["queries"].append(q)
        calls["keys"].append(k)
        return q, k

    attention.query_key = noted
    hook = block.register_forward_hook(lambda _, x, out: calls["outputs"].append(out))
    try:
        yield calls
    finally:
        hook.remove()
        del attention.query_key


class VisionZip(Pruned):
    """Dominant tokens, those most attended by the class token in the layer that feeds the
    projector, and that token itself; then contextual ones, means of similar tokens among the rest.

    The rest's every so many-th is a target; each other token joins the target whose key, the mean
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

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.model.vision_tower
        with tower_calls(tower.layers[max(tower.feature_layer - 1, 0)]) as calls:
            features, salience = super().encode(pixels)
        q, k, out = (torch.cat(calls[name]) for name in ("queries", "keys", "outputs"))
        # (images, n, merge^2 D), and the class token (images, 1 or 0, C)
        self.keys = self.model.merge_patches(k.mean(1)[:, tower.summary_tokens :])
        none = features[:, :0]  # without a class token a token may be wider than the tower
        self.summary = out[:, :1] if tower.summary_tokens else none
        if not self.last_layer:
            salience = self.model.merge_salience(token_salience(q, k, tower.summary_tokens))
        return features, salience

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        keep, summary = self.budget(salience), self.summary.shape[1]
        contextual = max(1, round(keep * 10 / 64)) if keep > 1 + summary else 0
        index = select_tokens(salience, keep - contextual - summary)  # dominant
        dominant = gather_tokens(features, index)
        merged, places = [], []
        for picture, chosen in enumerate(index.tolist()):
            rest = [i for i in range(salience.shape[1]) if i not in set(chosen)]
            targets = rest[:: max(1, len(rest) // max(contextual, 1))][:contextual]
            others = [i for i in rest if i not in set(targets)]
            # As many patches as there are tokens; which token stands where is not kept.
            places.append(sorted(chosen + targets + others[:summary]))
            merged.append(self.merged(features[picture], self.keys[picture], targets, others))
        kept = torch.cat([self.summary, dominant, torch.stack(merged).to(features)], 1)
        return kept, torch.tensor(places, device=index.device)

    def merged(self, x: Tensor, keys: Tensor, targets: list[int], others: list[int]) -> Tensor:
        """Contextual tokens (targets, C) of one picture's features (n, C)."""
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

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.model.vision_tower
        with tower_calls(tower.layers[-1]) as calls:
            features, salience = super().encode(pixels)
        q, k = (torch.cat(calls[name]).transpose(1, 2).flatten(2) for name in ("queries", "keys"))
        self.keys = self.model.merge_patches(k[:, tower.summary_tokens :])  # (images, n, merge^2 C)
        if tower.summary_tokens:
            scores = (q[:, :1] @ k.mT / math.sqrt(k.shape[2])).softmax(-1)[:, 0]
            salience = self.model.merge_salience(scores[:, tower.summary_tokens :])
        return features, salience

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        n, keep = salience.shape[1], max(self.budget(salience) - 1, 1)
        index = select_tokens(salience, keep)
        weighted = salience[..., None].to(features) * features
        similar = F.normalize(self.keys, dim=-1)
        similar = gather_tokens(similar, index) @ similar.mT  # (images, keep, n)
        similar.scatter_(2, index[..., None], -math.inf)  # not itself
        near = similar.topk(min(max(round(32 * n / 576), 1), n - 1), -1).indices
        joins = torch.zeros_like(similar).scatter_(2, near, 1).to(features)
        kept = gather_tokens(features, index) + joins @ weighted
        others = torch.ones_like(salience).scatter_(1, index, 0)
        whole = (others[..., None].to(features) * weighted).sum(1, keepdim=True)
        return torch.cat([kept, whole], 1), select_tokens(salience, keep + 1)


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
    apart = distance.masked_fill(~denser, math.inf).amin(-1)
    apart = torch.where(apart.isinf(), distance.amax(-1), apart)
    centres = (density * apart).topk(clusters).indices
    return distance[:, centres].argmin(-1)


class FastV(Other):
    """Layers up to `after` see everything, the others the tokens that the prompt's last row attends
    to most in layer `after`. Chosen for the first question, for good. Raises: ValueError for
    decoders of no more layers. Source: FastV (arXiv 2403.06764), whose K is `after`."""

    after = 2

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
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

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        self.visual = self.model.project(features).flatten(0, 1)  # (V, E)
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

    def see(self, images: Any, *, fps: float | None = None) -> None:
        received, self.received = self.received, None  # all tokens, until the first question
        try:
            super().see(images, fps=fps)
        except BaseException:
            self.received = received
            raise
        self.seen = images, fps

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        if self.received is None:  # no question yet
            return Dense.prune(self, features, salience)
        return prune_to(features, self.received.view_as(salience), self.budget(salience))

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


class RandomSalience(SparseVILA):
    """A salience that means nothing."""

    def prune(self, features: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
        return super().prune(features, torch.rand_like(salience))


class MeanSalience(SparseVILA):
    """Salience as without a class token: the attention received from all rows of the tower."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.model.vision_tower
        with tower_calls(tower.layers[-1]) as calls:
            features, _ = super().encode(pixels)
        q, k = (torch.cat(calls[name]) for name in ("queries", "keys"))
        salience = token_salience(q, k, 0)[:, tower.summary_tokens :]
        return features, self.model.merge_salience(salience)


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
