"""Cases for programs in any language: `python -m tests.conformance.vectors` writes manifest.json
and vectors.safetensors. Every expected value comes from float64 (oracle.py); README.md describes
the files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import checks, oracle
from .checks import Lab
from .oracle import U16, Attention, gamma

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "tests" / "golden" / "conformance"
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


def all_cases() -> Iterator[Case]:
    lab = Lab({})
    for q, k, causal, truth, _ in checks.attentions(lab):
        if q.shape[2] * k.shape[2] > 10_000:  # small files
            continue
        inputs, parameters = {"q": q, "k": k}, {"causal": causal, "scale": None}
        lse = rounded(truth.lse, truth.lse_error, torch.float32)
        yield Case("attention_lse", parameters, inputs, {"lse": lse})
        colsum = rounded(*truth.colsum(), torch.float32)
        yield Case("attention_colsum", parameters, inputs, {"colsum": colsum})
    for dtype in lab.dtypes:
        q, k, v = (
            lab.normal(i, 1, (6, 2, 2)[i], (1, 90, 90)[i], 48, dtype=dtype) for i in range(3)
        )
        truth = Attention(q, k[:, :, :77])
        out = rounded(*truth.output(v[:, :, :77], dtype), dtype)
        k[:, :, 77:], v[:, :, 77:] = 1000, 1000  # beyond the length
        yield Case(
            "decode_attention",
            {"length": 77, "scale": None},
            {"q": q, "k": k, "v": v},
            {"out": out},
        )
    x, index = lab.normal(0, 2, 9, 5), torch.tensor([[0, 2, 8], [1, 1, 7]])
    rows = torch.stack([x[b, index[b]] for b in range(2)])
    yield exact("gather_tokens", {}, {"x": x, "index": index}, rows=rows)
    for n, sparsity in [(100, 0.29), (1000, 0.7), (10, 0.3), (576, 0.75), (7, 0.999), (1, 0.0)]:
        count = torch.tensor(oracle.keep_count(n, sparsity))
        yield exact("keep_count", {"n": n, "sparsity": sparsity}, {}, count=count)
    scores = torch.tensor([0.5, 0.25, 0.5, 0.5, -1.0, 0.75, 0.25])
    for keep in (0, 2, 4, 7):
        chosen = torch.tensor(oracle.select_tokens(scores.tolist(), keep), dtype=torch.int64)
        yield exact("select_tokens", {"keep": keep}, {"scores": scores}, index=chosen)
    features, salience = lab.normal(0, 3, 20, 4), lab.normal(1, 3, 20).softmax(-1)
    for sparsity in (0.0, 0.75):
        keep = oracle.keep_count(20, sparsity)
        index = torch.tensor([oracle.select_tokens(row, keep) for row in salience.tolist()])
        kept = torch.stack([features[i, index[i]] for i in range(3)])
        yield exact(
            "prune", {"sparsity": sparsity}, {"features": features, "salience": salience},
            features=kept, index=index,
        )  # fmt: skip
    codes = checks.codes(lab, 0, 5, 48)
    words = torch.tensor(oracle.pack(codes.tolist()), dtype=torch.int32)
    yield exact("pack", {}, {"codes": codes}, packed=words)
    yield exact("unpack", {}, {"packed": words}, codes=codes)
    for K, N, group in checks.GROUPS:
        names = ("qweight", "qzeros", "scales")
        packed = checks.packed_weights(lab, K, K, N, group)
        weight = oracle.dequantize(*packed).half()
        yield exact("dequantize", {}, dict(zip(names, packed)), weight=weight)
        for dtype in lab.dtypes:
            x = lab.normal(K, 5, K, dtype=dtype)
            expected, size = checks.product(lab, x, packed)
            allowed = (gamma(K) + 2 * oracle.ROUNDOFF[dtype] + 2 * U16) * size
            y = rounded(expected, allowed, dtype)
            yield Case("w4a16_matmul", {}, {"x": x} | dict(zip(names, packed)), {"y": y})
    yield quantization(lab)
    yield retrieval(lab)


def quantization(lab: Lab) -> Case:
    """Weights that are exact multiples of a scale, so that no rounding is in doubt."""
    generator = torch.Generator().manual_seed(5)
    scales = torch.randint(1, 9, (6, 2), generator=generator).double() / 64
    zeros = torch.randint(0, 16, (6, 2), generator=generator)
    codes = torch.randint(0, 16, (6, 2, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15  # the whole range is used
    weight = ((codes - zeros[..., None]) * scales[..., None]).flatten(1).float()
    outputs = {"codes": codes.flatten(1).to(torch.int8)}
    outputs |= {"scales": scales.half(), "zeros": zeros.to(torch.int8)}
    return exact("quantize_groups", {"group_size": 32}, {"weight": weight}, **outputs)


def retrieval(lab: Lab) -> Case:
    """A cache of two layers: context, a question of three rows, two rows of an answer."""
    L, H, G, D, sparsity = 2, 4, 2, 16, 0.6
    visual = [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]  # rows 0, 5 and 12 are text
    inputs = {"visual": torch.tensor(visual)}
    for number, (stage, M) in enumerate((("context", 13), ("question", 3), ("answer", 2))):
        for i, (what, heads) in enumerate((("q", H), ("k", G), ("v", G))):
            size = 1.0 if what == "v" else 2.0
            inputs[f"{stage}_{what}"] = size * lab.normal(10 * number + i, L, heads, M, D)
    keys, values = (
        torch.cat([inputs[f"{stage}_{what}"] for stage in ("context", "question", "answer")], 2)
        for what in "kv"
    )
    outputs: dict[str, list] = {
        "question_out": [],
        "relevance": [],
        "retrieved": [],
        "answer_out": [],
    }
    for layer in range(L):
        q = inputs["question_q"][layer][None]
        k, v = (t[layer][None, :, :16] for t in (keys, values))
        truth = Attention(q, k, causal=True)
        outputs["question_out"].append(truth.output(v, torch.float32))
        received, allowed = (t.sum((0, 1))[visual] / (H * 3) for t in truth.colsum())
        outputs["relevance"].append((received, allowed + gamma(H * 3 + 1) * received))
        keep = oracle.keep_count(len(visual), sparsity)
        chosen = oracle.select_tokens(received.tolist(), keep)
        outputs["retrieved"].append(torch.tensor(chosen))
        gone = set(visual) - {visual[i] for i in chosen}
        steps = []
        for step in range(2):
            seen = [n for n in range(17 + step) if n not in gone]
            q = inputs["answer_q"][layer][None, :, step : step + 1]
            truth = Attention(q, keys[layer][None][:, :, seen])
            steps.append(truth.output(values[layer][None][:, :, seen], torch.float32))
        outputs["answer_out"].append(tuple(torch.cat(parts, 2) for parts in zip(*steps)))
    made = {
        name: rounded(*(torch.cat(parts) for parts in zip(*outputs[name])), torch.float32)
        for name in ("question_out", "answer_out")
    }
    made["relevance"] = rounded(
        *(torch.stack(parts) for parts in zip(*outputs["relevance"])), torch.float32
    )
    made["retrieved"] = torch.stack(outputs["retrieved"]), None
    return Case("RetrievalCache", {"decode_sparsity": sparsity}, inputs, made)


# --- a session of the tiny model ------------------------------------------------------------------

QUESTIONS = ["what color is the 7?", "where is the 4?"]


class Float64Session:
    """The tiny model in float64 with attention from oracle.py: nothing of sparsevila.py and
    kernels.py is used, and of model.py the layers only."""

    def __init__(self):
        from model import load, open_picture

        vlm, self.processor = load(ROOT / "tiny", device="cpu")
        self.vlm = vlm.double()
        picture = open_picture(ROOT / "tiny" / "samples" / "board.png")
        self.pixels = self.processor.pixels([picture])
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
        return Attention(q, k).weights[0, :, 0, 1:].mean(0)  # of the class token

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

    def run(self, prefill: float, decode: float) -> tuple[dict, dict]:
        """Inputs and expected outputs, in float64."""
        salience = self.salience()
        kept = oracle.select_tokens(salience.tolist(), oracle.keep_count(len(salience), prefill))
        visual = self.vlm.project(self.features[:, kept])[0]
        ids = self.processor.context([len(kept)])
        rows = [n for n, i in enumerate(ids) if i == self.processor.image_token_id]
        inputs = {"pixels": self.pixels, "context_ids": torch.tensor(ids)}
        outputs = {"salience": salience, "kept": torch.tensor(kept)}
        self.read(self.vlm.embed(ids, visual), 0)
        before = list(self.k), list(self.v)
        for turn, question in enumerate(QUESTIONS):
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
                keep = oracle.keep_count(len(rows), decode)
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


@torch.no_grad()
def session_case() -> Case:
    from .run import session

    parameters = {"prefill_sparsity": 0.75, "decode_sparsity": 0.9}
    inputs, truth = Float64Session().run(*parameters.values())
    single = session(**parameters)
    outputs = {}
    for name, expected in truth.items():
        if expected.is_floating_point():
            off = float((single[name].double() - expected).abs().max())
            allowed = torch.full_like(expected, 16 * off)
            outputs[name] = rounded(expected, allowed, torch.float32)
        else:
            outputs[name] = expected, None
    why = "16 times the largest difference between a float32 run of this project and float64"
    return Case("session", parameters, inputs, outputs, why)


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path = FOLDER) -> None:
    tensors, manifest, counts = {}, [], {}
    for case in [*all_cases(), session_case()]:
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
    write()
