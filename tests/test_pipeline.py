"""The programs in a row: what is run, in which order, and what comes of it."""

import importlib
import json
import shlex
from pathlib import Path

import pytest
import torch
from helpers import run_program

from tool import pipeline
from voc12 import toy
from voc12.data import read_ids

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


def printed_commands(out):
    """(program, its words) of each command that was printed to be copied."""
    commands = []
    for line in out.splitlines():
        if line.startswith("$ python3 "):
            words = shlex.split(line)[2:]
            words = words[1:] if words[0] == "-m" else [Path(words[0]).stem, *words[1:]]
            commands.append((words[0], words[1:]))
    return commands


def stems(path):
    return sorted(member.stem for member in path.iterdir())


def test_from_a_devkit_to_a_scored_result(folder):
    outcome = run_program(f"{PIPELINE} {QUICK}", folder).check()
    out = folder / "out"
    assert [name for name, _ in printed_commands(outcome.out)] == ORDER

    results = json.loads((out / "results.json").read_text())
    assert results.keys() == {"cam", "rw"}
    for figures in results.values():
        assert figures.keys() == {"train", "val"}
        for split, count in (("train", IMAGES - VAL), ("val", VAL)):
            assert figures[split].keys() == {"miou", "images"}
            assert figures[split]["images"] == count
            assert 0 < figures[split]["miou"] < 100
    table = [line.split() for line in outcome.out.splitlines()[-5:]]
    assert ["mIoU", "train", "val"] in table
    row = next(cells for cells in table if cells[:1] == ["CAM"])
    assert row[1] == f"{results['cam']['train']['miou']:.1f}"

    train, val = (read_ids(out / "lists" / f"{split}.txt") for split in ("train", "val"))
    everything = sorted(train + val)
    assert len(everything) == IMAGES
    assert stems(out / "cam") == stems(out / "rw") == everything
    assert stems(out / "la_crf") == stems(out / "ha_crf") == sorted(train)
    for name in ("cls", "aff"):
        assert torch.load(out / f"{name}.pth", weights_only=True)
        assert (out / f"{name}.log").read_text()


def test_a_stage_that_fails_ends_it(folder):
    (folder / "lists").mkdir()
    flags = "--list_dir lists --train_cls_args '--lr 0'"
    outcome = run_program(f"{PIPELINE} {QUICK} {flags}", folder)
    outcome.assert_failed(1, "command above failed", "exit code 2")
    assert len(printed_commands(outcome.out)) == 1
    assert not (folder / "out" / "results.json").exists()


# What would be run, without running it


def planned_commands(folder, monkeypatch, flags):
    """The commands of a pipeline as (program, its parsed arguments), and the results."""
    commands = []

    def pretend(command):
        words = [str(word) for word in command]
        words = words[1:] if words[0] == "-m" else [Path(words[0]).stem, *words[1:]]
        parser = importlib.import_module(words[0]).get_args_parser()
        args = parser.parse_args(words[1:])  # so every flag is one that the program has
        commands.append((words[0], args))
        if words[0] == "voc12.evaluate":
            figures = {"miou": float(len(commands)), "images": 5, "per_class": {}}
            Path(args.json).parent.mkdir(exist_ok=True)
            Path(args.json).write_text(json.dumps(figures))

    monkeypatch.setattr(pipeline, "run", pretend)
    run_program(f"{PIPELINE} {flags}", folder).check()
    return commands, json.loads((folder / "out" / "results.json").read_text())


def of(commands, name):
    return [args for command, args in commands if command == name]


@pytest.mark.parametrize(("network", "lr"), [("vgg16", 0.1), ("resnet38", 0.01)])
def test_recipes_of_the_networks(network, lr, folder, monkeypatch):
    commands, _ = planned_commands(folder, monkeypatch, f"{network} --weights W.pth")
    assert [name for name, _ in commands] == ORDER
    (cls,), (aff,) = of(commands, "train_cls"), of(commands, "train_aff")
    for args, kind, batch_size, epochs in ((cls, "cls", 16, 15), (aff, "aff", 8, 8)):
        assert args.network.__name__ == f"network.{network}_{kind}"
        assert args.weights == "W.pth"  # both start from the same weights
        assert (args.lr, args.wt_dec, args.momentum) == (lr, 5e-4, None)
        assert (args.batch_size, args.max_epoches, args.crop_size) == (batch_size, epochs, 448)


def test_stages_read_what_earlier_stages_wrote(folder, monkeypatch):
    commands, results = planned_commands(folder, monkeypatch, "vgg16 --weights W.pth")
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
    assert results["cam"]["train"] == {"miou": 8, "images": 5}  # the eighth command
    assert results["rw"]["val"] == {"miou": 11, "images": 5}


def test_every_command_gets_the_shared_flags(folder, monkeypatch):
    (folder / "classes.txt").write_text("crack\n")
    flags = "tiny --weights none --classes classes.txt --seed 5 --device cpu --num_workers 3"
    commands, _ = planned_commands(folder, monkeypatch, flags)
    for name, args in commands:
        assert (args.voc12_root, args.classes) == ("VOC", "classes.txt")
        if not name.startswith("voc12."):
            assert (args.seed, args.device, args.num_workers) == (5, "cpu", 3)
        if name.endswith("cls"):
            assert args.label_file == "out/lists/cls_labels.npy"


def test_users_flags_override_the_recipe(folder, monkeypatch):
    flags = "tiny --weights none --train_aff_args '--lr 0.5' --infer_aff_args '--logt 3 --beta 2'"
    commands, _ = planned_commands(folder, monkeypatch, flags)
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
def test_what_affinitynet_starts_from(flags, start, folder, monkeypatch):
    commands, _ = planned_commands(folder, monkeypatch, f"tiny {flags}")
    assert of(commands, "train_aff")[0].weights == start


@pytest.mark.parametrize("augmented", [True, False])
def test_training_takes_train_aug_where_there_is_one(augmented, folder, monkeypatch):
    (folder / "mine").mkdir()
    if augmented:
        (folder / "mine" / "train_aug.txt").write_text("a\n")
    flags = "tiny --weights none --list_dir mine"
    commands, _ = planned_commands(folder, monkeypatch, flags)
    assert not of(commands, "voc12.prepare")  # the lists are there already
    expected = "mine/train_aug.txt" if augmented else "mine/train.txt"
    for name in ("train_cls", "train_aff"):
        assert of(commands, name)[0].train_list == expected


@pytest.mark.parametrize("flags", ["vgg19 --weights W", "vgg16", "tiny --weights none --seed -1"])
def test_command_lines_that_cannot_be_carried_out(flags, tmp_path):
    run_program(f"{PIPELINE} {flags}", tmp_path).assert_failed(2)
