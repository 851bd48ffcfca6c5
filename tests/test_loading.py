"""Loader processes hand on batches in order, and a bad file as one clear error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from tool.run.errors import DataError
from tool.run.loading import load, load_each, load_epochs, shuffled

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


def _lists(batches):
    return [batch.tolist() for batch in batches]


@each_number_of_workers
def test_batches_follow_the_order(num_workers):
    batches = _lists(load(Numbers(7), [6, 0, 3, 1, 5, 2, 4], 3, num_workers))
    assert batches == [[6, 0, 3], [1, 5, 2], [4]]


class Epochs(Numbers):
    """Item k of epoch e is 100 e + k."""

    epoch = 0

    def __getitem__(self, index):
        return super().__getitem__(index) + 100 * self.epoch


@each_number_of_workers
def test_each_sample_is_of_the_epoch_asked_for(num_workers):
    batches = [[(0, 2), (0, 1)], [(0, 0), (1, 2)], [(1, 0)]]
    loaded = _lists(load_epochs(Epochs(3), iter(batches), num_workers))
    assert loaded == [[2, 1], [0, 102], [100]]


@each_number_of_workers
def test_error_of_an_epoch_arrives_clean(num_workers):
    batches = load_epochs(Epochs(3, {1: _refuse}), [[(0, 0)], [(0, 1)]], num_workers)
    assert next(batches).tolist() == [0]
    with pytest.raises(DataError, match=r"^1\.jpg: not a readable image; replace it\.$"):
        next(batches)


@each_number_of_workers
def test_loading_leaves_the_random_numbers_of_torch_alone(num_workers):
    before = torch.get_rng_state()
    list(load(Numbers(4), range(4), 2, num_workers))
    list(load_epochs(Epochs(4), [[(0, 1)]], num_workers))
    assert torch.equal(torch.get_rng_state(), before)


class Pids(Dataset):
    def __getitem__(self, index):
        return torch.tensor(os.getpid())


def test_loader_processes_stay_over_epochs_and_bear_the_signals_of_their_parent():
    batches = load_epochs(Pids(), [[(epoch, 0)] for epoch in range(20)], 1)
    pids = [int(next(batches))]
    for number in ("-INT", "-TERM"):  # from somebody else, as torchrun's
        subprocess.run(["kill", number, str(pids[0])], check=True)
    pids += [int(batch) for batch in batches]
    assert set(pids) == {pids[0]}
    assert len(pids) == 20
    assert pids[0] != os.getpid()


@each_number_of_workers
def test_data_error_arrives_clean_after_the_batches_before(num_workers):
    batches = load(Numbers(8, {5: _refuse}), range(8), 2, num_workers)
    assert [next(batches).tolist(), next(batches).tolist()] == [[0, 1], [2, 3]]
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == "5.jpg: not a readable image; replace it."


@each_number_of_workers
def test_data_error_takes_the_place_of_its_sample(num_workers):
    samples = list(load_each(Numbers(3, {1: _refuse}), num_workers))
    assert [samples[0], samples[2]] == [0, 2]
    assert isinstance(samples[1], DataError)
    assert str(samples[1]) == "1.jpg: not a readable image; replace it."


@each_number_of_workers
def test_bug_stays_what_it_is(num_workers):
    with pytest.raises(ZeroDivisionError, match="item 0"):
        list(load(Numbers(1, {0: _fail}), [0], 1, num_workers))


KILLED_WORKER = """
import os
from tool.run.errors import DataError
from tool.run.loading import load, load_each, load_epochs, shuffled

class Deadly(list):
    def __getitem__(self, index):
        os._exit(1)

try:
    list(load(Deadly([0]), [0], 1, num_workers=1))
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
batches = load([0, 1, 2, 3], range(4), 1, num_workers=2)
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


class Objects(list):
    """A dataset of what no collating knows."""


def test_samples_come_one_by_one_whatever_they_hold():
    objects = Objects([object(), {"a": object()}])
    assert list(load_each(objects, 0)) == objects


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
