"""Everything under "What is exact" in README.md, on random models and on the tiny one.

"Same bits" is `torch.equal`. The dense path is written out here from `VLM` and `KVCache` alone, so
that it shares no code with the session it is compared to.
"""

import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, ROOT, Recorder, random_model, random_pictures, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_file
import sparsevila
from checkpoints import load
from kernels import gather_tokens
from model import KVCache
from sparsevila import Dense, RetrievalCache, SparseVILA, keep_count

QUESTIONS = ["how much is the coffee?", "what costs 3.10?", "what is on line 5?", "how many? é"]
GROWS = 100  # tokens, that make buffers with 8 spare rows grow

models = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "layers": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "head_dim": st.sampled_from([2, 6, 8, 12, 32]),
        "grid": st.integers(1, 5),
        "vision_layers": st.integers(1, 3),
        "feature_layer": st.sampled_from([-1, -2]),
        "qkv_bias": st.booleans(),
        "tied": st.booleans(),
    }
)
settings_of = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(["frame", "global"]),
        "positions": st.sampled_from(["contiguous", "original"]),
        "protocol": st.sampled_from(["conversation", "evaluation"]),
    }
)
pictures_and_turns = st.tuples(st.integers(1, 4), st.integers(1, 4))
sparsities = st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.9, 0.99])


def dense_by_hand(vlm, processor, pictures, questions, protocol, tokens_each):
    """What a reader would write without sparsevila.py: logits of every step, tokens, and the
    cache."""
    views = processor.views(pictures)
    features = processor.join(views, vlm.encode(processor.pixels(views)))
    visual = vlm.project(torch.cat(features))
    sizes = [len(x) for x in features]
    ids, positions, after = processor.layout(
        views, sizes, list(map(torch.arange, sizes)), "original"
    )
    assert ids == processor.context(sizes, views)
    assert positions.dim() == 2 or positions.tolist() == list(range(after)) == list(range(len(ids)))
    cache = KVCache(vlm.config.text.layers, capacity=1)
    vlm.read(vlm.embed(ids, visual), cache, positions=positions, next_position=after)
    answers, unread, first = [], [], True
    for question in questions:
        start = cache.length
        ids = unread + processor.question(question, first=first, views=views)
        answer = vlm.generate(vlm.embed(ids), cache=cache, max_new_tokens=tokens_each)
        answers.append(answer)
        if protocol == "evaluation":
            cache.truncate(start)
        else:
            first, unread = False, [] if answer[-1] in vlm.config.stop_ids else answer[-1:]
    return answers, cache


def rows(cache):
    return [(k[:, :, : cache.length], v[:, :, : cache.length]) for k, v in zip(cache.k, cache.v)]


def assert_dense_and_sparse_share_their_bits(vlm, processor, pictures, questions, options, count):
    with Recorder(vlm) as dense:
        answers, cache = dense_by_hand(
            vlm, processor, pictures, questions, options["protocol"], count
        )
    session = SparseVILA(vlm, processor, prefill_sparsity=0, decode_sparsity=0, **options)
    with Recorder(vlm) as sparse:
        session.see(pictures)
        ours = [session.ask(question, max_new_tokens=count) for question in questions]
    pieces = vlm.encode(processor.pixels(session.views))
    sizes = [len(x) for x in processor.join(session.views, pieces)]
    V = session.stats["visual_tokens"]["encoded"]
    assert V == sum(sizes) and [i.tolist() for i in session.kept] == [list(range(n)) for n in sizes]
    assert all(chosen.tolist() == list(range(V)) for answer in ours for chosen in answer.retrieved)
    assert [answer.token_ids for answer in ours] == answers
    assert len(dense.logits) == len(sparse.logits)
    assert all(same_bits(a, b) for a, b in zip(dense.logits, sparse.logits))
    assert session.cache.length == cache.length
    for (k, v), (k2, v2) in zip(rows(session.cache), rows(cache)):
        assert same_bits(k, k2) and same_bits(v, v2)


