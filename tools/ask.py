"""The main job: ask pictures several questions, sparsely, beside the dense model.

    python sparsevila.py --image photo.jpg --ask "What is on the table?" \\
        --model llava-hf/llava-1.5-7b-hf
"""

import argparse
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from checkpoints import load
from checkpoints.processor import (
    Clip,
    Pictures,
    Processor,
    open_clip,
    open_picture,
    pictures_of,
)
from checkpoints.weights import progress
from model import VLM, check_sampling
from sparsevila import Answer, Dense, SparseVILA, check_fps, check_question, check_sparsity
from tiny.scenes import READS, SIDE, is_known

from . import command, files_in
from .overlay import overlay

TINY = Path(__file__).resolve().parent.parent / "tiny"
ROUNDS = 5  # of --time, after one that warms up
FILMS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg")
SAMPLE = TINY / "samples" / "receipt.png"
SAMPLE_QUESTIONS = ["how much is the coffee?", "what costs 3.10?", "what is on line 5?"]
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
        images = [read_picture(file) for file in arguments.image or [SAMPLE]]
    if (arguments.image or arguments.video) and not (arguments.ask or arguments.chat):
        raise ValueError("pictures of your own need a question: --ask, or --chat")

    # 2. The model, and a session with it; the dense one first, if both are shown.
    tell(f"loading {arguments.model}")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    template = arguments.prompt_template and arguments.prompt_template.replace("\\n", "\n")
    model, processor = load(
        arguments.model, device=arguments.device, dtype=dtype, revision=arguments.revision,
        template=template,
    )  # fmt: skip
    tiny = Path(arguments.model).resolve() == TINY
    if tiny:
        torch.set_num_threads(1)  # so small that threads would wait for each other
        size = pictures_of(images)[0].size
        if size != (SIDE, SIDE) or not all(map(is_known, questions)):
            note(READS)
    if processor.sampling and not arguments.temperature:
        theirs = ", ".join(f"{key} {value}" for key, value in processor.sampling.items())
        note(f"the checkpoint's authors sample with {theirs}; here the likeliest token is taken")
    session = (Dense if arguments.dense else SparseVILA)(model, processor, **settings)
    sessions = {"dense" if arguments.dense else "sparse": session}
    if not (arguments.dense or arguments.sparse or arguments.json or arguments.chat):
        sessions = {"dense": Dense(model, processor, **settings)} | sessions
    where = {"model": str(arguments.model), "device": str(model.device)}
    where |= {"precision": model.precision}
    if not arguments.json:
        print(", ".join([*where.values(), *(f"{k} {v}" for k, v in settings.items())]) + "\n")
    see_all(sessions, images)
    if arguments.chat:
        return chat(session, sampling, is_known if tiny else None)

    # 3. Ask, and tell.
    answers = ask_all(sessions, questions, sampling, quiet=arguments.json)
    columns = {name: summary(s, questions, answers[name]) for name, s in sessions.items()}
    if arguments.time:
        times = timed(sessions, images, questions, sampling)
        for name, column in columns.items():
            column |= times[name]
    if arguments.json:
        where |= {"weight_bytes": model.weight_bytes, "settings": settings | sampling}
        print(json.dumps(where | columns.popitem()[1], indent=2))
    else:
        print_comparison(columns, arguments.time)
        print(f"weights: {model.weight_bytes:,} bytes, {model.precision}")
    if arguments.overlay:
        shown, dense = list(zip(questions, answers.popitem()[1])), answers.get("dense")
        pruned = None
        if not arguments.dense:
            other = {"pruned": only_pruning(model, processor, settings)}
            see_all(other, images)
            pruned = other["pruned"], ask_all(other, questions, sampling, quiet=True)["pruned"]
        picture = overlay(session, shown, dense, pruned)
        Path(arguments.overlay).write_bytes(encode_picture(picture, arguments.overlay))
        print(f"wrote {arguments.overlay}", file=sys.stderr if arguments.json else sys.stdout)


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


def only_pruning(model: VLM, processor: Processor, settings: dict) -> SparseVILA:
    """A session that only prunes, to as many tokens as one of these settings decodes from."""
    share = (1 - settings["prefill_sparsity"]) * (1 - settings["decode_sparsity"])
    settings = settings | {"prefill_sparsity": 1 - share, "decode_sparsity": 0.0}
    return SparseVILA(model, processor, **settings)


def tell(text: str) -> None:
    """What is being done, for somebody who waits at a terminal."""
    if sys.stderr and sys.stderr.isatty():
        print(f"... {text}", file=sys.stderr, flush=True)


