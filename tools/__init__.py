"""Commands for people: ask.py (`python sparsevila.py`) and quantise.py (`python awq.py`)."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def command(program: str, *, reads_input: bool = False) -> Iterator[None]:
    """Within, everything that goes wrong becomes an exit status and at most one line on standard
    error: 2 for bad input or a machine that lacks something, 130 for Ctrl-C, 141 if nobody reads
    the output on (as in `| head`). What libraries of other languages write there before they fail
    (tokenizers, libtiff) cannot be held back from here."""
    try:
        if sys.stdout is None:
            raise ValueError("standard output must be open")
        if reads_input and sys.stdin is None:
            raise ValueError("standard input must be open")
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks becomes a "?"
                stream.reconfigure(errors="replace")
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        words = " ".join(str(error).split()) or type(error).__name__  # torch's: RuntimeError
        with suppress(OSError):
            if sys.stderr:  # closed, it would be standard output
                print(f"{program}: error: {words}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # Python would try once more at exit, and complain
            sys.stdout = None


def files_in(folder: str | Path) -> list[Path]:
    """The files of a folder that are not hidden, in the order a person counts: 2.png before
    10.png."""

    def words_and_numbers(path: Path) -> tuple:
        parts = re.split(r"([0-9]+)", path.stem)  # every second one is a number
        return [int(x) if i % 2 else x for i, x in enumerate(parts)], path.name

    files = (p for p in Path(folder).iterdir() if not p.is_dir() and not p.name.startswith("."))
    return sorted(files, key=words_and_numbers)
