"""The programs in a row: which commands run, in which order, and what comes of them."""

import importlib
import itertools
import json
import os
import re
import signal
import threading
import time

import pytest
from helpers import run_program

from tool import pipeline
from tool.run.errors import Interrupted
from voc12 import toy
from voc12.devkit import read_ids

PIPELINE = "tool.pipeline --voc12_root VOC --out_dir out --num_workers 0 --network"
VGG = "vgg16 --weights W.pth"
QUICK = (
    "tiny --weights none "
    "--train_cls_args '--max_epoches 1 --batch_size 4 --crop_size 64 --resize_long 48 80' "
    "--infer_cls_args '--scales 1' --infer_aff_args '--logt 2' "
    "--train_aff_args '--max_epoches 1 --batch_size 4 --crop_size 72' "
    "--train_seg_args '--max_iters 10 --batch_size 4 --crop_size 64' --infer_seg_args '--scales 1'"
)
ORDER = [
    *("prepare", "train_cls", "infer_cls", "infer_cls", "train_aff", *["infer_aff"] * 3),
    *("train_seg", "infer_seg", *["evaluate"] * 6),
]


def stages_in(out):
    """Of the commands that were printed to be copied."""
    return re.findall(r"^\$ python3 (?:-m voc12\.|\S*/)?(\w+)", out, re.MULTILINE)


def module_and_flags(stage, words):
    return (words[1], words[2:]) if words[0] == "-m" else (stage, words[1:])


# One real run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a pipeline that has run over a toy devkit in this process, and its output."""
    folder = tmp_path_factory.mktemp("pipeline")
    toy.make_devkit(folder / "VOC", 6, 64, 0)

    def run_here(stage, words):
        module, flags = module_and_flags(stage, words)
        run_program(" ".join([module, *flags]), folder).check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run", run_here)
        patch.setattr(pipeline, "require_flags", lambda *_: None)  # starts a process for each
        return folder, run_program(f"{PIPELINE} {QUICK}", folder).check().out


def test_from_a_devkit_to_a_scored_result(finished):
    folder, printed = finished
    out = folder / "out"
    assert stages_in(printed) == ORDER
    results = json.loads((out / "results.json").read_text())
    scored = [
        *itertools.product(("cam", "rw"), ("train", "val")),
        ("rw_crf", "train"),
        ("seg", "val"),
    ]
    for kind, split in scored:
        figures = results[kind][split]
        images = len(read_ids(out / "lists" / f"{split}.txt"))
        assert (figures["images"], figures["missing"], figures["published"]) == (images, 0, None)
        assert 0 < figures["miou"] < 100
    markdown = (out / "results.md").read_text()
    assert markdown in printed
    assert f"| CAM | train | {results['cam']['train']['miou']:.1f} | 5 | - | - |" in markdown


