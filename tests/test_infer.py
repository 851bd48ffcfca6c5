"""Inference that is repeated, killed or divided makes the files of one undisturbed run."""

import os
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from forked import at_call, disk_full, run_forked
from helpers import Outcome, contents, run_program

from network import tiny_aff, tiny_cls, tiny_seg
from tool.maps import load_index_png, load_maps
from tool.run import inference
from tool.run.errors import DataError
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
    "seg": f"infer_seg --network network.tiny_seg {DATA} --weights seg.pth --scales 1 0.5 --crf "
    "--out_seg out/seg --out_overlay out/overlay --out_scores out/scores",
}
each_program = pytest.mark.parametrize("name", COMMANDS)

# As in the forked processes: the parts of several threads' sums are rounded otherwise.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """All files that each program writes when nothing happens, by program; their data "folder"."""
    folder = tmp_path_factory.mktemp("data")
    toy.make_devkit(folder / "VOC", IMAGES, 64, 0)
    ids = sorted(path.stem for path in (folder / "VOC" / "JPEGImages").iterdir())
    (folder / "list.txt").write_text("\n".join(ids))
    torch.manual_seed(0)
    torch.save(tiny_cls.Net().state_dict(), folder / "cls.pth")
    torch.save(tiny_aff.Net().state_dict(), folder / "aff.pth")
    torch.save(tiny_seg.Net().state_dict(), folder / "seg.pth")
    results = {"folder": folder}
    for name, command in COMMANDS.items():
        run_program(command, folder).check()
        results[name] = contents(folder / "out")
        if name == "cls":
            shutil.copytree(folder / "out" / "cam", folder / "cam")
        shutil.rmtree(folder / "out")
    return results


@pytest.fixture
def folder(undisturbed, tmp_path):
    """A new one with a devkit, its list, weights of both networks, and CAMs."""
    return shutil.copytree(undisturbed["folder"], tmp_path, dirs_exist_ok=True)


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


def test_overwrite_makes_all_again(finished, undisturbed):
    folder = finished("aff")
    before = stamps(folder)
    outcome = run_program(f"{COMMANDS['aff']} --overwrite", folder).check()
    assert "complete" not in outcome.out
    assert contents(folder / "out") == undisturbed["aff"]
    same = {path.name for path, stamp in stamps(folder).items() if stamp == before[path]}
    assert same == {path.name for path in before if path.name.startswith(".settings")}


def test_other_lists_share_the_folders(folder, undisturbed):
    ids = ids_of(folder)
    for part, repeated in ((ids[:2], 0), (ids[1:4], 1), (ids, 4)):
        (folder / "list.txt").write_text("\n".join(part))
        outcome = run_program(COMMANDS["cls"], folder).check()
        assert (f"{repeated} of {len(part)} images were complete" in outcome.out) == (repeated > 0)
    assert contents(folder / "out") == undisturbed["cls"]


def test_traces_are_made_and_replaced_beside_others_of_the_same_settings(finished, undisturbed):
    folder = finished("aff")
    first, second, *_ = ids_of(folder)
    trace = f"{COMMANDS['aff']} --trace walks"
    outcome = run_program(trace, folder).check()
    assert "5 of 6 images were complete; 1 to do" in outcome.out
    assert contents(folder / "out") == undisturbed["aff"]
    run_program(f"{trace} --trace_ids {second} --overwrite", folder).check()
    assert len(contents(folder / "walks")) == 5  # with the record
    run_program(f"{trace} --beta 2 --overwrite", folder).check()
    pictures = {path.name for path in (folder / "walks").glob("[!.]*")}
    assert pictures == {f"{first}.png", f"{first}.gif"}


