"""Checkpoints in the hub's own file layout: what loads, and what is refused with which words."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import FAMILIES, ROOT, TINY, same_bits
from safetensors.torch import load_file, save_file

from checkpoints import fetch, load, load_model, load_processor, networks
from model import Decoder, attend_uncached
from sparsevila import SparseVILA


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny checkpoint to damage."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    for file in [*TINY.glob("*.json"), TINY / "model.safetensors"]:
        shutil.copy(file, target)
    return target


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def shard(folder, parts=3):
    """Split model.safetensors into shards with an index, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = dict(list(tensors.items())[part::parts])
        save_file(chosen, folder / name)
        weight_map |= dict.fromkeys(chosen, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def assert_same_model(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_shards_hold_the_same_model(tiny, folder):
    shard(folder)
    assert_same_model(load_model(folder, device="cpu"), tiny[0])


def test_an_index_that_names_another_shard_is_refused(folder):
    index = shard(folder)

    def move(content):
        first = next(iter(content["weight_map"]))  # in the first shard
        content["weight_map"][first] = "model-00003-of-00003.safetensors"

    edit(index, move)
    with pytest.raises(ValueError, match="is in model-00003-of-00003.safetensors, which lacks it"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("shards_stay", [True, False])
def test_a_whole_model_wins_over_older_shards(tiny, folder, shards_stay):
    """As transformers leaves a folder when a model is saved in shards first and whole later."""
    new = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in new.items()}, folder / "model.safetensors")
    shard(folder)
    if not shards_stay:
        for old in folder.glob("*.safetensors"):
            old.unlink()
    save_file(new, folder / "model.safetensors")
    assert_same_model(load_model(folder, device="cpu"), tiny[0])


@pytest.mark.parametrize(
    "old, new",
    [  # as transformers names them in memory since 4.52, and without the inner `vision_model`
        (r"language_model\.model\.", "model.language_model."),
        (r"language_model\.lm_head\.", "lm_head."),
        (r"vision_tower\.", "model.vision_tower."),
        (r"vision_tower\.vision_model\.", "vision_tower."),
        (r"multi_modal_projector\.", "model.multi_modal_projector."),
    ],
)
def test_other_spellings_of_tensor_names(tiny, folder, old, new):
    tensors = load_file(folder / "model.safetensors")
    renamed = {re.sub("^" + old, new, name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors")
    assert_same_model(load_model(folder, device="cpu"), tiny[0])


def test_known_unneeded_tensors_are_skipped(tiny, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(101)[None]
    save_file(tensors, folder / "model.safetensors")
    assert_same_model(load_model(folder, device="cpu"), tiny[0])


@pytest.mark.parametrize("place", ["config", "text_config"])
def test_a_tied_head_may_be_missing_but_a_stored_one_wins(folder, place):
    def tie(config):
        (config if place == "config" else config["text_config"])["tie_word_embeddings"] = True

    edit(folder / "config.json", tie)
    stored = load_model(folder, device="cpu")
    assert not same_bits(stored.lm_head.weight, stored.decoder.embed_tokens.weight)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    tied = load_model(folder, device="cpu")
    assert tied.lm_head.weight is tied.decoder.embed_tokens.weight


def test_dtype_and_device_arguments(folder):
    vlm = load_model(folder, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    edit(folder / "config.json", lambda c: c.update(torch_dtype="float16"))
    assert load_model(folder, device="cpu").dtype == torch.float16


@pytest.mark.parametrize("arguments", [{"dtype": "float16"}, {"dtype": torch.float64}])
def test_other_dtypes_are_refused(arguments):
    with pytest.raises(ValueError, match="dtype must be torch.float32, float16, bfloat16 or None"):
        load_model(TINY, **arguments)


@pytest.mark.parametrize("device", ["", "toaster", "meta", "hpu", 3.5])
def test_devices_that_cannot_be_used_are_refused(device):
    with pytest.raises(ValueError, match="cannot be used"):
        load_model(TINY, device=device)


def test_the_tokenizers_own_truncation_and_padding_are_not_obeyed(tiny, folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(folder / "tokenizer.json"))
    processor = load_processor(folder)
    assert processor.context([7]) == tiny[1].context([7])
    question = "which digit is next to the red 7?"
    assert processor.question(question, first=True) == tiny[1].question(question, first=True)


def test_the_model_loads_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    load_model(folder, device="cpu")
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in"):
        load_processor(folder)


def test_config_spellings_and_defaults(folder):
    def respell(config):
        config["image_token_id"] = config.pop("image_token_index")
        text = config["text_config"]
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
        text.pop("head_dim")
        config["dtype"] = config.pop("torch_dtype")
        config["vision_config"].pop("projection_dim")

    before = load_model(folder, device="cpu").config
    edit(folder / "config.json", respell)
    assert load_model(folder, device="cpu").config == before


def test_stop_tokens_come_from_the_first_place_that_names_them(folder):
    generation = folder / "generation_config.json"
    edit(generation, lambda c: c.update(eos_token_id=[7, 9]))
    assert load_model(folder, device="cpu").config.stop_ids == (7, 9)
    generation.unlink()
    edit(folder / "config.json", lambda c: c["text_config"].update(eos_token_id=5))
    assert load_model(folder, device="cpu").config.stop_ids == (5,)
    edit(folder / "config.json", lambda c: c["text_config"].pop("eos_token_id"))
    assert load_model(folder, device="cpu").config.stop_ids == (2,)


def edited(name, **changes):
    return lambda folder: edit(folder / name, lambda c: c.update(changes))


def config(**changes):
    return edited("config.json", **changes)


def text_config(**changes):
    return lambda folder: edit(folder / "config.json", lambda c: c["text_config"].update(changes))


def vision_config(**changes):
    return lambda folder: edit(folder / "config.json", lambda c: c["vision_config"].update(changes))


def tensors(change):
    def damage(folder):
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return damage


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncate_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def hostile_header(folder):
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_to(name):
    def damage(folder):
        index = shard(folder)
        edit(index, lambda c: c["weight_map"].update({next(iter(c["weight_map"])): name}))

    return damage


def empty_the_index(folder):
    shard(folder).write_text("{}")


def lose_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


NORM = "language_model.model.norm.weight"
# Some keys of liuhaotian/llava-v1.5-7b's config.json.
AUTHORS = """{"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
"hidden_size": 4096, "mm_projector_type": "mlp2x_gelu",
"mm_vision_tower": "openai/clip-vit-large-patch14-336"}"""
MANY = 500 * "{image}" + 500 * "{question}" + 500 * "{answer}"  # refused in linear time


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            config(model_type="gpt2"),
            ValueError,
            "model_type 'gpt2' is not supported, accepted: llava",
        ),
        (config(model_type=None), ValueError, "model_type None"),
        (config(vision_config=None), ValueError, "config.json has no vision_config"),
        (config(torch_dtype="int8"), ValueError, "dtype must be .*, got 'int8'"),
        (config(vision_feature_layer=9), ValueError, r"vision_feature_layer must be .*got 9"),
        (config(vision_feature_layer=[1, 2]), ValueError, r"got \[1, 2\]"),
        (config(vision_feature_select_strategy="full"), ValueError, "got 'full'"),
        (config(image_token_index=-1), ValueError, "image_token_index must be .*got -1"),
        (config(projector_hidden_act="sin"), ValueError, "projector_hidden_act must be .*'sin'"),
        (text_config(model_type="mamba"), ValueError, "text model_type must be .*'mamba'"),
        (text_config(rope_scaling={"type": "yarn"}), ValueError, "rope scaling .*'yarn'"),
        (
            text_config(rope_scaling={"factor": 2.0}, rope_parameters={"factor": 4.0}),
            ValueError,
            "rope_parameters and rope_scaling disagree: {'factor': 4.0} and {'factor': 2.0}",
        ),
        (text_config(rope_scaling={"factor": 2.0}), ValueError, "rope scaling .*'factor': 2.0"),
        (config(tie_word_embeddings="false"), ValueError, "must be true or false, got 'false'"),
        (config(multimodal_projector_bias=1), ValueError, "must be true or false, got 1"),
        (config(image_token_index=10**400), ValueError, "image_token_index must be an integer in"),
        (
            text_config(num_hidden_layers=10**9),
            ValueError,
            r"num_hidden_layers must be .*1000000000",
        ),
        (text_config(hidden_size=-1), ValueError, "hidden_size must be .*got -1"),
        (text_config(hidden_size="128"), ValueError, "hidden_size must be .*got '128'"),
        (text_config(num_key_value_heads=3), ValueError, "must divide the query heads"),
        (text_config(eos_token_id="x"), None, None),  # generation_config.json names one first
        (vision_config(num_attention_heads=5), ValueError, "not a multiple of 5 heads"),
        (vision_config(patch_size=999), ValueError, "larger than image_size"),
        (
            vision_config(hidden_size=64),
            ValueError,
            r"linear_1.weight must have shape \(128, 64\), got \(128, 128\)",
        ),
        (
            tensors(lambda t: t.pop(NORM)),
            ValueError,
            "lacks 1 tensors, the first: decoder.norm.weight",
        ),
        (
            tensors(lambda t: t.pop("language_model.lm_head.weight")),
            ValueError,
            "lacks 1 tensors, the first: lm_head.weight",
        ),
        (
            tensors(lambda t: t.update(surprise=torch.ones(2))),
            ValueError,
            "surprise has no place in this model",
        ),
        (
            tensors(lambda t: t.update({NORM: torch.ones(7)})),
            ValueError,
            r"model.norm.weight must have shape \(128,\), got \(7,\)",
        ),
        (
            tensors(lambda t: t.update({"lm_head.weight": torch.ones(2)})),
            ValueError,
            "lm_head.weight is there twice|language_model.lm_head.weight is there twice|shape",
        ),
        (
            tensors(lambda t: t.update({NORM: torch.ones(128, dtype=torch.int32)})),
            ValueError,
            "must be floating point of at least 16 bits, got torch.int32",
        ),
        (
            tensors(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
            ValueError,
            "must be floating point of at least 16 bits, got torch.float8_e4m3fn",
        ),
        (truncate, ValueError, "model.safetensors is damaged"),
        (truncate_header, ValueError, "model.safetensors is damaged"),
        (hostile_header, ValueError, "model.safetensors is damaged"),
        (pickle_only, FileNotFoundError, "only pytorch_model.bin .refused: pickles can run code"),
        (index_to("../model.safetensors"), ValueError, "names '../model.safetensors', accepted"),
        (index_to("/etc/passwd"), ValueError, "names '/etc/passwd', accepted"),
        (index_to("sub\\x.safetensors"), ValueError, "accepted: files in the same folder"),
        (index_to("config.json"), ValueError, "config.json refused, accepted: .safetensors"),
        (lose_a_shard, FileNotFoundError, "no regular file 'model-00002-of-00003"),
        (empty_the_index, ValueError, "has no weight_map"),
        (
            remove("model.safetensors"),
            FileNotFoundError,
            "must hold .safetensors weights, found none",
        ),
        (remove("config.json"), FileNotFoundError, "no config.json in"),
        (remove("preprocessor_config.json"), FileNotFoundError, "no preprocessor_config.json in"),
        (remove("tokenizer.json"), FileNotFoundError, "no tokenizer.json in"),
        (write("config.json", "{"), ValueError, "config.json is not JSON"),
        (write("config.json", "[" * 100_000), ValueError, "config.json is not JSON"),
        (write("config.json", "[]"), ValueError, "must hold a JSON object, got list"),
        (write("config.json", AUTHORS), ValueError, "LLaVA's authors .*, accepted: .* llava-hf/"),
        (write("tokenizer.json", '{"model": 3}'), ValueError, "tokenizer.json is damaged"),
        (write("preprocessor_config.json", '{"size": 0}'), ValueError, "crop_size in .* got None"),
        (config(prompt={"start": "x", "end": "y"}), ValueError, "prompt in config.json must hold"),
        (config(prompt={"start": 3}), ValueError, "prompt in config.json must hold texts"),
        (config(prompt={"template": "why?"}), ValueError, "a prompt template must hold .*'why.'"),
        (config(prompt={"template": 3}), ValueError, "a prompt template must hold .*got 3"),
        (config(prompt={"template": MANY}), ValueError, "a prompt template must hold .*got '{im"),
        (
            config(prompt={"template": "{image}{question}{answer}{question}{image}"}),
            ValueError,
            "each once",
        ),
        (config(prompt={"frame": "{image}{image}"}), ValueError, "frame must hold one {image}"),
        (config(prompt={"frame": 3}), ValueError, "frame must hold one {image}, got 3"),
        (
            edited("preprocessor_config.json", do_resize=False),
            ValueError,
            "do_resize in preprocessor_config.json must be true, got false",
        ),
        (edited("preprocessor_config.json", resample=None), ValueError, "resample in prepro.*None"),
        (edited("preprocessor_config.json", do_normalize="no"), ValueError, "true or false"),
        (config(prompt="x"), ValueError, "prompt in config.json must hold texts"),
        (text_config(rope_scaling="yarn"), ValueError, "rope_parameters must be an object, got 'y"),
        (text_config(rope_theta=10**400), ValueError, "rope_theta must be a positive number"),
        (
            text_config(hidden_size=2**31),
            ValueError,
            "hidden_size must be an integer in",
        ),
        (
            vision_config(image_size=2**31),
            ValueError,
            "image_size must be an integer in",
        ),
        (vision_config(hidden_act=[]), ValueError, r"hidden_act must be one of .*, got \[\]"),
        (config(model_type={}), ValueError, "model_type {} is not supported"),
        (config(projector_hidden_act=[1]), ValueError, r"got \[1\]"),
        (
            text_config(rope_theta=None),
            ValueError,
            "rope_theta must be a positive number, got None",
        ),
        (text_config(hidden_act="relu"), ValueError, "hidden_act must be 'silu', got 'relu'"),
        (vision_config(layer_norm_eps="x"), ValueError, "layer_norm_eps must be a positive number"),
        (remove("generation_config.json"), None, None),
    ],
)
def test_odd_and_hostile_folders(folder, damage, error, message):
    damage(folder)
    if error is None:
        load(folder, device="cpu")
        return
    with pytest.raises(error, match=message) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_fetch_refuses_what_is_neither_folder_nor_repository(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is a file, accepted: a checkpoint folder"):
        fetch(file)
    for name in (None, 3):
        with pytest.raises(ValueError, match="must be a folder or a repository, got"):
            fetch(name)
    for name in ("nowhere", "./no/such/folder", "a b/c", "https://example.org/x"):
        with pytest.raises(FileNotFoundError, match="no folder"):
            fetch(name)


@pytest.mark.parametrize(
    "address",
    [
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        {"HF_ENDPOINT": "nowhere"},
        {"HTTPS_PROXY": "socks5://127.0.0.1:9"},
    ],
)
def test_an_unreachable_hub_is_one_line(tmp_path, address):
    """The real client: a port where nobody listens, no protocol, a proxy it has no library for."""
    run = subprocess.run(
        [sys.executable, ROOT / "sparsevila.py", "--model", "nobody/nothing"],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path), "PATH": ""} | address,
        timeout=120,
    )
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.strip().split("\n")
    assert line.startswith("sparsevila.py: error: no folder nobody/nothing, and no repository")


def test_only_json_safetensors_and_merges_are_asked_of_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def download(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("owner/name", revision="v1") == tmp_path
    assert asked["repo"] == "owner/name" and asked["revision"] == "v1"
    assert sorted(asked["allow_patterns"]) == ["*.json", "*.safetensors", "*merges.txt"]


# --- what a missing key means ---------------------------------------------------------------------

DECODER = {
    "vocab_size": 77, "hidden_size": 768, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 2e-5,
    "rope_theta": 5e5, "max_position_embeddings": 9000, "sliding_window": 700,
    "use_sliding_window": True, "tie_word_embeddings": False,
}  # fmt: skip
TOWER = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 2e-5,
}  # fmt: skip


def variants(section):
    """The section whole, without each of its keys, without all, and without a window."""
    yield section
    yield {}
    for key in section:
        yield {k: value for k, value in section.items() if k != key}
    if "sliding_window" in section:
        yield section | {"sliding_window": None}


@pytest.mark.parametrize("kind", networks.DECODERS)
def test_a_decoder_key_that_is_missing_means_what_transformers_means(kind):
    for section in variants(DECODER):
        theirs = transformers.AutoConfig.for_model(kind, **section)
        ours = networks.text_config({"text_config": section | {"model_type": kind}})
        window = None if kind in ("llama", "qwen3_vl_text") else theirs.sliding_window
        assert (
            ours.vocab, ours.width, ours.mlp, ours.layers, ours.heads, ours.kv_heads,
            ours.head_dim, ours.eps, ours.rope_theta, ours.max_positions,
        ) == (
            theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size,
            theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads,
            getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
            theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"],
            min(theirs.max_position_embeddings, window or 2**28),
        ), section  # fmt: skip


@pytest.mark.parametrize("kind", networks.TOWERS)
def test_a_tower_key_that_is_missing_means_what_transformers_means(kind):
    names = {"idefics3": "idefics3_vision"}  # as some files call it
    for section in variants(TOWER):
        theirs = transformers.CONFIG_MAPPING[names.get(kind, kind)](**section)
        ours = networks.vision_config({"vision_config": section | {"model_type": kind}}, kind)
        assert (
            ours.width, ours.mlp, ours.layers, ours.heads, ours.image_size, ours.patch_size,
            ours.activation, ours.eps,
        ) == (
            theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers,
            theirs.num_attention_heads, theirs.image_size, theirs.patch_size, theirs.hidden_act,
            theirs.layer_norm_eps,
        ), section  # fmt: skip


def test_a_window_longer_than_the_context_is_full_attention():
    """Mistral's own model, with a window, against ours, which has none, as far as ours goes."""
    torch.manual_seed(0)
    section = DECODER | {"num_hidden_layers": 2, "sliding_window": 9, "model_type": "mistral"}
    section |= {"hidden_size": 64, "num_attention_heads": 8}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**section)).eval()
    ours = networks.text_config({"text_config": section})
    assert ours.max_positions == 9
    decoder = Decoder(ours)
    decoder.load_state_dict(theirs.model.state_dict())
    ids = torch.randint(77, (1, 12))
    with torch.no_grad():
        rows = decoder(decoder.embed_tokens(ids), torch.arange(12), attend_uncached)
        expected = theirs.model(ids).last_hidden_state
    error = (rows - expected).abs().amax(-1)[0] / expected.abs().amax()
    assert error[:9].max() < 1e-5 and error[9:].min() > 1e-4


