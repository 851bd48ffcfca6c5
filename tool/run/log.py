"""What a training leaves behind besides weights: a log for people, a table for plots."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from tool.files import make_folder
from tool.run.devices import is_main, world_size
from tool.run.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Whose versions, besides PyTorch's, can change a training's numbers.
PACKAGES = ("torchvision", "numpy", "pillow")


def describe_run(seed: int, device: torch.device) -> list[str]:
    """The log's first lines: command, versions, hardware, seed."""
    gpu = f"; {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return [
        f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}",
        # torch's own version names the build, too (+cpu, +cu...)
        f"versions: python {platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        f"hardware: {_processor()}, {os.cpu_count()} cores{gpu}",
        f"seed: {seed}, device: {device}, threads: {torch.get_num_threads()}, "
        f"processes: {world_size()}",
    ]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():  # on Linux, where platform.processor() is often empty
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Log:
    """``<session>.log`` for people, ``<session>.csv`` for plots, TensorBoard's files on request.

    The log holds no times: two runs of the same command and seed have equal logs. Only the first
    rank writes. ``start`` and ``resume`` lock the files until ``close``; they raise UsageError
    where another process has done so.
    """

    def __init__(self, session: str, head: list[str], tensorboard: str | None = None):
        self.session, self.head = session, head
        self.texts = {"log": "", "csv": ""}
        self._files: dict[str, IO[str]] = {}
        self._tensorboard = _summary_writer(tensorboard) if tensorboard else None

    def close(self) -> None:
        """Close all files; TensorBoard's are complete only then."""
        for file in filter(None, (*self._files.values(), self._tensorboard)):
            file.close()

    def start(self, notes: list[str]) -> None:
        """Begin both files, in place of older ones."""
        self._replace({"log": "".join(f"{line}\n" for line in self.head), "csv": ""})
        self.write("\n".join(notes))

    def resume(self, texts: Mapping[str, str], step: int) -> None:
        """Put both files back to what ``texts`` was after a step, which drops later lines.

        The log notes it, and where the head of this run differs from that of the one before.
        """
        news = [line for line in self.head if line not in texts["log"].splitlines()]
        self._replace(texts)
        self.write("\n".join([f"resumed after step {step}", *(f"resumed {line}" for line in news)]))

    def write(self, message: str) -> None:
        """Add a line to the log and print it."""
        if is_main():
            self._append("log", message)
            print(message, flush=True)

    def write_row(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row to the table: the step, then the values, always the same ones in that order."""
        if not is_main():
            return
        if not self.texts["csv"]:
            self._append("csv", ",".join(["step", *values]))
        self._append("csv", ",".join(f"{value:.7g}" for value in (step, *values.values())))
        self.plot(step, values)

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Show values in TensorBoard, where that was asked for."""
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def _replace(self, texts: Mapping[str, str]) -> None:
        self.texts = dict(texts)
        for kind, text in texts.items() if is_main() else ():
            self._files[kind] = self._open_locked(Path(f"{self.session}.{kind}"))
            self._files[kind].truncate(0)
            self._files[kind].write(text)

    def _open_locked(self, path: Path) -> IO[str]:
        make_folder(path.parent)
        file = open(path, "a", 1, "utf-8", "backslashreplace")  # noqa: SIM115 (flushes each line)
        try:
            if fcntl:
                # Ends with the process, however that ends; loader processes do not inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            problem = f"another training is writing {path}; wait for its end, or take another name"
            raise UsageError(f"--session_name {self.session}: {problem}.") from error
        except OSError:  # a file system without locks
            pass
        return file

    def _append(self, kind: str, line: str) -> None:
        self.texts[kind] += line + "\n"
        self._files[kind].write(line + "\n")


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard {folder}: the package tensorboard is not installed "
            "(pip install tensorboard); the .csv has the same numbers."
        ) from error
    return SummaryWriter(folder) if is_main() else None
