"""`python -m bench real MODEL --image FILE ...`: a checkpoint as people run it, dense and sparse,
by us and by Hugging Face transformers, in one JSON file. verify_real.sh runs it on SmolVLM-256M."""

import argparse
import json
import platform
import time
from pathlib import Path

import tokenizers
import torch

from checkpoints import load
from sparsevila import Dense, SparseVILA

from . import machine, positive

QUESTIONS = ("What is in the picture?", "What colors does it have?", "Is there a person?")
SPARSITY = {"prefill_sparsity": 0.75, "decode_sparsity": 0.9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", help="folder or repository that transformers read as well")
    parser.add_argument("--image", nargs="+", required=True, metavar="FILE", help="pictures")
    parser.add_argument("--ask", nargs="+", default=list(QUESTIONS), metavar="TEXT",
                        help=f"questions (default: {' '.join(QUESTIONS)})")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=32, help="at most (default: 32)")
    parser.add_argument("--out", type=Path, default=Path("real.json"), metavar="FILE",
                        help="where the JSON goes (default: real.json)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Ask, print what agrees, write the file."""
    import transformers

    from examples.transformers_vlm import SparseVILA as Adapter
    from examples.transformers_vlm import load_processor

    # 1. Four sessions with the same weights, in float32.
    model, processor = load(arguments.model, device="cpu", dtype=torch.float32)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        arguments.model, dtype=torch.float32
    )
    both = theirs, load_processor(arguments.model)

    class Prompted(Adapter):
        def chat(self, pictures: int) -> str:
            return our_prompt(processor.template, both[1].image_token, pictures)

    options = {"protocol": "evaluation"}
    greedy = {"do_sample": False, "suppress_tokens": [processor.image_token_id]}  # as ours
    full = {"prefill_sparsity": 0, "decode_sparsity": 0}
    sessions = {
        "dense": Dense(model, processor, **options),
        "sparse": SparseVILA(model, processor, **SPARSITY, **options),
        "transformers, dense": Prompted(*both, **full, **options),
        "transformers, sparse": Prompted(*both, **SPARSITY, **options),
    }

    # 2. Every picture is shown once to each of them.
    turns = []
    for image in arguments.image:
        for name, session in sessions.items():
            began = time.perf_counter()
            session.see([image])
            seen = time.perf_counter() - began
            for question in arguments.ask:
                began = time.perf_counter()
                more = greedy if isinstance(session, Adapter) else {}
                answer = session.ask(question, max_new_tokens=arguments.tokens, **more)
                turns.append({
                    "image": Path(image).name, "question": question, "session": name,
                    "text": answer.text, "tokens": answer.token_ids,
                    "kept": sum(map(len, session.kept)), "see_seconds": seen,
                    "ask_seconds": time.perf_counter() - began,
                })  # fmt: skip
                print(f"{Path(image).name}, {name}: {question} {answer.text}", flush=True)

    # 3. What agrees, and the file.
    def same(ours: str, others: str) -> int:
        pairs = zip(*([t["tokens"] for t in turns if t["session"] == s] for s in (ours, others)))
        return sum(a == b for a, b in pairs)

    count = len(turns) // len(sessions)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)}
    pairs = (
        ("dense", "transformers, dense"),
        ("sparse", "transformers, sparse"),
        ("dense", "sparse"),
    )
    agree = {f"{ours} = {others}": same(ours, others) for ours, others in pairs}
    for pair, number in agree.items():
        print(f"{pair}: the same tokens in {number} of {count} answers")
    result = {
        "machine": machine(), "python": platform.python_version(), "versions": versions,
        "model": arguments.model, **SPARSITY, "answers": count, "same_tokens": agree,
        "turns": turns,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def our_prompt(template: str, token: str, pictures: int) -> str:
    """A template of ours, with transformers' token for every picture, for its processor to read."""
    if token == "<|image_pad|>":  # Qwen
        return template.replace("{image}", f"<|vision_start|>{token}<|vision_end|>" * pictures)
    return template.replace("{image}", "\n".join([token] * pictures))