def test_a_repeated_command_skips_trainings_that_are_complete(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(pipeline, "require_flags", lambda *_: None)
    again = run_program(f"{PIPELINE} {QUICK} --dry_run --num_workers 1", folder).check().out
    assert stages_in(again) == [name for name in ORDER if not name.startswith("train")]
    assert "out/cls.pth is complete; --from train_cls trains again" in again
    assert "warning" not in again
    other = run_program(f"{PIPELINE} {QUICK} --dry_run --seed 5", folder).check().out
    assert other.count("# warning: it was made by another command: ") == 3


def test_processes_run_in_order_until_one_fails_and_is_named(finished):
    folder, _ = finished
    (folder / "out" / "lists" / "train.txt").unlink()
    flags = "tiny --weights none --infer_aff_args '--logt 3' --stages prepare infer_aff evaluate"
    outcome = run_program(f"{PIPELINE} {flags}", folder)
    outcome.assert_failed(1, "infer_aff", "exit code 2", "--from infer_aff")
    assert stages_in(outcome.out) == ["prepare", "infer_aff"]
    assert (folder / "out" / "lists" / "train.txt").exists()


# What would be run, without running it


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """``plan(flags)``: (stage, its parsed arguments) of what a pipeline runs, pretending to."""
    commands = []

    def pretend(stage, words):
        module, flags = module_and_flags(stage, words)
        args = importlib.import_module(module).get_args_parser().parse_args(flags)
        commands.append((stage, args))
        if stage == "evaluate":
            figures = {"miou": float(len(commands)), "images": 5, "missing": 0}
            (tmp_path / args.json).write_text(json.dumps(figures))

    def planned(flags):
        commands.clear()
        planned.out = run_program(f"{PIPELINE} {flags}", tmp_path).check().out
        return list(commands)

    for folder in ("rw_crf", "seg"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    monkeypatch.setattr(pipeline, "run", pretend)
    monkeypatch.setattr(pipeline, "require_flags", lambda *_: None)  # pretend parses them, too
    return planned


def names(commands):
    return [name for name, _ in commands]


def of(commands, stage):
    return [args for name, args in commands if name == stage]


@pytest.mark.parametrize(("network", "lr"), [("vgg16", 0.1), ("resnet38", 0.01)])
def test_recipes_of_the_networks_and_flags_that_override_them(network, lr, plan):
    commands = plan(f"{network} --weights W.pth --infer_aff_args '--logt 3'")
    for kind, batch_size, epochs in (("cls", 16, 15), ("aff", 8, 8)):
        (args,) = of(commands, f"train_{kind}")
        assert args.network.__name__ == f"network.{network}_{kind}"
        assert (args.lr, args.wt_dec, args.momentum) == (lr, 5e-4, None)
        assert (args.batch_size, args.max_epoches, args.crop_size) == (batch_size, epochs, 448)
    assert {(a.low_alpha, a.high_alpha) for a in of(commands, "infer_cls")} == {(4, 32)}
    assert {(a.alpha, a.beta, a.logt) for a in of(commands, "infer_aff")} == {(16, 8, 3)}


def test_stages_read_what_earlier_stages_wrote(plan):
    commands = plan(VGG)
    assert names(commands) == ORDER
    (cls,), (aff,) = of(commands, "train_cls"), of(commands, "train_aff")
    maps, val_maps = of(commands, "infer_cls")
    walks, scores = of(commands, "infer_aff"), of(commands, "evaluate")
    train_list, val_list = "out/lists/train.txt", "out/lists/val.txt"
    assert maps.weights == val_maps.weights == f"{cls.session_name}.pth"
    assert maps.infer_list == cls.train_list == aff.train_list == train_list
    assert (maps.out_la_crf, maps.out_ha_crf) == (aff.la_crf_dir, aff.ha_crf_dir)
    assert val_maps.infer_list == cls.val_list == val_list
    assert [walk.infer_list for walk in walks] == [train_list, val_list, train_list]
    (seg,), (result,) = of(commands, "train_seg"), of(commands, "infer_seg")
    assert [walk.crf for walk in walks] == [False, False, True]
    assert (seg.train_list, seg.label_dir) == (train_list, walks[2].out_rw)
    assert (result.infer_list, result.weights) == (val_list, f"{seg.session_name}.pth")
    assert {walk.weights for walk in walks} == {f"{aff.session_name}.pth"}
    assert {walk.cam_dir for walk in walks} == {maps.out_cam, val_maps.out_cam}
    folders = [*[maps.out_cam] * 2, *[walks[0].out_rw] * 2, seg.label_dir, result.out_seg]
    assert [args.cam or args.pred for args in scores] == folders
    assert [args.list for args in scores] == [train_list, val_list] * 3


def test_every_command_gets_the_shared_flags(plan):
    commands = plan(f"{VGG} --classes classes.txt --seed 5 --device cpu --num_workers 3")
    for stage, args in commands:
        assert (args.voc12_root, args.classes) == ("VOC", "classes.txt")
        if stage != "prepare":
            assert args.num_workers == 3
        if stage in pipeline.PROGRAMS:
            assert (args.seed, args.device) == (5, "cpu")
        if stage.endswith("cls"):
            assert args.label_file == "out/lists/cls_labels.npy"


def test_what_the_trainings_start_from(plan):
    starts = {
        "--weights W.pth": ["W.pth", "W.pth"],
        "--weights none": ["none", "out/cls.pth"],
        "--weights none --aff_weights none": ["none", "none"],
        "--weights W.pth --aff_weights A.pth": ["W.pth", "A.pth"],
    }
    for flags, weights in starts.items():
        commands = plan(f"tiny {flags} --stages train_cls train_aff")
        assert [args.weights for _, args in commands] == weights


def test_training_takes_train_aug_where_there_is_one(tmp_path, plan):
    (tmp_path / "mine").mkdir()
    commands = plan(f"{VGG} --list_dir mine")
    assert not of(commands, "prepare")  # the lists exist already
    assert of(commands, "train_cls")[0].train_list == "mine/train.txt"
    (tmp_path / "mine" / "train_aug.txt").write_text("a\n")
    assert of(plan(f"{VGG} --list_dir mine"), "train_aff")[0].train_list == "mine/train_aug.txt"
    (tmp_path / "VOC" / "SegmentationClassAug").mkdir(parents=True)  # prepare will write the list
    assert of(plan(VGG), "train_cls")[0].train_list == "out/lists/train_aug.txt"


def test_maps_of_others_take_the_place_of_stage_1(plan):
    commands = plan(f"{VGG} --cam_dir seeds --infer_cls_args '--label_file L'")
    assert names(commands) == [name for name in ORDER if name != "train_cls"]
    maps, val_maps = of(commands, "infer_cls")
    for args in (maps, val_maps):
        assert (args.cam_dir, args.weights, args.label_file) == ("seeds", None, "L")
    assert {args.cam_dir for args in of(commands, "infer_aff")} == {maps.out_cam}
    assert plan.out.count("| - | - |") == 6  # the published figures are of other maps
    (aff,) = of(plan("tiny --weights none --cam_dir seeds"), "train_aff")
    assert aff.weights == "none"


def test_from_replaces_a_stage_and_all_later_ones(tmp_path, plan):
    out = tmp_path / "out"
    (out / "cam").mkdir()
    found = ["cls.pth", "aff.pth", "aff.ckpt", "cam/a.npy", "cam/.settings_of_maps.json"]
    for name in found:
        (out / name).touch()
    assert plan(f"{VGG} --from infer_cls --dry_run") == []
    assert "$ rm out/cam/*\n$ rm out/aff.pth\n$ rm out/aff.ckpt\n" in plan.out
    assert all((out / name).exists() for name in found)
    printed = plan.out
    assert names(plan(f"{VGG} --from infer_cls")) == ORDER[2:]
    assert plan.out.startswith(printed)
    # After an interruption, a repetition without --from must not take the old outputs.
    assert [name for name in found if (out / name).exists()] == ["cls.pth"]


def test_an_unfinished_training_continues(tmp_path, plan):
    (tmp_path / "out" / "cls.pth").touch()
    assert names(plan(VGG)) == [*ORDER[:1], *ORDER[2:]]
    (tmp_path / "out" / "cls.ckpt").touch()
    assert names(plan(VGG)) == ORDER
    assert (tmp_path / "out" / "cls.ckpt").exists()


def test_flags_of_later_stages_are_parsed_before_the_first_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    command = f"{PIPELINE} {VGG} --train_aff_args"
    taken = run_program(f"{command} '--session_name x'", tmp_path)
    taken.assert_failed(2, "--train_aff_args", "the pipeline itself sets --session_name")
    run_program(f"{command} '--lr 0'", tmp_path).assert_failed(2, "--train_aff_args", "--lr", "'0'")
    run_program(f"{command} '--lr ü'", tmp_path).assert_failed(2, "--train_aff_args", "--lr")
    run_program(f"{command} '--lr \"0.1'", tmp_path).assert_failed(2, "--train_aff_args")
    run_program(f"{command} '' --from infer_aff --stages evaluate", tmp_path).assert_failed(2)
    assert not (tmp_path / "out").exists()


# The table


def test_our_figures_stand_beside_the_published_ones(tmp_path, plan):
    assert names(plan(f"{VGG} --stages evaluate prepare")) == ["prepare", *["evaluate"] * 6]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| CAM | train | 2.0 | 5 | 48.9 | -46.9 |" in text
    assert "| random walk | val | 5.0 | 5 | 54.0 | -49.0 |" in text
    assert "| segmenter | val | 7.0 | 5 | 58.4 | -51.4 |" in text
    assert "published figure on test is 60.5" in text
    assert all(n in text.partition("\n- ")[2] for n in ("1,464", "1,449", "10,582"))  # the splits
    plan("resnet38 --weights none --stages evaluate --infer_aff_args '--alpha 8'")
    assert "| 47.7 |" in plan.out
    assert "- Trained from random numbers" in plan.out
    assert "- Not the network's recipe: infer_aff was run with --alpha 8." in plan.out


def test_the_segmenter_may_be_left_out(tmp_path, plan):
    for folder in ("rw_crf", "seg"):
        (tmp_path / "out" / folder).rmdir()
    labels = ["prepare", "train_cls", "infer_cls", "train_aff", "infer_aff", "evaluate"]
    commands = plan(f"{VGG} --stages {' '.join(labels)}")
    assert [args.json for args in of(commands, "evaluate")][-1] == "out/rw_crf_train.json"
    assert "| segmenter |" not in plan.out
    assert names(plan(f"{VGG} --stages evaluate")) == ["evaluate"] * 4


def test_no_published_figures_stand_beside_other_data_or_networks(plan):
    for flags in ("tiny --weights none", f"{VGG} --classes classes.txt", f"{VGG} --ids a"):
        plan(f"{flags} --stages evaluate")
        assert plan.out.count("| - | - |") == 6
        assert "no published figures" in plan.out


def test_a_part_of_the_images_and_16_bits(plan, tmp_path):
    commands = plan(f"{VGG} --ids '2007_*' --recipe small --amp bf16")
    assert of(commands, "prepare")[0].ids == "2007_*"
    assert {args.amp for name, args in commands if "_" in name} == {"bf16"}
    assert of(commands, "train_cls")[0].crop_size == 320
    assert "- Only the images whose ids match 2007_*.\n- Recipe: small." in plan.out
    run_program(f"{PIPELINE} {VGG} --ids a --list_dir b", tmp_path).assert_failed(2, "--ids")


# Signals

STAGE = """
import pathlib, signal, sys, time
def note(number, frame):
    sys.exit(pathlib.Path('ended').write_text(str(int(number))))
signal.signal(int(sys.argv[1]), note)
pathlib.Path('running').touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_also_ends_the_running_stage(number, tmp_path, monkeypatch):
    def send():
        while not (tmp_path / "running").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    monkeypatch.chdir(tmp_path)
    before = signal.signal(number, signal.default_int_handler)  # it may have been ignored
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Interrupted, match="train_cls has ended") as interrupted:
        pipeline.run("train_cls", ["-c", STAGE, str(int(number))])
    assert signal.signal(number, before) == signal.default_int_handler
    assert interrupted.value.signal_number == number
    assert (tmp_path / "ended").read_text() == str(int(number))  # it got the signal and time to end
