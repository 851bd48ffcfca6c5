"""A bounded pool of worker processes that takes work off a program's own loop.

Each worker has a pipe of its own and at most one call in hand: so a worker that dies is noticed at
once, with the name of what it was doing, and workers end by themselves when the program does.
"""

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tool.distributed import STOP_SIGNALS
from tool.errors import DataError, UsageError

# How long a worker may take to remove its unfinished file when it is told to stop.
STOP_SECONDS = 1


class WorkerPool:
    """Calls of ``function`` in up to ``num_workers`` processes; 0 calls it in this one.

    Use it in a ``with`` statement: at the end of the block all calls have returned, or an error is
    raised and the calls under way are broken off. Processes are spawned when they are first needed
    and compute with one thread each. ``function`` must be importable; what it returns is dropped.
    ``flag`` is what users set ``num_workers`` with, for messages.
    """

    def __init__(self, function: Callable[..., Any], num_workers: int, flag: str):
        self._function = function
        self._num_workers = num_workers
        self._flag = flag
        self._workers: list[_Worker] = []

    def submit(self, name: str, *args: Any) -> None:
        """Call ``function(name, *args)`` as soon as a worker is free; waits until it has started.

        Raises what an earlier call raised: DataError, UsageError or OSError as they are; DataError
        with the ``name`` for any other exception, and for a worker that died.
        """
        if self._num_workers == 0:
            self._function(name, *args)
            return
        self._free_worker().start(name, args)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, exception_type, *_) -> None:
        try:
            if exception_type is None:
                for worker in self._workers:
                    worker.finish()
        finally:
            for worker in self._workers:
                worker.stop()
            for worker in self._workers:
                worker.join()

    def _free_worker(self) -> "_Worker":
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        for connection in wait(list(busy), timeout=0):
            busy.pop(connection).finish()
        if len(busy) == self._num_workers:
            (connection, *_) = wait(list(busy))
            busy.pop(connection).finish()
        for worker in self._workers:
            if worker.task is None:
                return worker
        self._workers.append(_Worker(self._function, self._flag))
        return self._workers[-1]


class _Worker:
    """One process, and the task that it has in hand, if any."""

    def __init__(self, function: Callable, flag: str):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.task: str | None = None
        self._flag = flag
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        # Python starts its tracker with the first process, and then lets signals pass again.
        resource_tracker.ensure_running()
        with _signals_held_back():
            self._process.start()
        # Only the worker holds its end now: the pipe breaks when the worker dies.
        theirs.close()

    def start(self, task: str, args: tuple) -> None:
        self.task = task
        try:
            self.connection.send((task, *args))
        except OSError:
            self._raise_death()

    def finish(self) -> None:
        """Wait for the task in hand, if any; raise its error."""
        if self.task is None:
            return
        try:
            error = self.connection.recv()
        except (EOFError, OSError):
            self._raise_death()
        if isinstance(error, str):
            raise DataError(f"{self.task}: {error} ({self._flag} 0 shows where).")
        if error is not None:
            raise error
        self.task = None

    def _raise_death(self) -> None:
        self._process.join(STOP_SECONDS)
        raise DataError(
            f"{self.task}: its worker process died (exit code {self._process.exitcode}), perhaps "
            f"for lack of memory; try fewer {self._flag}."
        )

    def stop(self) -> None:
        """Tell the process to end: at once if it has a task in hand, else as there are no more."""
        self.connection.close()
        if self.task is not None:
            self._process.terminate()

    def join(self) -> None:
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process started within sees the signals of its group only when it is ready for them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, function: Callable) -> None:
    """What a worker does: call the function with whatever comes, answer None or the error."""
    calling = False

    def stop_if_told(*_: object) -> None:
        # A signal to the whole group is the program's to answer, and it may want this call to
        # return. It closes the pipe before it stops a worker, and nothing else comes through the
        # pipe meanwhile. An exception, unlike death at once, lets an unfinished file be removed.
        if calling and connection.poll():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop_if_told)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the program has ended
        while True:
            args = connection.recv()
            calling = True
            error = _error_of(function, args)
            calling = False
            connection.send(error)


def _error_of(function: Callable, args: tuple) -> Exception | str | None:
    try:
        function(*args)
    except (DataError, UsageError, OSError) as error:
        return error
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
