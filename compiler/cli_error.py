"""The error of the command line."""


class CliError(Exception):
    """A fault of the call: what is wrong, and how to mend it."""

    def __init__(self, cause: str, mend: str = "") -> None:
        super().__init__(f"{cause}; {mend}" if mend else cause)
