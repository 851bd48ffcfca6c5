"""The programs in a row: what is run, in which order, and what comes of it."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, run_program

from tool import pipeline, tables
from tool.run.errors import DataError
from voc12 import toy
from voc12.devkit import read_ids

IMAGES, VAL = 12, 3
PIPELINE = "tool.pipeline --voc12_root VOC --out_dir out --num_workers 0 --network"
QUICK = (
    "tiny --weights none "
    "--train_cls_args '--max_epoches 1 --batch_size 4 --crop_size 64 --resize_long 48 80' "
    "--infer_cls_args '--scales 1' --infer_aff_args '--logt 2' "
    "--train_aff_args '--max_epoches 1 --batch_size 4 --crop_size 72'"
)
ORDER = [
    *("voc12.prepare", "train_cls", "infer_cls", "infer_cls", "train_aff", "infer_aff"),
    *("infer_aff", *["voc12.evaluate"] * 4),
]


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "VOC"
    toy.make_devkit(root, IMAGES, 96, 0)
    return root


@pytest.fixture
def folder(devkit, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "VOC").symlink_to(devkit)
    return tmp_path


def words_of(command):
    """A command as (program, its words)."""
    words = [str(word) for word in command]
    words = words[1:] if words[0] == "-m" else [Path(words[0]).stem, *words[1:]]
    return words[0], words[1:]


def printed_commands(out):
    """(program, its words) of each command that was printed to be copied."""
    commands = []
    for line in out.splitlines():
        if line.startswith("$ python3 "):
            commands.append(words_of(shlex.split(line)[2:]))
    return commands


def stems(path):
    """Of all files that are not hidden."""
    return sorted(member.stem for member in path.glob("[!.]*"))


def test_from_a_devkit_to_a_scored_result(folder):
    outcome = run_program(f"{PIPELINE} {QUICK}", folder).check()
    out = folder / "out"
    assert [name for name, _ in printed_commands(outcome.out)] == ORDER

    results = json.loads((out / "results.json").read_text())
    for stage in ("cam", "rw"):
        assert results[stage].keys() == {"train", "val"}
        for split, count in (("train", IMAGES - VAL), ("val", VAL)):
            figures = results[stage][split]
            assert figures.keys() == {"miou", "images", "missing"}
            assert (figures["images"], figures["missing"]) == (count, 0)
            assert 0 < figures["miou"] < 100
    markdown = (out / "results.md").read_text()
    assert markdown in outcome.out
    row = next(line for line in markdown.splitlines() if line.startswith("| CAM | tiny |"))
    assert f"| train | {results['cam']['train']['miou']:.1f} | 9 |" in row

    train, val = (read_ids(out / "lists" / f"{split}.txt") for split in ("train", "val"))
    everything = sorted(train + val)
    assert len(everything) == IMAGES
    assert stems(out / "cam") == stems(out / "rw") == everything
    assert stems(out / "la_crf") == stems(out / "ha_crf") == sorted(train)
    for name in ("cls", "aff"):
        assert torch.load(out / f"{name}.pth", weights_only=True)
        assert (out / f"{name}.log").read_text()

    again = run_program(f"{PIPELINE} {QUICK}", folder).check()
    assert printed_commands(again.out) == []
    assert again.out.count("complete, not run again") == len(ORDER)
    assert markdown in again.out
    (out / "rw" / f"{val[0]}.png").unlink()
    mended = run_program(f"{PIPELINE} {QUICK} --dry_run", folder).check().out
    assert [name for name, _ in printed_commands(mended)] == ORDER[-5:]
    assert "# infer_aff val: out/rw holds fewer than the 12 files" in mended


def test_a_stage_that_fails_ends_it(folder):
    (folder / "lists").mkdir()
    (folder / "lists" / "train.txt").write_text("none\n")
    outcome = run_program(f"{PIPELINE} tiny --weights none --list_dir lists", folder)
    outcome.assert_failed(1, "command above failed", "exit code 1")
    assert len(printed_commands(outcome.out)) == 1
    assert not (folder / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--infer_aff_args '--bata 4'", ("--infer_aff_args", "--bata")),
        ("--train_aff_args '--lr 0'", ("--train_aff_args", "--lr", "'0' is not a number above 0")),
        ("--train_aff_args '--lr `0.1'".replace("`", '"'), ("--train_aff_args", "No closing")),
    ],
)
def test_flags_of_later_stages_are_looked_at_before_the_first(flags, words, folder):
    outcome = run_program(f"{PIPELINE} tiny --weights none {flags}", folder)
    outcome.assert_failed(2, *words)
    assert not (folder / "out").exists()


# What would be run, without running it


@pytest.fixture
def plan(folder, monkeypatch):
    """``plan(flags)``: (program, its parsed arguments) of what a pipeline runs, pretending to."""
    commands = []

    def pretend(command):
        name, words = words_of(command)
        parser = importlib.import_module(name).get_args_parser()
        args = parser.parse_args(words)  # so every flag is one that the program has
        commands.append((name, args))
        for flag, made in (("out_cam", "a.npy"), ("out_rw", "a.png"), ("session_name", None)):
            if getattr(args, flag, None):
                path = Path(getattr(args, flag))
                path = path / made if made else path.with_suffix(".pth")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("made")
        for flag in ("out_la_crf", "out_ha_crf", "out_dir"):
            if getattr(args, flag, None):
                Path(getattr(args, flag)).mkdir(parents=True, exist_ok=True)
        if name == "voc12.prepare":
            Path(args.out_dir, "train_aug.txt").write_text("a\n")
        if name == "voc12.evaluate":
            figures = {"miou": float(len(commands)), "images": 5, "missing": 0}
            Path(args.json).parent.mkdir(exist_ok=True)
            Path(args.json).write_text(json.dumps(figures))

    def planned(flags):
        commands.clear()
        planned.out = run_program(f"{PIPELINE} {flags}", folder).check().out
        return list(commands)

    monkeypatch.setattr(pipeline, "run", pretend)
    monkeypatch.setattr(pipeline, "require_flags", lambda commands: None)  # so does pretend
    return planned


def results_of(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def of(commands, name):
    return [args for command, args in commands if command == name]


@pytest.mark.parametrize(("network", "lr"), [("vgg16", 0.1), ("resnet38", 0.01)])
def test_recipes_of_the_networks(network, lr, plan):
    commands = plan(f"{network} --weights W.pth")
    assert [name for name, _ in commands] == ORDER
    (cls,), (aff,) = of(commands, "train_cls"), of(commands, "train_aff")
    for args, kind, batch_size, epochs in ((cls, "cls", 16, 15), (aff, "aff", 8, 8)):
        assert args.network.__name__ == f"network.{network}_{kind}"
        assert args.weights == "W.pth"  # both start from the same weights
        assert (args.lr, args.wt_dec, args.momentum) == (lr, 5e-4, None)
        assert (args.batch_size, args.max_epoches, args.crop_size) == (batch_size, epochs, 448)


def test_stages_read_what_earlier_stages_wrote(folder, plan):
    commands = plan("vgg16 --weights W.pth")
    (cls,), (aff,) = of(commands, "train_cls"), of(commands, "train_aff")
    train_maps, val_maps = of(commands, "infer_cls")
    for maps in (train_maps, val_maps):
        assert maps.weights == f"{cls.session_name}.pth"
        assert maps.out_cam == "out/cam"
    assert train_maps.infer_list == cls.train_list == aff.train_list
    assert (train_maps.low_alpha, train_maps.high_alpha) == (4, 32)
    assert (train_maps.out_la_crf, train_maps.out_ha_crf) == (aff.la_crf_dir, aff.ha_crf_dir)
    assert val_maps.infer_list == cls.val_list == "out/lists/val.txt"
    walks = of(commands, "infer_aff")
    assert [walk.infer_list for walk in walks] == ["out/lists/train.txt", "out/lists/val.txt"]
    for walk in walks:
        assert walk.weights == f"{aff.session_name}.pth"
        assert (walk.cam_dir, walk.alpha, walk.beta, walk.logt) == ("out/cam", 16, 8, 8)
    scored = [(args.cam, args.pred, args.list) for args in of(commands, "voc12.evaluate")]
    lists = [f"out/lists/{split}.txt" for split in ("train", "val")]
    assert scored[:2] == [("out/cam", None, path) for path in lists]
    assert scored[2:] == [(None, walks[0].out_rw, path) for path in lists]
    results = results_of(folder)
    assert results["cam"]["train"] == {"miou": 8, "images": 5, "missing": 0}  # the eighth command
    assert results["rw"]["val"] == {"miou": 11, "images": 5, "missing": 0}


def test_every_command_gets_the_shared_flags(folder, plan):
    (folder / "classes.txt").write_text("crack\n")
    flags = "tiny --weights none --classes classes.txt --seed 5 --device cpu --num_workers 3"
    commands = plan(flags)
    for name, args in commands:
        assert (args.voc12_root, args.classes) == ("VOC", "classes.txt")
        if name != "voc12.prepare":
            assert args.num_workers == 3
        if not name.startswith("voc12."):
            assert (args.seed, args.device) == (5, "cpu")
        if name.endswith("cls"):
            assert args.label_file == "out/lists/cls_labels.npy"


def test_users_flags_override_the_recipe(folder, plan):
    flags = "tiny --weights none --train_aff_args '--lr 0.5' --infer_aff_args '--logt 3 --beta 2'"
    commands = plan(flags)
    (cls,), (aff,) = of(commands, "train_cls"), of(commands, "train_aff")
    assert aff.lr == 0.5
    assert cls.lr != 0.5
    assert {(walk.logt, walk.beta) for walk in of(commands, "infer_aff")} == {(3, 2)}


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ("--weights W.pth", "W.pth"),
        ("--weights none", "out/cls.pth"),
        ("--weights none --aff_weights none", "none"),
        ("--weights W.pth --aff_weights A.pth", "A.pth"),
    ],
)
def test_what_affinitynet_starts_from(flags, start, folder, plan):
    commands = plan(f"tiny {flags}")
    assert of(commands, "train_aff")[0].weights == start


@pytest.mark.parametrize("augmented", [True, False])
def test_training_takes_train_aug_where_there_is_one(augmented, folder, plan):
    (folder / "mine").mkdir()
    if augmented:
        (folder / "mine" / "train_aug.txt").write_text("a\n")
    flags = "tiny --weights none --list_dir mine"
    commands = plan(flags)
    assert not of(commands, "voc12.prepare")  # the lists are there already
    expected = "mine/train_aug.txt" if augmented else "mine/train.txt"
    for name in ("train_cls", "train_aff"):
        assert of(commands, name)[0].train_list == expected


@pytest.mark.parametrize("flags", ["vgg19 --weights W", "vgg16", "tiny --weights none --seed -1"])
def test_command_lines_that_cannot_be_carried_out(flags, tmp_path):
    run_program(f"{PIPELINE} {flags}", tmp_path).assert_failed(2)


# What is complete is not run again

VGG = "vgg16 --weights W.pth"


def names(commands):
    return [name for name, _ in commands]


def test_what_is_complete_is_not_run_again(folder, plan):
    assert names(plan(VGG)) == ORDER
    before = results_of(folder)
    assert plan(f"{VGG} --device cpu --num_workers 5") == []  # nothing comes of these
    assert results_of(folder) == before
    assert plan.out.count("complete, not run again") == len(ORDER)


@pytest.mark.parametrize(
    ("flags", "first", "reason"),
    [
        ("--train_cls_args '--lr 0.2'", 1, "train_cls: --lr was 0.1, is 0.2"),
        ("--train_cls_args '--momentum 0.9'", 1, "train_cls: --momentum was not given, is 0.9"),
        ("--infer_cls_args '--high_alpha 24'", 2, "infer_cls train: --high_alpha was 32, is 24"),
        ("--aff_weights A.pth", 4, "train_aff: --weights was "),
        ("--infer_aff_args '--beta 4'", 5, "infer_aff train: --beta was 8, is 4"),
        ("--seed 1", 1, "train_cls: --seed was 0, is 1"),
    ],
)
def test_a_changed_setting_runs_its_stage_and_those_after_it(flags, first, reason, plan):
    plan(VGG)
    assert names(plan(f"{VGG} {flags}")) == ORDER[first:]
    assert f"# {reason}" in plan.out
    assert "ran again" in plan.out
    assert plan(f"{VGG} {flags}") == []


def test_a_setting_that_is_the_recipes_is_no_change(plan):
    plan(VGG)
    assert plan(f"{VGG} --train_cls_args '--lr 0.1 --batch_size 16'") == []


def test_other_lists_of_the_same_name_are_a_change(folder, plan):
    (folder / "mine").mkdir()
    for name in ("train", "val"):
        (folder / "mine" / f"{name}.txt").write_text("a\n")
    plan(f"{VGG} --list_dir mine")
    (folder / "mine" / "val.txt").write_text("a\nb\n")
    assert names(plan(f"{VGG} --list_dir mine")) == ORDER[1:]
    assert "train_cls: --val_list was" in plan.out


def test_it_does_not_matter_where_one_stands(folder, plan):
    plan(VGG)
    (folder / "below").mkdir()
    flags = "--voc12_root ../VOC --out_dir ../out --network vgg16 --weights ../W.pth"
    outcome = run_program(f"tool.pipeline {flags}", folder / "below").check()
    assert outcome.out.count("complete, not run again") == len(ORDER)


@pytest.mark.parametrize(
    ("lost", "first"), [("cls.pth", 1), ("la_crf", 2), ("aff.pth", 4), ("rw_val.json", 10)]
)
def test_what_is_missing_is_made_again(lost, first, folder, plan):
    plan(VGG)
    path = folder / "out" / lost
    path.rmdir() if path.is_dir() else path.unlink()
    assert names(plan(VGG)) == ORDER[first:]
    assert f"out/{lost} is missing" in plan.out


def test_after_a_failure_it_goes_on_where_it_failed(folder, plan, monkeypatch):
    plan(VGG)
    pretend = pipeline.run

    def fail_at_train_aff(command):
        if words_of(command)[0] == "train_aff":
            raise DataError("the last command above failed (exit code 1).")
        pretend(command)

    flags = f"{VGG} --train_cls_args '--lr 0.2'"
    monkeypatch.setattr(pipeline, "run", fail_at_train_aff)
    run_program(f"{PIPELINE} {flags}", folder).assert_failed(1, "exit code 1")
    monkeypatch.setattr(pipeline, "run", pretend)
    assert names(plan(flags)) == ORDER[4:]
    assert "# train_aff: not finished before" in plan.out
    assert "# infer_aff train: train_aff ran again" in plan.out


def test_stages_restricts_and_from_forces(folder, plan):
    assert names(plan(f"{VGG} --stages prepare train_cls")) == ORDER[:2]
    assert not (folder / "out" / "results.json").exists()
    assert names(plan(f"{VGG} --stages train_cls infer_cls")) == ORDER[2:4]
    assert names(plan(VGG)) == ORDER[4:]
    assert names(plan(f"{VGG} --from infer_aff")) == ORDER[5:]
    assert "--from infer_aff" in plan.out
    assert names(plan(f"{VGG} --from prepare")) == ORDER
    assert names(plan(f"{VGG} --stages evaluate")) == []
    assert "| CAM | VGG-16 |" in plan.out


def test_a_stage_that_runs_by_itself_makes_those_after_it_stale(plan):
    plan(VGG)
    changed = f"{VGG} --infer_cls_args '--high_alpha 24'"
    assert names(plan(f"{changed} --stages infer_cls")) == ORDER[2:4]
    assert names(plan(changed)) == ORDER[4:]
    assert "# train_aff: infer_cls val ran again" in plan.out


def test_a_dry_run_prints_and_writes_nothing(folder, plan):
    assert plan(f"{VGG} --dry_run") == []
    printed = printed_commands(plan.out)
    assert not (folder / "out").exists()
    assert [(name, vars(parsed(name, words))) for name, words in printed] == [
        (name, vars(args)) for name, args in plan(VGG)
    ]
    plan(f"{VGG} --dry_run --train_aff_args '--lr 1'")
    assert names(printed_commands(plan.out)) == ORDER[4:]
    assert plan(VGG) == []  # the dry run changed nothing


def parsed(name, words):
    return importlib.import_module(name).get_args_parser().parse_args(words)


def test_a_training_of_other_settings_does_not_go_on_from_the_old_checkpoint(folder, monkeypatch):
    commands = []
    monkeypatch.setattr(pipeline, "run", lambda command: commands.append(list(map(str, command))))

    def train(flags):
        run_program(f"{PIPELINE} {VGG} --stages train_cls {flags}", folder).check()
        return commands[-1][-2:]

    train("")
    (folder / "out" / "cls.ckpt").write_text("of an interrupted run")
    assert train("") != ["--resume", "never"]
    assert train("--train_cls_args '--lr 0.2'") == ["--resume", "never"]
    assert train("--train_cls_args '--lr 0.2'") != ["--resume", "never"]


def test_inference_goes_on_unless_its_settings_or_inputs_changed(folder, monkeypatch):
    commands = []

    def run(command):
        commands.append(list(map(str, command)))
        if len(commands) == fails_at:
            raise DataError("the last command above failed.")

    def overwrites(stages, flags=""):
        commands.clear()
        run_program(f"{PIPELINE} {VGG} --stages {stages} {flags}", folder)
        inference = [command for command in commands if "infer_cls" in command[0]]
        return ["--overwrite" in command for command in inference]

    monkeypatch.setattr(pipeline, "run", run)
    fails_at = 1
    assert overwrites("infer_cls") == [False]  # it is interrupted,
    fails_at = None
    assert overwrites("infer_cls") == [False, False]  # and goes on
    changed = "--infer_cls_args '--low_alpha 5'"
    assert overwrites("infer_cls", changed) == [True, True]
    # Training writes another classifier.
    assert overwrites("train_cls infer_cls", changed) == [True, True]


def test_a_spoilt_record_is_said(folder, plan):
    plan(VGG)
    for text in ("{", "[]", '{"steps": {"prepare": {}}}', '{"steps": {"prepare": 1}}'):
        (folder / "out" / "pipeline.json").write_text(text)
        run_program(f"{PIPELINE} {VGG}", folder).assert_failed(1, "pipeline.json", "remove it")


def test_figures_that_are_missing_are_said(folder, plan):
    plan(VGG)
    (folder / "out" / "cam_val.json").write_text("{}")
    run_program(f"{PIPELINE} {VGG}", folder).assert_failed(1, "cam_val.json", "--from evaluate")


@pytest.mark.parametrize(
    "flags",
    ["--stages nothing", "--from nothing", "--stages", "--from infer_aff --stages evaluate"],
)
def test_stages_that_there_are_not(flags, folder):
    run_program(f"{PIPELINE} {VGG} {flags}", folder).assert_failed(2)


def test_help_shows_the_recipes():
    text = pipeline.get_args_parser().format_help()
    for network, recipe in pipeline.RECIPES.items():
        assert f"  {network}\n" in text
        for program, flags in recipe.items():
            assert f"{program}  {flags}" in text


# The tables


def test_our_figures_beside_the_published_ones(folder, plan):
    plan(VGG)
    results = results_of(folder)
    ours = [row for row in results["table"] if row["ours"] is not None]
    assert [(row["stage"], row["split"], row["alphas"], row["published"]) for row in ours] == [
        ("cam", "train", "", 48.9),
        ("cam", "val", "", 46.6),
        ("rw", "train", "4/16/32", 59.6),
        ("rw", "val", "4/16/32", 54.0),
    ]
    for row in ours:
        figure = results[row["stage"]][row["split"]]
        assert row["ours"] == figure["miou"]
        assert row["difference"] == pytest.approx(figure["miou"] - row["published"])
        assert (row["images"], row["published_images"]) == (
            5,
            {"train": 1464, "val": 1449}[row["split"]],
        )
        assert "fewer images" in row["remark"]
    assert len(results["table"]) == 12  # six published lines of two splits
    markdown = (folder / "out" / "results.md").read_text()
    assert "| random walk | VGG-16 | 4/16/32 | val | 11.0 | 5 | 54.0 | 1,449 | -43.0 | fewer" in (
        markdown
    )
    for number in ("1,464", "1,449", "10,582"):
        assert number in markdown.split("\n- ", 1)[1]  # the rules of the splits


@pytest.mark.parametrize(
    ("alphas", "published"),
    [
        ((4, 16, 32), {"cam": 47.7, "rw": 61.0}),
        ((4, 16, 24), {"cam": 48.0, "rw": 58.1}),
        ((4, 8, 24), {"cam": 47.7, "rw": None}),
    ],
)
def test_which_published_figure_ours_stands_beside(alphas, published, folder, plan):
    low, walk, high = alphas
    plan(
        f"resnet38 --weights W --infer_cls_args '--low_alpha {low} --high_alpha={high}' "
        f"--infer_aff_args '--alpha {walk}'"
    )
    rows = results_of(folder)["table"]
    ours = {
        row["stage"]: row for row in rows if row["ours"] is not None and row["split"] == "train"
    }
    assert {stage: row["published"] for stage, row in ours.items()} == published
    assert ours["rw"]["alphas"] == f"{low}/{walk}/{high}"
    assert "Not the network's recipe: infer_aff was run with" in plan.out


def test_full_splits_carry_no_remark_and_more_images_do():
    def figure(images, missing=0):
        return {"miou": 50.0, "images": images, "missing": missing}

    results = {
        "cam": {"train": figure(1464), "val": figure(1500)},
        "rw": {"train": figure(1463, 1), "val": figure(1449)},
    }
    rows = tables.comparison(results, "vgg16", (4, 16, 32))
    remarks = {(row["stage"], row["split"]): row["remark"] for row in rows if row["ours"]}
    assert remarks["cam", "train"] == remarks["rw", "val"] == ""
    assert "more images" in remarks["cam", "val"]
    assert "fewer images" in remarks["rw", "train"]
    assert "1 images of the list are missing" in remarks["rw", "train"]


def test_no_published_figures_stand_beside_other_data_or_networks(folder, plan):
    (folder / "classes.txt").write_text("crack\n")
    for flags in ("tiny --weights none", f"{VGG} --classes classes.txt"):
        plan(flags)
        rows = results_of(folder)["table"]
        assert len(rows) == 4
        assert {row["published"] for row in rows} == {None}
        assert "no published figures" in plan.out


def test_weights_none_is_said_beside_published_figures(plan):
    plan("vgg16 --weights none")
    assert "Trained from random numbers" in plan.out


# Signals

WAIT_FOR_A_SIGNAL = """
import pathlib, signal, sys, time
def note(number, frame):
    pathlib.Path('ended').write_text(str(number))
    sys.exit(3)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, note)
pathlib.Path('running').touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_the_running_stage_too(number, code, tmp_path):
    # A shell may have started the tests with SIGINT or SIGHUP ignored; then these would stay so.
    usual = "default_int_handler" if number == signal.SIGINT else "SIG_DFL"
    script = (
        f"import signal\nsignal.signal({int(number)}, signal.{usual})\n"
        "from tool import cli, pipeline\n"
        "import argparse\n"
        f"cli.run(argparse.ArgumentParser(), lambda _: pipeline.run(['-c', {WAIT_FOR_A_SIGNAL!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "running").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert (tmp_path / "ended").read_text() == str(int(number))  # it was told, and waited for
    assert "Traceback" not in errors


def test_a_stage_that_is_killed_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(DataError, match="SIGKILL"):
        pipeline.run(["-c", kill])
