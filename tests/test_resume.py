"""A training that was killed or stopped continues, and ends as if nothing had happened."""

import fcntl
import io
import os
import pickle
import shutil

import pytest
import torch
from forked import at_call, disk_full, run_forked
from helpers import TINY_TRAINING, Outcome, contents, run_program, timeless, write_training_data

from tool.run.provenance import digest
from voc12.devkit import read_ids

IMAGES = 15  # 12 to train on
# Two epochs of four steps.
FLAGS = "--max_epoches 2 --log_every 3 --session_name out/run --num_workers 0"
COMMANDS = {name: f"{command} {FLAGS}" for name, command in TINY_TRAINING.items()}
COMMANDS["seg"] = COMMANDS["seg"].replace("--max_epoches 2", "--max_iters 8")
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
    """A new one with the data in it."""
    for entry in data.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """Copies of the data where each program got a signal in step 6, and how they ended."""
    folders = {name: tmp_path_factory.mktemp("stopped") / name for name in COMMANDS}
    signals = {"cls": "SIGTERM", "aff": "SIGINT", "seg": "SIGTERM"}
    outcomes = run_forked(
        *(
            {"command": COMMANDS[name], "cwd": shutil.copytree(data, path), "at_step": 6}
            | {"signal": signals[name]}
            for name, path in folders.items()
        )
    )
    return {
        name: (path, Outcome(*outcome))
        for (name, path), (outcome,) in zip(folders.items(), outcomes, strict=True)
    }


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """What each program writes when nothing happens."""
    results = {}
    for name, command in COMMANDS.items():
        path = shutil.copytree(data, tmp_path_factory.mktemp("undisturbed") / name)
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


@each_program
def test_killed_again_and_again_and_resumed_gives_the_same_bytes(name, undisturbed, folder, rng):
    at_steps = rng.integers([3, 1], [6, 4]).tolist()
    run = {"command": f"{COMMANDS[name]} --save_every 2", "cwd": folder}
    last = run | {"command": f"{COMMANDS[name]} --save_every 100 --num_workers 2"}
    outcomes = run_forked(
        run | {"signal": "SIGKILL", "at_step": at_steps[0]},
        run | {"signal": "SIGKILL", "at_step": at_steps[1]},
        run | {"signal": "SIGKILL", "at_rename": 1},  # of a checkpoint
        last | {"signal": "SIGKILL", "at_rename": 1},  # of the weights
        last,
    )
    ended = [Outcome(*outcome) for (outcome,) in outcomes]
    assert [outcome.code for outcome in ended] == [-9] * 4 + [0], at_steps
    assert "resumed after step " in ended[-1].out
    assert figures(folder) == undisturbed[name], at_steps


# Stopped


@pytest.mark.parametrize(("name", "code"), [("cls", 143), ("aff", 130), ("seg", 143)])
def test_signal_ends_with_one_sentence_and_a_checkpoint(name, code, stopped):
    path, outcome = stopped[name]
    assert outcome.code == code
    assert outcome.last_line.startswith("interrupted: out/run.ckpt holds the run after step 6 of 8")
    assert "Traceback" not in outcome.err
    assert sorted(contents(path / "out")) == ["run.ckpt", "run.csv", "run.log"]


@each_program
def test_same_command_continues(name, stopped, undisturbed, tmp_path):
    path = copy_of(stopped, name, tmp_path)
    outcome = run_program(f"{COMMANDS[name]} --log_every 3 --save_every 4 --num_workers 1", path)
    assert outcome.check().out.startswith("resumed after step 6\n")
    assert figures(path) == undisturbed[name]


def test_signal_in_validation_ends_before_it_is_over(folder, undisturbed, monkeypatch):
    import train_cls

    validated = []

    def stopped_validation(net, dataset, args, device, stop):
        stop.received = 15
        validated.append(validate(net, dataset, args, device, stop))
        return validated[-1]

    validate = train_cls.validate
    monkeypatch.setattr(train_cls, "validate", stopped_validation)
    outcome = run_program(COMMANDS["cls"], folder)
    assert (outcome.code, validated) == (143, [0])
    assert "after step 4 of 8" in outcome.last_line
    monkeypatch.undo()
    run_program(COMMANDS["cls"], folder).check()
    assert figures(folder) == undisturbed["cls"]


