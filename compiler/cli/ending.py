"""How a command ends: with one line for what went wrong, and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import typer

from ..errors import interrupted
from .error import CliError

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and SIGTERM, as shells have them."""

_show_tracebacks = False


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is under way is cleaned up as after Ctrl-C."""


def show_tracebacks(show: bool) -> None:
    """Whether errors end the process as Python's own do."""
    global _show_tracebacks
    _show_tracebacks = show


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns errors into one message and an exit code: 2 for the user's, 1 for plait's own."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        _stopped(error)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        _discard_output()
        raise typer.Exit(0) from None
    except Exception as error:
        if interrupted(error):
            _stopped(error)
        if _show_tracebacks:
            raise
        if isinstance(error, OSError) and error.filename is None and _output_is_lost():
            raise typer.Exit(int(_lost(error, 0) or 0)) from None
        if isinstance(error, CliError) or _is_user_error(error):
            _fail(str(error), 2)
        _fail(f"{type(error).__name__}: {error}; --debug before the command shows where", 1)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within it, SIGTERM raises `Terminated` once; a second one ends the process at once."""

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stopped(error: BaseException) -> None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Terminated):
        cause = cause.__cause__
    if cause is None:
        _fail("interrupted", INTERRUPTED)
    _fail("terminated", TERMINATED)


def _is_user_error(error: Exception) -> bool:
    # By module, for the classes themselves cannot be imported without importing torch.
    kinds = {f"{k.__module__.rpartition('.')[2]}.{k.__name__}" for k in type(error).__mro__}
    return bool(
        kinds
        & {
            "errors.PlaitError",
            "errors.PlacementError",
            "pipeline_text.PipelineError",
            "plan.PlanError",
        }
    )


def _output_is_lost() -> bool:
    """Whether standard output can no longer be written. Buffers drop what they could not write, so
    that only writing more tells.
    """
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # `run_app` tells of it
        sys.stdout.flush()
    print(f"plait: {message}", file=sys.stderr)
    raise typer.Exit(code)


def run_app(app: Callable[[], object]) -> None:
    """Runs the command line ``app`` and ends the process."""
    code: str | int | None = 0
    try:
        with _terminable():
            app()
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of help, which no command writes
        if _show_tracebacks:
            raise
        code = _lost(error, 0)
    if sys.stdout is not None:
        try:
            sys.stdout.flush()  # the interpreter's own, later, ends in a traceback
        except OSError as error:
            code = _lost(error, code)
    if code in (INTERRUPTED, TERMINATED):
        # TVM's threads may still run; destroying them at exit would end in an abort.
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _lost(error: OSError, code: str | int | None) -> str | int | None:
    """The exit code where the output could not be written, which it tells unless a fault has been
    told already.
    """
    _discard_output()
    if code or isinstance(error, BrokenPipeError):
        return code
    print(f"plait: the output cannot be written ({error})", file=sys.stderr)
    return 1