def test_the_token_that_closes_a_turn_stops_an_answer(tiny, folder):
    """Whatever the files say: here they name another token."""
    for file in ("generation_config.json", "config.json"):
        edit(folder / file, lambda c: c.update(eos_token_id=9))
    vlm, processor = load(folder, device="cpu")
    assert vlm.config.stop_ids == (9,) and processor.stop_ids == (2,)
    expected, session = SparseVILA(*tiny), SparseVILA(vlm, processor)
    for each in (expected, session):
        each.see(TINY / "samples" / "receipt.png")
    for question in ("how much is the coffee?", "what is on line 5?"):  # the second reads the first
        answer = expected.ask(question).token_ids
        assert session.ask(question).token_ids == answer and answer[-1] == 2
    third = answer[2]
    assert session.ask(question, stop_ids=[third]).token_ids[-1] == third != 2
    with pytest.raises(ValueError, match="stop_ids must be token ids, got '2'"):
        session.ask(question, stop_ids="2")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_knows_how_its_turns_are_closed(name):
    processor = load_processor(ROOT / "tests" / "golden" / name)
    (stop,) = processor.stop_ids
    assert processor.question("why?", first=False)[0] == stop


# --- tokenizers that the tokenizers library answers with gigabytes, minutes or a panic ------------


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}