def test_resume_never_starts_from_the_beginning(stopped, undisturbed, tmp_path):
    path = copy_of(stopped, "cls", tmp_path)
    outcome = run_program(f"{COMMANDS['cls']} --resume never", path).check()
    assert "resumed" not in outcome.out
    assert figures(path) == undisturbed["cls"]


def test_resume_from_another_place(stopped, undisturbed, folder):
    shutil.copy(stopped["aff"][0] / "out" / "run.ckpt", folder / "kept")
    outcome = run_program(f"{COMMANDS['aff']} --resume kept", folder).check()
    assert outcome.out.startswith("resumed after step 6\n")
    assert figures(folder) == undisturbed["aff"]
    assert (folder / "kept").exists()


def test_ended_and_interrupted_runs_complete_the_files_of_tensorboard(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stopped = f"{COMMANDS['cls']} --tensorboard stopped"
    ended = f"{COMMANDS['cls']} --tensorboard ended --resume never"
    run_forked(
        {"command": stopped, "cwd": folder, "signal": "SIGTERM", "at_step": 6},
        {"command": ended, "cwd": folder},
    )
    for name, steps, epochs in (("stopped", [3, 4, 6], [4]), ("ended", [3, 4, 6, 8], [4, 8])):
        events = reader.EventAccumulator(str(folder / name)).Reload()
        assert [event.step for event in events.Scalars("loss")] == steps
        assert [event.step for event in events.Scalars("validation loss")] == epochs


# Refused


def test_a_session_in_use_is_refused(stopped, tmp_path):
    path = copy_of(stopped, "cls", tmp_path)
    (path / "out" / ".run.ckpt.0123.tmp").write_bytes(b"still growing")
    before = contents(path / "out")
    run = {"command": COMMANDS["cls"], "cwd": path}
    again = run | {"command": f"{COMMANDS['cls']} --resume never"}
    with open(path / "out" / "run.log", "a") as log:
        fcntl.lockf(log, fcntl.LOCK_EX)
        for (outcome,) in run_forked(run, again):
            words = "--session_name out/run: another training is writing out/run.log"
            Outcome(*outcome).assert_failed(2, words)
    assert contents(path / "out") == before
    run_program(COMMANDS["cls"], path).check()


def assert_refused(path, command, *words, code=2):
    """One sentence with the words, and everything stays as it was."""
    before = contents(path / "out")
    run_program(command, path).assert_failed(code, *words)
    assert contents(path / "out") == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr 0.03", "--lr (0.02 there, 0.03 here)"),
        ("--batch_size 2 --seed 1", "--batch_size (3 there, 2 here), --seed (0 there, 1 here)"),
        ("--max_epoches 4", "--max_epoches (2 there, 4 here)"),
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


def test_damaged_checkpoint_is_refused(stopped, tmp_path):
    path = copy_of(stopped, "cls", tmp_path)
    checkpoint = path / "out" / "run.ckpt"
    content, weights = checkpoint.read_bytes(), io.BytesIO()
    torch.save(torch.load(checkpoint)["network"], weights)
    pickled = pickle.dumps(Deadly(), protocol=2)
    for damaged in (content[: len(content) // 2], b"", weights.getvalue(), pickled):
        checkpoint.write_bytes(damaged)
        assert_refused(path, COMMANDS["cls"], "out/run.ckpt: ", "--resume never", code=1)


class Deadly:
    """What would end the process, were it loaded."""

    def __reduce__(self):
        return os._exit, (7,)


def test_full_disk_leaves_the_last_checkpoint(folder, undisturbed, monkeypatch):
    at_call(os, "fsync", 2, disk_full, monkeypatch.setattr)  # of the second checkpoint
    command = f"{COMMANDS['cls']} --save_every 3"
    run_program(command, folder).assert_failed(1, "No space left on device")
    monkeypatch.undo()
    assert sorted(contents(folder / "out")) == ["run.ckpt", "run.csv", "run.log"]
    assert run_program(command, folder).check().out.startswith("resumed after step 3\n")
    assert figures(folder) == undisturbed["cls"]


def test_digests_tell_contents_apart():
    assert digest("a", "b") == digest(b"a", "b")
    assert len({digest("a", "b"), digest("ab"), digest("b", "a"), digest("a", "b", "")}) == 4