@settings(max_examples=250)
@given(models, settings_of, pictures_and_turns, st.integers(1, 6))
def test_sparsity_zero_has_the_bits_of_dense(shape, options, counts, tokens_each):
    vlm, processor = random_model(**shape)
    pictures = random_pictures(shape["seed"], counts[0])
    questions = QUESTIONS[: counts[1]]
    assert_dense_and_sparse_share_their_bits(
        vlm, processor, pictures, questions, options, tokens_each
    )


@settings(max_examples=20)
@given(settings_of, pictures_and_turns, st.integers(0, 999))
def test_sparsity_zero_has_the_bits_of_dense_on_the_tiny_model(tiny, options, counts, seed):
    pictures = random_pictures(seed, counts[0], side=240)
    questions = QUESTIONS[: counts[1]]
    assert_dense_and_sparse_share_their_bits(*tiny, pictures, questions, options, 8)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return load(ROOT / "tests" / "golden" / request.param, device="cpu")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("protocol", ["conversation", "evaluation"])
def test_sparsity_zero_has_the_bits_of_dense_in_every_family(family, count, protocol):
    pictures = random_pictures(count, count, side=70)
    for scope, positions in (("frame", "original"), ("global", "contiguous")):
        options = {"scope": scope, "positions": positions, "protocol": protocol}
        assert_dense_and_sparse_share_their_bits(*family, pictures, QUESTIONS, options, 5)


@settings(max_examples=20)
@given(models, settings_of, sparsities, st.booleans())
def test_the_step_that_a_gpu_replays_has_the_bits_of_reading(shape, options, sparsity, dense):
    """Logits, tokens and caches over two turns; without a graph where there is no GPU."""
    vlm, processor = random_model(**shape)
    vlm.to("cuda" if torch.cuda.is_available() else "cpu")
    kind, runs = Dense if dense else SparseVILA, []
    readers = (
        lambda cache, tokens: lambda token: vlm.read(vlm.embed([token]), cache),
        lambda cache, tokens: model_file.StaticStep(vlm, cache, tokens),
    )
    for reader in readers:
        session = kind(vlm, processor, decode_sparsity=sparsity, **options)
        with pytest.MonkeyPatch.context() as patch, Recorder(vlm) as recorder:
            patch.setattr(vlm, "_reader", reader)
            patch.setattr(sparsevila, "SPARE_ROWS", 8)
            session.see(random_pictures(shape["seed"], 2))
            answers = [session.ask(q, max_new_tokens=n) for q, n in zip(QUESTIONS, (9, GROWS))]
        runs.append(([a.token_ids for a in answers], recorder.logits, session.cache))
    (tokens, logits, cache), (others, likewise, copy) = runs
    assert tokens == others and len(logits) == len(likewise) > 2
    assert all(torch.equal(a, b) for a, b in zip(logits, likewise))
    assert cache.filled == copy.filled and cache.position_after == copy.position_after
    for pair, other in zip(rows(cache), rows(copy)):
        assert all(torch.equal(a, b) for a, b in zip(pair, other))


def test_a_cache_that_attends_in_its_own_way_is_not_replayed():
    """Unless it says that it is steady all the same."""
    assert KVCache.steady and RetrievalCache.steady and not MaskedCache.steady
    assert type("Scored", (RetrievalCache,), {"score": None}).steady
    assert type("Same", (MaskedCache,), {"attend": None, "steady": True}).steady


