"""Errors of the public interface: one cause and one mend each."""

from __future__ import annotations


class PlaitError(Exception):
    """Base of plait's own errors. ``remark`` is a stable ID; ``hint`` says what to do."""

    def __init__(self, remark: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{remark}: {reason}" + (f" ({hint})" if hint else ""))
        self.remark, self.reason, self.hint = remark, reason, hint

    def __reduce__(self) -> tuple[type[PlaitError], tuple[str, str, str]]:
        return type(self), (self.remark, self.reason, self.hint)  # errors travel between processes


class CaptureError(PlaitError):
    """A program could not be captured as one graph."""


class ChangeError(CaptureError):
    """A program changes a plain attribute of a module.

    ``noticed``: programs that read it are prepared anew when it changes, for it is a tensor.
    """

    noticed = False


class InputError(PlaitError, ValueError):
    """A call's arguments do not fit the compiled program."""


class OptionError(PlaitError, ValueError):
    """An option of `plait.compile` has no meaning."""


class BudgetError(OptionError):
    """A budget that cannot be kept. ``least`` are the bytes that could be."""

    def __init__(self, remark: str, reason: str, hint: str = "", least: int = 0) -> None:
        super().__init__(remark, reason, hint)
        self.least = least


class FileError(PlaitError, OSError):
    """A saved program cannot be written or read."""


def interrupted(error: BaseException) -> bool:
    """Whether ``error`` is what became of Ctrl-C: up to CPython 3.11 one while a class is made, as
    in the first import of a module, is the cause of a RuntimeError.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause is not None


def summary(error: BaseException) -> str:
    """The kind of an error that was not expected, and the first two lines of what it says."""
    text = " ".join(str(error).split("\n")[:2]).strip()
    return f"{type(error).__name__}: {text}"[:300]
