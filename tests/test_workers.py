"""The pool of worker processes, and infer_cls with it: bounded, honest about failures, stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, contents, noise_image, run_program, write_annotation, write_image

import infer_cls
from tool import cli
from tool.errors import DataError
from tool.workers import WorkerPool


def write(name: str, folder: Path, what: str) -> None:
    """What the pools below do. It must be importable: the workers are new processes."""
    if what == "fail":
        raise ArithmeticError("seven")
    if what == "refuse":
        raise DataError(f"{name} is bad.")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    if what == "sleep":
        time.sleep(60)
    (folder / name).write_text(f"{os.getpid()}")


def _pool(num_workers: int) -> WorkerPool:
    return WorkerPool(write, num_workers, "--crf_workers")


def test_without_workers_calls_run_here(tmp_path):
    with _pool(0) as pool:
        pool.submit("one", tmp_path, "write")
        assert (tmp_path / "one").read_text() == str(os.getpid())
        with pytest.raises(ArithmeticError):  # as it is, with its traceback
            pool.submit("two", tmp_path, "fail")


def test_all_calls_return_in_at_most_that_many_processes(tmp_path):
    with _pool(2) as pool:
        for name in "abcdefgh":
            pool.submit(name, tmp_path, "write")
    processes = {path.read_text() for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == set("abcdefgh")
    assert 1 <= len(processes) <= 2
    assert str(os.getpid()) not in processes


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fail", "2007_000032: ArithmeticError: seven .--crf_workers 0 shows where"),
        ("refuse", "2007_000032 is bad."),
        ("die", "2007_000032: its worker process died .exit code -9.*fewer --crf_workers"),
    ],
)
def test_failure_names_what_was_computed_and_keeps_what_is_done(what, words, tmp_path):
    with pytest.raises(DataError, match=words), _pool(1) as pool:
        pool.submit("done", tmp_path, "write")
        pool.submit("2007_000032", tmp_path, what)
        pool.submit("later", tmp_path, "write")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_an_error_of_the_program_stops_the_calls_under_way(tmp_path):
    with pytest.raises(KeyError), _pool(1) as pool:
        pool.submit("asleep", tmp_path, "sleep")
        raise KeyError
    assert not list(tmp_path.iterdir())
    assert not pool._workers[0]._process.is_alive()


def test_signals_to_the_group_leave_a_call_to_the_program(tmp_path):
    with _pool(1) as pool:
        pool.submit("first", tmp_path, "write")  # the worker is ready when it has returned
        pool.submit("second", tmp_path, "signals")
    assert (tmp_path / "second").exists()


# infer_cls

MANY = 200  # more images than are done before a signal comes


@pytest.fixture
def devkit(tmp_path):
    """Many images, and a list of the first three of them."""
    for seed in range(MANY):
        write_image(tmp_path / "VOC", f"{seed:03}", noise_image(160, 200, seed))
        write_annotation(tmp_path / "VOC", f"{seed:03}", ["cat", "dog"])
    (tmp_path / "list.txt").write_text("000\n001\n002")
    return tmp_path


COMMAND = (
    "infer_cls --network network.tiny_cls --weights none --voc12_root VOC --num_workers 0 "
    "--infer_list list.txt --device cpu"
)


@pytest.mark.parametrize(
    ("flags", "images", "cores", "device", "workers"),
    [
        ("", 500, 16, "cpu", 8),
        ("", 500, 64, "cpu", 8),
        ("", 500, 6, "cpu", 3),
        ("", 500, 2, "cpu", 0),  # measured: a worker there makes the run longer
        ("", 15, 16, "cpu", 0),  # done before a worker would be there
        ("--crf_workers 3", 15, 2, "cpu", 3),
        ("--crf_workers 0", 500, 16, "cpu", 0),
        ("--crf_workers 3", 500, 16, "cuda", 0),
        ("--crf_backend pydensecrf", 500, 16, "cuda", 8),  # which knows no GPU
    ],
)
def test_as_many_workers_as_pay(flags, images, cores, device, workers, monkeypatch):
    monkeypatch.setattr(cli, "usable_cores", lambda: cores)
    words = f"--weights none --voc12_root VOC --crf_backend torch {flags}"
    args = infer_cls.get_args_parser().parse_args(words.split())
    assert infer_cls.count_crf_workers(args, images, torch.device(device)) == workers


def test_worker_processes_write_the_same_files(devkit):
    for out, workers in (("here", 0), ("there", 2)):
        outputs = f"--out_cam {out}/cam --out_la_crf {out}/la --out_ha_crf {out}/ha"
        run_program(f"{COMMAND} {outputs} --crf_workers {workers}", devkit).check()
    assert contents(devkit / "here") == contents(devkit / "there")
    assert len(contents(devkit / "here")) == 3 * (3 + 1)  # with a record in each folder


def _first_worker_lives(group: int, _: Path) -> bool:
    """Whether a worker has begun to import what it needs."""
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in _living(group)]
    return any(b"spawn_main" in command for command in commands)


def _third_file_is_there(_: int, folder: Path) -> bool:
    return (folder / "la" / "002.npy").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("moment", "least"), [(_first_worker_lives, 0), (_third_file_is_there, 3)])
def test_interruption_ends_it_with_one_line_and_whole_files(number, moment, least, devkit):
    (devkit / "list.txt").write_text("\n".join(f"{seed:03}" for seed in range(MANY)))
    script, *words = f"{COMMAND} --out_la_crf la --crf_workers 1".split()
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / f"{script}.py", *words],
        cwd=devkit,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, as a terminal's Ctrl-C reaches
    )
    while not moment(process.pid, devkit):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, number)
    if least:
        time.sleep(0.2)
        if process.poll() is None:
            os.killpg(process.pid, number)  # pressed twice
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("interrupted: ")
    written = sorted(path.name for path in (devkit / "la").glob("[!.]*"))
    assert written == [f"{seed:03}.npy" for seed in range(len(written))]
    assert least <= len(written) < MANY
    assert not list((devkit / "la").glob("*.tmp"))
    while _living(process.pid):  # all of them end, or the test's time does
        time.sleep(0.05)


def _living(group: int) -> list[str]:
    """The processes of a group that have not ended, where /proc tells."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, members = path.read_text().rpartition(")")[2].split()[:3]
            if int(members) == group and state != "Z":
                states.append(path.parent.name)
    return states
