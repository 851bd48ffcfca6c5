"""Loader processes that pass on a bad file as one clear error instead of a worker's traceback."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from tool.run.errors import DataError, reason

WAYS_OUT = "enlarge /dev/shm (a container's --shm-size), or take fewer --num_workers, or 0."


class _Reporting(Dataset):
    """Returns a DataError instead of raising it: torch would wrap it into a traceback's text."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


def _collate(collate: Callable, samples: Sequence) -> Any:
    """The batch, or the first DataError among its samples."""
    errors = [sample for sample in samples if isinstance(sample, DataError)]
    return errors[0] if errors else collate(samples)


def stack(samples: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The samples' first tensors as one, their second ones, ...; not yet in shared memory."""
    return [torch.stack(tensors) for tensors in zip(*samples, strict=True)]


@contextmanager
def load(
    dataset: Dataset,
    batches: Iterable[Sequence],
    num_workers: int,
    collate: Callable = stack,
    pin_memory: bool = False,
) -> Iterator[Iterator[Any]]:
    """Within the block: the samples of each batch of keys, collated, by ``num_workers`` processes.

    The processes end with the block. Raises the DataError of a sample, and DataError for a process
    that was killed (for lack of memory, say).
    """
    with _loader(dataset, batches, num_workers, collate, pin_memory) as loaded:
        yield map(_raised, loaded)


def load_each(dataset: Dataset, num_workers: int, pin_memory: bool = False):
    """As ``load``, but every sample alone, and the DataError of a bad one in its place."""
    batches = ([index] for index in range(len(dataset)))
    return _loader(dataset, batches, num_workers, itemgetter(0), pin_memory)


@contextmanager
def _loader(
    dataset: Dataset, batches: Iterable, num_workers: int, collate: Callable, pin_memory: bool
) -> Iterator[Iterator[Any]]:
    loader = DataLoader(
        _Reporting(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=partial(_collate, collate),
        pin_memory=pin_memory,
        worker_init_fn=_prepare_process,
        # Without one of its own, it would draw from the generator that dropout draws from.
        generator=torch.Generator(),
    )
    iterator, problem = None, ""
    try:
        iterator = iter(loader)
    except OSError as error:
        problem = reason(error)
    if iterator is None:  # not above: processes that have started end only with the OSError
        raise DataError(f"loader processes cannot start ({problem}); {WAYS_OUT}")
    try:
        yield iterator
    except RuntimeError as error:
        # PyTorch raises this in any line of the program when a process dies.
        if "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(f"a loader process died ({reason(error)}); {WAYS_OUT}") from error
    finally:
        if num_workers:
            # An error's traceback may hold the iterator, so that it would not end by itself.
            iterator._shutdown_workers()


def _prepare_process(_: int) -> None:
    # Terminals and batch systems signal all processes, but a program needs its loaders until the
    # current step is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ForkingPickler.register(Tensor, _send)
    # A batch that cannot be sent, for lack of memory, would be waited for; a dead process is not.
    Queue._on_queue_feeder_error = lambda *_: os._exit(1)


def _send(tensor: Tensor) -> tuple[Callable, tuple]:
    """How a tensor is pickled: it goes through shared memory, or through a pipe if that is full."""
    try:
        tensor.share_memory_()
    except RuntimeError:
        return torch.from_numpy, (tensor.numpy(),)
    return reduce_tensor(tensor)


def _raised(batch: Any) -> Any:
    if isinstance(batch, DataError):
        raise batch
    return batch


def in_batches(order: Sequence, batch_size: int) -> Iterator[Sequence]:
    """The keys of ``order`` in batches, the last one perhaps shorter."""
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def shuffled(length: int, seed: int, epoch: int) -> list[int]:
    """0..length-1 in an order that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(length).tolist()
