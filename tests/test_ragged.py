"""A family is a file: one from this folder is put into the registry and its checkpoint loaded, with
no other file touched; and every law of "What is exact" holds for its ragged views."""

import pytest
import ragged_family
import torch
from conftest import TINY, Recorder, random_pictures, same_bits
from PIL import Image
from test_exactness import (
    QUESTIONS,
    Stop,
    assert_dense_and_sparse_share_their_bits,
    assert_same_answer,
    bits_of_an_answer,
    compare_with_masked,
    rows,
)

import checkpoints
from model import TextConfig, rotary_table
from sparsevila import Dense, SparseVILA, keep_count
from tools import quantise
from tools.overlay import overlay

SIZES = [(40, 40), (64, 16), (9, 50), (24, 30)]  # of pictures: 25, 16, 6 and 9 patches


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The model and processor, by the production loader."""
    folder = ragged_family.write_checkpoint(
        tmp_path_factory.mktemp("ragged") / "checkpoint", TINY / "tokenizer.json"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.FAMILIES, "ragged", ragged_family)
        yield checkpoints.load(folder, device="cpu")


def pictures(count: int = 4) -> list[Image.Image]:
    whole = random_pictures(5, count, side=64)
    return [picture.crop((0, 0, *size)) for picture, size in zip(whole, SIZES)]


OPTIONS = [
    {"scope": scope, "positions": positions, "protocol": protocol}
    for scope in ("frame", "global")
    for positions in ("contiguous", "original")
    for protocol in ("conversation", "evaluation")
]


def test_views_have_as_many_tokens_as_they_have_patches(family):
    session = SparseVILA(*family, prefill_sparsity=0.5)
    session.see(pictures())
    assert [len(i) for i in session.kept] == [keep_count(n, 0.5) for n in (25, 16, 6, 9)]
    assert session.stats["visual_tokens"]["encoded"] == 25 + 16 + 6 + 9
    assert len(session.cache.visual) == sum(map(len, session.kept))
    image = family[1].image_token_id
    before = family[1].context([0, 0, 0, 0], session.views)
    assert session.stats["text_tokens"] == len(before) and image not in before


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_sparsity_zero_has_the_bits_of_dense(family, options, count):
    assert_dense_and_sparse_share_their_bits(*family, pictures(count), QUESTIONS, options, 5)


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_attention_is_masked_attention(family, options):
    for sparsities in ({}, {"prefill_sparsity": 0.3, "decode_sparsity": 0.5}):
        compare_with_masked(*family, pictures(), QUESTIONS, options | sparsities, 1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_visual_rows_forgotten_turns_and_interrupts(family, options):
    """Visual rows are never written again; forgotten and interrupted questions leave no trace."""
    fresh, used = (SparseVILA(*family, decode_sparsity=0.5, **options) for _ in range(2))
    for session in (fresh, used):
        session.see(pictures())
    before = [(k.clone(), v.clone()) for k, v in rows(used.cache)]
    for question in QUESTIONS[:2]:
        used.ask(question, max_new_tokens=300)
        used.forget()

    def interrupt(text: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        used.ask(QUESTIONS[2], on_text=interrupt)
    for (k, v), (k2, v2) in zip(before, rows(used.cache), strict=True):
        assert same_bits(k, k2) and same_bits(v, v2)
    assert_same_answer(*(bits_of_an_answer(s, QUESTIONS[3]) for s in (used, fresh)))


@pytest.mark.parametrize("scope", ["frame", "global"])
def test_more_sparsity_keeps_a_subset(family, scope):
    kept = []
    for sparsity in (0.2, 0.5, 0.8):
        session = SparseVILA(*family, prefill_sparsity=sparsity, scope=scope)
        session.see(pictures())
        kept.append([set(index.tolist()) for index in session.kept])
    for more, fewer in zip(kept, kept[1:]):
        assert all(few <= many for few, many in zip(fewer, more, strict=True))


def test_original_positions_are_those_of_the_dense_rows(family):
    """The first layer's keys depend on a row's token and its three positions alone."""
    dense, session = Dense(*family), SparseVILA(*family, positions="original")
    for each in (dense, session):
        each.see(pictures())
    ids = torch.tensor(family[1].context([25, 16, 6, 9], session.views))
    stay = ids != family[1].image_token_id
    first = torch.tensor([0, 25, 41, 47])
    kept = torch.cat([start + index for start, index in zip(first, session.kept)])
    stay[(~stay).nonzero()[:, 0][kept]] = True
    expected = dense.cache.k[0][:, :, : len(ids)][:, :, stay]
    keys = session.cache.k[0][:, :, : session.cache.length]
    assert torch.allclose(keys, expected, rtol=1e-4, atol=1e-5)
    assert session.cache.next_position == dense.cache.next_position


def test_contiguous_positions_are_the_smallest_grid(family):
    """Two tokens of a picture of 8 x 2 patches, (0, 1) and (1, 6): their rows and columns are
    numbered 0 and 1, and text goes on behind them."""
    _, processor = family
    views = processor.views(pictures(2)[1:])
    start = len(processor.context([0], views))
    ids, positions, after = processor.layout(views, [16], [torch.tensor([1, 14])], "contiguous")
    assert len(ids) == start + 2 and after == start + 2
    assert positions[:, start:].tolist() == [[start, start], [start, start + 1]] * 1 + [
        [start, start + 1]
    ]
    _, positions, after = processor.layout(views, [16], [torch.tensor([1, 14])], "original")
    assert (positions[:, start:] - start).tolist() == [[0, 0], [0, 1], [1, 6]]
    assert after == start + 8


def test_each_pair_turns_by_its_own_axis():
    """cos and sin of three positions are those of each axis by itself, pair by pair."""
    config = TextConfig(head_dim=12, rope_axes=(0, 1, 2, 2, 1, 0))
    positions = torch.tensor([[3, 9, 4], [5, 0, 4], [7, 1, 4]])
    tables = rotary_table(positions, config)
    for axis in range(3):
        single = rotary_table(positions[axis], config)
        pairs = [pair for pair, turned_by in enumerate(config.rope_axes) if turned_by == axis]
        for table, expected in zip(tables, single):
            for pair in pairs:
                assert same_bits(table[:, pair], expected[:, pair])
                assert same_bits(table[:, pair + 6], expected[:, pair + 6])
    for table, expected in zip(tables, rotary_table(positions[0], config)):
        assert same_bits(table[2], expected[2])  # the same on all axes


def test_overlay_marks_tokens_where_they_are(family):
    """A view of 8 x 2 patches: its kept tokens are not dimmed, the others are."""
    session = SparseVILA(*family, prefill_sparsity=0.5, decode_sparsity=0.99)
    session.see(Image.new("RGB", (64, 16), "white"))
    answer = session.ask("what?", max_new_tokens=2)
    panel = overlay(session, [("what?", answer)]).crop((4, 72, 324, 152))  # 320 x 80
    bright = {
        token
        for token in range(16)
        if panel.getpixel((token % 8 * 40 + 20, token // 8 * 40 + 20)) == (255, 255, 255)
    }
    assert bright == set(session.kept[0].tolist())


def test_calibration_reads_the_most_salient_quarter(family):
    """With views of different sizes, one embedding for every kept token."""
    vlm, processor = family
    shapes = pictures()
    with Recorder(vlm):
        pixels, batches = quantise.calibration(vlm, processor, shapes, ["what?"], 4)
    for picture, batch, n in zip(shapes, batches, (25, 16, 6, 9), strict=True):
        views = processor.views([picture])
        text = len(processor.context([0], views))
        text += len(processor.question("what?", first=True, views=views))
        answer = batch["embeddings"].shape[1] - text - keep_count(n, 0.75)
        assert 1 <= answer <= 32
    assert [p.shape[-2:] for p in pixels] == [(40, 40), (16, 64), (48, 8), (24, 24)]