@contextmanager
def bar(text: str, model: VLM) -> Iterator[None]:
    """Within, a bar that counts the layers of the tower, for every batch of views, and of the
    decoder, as they have run."""
    with progress(None, text, " layers") as moving:

        def starts(network: nn.Module, _) -> None:
            moving.set_description(f"{text}, {type(network).__name__}", refresh=False)
            moving.reset(len(network.layers))

        def has_run(*_) -> None:  # what a hook returns would replace the output
            moving.update()

        hooks = []
        for network in (model.vision_tower, model.decoder):
            hooks.append(network.register_forward_pre_hook(starts))
            hooks += [layer.register_forward_hook(has_run) for layer in network.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def note(text: str) -> None:
    """What may not be as somebody expects."""
    if sys.stderr:
        print(f"note: {text}", file=sys.stderr, flush=True)


def write(text: str) -> None:
    """A piece of text, at once."""
    print(text, end="", flush=True)


def see_all(sessions: dict[str, SparseVILA], images: list | Clip) -> None:
    """Show the images to every session."""
    for name, session in sessions.items():
        try:
            with bar(f"{name}: looking", session.model):
                session.see(images)
        except ValueError as error:
            hint = " (--sparse leaves out the dense model)" if name == "dense" else ""
            raise ValueError(f"{error}{hint}") from None


def ask_all(
    sessions: dict[str, SparseVILA], questions: list[str], sampling: dict, *, quiet: bool
) -> dict[str, list[Answer]]:
    """The answers of every session; printed as they come, unless quiet."""
    answers: dict[str, list[Answer]] = {name: [] for name in sessions}
    show = (lambda text: None) if quiet else write
    for question in questions:
        show(f"{question}\n")
        for name, session in sessions.items():
            show(f"  {name:8}")
            answer = session.ask(question, on_text=lambda t: show(t.replace("\n", " ")), **sampling)
            answers[name].append(answer)
            show("\n")
        show("\n")
    return answers


def timed(
    sessions: dict[str, SparseVILA], images: list | Clip, questions: list[str], sampling: dict
) -> dict[str, dict]:
    """For every session the medians of `ROUNDS` rounds of all of it, the sessions in turn."""
    runs: dict[str, list[dict]] = {name: [] for name in sessions}
    for number in range(ROUNDS + 1):
        tell(f"timing, round {number} of {ROUNDS}")
        for name, session in sessions.items():
            see_all({name: session}, images)
            answers = ask_all({name: session}, questions, sampling, quiet=True)[name]
            runs[name].append(times_of(session, answers))
    medians = {}
    for name, (_, *counted) in runs.items():
        stages = {
            stage: statistics.median(run["milliseconds"][stage] for run in counted)
            for stage in counted[0]["milliseconds"]
        }
        rates = [run["tokens_per_second"] or 0.0 for run in counted]
        medians[name] = {"milliseconds": stages, "tokens_per_second": statistics.median(rates)}
    return medians


def chat(
    session: SparseVILA, sampling: dict, is_known: Callable[[str], bool] | None = None
) -> None:
    """Questions from standard input, answers streamed. Ctrl-C stops an answer; at the prompt it
    ends the chat, as do /quit and the end of the input. is_known: whether a question has a form
    that the model knows."""
    tokens = session.stats["visual_tokens"]
    told = f"{tokens['encoded']} visual tokens, {tokens['kept']} kept. Ask; /quit or Ctrl-D ends."
    print(told, flush=True)  # what cannot be written is known before a question is read
    answers = 0
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            question = "/quit"
        if question == "/quit":
            break
        if question.startswith("/"):
            print("Anything but /quit is a question about the pictures.")
        if not question or question.startswith("/"):
            continue
        if is_known and not is_known(question):
            note(READS)
        try:
            session.ask(question, on_text=write, **sampling)
            answers += 1
        except KeyboardInterrupt:
            print(" [interrupted, forgotten]", end="")
        except ValueError as error:
            print(f"error: {error}", end="")
        print()
    if answers:
        read = statistics.mean(session.stats["visual_tokens"]["attended"])
        print(f"{answers} answers; the last read {read:.4g} visual tokens")


def summary(session: SparseVILA, questions: list[str], answers: list[Answer]) -> dict:
    """Answers, counts, bytes and milliseconds as one JSON-ready object."""
    return {
        "answers": [
            {"question": question, "answer": answer.text, "token_ids": answer.token_ids}
            for question, answer in zip(questions, answers)
        ],
        "visual_tokens": session.stats["visual_tokens"],
        "kv_bytes_per_token": round(sum(a.kv_bytes_per_token for a in answers) / len(answers)),
        **times_of(session, answers),
    }


def times_of(session: SparseVILA, answers: list[Answer]) -> dict:
    """Milliseconds by stage, and the rate of decoding."""
    decoded = sum(len(answer.token_ids) - 1 for answer in answers)
    decode = sum(answer.timings["decode"] for answer in answers)
    stages = dict(session.stats["milliseconds"])
    for stage in ANSWER_STAGES:
        stages[stage] = sum(answer.timings[stage] for answer in answers) / len(answers)
    rate = 1000 * decoded / decode if decoded else None
    return {"milliseconds": stages, "tokens_per_second": rate}


def print_comparison(columns: dict[str, dict], times: bool) -> None:
    """What is the same in every run, then medians of times, one column for each summary."""
    names = list(columns)

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
    if not times:
        return
    for stage in ("vision", "prune", "prefill", "question", "retrieve", "decode"):
        unit = "ms per question" if stage in ANSWER_STAGES else "ms"
        line(f"{stage}, {unit}", lambda c, stage=stage: f"{c['milliseconds'][stage]:.1f}")
    line("decoded tokens/s", lambda c: f"{c['tokens_per_second'] or float('nan'):.1f}")


def read_picture(path: str | Path) -> Image.Image:
    """A picture; of an animated one the first frame. Raises: ValueError for films, and as
    `open_picture`."""
    refuse_film(path)
    picture = open_picture(path)
    with Image.open(path) as file:
        if file.format != "MPO" and getattr(file, "is_animated", False):  # MPO: a photograph
            note(f"only the first frame of {path} is shown; --video shows all")
    return picture


def read_clip(path: str, fps: float | None) -> Clip:
    """An animated file, or the pictures of a folder in the order of `files_in`. fps: frames per
    second; if None, what the file says, or one for a folder. Raises: ValueError for an empty
    folder and for films, and as `open_clip`."""
    if Path(path).is_dir():
        files = files_in(path)
        if not files:
            raise ValueError(f"the folder {path} holds no frames")
        return Clip.even(Pictures(files), fps or 1.0)
    refuse_film(path)
    clip = open_clip(path)
    return Clip.even(clip.frames, fps) if fps else clip


def refuse_film(path: str | Path) -> None:
    """Raise ValueError, with a way to extract frames, for a file that is called like a film."""
    if Path(path).suffix.lower() in FILMS:
        raise ValueError(
            f"{path} is a film, accepted: a picture, an animated one, or --video with a folder of "
            f"frames, made by 'mkdir frames; ffmpeg -i {path} -vf fps=1 frames/%05d.png'"
        )


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
        "Without arguments: a sample page and the tiny model of this folder, which reads such "
        "pages and nothing else (tiny/README.md)."
    )
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--image",
        type=nonempty_path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help=f"pictures (repeatable; default: {SAMPLE.relative_to(TINY.parent)})",
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
    questions.add_argument(
        "--ask",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="questions (repeatable; default: three about the sample page)",
    )
    questions.add_argument(
        "--chat", action="store_true", help="questions from the terminal, one after the other"
    )
    parser.add_argument(
        "--model",
        type=nonempty_path,
        default=TINY,
        help="checkpoint folder or hub repository (default: the tiny model)",
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit of the hub repository (default: its main branch)"
    )
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="two turns with {image}, {question}, {answer}, {question} in place of the family's "
        "prompt; \\n is a new line",
    )
    parser.add_argument(
        "--prefill-sparsity",
        type=float,
        default=0.75,
        metavar="S",
        help="share of the visual tokens that is pruned before any question (default: %(default)s)",
    )
    parser.add_argument(
        "--decode-sparsity",
        type=float,
        default=0.8,
        metavar="S",
        help="share of the kept visual tokens that decoding leaves out (default: %(default)s)",
    )
    parser.add_argument(
        "--positions",
        choices=["contiguous", "original"],
        default="contiguous",
        help="number the kept tokens anew, or leave gaps where others were (default: contiguous)",
    )
    parser.add_argument(
        "--scope",
        choices=["frame", "global"],
        default="frame",
        help="prune every picture or tile by itself, or all together (default: frame)",
    )
    parser.add_argument(
        "--protocol",
        choices=["conversation", "evaluation"],
        help="keep or evict earlier turns (default: evaluation, with --chat conversation)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens of an answer, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of the draw of tokens; 0 takes the likeliest (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens of this probability together (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, help="of the draw (default: another one for every answer)"
    )
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
    parser.add_argument(
        "--device", help="where to compute (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of weights and arithmetic (default: as stored)",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help=f"milliseconds by stage as well, medians of {ROUNDS} rounds",
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
