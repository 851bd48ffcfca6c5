"""The four programs from end to end, with the tiny network on a tiny devkit, and their bad ends."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    REPOSITORY,
    contents,
    noise_image,
    run_program,
    timeless,
    write_annotation,
    write_image,
    write_mask,
)
from PIL import Image

import infer_aff
from tool.labels import voc_palette
from tool.maps import load_index_png, load_maps, load_npy_dict, save_maps, save_npy_dict
from voc12 import toy
from voc12.devkit import VOC_CLASSES, Devkit, read_ids

PROGRAMS = ("train_cls", "infer_cls", "train_aff", "infer_aff")
MODULES = (*PROGRAMS, "voc12.prepare", "voc12.evaluate", "voc12.export", "voc12.report")

DATA = "--voc12_root VOC --num_workers 0"
LABELS = "--label_file lists/cls_labels.npy"
TRAIN = "--weights none --train_list lists/all.txt --batch_size 4 --max_epoches 2 --lr 0.02"
# Every command of a run, below one folder; a later flag overrides an earlier one.
COMMANDS = {
    "train_cls": f"train_cls --network network.tiny_cls {DATA} {LABELS} {TRAIN} "
    "--val_list lists/val.txt --crop_size 64 --resize_long 48 80 --val_crop_size 72 "
    "--session_name out/cls",
    "infer_cls": f"infer_cls --network network.tiny_cls {DATA} {LABELS} --weights out/cls.pth "
    "--infer_list lists/all.txt --scales 1 0.5 --out_cam out/cam --out_la_crf out/la "
    "--out_ha_crf out/ha --out_cam_pred out/pred",
    "train_aff": f"train_aff --network network.tiny_aff {DATA} {TRAIN} --crop_size 80 "
    "--la_crf_dir out/la --ha_crf_dir out/ha --session_name out/aff",
    "infer_aff": f"infer_aff --network network.tiny_aff {DATA} --weights out/aff.pth "
    "--infer_list lists/all.txt --cam_dir out/cam --out_rw out/rw",
    "voc12.evaluate": "voc12.evaluate --voc12_root VOC --list lists/val.txt --pred out/rw",
}

# Photographs that are not what one expects, all of class cat but the empty one.
ODD_IMAGES = {
    "gray": noise_image(40, 50, 1).convert("L"),
    "palette.of.8": noise_image(40, 50, 2).quantize(8),
    "cmyk": noise_image(40, 50, 3).convert("CMYK"),
    "rgba": noise_image(40, 50, 4).convert("RGBA"),
    "sixteen_bit": Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32),
    "thin": noise_image(40, 1, 5),
    "flat": noise_image(1, 40, 6),
    "dot": noise_image(1, 1, 7),
    "empty": noise_image(40, 50, 8),
}


# Images this small gain nothing from a second thread, and lose much on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")


def run_all(folder):
    """The four programs, each of which must end well; their outcomes by name."""
    (folder / "out").mkdir()
    return {name: run_program(COMMANDS[name], folder).check() for name in PROGRAMS}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """VOC: a toy devkit and the odd images; lists: train, val, odd and all."""
    folder = tmp_path_factory.mktemp("data")
    root = folder / "VOC"
    toy.make_devkit(root, 8, 96, 0)
    for image_id, image in ODD_IMAGES.items():
        write_image(root, image_id, image, "JPEG" if image.mode == "CMYK" else "PNG")
        write_annotation(root, image_id, [] if image_id == "empty" else ["cat"])
    run_program("voc12.prepare --voc12_root VOC --out_dir lists", folder).check()
    lists = {name: read_ids(folder / "lists" / f"{name}.txt") for name in ("train", "val")}
    lists |= {"odd": list(ODD_IMAGES), "all": [*lists["train"], *lists["val"], *ODD_IMAGES]}
    for name in ("odd", "all"):
        (folder / "lists" / f"{name}.txt").write_text("\n".join(lists[name]))
    return folder


def link_data(data_folder, folder):
    for name in ("VOC", "lists"):
        (folder / name).symlink_to(data_folder / name)
    return folder


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory):
    """A folder where the four programs ran, and how they ended."""
    folder = link_data(data_folder, tmp_path_factory.mktemp("finished"))
    return folder, run_all(folder)


@pytest.fixture(scope="module")
def done(finished):
    return finished[0]


@pytest.fixture
def spoilable(done, tmp_path):
    """A copy of it all, to be damaged."""
    for name in ("VOC", "lists", "out"):
        shutil.copytree(done / name, tmp_path / name)
    return tmp_path


def all_ids(folder):
    return read_ids(folder / "lists" / "all.txt")


def present_classes(folder, image_id):
    return np.flatnonzero(Devkit(folder / "VOC").image_label(image_id)).tolist()


def image_size(folder, image_id):
    """(height, width)"""
    with Image.open(folder / "VOC" / "JPEGImages" / f"{image_id}.jpg") as image:
        return image.size[::-1]


# What comes out


@pytest.mark.parametrize("name", ["cls", "aff"])
def test_weights_are_a_state_dict_of_the_network(name, done):
    state = torch.load(done / "out" / f"{name}.pth", weights_only=True)
    net = importlib.import_module(f"network.tiny_{name}").Net()
    fresh = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(state, strict=True)
    assert any(not torch.equal(value, fresh[key]) for key, value in state.items())
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", ["cls", "aff"])
def test_log_tells_what_was_run_and_what_came_of_it(name, finished):
    folder, outcomes = finished
    log = (folder / "out" / f"{name}.log").read_text()
    command = COMMANDS[f"train_{name}"].split(maxsplit=1)
    assert f"{command[0]}.py {command[1]}" in log.splitlines()[0]
    for words in ("torch " + torch.__version__, "numpy " + np.__version__, "seed: 0", "cpu"):
        assert words in log
    number = r"\d+\.\d+"
    parts = f"validation loss {number}" if name == "cls" else f"bg {number}, fg .*, neg {number}"
    for epoch in (1, 2):
        assert re.search(rf"epoch {epoch}/2: loss {number}, {parts}", log)
    # Everything but the head of the log is also said, a fresh start loudly.
    said = outcomes[f"train_{name}"].out
    assert "WARNING: --weights none" in said
    assert log.endswith(said)


def test_maps_of_the_present_classes(done):
    for image_id in all_ids(done):
        maps = np.load(done / "out" / "cam" / f"{image_id}.npy", allow_pickle=True).item()
        assert list(maps) == present_classes(done, image_id)
        for values in maps.values():
            assert values.dtype == np.float32
            assert values.shape == image_size(done, image_id)
            assert values.min() >= 0
            assert values.max() <= 1
            assert values.max() > 0.9 or not values.any()  # divided by its maximum


@pytest.mark.parametrize("folder", ["la", "ha"])
def test_crf_scores_of_background_and_present_classes(folder, done):
    for image_id in all_ids(done):
        scores = np.load(done / "out" / folder / f"{image_id}.npy", allow_pickle=True).item()
        assert list(scores) == [0, *(k + 1 for k in present_classes(done, image_id))]
        stacked = np.stack(list(scores.values()))
        assert stacked.dtype == np.float32
        assert stacked.shape[1:] == image_size(done, image_id)
        assert np.allclose(stacked.sum(0), 1, atol=1e-4)
        assert stacked.min() >= 0


def test_high_alpha_believes_less_background(done):
    def background(folder):
        return sum(
            load_maps(done / "out" / folder / f"{image_id}.npy")[0].mean()
            for image_id in all_ids(done)
        )

    assert background("ha") < background("la")


@pytest.mark.parametrize("folder", ["pred", "rw"])
def test_index_images_hold_present_labels_only(folder, done):
    seen = set()
    for image_id in all_ids(done):
        path = done / "out" / folder / f"{image_id}.png"
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("PNG", "P")
            assert image.getpalette() == voc_palette()
            label = np.array(image)
        assert label.dtype == np.uint8
        assert label.shape == image_size(done, image_id)
        values = set(np.unique(label).tolist())
        assert values <= {0, *(k + 1 for k in present_classes(done, image_id))}
        seen |= values
    assert len(seen) > 3  # not all of it background


def test_predictions_are_the_winners_over_a_background_of_a_fifth(done):
    for image_id in all_ids(done):
        maps = load_maps(done / "out" / "cam" / f"{image_id}.npy")
        expected = np.zeros(image_size(done, image_id), np.uint8)
        if maps:
            scores = np.stack(list(maps.values()))
            labels = np.array(list(maps)) + 1
            expected = np.where(scores.max(0) > 0.2, labels[scores.argmax(0)], 0)
        assert np.array_equal(load_index_png(done / "out" / "pred" / f"{image_id}.png"), expected)


def test_an_image_without_objects_is_all_background(done):
    out, size = done / "out", image_size(done, "empty")
    assert load_maps(out / "cam" / "empty.npy") == {}
    for folder in ("la", "ha"):
        assert np.allclose(load_maps(out / folder / "empty.npy")[0], 1)
    for folder in ("pred", "rw"):
        label = load_index_png(out / folder / "empty.png")
        assert label.shape == size
        assert not label.any()


def test_only_named_outputs_are_written(spoilable):
    shutil.rmtree(spoilable / "out" / "cam")
    command = COMMANDS["infer_cls"].split(" --out_cam ")[0]
    run_program(f"{command} --out_cam new/folder/cam --infer_list lists/val.txt", spoilable).check()
    written = sorted(path.stem for path in (spoilable / "new" / "folder" / "cam").glob("*.npy"))
    assert written == sorted(read_ids(spoilable / "lists" / "val.txt"))
    assert not (spoilable / "out" / "cam").exists()


def test_no_temporary_files_stay(done):
    assert not [name for name in contents(done / "out") if "tmp" in name]


# Repeatability


def test_same_seed_and_command_same_bytes(done, data_folder, tmp_path):
    run_all(link_data(data_folder, tmp_path))
    first, second = (timeless(contents(folder / "out")) for folder in (done, tmp_path))
    assert first.keys() == second.keys()
    assert {Path(name).suffix for name in first} == {
        ".pth",
        ".log",
        ".csv",
        ".npy",
        ".png",
        ".json",
    }
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("name", ["cls", "aff"])
def test_number_of_loader_processes_does_not_matter(name, spoilable, done):
    command = f"{COMMANDS[f'train_{name}']} --num_workers 2"
    run_program(command, spoilable).check()
    before, after = ((path / "out" / f"{name}.pth").read_bytes() for path in (done, spoilable))
    assert after == before
    logs = [(path / "out" / f"{name}.log").read_text() for path in (done, spoilable)]
    assert logs[0].splitlines()[1:] == logs[1].splitlines()[1:]


@pytest.mark.parametrize(("name", "suffix"), [("infer_cls", "npy"), ("infer_aff", "png")])
def test_loader_processes_give_the_same_outputs(name, suffix, spoilable, done):
    folder = {"infer_cls": "cam", "infer_aff": "rw"}[name]
    shutil.rmtree(spoilable / "out" / folder)
    run_program(f"{COMMANDS[name]} --num_workers 2", spoilable).check()
    assert contents(spoilable / "out" / folder) == contents(done / "out" / folder)


@pytest.mark.parametrize("name", ["cls", "aff"])
def test_another_seed_gives_other_weights(name, spoilable, done):
    run_program(f"{COMMANDS[f'train_{name}']} --max_epoches 1 --seed 1", spoilable).check()
    after = torch.load(spoilable / "out" / f"{name}.pth", weights_only=True)
    before = torch.load(done / "out" / f"{name}.pth", weights_only=True)
    assert not torch.equal(before["trunk0.weight"], after["trunk0.weight"])


@pytest.mark.parametrize(
    ("name", "flags", "folder"),
    [
        ("infer_cls", "--low_alpha 16", "la"),
        ("infer_cls", "--high_alpha 1", "ha"),
        ("infer_cls", "--scales 1", "cam"),
        ("infer_aff", "--alpha 1", "rw"),
        ("infer_aff", "--beta 1", "rw"),
        ("infer_aff", "--logt 0", "rw"),
        ("infer_aff", "--full_graph", "rw"),
        ("infer_aff", "--crf", "rw"),
    ],
)
def test_flags_of_inference_change_their_output_only(name, flags, folder, spoilable, done):
    run_program(f"{COMMANDS[name]} {flags} --overwrite", spoilable).check()
    before, after = contents(done / "out"), contents(spoilable / "out")
    assert before.keys() == after.keys()
    changed = {Path(path).parts[0] for path in before if before[path] != after[path]}
    # All outputs of stage 2 but the CAMs are made from the CAMs.
    assert changed == ({"cam", "la", "ha", "pred"} if folder == "cam" else {folder})


def test_exact_walk_gives_the_same_labels(spoilable, done):
    run_program(f"{COMMANDS['infer_aff']} --exact --overwrite", spoilable).check()
    for image_id in all_ids(done):
        series, exact = (load_index_png(p / f"out/rw/{image_id}.png") for p in (done, spoilable))
        assert (series == exact).mean() > 0.999


def test_images_that_walk_together_get_the_same_labels(spoilable, done, monkeypatch):
    monkeypatch.setitem(infer_aff.WALKS_AT_A_TIME, "cpu", 5)
    run_program(f"{COMMANDS['infer_aff']} --overwrite", spoilable).check()
    assert contents(spoilable / "out" / "rw") == contents(done / "out" / "rw")


@pytest.mark.parametrize("chosen", [0, 2])
def test_trace_draws_the_walk_of_the_chosen_images(chosen, spoilable):
    ids = all_ids(spoilable)
    words = f"--trace_ids {ids[1]} {ids[2]}" if chosen else ""
    flags = f"--logt 3 --overwrite --trace out/walks {words}"
    run_program(f"{COMMANDS['infer_aff']} {flags}", spoilable).check()
    drawn = {path.stem for path in (spoilable / "out" / "walks").glob("*.png")}
    assert drawn == (set(ids[1:3]) if chosen else {ids[0]})
    for image_id in drawn:
        with Image.open(spoilable / f"out/walks/{image_id}.gif") as film:
            assert film.n_frames == 6  # the image, and 0, 1, 2, 4, 8 steps
            width, height = film.size
        with Image.open(spoilable / f"out/walks/{image_id}.png") as strip:
            assert strip.size == (6 * width, height)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trace_ids dot", ("--trace_ids", "--trace")),
        ("--trace out/walks --trace_ids nobody", ("nobody", "all.txt")),
        ("--trace out/rw", ("--out_rw", "different")),
    ],
)
def test_trace_refuses_what_it_cannot_draw(flags, words, done):
    run_program(f"{COMMANDS['infer_aff']} {flags}", done).assert_failed(2, *words)


# Other data, other starts


def test_classes_of_another_data_set(tmp_path):
    names = [f"kind {k}" for k in range(25)]  # more than VOC's
    (tmp_path / "classes.txt").write_text("\n".join(names))
    members = {"7": [0], "a.b": [24], "Größe-2": [23, 24], "x" * 60: [], "e": [12], "f": [24, 0]}
    for seed, (image_id, classes) in enumerate(members.items()):
        write_image(tmp_path / "VOC", image_id, noise_image(48, 40, seed), "JPEG")
        write_annotation(tmp_path / "VOC", image_id, [names[k] for k in classes])
        write_mask(tmp_path / "VOC", image_id, np.full((48, 40), max(classes, default=-1) + 1))
    (tmp_path / "ids.txt").write_text("\n".join(members))
    # Session names, label file and number of workers by default.
    shared = "--voc12_root VOC --classes classes.txt --num_workers 0"
    train = f"{shared} --weights none --train_list ids.txt --batch_size 3 --max_epoches 1"
    cls, aff = "--network network.tiny_cls", "--network network.tiny_aff"
    for command in (
        f"train_cls {cls} {train} --val_list ids.txt --crop_size 48 --resize_long 40 56",
        f"infer_cls {cls} {shared} --infer_list ids.txt --weights tiny_cls.pth --out_cam cam "
        "--out_la_crf la --out_ha_crf ha --out_cam_pred pred",
        f"train_aff {aff} {train} --crop_size 72 --la_crf_dir la --ha_crf_dir ha",
        f"infer_aff {aff} {shared} --infer_list ids.txt --weights tiny_aff.pth --cam_dir cam "
        "--out_rw rw",
        "voc12.evaluate --voc12_root VOC --classes classes.txt --list ids.txt --pred pred",
    ):
        outcome = run_program(command, tmp_path).check()
    assert "kind 24" in outcome.out
    for image_id, classes in members.items():
        assert list(load_maps(tmp_path / "cam" / f"{image_id}.npy")) == sorted(classes)
        label = load_index_png(tmp_path / "rw" / f"{image_id}.png")
        assert set(np.unique(label).tolist()) <= {0, *(k + 1 for k in classes)}
    state = torch.load(tmp_path / "tiny_cls.pth", weights_only=True)
    assert state["fc8.weight"].shape[0] == 25
    assert (tmp_path / "tiny_aff.log").is_file()


def test_training_starts_from_weights_of_the_same_backbone(spoilable):
    command = f"{COMMANDS['train_aff']} --weights out/cls.pth --max_epoches 1 --lr 1e-30"
    outcome = run_program(command, spoilable).check()
    assert "tensors taken from out/cls.pth (the tiny network classifier)" in outcome.out
    assert "fresh: f8_3.weight" in outcome.out
    assert "unused: fc8.weight" in outcome.out
    before = torch.load(spoilable / "out" / "cls.pth", weights_only=True)
    after = torch.load(spoilable / "out" / "aff.pth", weights_only=True)
    trunk = [name for name in after if name.startswith("trunk")]
    assert trunk
    for name in trunk:
        assert torch.allclose(before[name], after[name], rtol=0, atol=1e-12)


# Command lines

DEFAULTS = {
    "train_cls": {
        "lr": 0.1,
        "wt_dec": 5e-4,
        "momentum": None,  # the decay's value
        "batch_size": 16,
        "max_epoches": 15,
        "crop_size": 448,
        "resize_long": (256, 512),
        "val_crop_size": 500,
        "train_list": "voc12/train_aug.txt",
        "val_list": "voc12/val.txt",
        "session_name": None,
        "label_file": "voc12/cls_labels.npy",
    },
    "infer_cls": {
        "scales": (1, 0.5, 1.5, 2),
        "low_alpha": 4,
        "high_alpha": 32,
        "out_cam": None,
        "out_la_crf": None,
        "out_ha_crf": None,
        "out_cam_pred": None,
    },
    "train_aff": {
        "lr": 0.1,
        "wt_dec": 5e-4,
        "momentum": None,
        "batch_size": 8,
        "max_epoches": 8,
        "crop_size": 448,
        "radius": 5,
        "train_list": "voc12/train_aug.txt",
    },
    "infer_aff": {"alpha": 16, "beta": 8, "logt": 8, "radius": 5},
}
REQUIRED = {
    "train_cls": "--voc12_root R --weights W",
    "infer_cls": "--voc12_root R --weights W",
    "train_aff": "--voc12_root R --weights W --la_crf_dir L --ha_crf_dir H",
    "infer_aff": "--voc12_root R --weights W --cam_dir C --out_rw O",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_defaults_are_the_methods(name):
    parser = importlib.import_module(name).get_args_parser()
    args = vars(parser.parse_args(REQUIRED[name].split()))
    for flag, value in DEFAULTS[name].items():
        assert args[flag] == value, flag
    assert (args["device"], args["seed"], args["classes"]) == ("auto", 0, None)
    assert args["network"].__name__ == f"network.vgg16_{name[-3:]}"


PUBLISHED = (
    "train_cls --lr 0.1 --batch_size 16 --max_epoches 15 --crop_size 448 "
    "--network network.resnet38_cls --voc12_root VOC2012 --weights W --wt_dec 5e-4",
    "infer_cls --infer_list voc12/train_aug.txt --voc12_root VOC2012 --network network.vgg16_cls "
    "--weights W --out_cam D --out_la_crf D --out_ha_crf D",
    "infer_cls --infer_list voc12/val.txt --voc12_root VOC2012 --network network.resnet38_cls "
    "--weights res38_cls.pth --out_cam_pred D",
    "train_aff --lr 0.1 --batch_size 8 --max_epoches 8 --crop_size 448 --voc12_root VOC2012 "
    "--network network.resnet38_aff --weights W --wt_dec 5e-4 --la_crf_dir D --ha_crf_dir D",
    "infer_aff --infer_list voc12/val.txt --voc12_root VOC2012 --network network.vgg16_aff "
    "--weights W --cam_dir D --out_rw D",
)
OTHER_FLAGS = {
    "train_cls": "--num_workers 8 --train_list T --val_list V --session_name vgg_cls",
    "infer_cls": "--num_workers 8 --low_alpha 4 --high_alpha 32",
    "train_aff": "--num_workers 8 --train_list T --session_name vgg_aff",
    "infer_aff": "--num_workers 8 --alpha 16 --beta 8 --logt 8",
}


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_commands_parse(command):
    name, *words = command.split()
    importlib.import_module(name).get_args_parser().parse_args([*words, *OTHER_FLAGS[name].split()])


@pytest.mark.parametrize("name", MODULES)
def test_help_explains_every_flag(name, tmp_path):
    outcome = run_program(f"{name} --help", tmp_path).check()
    for action in importlib.import_module(name).get_args_parser()._actions:
        assert action.help, action.option_strings
        for option in action.option_strings:
            assert option in outcome.out
        if action.default not in (None, "==SUPPRESS=="):
            assert f"(default: {action.default})" in " ".join(outcome.out.split()), action.dest


@pytest.mark.parametrize("name", MODULES)
def test_nothing_named_is_a_usage_error(name, tmp_path):
    run_program(name, tmp_path).assert_failed(2, "--voc12_root")


POSITIVE = ("0", "-1", "nan", "abc", "")
WHOLE = (*POSITIVE, "1.5")
REAL = (*POSITIVE, "inf")
BAD_NUMBERS = {
    "train_cls": {
        **dict.fromkeys(("batch_size", "max_epoches", "crop_size", "val_crop_size"), WHOLE),
        "lr": REAL,
        "wt_dec": ("-1", "nan", "inf", "abc"),
        "momentum": ("-0.1", "1.1", "nan", "abc"),
        "num_workers": ("-1", "nan", "abc", "0.5"),
        "seed": ("-1", "nan", "abc", "0.5"),
        "resize_long": ("0 64", "64 -1", "64 nan", "64 32", "64"),
    },
    "infer_cls": {
        **dict.fromkeys(("low_alpha", "high_alpha", "scales"), REAL),
        "num_workers": ("-1",),
    },
    "train_aff": {
        **dict.fromkeys(("batch_size", "max_epoches", "crop_size", "radius"), WHOLE),
        "lr": REAL,
        "wt_dec": ("-1", "nan"),
    },
    "infer_aff": {
        **dict.fromkeys(("alpha", "beta"), REAL),
        "radius": WHOLE,
        "logt": ("-1", "nan", "abc", "0.5", "21"),
    },
}


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        (name, flag, value)
        for name, flags in BAD_NUMBERS.items()
        for flag, values in flags.items()
        for value in values
    ],
)
def test_numbers_out_of_range(name, flag, value, tmp_path):
    value = value or "''"
    outcome = run_program(f"{COMMANDS[name]} --{flag} {value}", tmp_path)
    outcome.assert_failed(2, f"--{flag}")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--network network.vgg19_cls", ("--network", "no network 'network.vgg19_cls'")),
        ("--network os", ("--network", "'os'")),
        ("--network os.path", ("--network", "'os.path'", "package network")),
        ("--network network.tinyd", ("--network", "'network.tinyd'")),
        ("--network network.heads", ("--network", "'network.heads'")),
        ("--network network.tiny_cls.Net", ("--network",)),
        ("--network ''", ("--network",)),
        ("--device nonsense", ("--device nonsense", "auto or cpu")),
        ("--device cuda:99", ("--device cuda:99", "auto or cpu")),
        ("--device meta", ("--device meta", "auto or cpu")),
        ("--lerning_rate 1", ("--lerning_rate",)),
    ],
)
@pytest.mark.parametrize("name", ["train_cls", "infer_aff"])
def test_command_lines_that_cannot_be_carried_out(name, command, words, done):
    run_program(f"{COMMANDS[name]} {command}", done).assert_failed(2, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("name", PROGRAMS)
def test_cuda_where_there_is_none(name, done):
    run_program(f"{COMMANDS[name]} --device cuda", done).assert_failed(2, "--device cuda")


def test_a_network_for_the_other_task(done):
    for name, network in (("train_cls", "tiny_aff"), ("infer_aff", "tiny_cls")):
        outcome = run_program(f"{COMMANDS[name]} --network network.{network}", done)
        outcome.assert_failed(2, "--network", f"network.{network}")


def test_no_output_folder_named(done):
    command = COMMANDS["infer_cls"].split(" --out_cam ")[0]
    words = ("--out_cam", "--out_la_crf", "--out_ha_crf", "--out_cam_pred")
    run_program(command, done).assert_failed(2, *words)


@pytest.mark.parametrize(("first", "second"), [("cam", "la_crf"), ("la_crf", "ha_crf")])
def test_outputs_that_would_overwrite_each_other(first, second, spoilable):
    before = contents(spoilable / "out")
    flags = f"--out_{first} out/same --out_{second} out/../out/same"
    outcome = run_program(f"{COMMANDS['infer_cls']} {flags}", spoilable)
    outcome.assert_failed(2, f"--out_{first}", f"--out_{second}", "different folders")
    assert contents(spoilable / "out") == before


@pytest.mark.parametrize(("crop_size", "words"), [(84, "multiple of 8"), (64, "at least 72")])
def test_crop_sizes_that_affinities_cannot_have(crop_size, words, done):
    outcome = run_program(f"{COMMANDS['train_aff']} --crop_size {crop_size}", done)
    outcome.assert_failed(2, f"--crop_size {crop_size}", words)


# Data that cannot be used

TRUNCATED, CORRUPT = "toy_000000", "toy_000002"


def assert_fails_alike(folder, name, flags, *words):
    """The command fails with one sentence and leaves what was there as it was."""
    before = {k: v for k, v in contents(folder / "out").items() if k.endswith(".pth")}
    run_program(f"{COMMANDS[name]} {flags}", folder).assert_failed(1, *words)
    after = {k: v for k, v in contents(folder / "out").items() if k.endswith(".pth")}
    assert after == before


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_root(name, spoilable):
    assert_fails_alike(spoilable, name, "--voc12_root nowhere", "nowhere: ", "--voc12_root")


LIST_FLAGS = {
    "train_cls": ("--train_list", "--val_list"),
    "infer_cls": ("--infer_list",),
    "train_aff": ("--train_list",),
    "infer_aff": ("--infer_list",),
    "voc12.evaluate": ("--list",),
}


@pytest.mark.parametrize(
    ("name", "flag"), [(name, flag) for name, flags in LIST_FLAGS.items() for flag in flags]
)
def test_missing_and_empty_lists(name, flag, spoilable):
    assert_fails_alike(spoilable, name, f"{flag} none.txt", "none.txt: ", "voc12.prepare")
    (spoilable / "none.txt").write_text("\n# none\n")
    assert_fails_alike(spoilable, name, f"{flag} none.txt", "none.txt: ", "empty")


@pytest.mark.parametrize("name", ["train_cls", "train_aff"])
def test_list_that_does_not_fill_a_batch(name, spoilable):
    assert_fails_alike(
        spoilable,
        name,
        "--train_list lists/val.txt --batch_size 3",
        *("lists/val.txt: ", "2 images", "batch of 3", "--batch_size"),
    )


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_bad_images_are_named(name, num_workers, spoilable):
    images = spoilable / "VOC" / "JPEGImages"
    flags = f"--num_workers {num_workers} {LIST_FLAGS[name][0]} one.txt "
    flags += "--batch_size 1" if name.startswith("train") else "--overwrite"
    path = images / f"{TRUNCATED}.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (images / f"{CORRUPT}.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no photograph")
    for image_id, reason in (
        (TRUNCATED, "not a readable image"),
        (CORRUPT, "not a readable image"),
        ("absent", "no such file"),
    ):
        (spoilable / "one.txt").write_text(f"{image_id}\n")
        write_annotation(spoilable / "VOC", "absent", [])
        words = (f"VOC/JPEGImages/{image_id}.jpg: ", reason)
        assert_fails_alike(spoilable, name, flags, *words)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("flag", ["--train_list", "--val_list"])
def test_id_without_label(flag, num_workers, spoilable):
    write_image(spoilable / "VOC", "orphan", noise_image(40, 50))
    (spoilable / "one.txt").write_text("orphan\n")
    flags = f"--batch_size 1 --max_epoches 1 --num_workers {num_workers} {flag} one.txt"
    assert_fails_alike(
        spoilable, "train_cls", flags, "orphan: ", "no image-level label", "orphan.xml"
    )


def test_id_without_label_in_inference(spoilable):
    write_image(spoilable / "VOC", "orphan", noise_image(40, 50))
    (spoilable / "one.txt").write_text("orphan\n")
    assert_fails_alike(spoilable, "infer_cls", "--infer_list one.txt", "orphan: ", "label")


def test_missing_label_file(spoilable):
    assert_fails_alike(spoilable, "infer_cls", "--label_file labels.npy", "labels.npy: ")


def test_labels_of_another_class_list(spoilable):
    (spoilable / "classes.txt").write_text("\n".join(VOC_CLASSES[:12]))
    flags = "--classes classes.txt"
    assert_fails_alike(spoilable, "train_cls", flags, "cls_labels.npy: ", "12 classes")


def test_missing_mask(spoilable):
    image_id = read_ids(spoilable / "lists" / "val.txt")[0]
    (spoilable / "VOC" / "SegmentationClass" / f"{image_id}.png").unlink()
    assert_fails_alike(spoilable, "voc12.evaluate", "", f"SegmentationClass/{image_id}.png: ")


def test_missing_prediction(spoilable):
    image_id = read_ids(spoilable / "lists" / "val.txt")[0]
    (spoilable / "out" / "rw" / f"{image_id}.png").unlink()
    assert_fails_alike(spoilable, "voc12.evaluate", "", f"out/rw/{image_id}.png: ")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "folder"), [("train_aff", "la"), ("train_aff", "ha"), ("infer_aff", "cam")]
)
def test_maps_of_the_wrong_size_damaged_or_missing(name, folder, num_workers, spoilable):
    image_id = read_ids(spoilable / "lists" / "train.txt")[0]
    (spoilable / "one.txt").write_text(f"{image_id}\n")
    flags = f"--num_workers {num_workers} {LIST_FLAGS[name][0]} one.txt "
    flags += "--batch_size 1" if name.startswith("train") else "--overwrite"
    path = spoilable / "out" / folder / f"{image_id}.npy"
    named = f"out/{folder}/{image_id}.npy: "
    whole = path.read_bytes()
    save_maps(path, {k: v[:-1, :-1] for k, v in load_maps(path).items()})
    assert_fails_alike(spoilable, name, flags, named, "size")
    path.write_bytes(whole[: len(whole) // 2])
    assert_fails_alike(spoilable, name, flags, named)
    path.unlink()
    assert_fails_alike(spoilable, name, flags, named)


@pytest.mark.parametrize("folder", ["la", "ha"])
@pytest.mark.parametrize(
    ("name", "flag"), [("infer_aff", "--cam_dir"), ("voc12.evaluate", "--cam")]
)
def test_crf_scores_are_not_taken_for_cams(name, flag, folder, spoilable):
    command = COMMANDS[name].replace("--pred out/rw", "").replace("out/rw", "new")
    outcome = run_program(
        f"{command} {LIST_FLAGS[name][0]} lists/train.txt {flag} out/{folder}", spoilable
    )
    outcome.assert_failed(1, f"out/{folder}/", "CRF scores", "--out_cam")


def test_swapped_crf_folders_are_noticed(spoilable):
    # Where every image has more background under the low alpha, as it must.
    ids = read_ids(spoilable / "lists" / "train.txt")
    for image_id in ids:
        scores = load_maps(spoilable / "out" / "la" / f"{image_id}.npy")
        first, *others = scores.values()
        for folder, share in (("la", 0.9), ("ha", 0.1)):
            rest = np.full_like(first, (1 - share) / len(others))
            maps = {0: np.full_like(first, share), **dict.fromkeys(list(scores)[1:], rest)}
            save_maps(spoilable / "out" / folder / f"{image_id}.npy", maps)
    command = f"{COMMANDS['train_aff']} --max_epoches 1"
    run_program(command, spoilable).check()
    swapped = f"{command} --la_crf_dir out/ha --ha_crf_dir out/la"
    run_program(swapped, spoilable).assert_failed(1, "swapped", "--la_crf_dir", "--out_la_crf")
    same = f"{command} --la_crf_dir out/ha --ha_crf_dir out/../out/ha"
    run_program(same, spoilable).assert_failed(2, "--la_crf_dir", "same folder")


@pytest.mark.parametrize(
    ("name", "flag"), [("train_aff", "--la_crf_dir"), ("train_aff", "--ha_crf_dir"),
                       ("infer_aff", "--cam_dir"), ("voc12.evaluate", "--pred")]
)  # fmt: skip
def test_an_empty_folder_is_noticed_before_anything_is_made(name, flag, spoilable):
    before = contents(spoilable / "out")
    (spoilable / "empty").mkdir()
    command = COMMANDS[name].replace("--out_rw out/rw", "--out_rw new")
    outcome = run_program(f"{command} {flag} empty", spoilable)
    outcome.assert_failed(1, "empty/toy_", "no such file", "infer_", "--out_")
    count = re.search(r"\((\d+) of (\d+) are missing\)", outcome.last_line)
    assert count and count[1] == count[2]
    assert contents(spoilable / "out") == before


def test_where_labels_come_from_is_said(spoilable):
    write_image(spoilable / "VOC", "extra", noise_image(40, 50))
    write_annotation(spoilable / "VOC", "extra", ["cat"])
    (spoilable / "two.txt").write_text("toy_000000\nextra\n")
    flags = "--infer_list two.txt --overwrite"
    outcome = run_program(f"{COMMANDS['infer_cls']} {flags}", spoilable).check()
    assert "labels: 1 from lists/cls_labels.npy, 1 from annotations" in outcome.out


@pytest.fixture(scope="module")
def weight_files(done):
    """Files that are no weights of the tiny networks, in the folder weights."""
    folder = done / "weights"
    folder.mkdir()
    tensor = torch.zeros(2, 2)
    torch.save({"conv5_3.weight": tensor, "fc8.weight": tensor}, folder / "vgg_cls.pth")
    torch.save({"b7.conv_branch2b2.weight": tensor}, folder / "resnet.pth")
    torch.save({"module.layer1.weight": tensor}, folder / "unknown.pth")
    torch.save([tensor], folder / "list.pth")
    torch.save({}, folder / "nothing.pth")
    torch.save({"epoch": 3, "net": os.system}, folder / "code.pth")
    whole = (done / "out" / "cls.pth").read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.pth").write_bytes(b"<html>404</html>" * 50)
    (folder / "zero.pth").touch()
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("weights/absent.pth", ("no such weight file",)),
        ("weights", ("is a folder",)),
        ("weights/corrupt.pth", ()),
        ("weights/truncated.pth", ()),
        ("weights/zero.pth", ()),
        ("weights/code.pth", ("refused",)),
        ("weights/list.pth", ("no state dict",)),
        ("weights/nothing.pth", ("no state dict",)),
        ("weights/vgg_cls.pth", ("another network", "VGG-16 classifier", "trunk0.weight")),
        ("weights/resnet.pth", ("another network", "ResNet-38", "trunk0.weight")),
        ("weights/unknown.pth", ("another network", "trunk0.weight")),
    ],
)
def test_weights_that_do_not_fit(name, weights, words, weight_files):
    folder = weight_files.parent
    if "another network" in words:
        words = (*words, f"network.tiny_{name[-3:]}")
    assert_fails_alike(folder, name, f"--weights {weights}", f"{weights}: ", *words)


def test_weights_of_the_other_task(done):
    words = ("out/aff.pth: ", "AffinityNet", "network.tiny_cls", "fc8.weight missing")
    assert_fails_alike(done, "infer_cls", "--weights out/aff.pth", *words)
    words = ("out/cls.pth: ", "classifier", "network.tiny_aff", "f8_3.weight missing")
    assert_fails_alike(done, "infer_aff", "--weights out/cls.pth", *words)


def test_weights_of_another_class_count(spoilable):
    (spoilable / "classes.txt").write_text("\n".join([*VOC_CLASSES, "zebra"]))
    label_path = spoilable / "lists" / "cls_labels.npy"  # labels of all 21: they are checked first
    labels = load_npy_dict(label_path)
    save_npy_dict(label_path, {k: np.append(v, 0) for k, v in labels.items()})
    words = ("out/cls.pth: ", "fc8.weight (20, 128, 1, 1) instead of (21, 128, 1, 1)")
    assert_fails_alike(spoilable, "infer_cls", "--classes classes.txt", *words)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train_cls", "--session_name taken/cls"),
        ("train_aff", "--session_name taken/aff"),
        ("infer_cls", "--out_cam taken"),
        ("infer_cls", "--out_la_crf taken/below"),
        ("infer_cls", "--out_cam_pred taken"),
        ("infer_aff", "--out_rw taken"),
    ],
)
def test_output_folder_that_is_a_file(name, flags, spoilable):
    (spoilable / "taken").write_text("mine")
    assert_fails_alike(spoilable, name, flags, "taken")
    assert (spoilable / "taken").read_text() == "mine"


@pytest.mark.parametrize("name", ["train_cls", "train_aff"])
@pytest.mark.parametrize("session", ["out/", "out", "."])
def test_session_names_that_no_file_can_have(name, session, spoilable):
    for suffix in (".pth", ".log"):
        (spoilable / f"out{suffix}").mkdir()
    before = contents(spoilable / "out")
    outcome = run_program(f"{COMMANDS[name]} --session_name {session}", spoilable)
    outcome.assert_failed(2, f"--session_name {session}")
    assert contents(spoilable / "out") == before


@pytest.mark.parametrize("name", ["train_cls", "train_aff"])
def test_a_mistyped_weight_file_leaves_the_last_session_alone(name, spoilable):
    before = contents(spoilable / "out")
    run_program(f"{COMMANDS[name]} --weights mistyped.pth", spoilable).assert_failed(1, "mistyped")
    assert contents(spoilable / "out") == before


@pytest.mark.parametrize("name", PROGRAMS)
def test_missing_images_are_counted_before_anything_is_made(name, spoilable):
    image_ids = read_ids(spoilable / "lists" / "train.txt")
    for image_id in image_ids[-2:]:
        (spoilable / "VOC" / "JPEGImages" / f"{image_id}.jpg").unlink()
    before = contents(spoilable / "out")
    flags = f"{LIST_FLAGS[name][0]} lists/train.txt"
    if name.startswith("infer"):
        flags += " --overwrite"
    outcome = run_program(f"{COMMANDS[name]} {flags}", spoilable)
    outcome.assert_failed(1, f"JPEGImages/{image_ids[-2]}.jpg: no such file", "2 of ")
    assert contents(spoilable / "out") == before


@pytest.mark.parametrize(
    ("name", "parts"), [("train_cls", ["loss"]), ("train_aff", ["loss", "bg", "fg", "neg"])]
)
def test_loss_that_is_not_finite(name, parts, spoilable):
    for path in (spoilable / "out").glob("*.pth"):
        path.unlink()
    outcome = run_program(f"{COMMANDS[name]} --lr 1e30", spoilable)
    outcome.assert_failed(1, "not finite at step ", "--lr")
    found = re.search(r"at step (\d+) \((.*?)\)", outcome.last_line)
    assert 1 <= int(found[1]) <= 3
    assert [part.split()[0] for part in found[2].split(", ")] == parts
    assert "nan" in found[2] or "inf" in found[2]
    assert not list(spoilable.rglob("*.pth"))


def test_validation_loss_that_is_not_finite(spoilable):
    (spoilable / "out" / "cls.pth").unlink()
    flags = "--train_list lists/val.txt --batch_size 2 --max_epoches 1 --lr 1e30"  # one step
    outcome = run_program(f"{COMMANDS['train_cls']} {flags}", spoilable)
    outcome.assert_failed(1, "validation", "not finite", "--lr")
    assert not (spoilable / "out" / "cls.pth").exists()


# As processes


def run_process(command, cwd):
    name, *words = command.split()
    return subprocess.run(
        [sys.executable, str(REPOSITORY / f"{name}.py"), *words],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_programs_start_from_another_folder(spoilable, done):
    shutil.rmtree(spoilable / "out" / "rw")
    process = run_process(COMMANDS["infer_aff"], spoilable)
    assert process.returncode == 0, process.stderr
    assert contents(spoilable / "out" / "rw") == contents(done / "out" / "rw")


def test_a_reader_that_has_gone_is_no_error(done):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tool.weights", "show", str(done / "out" / "cls.pth")]
    process = subprocess.run(
        command, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, "")


def test_processes_end_with_their_exit_code(tmp_path):
    process = run_process(f"{COMMANDS['train_cls']} --voc12_root nowhere", tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("error: nowhere: ")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""
