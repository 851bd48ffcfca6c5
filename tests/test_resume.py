"""A training that was killed or stopped continues, and ends as if nothing had happened."""

import errno
import os
import pickle
import shutil
import signal

import pytest
import torch
from forked import run_forked
from helpers import (
    TINY_TRAINING,
    Outcome,
    contents,
    run_program,
    timeless,
    write_training_data,
)

from tool.run.provenance import digest, digest_file, digest_photographs
from voc12.devkit import read_ids

IMAGES = 15  # 12 to train on
EPOCHS = 3  # of four steps
FLAGS = f"--max_epoches {EPOCHS} --log_every 3 --session_name out/run --num_workers 0"
COMMANDS = {name: f"{command} {FLAGS}" for name, command in TINY_TRAINING.items()}
each_program = pytest.mark.parametrize("name", COMMANDS)


# As in the forked processes: the parts of several threads' sums are rounded otherwise.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_training_data(tmp_path_factory.mktemp("data"), IMAGES)
    for kind in ("la", "ha"):
        (folder / kind / ".settings_of_maps.json").write_text(f'{{"origin": "{kind}"}}')
    return folder


@pytest.fixture
def folder(data, tmp_path):
    """``folder(name)``: a new one with the data in it."""

    def make(name: str = "here"):
        path = tmp_path / name
        path.mkdir()
        for entry in data.iterdir():
            (path / entry.name).symlink_to(entry)
        return path

    return make


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """Copies of the data where both programs got SIGTERM in step 6, and how they ended."""
    folders = {name: tmp_path_factory.mktemp("stopped") / name for name in COMMANDS}
    for path in folders.values():
        shutil.copytree(data, path)
    runs = [
        {"command": COMMANDS[name], "cwd": path, "signal": "SIGTERM", "at_step": 6}
        for name, path in folders.items()
    ]
    outcomes = run_forked(*runs)
    return {
        name: (path, Outcome(*outcome))
        for (name, path), (outcome,) in zip(folders.items(), outcomes, strict=True)
    }


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """What both programs write when nothing happens."""
    results = {}
    for name, command in COMMANDS.items():
        path = tmp_path_factory.mktemp("undisturbed") / name
        shutil.copytree(data, path)
        run_program(command, path).check()
        results[name] = figures(path)
    return results


def figures(path):
    """The bytes of all outputs, but the speed and the log's first line and its resumptions."""
    files = timeless(contents(path / "out"))
    log = files["run.log"].splitlines(keepends=True)[1:]
    files["run.log"] = b"".join(line for line in log if not line.startswith(b"resumed"))
    return files


def copy_of(stopped, name, tmp_path):
    return shutil.copytree(stopped[name][0], tmp_path / "copy")


# Killed


def killed_runs(name, path, at_steps):
    """A run killed in some steps and while it writes, each time started again, and the last one."""
    killed = {"command": f"{COMMANDS[name]} --save_every 2", "cwd": path, "signal": "SIGKILL"}
    last = {"command": f"{COMMANDS[name]} --save_every 100 --num_workers 2", "cwd": path}
    return [
        killed | {"at_step": at_steps[0]},
        killed | {"at_step": at_steps[1], "command": f"{killed['command']} --num_workers 1"},
        killed | {"at_step": at_steps[2]},
        killed | {"at_rename": 1},  # of a checkpoint that is complete but for its name
        killed | {"at_rename": 1, "command": last["command"]},  # of the weights
        last,
    ]


def test_killed_again_and_again_and_resumed_gives_the_same_bytes(undisturbed, folder, rng):
    at_steps = {name: rng.integers([3, 1, 1], [7, 5, 5]).tolist() for name in COMMANDS}
    runs = {name: killed_runs(name, folder(name), at_steps[name]) for name in COMMANDS}
    outcomes = iter(run_forked(*runs["cls"], *runs["aff"]))
    for name in COMMANDS:
        ended = [Outcome(*next(outcomes)[0]) for _ in runs[name]]
        assert [outcome.code for outcome in ended] == [-9] * 5 + [0], (name, at_steps)
        assert "resumed after step " in ended[-1].out
        assert figures(runs[name][0]["cwd"]) == undisturbed[name], (name, at_steps)


# Stopped


@each_program
def test_sigterm_ends_with_one_sentence_and_a_checkpoint(name, stopped):
    path, outcome = stopped[name]
    assert outcome.code == 143
    assert outcome.last_line.startswith(
        "interrupted: out/run.ckpt holds the run after step 6 of 12"
    )
    assert "Traceback" not in outcome.err
    assert sorted(contents(path / "out")) == ["run.ckpt", "run.csv", "run.log"]


@each_program
def test_same_command_continues(name, stopped, undisturbed, tmp_path):
    path = copy_of(stopped, name, tmp_path)
    outcome = run_program(f"{COMMANDS[name]} --log_every 3 --save_every 4 --num_workers 1", path)
    assert outcome.check().out.startswith("resumed after step 6\n")
    assert figures(path) == undisturbed[name]


def test_sigint_ends_alike(folder, monkeypatch):
    path = folder()
    step = torch.optim.SGD.step

    def interrupted_step(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted_step)
    outcome = run_program(COMMANDS["cls"], path)
    assert outcome.code == 130
    sentence = "interrupted: out/run.ckpt holds the run after step 1 of 12; the same command "
    assert outcome.last_line.startswith(sentence)
    assert (path / "out" / "run.ckpt").exists()


