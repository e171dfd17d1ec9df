"""The main job: ask pictures several questions, sparsely, beside the dense model.

    python sparsevila.py --image photo.jpg --ask "What is on the table?" \\
        --model llava-hf/llava-1.5-7b-hf
"""

import argparse
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from checkpoints import load
from checkpoints.processor import Clip, Pictures, open_clip, open_picture
from model import check_sampling
from sparsevila import Answer, Dense, SparseVILA, check_fps, check_question, check_sparsity

from . import command, files_in
from .overlay import overlay

TINY = Path(__file__).resolve().parent.parent / "tiny"
SAMPLE = TINY / "samples" / "board.png"
SAMPLE_QUESTIONS = ["what color is the 7?", "which digit is red?", "where is the 4?"]
ANSWER_STAGES = ("question", "retrieve", "decode")


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line on standard error and exit status 2."""
    arguments = parse_arguments(argv)
    with command("sparsevila.py", reads_input=arguments.chat):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises: ValueError or OSError for bad input, as much of it
    as possible before the model is loaded."""
    # 1. Everything that can be wrong without a model.
    questions = arguments.ask or ([] if arguments.chat else SAMPLE_QUESTIONS)
    settings, sampling = checked_settings(arguments, questions)
    if arguments.video:
        images = read_clip(arguments.video, arguments.fps)
    else:
        images = [open_picture(file) for file in arguments.image or [SAMPLE]]

    # 2. The model, and a session with it; the dense one first, if both are shown.
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    template = arguments.prompt_template and arguments.prompt_template.replace("\\n", "\n")
    model, processor = load(
        arguments.model, device=arguments.device, dtype=dtype, revision=arguments.revision,
        template=template,
    )  # fmt: skip
    session = (Dense if arguments.dense else SparseVILA)(model, processor, **settings)
    if arguments.chat:
        session.see(images)
        return chat(session, sampling)
    sessions = {"dense" if arguments.dense else "sparse": session}
    if not (arguments.dense or arguments.sparse or arguments.json):
        sessions = {"dense": Dense(model, processor, **settings)} | sessions

    # 3. Ask; a round before that is not counted, for first calls pay for thread pools and memory.
    for each in sessions.values():
        ask_all(each, images, questions[:1], sampling | {"max_new_tokens": 2})
    answers, columns = {}, {}
    for name, each in sessions.items():
        answers[name] = ask_all(each, images, questions, sampling)
        columns[name] = summary(each, questions, answers[name])

    # 4. Tell.
    where = {
        "model": str(arguments.model),
        "device": str(model.device),
        "precision": model.precision,
    }
    if arguments.json:
        where |= {"weight_bytes": model.weight_bytes, "settings": settings | sampling}
        print(json.dumps(where | columns.popitem()[1], indent=2))
    else:
        print(", ".join([*where.values(), *(f"{k} {v}" for k, v in settings.items())]) + "\n")
        print_comparison(columns)
        print(f"weights: {model.weight_bytes:,} bytes, {model.precision}")
    if arguments.overlay:
        shown = list(zip(questions, answers.pop(name)))  # of the last session, `session`
        picture = overlay(session, shown, answers.get("dense"))
        Path(arguments.overlay).write_bytes(encode_picture(picture, arguments.overlay))


def checked_settings(arguments: argparse.Namespace, questions: list[str]) -> tuple[dict, dict]:
    """Settings of the session and of the sampling. Raises: ValueError for what can be known to be
    wrong without a model."""
    if arguments.chat and (arguments.json or arguments.overlay):
        raise ValueError("--json and --overlay need --ask, not --chat")
    if arguments.overlay:
        suffix = Path(arguments.overlay).suffix.lower()
        if Image.registered_extensions().get(suffix) not in Image.SAVE:
            raise ValueError(
                "--overlay must end like a picture that can be written, in .png for one, "
                f"got {arguments.overlay}"
            )
        if not Path(arguments.overlay).parent.is_dir():
            raise ValueError(f"no folder to write {arguments.overlay} to")
    check_fps(arguments.fps)
    if arguments.fps and not arguments.video:
        raise ValueError(f"--fps needs --video, got {arguments.fps}")
    for question in questions:
        check_question(question)
    settings = {
        "prefill_sparsity": 0.0 if arguments.dense else arguments.prefill_sparsity,
        "decode_sparsity": 0.0 if arguments.dense else arguments.decode_sparsity,
        "scope": arguments.scope,
        "positions": arguments.positions,
        "protocol": arguments.protocol or ("conversation" if arguments.chat else "evaluation"),
    }
    for name in ("prefill_sparsity", "decode_sparsity"):
        check_sparsity(name, settings[name])
    sampling = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "stop_ids": arguments.stop_id,
    }
    check_sampling(**sampling)
    return settings, sampling


def ask_all(
    session: SparseVILA, images: list | Clip, questions: list[str], sampling: dict
) -> list[Answer]:
    """Show the images, ask all questions."""
    try:
        session.see(images)
    except ValueError as error:
        hint = " (--sparse leaves out the dense model)" if isinstance(session, Dense) else ""
        raise ValueError(f"{error}{hint}") from None
    return [session.ask(question, **sampling) for question in questions]


def chat(session: SparseVILA, sampling: dict) -> None:
    """Questions from standard input, answers streamed. Ctrl-C stops an answer; at the prompt it
    ends the chat."""
    while True:
        try:
            question = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            session.ask(question, on_text=lambda text: print(text, end="", flush=True), **sampling)
        except KeyboardInterrupt:
            print(" [interrupted, forgotten]", end="")
        except ValueError as error:
            print(f"error: {error}", end="")
        print()