def grow(tokenizer):
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [REPLACE] * 11}


def slow_split(tokenizer):
    tokenizer["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": r"(a|a)+\d"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


BAD_TOKENIZERS = {
    "one id twice": (
        lambda t: t["added_tokens"][1].update(id=2), "'<s>' and '</s>' have the same id 2",
    ),
    "one id of two words": (lambda t: t["model"]["vocab"].update(zzz=9), "have the same id 9"),
    "a huge id": (
        lambda t: t["model"]["vocab"].update(zzz=2**31 - 1),
        r"the id of 'zzz' must be in \[0, \d+\), got 2147483647",
    ),
    "no id": (lambda t: t["model"]["vocab"].update(zzz="9"), "the id of 'zzz' must be"),
    "texts that explode": (grow, r"its normalizers make texts up to 8.59e\+09 times as long"),
    "answers that explode": (
        lambda t: t.update(decoder={"type": "Sequence", "decoders": [REPLACE] * 11}),
        r"its decoders make texts up to 8.59e\+09 times as long",
    ),
    "a gap before an added token": (
        lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"content": "<gap>", "id": 900}),
        "'<gap>' is 900 there, becomes",
    ),
    "an id of the vocabulary's own": (
        lambda t: t["model"]["vocab"].update({"</s>": max(t["model"]["vocab"].values()) + 1}),
        "'</s>' is 2 there, becomes",
    ),
    "words cut at random": (lambda t: t["model"].update(dropout=0.5), "dropout 0.5 would cut"),
    "repetitions that are repeated": (
        lambda t: t.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": r"(a+)+\d"}, "behavior": "Isolated"}
                ],
            }
        ),
        r"the regex '\(a\+\)\+\\\\d' may take forever",
    ),
    "something for nothing": (
        lambda t: t.update(
            normalizer={
                "type": "Sequence",
                "normalizers": [REPLACE | {"pattern": {"Regex": "(?=.)"}, "content": "a"}] * 30,
            }
        ),
        r"its normalizers make texts up to 1.07e\+09 times as long",
    ),
    "merges without their prefix": (
        lambda t: t["model"].update(continuing_subword_prefix="#####"),
        "a merge lacks continuing_subword_prefix '#####'",
    ),
    "a list for an object": (lambda t: t.update(added_tokens=[3]), "must be a list of objects"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_tokenizer_that_would_end_badly_is_refused(folder, name):
    change, words = BAD_TOKENIZERS[name]
    edit(folder / "tokenizer.json", change)
    with pytest.raises(ValueError, match=f"tokenizer.json.*{words}"):
        load_processor(folder)


def test_a_panic_of_the_tokenizers_library_is_an_error_like_others(folder):
    """It is none of Python's exceptions for errors, but a BaseException."""
    edit(folder / "tokenizer.json", slow_split)
    processor = load_processor(folder)
    with pytest.raises(ValueError, match="cannot be tokenized: 'USER: aaa.*retry-limit"):
        processor.question("a" * 3000, first=False)