# Settings


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("cls", "--low_alpha 8", ("--out_la_crf out/la", "--low_alpha (4 there, 8 here)")),
        ("cls", "--scales 1", ("--out_cam out/cam", "--scales (1 0.5 there, 1 here)")),
        ("cls", "--weights changed.pth", ("--weights (other content)",)),
        ("cls", "--weights none", ("--seed (none there, 0 here), --weights (other content)",)),
        ("cls", "--out_format npz", ("--out_cam out/cam", "--out_format (npy there, npz here)")),
        ("cls", "--out_la_crf out/cam --out_cam new", ("the outputs of infer_cls.py --out_cam",)),
        ("cls", "--amp bf16 --compile", ("--amp (None there, bf16 here), --compile (False",)),
        ("cls", "--out_dtype float16", ("--out_dtype (float32 there, float16 here)",)),
        ("aff", "--beta 4 --exact", ("--beta (8 there, 4 here), --exact (False there, True",)),
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
        ("cls", "--scales 1.0 .5 --low_alpha 4.0 --seed 3 --weights ./moved.pth --num_workers 1"),
        ("aff", "--alpha 16.0 --trace_ids toy_000000 --trace walks --cam_dir ./moved"),
    ],
)
def test_the_same_settings_in_other_words_are_the_same(name, flags, finished, undisturbed):
    folder = finished(name)
    shutil.copy(folder / "cls.pth", folder / "moved.pth")
    shutil.copytree(folder / "cam", folder / "moved")
    run_program(f"{COMMANDS[name]} {flags}", folder).check()
    assert contents(folder / "out") == undisturbed[name]


def test_overwrite_in_another_form_leaves_no_outdated_files(finished):
    folder = finished("cls")
    run_program(f"{COMMANDS['cls']} --out_format npz --overwrite", folder).check()
    for kind in ("cam", "la", "ha"):
        names = {path.name for path in (folder / "out" / kind).glob("[!.]*")}
        assert names == {f"{image_id}.npz" for image_id in ids_of(folder)}


def test_overwrite_of_other_settings_makes_all_images_again_or_none(finished):
    folder = finished("cls")
    ids = ids_of(folder)
    before = contents(folder / "out")
    command = f"{COMMANDS['cls']} --high_alpha 16 --overwrite"
    (folder / "part.txt").write_text("\n".join(ids[:2]))
    outcome = run_program(f"{command} --infer_list part.txt", folder)
    outcome.assert_failed(2, "--out_ha_crf out/ha", f"{ids[2]}.npy", "another folder")
    assert contents(folder / "out") == before
    run_program(command, folder).check()
    after = contents(folder / "out")
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {name for name in after if name.startswith("ha/")}


@pytest.mark.parametrize(
    ("name", "flags"), [("aff", "--beta 4 --out_scores out/scores --trace out/t"), ("seg", "--crf")]
)
def test_overwrite_of_other_settings_replaces_every_kind_of_output(name, flags, folder):
    run_program(f"{COMMANDS[name]} {flags}", folder).check()
    before = contents(folder / "out")
    run_program(f"{COMMANDS[name]} {flags} --seed 1 --weights none --overwrite", folder).check()
    after = contents(folder / "out")
    assert after.keys() == before.keys()
    assert not [path for path in after if ".settings" in path and after[path] == before[path]]


@pytest.mark.parametrize("stranger", ["figure.png", "{}.gif", "notes.gif"])
@pytest.mark.parametrize(("flags", "code"), [("", 0), ("--beta 4", 2)])
def test_overwrite_keeps_pictures_that_the_program_did_not_write(stranger, flags, code, finished):
    folder = finished("aff")
    kept = folder / "out" / "rw" / stranger.format(ids_of(folder)[0])
    kept.write_bytes(b"mine")
    before = contents(folder / "out")
    outcome = run_program(f"{COMMANDS['aff']} --overwrite {flags}", folder)
    assert outcome.code == code
    assert code == 0 or kept.name in outcome.last_line
    assert contents(folder / "out") == before


def test_interrupted_overwrite_continues_without_it(finished, monkeypatch):
    folder = finished("aff")
    # The record, then the second image.
    stop = partial(os.kill, os.getpid(), signal.SIGTERM)
    at_call(os, "replace", 3, stop, monkeypatch.setattr)
    outcome = run_program(f"{COMMANDS['aff']} --beta 2 --overwrite", folder)
    assert outcome.code == 143
    monkeypatch.undo()
    run_program(f"{COMMANDS['aff']} --beta 2", folder).check()
    after = contents(folder / "out")
    shutil.rmtree(folder / "out")
    run_program(f"{COMMANDS['aff']} --beta 2", folder).check()
    assert contents(folder / "out") == after