def summary(session: SparseVILA, questions: list[str], answers: list[Answer]) -> dict:
    """Answers, counts, bytes and milliseconds as one JSON-ready object."""
    decoded = sum(len(answer.token_ids) - 1 for answer in answers)
    decode = sum(answer.timings["decode"] for answer in answers)
    stages = dict(session.stats["milliseconds"])
    for stage in ANSWER_STAGES:
        stages[stage] = sum(answer.timings[stage] for answer in answers) / len(answers)
    return {
        "answers": [
            {"question": question, "answer": answer.text, "token_ids": answer.token_ids}
            for question, answer in zip(questions, answers)
        ],
        "visual_tokens": session.stats["visual_tokens"],
        "kv_bytes_per_token": round(sum(a.kv_bytes_per_token for a in answers) / len(answers)),
        "milliseconds": stages,
        "tokens_per_second": 1000 * decoded / decode if decoded else None,
    }


def print_comparison(columns: dict[str, dict]) -> None:
    """Answers, then counts and times, one column for each summary."""
    names = list(columns)
    for answers in zip(*(columns[name]["answers"] for name in names)):
        print(answers[0]["question"])
        for name, answer in zip(names, answers):
            print(f"  {name:8}{' '.join(answer['answer'].split())}")
        print()

    def line(label: str, value: Callable[[dict], str]) -> None:
        print(f"{label:34}" + "".join(f"{value(columns[name]):>12}" for name in names))

    print(" " * 34 + "".join(f"{name:>12}" for name in names))
    line("visual tokens encoded", lambda c: str(c["visual_tokens"]["encoded"]))
    line("  kept", lambda c: str(c["visual_tokens"]["kept"]))
    line(
        "  attended, mean per layer",
        lambda c: f"{statistics.mean(c['visual_tokens']['attended']):.4g}",
    )
    line("KV bytes read per token", lambda c: f"{c['kv_bytes_per_token']:,}")
    for stage in ("vision", "prune", "prefill", "question", "retrieve", "decode"):
        unit = "ms per question" if stage in ANSWER_STAGES else "ms"
        line(f"{stage}, {unit}", lambda c, stage=stage: f"{c['milliseconds'][stage]:.1f}")
    line("decoded tokens/s", lambda c: f"{c['tokens_per_second'] or float('nan'):.1f}")


def read_clip(path: str, fps: float | None) -> Clip:
    """An animated file, or the pictures of a folder in the order of `files_in`. fps: frames per
    second; if None, what the file says, or one for a folder. Raises: ValueError for an empty
    folder, and as `open_clip`."""
    if Path(path).is_dir():
        files = files_in(path)
        if not files:
            raise ValueError(f"the folder {path} holds no frames")
        return Clip.even(Pictures(files), fps or 1.0)
    clip = open_clip(path)
    return Clip.even(clip.frames, fps) if fps else clip


def encode_picture(picture: Image.Image, path: str) -> bytes:
    """The content of a picture file in the format that its name asks for. Raises: ValueError if
    Pillow cannot write it."""
    encoded = io.BytesIO()
    try:
        picture.save(encoded, Image.registered_extensions()[Path(path).suffix.lower()])
    except Exception as error:  # no such format, or too large for it: Pillow raises almost anything
        size = f"{picture.width} x {picture.height}"
        raise ValueError(f"{path}: a {size} picture cannot be written so: {error!r}") from None
    return encoded.getvalue()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line; `python sparsevila.py --help` lists them."""
    parser = argparse.ArgumentParser(
        description="Ask pictures several questions with SparseVILA, beside the dense model. "
        "Without arguments: a sample picture and the tiny model of this folder."
    )
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--image",
        type=nonempty_path,
        action="append",
        metavar="FILE",
        help="a picture (repeatable)",
    )
    pictures.add_argument(
        "--video",
        type=nonempty_path,
        metavar="PATH",
        help="a folder of frames, or an animated picture",
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames per second of the clip (default: what the file says, else 1)",
    )
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--ask", action="append", metavar="TEXT", help="a question (repeatable)")
    questions.add_argument("--chat", action="store_true", help="questions from the terminal")
    parser.add_argument(
        "--model",
        type=nonempty_path,
        default=TINY,
        help="checkpoint folder or hub repository",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="two turns with {image}, {question}, {answer}, {question} in place of the family's "
        "prompt; \\n is a new line",
    )
    parser.add_argument("--prefill-sparsity", type=float, default=0.75, metavar="S")
    parser.add_argument("--decode-sparsity", type=float, default=0.9, metavar="S")
    parser.add_argument("--positions", choices=["contiguous", "original"], default="contiguous")
    parser.add_argument("--scope", choices=["frame", "global"], default="frame")
    parser.add_argument(
        "--protocol",
        choices=["conversation", "evaluation"],
        help="keep or evict earlier turns (default: evaluation, with --chat conversation)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--stop-id",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="a token id that ends an answer too (repeatable)",
    )
    columns = parser.add_mutually_exclusive_group()
    columns.add_argument("--dense", action="store_true", help="the dense model only")
    columns.add_argument(
        "--sparse", action="store_true", help="the sparse model only (for clips too long for dense)"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: as stored"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, of the sparse model unless --dense"
    )
    parser.add_argument(
        "--overlay",
        type=nonempty_path,
        metavar="FILE",
        help="write a picture of what was kept and retrieved",
    )
    return parser.parse_args(argv)


def nonempty_path(text: str) -> str:
    """A path given on the command line; an empty one comes from a shell variable that is not
    set."""
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    return text


if __name__ == "__main__":
    main()
