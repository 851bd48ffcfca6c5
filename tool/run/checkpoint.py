"""``<session_name>.ckpt``: all that a training needs to continue as if it had never stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tool.run.devices import gather
from tool.run.errors import DataError, UsageError
from tool.run.provenance import differences
from tool.weights.pytorch import load_tensors, save_tensors

FORMAT = "AffinityNet training, 2"
NEW_START = "use --resume never to start from the beginning"


def find_checkpoint(resume: str, path: Path) -> Path | None:
    """The file that ``--resume`` means, or None for a new start; all ranks must call it.

    ``path`` is the session's own checkpoint. The first rank decides for all; raises DataError where
    another one, on another machine, does not see its file.
    """
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not path.is_file():
            raise DataError(f"{path}: no such checkpoint to --resume from.")
    found = resume != "never" and gather(path.is_file())[0]
    if found and not path.is_file():
        raise DataError(
            f"{path}: not on this machine; the session's folder must be one that all machines see."
        )
    return path if found else None


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content (plain containers, numbers, text and tensors), whole or not at all."""
    save_tensors(path, {"format": FORMAT, **content})


def read_checkpoint(path: Path, settings: Mapping[str, str]) -> dict[str, Any]:
    """The content of a checkpoint of a run with the same settings.

    Raises DataError if it cannot be read or is no checkpoint, UsageError if settings differ.
    """
    try:
        content = load_tensors(path, "checkpoint")
    except DataError as error:
        raise DataError(f"{str(error).removesuffix('.')}; {NEW_START}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not a checkpoint of a training of this version; {NEW_START}.")
    found = differences(content["settings"], settings)
    if found:
        raise UsageError(
            f"{path}: is of a run with other settings: {found}; "
            f"repeat that run's command, or take another --session_name; {NEW_START}."
        )
    return content
