"""``<session_name>.ckpt``: all that a training needs to go on as if it had never stopped.

It holds the network, the optimizer, where the run stands, the random states, the records so far,
and the settings that decide the run's numbers, so that no other run goes on from it.
"""

import argparse
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tool.run.devices import gather
from tool.run.errors import DataError
from tool.weights.pytorch import load_tensors, save_tensors

FORMAT = "AffinityNet training, 1"
# Flags that say where and how a training runs, not what comes of it.
IRRELEVANT_FLAGS = ("device", "num_workers", "session_name", "resume", "save_every", "log_every",
                    "tensorboard")  # fmt: skip
NEW_START = "--resume never starts anew and replaces it"


def digest(*parts: str | bytes) -> str:
    """A short name of a content: equal for equal parts, different for all others."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return f"content {total.hexdigest()[:16]}"


def digest_files(paths: Iterable[str | os.PathLike]) -> str:
    """A digest of the files' names and sizes and of the first one's bytes, not of their folder.

    Thousands of files would take too long to read; of outputs made with other settings, any one
    differs.
    """
    paths = [Path(path) for path in paths]
    sizes = [f"{path.name} {path.stat().st_size}" for path in paths]
    return digest(*sizes, paths[0].read_bytes())


def settings_of(args: argparse.Namespace, contents: Mapping[str, str]) -> dict[str, str]:
    """What decides a run's numbers, by flag: ``args``, but the contents of files for their names.

    ``contents`` are digests by flag, without dashes; "" for a flag that another's content covers.
    """
    settings = {name: _plain(value) for name, value in vars(args).items()} | dict(contents)
    return {name: value for name, value in settings.items() if name not in IRRELEVANT_FLAGS}


def _plain(value: Any) -> str:
    return getattr(value, "__name__", str(value))  # a network is a module


def find_checkpoint(resume: str, path: Path) -> Path | None:
    """The file that ``--resume`` means, or None for a new start; all ranks must call it.

    ``path`` is the session's own checkpoint. The first rank looks for all; raises DataError where
    another one, on another machine, does not see what it sees.
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

    Raises DataError if it cannot be read, is no checkpoint, or names the settings that differ.
    """
    try:
        content = load_tensors(path, "checkpoint")
    except DataError as error:
        raise DataError(f"{str(error).removesuffix('.')}; {NEW_START}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not a checkpoint of a training of this version; {NEW_START}.")
    found = ", ".join(differences(content["settings"], settings))
    if found:
        raise DataError(
            f"{path}: is of a run with other settings: {found}; "
            f"repeat that run's command, or take another --session_name; {NEW_START}."
        )
    return content


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The settings that differ, each with both values: "--lr (0.1 there, 0.2 here)"."""
    return [
        f"--{name}" + _values(there.get(name, "none"), here.get(name, "none"))
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def _values(there: str, here: str) -> str:
    if there.startswith("content ") or here.startswith("content "):
        return " (other content)"
    return f" ({there} there, {here} here)"
