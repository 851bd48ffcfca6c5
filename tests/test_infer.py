"""Inference that is repeated, killed or divided makes the files of one undisturbed run."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from forked import run_forked
from helpers import Outcome, contents, noise_image, run_program

from network import tiny_aff, tiny_cls
from tool.maps import load_index_png, load_maps
from voc12 import toy
from voc12.devkit import read_ids

IMAGES = 6
DATA = "--voc12_root VOC --num_workers 0 --infer_list list.txt --device cpu"
COMMANDS = {
    "cls": f"infer_cls --network network.tiny_cls {DATA} --weights cls.pth "
    "--scales 1 0.5 --out_cam out/cam --out_la_crf out/la --out_ha_crf out/ha "
    "--out_cam_pred out/pred",
    "aff": f"infer_aff --network network.tiny_aff {DATA} --weights aff.pth --logt 4 --cam_dir cam "
    "--out_rw out/rw",
}
each_program = pytest.mark.parametrize("name", COMMANDS)
CPU = torch.device("cpu")
IMAGE = noise_image(96, 128)

# As in the forked processes: the parts of several threads' sums are rounded otherwise.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A devkit, its list, weights of both networks, and the CAMs that those of the first give."""
    folder = tmp_path_factory.mktemp("data")
    toy.make_devkit(folder / "VOC", IMAGES, 64, 0)
    ids = sorted(path.stem for path in (folder / "VOC" / "JPEGImages").iterdir())
    (folder / "list.txt").write_text("\n".join(ids))
    torch.manual_seed(0)
    torch.save(tiny_cls.Net().state_dict(), folder / "cls.pth")
    torch.save(tiny_aff.Net().state_dict(), folder / "aff.pth")
    run_program(COMMANDS["cls"], folder).check()
    (folder / "out" / "cam").rename(folder / "cam")
    shutil.rmtree(folder / "out")
    return folder


