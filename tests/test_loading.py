"""Loader processes pass on batches in order, and a bad file as one clear error."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import REPOSITORY

from tool.run import loading
from tool.run.errors import DataError
from tool.run.loading import in_batches, load_each, shuffled

each_number_of_workers = pytest.mark.parametrize("num_workers", [0, 2])
load = partial(loading.load, collate=torch.tensor)  # of numbers


def refusal(index):
    return DataError(f"{index}.jpg: not a readable image; replace it.")


class Samples(list):
    """A dataset; an error among the samples is raised."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if isinstance(sample, Exception):
            raise sample
        return sample


def load_all(dataset, batches, num_workers):
    with load(dataset, batches, num_workers) as loaded:
        return [batch.tolist() for batch in loaded]


@each_number_of_workers
def test_batches_follow_the_order(num_workers):
    batches = in_batches([6, 0, 3, 1, 5, 2, 4], 3)
    assert load_all(Samples(range(7)), batches, num_workers) == [[6, 0, 3], [1, 5, 2], [4]]


@each_number_of_workers
def test_loading_leaves_the_random_numbers_of_torch_alone(num_workers):
    before = torch.get_rng_state()
    load_all(range(4), in_batches(range(4), 2), num_workers)
    assert torch.equal(torch.get_rng_state(), before)


class Pids:
    def __getitem__(self, index):
        return os.getpid()


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
    dataset = Samples([0, 1, 2, 3, 4, refusal(5), 6, 7])
    with load(dataset, in_batches(range(8), 2), num_workers) as batches:
        assert [next(batches).tolist(), next(batches).tolist()] == [[0, 1], [2, 3]]
        with pytest.raises(DataError, match=r"^5\.jpg: not a readable image; replace it\.$"):
            next(batches)


@each_number_of_workers
def test_data_error_takes_the_place_of_its_sample(num_workers):
    with load_each(Samples([0, refusal(1), 2]), num_workers) as loaded:
        samples = list(loaded)
    assert [samples[0], samples[2]] == [0, 2]
    assert isinstance(samples[1], DataError)
    assert str(samples[1]) == "1.jpg: not a readable image; replace it."


@each_number_of_workers
@pytest.mark.parametrize("kind", [ZeroDivisionError, RuntimeError])
def test_bug_stays_what_it_is(kind, num_workers):
    with pytest.raises(kind, match="item 0"):
        load_all(Samples([kind("item 0")]), [[0]], num_workers)


def run_script(script, *launcher):
    """Run it in a process of its own, because torch reports a dead worker in others, too."""
    command = [*launcher, sys.executable, "-c", script]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


KILLED_WORKER = """
import os
from tool.run.loading import load
class Deadly:
    def __getitem__(self, index):
        os._exit(1)
with load(Deadly(), [[0]], num_workers=1) as batches:
    next(batches)
"""
UNSENT_BATCH = """
from tool.run.loading import load_each
class Large:
    def __reduce__(self):
        raise MemoryError
with load_each([0, Large(), 2], num_workers=2) as samples:
    list(samples)
"""


@pytest.mark.parametrize("script", [KILLED_WORKER, UNSENT_BATCH])
def test_worker_that_dies_or_cannot_send_is_a_data_error(script):
    last_line = run_script(script).stderr.splitlines()[-1]
    assert re.search(r"DataError: a loader process died.*--num_workers", last_line)


SMALL = """
import torch
from tool.run.loading import load, load_each
samples = [(torch.full((3, 256, 256), float(k)), torch.tensor([k])) for k in range(24)]
with load(samples, ([k, k + 1] for k in range(0, 24, 2)), 3) as batches:
    assert [label.tolist() for _, label in batches] == [[[k], [k + 1]] for k in range(0, 24, 2)]
with load_each(samples, 3) as loaded:
    assert all(image.eq(k).all() and label == k for k, (image, label) in enumerate(loaded))
"""


@pytest.mark.parametrize(
    ("size", "code", "words"),
    [("1M", 0, ""), ("64k", 1, r"DataError: loader processes cannot start .*No space.*/dev/shm")],
)
def test_little_shared_memory(size, code, words):
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" "$@"'
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"]).returncode:
        pytest.skip("not permitted to mount")
    done = run_script(SMALL, *mounted)
    assert done.returncode == code, done.stderr
    assert re.search(words, done.stderr)


ABANDONED = """
from tool.run.loading import load
with load([0, 1, 2, 3], [[0], [1], [2], [3]], num_workers=2, collate=sum) as batches:
    print(int(next(batches)), flush=True)
    raise KeyError("what was not foreseen")
"""


def test_program_that_fails_does_not_wait_for_its_loader_processes():
    done = run_script(ABANDONED)
    assert (done.returncode, done.stdout) == (1, "0\n")
    assert "KeyError" in done.stderr


def test_shuffled_depends_on_seed_and_epoch_alone():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    orders = [shuffled(50, *key) for key in keys]
    torch.manual_seed(5)
    assert [shuffled(50, *key) for key in reversed(keys)] == orders[::-1]
    assert len({tuple(order) for order in orders}) == len(keys)
    assert list(range(50)) not in orders
    assert repr(sorted(orders[0])) == repr(list(range(50)))  # of Python's integers
