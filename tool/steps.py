"""Which commands of a row are complete: what each was run with, and what it left, in one file.

A *step* is one command. It is complete if it ended well, its settings are those of today, and what
it made is still there. A step that runs makes those after it stale, whatever their settings.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tool.files import atomic_write
from tool.run.errors import DataError

Word = str | Path | int | float

# Flags that say where and how a program runs, not what comes of it.
IRRELEVANT_FLAGS = (
    *("--device", "--num_workers", "--resume", "--save_every", "--log_every", "--tensorboard"),
    *("--crf_workers", "--overwrite", "--skip_bad"),
)
# Files of these kinds count by their content: lists, class names, image-level labels.
CONTENT_SUFFIXES = (".txt", ".npy")
STARTED, COMPLETE, STALE = "started", "complete", "stale"


class Step(NamedTuple):
    """One command for python3; the paths among its words are ``Path``."""

    stage: str
    name: str
    command: Sequence[Word]
    outputs: Sequence[Path]  # files, or folders of files


def settings_of(command: Sequence[Word], root: Path) -> dict[str, str]:
    """What decides a command's outcome, by flag; of a flag given twice, the last.

    Paths count from ``root`` or as absolute ones, so that it does not matter where one stands.
    """
    settings: dict[str, str] = {}
    flag = "program"
    for word in command:
        text = _place(word, root) if isinstance(word, Path) else str(word)
        if text.startswith("--"):
            flag, _, value = text.partition("=")
            settings[flag] = value
        else:
            text = Path(text).name if flag == "program" else text
            settings[flag] = f"{settings.get(flag, '')} {text}".lstrip()
    return {flag: value for flag, value in settings.items() if flag not in IRRELEVANT_FLAGS}


def _place(path: Path, root: Path) -> str:
    """A path that reads alike from every folder, with a digest of a small file's content."""
    absolute, absolute_root = path.resolve(), root.resolve()
    place = str(absolute)
    if absolute.is_relative_to(absolute_root):
        place = f"<out_dir>/{absolute.relative_to(absolute_root)}"
    if path.suffix in CONTENT_SUFFIXES and path.is_file():
        place += f" (content {hashlib.sha256(path.read_bytes()).hexdigest()[:8]})"
    return place


def _number_of_files(folder: Path) -> int:
    """Those that are whole: unfinished ones begin with a dot."""
    return sum(not entry.name.startswith(".") for entry in os.scandir(folder))


class History:
    """The steps that were run, in ``<root>/pipeline.json``; with ``pretend``, nothing is written.

    Raises DataError if the file cannot be read.
    """

    def __init__(self, root: Path, pretend: bool = False):
        self.root = root
        self.path = root / "pipeline.json"
        self.pretend = pretend
        self.records: dict[str, dict] = self._read() if self.path.exists() else {}

    def _read(self) -> dict[str, dict]:
        try:
            records = json.loads(self.path.read_text())["steps"]
            if not all(
                {"state", "settings", "files"} <= record.keys() for record in records.values()
            ):
                raise KeyError("state")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.path}: not a record of what was run; remove it, and all stages run again."
            ) from error
        return records

    def reason_to_run(self, step: Step) -> str | None:
        """Why the step must run, in a few words; None if it is complete."""
        record = self.records.get(step.name)
        if record is None:
            return "not run before"
        changes = self.changed_settings(step)
        if changes:
            return ", ".join(changes)
        if record["state"] == STALE:
            return record["reason"]
        if record["state"] == STARTED:
            return "not finished before"
        for output in step.outputs:
            if not output.exists():
                return f"{output} is missing"
            made = record["files"].get(output.name, 0)
            if output.is_dir() and _number_of_files(output) < made:
                return f"{output} holds fewer than the {made} files that were made"
        return None

    def goes_on(self, step: Step) -> bool:
        """Whether what the step has left is of its present settings and inputs."""
        stale = step.name in self.records and self.records[step.name]["state"] == STALE
        return not stale and not self.changed_settings(step)

    def changed_settings(self, step: Step) -> list[str]:
        """Which settings are not those that the step was last run with: "--lr was 0.1, is 0.2"."""
        if step.name not in self.records:
            return []
        before = self.records[step.name]["settings"]
        now = settings_of(step.command, self.root)
        return [
            f"{flag} was {_shown(before.get(flag))}, is {_shown(now.get(flag))}"
            for flag in dict.fromkeys([*now, *before])
            if before.get(flag) != now.get(flag)
        ]

    def begin(self, step: Step, later: Sequence[Step]) -> None:
        """Note that the step runs now, and that those after it cannot stay as they are."""
        settings = settings_of(step.command, self.root)
        self.records[step.name] = {"state": STARTED, "settings": settings, "files": {}}
        for follower in later:
            if follower.name in self.records:
                stale = {"state": STALE, "reason": f"{step.name} ran again"}
                self.records[follower.name].update(stale)
        self._write()

    def end(self, step: Step) -> None:
        """Note that the step is complete."""
        folders = [output for output in step.outputs if output.is_dir()]
        files = {folder.name: _number_of_files(folder) for folder in folders}
        self.records[step.name].update({"state": COMPLETE, "files": files})
        self._write()

    def _write(self) -> None:
        if not self.pretend:
            with atomic_write(self.path) as file:
                file.write((json.dumps({"steps": self.records}, indent=2) + "\n").encode())


def _shown(value: str | None) -> str:
    return "not given" if value is None else value or "given"
