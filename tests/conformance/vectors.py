"""Cases for programs in any language: `python -m tests.conformance.vectors` writes manifest.json
and vectors.safetensors. Every expected value comes from float64 (oracle.py); README.md describes
the files."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import checks, oracle
from .check import FOLDER
from .checks import Lab
from .oracle import Attention, gamma
from .run import session

ROOT = Path(__file__).resolve().parent.parent.parent
EXACT = "counts, indices, codes and copies have no rounding"
BOUND = "a bound from the number of terms and the unit roundoff: tests/conformance/README.md"
ORACLE = "float64, tests/conformance/oracle.py"


@dataclass
class Case:
    """One call. outputs: name -> (expected in its dtype, allowed error or None if exact)."""

    operation: str
    parameters: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, tuple[Tensor, Tensor | None]]
    why: str = BOUND
    origin: str = ORACLE


def exact(operation: str, parameters: dict, inputs: dict, **outputs: Tensor) -> Case:
    return Case(operation, parameters, inputs, {n: (t, None) for n, t in outputs.items()}, EXACT)


def rounded(expected: Tensor, allowed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Expected as a tensor of this dtype; the rounding to it is added to what is allowed."""
    stored = expected.to(dtype)
    off = (stored.double() - expected).abs().nan_to_num(0)
    return stored, (allowed.expand_as(expected) + off).float()


def attention_cases(lab: Lab) -> Iterator[Case]:
    for q, k, causal, truth, _ in checks.attentions(lab):
        if q.shape[2] * k.shape[2] < 10_000:  # small files
            yield from lse_and_colsum(q, k, truth, causal=causal)
    q, k = 5 * lab.normal(0, 1, 4, 9, 16), lab.normal(1, 1, 2, 7, 16)
    for scale in (0.01, 2.0):
        yield from lse_and_colsum(q, k, Attention(q, k, scale=scale), scale=scale)
        truth = Attention(q, k, causal=True, scale=scale)
        yield from lse_and_colsum(q, k, truth, causal=True, scale=scale)
    yield from lse_and_colsum(q, k, Attention(q, k, causal=True), causal=True)  # M > N
    truth = Attention(q, k)
    expected, allowed = truth.colsum()
    sums = rounded(expected, 2 * allowed, torch.float32)
    given = {"q": q, "k": k, "lse": truth.lse.float()}
    yield Case("attention_colsum", {}, given, {"colsum": sums})
    for dtype in lab.dtypes:
        q = lab.normal(0, 1, 6, 1, 48, dtype=dtype)
        k, v = (lab.normal(i, 1, 2, 90, 48, dtype=dtype) for i in (1, 2))
        truth = Attention(q, k[:, :, :77])
        out = rounded(*truth.output(v[:, :, :77], dtype), dtype)
        k[:, :, 77:], v[:, :, 77:] = 1000, 1000  # beyond the length
        yield Case("decode_attention", {"length": 77}, {"q": q, "k": k, "v": v}, {"out": out})
    truth = Attention(q, k[:, :, :77], scale=100.0)  # scores of up to 1000
    out = rounded(*truth.output(v[:, :, :77], dtype), dtype)
    parameters = {"length": 77, "scale": 100.0}
    yield Case("decode_attention", parameters, {"q": q, "k": k, "v": v}, {"out": out})


def lse_and_colsum(q: Tensor, k: Tensor, truth: Attention, **parameters: Any) -> Iterator[Case]:
    lse = rounded(truth.lse, truth.lse_error, torch.float32)
    yield Case("attention_lse", parameters, {"q": q, "k": k}, {"lse": lse})
    colsum = rounded(*truth.colsum(), torch.float32)
    yield Case("attention_colsum", parameters, {"q": q, "k": k}, {"colsum": colsum})


