"""Four-bit weights as llm-compressor writes them (compressed-tensors, "pack-quantized"): the
tensors are packed here word by word, and read back by `checkpoints.load`."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, random_pictures
from safetensors.torch import load_file, save_file

from awq import W4A16Linear, dequantize
from checkpoints import load, load_model
from sparsevila import SparseVILA

GOLDEN = ROOT / "tests" / "golden"
PACKED = r"(q|k|v|o|gate|up|down)_proj\.weight"  # of the decoder and, in Qwen2.5-VL, of the tower


def words(nibbles: list[int]) -> list[int]:
    """Eight four-bit numbers a word, the first in the lowest bits, as signed 32-bit integers."""
    found = []
    for start in range(0, len(nibbles), 8):
        word = sum(n << (4 * i) for i, n in enumerate(nibbles[start : start + 8]))
        found.append(word - 2**32 if word >= 2**31 else word)
    return found


def compress(weight, group, symmetric, seed):
    """Random codes in a Linear's shape: its tensors in the file, and what they mean, float32."""
    (N, K), generator = weight.shape, torch.Generator().manual_seed(seed)
    G = K // group if group else 1
    codes = torch.randint(-8, 8, (N, K), generator=generator)
    zeros = torch.zeros(N, G).long()
    if not symmetric:
        zeros = torch.randint(-8, 8, (N, G), generator=generator)
    scales = (0.02 + 0.1 * torch.rand(N, G, generator=generator)).bfloat16()
    tensors = {
        "weight_packed": torch.tensor([words((row + 8).tolist()) for row in codes]).int(),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        columns = [words((column + 8).tolist()) for column in zeros.T]
        tensors["weight_zero_point"] = torch.tensor(columns).T.contiguous().int()
    spread = K // G
    meaning = codes - zeros.repeat_interleave(spread, 1)
    return tensors, meaning * scales.float().repeat_interleave(spread, 1)


def write(folder, name, group, symmetric, **changes):
    """A copy of a golden checkpoint with packed Linears; the dense weights that they mean."""
    shutil.copytree(GOLDEN / name, folder)
    tensors, dense = {}, {}
    for number, (key, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        dense[key] = tensor
        if re.search(PACKED, key) and tensor.shape[0] % 8 == 0 and tensor.shape[1] % 8 == 0:
            packed, dense[key] = compress(tensor, group, symmetric, number)
            tensors |= {f"{key.removesuffix('weight')}{leaf}": t for leaf, t in packed.items()}
        else:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "actorder": None}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    one = {"targets": ["Linear"], "weights": weights | changes.pop("weights", {})}
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": one | changes.pop("one", {})},
        "ignore": ["lm_head", "re:.*visual.*"], **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    return dense


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("group, symmetric", [(8, True), (8, False), (0, True), (0, False)])
def test_packed_weights_mean_what_they_meant(tmp_path, name, group, symmetric):
    dense = write(tmp_path / "packed", name, group, symmetric)
    shutil.copytree(GOLDEN / name, tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    packed, processor = load(tmp_path / "packed", device="cpu")
    plain = load_model(tmp_path / "dense", device="cpu")
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, W4A16Linear)}
    assert len(layers) >= 7 * len(packed.decoder.layers)
    for path, layer in layers.items():
        got = dequantize(layer.qweight, layer.qzeros, layer.scales).float().T
        assert torch.equal(got, plain.get_submodule(path).weight.half().float()), path
    ids = list(range(1, 20))
    a, b = (vlm(vlm.embed(ids)) for vlm in (packed, plain))
    assert float((a - b).abs().max()) < 0.01 * float(b.abs().max())
    session = SparseVILA(packed, processor)
    session.see(random_pictures(1, 1, side=60))
    assert session.ask("what?", max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "int-quantized"}, "format must be 'pack-quantized', got 'int-quantized'"),
        ({"format": "nvfp4-pack-quantized"}, "got 'nvfp4-pack-quantized'"),
        ({"one": {"format": "float-quantized"}}, "got 'float-quantized'"),
        ({"weights": {"num_bits": 8}}, "num_bits must be 4, got 8"),
        ({"weights": {"type": "float"}}, "type must be 'int', got 'float'"),
        ({"weights": {"strategy": "block"}}, "strategy must be 'group' or 'channel', got 'block'"),
        ({"weights": {"actorder": "group"}}, "actorder must be None, got 'group'"),
        ({"one": {"input_activations": {"num_bits": 8}}}, "input_activations must be None"),
        ({"config_groups": []}, "config_groups must be objects"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, changes, message):
    write(tmp_path / "packed", "qwen3_vl", 8, True, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "packed", device="cpu")


@pytest.mark.parametrize(
    "leaf, change, message",
    [
        ("weight_g_idx", lambda t: torch.zeros(8).int(), "no part of four-bit weights"),
        ("weight_packed", lambda t: t[:, :-1], "must have shape"),
        ("weight_packed", lambda t: t.float(), "must be torch.int32"),
        ("weight_scale", lambda t: t.float() * 2**-30, "scales that float16 cannot"),
        ("weight_scale", lambda t: t * float("inf"), "must be finite"),
        ("weight_scale", lambda t: t[:, :0], "0 groups of scales"),
        ("weight_zero_point", lambda t: t[:, :1], "must have shape"),
        ("qweight", lambda t: torch.zeros(32, 4).int(), "no quantization_config of AWQ"),
    ],
)
def test_damaged_tensors_are_refused_by_name(tmp_path, leaf, change, message):
    folder = tmp_path / "packed"
    write(folder, "qwen3_vl", 8, False)
    tensors = load_file(folder / "model.safetensors")
    key = f"model.language_model.layers.1.mlp.up_proj.{leaf}"
    tensors[key] = change(tensors.get(key)).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        load_model(folder, device="cpu")
    assert "layers.1.mlp.up_proj" in str(refused.value)
