"""What the inference programs share: which images they have to do, and how they end."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from tool.run import cli, devices
from tool.run.devices import StopSignals
from tool.run.errors import DataError, Interrupted
from tool.run.provenance import OutputFolder, prepare_folders, require_same_settings, unfinished

# Processes meet at the start and at the end, when the fastest may wait long for the slowest.
LONGEST_WAIT = timedelta(days=1)
IDS_SHOWN = 5


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
                <write its outputs>

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
        self._error: DataError | None = None
        self._stopped = False

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
        """The samples that could be read, until a signal comes, or one that cannot be read.

        ``samples`` are those of ``ids``, or a DataError in their place.
        """
        for image_id, sample in zip(self.ids, samples, strict=True):
            self._current = image_id
            if self.stop.received:
                self._stopped = True
                return
            if not isinstance(sample, DataError):
                yield sample
            elif self.skip_bad:
                self._bad[image_id] = str(sample)
            else:
                # Raised at the end, so that started images get finished.
                self._error = sample
                return
            self._bar.update()

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        self._bar.close()
        if error is None and self._error:
            hint = "the same command makes the others, with --skip_bad without this one."
            raise DataError(f"{self._error} {self._count()}; {hint}") from self._error
        if devices.is_out_of_memory(error):
            raise DataError(
                f"{self._current}: out of memory; take fewer --num_workers, --amp, or a smaller "
                f"image. {self._count()}; the same command makes the others."
            ) from error
        if isinstance(error, DataError | OSError):
            hint = "the same command makes the others."
            raise DataError(f"{cli.sentence(error)} {self._count()}; {hint}") from error
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
