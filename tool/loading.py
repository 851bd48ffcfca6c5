"""Loader processes that pass on a bad file as one clear error instead of a worker's traceback."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from tool.errors import DataError


class _Reporting(Dataset):
    """Returns a DataError instead of raising it: torch would wrap it into a traceback's text."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
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
    drop_last: bool = False,
) -> Iterator[Any]:
    """The dataset's samples in the given order, in batches, through ``num_workers`` processes.

    Raises the DataError of a sample, or of a worker that was killed (by the memory limit, say).
    """
    loader = DataLoader(
        _Reporting(dataset),
        batch_size=batch_size,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_ReportingCollate(collate),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"a loader process died ({reason}); try fewer --num_workers.") from error


def single(samples: Sequence) -> Any:
    """Collate for batches of one image, whatever it holds."""
    (sample,) = samples
    return sample


def shuffled(length: int, seed: int, epoch: int) -> list[int]:
    """0..length-1 in an order that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(length).tolist()
