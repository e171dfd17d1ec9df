"""examples/transformers_vlm.py: held against transformers' own `generate` on tiny random models of
seven architectures, and against `SparseVILA` on the checkpoints that both read."""

import subprocess
import sys
from itertools import accumulate

import pytest
import torch
import transformers as hf
from conftest import ROOT, TINY
from hf_models import PICTURE, SPECIAL, make, save
from PIL import Image

import kernels
from bench.real import our_prompt
from checkpoints import load
from examples import transformers_vlm
from examples.transformers_vlm import RetrievalLayer, SparseVILA, contiguous, load_processor, select
from sparsevila import SparseVILA as Ours
from sparsevila import keep_count, select_tokens

GREEDY = {"do_sample": False, "max_new_tokens": 10}
NO_SPECIAL = GREEDY | {"suppress_tokens": list(range(2, len(SPECIAL)))}  # no generated pictures
QUESTIONS = ("how much is the coffee?", "what is on line 3?", "and below?")


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(96, 64), (60, 90)][:count]
    return [
        Image.frombytes(
            "RGB",
            size,
            bytes(torch.randint(256, (size[0] * size[1] * 3,), generator=generator).tolist()),
        )
        for size in sizes
    ]


class Scores(hf.LogitsProcessor):
    """Remembers the scores of every step."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores[0].double().nan_to_num(neginf=0))
        return scores


def asked(session, question="what is it?", **more):
    """The answer, and the scores of its tokens."""
    scores = Scores()
    answer = session.ask(question, **NO_SPECIAL | more, logits_processor=[scores])
    return answer, torch.stack(scores.steps)


def close(a, b, tolerance):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


GOLDEN = ROOT / "tests" / "golden"


CUT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # a value per token


class Listening(SparseVILA):
    """Keeps what `_salience` was given and what it returned."""

    def _salience(self, received, inputs, tokens):
        self.inputs, self.salience = inputs, super()._salience(received, inputs, tokens)
        return self.salience


@pytest.fixture(autouse=True)
def own_attention():
    """Of the copies of the file that tests have run, this one's."""
    hf.AttentionInterface.register("sparsevila", transformers_vlm.attention)


@pytest.fixture(scope="module", params=PICTURE)
def pair(request):
    return make(request.param)