@pytest.mark.parametrize("record", [None, "{}"])
def test_outputs_without_a_record_are_refused(record, finished):
    folder = finished("aff")
    path = folder / "out" / "rw" / ".settings_of_pictures.json"
    path.unlink()
    if record:
        path.write_text(record)
    before = contents(folder / "out")
    for flags in ("", " --overwrite"):
        outcome = run_program(COMMANDS["aff"] + flags, folder)
        outcome.assert_failed(2, "--out_rw out/rw", "no record", "another folder")
        assert contents(folder / "out") == before


# Killed and stopped


@each_program
def test_killed_again_and_again_and_repeated_gives_the_same_bytes(name, undisturbed, folder, rng):
    # Files that are complete but for their names; records are the first of them.
    renames = rng.integers(2, 9, 3).tolist() if name == "cls" else [3, *rng.integers(1, 4, 2)]
    renames[0] += 4 * (name == "seg")  # it has more records
    run = {"command": COMMANDS[name], "cwd": folder}
    killed = [run | {"signal": "SIGKILL", "at_rename": int(number)} for number in renames]
    ended = [Outcome(*outcome) for (outcome,) in run_forked(*killed, run)]
    assert [outcome.code for outcome in ended] == [-9, -9, -9, 0], renames
    assert "images were complete" in ended[-1].out
    assert finished_files(folder) == undisturbed[name], renames


@pytest.mark.parametrize(("name", "number"), [("cls", signal.SIGTERM), ("aff", signal.SIGINT)])
def test_signal_ends_between_two_images(name, number, folder, undisturbed, monkeypatch):
    files = {"cls": 4, "aff": 1}[name]  # of an image; there are as many records
    # While the second image's last file is written.
    at_call(os, "replace", 3 * files, partial(os.kill, os.getpid(), number), monkeypatch.setattr)
    outcome = run_program(COMMANDS[name], folder)
    assert outcome.code == 128 + number
    sentence = "interrupted: 2 of 6 images are done; the same command continues from there."
    assert outcome.last_line == sentence
    assert "Traceback" not in outcome.err
    assert len(contents(folder / "out")) == 3 * files
    monkeypatch.undo()
    outcome = run_program(COMMANDS[name], folder).check()
    assert "2 of 6 images were complete; 4 to do" in outcome.out
    assert contents(folder / "out") == undisturbed[name]


# Hindered


def spoil(folder):
    """Make the third photograph unreadable; its id, and its bytes before."""
    image_id = ids_of(folder)[2]
    path = folder / "VOC" / "JPEGImages" / f"{image_id}.jpg"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    return image_id, path, before


@pytest.mark.parametrize(("name", "num_workers"), [("cls", 0), ("aff", 1)])
def test_unreadable_image_ends_with_what_is_missing(name, num_workers, folder, undisturbed):
    image_id, path, before = spoil(folder)
    outcome = run_program(f"{COMMANDS[name]} --num_workers {num_workers}", folder)
    words = (f"{image_id}.jpg: not a readable image", "2 of 6 images are done", "--skip_bad")
    outcome.assert_failed(1, *words)
    path.write_bytes(before)
    assert "2 of 6 images were complete" in run_program(COMMANDS[name], folder).check().out
    assert contents(folder / "out") == undisturbed[name]


@pytest.mark.parametrize(("name", "num_workers"), [("cls", 1), ("aff", 0)])
def test_skip_bad_continues_past_it(name, num_workers, folder, undisturbed):
    image_id, path, before = spoil(folder)
    missing = ids_of(folder)[4]
    removed = path.with_stem(missing).rename(folder / "kept.jpg")
    command = f"{COMMANDS[name]} --num_workers {num_workers} --skip_bad"
    outcome = run_program(command, folder)
    words = f"2 of 6 images could not be used and were skipped ({image_id}, {missing})"
    outcome.assert_failed(1, words)
    listed = [line for line in outcome.err.splitlines() if line.startswith("skipped: ")]
    assert [image_id in listed[0], missing in listed[1], len(listed)] == [True, True, 2]
    files = undisturbed[name].items()
    expected = {k: v for k, v in files if image_id not in k and missing not in k}
    assert contents(folder / "out") == expected
    path.write_bytes(before)
    removed.rename(path.with_stem(missing))
    run_program(command, folder).check()
    assert contents(folder / "out") == undisturbed[name]