def choosing_cases(lab: Lab) -> Iterator[Case]:
    x, index = lab.normal(0, 2, 9, 5), torch.tensor([[0, 8, 2], [1, 1, 7]])
    rows = torch.stack([x[b, index[b]] for b in range(2)])
    yield exact("gather_tokens", {}, {"x": x, "index": index}, rows=rows)
    x, index = torch.arange(40_000, dtype=torch.int32)[None, :, None], torch.tensor([[3, 39_999]])
    rows = torch.tensor([[[3], [39_999]]], dtype=torch.int32)
    yield exact("gather_tokens", {}, {"x": x, "index": index}, rows=rows)
    counts = [(100, 0.29), (1000, 0.7), (576, 0.75), (10, 0.333), (10, 0.36), (7, 0.999), (1, 0.0)]
    counts += [(1000, 0.699999), (49, 3 / 49)]
    for n, sparsity in counts:
        count = torch.tensor(oracle.keep_count(n, sparsity))
        yield exact("keep_count", {"n": n, "sparsity": sparsity}, {}, count=count)
    scores = torch.tensor([0.5, 0.25, 0.5, 0.5, -1.0, 0.75, 0.25])
    for keep in (0, 2, 4, 7):
        chosen = torch.tensor(oracle.select_tokens(scores.tolist(), keep), dtype=torch.int64)
        yield exact("select_tokens", {"keep": keep}, {"scores": scores}, index=chosen)
    scores = 1 + torch.randperm(99, generator=torch.Generator().manual_seed(0)) * 2.0**-23
    chosen = torch.tensor(oracle.select_tokens(scores.tolist(), 30))
    yield exact("select_tokens", {"keep": 30}, {"scores": scores}, index=chosen)
    features, salience = lab.normal(0, 3, 20, 4), lab.normal(1, 3, 20).softmax(-1)
    inputs = {"features": features, "salience": salience}
    for sparsity in (0.0, 0.75):
        keep = oracle.keep_count(20, sparsity)
        index = torch.tensor([oracle.select_tokens(row, keep) for row in salience.tolist()])
        kept = torch.stack([features[i, index[i]] for i in range(3)])
        yield exact("prune", {"sparsity": sparsity}, inputs, features=kept, index=index)


def weight_cases(lab: Lab) -> Iterator[Case]:
    codes = checks.codes(lab, 0, 5, 48)
    words = torch.tensor(oracle.pack(codes.tolist()), dtype=torch.int32)
    yield exact("pack", {}, {"codes": codes}, packed=words)
    yield exact("unpack", {}, {"packed": words}, codes=codes)
    qweight, qzeros, scales = checks.packed_weights(lab, 5, 160, 24, 32)
    packed = qweight, qzeros, (2.0 ** scales.float().log2().round()).half()  # nothing to round
    x = lab.normal(3, 9, 160)
    expected, size = checks.product(lab, x, packed)
    y = rounded(expected, checks.product_error(160, x.dtype, rounded=False) * size, x.dtype)
    inputs = {"x": x} | dict(zip(("qweight", "qzeros", "scales"), packed))
    yield Case("w4a16_matmul", {}, inputs, {"y": y})
    for K, N, group in checks.GROUPS:
        packed = checks.packed_weights(lab, K, K, N, group)
        inputs = dict(zip(("qweight", "qzeros", "scales"), packed))
        yield exact("dequantize", {}, inputs, weight=oracle.dequantize(*packed).half())
        for dtype in lab.dtypes:
            x = lab.normal(K, 5, K, dtype=dtype)
            bias = {"bias": 30 * lab.normal(K + 1, N, dtype=dtype)} if K == 160 else {}
            expected, size = checks.product(lab, x, packed, **bias)
            allowed = checks.product_error(K, dtype) * size
            y = rounded(expected, allowed, dtype)
            yield Case("w4a16_matmul", {}, {"x": x} | inputs | bias, {"y": y})


def quantization_case(group: int, parameters: dict) -> Case:
    """Weights up to 0.4 scales from a code, the ends of the range on one: no rounding is in doubt.
    Rows of both signs, of positive weights and of negative ones."""
    generator = torch.Generator().manual_seed(5)
    scales = torch.randint(1, 9, (6, 2), generator=generator).double() / 64
    zeros = torch.tensor([7, 4, 0, 0, 15, 15])[:, None].expand(6, 2)
    codes = torch.randint(2, 14, (6, 2, group), generator=generator)
    off = 0.8 * torch.rand(6, 2, group, generator=generator, dtype=torch.float64) - 0.4
    codes[:, :, 0] = torch.where(zeros == 15, 1, 15)
    codes[:2, :, 0], codes[:2, :, 1], codes[2:4, :, 0], codes[4:, :, 0] = 0, 15, 15, 0
    off[:, :, 0], off[:2, :, 1] = 0, 0
    weight = ((codes + off - zeros[..., None]) * scales[..., None]).flatten(1).float()
    outputs = {"codes": codes.flatten(1).to(torch.int8)}
    outputs |= {"scales": scales.half(), "zeros": zeros.contiguous().to(torch.int8)}
    return exact("quantize_groups", parameters, {"weight": weight}, **outputs)


