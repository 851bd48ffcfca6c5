"""Loader processes pass on batches in order, and a bad file as one clear error."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from tool.run.errors import DataError
from tool.run.loading import in_batches, load, load_each, shuffled

each_number_of_workers = pytest.mark.parametrize("num_workers", [0, 2])


class Numbers(Dataset):
    """Item k is k; what ``broken`` names raises."""

    def __init__(self, length, broken=None):
        self.length = length
        self.broken = broken or {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            self.broken[index](index)
        return torch.tensor(index)


def _refuse(index):
    raise DataError(f"{index}.jpg: not a readable image; replace it.")


def _fail(index):
    raise ZeroDivisionError(f"item {index}")


def load_all(dataset, batches, num_workers):
    with load(dataset, batches, num_workers) as loaded:
        return [batch.tolist() for batch in loaded]


@each_number_of_workers
def test_batches_follow_the_order(num_workers):
    batches = in_batches([6, 0, 3, 1, 5, 2, 4], 3)
    assert load_all(Numbers(7), batches, num_workers) == [[6, 0, 3], [1, 5, 2], [4]]


class Epochs(Numbers):
    """Item k of epoch e is 100 e + k."""

    def __getitem__(self, key):
        epoch, index = key
        return super().__getitem__(index) + 100 * epoch


@each_number_of_workers
def test_samples_are_asked_for_by_any_key(num_workers):
    batches = iter([[(0, 2), (0, 1)], [(0, 0), (1, 2)], [(1, 0)]])
    assert load_all(Epochs(3), batches, num_workers) == [[2, 1], [0, 102], [100]]


@each_number_of_workers
def test_loading_leaves_the_random_numbers_of_torch_alone(num_workers):
    before = torch.get_rng_state()
    load_all(Numbers(4), in_batches(range(4), 2), num_workers)
    assert torch.equal(torch.get_rng_state(), before)


class Pids(Dataset):
    def __getitem__(self, index):
        return torch.tensor(os.getpid())


def test_loader_processes_ignore_signals_and_end_with_the_block():
    with load(Pids(), ([k] for k in range(20)), 1) as batches:
        pids = [int(next(batches))]
        for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a batch system sends them
            os.kill(pids[0], number)
        pids += [int(batch) for batch in batches]
    assert set(pids) == {pids[0]}
    assert len(pids) == 20
    assert pids[0] != os.getpid()
    assert not multiprocessing.active_children()


@each_number_of_workers
def test_data_error_arrives_clean_after_the_batches_before(num_workers):
    with load(Numbers(8, {5: _refuse}), in_batches(range(8), 2), num_workers) as batches:
        assert [next(batches).tolist(), next(batches).tolist()] == [[0, 1], [2, 3]]
        with pytest.raises(DataError) as error:
            next(batches)
    assert str(error.value) == "5.jpg: not a readable image; replace it."


@each_number_of_workers
def test_data_error_takes_the_place_of_its_sample(num_workers):
    with load_each(Numbers(3, {1: _refuse}), num_workers) as loaded:
        samples = list(loaded)
    assert [samples[0], samples[2]] == [0, 2]
    assert isinstance(samples[1], DataError)
    assert str(samples[1]) == "1.jpg: not a readable image; replace it."


@each_number_of_workers
def test_bug_stays_what_it_is(num_workers):
    with pytest.raises(ZeroDivisionError, match="item 0"):
        load_all(Numbers(1, {0: _fail}), [[0]], num_workers)


KILLED_WORKER = """
import os
from tool.run.errors import DataError
from tool.run.loading import in_batches, load, load_each, shuffled

class Deadly(list):
    def __getitem__(self, index):
        os._exit(1)

try:
    with load(Deadly([0]), [[0]], num_workers=1) as batches:
        next(batches)
except DataError as error:
    print(error)
"""


def test_worker_that_dies_is_a_data_error():
    # In a process of its own: torch reports a dead worker again whenever another one ends.
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WORKER],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"loader process died.*--num_workers", done.stdout), done.stderr


ABANDONED = """
from tool.run.loading import load
with load([0, 1, 2, 3], [[0], [1], [2], [3]], num_workers=2) as batches:
    print(int(next(batches)), flush=True)
    raise KeyError("what was not foreseen")
"""


def test_program_that_fails_does_not_wait_for_its_loader_processes():
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "0\n")
    assert "KeyError" in done.stderr


@pytest.mark.parametrize("length", [0, 1, 50])
def test_shuffled_is_a_permutation(length):
    order = shuffled(length, seed=3, epoch=1)
    assert sorted(order) == list(range(length))
    assert all(type(index) is int for index in order)


def test_shuffled_depends_on_seed_and_epoch_alone():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    orders = [shuffled(50, *key) for key in keys]
    torch.manual_seed(5)
    assert [shuffled(50, *key) for key in reversed(keys)] == orders[::-1]
    assert len({tuple(order) for order in orders}) == len(keys)
    assert list(range(50)) not in orders