def test_skip_bad_continues_past_missing_maps_and_labels(folder):
    ids = ids_of(folder)
    (folder / "cam" / f"{ids[1]}.npy").write_bytes(b"no maps")
    outcome = run_program(f"{COMMANDS['aff']} --skip_bad", folder)
    outcome.assert_failed(1, f"1 of 6 images could not be used and were skipped ({ids[1]})")
    (folder / "VOC" / "Annotations" / f"{ids[0]}.xml").unlink()
    outcome = run_program(f"{COMMANDS['cls']} --skip_bad", folder)
    outcome.assert_failed(1, f"1 of 6 images could not be used and were skipped ({ids[0]})")


# Several processes


@pytest.fixture(scope="module")
def processes(undisturbed, tmp_path_factory):
    """All runs of several processes, made at once: (folder, outcomes) by the run's name."""
    folder = tmp_path_factory.mktemp("processes")
    runs = {}

    def plan(run, name, like=None, flags="", **options):
        path = folder / (like or run)
        if not path.exists():
            shutil.copytree(undisturbed["folder"], path)
        runs[run] = {"command": f"{COMMANDS[name]} {flags}", "cwd": path, **options}
        return path

    for name, ranks in (("cls", 3), ("aff", 2), ("seg", 2)):
        plan(f"ranks {name}", name, ranks=ranks)
    plan("copies", "cls", copies=2)
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
    first, *others = [outcome.check() for outcome in outcomes]
    assert contents(folder / "out") == undisturbed[name]
    shared = f"0 of 6 images were complete; 6 to do, shared by {len(outcomes)} processes"
    assert shared in first.out
    assert {outcome.out for outcome in others} == {""}
    share = 6 // len(outcomes)
    assert f"{share}/{share}" in first.err  # the bar of its part of the list


def test_two_runs_into_one_folder_at_once_leave_whole_files(processes, undisturbed):
    folder, outcomes = processes["copies"]
    for outcome in outcomes:
        outcome.check()
    assert contents(folder / "out") == undisturbed["cls"]


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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_readers_take_either_form(dtype, finished):
    folder, half = finished("cls"), dtype == "float16"
    run_program(COMMANDS["aff"], folder).check()
    flags = f"--out_format npz --out_dtype {dtype} --out_cam_pred npz/pred"
    flags += " --out_cam npz/cam --out_la_crf npz/la --out_ha_crf npz/ha"
    run_program(f"{COMMANDS['cls']} {flags}", folder).check()
    run_program(f"{COMMANDS['aff']} --cam_dir npz/cam --out_rw npz/rw", folder).check()
    for image_id in ids_of(folder):
        for kind in ("cam", "la", "ha"):
            plain = load_maps(folder / "out" / kind / f"{image_id}.npy")
            packed = load_maps(folder / "npz" / kind / f"{image_id}.npy")
            assert packed.keys() == plain.keys()
            for k, values in packed.items():
                assert values.dtype == np.float32
                assert np.abs(values - plain[k]).max() <= (2.0**-11 if half else 0)
        labels = [load_index_png(folder / top / "rw" / f"{image_id}.png") for top in ("out", "npz")]
        assert (labels[0] == labels[1]).mean() > (0.99 if half else 0.999999)


def breaks(monkeypatch, owner, method, what, call):
    """On its n-th call, a network's method runs out of memory, or returns NaN."""
    original, calls = getattr(owner, method), []

    def broken(net, *args):
        calls.append(1)
        if len(calls) == call and what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        output = original(net, *args)
        return output * torch.nan if len(calls) == call else output

    monkeypatch.setattr(owner, method, broken)


