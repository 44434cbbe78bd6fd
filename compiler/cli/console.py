"""The terminal, or what stands in its place."""

from __future__ import annotations

from typing import NoReturn

import rich.console


class Console(rich.console.Console):
    """rich's, which leaves a reader that has gone to the command, as `print` does."""

    def on_broken_pipe(self) -> NoReturn:
        """Called while the BrokenPipeError is handled."""
        self.quiet = True
        raise BrokenPipeError