def retrieval_case(lab: Lab, H: int, G: int, D: int) -> Case:
    """A cache of two layers through two turns of a conversation, then without them a third."""
    L, sparsity = 2, 0.6
    visual = [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]  # rows 0, 5 and 12 are text
    stages = [("context", 13), ("question_0", 3), ("answer_0", 2), ("question_1", 1)]
    stages += [("answer_1", 1), ("truncate", 13), ("text", 1), ("question_2", 2), ("answer_2", 3)]
    inputs, outputs = {"visual": torch.tensor(visual)}, {}
    keys = values = torch.zeros(L, G, 0, D)
    hidden: list[set[int]] = [set()] * L
    for number, (stage, M) in enumerate(stages):
        if stage == "truncate":
            keys, values = keys[:, :, :M], values[:, :, :M]
            continue
        q, k = (2 * lab.normal(10 * number + i, L, n, M, D) for i, n in enumerate((H, G)))
        v = lab.normal(10 * number + 2, L, G, M, D)
        inputs |= {f"{stage}_q": q, f"{stage}_k": k, f"{stage}_v": v}
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        asked = stage.startswith("question")
        hidden = hidden if stage.startswith("answer") else [set()] * L
        rows, relevance, retrieved = [], [], []
        for layer in range(L):
            seen = [n for n in range(keys.shape[2]) if n not in hidden[layer]]
            truth = Attention(q[layer, None], keys[layer, None, :, seen], causal=True)
            rows.append(truth.output(values[layer, None, :, seen], torch.float32))
            if asked:
                received, allowed = (t.sum((0, 1))[visual] / (H * M) for t in truth.colsum())
                relevance.append((received, allowed + gamma(H * M + 1) * received))
                keep = oracle.keep_count(len(visual), sparsity)
                retrieved.append(oracle.select_tokens(received.tolist(), keep))
                hidden[layer] = set(visual) - {visual[i] for i in retrieved[layer]}
        outputs[f"{stage}_out"] = stacked(torch.cat, rows)
        if asked:
            turn = stage.removeprefix("question_")
            outputs[f"relevance_{turn}"] = stacked(torch.stack, relevance)
            outputs[f"retrieved_{turn}"] = torch.tensor(retrieved), None
    parameters = {"decode_sparsity": sparsity, "stages": stages}
    return Case("RetrievalCache", parameters, inputs, outputs)