def test_signal_in_validation_ends_before_it_is_over(folder, undisturbed, monkeypatch):
    import train_cls

    path, validated = folder(), []

    def stopped_validation(net, dataset, args, device, stop):
        stop.received = 15
        validated.append(validate(net, dataset, args, device, stop))
        return validated[-1]

    validate = train_cls.validate
    monkeypatch.setattr(train_cls, "validate", stopped_validation)
    outcome = run_program(COMMANDS["cls"], path)
    assert (outcome.code, validated) == (143, [0])
    assert "after step 4 of 12" in outcome.last_line
    monkeypatch.undo()
    run_program(COMMANDS["cls"], path).check()
    assert figures(path) == undisturbed["cls"]


@each_program
def test_resume_never_starts_from_the_beginning(name, stopped, undisturbed, tmp_path):
    path = copy_of(stopped, name, tmp_path)
    outcome = run_program(f"{COMMANDS[name]} --resume never", path).check()
    assert "resumed" not in outcome.out
    assert figures(path) == undisturbed[name]


def test_resume_from_another_place(stopped, undisturbed, folder, tmp_path):
    path = folder()
    shutil.copy(stopped["aff"][0] / "out" / "run.ckpt", tmp_path / "kept")
    run_program(f"{COMMANDS['aff']} --resume {tmp_path / 'kept'}", path).check()
    assert figures(path) == undisturbed["aff"]
    assert (tmp_path / "kept").exists()


# Refused


def assert_refused(path, command, *words):
    """One sentence with the words, and everything stays as it was."""
    before = contents(path / "out")
    run_program(command, path).assert_failed(1, *words)
    assert contents(path / "out") == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr 0.03", "--lr (0.02 there, 0.03 here)"),
        ("--batch_size 2 --seed 1", "--batch_size (3 there, 2 here), --seed (0 there, 1 here)"),
        ("--crop_size 72", "--crop_size (64 there, 72 here)"),
        ("--max_epoches 4", "--max_epoches (3 there, 4 here)"),
        ("--momentum 0", "--momentum (0.9 there, 0 here)"),
        ("--amp bf16", "--amp (None there, bf16 here)"),
        ("--val_list lists/train.txt", "--val_list (other content)"),
        ("--weights out/start.pth", "--weights (other content)"),
    ],
)
def test_settings_that_differ_are_named(flags, words, stopped, tmp_path):
    path = copy_of(stopped, "cls", tmp_path)
    torch.save(torch.load(path / "out/run.ckpt")["network"], path / "out" / "start.pth")
    command = f"{COMMANDS['cls']} {flags}"
    assert_refused(path, command, "out/run.ckpt: ", words, "--resume never")


def test_data_that_changed_is_named(stopped, tmp_path):
    path = copy_of(stopped, "aff", tmp_path)
    ids = read_ids(path / "lists" / "train.txt")
    (path / "lists" / "train.txt").write_text("\n".join(reversed(ids)))
    assert_refused(path, COMMANDS["aff"], "--train_list (other content)")
    (path / "lists" / "train.txt").write_text("\n".join(ids))  # the same in other words
    last = path / "VOC" / "JPEGImages" / f"{ids[-1]}.jpg"
    before = last.read_bytes()
    last.write_bytes(before + b" ")
    assert_refused(path, COMMANDS["aff"], "settings: --voc12_root (other content);")
    last.write_bytes(before)
    # A folder of maps counts by its record.
    for kind in ("la", "ha"):
        (path / kind / ".settings_of_maps.json").write_text("{}")
    words = "settings: --ha_crf_dir (other content), --la_crf_dir (other content);"
    assert_refused(path, COMMANDS["aff"], words)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "weights", "pickle"])
def test_damaged_checkpoint_is_refused(damage, stopped, tmp_path):
    path = copy_of(stopped, "cls", tmp_path)
    checkpoint = path / "out" / "run.ckpt"
    content = checkpoint.read_bytes()
    if damage == "weights":
        torch.save(torch.load(checkpoint)["network"], checkpoint)
    else:
        checkpoint.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "garbage": b"no checkpoint " * 100,
                "empty": b"",
                "pickle": pickle.dumps(Deadly(), protocol=2),
            }[damage]
        )
    assert_refused(path, COMMANDS["cls"], "out/run.ckpt: ", "--resume never")


class Deadly:
    """What would end the process, were it loaded."""

    def __reduce__(self):
        return os._exit, (7,)


def test_full_disk_leaves_the_last_checkpoint(folder, undisturbed, monkeypatch):
    path, sync, written = folder(), os.fsync, []

    def full(descriptor):
        sync(descriptor)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append((path / "out" / "run.log").read_bytes())

    monkeypatch.setattr(os, "fsync", full)
    run_program(COMMANDS["cls"], path).assert_failed(1, "No space left on device")
    monkeypatch.undo()
    assert sorted(contents(path / "out")) == ["run.ckpt", "run.csv", "run.log"]
    outcome = run_program(COMMANDS["cls"], path).check()
    assert outcome.out.startswith("resumed after step 4\n")
    assert figures(path) == undisturbed["cls"]


# Digests


def test_digests_tell_contents_apart():
    assert digest("a", "b") == digest(b"a", "b")
    assert len({digest("a", "b"), digest("ab"), digest("b", "a"), digest("a", "b", "")}) == 4


def test_digests_of_files_do_not_depend_on_their_folder(tmp_path):
    def write(folder, *texts):
        paths = [tmp_path / folder / f"{number}.txt" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return paths

    first, same = write("a", "one", "two"), write("b", "one", "two")
    others = [write("c", "ones", "two"), write("d", "one", "three"), write("e", "one")]
    assert digest_photographs(first) == digest_photographs(same)
    assert len({digest_photographs(paths) for paths in (first, *others)}) == 4
    assert digest_file(first[0]) == digest_file(same[0]) != digest_file(first[1])