class MaskedCache(RetrievalCache):
    """The oracle of retrieval: attention over the whole main cache, in float64, with the visual
    rows that were not retrieved masked out. Nothing is packed."""

    def attend(self, layer, q, k, v):
        if self.packed is None:
            return super().attend(layer, q, k, v)
        self.append(layer, k, v)
        N, group = self.filled[layer], q.shape[1] // k.shape[1]
        keys, values = (
            torch.stack([x[:, h // group, :N] for h in range(q.shape[1])], 1).double()
            for x in (self.k[layer], self.v[layer])
        )
        hidden = torch.zeros(N, dtype=torch.bool)
        hidden[self.visual] = True
        hidden[self.visual[self.retrieved[layer]]] = False
        scores = q.double() @ keys.mT / math.sqrt(q.shape[-1])
        return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ values).to(q.dtype)


class MaskedSession(SparseVILA):
    cache_type = MaskedCache


def compare_with_masked(vlm, processor, pictures, questions, options, tolerance):
    logits, answers = [], []
    for kind in (SparseVILA, MaskedSession):
        session = kind(vlm, processor, **options)
        with Recorder(vlm) as recorder:
            session.see(pictures)
            answers.append([session.ask(q, max_new_tokens=6) for q in questions])
        logits.append(recorder.logits)
    packed, masked = answers
    assert [a.token_ids for a in packed] == [a.token_ids for a in masked]
    for a, b in zip(packed, masked):
        assert all(torch.equal(x, y) for x, y in zip(a.retrieved, b.retrieved))
    for a, b in zip(*logits, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@settings(max_examples=60)
@given(models, settings_of, pictures_and_turns, sparsities, sparsities)
def test_packed_attention_is_masked_attention(shape, options, counts, prefill, decode):
    vlm, processor = random_model(**shape | {"dtype": torch.float32})
    options = options | {"prefill_sparsity": prefill, "decode_sparsity": decode}
    pictures = random_pictures(shape["seed"], counts[0])
    compare_with_masked(vlm, processor, pictures, QUESTIONS[: counts[1]], options, 1e-4)


def test_packed_attention_is_masked_attention_on_the_tiny_model(tiny, page):
    for options in ({}, {"decode_sparsity": 0.5}, {"protocol": "evaluation"}):
        compare_with_masked(*tiny, [page], QUESTIONS, options, 1e-5)


def test_packed_attention_is_masked_attention_in_every_family(family):
    for options in ({}, {"positions": "original", "decode_sparsity": 0.5}, {"scope": "global"}):
        compare_with_masked(*family, random_pictures(3, 1, side=70), QUESTIONS, options, 1e-4)


@settings(max_examples=40)
@given(models, settings_of, pictures_and_turns, sparsities, sparsities)
def test_visual_rows_are_never_written_again(shape, options, counts, prefill, decode):
    vlm, processor = random_model(**shape)
    options = options | {"prefill_sparsity": prefill, "decode_sparsity": decode}
    session = SparseVILA(vlm, processor, **options)
    session.see(random_pictures(shape["seed"], counts[0]))
    before = [(k.clone(), v.clone()) for k, v in rows(session.cache)]
    for question in QUESTIONS[: counts[1]]:
        session.ask(question, max_new_tokens=5)
    for (k, v), (k2, v2) in zip(before, rows(session.cache)):
        n = k.shape[2]
        assert same_bits(k, k2[:, :, :n]) and same_bits(v, v2[:, :, :n])


def bits_of_an_answer(session, question):
    with Recorder(session.model) as recorder:
        answer = session.ask(question, max_new_tokens=5)
    return answer.token_ids, recorder.logits, answer.retrieved


def assert_same_answer(a, b):
    assert a[0] == b[0]
    assert all(same_bits(x, y) for x, y in zip(a[1], b[1], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))


@settings(max_examples=25)
@given(models, settings_of, st.permutations(QUESTIONS), sparsities, sparsities)
def test_after_forget_earlier_questions_leave_no_trace(shape, options, order, prefill, decode):
    vlm, processor = random_model(**shape)
    options = options | {"prefill_sparsity": prefill, "decode_sparsity": decode}
    pictures = random_pictures(shape["seed"], 2)
    fresh, used = (SparseVILA(vlm, processor, **options) for _ in range(2))
    fresh.see(pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsevila, "SPARE_ROWS", 8)
        used.see(pictures)
        for question, tokens in zip(order[:-1], (GROWS, 5, 5)):
            used.ask(question, max_new_tokens=tokens)
            used.forget()
    assert used.cache.length == fresh.cache.length
    assert_same_answer(bits_of_an_answer(used, order[-1]), bits_of_an_answer(fresh, order[-1]))


def test_forget_takes_back_one_turn_at_a_time(tiny, page):
    session, other = SparseVILA(*tiny), SparseVILA(*tiny)
    for s in (session, other):
        s.see(page)
        s.ask(QUESTIONS[0])
    session.ask(QUESTIONS[1], max_new_tokens=2)  # cut short: a token is left unread
    session.forget()
    assert_same_answer(*(bits_of_an_answer(s, QUESTIONS[2]) for s in (session, other)))
    for _ in range(5):
        session.forget()
    other.see(page)
    assert session.cache.length == other.cache.length
    assert_same_answer(*(bits_of_an_answer(s, QUESTIONS[3]) for s in (session, other)))


def public(cache):
    """Copies of what a RetrievalCache tells of the last question."""
    packed = [cache.packed] if cache.packed else []  # evicted with its turn under "evaluation"
    tensors = [*cache.relevance, *cache.retrieved]
    tensors += [x for cache in packed for x in (*cache.k, *cache.v, torch.tensor(cache.filled))]
    return [x.clone() for x in tensors]


class Stop(BaseException):
    """Like KeyboardInterrupt, but not one that pytest would act upon."""


@settings(max_examples=60)
@given(models, settings_of, st.integers(0, 40), sparsities)
def test_an_interrupted_ask_leaves_the_session_as_it_was(shape, options, when, decode):
    vlm, processor = random_model(**shape | {"layers": 2})
    vlm.config, processor.stop_ids = replace(vlm.config, stop_ids=()), ()  # two steps at least
    options = options | {"prefill_sparsity": 0.5, "decode_sparsity": decode}
    session, other = (SparseVILA(vlm, processor, **options) for _ in range(2))
    for s in (session, other):
        s.see(random_pictures(shape["seed"], 2))
        s.ask(QUESTIONS[0], max_new_tokens=3)
    stats, length = session.stats, session.cache.length
    last = public(session.cache)
    calls = iter(range(when, -1, -1))

    def interrupt(*_):
        if next(calls, 0) == 0:
            raise Stop

    # Any norm or projection of any layer in any step is a place to be interrupted at.
    hooks = [m.register_forward_hook(interrupt) for m in vlm.decoder.modules()]
    try:
        session.ask(QUESTIONS[1], max_new_tokens=8)
    except Stop:
        assert session.stats == stats and session.cache.length == length
        now = public(session.cache)
        assert all(same_bits(a, b) for a, b in zip(now, last, strict=True))
    else:
        raise AssertionError("the question was read and answered in so few calls?")
    finally:
        for hook in hooks:
            hook.remove()
    assert_same_answer(*(bits_of_an_answer(s, QUESTIONS[2]) for s in (session, other)))


def test_an_interrupted_forget_has_forgotten(tiny, page):
    """Wherever in the eviction the interrupt comes, once."""
    session, other = SparseVILA(*tiny), SparseVILA(*tiny)
    for s in (session, other):
        s.see(page)
    truncate = session.cache.truncate
    for after in (False, True):
        session.ask(QUESTIONS[1])
        calls = iter([True])

        def interrupted(length, after=after, calls=calls):
            if after:
                truncate(length)
            if next(calls, False):
                raise Stop
            truncate(length)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(session.cache, "truncate", interrupted)
            session.forget()
        assert_same_answer(*(bits_of_an_answer(s, QUESTIONS[0]) for s in (session, other)))
        for s in (session, other):
            s.forget()


def test_see_is_interrupted_before_or_after_it_changes_the_session(tiny, page):
    """At each of the last instructions of Python's own machine, where Ctrl-C may come."""

    def see(session, stop_at=None):
        """Count the instructions of `see`, and stop at that one."""
        count = 0

        def at(frame, event, _):
            nonlocal count
            count += event == "opcode"
            if event == "opcode" and count == stop_at:
                raise Stop
            return at

        def enter(frame, *_):
            if frame.f_code is not SparseVILA.see.__code__:
                return None
            frame.f_trace_opcodes = True
            return at

        sys._getframe().f_trace_opcodes = True  # Python 3.12 wants to know before it traces
        sys.settrace(enter)
        try:
            session.see(random_pictures(0, 1, side=240))
        finally:
            sys.settrace(None)
        return count

    total = see(SparseVILA(*tiny))
    assert total > 200
    for stop_at in range(total - 60, total + 1):
        session = SparseVILA(*tiny)
        session.see(page)
        before = {name: id(value) for name, value in vars(session).items()}
        with pytest.raises(Stop):
            see(session, stop_at)
        changed = {name for name, value in vars(session).items() if id(value) != before[name]}
        assert changed in (set(), {"cache", "views", "kept", "stats", "_turns"})


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupt_while_text_is_shown_leaves_the_session_as_it_was(tiny, page, after):
    session, other = SparseVILA(*tiny), SparseVILA(*tiny)
    pieces = []

    def show(text):
        pieces.append(text)
        if len(pieces) > after:
            raise KeyboardInterrupt

    for s in (session, other):
        s.see(page)
        s.ask(QUESTIONS[0])
    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTIONS[1], on_text=show)
    assert_same_answer(*(bits_of_an_answer(s, QUESTIONS[2]) for s in (session, other)))


@settings(max_examples=40)
@given(models, pictures_and_turns, sparsities, sparsities)
def test_decoding_reads_the_packed_rows_and_nothing_else(shape, counts, prefill, decode):
    vlm, processor = random_model(**shape)
    session = SparseVILA(vlm, processor, prefill_sparsity=prefill, decode_sparsity=decode)
    session.see(random_pictures(shape["seed"], counts[0]))
    lengths, real = [], model_file.decode_attention

    def spy(q, k, v, *, length):
        lengths.append((k, length))
        return real(q, k, v, length=length)

    for question in QUESTIONS[: counts[1]]:
        text = session.cache.length - len(session.cache.visual)
        lengths.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_file, "decode_attention", spy)
            answer = session.ask(question, max_new_tokens=4)
        cache, steps = session.cache, len(answer.token_ids) - 1
        V = len(cache.visual)
        K = keep_count(V, decode)
        asked = cache.length - text - V - steps
        expected = [text + asked + K + step + 1 for step in range(steps) for _ in cache.k]
        assert [length for _, length in lengths] == expected
        assert all(k is packed for (k, _), packed in zip(lengths, cache.packed.k * steps))
        # What was generated is in both buffers, what was packed is what the main cache holds.
        for layer, (k, v) in enumerate(rows(cache)):
            chosen = cache.visual[answer.retrieved[layer]].tolist()
            others = [row for row in range(cache.length) if row not in cache.visual.tolist()]
            index = torch.tensor([sorted(chosen + others)])
            N = cache.packed.length
            assert same_bits(cache.packed.k[layer][:, :, :N], gather_tokens(k, index))
            assert same_bits(cache.packed.v[layer][:, :, :N], gather_tokens(v, index))


@settings(max_examples=40)
@given(models, st.integers(1, 3), sparsities, st.sampled_from(["frame", "global"]))
def test_kept_tokens_have_the_positions_that_were_asked_for(shape, images, prefill, scope):
    """The first layer's keys depend on a row's token and position alone: with original positions
    they are rows of the dense cache, with contiguous ones those of a prompt that never held
    more."""
    vlm, processor = random_model(**shape | {"dtype": torch.float32})
    pictures = random_pictures(shape["seed"], images)
    dense = Dense(vlm, processor)
    dense.see(pictures)
    n = vlm.config.vision.patches
    ids = torch.tensor(processor.context([n] * images))
    for positions in ("original", "contiguous"):
        session = SparseVILA(
            vlm, processor, prefill_sparsity=prefill, positions=positions, scope=scope
        )
        session.see(pictures)
        kept = torch.cat([n * view + index for view, index in enumerate(session.kept)])
        stay = ids != processor.image_token_id
        stay[(~stay).nonzero()[:, 0][kept]] = True
        keys = session.cache.k[0][:, :, : session.cache.length]
        if positions == "original":
            expected = dense.cache.k[0][:, :, : len(ids)][:, :, stay]
            assert session.cache.next_position == len(ids)
        else:
            rest = torch.cat(vlm.encode(processor.pixels(pictures)))[kept]
            embeddings = vlm.embed(ids[stay], vlm.project(rest))
            cache = KVCache(vlm.config.text.layers)
            vlm.read(embeddings, cache)
            expected = cache.k[0][:, :, : cache.length]
            assert session.cache.next_position == int(stay.sum())
        assert torch.allclose(keys, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(models, pictures_and_turns, st.sampled_from(["contiguous", "original"]))
def test_a_conversation_is_one_long_prompt(shape, counts, positions):
    """The cache after several turns holds what a single pass over the whole text would have put
    there."""
    vlm, processor = random_model(**shape | {"dtype": torch.float32})
    session = Dense(vlm, processor, positions=positions)
    pictures = random_pictures(shape["seed"], counts[0])
    session.see(pictures)
    features = vlm.encode(processor.pixels(pictures))
    ids = processor.context([len(x) for x in features])
    unread = []
    for turn, question in enumerate(QUESTIONS[: counts[1]]):
        answer = session.ask(question, max_new_tokens=3)
        ids += unread + processor.question(question, first=turn == 0) + answer.token_ids[:-1]
        unread = [] if answer.token_ids[-1] in vlm.config.stop_ids else answer.token_ids[-1:]
    cache = KVCache(vlm.config.text.layers)
    vlm.read(vlm.embed(ids, vlm.project(torch.cat(features))), cache)
    assert session.cache.length == cache.length == len(ids)
    for (k, v), (k2, v2) in zip(rows(session.cache), rows(cache)):
        assert torch.allclose(k, k2, rtol=1e-3, atol=1e-4)
        assert torch.allclose(v, v2, rtol=1e-3, atol=1e-4)


def test_relevance_is_the_mean_attention_of_the_question(tiny, page):
    """The scores of the first layer, from its queries and keys and a float64 softmax over all
    rows."""
    vlm, _ = tiny
    session = SparseVILA(*tiny, prefill_sparsity=0.5)
    session.see(page)
    seen = []
    real = session.cache.score
    session.cache.score = lambda q, k: seen.append((q.clone(), k.clone())) or real(q, k)
    answer = session.ask(QUESTIONS[0])
    assert len(seen) == vlm.config.text.layers
    for layer, (q, k) in enumerate(seen):
        H, M, N = q.shape[1], q.shape[2], k.shape[2]
        total = torch.zeros(N, dtype=torch.float64)
        for h in range(H):
            for i in range(M):
                visible = N - M + i + 1
                key = k[0, h * k.shape[1] // H, :visible].double()
                weights = (key @ q[0, h, i].double() / math.sqrt(q.shape[-1])).softmax(0)
                total[:visible] += weights / (H * M)
        expected = total[session.cache.visual]
        assert torch.allclose(session.cache.relevance[layer].double(), expected, rtol=1e-4)
        best = expected.argsort(descending=True)[: len(answer.retrieved[layer])]
        assert sorted(best.tolist()) == answer.retrieved[layer].tolist()