NETWORKS = {"cls": (tiny_cls.Net, "forward_cam", 2), "aff": (tiny_aff.Net, "forward_features", 1)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("what", "words"), [("memory", "out of memory"), ("nan", "not finite")])
@pytest.mark.parametrize("in_background", [False, True])
def test_image_that_fails_in_the_network_is_never_written(
    name, what, words, in_background, folder, undisturbed, monkeypatch
):
    *owner, calls = NETWORKS[name]  # calls: of an image
    second = ids_of(folder)[1]
    monkeypatch.setitem(inference.WRITES_BEHIND, "cpu", in_background)
    with monkeypatch.context() as patch:
        breaks(patch, *owner, what, call=1 + calls)
        outcome = run_program(f"{COMMANDS[name]} --skip_bad", folder)
    outcome.assert_failed(1, f"1 of 6 images could not be used and were skipped ({second})")
    assert f"skipped: {second}: " in outcome.err
    assert words in outcome.err
    expected = {k: v for k, v in undisturbed[name].items() if second not in k}
    assert contents(folder / "out") == expected
    with monkeypatch.context() as patch:
        breaks(patch, *owner, what, call=1)
        outcome = run_program(COMMANDS[name], folder)
    outcome.assert_failed(1, second, words, "5 of 6 images are done")
    run_program(COMMANDS[name], folder).check()
    assert contents(folder / "out") == undisturbed[name]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(("name", "file"), [("cls", 5), ("cls", 28), ("aff", 4), ("aff", 7)])
def test_full_disk_ends_the_run_and_damages_no_finished_file(
    name, file, in_background, folder, undisturbed, monkeypatch
):
    monkeypatch.setitem(inference.WRITES_BEHIND, "cpu", in_background)
    with monkeypatch.context() as patch:
        at_call(os, "fsync", file, disk_full, patch.setattr)  # the first are of records
        outcome = run_program(COMMANDS[name], folder)
    outcome.assert_failed(1, "No space left on device", "of 6 images are done")
    written = contents(folder / "out")
    assert file - 1 <= len(written) < len(undisturbed[name])
    assert in_background or len(written) == file - 1
    assert written.items() <= undisturbed[name].items()
    run_program(COMMANDS[name], folder).check()
    assert contents(folder / "out") == undisturbed[name]


def test_fp16_that_overflows_names_bf16():
    inference.require_finite(np.ones(3), "a", "fp16")
    with pytest.raises(DataError, match=r"^a: .* not finite; .*--amp bf16"):
        inference.require_finite(torch.tensor([1, torch.inf]), "a", "fp16")


# Switches


def test_bf16_changes_the_maps_by_less_than_two_per_cent(folder):
    run_program(f"{COMMANDS['cls']} --amp bf16", folder).check()
    differences = []
    for image_id in ids_of(folder):
        exact, rounded = (load_maps(folder / top / f"{image_id}.npy") for top in ("cam", "out/cam"))
        assert rounded.keys() == exact.keys()
        differences += [np.abs(rounded[k] - exact[k]).max() / exact[k].max() for k in exact]
    assert 0 < max(differences) < 0.02


@each_program
def test_compile_compiles_what_is_called(name, folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda method: compiled.append(method) or method)
    run_program(f"{COMMANDS[name]} --compile", folder).check()
    names = {"cls": "forward_cam", "aff": "forward_features", "seg": "forward"}
    assert [method.__name__ for method in compiled] == [names[name]]


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


@pytest.mark.parametrize("flags", ["", "--out_format npz --out_dtype float16", "--cam_dir cam"])
def test_warns_before_it_starts_if_the_disk_is_too_small(flags, folder, monkeypatch):
    command = f"{COMMANDS['cls']} {flags}"
    command = command.replace("--weights cls.pth", "") if "cam_dir" in flags else command
    estimates = []
    for free, is_warned in ((10**12, False), (1, True)):
        space = shutil._ntuple_diskusage(free, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, space=space: space)
        result = run_program(f"{command} --overwrite", folder).check()
        assert ("WARNING: the maps need" in result.out) == is_warned
        estimates += [float(text) for text in re.findall(r"about ([\d.e-]+) GB", result.out)]
    files = (path for name in ("cam", "la", "ha") for path in (folder / "out" / name).glob("[!.]*"))
    assert estimates[0] == pytest.approx(sum(path.stat().st_size for path in files) / 1e9, rel=0.4)
