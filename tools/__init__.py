"""Commands for people: ask.py (`python sparsevila.py`) and quantise.py (`python awq.py`)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def command(program: str, *, reads_input: bool = False) -> Iterator[None]:
    """Within, everything that goes wrong becomes an exit status and at most one line on standard
    error: 2 for bad input or a machine that lacks something, 130 for Ctrl-C, 141 if nobody reads
    the output on (as in `| head`)."""
    try:
        if sys.stdout is None:
            raise ValueError("standard output must be open")
        if reads_input and sys.stdin is None:
            raise ValueError("standard input must be open")
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # torch: out of memory too
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # Python would try once more at exit, and complain
            sys.stdout = None
