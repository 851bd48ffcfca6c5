"""Loader processes that pass on a bad file as one clear error instead of a worker's traceback."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from tool.run.errors import DataError, loader_death

# Linux can; macOS and Windows cannot.
CAN_TELL_SENDERS = hasattr(signal, "sigwaitinfo")


class _Reporting(Dataset):
    """Returns a DataError instead of raising it: torch would wrap it into a traceback's text."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


class _ReportingCollate:
    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: Sequence) -> Any:
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
        return self.collate(samples)


def load(
    dataset: Dataset,
    order: Sequence[int],
    batch_size: int,
    num_workers: int,
    collate: Callable = default_collate,
) -> Iterator[Any]:
    """The dataset's samples in the given order, in batches, through ``num_workers`` processes.

    Raises the DataError of a sample, or of a worker that was killed (by the memory limit, say).
    """
    batches = (order[k : k + batch_size] for k in range(0, len(order), batch_size))
    return _raising(_load(dataset, batches, num_workers, collate))


def load_each(dataset: Dataset, num_workers: int) -> Iterator[Any]:
    """Every sample of the dataset, whatever it holds, or the DataError that came instead of it.

    Raises DataError for a worker that was killed, as ``load`` does.
    """
    return _load(dataset, ([k] for k in range(len(dataset))), num_workers, _single)


def load_epochs(
    dataset: Dataset, batches: Iterable[Sequence[tuple[int, int]]], num_workers: int
) -> Iterator[Any]:
    """As ``load``, over several epochs: batches are lists of (epoch, index), a sample's key.

    The processes stay from the first batch to
    the last, and fetch the next epoch's batches while the program is busy between two epochs.
    """
    return _raising(_load(dataset, batches, num_workers, default_collate))


def _raising(batches: Iterator) -> Iterator:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _load(dataset: Dataset, batches: Iterable, num_workers: int, collate: Callable) -> Iterator:
    loader = DataLoader(
        _Reporting(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_ReportingCollate(collate),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_obey_parent_alone,
        # Without one of its own, it would draw from the generator that dropout draws from.
        generator=torch.Generator(),
    )
    try:
        yield from _start(loader)
    except RuntimeError as error:
        death = loader_death(error)
        if death is None:
            raise
        raise death from error


# torchrun, a terminal and Slurm send SIGINT or SIGTERM to all processes of a program, but a program
# needs its loaders until the step in hand is over. So they obey only the SIGTERM of their parent,
# which all their threads hold back but one that looks who sent it.


def _start(loader: DataLoader) -> Iterator:
    """The loader's iterator, whose processes are born with SIGTERM held back."""
    if not CAN_TELL_SENDERS:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_parent_alone(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if CAN_TELL_SENDERS:
        threading.Thread(target=_await_sigterm_of, args=[os.getppid()], daemon=True).start()


def _await_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _single(samples: Sequence) -> Any:
    (sample,) = samples
    return sample


def shuffled(length: int, seed: int, epoch: int) -> list[int]:
    """0..length-1 in an order that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(length).tolist()
