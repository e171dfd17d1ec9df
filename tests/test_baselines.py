"""baselines.py: the definitions, on cases that can be worked out, and what all methods share."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_pictures

import baselines
from baselines import InsideCache, density_peaks
from checkpoints import load
from checkpoints.processor import open_picture
from kernels import attention_colsum
from sparsevila import Dense, SparseVILA

METHODS = [
    value
    for value in vars(baselines).values()
    if inspect.isclass(value) and issubclass(value, SparseVILA)
    and value.__module__ == "baselines"
    and value not in (baselines.PerViewMethod, baselines.Pruned, baselines.Watched)
]  # fmt: skip
GOLDEN = ROOT / "tests" / "golden"
QUESTIONS = ["how much is the coffee?", "what costs 3.10?", "what is on line 5?"]
BLIND = (baselines.Blind, baselines.FromTheQuestion)  # have no budget
MERGING = (baselines.VisionZip, baselines.PruMerge)  # even at full budget they change tokens


def answers(session, page, **settings):
    session.see(page)
    return [session.ask(question, **settings).token_ids for question in QUESTIONS]


@pytest.mark.parametrize("kind", [k for k in METHODS if k not in (*MERGING, *BLIND)])
def test_at_full_budget_every_method_is_the_dense_model(tiny, page, kind):
    expected = answers(Dense(*tiny), page)
    assert answers(kind(*tiny, prefill_sparsity=0, decode_sparsity=0), page) == expected


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_answers_many_turns_about_several_pictures(tiny, page, kind):
    torch.manual_seed(0)
    session = kind(*tiny, protocol="conversation")
    assert all(answers(session, [page, page], max_new_tokens=20))
    session.forget()
    assert session.ask("how much is the milk?").token_ids
    kept = session.stats["visual_tokens"]["kept"]
    whole = isinstance(session.cache, InsideCache)
    assert kept == (0 if kind is baselines.Blind else 800 if whole else 200)


@pytest.mark.parametrize("kind", METHODS)
def test_the_budget_is_kept(tiny, page, kind):
    """At most 100 of 400 tokens enter the decoder, or, dropped inside it, its last layer."""
    session = kind(*tiny)
    session.see(page)
    answer = session.ask(QUESTIONS[0])
    assert len(answer.retrieved[-1]) <= 100 and (answer.retrieved[-1].diff() > 0).all()


def test_pruned_methods_lose_what_the_second_question_needs(tiny, page):
    """The first answer's forty best tokens do for the first question only; SparseVILA, which
    attends to as many, answers all three."""
    oracle = baselines.FirstTurnOracle(*tiny, prefill_sparsity=0.9, protocol="evaluation")
    expected = answers(Dense(*tiny, protocol="evaluation"), page)
    got = answers(oracle, page)
    assert got[0] == expected[0] and got[1] != expected[1]
    ours = SparseVILA(*tiny, decode_sparsity=0.6, protocol="evaluation")
    assert answers(ours, page) == expected


@pytest.mark.parametrize("name", ["smolvlm", "nvila", "nvila_hf"])
@pytest.mark.parametrize("kind", METHODS)
def test_methods_work_where_a_token_is_several_patches(name, kind):
    """And without a class token, with tiles; these decoders have two layers."""
    vlm, processor = load(GOLDEN / name, device="cpu")
    session = kind(vlm, processor, prefill_sparsity=0.5)
    picture = random_pictures(1, 1, side=70)
    if kind is baselines.FastV:
        with pytest.raises(ValueError, match="drops nothing in a decoder of 2 layers"):
            session.see(picture)
        return
    session.see(picture)
    assert session.ask("what?", max_new_tokens=3).token_ids


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_methods_work_in_half_precision(kind, dtype, page):
    session = kind(*load(ROOT / "tiny", device="cpu", dtype=dtype))
    session.see(page)
    assert session.ask("what is on line 5?", max_new_tokens=4).token_ids


def test_settings_that_a_method_would_ignore_are_refused(tiny):
    with pytest.raises(ValueError, match="VisionZip knows no scope but 'frame', got 'global'"):
        baselines.VisionZip(*tiny, scope="global")
    with pytest.raises(ValueError, match="tokens of PruMerge have contiguous positions only"):
        baselines.PruMerge(*tiny, positions="original")


@pytest.mark.parametrize("kind", [baselines.FastV, baselines.SparseVLM])
def test_a_question_that_fails_chooses_nothing(tiny, page, kind, monkeypatch):
    session = kind(*tiny, prefill_sparsity=0.97)
    session.see(page)
    drop = session.cache.drop

    def fail(*arguments):
        drop(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.cache, "drop", fail)
    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTIONS[2])
    monkeypatch.undo()
    fresh = kind(*tiny, prefill_sparsity=0.97)
    fresh.see(page)
    got, expected = session.ask(QUESTIONS[0]), fresh.ask(QUESTIONS[0])
    assert got.token_ids == expected.token_ids
    assert [r.tolist() for r in got.retrieved] == [r.tolist() for r in expected.retrieved]


def test_the_oracle_before_and_after_a_failed_see(tiny, page):
    oracle = baselines.FirstTurnOracle(*tiny)
    with pytest.raises(RuntimeError, match="nothing to ask about"):
        oracle.ask(QUESTIONS[0])
    oracle.see(page)
    with pytest.raises(OSError):
        oracle.see("/nonexistent.png")
    assert oracle.ask(QUESTIONS[0]).token_ids


# --- definitions ----------------------------------------------------------------------------------


def fake(session_type, sparsity, **attributes):
    """A session without a model, to call `prune` of."""
    session = session_type.__new__(session_type)
    session.prefill_sparsity = sparsity
    for name, value in attributes.items():
        setattr(session, name, value)
    return session


def test_uniform_takes_the_middle_of_equal_stretches():
    x = torch.arange(12.0)[:, None]
    kept, index = fake(baselines.Uniform, 0.75).prune([x, x[:4]], [])
    assert [i.tolist() for i in index] == [[2, 6, 10], [2]]
    assert [x.flatten().tolist() for x in kept] == [[2, 6, 10], [2]]


def test_pool_means_blocks():
    kept, index = fake(baselines.Pool, 0.75).prune([torch.arange(16.0).view(16, 1)], [])
    assert kept[0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert index[0].tolist() == [0, 2, 8, 10]


def test_visionzip_by_hand():
    """Eight patches, budget four: class token, two dominant, one contextual token."""
    keys = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1], [2, 1]]), dim=-1)
    keys = torch.cat([torch.zeros(2, 2), keys])  # the first two will be dominant
    x = torch.arange(1.0, 9)[:, None]
    salience = torch.tensor([9.0, 8, 1, 1, 1, 1, 1, 1])
    session = fake(baselines.VisionZip, 0.5, keys=[keys], summary=[torch.tensor([[100.0]])])
    (kept,), (index,) = session.prune([x], [salience])
    # All six others join the only target, patch 2: 3 + mean(4 .. 8).
    assert kept.flatten().tolist() == [100, 1, 2, 3 + 6] and len(index) == 4
    assert {0, 1, 2} < set(index.tolist()) and (index.diff() > 0).all()
    session.average = True
    assert session.prune([x], [salience])[0][0].flatten().tolist() == [100, 1, 2, 4.5]


def test_visionzip_assigns_by_the_most_similar_key():
    keys = torch.tensor([[1.0, 0], [0, 1], [3, 0.1], [0.1, 2]])
    got = baselines.VisionZip.merged(
        fake(baselines.VisionZip, 0), torch.eye(4), keys, [0, 1], [2, 3]
    )
    assert got.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_prumerge_by_hand():
    """Three tokens, budget two: the best with its neighbour added, and the others' weighted sum.
    One neighbour, as 32 of 576 are less than one of three."""
    x, scores = torch.tensor([[1.0], [10], [100]]), torch.tensor([0.5, 0.3, 0.2])
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
    session = fake(baselines.PruMerge, 1 / 3, keys=[keys])
    (kept,), (index,) = session.prune([x], [scores])
    torch.testing.assert_close(kept.flatten(), torch.tensor([1 + 20.0, 3 + 20.0]))
    assert index.tolist() == [0, 1]


def test_prumerge_scores_use_full_width_vectors(tiny, page):
    vlm, processor = tiny
    pixels = processor.pixels([open_picture(page)])
    session = baselines.PruMerge(*tiny)
    _, scores = session.encode(pixels)
    tower = vlm.vision_tower
    with torch.no_grad():
        x = tower.layers[1](tower.layers[0](tower.embed(pixels)))
        attention = tower.layers[2].self_attn
        x = tower.layers[2].layer_norm1(x)
        q, k = attention.q_proj(x)[:, 0].double(), attention.k_proj(x).double()
    expected = ((k @ q[0]) / math.sqrt(128)).softmax(-1)[:, 1:]
    torch.testing.assert_close(scores[0].double(), expected[0], rtol=1e-4, atol=1e-7)


def test_the_tower_is_left_as_it_was(tiny, page):
    vlm, processor = tiny
    pixels = processor.pixels([open_picture(page)])
    before = vlm.encode(pixels)
    for kind in (*MERGING, baselines.Downsample, baselines.MeanSalience):
        kind(*tiny).see(page)
    broken = vlm.vision_tower.layers[-2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        baselines.Downsample(*tiny).see(page)
    broken.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, vlm.encode(pixels), strict=True))


def test_mean_salience_adds_up_to_one_with_the_class_tokens_share(tiny, page):
    session = baselines.MeanSalience(*tiny)
    _, salience = session.encode(tiny[1].pixels([open_picture(page)]))
    assert salience[0].shape == (400,) and 0.5 < salience[0].sum() < 1


def rows(seed, layers, heads, count, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, count, dim, generator=generator) for _ in range(layers)]


@pytest.mark.parametrize("recycle", [False, True])
def test_inside_cache_drops_for_the_layers_that_follow(recycle):
    """Three layers, twenty visual rows; after layer 0 five stay."""
    visual = torch.arange(2, 22)
    cache = InsideCache(3, 64, visual, {0: 5}, recycle)
    q, k, v = rows(0, 3, 4, 24), rows(1, 3, 2, 24), rows(2, 3, 2, 24)
    for layer in range(3):
        cache.attend(layer, q[layer], k[layer], v[layer])
    cache.start_question()
    asked = rows(3, 3, 4, 2), rows(4, 3, 2, 2), rows(5, 3, 2, 2)
    outs = [cache.attend(layer, *(part[layer] for part in asked)) for layer in range(3)]
    keys = [torch.cat([a, b], 2) for a, b in zip(k, asked[1])]
    received = attention_colsum(asked[0][0][:, :, -1:], keys[0]).mean((0, 1))[visual]
    stay = received.topk(5).indices.sort().values
    assert [chosen.tolist() for chosen in cache.retrieved] == [
        list(range(20)),
        *[stay.tolist()] * 2,
    ]
    # Layer 1 by float64: text, what stays, and the means of the clusters.
    seen = sorted({0, 1, 22, 23, 24, 25} | set(visual[stay].tolist()))
    values = torch.cat([v[1], asked[2][1]], 2)
    merged = [
        [t[:, :, c].mean(2, keepdim=True) for c in cache.clusters[1]] for t in (keys[1], values)
    ]
    full_k = torch.cat([*merged[0], keys[1][:, :, seen]], 2).double().repeat_interleave(2, 1)
    full_v = torch.cat([*merged[1], values[:, :, seen]], 2).double().repeat_interleave(2, 1)
    scores = asked[0][1].double() @ full_k.mT / math.sqrt(8)
    scores[:, :, 0, -1] = -math.inf
    torch.testing.assert_close(outs[1].double(), scores.softmax(-1) @ full_v, rtol=1e-4, atol=1e-5)
    # A later question changes nothing; 15 were dropped, 4 of them make one cluster.
    cache.start_answer()
    cache.start_question()
    assert not cache.reading
    assert [len(c) for c in cache.clusters[1]] == ([4] if recycle else [])


def test_density_peaks_finds_two_heaps():
    generator = torch.Generator().manual_seed(0)
    heaps = torch.cat([torch.randn(6, 3, generator=generator), 50 + torch.randn(5, 3)])
    got = density_peaks(heaps, 2)
    assert len(set(got[:6].tolist())) == len(set(got[6:].tolist())) == 1 and got[0] != got[-1]


def test_fastv_and_sparsevlm_stages():
    """K = 2 for FastV; layers 2, 6 and 15 of 32 for SparseVLM."""

    class Fake:
        config = type("", (), {"text": type("", (), {"layers": 32})})

    visual = torch.arange(576)
    cache = fake(baselines.FastV, 0.75, model=Fake).new_cache(visual, 64)
    assert cache.stages == {1: 144}
    cache = fake(baselines.SparseVLM, 0.75, model=Fake).new_cache(visual, 64)
    assert cache.stages == {1: 432, 5: 288, 14: 144} and cache.recycle


def test_reselection_retrieves_anew_every_eight_tokens(tiny, page):
    session = baselines.Reselect(*tiny)
    session.see(page)
    counts = []
    start = session.cache.start_answer
    session.cache.start_answer = lambda: (counts.append(len(answer)), start())
    answer: list[str] = []
    session.ask("what is on line 3?", max_new_tokens=20, on_text=answer.append)
    # At once; then when eight tokens of the answer were read and the ninth was given.
    assert counts[0] == 0 and counts[1] == 9 and len(counts) == 1 + (len(answer) - 1) // 8
