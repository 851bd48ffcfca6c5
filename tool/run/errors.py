"""The ways in which a program ends on purpose before it is done."""


class DataError(Exception):
    """A file, image or map cannot be used: one sentence with the path or id and what to do."""


class UsageError(Exception):
    """A command line that cannot be carried out: one sentence that names the flag."""


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """A signal asked the program to end: one sentence that says what is kept."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def reason(error: Exception) -> str:
    """Why a library gave up: the first line of its message, or the error's name."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str) -> str:
    """Text from a file as it may stand in a sentence, on one line."""
    return text if text.isprintable() else ascii(text)