@pytest.fixture
def folder(data, tmp_path):
    """A new one with the data in it."""
    for entry in data.iterdir():
        if entry.is_dir():
            shutil.copytree(entry, tmp_path / entry.name)
        else:
            shutil.copy(entry, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """All files that both programs write when nothing happens, by program."""
    results = {}
    for name, command in COMMANDS.items():
        path = tmp_path_factory.mktemp("undisturbed") / name
        shutil.copytree(data, path)
        run_program(command, path).check()
        results[name] = contents(path / "out")
    return results


@pytest.fixture
def finished(undisturbed, folder):
    """``finished(name)``: the folder after an undisturbed run."""

    def make(name):
        for path, content in undisturbed[name].items():
            (folder / "out" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "out" / path).write_bytes(content)
        return folder

    return make


def ids_of(folder):
    return read_ids(folder / "list.txt")


def finished_files(folder):
    """The outputs, without what a killed process left unfinished."""
    return {k: v for k, v in contents(folder / "out").items() if not k.endswith(".tmp")}


def stamps(folder):
    """When each output was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.*")}


def at_call(monkeypatch, function, number, act):
    """Call ``act`` before the n-th call of a function of ``os``."""
    original, calls = getattr(os, function), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(os, function, counted)


# Skipping


@each_program
def test_complete_images_are_skipped(name, finished):
    folder = finished(name)
    before = stamps(folder)
    outcome = run_program(COMMANDS[name], folder).check()
    assert "6 of 6 images were complete; 0 to do" in outcome.out
    assert stamps(folder) == before


def test_an_image_lacking_one_file_is_done_again(finished, undisturbed):
    folder = finished("cls")
    before = stamps(folder)
    image_id = ids_of(folder)[2]
    (folder / "out" / "ha" / f"{image_id}.npy").unlink()
    outcome = run_program(COMMANDS["cls"], folder).check()
    assert "5 of 6 images were complete; 1 to do" in outcome.out
    assert contents(folder / "out") == undisturbed["cls"]
    changed = {path.stem for path, stamp in stamps(folder).items() if stamp != before[path]}
    assert changed == {image_id}


@each_program
def test_overwrite_makes_all_again(name, finished, undisturbed):
    folder = finished(name)
    before = stamps(folder)
    outcome = run_program(f"{COMMANDS[name]} --overwrite", folder).check()
    assert "complete" not in outcome.out
    assert contents(folder / "out") == undisturbed[name]
    same = {path.name for path, stamp in stamps(folder).items() if stamp == before[path]}
    assert same == {path.name for path in before if path.name.startswith(".settings")}


def test_other_lists_share_the_folders(folder, undisturbed):
    ids = ids_of(folder)
    for part, repeated in ((ids[:2], 0), (ids[1:4], 1), (ids, 4)):
        (folder / "list.txt").write_text("\n".join(part))
        outcome = run_program(COMMANDS["cls"], folder).check()
        assert (f"{repeated} of {len(part)} images were complete" in outcome.out) == (repeated > 0)
    assert contents(folder / "out") == undisturbed["cls"]


def test_missing_pictures_of_the_walk_are_made(finished, undisturbed):
    folder = finished("aff")
    first = ids_of(folder)[0]
    outcome = run_program(f"{COMMANDS['aff']} --trace walks", folder).check()
    assert "5 of 6 images were complete; 1 to do" in outcome.out
    assert contents(folder / "out") == undisturbed["aff"]
    assert {path.name for path in (folder / "walks").glob("[!.]*")} == {
        f"{first}.png",
        f"{first}.gif",
    }


# Settings


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("cls", "--low_alpha 8", ("--out_la_crf out/la", "--low_alpha (4 there, 8 here)")),
        ("cls", "--scales 1", ("--out_cam out/cam", "--scales (1 0.5 there, 1 here)")),
        ("cls", "--weights changed.pth", ("--weights (other content)",)),
        ("cls", "--weights none", ("--seed (none there, 0 here), --weights (other content)",)),
        ("cls", "--amp bf16", ("--amp (None there, bf16 here)",)),
        ("cls", "--out_format npz", ("--out_cam out/cam", "--out_format (npy there, npz here)")),
        ("cls", "--out_dtype float16", ("--out_dtype (float32 there, float16 here)",)),
        ("cls", "--out_la_crf out/cam --out_cam new", ("the outputs of infer_cls.py --out_cam",)),
        (
            "aff",
            "--beta 4 --exact",
            ("--beta (8 there, 4 here), --exact (False there, True here)",),
        ),
        ("aff", "--cam_dir moved", ("--out_rw out/rw", "--cam_dir (other content)")),
    ],
)
def test_outputs_of_other_settings_are_refused(name, flags, words, finished):
    folder = finished(name)
    state = torch.load(folder / "cls.pth", weights_only=True)
    state["fc8.weight"] = state["fc8.weight"] * 2
    torch.save(state, folder / "changed.pth")
    shutil.copytree(folder / "cam", folder / "moved")
    record = folder / "moved" / ".settings_of_maps.json"
    record.write_text(record.read_text().replace("float32", "float16"))
    before = contents(folder / "out")
    outcome = run_program(f"{COMMANDS[name]} {flags}", folder)
    outcome.assert_failed(2, *words, "--overwrite", "another folder")
    assert contents(folder / "out") == before
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("cls", "--scales 1.0 .5 --low_alpha 4.0 --seed 3 --weights ./moved.pth"),
        ("cls", "--num_workers 1 --crf_backend torch"),
        ("aff", "--alpha 16.0 --trace_ids toy_000000 --trace walks --cam_dir ./moved"),
    ],
)
def test_the_same_settings_in_other_words_are_the_same(name, flags, finished, undisturbed):
    folder = finished(name)
    shutil.copy(folder / "cls.pth", folder / "moved.pth")
    shutil.copytree(folder / "cam", folder / "moved")
    run_program(f"{COMMANDS[name]} {flags}", folder).check()
    assert contents(folder / "out") == undisturbed[name]


def test_overwrite_makes_outputs_of_other_settings_again(finished):
    folder = finished("cls")
    before = contents(folder / "out")
    run_program(f"{COMMANDS['cls']} --high_alpha 16 --overwrite", folder).check()
    after = contents(folder / "out")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {
        name for name in after if name.startswith("ha/")
    }


def test_overwrite_does_not_touch_other_images_of_other_settings(finished):
    folder = finished("cls")
    ids = ids_of(folder)
    before = contents(folder / "out")
    (folder / "list.txt").write_text("\n".join(ids[:2]))
    outcome = run_program(f"{COMMANDS['cls']} --high_alpha 16 --overwrite", folder)
    outcome.assert_failed(2, "--out_ha_crf out/ha", f"{ids[2]}.npy", "another folder")
    assert contents(folder / "out") == before


def test_interrupted_overwrite_continues_without_it(finished, monkeypatch):
    folder = finished("aff")
    # The record, then the second image.
    at_call(monkeypatch, "replace", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run_program(f"{COMMANDS['aff']} --beta 2 --overwrite", folder)
    assert outcome.code == 143
    monkeypatch.undo()
    run_program(f"{COMMANDS['aff']} --beta 2", folder).check()
    after = contents(folder / "out")
    shutil.rmtree(folder / "out")
    run_program(f"{COMMANDS['aff']} --beta 2", folder).check()
    assert contents(folder / "out") == after


@pytest.mark.parametrize("record", [None, "", "{}"])
def test_outputs_without_a_record_are_refused(record, finished):
    folder = finished("aff")
    path = folder / "out" / "rw" / ".settings_of_pictures.json"
    if record is None:
        path.unlink()
    else:
        path.write_text(record)
    before = contents(folder / "out")
    for flags in ("", " --overwrite"):
        outcome = run_program(COMMANDS["aff"] + flags, folder)
        outcome.assert_failed(2, "--out_rw out/rw", "no record", "another folder")
        assert contents(folder / "out") == before


def test_record_names_what_decides_the_outputs(undisturbed):
    record = json.loads(undisturbed["cls"]["la/.settings_of_maps.json"])
    assert record["origin"] == "infer_cls.py --out_la_crf"
    assert record["settings"].pop("weights").startswith("content ")
    assert record["settings"].pop("classes").startswith("content ")
    assert record["settings"] == {
        "network": "network.tiny_cls",
        "scales": "1 0.5",
        "low_alpha": "4",
        "amp": "None",
        "tf32": "False",
        "compile": "False",
        "out_format": "npy",
        "out_dtype": "float32",
    }


# Killed and stopped


def test_killed_again_and_again_and_repeated_gives_the_same_bytes(undisturbed, data, tmp_path, rng):
    # Files that are complete but for their names; records are the first of them.
    renames = {"cls": rng.integers(2, 9, 3).tolist(), "aff": [3, *rng.integers(1, 4, 2).tolist()]}
    runs = []
    for name, command in COMMANDS.items():
        path = shutil.copytree(data, tmp_path / name)
        run = {"command": command, "cwd": path}
        runs += [run | {"signal": "SIGKILL", "at_rename": number} for number in renames[name]]
        runs.append(run)
    outcomes = [Outcome(*outcome) for (outcome,) in run_forked(*runs)]
    for name, ended in zip(COMMANDS, (outcomes[:4], outcomes[4:]), strict=True):
        assert [outcome.code for outcome in ended] == [-9, -9, -9, 0], renames
        assert "images were complete" in ended[-1].out
        assert finished_files(tmp_path / name) == undisturbed[name], renames


@pytest.mark.parametrize(
    ("name", "number", "code"), [("cls", signal.SIGTERM, 143), ("aff", signal.SIGINT, 130)]
)
def test_signal_ends_between_two_images(name, number, code, folder, undisturbed, monkeypatch):
    records = 4 if name == "cls" else 1
    files = 4 if name == "cls" else 1
    at_call(
        monkeypatch, "replace", records + 2 * files, lambda: os.kill(os.getpid(), number)
    )  # the last file of the second image
    outcome = run_program(COMMANDS[name], folder)
    assert outcome.code == code
    assert outcome.last_line == (
        "interrupted: 2 of 6 images are done; the same command continues from there."
    )
    assert "Traceback" not in outcome.err
    assert len(contents(folder / "out")) == records + 2 * files
    monkeypatch.undo()
    outcome = run_program(COMMANDS[name], folder).check()
    assert "2 of 6 images were complete; 4 to do" in outcome.out
    assert contents(folder / "out") == undisturbed[name]


def test_second_interrupt_ends_at_once(folder, undisturbed, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_call(monkeypatch, "replace", 4 + 4 + 2, twice)  # the second image's first CRF scores
    outcome = run_program(COMMANDS["cls"], folder)
    assert (outcome.code, outcome.last_line) == (130, "interrupted: finished files are kept.")
    assert "Traceback" not in outcome.err
    partial = contents(folder / "out")
    assert len(partial) == 4 + 4 + 1
    assert partial.items() <= undisturbed["cls"].items()


# Hindered


def spoil(folder):
    """Make the third photograph unreadable; its id, and its bytes before."""
    image_id = ids_of(folder)[2]
    path = folder / "VOC" / "JPEGImages" / f"{image_id}.jpg"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    return image_id, path, before


@pytest.mark.parametrize("num_workers", [0, 1])
@each_program
def test_unreadable_image_ends_with_what_is_missing(name, num_workers, folder, undisturbed):
    image_id, path, before = spoil(folder)
    outcome = run_program(f"{COMMANDS[name]} --num_workers {num_workers}", folder)
    words = (f"{image_id}.jpg: not a readable image", "2 of 6 images are done", "--skip_bad")
    outcome.assert_failed(1, *words)
    path.write_bytes(before)
    assert "2 of 6 images were complete" in run_program(COMMANDS[name], folder).check().out
    assert contents(folder / "out") == undisturbed[name]


@pytest.mark.parametrize("num_workers", [0, 1])
@each_program
def test_skip_bad_continues_past_it(name, num_workers, folder, undisturbed):
    image_id, path, before = spoil(folder)
    missing = ids_of(folder)[4]
    (folder / "VOC" / "JPEGImages" / f"{missing}.jpg").rename(folder / "kept.jpg")
    outcome = run_program(f"{COMMANDS[name]} --num_workers {num_workers} --skip_bad", folder)
    outcome.assert_failed(
        1, f"2 of 6 images could not be used and were skipped ({image_id}, {missing})"
    )
    listed = [line for line in outcome.err.splitlines() if line.startswith("skipped: ")]
    assert [image_id in listed[0], missing in listed[1], len(listed)] == [True, True, 2]
    expected = {
        path: content
        for path, content in undisturbed[name].items()
        if image_id not in path and missing not in path
    }
    assert contents(folder / "out") == expected
    path.write_bytes(before)
    (folder / "kept.jpg").rename(folder / "VOC" / "JPEGImages" / f"{missing}.jpg")
    run_program(f"{COMMANDS[name]} --skip_bad", folder).check()
    assert contents(folder / "out") == undisturbed[name]


def test_skip_bad_continues_past_missing_maps_and_labels(folder):
    ids = ids_of(folder)
    (folder / "cam" / f"{ids[1]}.npy").write_bytes(b"no maps")
    outcome = run_program(f"{COMMANDS['aff']} --skip_bad", folder)
    outcome.assert_failed(1, f"1 of 6 images could not be used and were skipped ({ids[1]})")
    (folder / "VOC" / "Annotations" / f"{ids[0]}.xml").unlink()
    outcome = run_program(f"{COMMANDS['cls']} --skip_bad", folder)
    outcome.assert_failed(1, f"1 of 6 images could not be used and were skipped ({ids[0]})")


@pytest.mark.parametrize(("name", "file"), [("cls", 1), ("cls", 7), ("aff", 7)])
def test_full_disk_damages_no_finished_file(name, file, folder, undisturbed, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_call(monkeypatch, "fsync", file, full)  # the first are of records
    outcome = run_program(COMMANDS[name], folder)
    monkeypatch.undo()
    outcome.assert_failed(1, "No space left on device")
    written = contents(folder / "out")
    assert len(written) == file - 1
    assert written.items() <= undisturbed[name].items()
    if file > 1:
        assert f"{0 if name == 'cls' else 5} of 6 images are done" in outcome.last_line
    run_program(COMMANDS[name], folder).check()
    assert contents(folder / "out") == undisturbed[name]


# Several processes


@pytest.fixture(scope="module")
def processes(data, tmp_path_factory):
    """All runs of several processes, made at once: (folder, outcomes) by the run's name."""
    folder = tmp_path_factory.mktemp("processes")
    runs = {}

    def plan(run, name, like=None, flags="", **options):
        path = folder / (like or run)
        if not path.exists():
            shutil.copytree(data, path)
        runs[run] = {"command": f"{COMMANDS[name]} {flags}", "cwd": path, **options}
        return path

    for name in COMMANDS:
        plan(f"ranks {name}", name, ranks=3)
        plan(f"copies {name}", name, copies=2)
    plan("lost", "cls", ranks=3, signal="SIGKILL", at_rank=1, at_rename=2)
    plan("found", "cls", ranks=2, like="lost")
    spoil(plan("bad", "aff", flags="--skip_bad", ranks=2))
    outcomes = run_forked(*runs.values())
    return {
        run: (options["cwd"], [Outcome(*outcome) for outcome in ended])
        for (run, options), ended in zip(runs.items(), outcomes, strict=True)
    }


@each_program
def test_ranks_share_the_images_out(name, processes, undisturbed):
    folder, outcomes = processes[f"ranks {name}"]
    assert [outcome.check().code for outcome in outcomes] == [0, 0, 0]
    assert contents(folder / "out") == undisturbed[name]
    assert "0 of 6 images were complete; 6 to do, shared by 3 processes" in outcomes[0].out
    assert [outcome.out for outcome in outcomes[1:]] == ["", ""]
    assert "2/2" in outcomes[0].err  # the bar of a third of the list


@each_program
def test_two_runs_into_one_folder_at_once_leave_whole_files(name, processes, undisturbed):
    folder, outcomes = processes[f"copies {name}"]
    assert [outcome.check().code for outcome in outcomes] == [0, 0]
    assert contents(folder / "out") == undisturbed[name]


def test_lost_rank_costs_its_images_only(processes, undisturbed):
    folder, outcomes = processes["lost"]
    assert outcomes[1].code == -9
    for outcome in (outcomes[0], outcomes[2]):
        outcome.assert_failed(1, "has lost the others")
    _, (found, _) = processes["found"]
    assert "4 of 6 images were complete; 2 to do, shared by 2 processes" in found.check().out
    assert finished_files(folder) == undisturbed["cls"]


def test_ranks_report_bad_images_together(processes, undisturbed):
    folder, outcomes = processes["bad"]
    image_id = ids_of(folder)[2]
    outcomes[0].assert_failed(1, f"1 of 6 images could not be used and were skipped ({image_id})")
    assert outcomes[1].code == 0
    assert len(contents(folder / "out")) == len(undisturbed["aff"]) - 1


# Forms of maps


@pytest.mark.parametrize("flags", ["--out_format npz", "--out_format npz --out_dtype float16"])
def test_readers_take_either_form(flags, finished, undisturbed):
    folder = finished("cls")
    run_program(COMMANDS["aff"], folder).check()
    flags += " --out_cam npz/cam --out_la_crf npz/la --out_ha_crf npz/ha"
    run_program(f"{COMMANDS['cls']} {flags} --out_cam_pred npz/pred", folder).check()
    for image_id in ids_of(folder):
        for kind in ("cam", "la", "ha"):
            plain = load_maps(folder / "out" / kind / f"{image_id}.npy")
            packed = load_maps(folder / "npz" / kind / f"{image_id}.npy")
            assert packed.keys() == plain.keys()
            for k, values in packed.items():
                assert values.dtype == np.float32
                largest = 2.0**-11 if "float16" in flags else 0
                assert np.abs(values - plain[k]).max() <= largest
    run_program(f"{COMMANDS['aff']} --cam_dir npz/cam --out_rw npz/rw", folder).check()
    for image_id in ids_of(folder):
        labels = [load_index_png(folder / top / "rw" / f"{image_id}.png") for top in ("out", "npz")]
        assert (labels[0] == labels[1]).mean() > (0.99 if "float16" in flags else 0.999999)
    logs = []
    for top, cams in (("out", "cam"), ("npz", "npz/cam")):
        outcome = run_program(
            f"voc12.evaluate --voc12_root VOC --list list.txt --cam {cams} --json {top}.json",
            folder,
        ).check()
        assert "6 images" in outcome.out
        logs.append(json.loads((folder / f"{top}.json").read_text())["miou"])
        run_program(
            f"train_aff --network network.tiny_aff --voc12_root VOC --weights none --num_workers 0 "
            f"--train_list list.txt --batch_size 3 --max_epoches 1 --lr 0.01 --crop_size 72 "
            f"--la_crf_dir {top}/la --ha_crf_dir {top}/ha --session_name {top}_aff --device cpu",
            folder,
        ).check()
    assert logs[1] == pytest.approx(logs[0], abs=0.5 if "float16" in flags else 1e-9)
    if "float16" not in flags:
        assert (folder / "out_aff.pth").read_bytes() == (folder / "npz_aff.pth").read_bytes()


def test_out_of_memory_names_the_image(folder, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny_cls.Net, "forward_cam", fail)
    outcome = run_program(COMMANDS["cls"], folder)
    outcome.assert_failed(1, f"{ids_of(folder)[0]}: out of memory", "0 of 6 images are done")


# Switches


def relative_difference(actual, expected):
    return max(np.abs(actual[k] - expected[k]).max() / expected[k].max() for k in expected)


def test_bf16_changes_the_maps_by_less_than_two_per_cent(folder, undisturbed):
    run_program(f"{COMMANDS['cls']} --amp bf16", folder).check()
    ids, differences = ids_of(folder), []
    for image_id in ids:
        exact, rounded = (load_maps(folder / top / f"{image_id}.npy") for top in ("cam", "out/cam"))
        assert rounded.keys() == exact.keys()
        differences.append(relative_difference(rounded, exact))
    assert 0 < max(differences) < 0.02


@each_program
def test_compile_compiles_what_is_called(name, folder, monkeypatch):
    compiled = []

    def note(method):
        compiled.append(method.__name__)
        return method

    monkeypatch.setattr(torch, "compile", note)
    run_program(f"{COMMANDS[name]} --compile", folder).check()
    assert compiled == [{"cls": "forward_cam", "aff": "forward_features"}[name]]


# Files that nobody would finish


def test_old_unfinished_files_are_removed(folder, undisturbed):
    rw = folder / "out" / "rw"
    rw.mkdir(parents=True)
    for name in (".a.png.0123.tmp", ".b.png.4567.tmp"):
        (rw / name).write_bytes(b"half")
    os.utime(rw / ".a.png.0123.tmp", (0, 0))
    run_program(COMMANDS["aff"], folder).check()
    # The other one may still be growing.
    expected = undisturbed["aff"] | {"rw/.b.png.4567.tmp": b"half"}
    assert contents(folder / "out") == expected
