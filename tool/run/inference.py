"""What both inference programs share: which images they have to do, and how they end."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tool.run import cli, outputs
from tool.run.checkpoint import digest
from tool.run.devices import StopSignals, gather, is_main, print_main, shard, world_size
from tool.run.errors import DataError, Interrupted, loader_death
from tool.run.outputs import OutputFolder
from tool.weights import FRESH

# Processes meet at the start and at the end, when the fastest may wait long for the slowest.
LONGEST_WAIT = timedelta(days=1)
IDS_SHOWN = 5


def settings_of(args: argparse.Namespace, *names: str) -> dict[str, str]:
    """The flags of that name, and those that decide what the network computes.

    Weights count by their content. Their file must exist.
    """
    names = ("network", "amp", "tf32", "compile", *names)
    settings = {name: outputs.plain(getattr(args, name)) for name in names}
    if args.weights == FRESH:
        return {**settings, "weights": FRESH, "seed": str(args.seed)}
    return {**settings, "weights": digest(Path(args.weights).read_bytes())}


class Run:
    """The images of a list that lack outputs, of which each rank does its share.

        run = Run("infer_cls", args, ids, folders, stop)
        with run:
            for sample in run.each(load_each(<dataset of run.ids>)):
                ...

    ``todo`` are all those images, ``ids`` this rank's. In the ``with`` block outputs may be
    written; an error that leaves it says how many images are done, and so does the Interrupted
    that is raised at its end after a signal. Raises UsageError where the folders hold outputs of
    other settings. All ranks must make it, and enter and leave the block.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        ids: Sequence[str],
        folders: Sequence[OutputFolder],
        stop: StopSignals,
    ):
        self.name, self.args, self.folders, self.stop = name, args, folders, stop
        self.all_ids = list(dict.fromkeys(ids))
        self.todo: list[str] = gather(self._plan() if is_main() else [])[0]
        self.ids = shard(self.todo)
        self._bad: dict[str, str] = {}
        self._error: DataError | None = None
        self._stopped = False

    def _plan(self) -> list[str]:
        overwrite = self.args.overwrite
        outputs.check(self.folders, self.all_ids, overwrite)
        todo = self.all_ids if overwrite else outputs.unfinished(self.folders, self.all_ids)
        if len(todo) < len(self.all_ids) or world_size() > 1:
            complete = len(self.all_ids) - len(todo)
            shared = f", shared by {world_size()} processes" if world_size() > 1 else ""
            print_main(
                f"{complete} of {len(self.all_ids)} images were complete; {len(todo)} to do{shared}"
            )
        return todo

    def __enter__(self) -> "Run":
        if is_main():
            outputs.begin(self.folders, self.all_ids, self.args.overwrite)
        gather(None)  # nobody writes before that is done
        total = len(self.ids)
        self._bar = cli.progress(None, self.name, total=total, disable=not is_main())
        return self

    def each(self, samples: Iterable[Any]) -> Iterator[Any]:
        """The samples that could be read, until a signal comes, or one that cannot be read.

        ``samples`` are those of ``ids``, or a DataError in their place.
        """
        for image_id, sample in zip(self.ids, samples, strict=True):
            if self.stop.received:
                self._stopped = True
                return
            if not isinstance(sample, DataError):
                yield sample
            elif self.args.skip_bad:
                self._bad[image_id] = str(sample)
            else:
                # Raised at the end, so that what is under way gets finished.
                self._error = sample
                return
            self._bar.update()

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        self._bar.close()
        error = loader_death(error) or error
        if error is None and self._error:
            hint = "the same command makes the others, with --skip_bad without this one."
            raise DataError(f"{self._error} {self._count()}; {hint}") from self._error
        if isinstance(error, DataError | OSError):
            hint = "the same command makes the others."
            raise DataError(f"{cli.sentence(error)} {self._count()}; {hint}") from error
        if error is None and self._stopped:
            message = f"{self._count()}, and the same command goes on from there."
            raise Interrupted(self.stop.received, message)
        if error is None:
            self._report_bad()

    def _count(self) -> str:
        left = outputs.unfinished(self.folders, self.all_ids)
        return f"{len(self.all_ids) - len(left)} of {len(self.all_ids)} images are done"

    def _report_bad(self) -> None:
        """Raise DataError if any rank has skipped an image, after a list of them all."""
        bad = {key: value for part in gather(self._bad) for key, value in part.items()}
        if not bad or not is_main():
            return
        for reason in bad.values():
            print(f"skipped: {reason}", file=sys.stderr)
        shown = ", ".join(list(bad)[:IDS_SHOWN])
        more = f" and {len(bad) - IDS_SHOWN} more" if len(bad) > IDS_SHOWN else ""
        raise DataError(
            f"{len(bad)} of {len(self.all_ids)} images could not be used and were skipped "
            f"({shown}{more}); all others are done."
        )