def stacked(join: Callable, layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What is expected and what is allowed, of all layers."""
    return rounded(*(join(parts) for parts in zip(*layers)), torch.float32)


# --- a session of the tiny model ------------------------------------------------------------------

# No choice is close: the last that is kept and the first that is not lie at least ten times the
# allowed error apart.
CONVERSATIONS = (
    {
        "pictures": ["tiny/samples/receipt.png"],
        "questions": ["how much is the coffee?", "what is on line 5?"],
        "prefill_sparsity": 0.75,
        "decode_sparsity": 0.9,
    },
    {
        "pictures": ["tiny/samples/timetable.png", "tiny/samples/receipt.png"],
        "questions": ["what is on line 5?"],
        "prefill_sparsity": 0.6,
        "decode_sparsity": 0.7,
    },
)


class Float64Session:
    """The tiny model in float64 with attention from oracle.py: nothing of sparsevila.py and
    kernels.py is used, and of model.py the layers only."""

    def __init__(self, pictures: list[str]):
        from checkpoints import load
        from checkpoints.processor import open_picture

        vlm, self.processor = load(ROOT / "tiny", device="cpu")
        self.vlm = vlm.double()
        self.pixels = self.processor.pixels([open_picture(ROOT / name) for name in pictures])
        self.k = [None] * vlm.config.text.layers
        self.v = [None] * vlm.config.text.layers
        self.hidden: list[set[int]] = [set() for _ in self.k]
        self.queries: list[Tensor] = [None] * len(self.k)

    def salience(self) -> Tensor:
        *blocks, last = self.vlm.vision_tower.layers
        x = self.vlm.vision_tower.embed(self.pixels.double())
        for block in blocks:
            x = block(x)
        self.features = x[:, 1:]
        q, k = last.query_key(x)
        return Attention(q, k).weights[:, :, 0, 1:].mean(1)  # of the class token

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old = self.k[layer] is None
        self.k[layer] = k if old else torch.cat([self.k[layer], k], 2)
        self.v[layer] = v if old else torch.cat([self.v[layer], v], 2)
        self.queries[layer] = q
        seen = [n for n in range(self.k[layer].shape[2]) if n not in self.hidden[layer]]
        truth = Attention(q, self.k[layer][:, :, seen], causal=True)
        return truth.output(self.v[layer][:, :, seen], torch.float32)[0]

    def read(self, embeddings: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + embeddings.shape[1])
        hidden = self.vlm.decoder(embeddings, positions, self.attend)
        return self.vlm.lm_head(hidden[0, -1])

    @torch.no_grad()
    def run(
        self, questions: list[str], prefill_sparsity: float, decode_sparsity: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and expected outputs, in float64."""
        salience = self.salience()
        keep = oracle.keep_count(salience.shape[1], prefill_sparsity)
        kept = [oracle.select_tokens(row, keep) for row in salience.tolist()]
        features = torch.cat([rows[chosen] for rows, chosen in zip(self.features, kept)])
        visual = self.vlm.project(features[None])[0]
        ids = self.processor.context([keep] * len(kept))
        rows = [n for n, i in enumerate(ids) if i == self.processor.image_token_id]
        inputs = {"pixels": self.pixels, "context_ids": torch.tensor(ids)}
        outputs = {"salience": salience, "kept": torch.tensor(kept)}
        self.read(self.vlm.embed(ids, visual), 0)
        before = list(self.k), list(self.v)
        for turn, question in enumerate(questions):
            self.k, self.v = (list(side) for side in before)  # the turn before is evicted
            self.hidden = [set() for _ in self.k]
            asked = self.processor.question(question, first=True)
            inputs[f"question_ids_{turn}"] = torch.tensor(asked)
            position = len(ids) + len(asked)
            logits = [self.read(self.vlm.embed(asked), len(ids))]
            relevance, retrieved = [], []
            for layer, q in enumerate(self.queries):
                received = Attention(q, self.k[layer], causal=True).weights.sum((0, 1, 2))[rows]
                relevance.append(received / (q.shape[1] * q.shape[2]))
                keep = oracle.keep_count(len(rows), decode_sparsity)
                chosen = oracle.select_tokens(relevance[-1].tolist(), keep)
                retrieved.append(chosen)
                self.hidden[layer] = set(rows) - {rows[i] for i in chosen}
            tokens = [int(logits[-1].argmax())]
            while tokens[-1] not in self.vlm.config.stop_ids:
                logits.append(self.read(self.vlm.embed(tokens[-1:]), position + len(tokens) - 1))
                tokens.append(int(logits[-1].argmax()))
            outputs |= {
                f"relevance_{turn}": torch.stack(relevance),
                f"retrieved_{turn}": torch.tensor(retrieved),
                f"packed_rows_{turn}": torch.tensor([position - len(rows) + keep] * len(self.k)),
                f"logits_{turn}": torch.stack(logits),
                f"tokens_{turn}": torch.tensor(tokens),
            }
        return inputs, outputs


def session_case(conversation: dict) -> Case:
    from sparsevila import SparseVILA

    settings = dict(conversation)
    inputs, truth = Float64Session(settings.pop("pictures")).run(**settings)
    single = session(SparseVILA, **conversation)
    outputs = {}
    for name, expected in truth.items():
        if expected.is_floating_point():
            off = float((single[name].double() - expected).abs().max())
            allowed = torch.full_like(expected, 16 * off)
            outputs[name] = rounded(expected, allowed, torch.float32)
        else:
            outputs[name] = expected, None
    why = "16 times the largest difference between a float32 run of this project and float64"
    return Case("SparseVILA", conversation, inputs, outputs, why)


# --- files ----------------------------------------------------------------------------------------


def all_cases() -> Iterator[Case]:
    lab = Lab({})
    yield from attention_cases(lab)
    yield from choosing_cases(lab)
    yield from weight_cases(lab)
    yield quantization_case(32, {"group_size": 32})
    yield quantization_case(128, {})  # the default
    yield retrieval_case(lab, 4, 2, 16)
    yield retrieval_case(lab, 3, 1, 40)
    yield from map(session_case, CONVERSATIONS)


def write(folder: Path = FOLDER) -> None:
    tensors, manifest, counts = {}, [], {}
    for case in all_cases():
        number = counts[case.operation] = counts.get(case.operation, -1) + 1
        prefix = f"{case.operation}/{number}"

        def entry(name: str, tensor: Tensor, prefix: str = prefix) -> dict:
            tensors[f"{prefix}/{name}"] = tensor.clone().contiguous()
            described = {"tensor": f"{prefix}/{name}", "shape": list(tensor.shape)}
            return described | {"dtype": str(tensor.dtype).removeprefix("torch.")}

        inputs = {name: entry(f"in.{name}", tensor) for name, tensor in case.inputs.items()}
        outputs = {}
        for name, (expected, allowed) in case.outputs.items():
            outputs[name] = entry(name, expected) | {"tolerance": "exact"}
            if allowed is not None:
                outputs[name]["tolerance"] = entry(f"{name}.allowed", allowed)["tensor"]
        manifest.append(
            {
                "operation": case.operation, "parameters": case.parameters, "inputs": inputs,
                "outputs": outputs, "why": case.why, "origin": case.origin,
            }
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    save_file(tensors, folder / "vectors.safetensors")
    print(f"{len(manifest)} cases, {sum(t.nbytes for t in tensors.values()):,} bytes in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="default: tests/golden/conformance"
    )
    write(parser.parse_args().out)
