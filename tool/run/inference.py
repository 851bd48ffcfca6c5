"""What the inference programs share: which images they have to do, and how they end."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tool.run import cli, devices
from tool.run.devices import StopSignals
from tool.run.errors import DataError, Interrupted
from tool.run.provenance import OutputFolder, prepare_folders, require_same_settings, unfinished

# Processes meet at the start and at the end, when the fastest may wait long for the slowest.
LONGEST_WAIT = timedelta(days=1)
IDS_SHOWN = 5
# Where the next image is computed while files are compressed and written; a CPU is busy enough.
WRITES_BEHIND = {"cpu": False, "cuda": True}
# So many files may wait: about those of an image.
MAX_WAITING = 4


def require_finite(values: Tensor | np.ndarray, image_id: str, amp: str | None) -> None:
    """Raise DataError if a network's output for an image, under ``--amp``, is not finite."""
    if not torch.as_tensor(values).isfinite().all():
        way = "the weights may be of a training that diverged"
        if amp == "fp16":
            way = "the range of --amp fp16 is too small for it: take --amp bf16, or none"
        raise DataError(f"{image_id}: the network's output is not finite; {way}.")


def _with_id(error: BaseException | None, image_id: str) -> BaseException | None:
    """Lack of memory as a DataError that names the image, any other error as it is."""
    if not devices.is_out_of_memory(error):
        return error
    way = "take fewer --num_workers, --amp, or a smaller image"
    return DataError(f"{image_id}: out of memory; {way}.")


@contextmanager
def join_ranks(device_name: str) -> Iterator[tuple[torch.device, StopSignals]]:
    """Within the block: this rank's device, and signals that wait for the end of an image."""
    device = devices.choose_device(device_name)
    with devices.process_group(device, LONGEST_WAIT), StopSignals() as stop:
        yield device, stop


class Run:
    """The images of a list that lack outputs: ``todo``, of which ``ids`` are this rank's.

        with run, load_each(<dataset of run.ids>) as samples:
            for sample in run.each(samples):
                with run.attempt(sample.image_id):
                    <compute its outputs>
                    run.write(<function>, <arguments>)

    An error that leaves the block names the number of images that are done, and so does the
    Interrupted that is raised at its end after a signal. Raises UsageError where the folders hold
    outputs of other settings. All ranks must make it, and enter and leave the block.
    """

    def __init__(
        self,
        name: str,
        ids: Sequence[str],
        folders: Sequence[OutputFolder],
        stop: StopSignals,
        device: torch.device,
        overwrite: bool = False,
        skip_bad: bool = False,
    ):
        self.name, self.folders, self.stop = name, folders, stop
        self.overwrite, self.skip_bad = overwrite, skip_bad
        self.all_ids = list(dict.fromkeys(ids))
        self.todo: list[str] = devices.gather(self._plan() if devices.is_main() else [])[0]
        self.ids = devices.shard(self.todo)
        self._current = ""
        self._bad: dict[str, str] = {}
        self._stopped = False
        self._writer = ThreadPoolExecutor(1) if WRITES_BEHIND[device.type] else None
        self._waiting: deque[tuple[str, Future]] = deque()

    def _plan(self) -> list[str]:
        require_same_settings(self.folders, self.all_ids, self.overwrite)
        todo = self.all_ids if self.overwrite else unfinished(self.folders, self.all_ids)
        complete, ranks = len(self.all_ids) - len(todo), devices.world_size()
        if complete or ranks > 1:
            shared = f", shared by {ranks} processes" if ranks > 1 else ""
            print(
                f"{complete} of {len(self.all_ids)} images were complete; {len(todo)} to do{shared}"
            )
        return todo

    def __enter__(self) -> "Run":
        if devices.is_main():
            prepare_folders(self.folders, self.all_ids, self.overwrite)
        devices.gather(None)  # nobody writes before that is done
        quiet = not devices.is_main()
        self._bar = cli.progress(None, self.name, total=len(self.ids), disable=quiet)
        return self

    def each(self, samples: Iterable[Any]) -> Iterator[Any]:
        """The samples that could be read, until a signal comes.

        ``samples`` are those of ``ids``, or a DataError in their place, which may be skipped.
        """
        for image_id, sample in zip(self.ids, samples, strict=True):
            if error := self._failed_write(MAX_WAITING):
                raise error
            self._current = image_id
            if self.stop.received:
                self._stopped = True
                return
            if not isinstance(sample, DataError):
                yield sample
            elif self.skip_bad:
                self._bad[image_id] = str(sample)
            else:
                raise sample
            self._bar.update()

    @contextmanager
    def attempt(self, image_id: str) -> Iterator[None]:
        """Within the block, a DataError and lack of memory are this image's: it may be skipped."""
        try:
            yield
        except (DataError, RuntimeError, MemoryError) as error:
            problem = _with_id(error, image_id)
            if not (self.skip_bad and isinstance(problem, DataError)):
                raise
            self._bad[image_id] = str(problem)

    def write(self, save: Callable, *args: Any) -> None:
        """``save(*args)``, on a GPU in a thread beside the next image; its error comes later."""
        if self._writer:
            self._waiting.append((self._current, self._writer.submit(save, *args)))
        else:
            save(*args)

    def _failed_write(self, may_wait: int) -> BaseException | None:
        """The error of a write, if one failed, once no more than so many of them wait."""
        while len(self._waiting) > may_wait or (self._waiting and self._waiting[0][1].done()):
            self._current, written = self._waiting.popleft()
            if error := written.exception():
                return error
        return None

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        self._bar.close()
        failed_write = self._failed_write(0) if error is None else None
        if self._writer:
            self._writer.shutdown()
        error = _with_id(error or failed_write, self._current)
        if isinstance(error, DataError | OSError):
            hint = "the same command makes the others"
            hint += ", with --skip_bad without this one." if isinstance(error, DataError) else "."
            raise DataError(f"{cli.sentence(error)} {self._count()}; {hint}") from error
        if failed_write:
            raise failed_write
        if error is None and self._stopped:
            message = f"{self._count()}; the same command continues from there."
            raise Interrupted(self.stop.received, message)
        if error is None:
            self._report_bad()

    def _count(self) -> str:
        left = unfinished(self.folders, self.all_ids)
        return f"{len(self.all_ids) - len(left)} of {len(self.all_ids)} images are done"

    def _report_bad(self) -> None:
        """Raise DataError if any rank has skipped an image, after a list of them all."""
        bad = {key: value for part in devices.gather(self._bad) for key, value in part.items()}
        if not bad or not devices.is_main():
            return
        for reason in bad.values():
            print(f"skipped: {reason}", file=sys.stderr)
        shown = ", ".join(list(bad)[:IDS_SHOWN])
        more = f" and {len(bad) - IDS_SHOWN} more" if len(bad) > IDS_SHOWN else ""
        raise DataError(
            f"{len(bad)} of {len(self.all_ids)} images could not be used and were skipped "
            f"({shown}{more}); all others are done."
        )