# --- against plain `generate` ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_budget_is_plain_generate(pair, count):
    model, processor = pair
    model.set_attn_implementation("sdpa")
    images = pictures(count)
    content = [{"type": "image"}] * count + [{"type": "text", "text": "what is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=images, return_tensors="pt")
    plain = model.generate(**inputs, **NO_SPECIAL, output_scores=True, return_dict_in_generate=True)
    session = SparseVILA(model, processor, prefill_sparsity=0, decode_sparsity=0)
    session.see(images)
    answer, scores = asked(session)
    assert answer.token_ids == plain.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert close(scores, torch.cat(plain.scores).double().nan_to_num(neginf=0), 1e-5)


def test_original_positions_change_nothing_when_all_stay(pair):
    sessions = [
        SparseVILA(*pair, prefill_sparsity=0, positions=p) for p in ("contiguous", "original")
    ]
    for session in sessions:
        session.see(pictures(2))
    first, second = sessions
    assert first.context_positions.equal(second.context_positions)
    assert first.next_position == second.next_position


def test_a_conversation_is_one_prompt(pair):
    """Three turns at full budget, against plain `generate` with all of their text."""
    model, processor = pair
    session = SparseVILA(model, processor, prefill_sparsity=0, decode_sparsity=0)
    session.see(pictures(1))
    for question in QUESTIONS:
        answer, scores = asked(session, question)
        ids = torch.tensor(
            [session.ids[: len(session.ids) - len(answer.token_ids) + (answer.token_ids[-1] == 1)]]
        )
    model.set_attn_implementation("sdpa")
    inputs = processor(text=session.prompt[0], images=session.images, return_tensors="pt")
    inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
    for types in ("mm_token_type_ids", "token_type_ids"):
        if types in inputs:
            inputs[types] = (ids == model.config.image_token_id).int()
    plain = model.generate(**inputs, **NO_SPECIAL, output_scores=True, return_dict_in_generate=True)
    assert answer.token_ids == plain.sequences[0, ids.shape[1] :].tolist()
    assert close(scores, torch.cat(plain.scores).double().nan_to_num(neginf=0), 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", PICTURE)
def test_pruned_is_masked(kind):
    """Against the whole prompt, read by the plain model with the pruned tokens hidden: what stays
    has the same keys in every layer, its own features, and those for deeper layers."""
    model, processor = make(kind, **({"sliding_window": 4096} if kind == "gemma3" else {}))
    session = Listening(model, processor, prefill_sparsity=0.5, positions="original")
    session.see(pictures(2))
    inputs = {k: x[:, : session.context_end] if k in CUT else x for k, x in session.inputs.items()}
    first = accumulate(map(len, session.salience), initial=0)
    kept = torch.cat([start + chosen for start, chosen in zip(first, session.kept)])
    ids = inputs["input_ids"][0]
    stays = ids != model.config.image_token_id
    stays[(~stays).nonzero()[kept, 0]] = True
    places = torch.arange(len(ids))[None]
    if hasattr(model.model, "get_rope_index"):
        places = model.model.get_rope_index(**inputs)[0]
    model.set_attn_implementation("sdpa")
    inputs |= {"attention_mask": stays[None].int(), "position_ids": places}
    whole = model(**inputs, use_cache=True).cache
    for hidden, layer in zip(whole.layers, session.cache.layers, strict=True):
        assert close(layer.keys, hidden.keys[:, :, stays], 1e-5)
        assert close(layer.values, hidden.values[:, :, stays], 1e-5)


# --- against SparseVILA ---------------------------------------------------------------------------


BOTH = [
    "llava", "llava_next", "llava_next_mistral", "smolvlm", "smolvlm2", "qwen2_5_vl", "qwen3_vl",
]  # fmt: skip


@pytest.fixture(
    scope="module", params=[TINY, *(GOLDEN / name for name in BOTH)], ids=lambda folder: folder.name
)
def both(request):
    """Their model and ours, of the same checkpoint."""
    theirs = hf.AutoModelForImageTextToText.from_pretrained(request.param).eval()
    return (theirs, load_processor(request.param)), load(request.param, device="cpu")


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("protocol", ["conversation", "evaluation"])
@pytest.mark.parametrize("prefill, decode", [(0, 0), (0.75, 0.9), (0.5, 0.8)])
@pytest.mark.parametrize("count", [1, 2])
def test_the_same_tokens_are_kept_retrieved_and_generated(
    both, count, prefill, decode, protocol, positions
):
    settings = {
        "prefill_sparsity": prefill, "decode_sparsity": decode,
        "protocol": protocol, "positions": positions,
    }  # fmt: skip
    theirs, ours = Listening(*both[0], **settings), Ours(*both[1], **settings)
    if not both[0][1].chat_template:
        texts = both[1][1].template, both[0][1].image_token
        theirs.chat = lambda pictures: our_prompt(*texts, pictures)
    images = [TINY / "samples" / name for name in ("receipt.png", "timetable.png")][:count]
    for session in (theirs, ours):
        session.see([Image.open(image) for image in images])
    kept = []  # ours count no separators
    for salience, stays in zip(theirs.salience, theirs.kept, strict=True):
        tokens = salience.isfinite()
        kept.append((tokens.cumsum(0) - 1)[stays[tokens[stays]]].tolist())
    assert kept == [k.tolist() for k in ours.kept]
    for question in QUESTIONS:
        there = theirs.ask(question, **GREEDY, suppress_tokens=[both[0][0].config.image_token_id])
        here = ours.ask(question, max_new_tokens=GREEDY["max_new_tokens"])
        assert [r.tolist() for r in there.retrieved] == [r.tolist() for r in here.retrieved]
        assert there.token_ids == here.token_ids
        assert there.text == here.text or "\ufffd" in here.text


# --- laws -----------------------------------------------------------------------------------------


def test_packed_is_masked(pair, monkeypatch):
    """A cache that packs nothing, but hides what was not retrieved from every row of the answer."""

    class Masked(RetrievalLayer):
        def retrieve(self, query, scale):
            super().retrieve(query, scale)
            self.seen = torch.ones(self.keys.shape[2], dtype=torch.bool)
            self.seen[self.visual] = False
            self.seen[self.visual[self.retrieved]] = True
            self.packed = [self.keys, self.values]

        def update(self, key, value, *args, **kwargs):
            keys, values = super().update(key, value)
            if self.packed:
                keys.seen = torch.cat(
                    [self.seen, self.seen.new_ones(keys.shape[2] - len(self.seen))]
                )
            return keys, values

    def masked(module, query, key, value, attention_mask, **kwargs):
        if hasattr(key, "seen"):
            attention_mask = key.seen[None, None, None]
        return forward(module, query, key, value, attention_mask, **kwargs)

    forward = transformers_vlm.sdpa_attention_forward
    results = []
    for layer in (RetrievalLayer, Masked):
        session = SparseVILA(*pair, prefill_sparsity=0.5, decode_sparsity=0.5)
        monkeypatch.setattr(transformers_vlm, "RetrievalLayer", layer)
        monkeypatch.setattr(transformers_vlm, "sdpa_attention_forward", masked)
        session.see(pictures(2))
        results.append(asked(session))
    (packed, scores), (hidden, others) = results
    assert packed.token_ids == hidden.token_ids and close(scores, others, 1e-5)


def test_answers_do_not_depend_on_what_was_asked_and_forgotten(pair):
    session = SparseVILA(*pair, prefill_sparsity=0.5, decode_sparsity=0.5)
    session.see(pictures(2))
    first, scores = asked(session, QUESTIONS[0])
    asked(session, QUESTIONS[1])
    session.forget()
    session.forget()
    asked(session, QUESTIONS[2])
    session.forget()
    again, others = asked(session, QUESTIONS[0])
    assert again.token_ids == first.token_ids and scores.equal(others)
    assert all(x is y or x.equal(y) for x, y in zip(first.retrieved, again.retrieved))


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_answer_leaves_no_trace(pair, after):
    class Interrupt(hf.LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            if self.calls > after:
                raise KeyboardInterrupt
            return scores

    session = SparseVILA(*pair, prefill_sparsity=0.5, decode_sparsity=0.5)
    session.see(pictures(1))
    asked(session, QUESTIONS[0])
    keys = [layer.keys.clone() for layer in session.cache.layers]
    expected, scores = asked(session, QUESTIONS[1])
    session.forget()
    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTIONS[2], **GREEDY, logits_processor=[Interrupt()])
    assert all(layer.keys.equal(k) for layer, k in zip(session.cache.layers, keys, strict=True))
    answer, others = asked(session, QUESTIONS[1])
    assert answer.token_ids == expected.token_ids and scores.equal(others)


def test_one_token_questions_and_answers(pair):
    model, processor = pair
    session = SparseVILA(model, processor, prefill_sparsity=0.5, decode_sparsity=0.5)
    session.chat = lambda count: processor.image_token + "{question}{answer}{question}"
    session.see(pictures(1))
    for question in "abc":
        answer = session.ask(question, do_sample=False, max_new_tokens=1)
        assert len(answer.token_ids) == 1 and any(r is not None for r in answer.retrieved)


# --- salience -------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llava", "smolvlm", "internvl", "gemma3"])
def test_salience_is_the_mean_of_the_attention_that_a_tokens_patches_receive(kind):
    """Against the attention weights that transformers' eager tower returns."""
    model, processor = make(kind)
    session = Listening(model, processor)
    session.see(pictures(1))
    inputs, salience = session.inputs, session.salience
    model.set_attn_implementation("eager")
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    pixels = inputs["pixel_values"].flatten(0, -4)
    more = {}
    if kind == "smolvlm":
        more["patch_attention_mask"] = torch.ones(len(pixels), 4, 4, dtype=torch.bool)
    (*_, weights) = tower(pixel_values=pixels, output_attentions=True, **more).attentions
    if kind in ("llava", "internvl"):
        received = weights[:, :, 0, 1:].mean(1)
    else:
        received = weights.mean((1, 2))
    block = 1 if kind == "llava" else 2
    for view, mine in zip(received.view(-1, 4, 4), salience, strict=True):
        cells = [
            view[y : y + block, x : x + block].mean()
            for y in range(0, 4, block)
            for x in range(0, 4, block)
        ]
        assert close(mine, torch.stack(cells), 1e-5)


def test_windows_of_qwens_tower_do_not_permute_the_salience():
    """With blocks that add nothing, the last layer's attention depends on patches alone, whatever
    windows they are ordered by."""
    model, processor = make("qwen2_5_vl")
    tower, kept = model.model.visual, []
    with torch.no_grad():
        for block in tower.blocks:
            for linear in (block.attn.proj, block.mlp.down_proj):
                linear.weight.zero_()
                linear.bias.zero_()
    for window in (56, 56 * 100):
        tower.window_size = window
        session = SparseVILA(model, processor, prefill_sparsity=0.7)
        session.see([Image.open(TINY / "samples" / "receipt.png")] * 2)
        kept.append([k.tolist() for k in session.kept])
    assert kept[0] == kept[1]


def test_separators_of_tiles_stay_and_are_text():
    model, processor = make("llava_next")
    counts = {}
    for sparsity in (0, 0.5, 0.9):
        session = SparseVILA(model, processor, prefill_sparsity=sparsity)
        session.see(pictures(1))
        places = [i for i, token in enumerate(session.ids) if token == 2]
        text = {*places} - {*session.cache.layers[0].visual.tolist()}
        counts[sparsity] = len(text), len(places)
    # 32 x 64 pixels unpadded: 16 tokens of the whole, then 6 rows of 8 with a separator each
    separators, everything = counts[0]
    grid = everything - separators - 16
    for sparsity in (0.5, 0.9):
        tokens = keep_count(16, sparsity) + keep_count(grid, sparsity)
        assert counts[sparsity] == (separators, separators + tokens)
    newline = model.model.image_newline
    with torch.no_grad():
        features = model.model.get_image_features(
            **{
                k: x
                for k, x in session._inputs(session.prompt, session.images).items()
                if k in ("pixel_values", "image_sizes")
            },
        ).pooler_output[0]
    assert separators == int((features == newline).all(1).sum()) > 0


# --- parts ----------------------------------------------------------------------------------------


def test_the_two_lengths_of_a_layer():
    """Rows so far, for positions, and those that `update` returns, for the mask."""
    layer = RetrievalLayer(torch.arange(2, 12), 0.8, window=False, ranks=1)
    rows = lambda n: torch.randn(1, 2, n, 8)  # noqa: E731
    layer.update(rows(15), rows(15))
    assert layer.get_mask_sizes(3) == (18, 0) and layer.get_seq_length() == 15
    layer.retrieve(rows(3), None)
    for step in range(3):
        assert layer.get_seq_length() == 15 + step
        physical = layer.get_mask_sizes(1)
        keys, values = layer.update(rows(1), rows(1))
        assert physical == (keys.shape[2], 0) == (values.shape[2], 0) == (5 + 2 + step + 1, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_in_place_of_the_kernels(causal, tmp_path):
    source = (ROOT / "examples" / "transformers_vlm.py").read_text()
    names: dict = {"__file__": str(tmp_path / "a" / "transformers_vlm.py"), "__name__": "copy"}
    exec(compile(source, "copy", "exec"), names)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    expected = kernels.attention_colsum_reference(q.double(), k.double(), causal=causal, scale=0.7)
    assert names["attention_colsum"].__module__ == "copy"
    assert transformers_vlm.attention_colsum.__module__ == "kernels"
    assert close(names["attention_colsum"](q, k, causal=causal, scale=0.7), expected, 1e-6)


@pytest.mark.parametrize("sparsity", [0, 0.29, 0.5, 0.75, 0.999])
def test_selection_is_ours(sparsity):
    scores = torch.randint(0, 9, (50,)).float()
    assert select(scores, sparsity).equal(select_tokens(scores, keep_count(50, sparsity)))


def test_contiguous_positions_close_gaps_and_keep_order():
    """Text, four of a picture's 3 x 3 tokens, text: rows 0 and 2, columns 0, 1 and 2 are left."""
    text, picture = [[0, 1]] * 3, [[2, 2, 2, 2], [2, 2, 4, 4], [2, 4, 3, 4]]
    positions = torch.tensor([a + b + [5, 6] for a, b in zip(text, picture)])
    visual = torch.tensor([False] * 2 + [True] * 4 + [False] * 2)
    expected = [[0, 1, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 3, 3, 5, 6], [0, 1, 2, 4, 3, 4, 5, 6]]
    assert contiguous(positions, visual).tolist() == expected
    assert contiguous(torch.tensor([[0, 3, 9, 11]]), torch.tensor([0, 1, 1, 0])).tolist() == [
        [0, 1, 2, 3]
    ]


LINEAR = {"num_experts": 2, "layer_types": ["linear_attention", "full_attention"] * 2}
SHARED = {
    "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4, "altup_num_inputs": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 290, "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, changes, found",
    [
        ("mistral", {"sliding_window": 4096}, "DynamicSlidingWindowLayer$"),
        ("qwen3_next", LINEAR, "Linear"),
        ("gemma3n_text", SHARED, "DummyLayer, DynamicLayer"),
    ],
)
def test_decoders_that_cannot_retrieve_are_refused(kind, changes, found):
    with pytest.raises(ValueError, match=f"keys and values of its own.*{found}"):
        SparseVILA(*make("llava", model_type=kind, **changes))


@pytest.mark.parametrize("question", ["", " ", "what is <image>?", "</s>"])
def test_questions_that_are_none_are_refused(question):
    session = SparseVILA(*make("llava"))
    with pytest.raises(RuntimeError, match="call see"):
        session.ask("what?")
    session.see(pictures(1))
    with pytest.raises(ValueError, match="a question must be text without special tokens"):
        session.ask(question)


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_sparsity": 1},
        {"decode_sparsity": -0.1},
        {"positions": "new"},
        {"protocol": "chat"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"must be in .* got .*{[*settings.values()][0]}"):
        SparseVILA(*make("llava"), **settings)
    session = SparseVILA(*make("llava"))
    session.chat = lambda pictures: "<image>{question}"
    with pytest.raises(ValueError, match="two questions and an answer must stand in a template"):
        session.see(pictures(1))


def test_models_without_a_tower_are_refused():
    model, processor = make("llava")
    with pytest.raises(ValueError, match="must have a vision tower, got LlamaModel"):
        SparseVILA(model.model.language_model, processor)


def test_only_a_missing_torchvision_leaves_videos_out(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises((ValueError, OSError)) as alone:
        hf.AutoProcessor.from_pretrained(tmp_path)
    with pytest.raises(type(alone.value)) as ours:
        load_processor(tmp_path)
    assert str(ours.value) == str(alone.value)


@pytest.mark.parametrize(
    "argument",
    [
        {"return_dict_in_generate": True}, {"prefill_chunk_size": 4}, {"use_cache": False},
        {"prompt_lookup_num_tokens": 2}, {"num_beams": 2},
    ],
)  # fmt: skip
def test_arguments_of_generate_that_would_be_wrong_are_refused(pair, argument):
    """And leave the session as it was."""
    session = SparseVILA(*pair, prefill_sparsity=0.5, decode_sparsity=0.5)
    session.see(pictures(1))
    expected, scores = asked(session, QUESTIONS[0])
    session.forget()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        session.ask(QUESTIONS[0], **NO_SPECIAL, **argument)
    answer, others = asked(session, QUESTIONS[0])
    assert answer.token_ids == expected.token_ids and scores.equal(others)


def test_a_stop_token_of_one_call_is_written_again_by_the_template(pair):
    """Any other last token is one that the cache does not have yet."""
    session = SparseVILA(*pair, prefill_sparsity=0.5)
    session.see(pictures(1))
    answer = session.ask("what?", **NO_SPECIAL)
    assert len(session.ids) == session.cache.get_seq_length() + 1
    session.forget()
    stop = answer.token_ids[2]
    answer = session.ask("what?", **NO_SPECIAL, eos_token_id=[stop])
    assert answer.token_ids[-1] == stop and len(session.ids) == session.cache.get_seq_length()


def test_a_tower_that_fails_is_overheard_no_longer():
    model, processor = make("llava")
    session = SparseVILA(model, processor)
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model.multi_modal_projector, "linear_1", torch.nn.Linear(1, 1))
        session.see(pictures(1))
    assert not hasattr(session.tower, "received")


# --- more than one device -------------------------------------------------------------------------


def test_layers_may_lie_on_several_devices(tmp_path):
    """As far as a machine without accelerators goes: two layers are read from disk when needed."""
    save("llava", tmp_path)
    parts = [
        "vision_tower",
        "multi_modal_projector",
        "language_model.embed_tokens",
        "language_model.norm",
        "language_model.rotary_emb",
    ]
    devices = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    devices |= {f"model.language_model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(4)}
    results = []
    for device_map in (None, devices):
        model = hf.AutoModelForImageTextToText.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        session = SparseVILA(model, load_processor(tmp_path))
        session.see(pictures(2))
        results.append(asked(session))
    assert results[0][0].token_ids == results[1][0].token_ids
    assert results[0][1].equal(results[1][1])


PARALLEL = """
import os, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}, {root!r} + "/examples"]
import transformers
from transformers_vlm import SparseVILA, load_processor
split = {{"tp_plan": "auto"}} if "RANK" in os.environ else {{}}
model = transformers.AutoModelForImageTextToText.from_pretrained({folder!r}, **split)
session = SparseVILA(model, load_processor({folder!r}), decode_sparsity=0.9)
session.see({page!r})
for question in {questions!r}:
    answer = session.ask(question, max_new_tokens=10, do_sample=False)
    retrieved = [rows.tolist() for rows in answer.retrieved]
    os.write(1, f"GOT {{answer.token_ids}} {{retrieved}}\\n".encode())
"""


def test_two_processes_share_the_heads(tmp_path, page, monkeypatch):
    """torchrun, transformers' own plan, gloo: both ranks retrieve and say what one process does."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes cannot share a GPU
    script = tmp_path / "parallel.py"
    script.write_text(
        PARALLEL.format(root=str(ROOT), folder=str(TINY), page=str(page), questions=QUESTIONS)
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    outputs = [
        subprocess.run(
            [*command, str(script)], capture_output=True, text=True, timeout=300, check=True
        )
        for command in ([sys.executable], torchrun)
    ]
    alone, together = (
        sorted(line for line in o.stdout.splitlines() if line.startswith("GOT")) for o in outputs
    )
    assert len(alone) == 3 and together == sorted(alone * 2)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_the_command(kind, tmp_path, page):
    folder = GOLDEN / "llava"
    if kind != "llava":
        save(kind, folder := tmp_path)
    command = [sys.executable, str(ROOT / "examples" / "transformers_vlm.py"), str(folder)]
    run = subprocess.run(
        [*command, "--image", str(page), "--ask", "what?", "and?"], capture_output=True, check=True
    )
    assert run.stdout.startswith(b"> what?\n") and b"\n> and?\n" in run.stdout
