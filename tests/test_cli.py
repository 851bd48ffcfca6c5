"""The four programs from end to end on a tiny devkit, their command lines and their exit codes."""

import argparse
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
from helpers import contents, noise_image, run_program, timeless, write_annotation, write_image
from PIL import Image

import infer_aff
from network import tiny_aff, tiny_cls
from tool.maps import load_maps
from tool.run import cli
from voc12 import toy
from voc12.devkit import VOC_CLASSES, Devkit, read_ids

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = (*VOC_CLASSES, *(f"kind {k}" for k in range(20, 25)))  # 25
DATA = "--voc12_root VOC --classes classes.txt"
CLS = f"--network network.tiny_cls {DATA} --num_workers 0 --label_file lists/cls_labels.npy"
AFF = f"--network network.tiny_aff {DATA} --num_workers 0"
TRAIN = "--weights none --train_list all.txt --batch_size 4 --max_epoches 2 --lr 0.02"
# The commands of a run below one folder; a later flag overrides an earlier one.
COMMANDS = {
    "train_cls": f"train_cls {CLS} {TRAIN} --val_list lists/val.txt --crop_size 64 "
    "--resize_long 48 80 --val_crop_size 72 --session_name out/cls",
    "infer_cls": f"infer_cls {CLS} --weights out/cls.pth --infer_list all.txt --scales 1 0.5 "
    "--out_cam out/cam --out_la_crf out/la --out_ha_crf out/ha --out_cam_pred out/pred",
    "train_aff": f"train_aff {AFF} {TRAIN} --crop_size 80 --la_crf_dir out/la --ha_crf_dir out/ha "
    "--session_name out/aff",
    "infer_aff": f"infer_aff {AFF} --weights out/aff.pth --infer_list all.txt --cam_dir out/cam "
    "--out_rw out/rw --logt 3 --trace out/walks --trace_ids palette.of.8 dot",
}
# Unusual photographs and names.
ODD_IMAGES = {
    "palette.of.8": noise_image(40, 50, 2).quantize(8),
    "my photo": noise_image(40, 50, 3).convert("CMYK"),
    "Größe 写真": noise_image(40, 50, 4).convert("RGBA"),
    "dot": noise_image(1, 1, 6),
    "empty": noise_image(40, 50, 7),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder where the four programs ran: a toy devkit and the odd images, 25 classes."""
    folder = tmp_path_factory.mktemp("done")
    toy.make_devkit(folder / "VOC", 8, 96, 0)
    for image_id, image in ODD_IMAGES.items():
        write_image(folder / "VOC", image_id, image, "JPEG" if image.mode == "CMYK" else "PNG")
        names = [] if image_id == "empty" else ["cat", "kind 24"]
        write_annotation(folder / "VOC", image_id, names)
    photographs = folder / "VOC" / "JPEGImages"
    (photographs / "empty.jpg").rename(photographs / "empty.PNG")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    run_program(f"voc12.prepare {DATA} --out_dir lists", folder).check()
    lists = [(folder / "lists" / name).read_text() for name in ("train.txt", "val.txt")]
    lists += [f"/JPEGImages/{image_id}.jpg\n" for image_id in ODD_IMAGES]
    (folder / "all.txt").write_text("".join(lists))
    for command in COMMANDS.values():
        run_program(command, folder).check()
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """The same data, and a copy of the outputs to be changed."""
    for name in ("VOC", "lists", "classes.txt", "all.txt"):
        (tmp_path / name).symlink_to(done / name)
    shutil.copytree(done / "out", tmp_path / "out")
    return tmp_path


def test_training_writes_a_state_dict_of_the_network_and_a_log(done):
    for name, net, losses in (
        ("cls", tiny_cls.Net(num_classes=25), "validation loss N"),
        ("aff", tiny_aff.Net(), "bg N, fg .*, neg N"),
    ):
        state = torch.load(done / "out" / f"{name}.pth", weights_only=True)
        net.load_state_dict(state, strict=True)
        assert all(value.isfinite().all() for value in state.values())
        log = (done / "out" / f"{name}.log").read_text()
        assert COMMANDS[f"train_{name}"].partition(" ")[2] in log.splitlines()[0]
        assert re.search(f"epoch 2/2: loss N, {losses}".replace("N", r"\d+\.\d+"), log)


def test_outputs_have_the_size_of_the_image_and_its_classes_only(done):
    devkit, out = Devkit(done / "VOC", CLASSES), done / "out"
    background, seen = {"la": 0.0, "ha": 0.0}, {"pred": set(), "rw": set()}
    for image_id in read_ids(done / "all.txt"):
        classes = np.flatnonzero(devkit.image_label(image_id)).tolist()
        labels = [0, *(k + 1 for k in classes)]
        image = devkit.load_image(image_id)
        size = (image.height, image.width)
        maps = load_maps(out / "cam" / f"{image_id}.npy", size)
        assert list(maps) == classes
        for values in maps.values():
            assert 0 <= values.min() <= values.max() <= 1
            assert values.max() > 0.9 or not values.any()  # divided by its maximum
        for folder in background:
            scores = load_maps(out / folder / f"{image_id}.npy", size)
            assert list(scores) == labels
            assert np.allclose(sum(scores.values()), 1, atol=1e-4)
            background[folder] += scores[0].mean()
        for folder in seen:
            with Image.open(out / folder / f"{image_id}.png") as label:
                assert (label.format, label.mode, label.size) == ("PNG", "P", image.size)
                values = set(np.unique(label).tolist())
            assert values <= set(labels)
            seen[folder] |= values
    assert background["ha"] < background["la"]
    assert all(len(labels) > 3 for labels in seen.values())


def test_trace_draws_the_walk_of_the_chosen_images(done):
    walks = done / "out" / "walks"
    assert {path.stem for path in walks.glob("*.png")} == {"palette.of.8", "dot"}
    with Image.open(walks / "dot.gif") as film, Image.open(walks / "dot.png") as strip:
        assert film.n_frames == 6  # the image, and 0, 1, 2, 4, 8 steps
        assert strip.size == (6 * film.width, film.height)


def test_same_seed_same_bytes_with_any_number_of_loader_processes(done, copy):
    shutil.rmtree(copy / "out")
    for command in COMMANDS.values():
        run_program(f"{command} --num_workers 2", copy).check()
    first, second = (timeless(contents(folder / "out")) for folder in (done, copy))
    for files in (first, second):  # the first line of a log is the command
        files.update({k: v.partition(b"\n")[2] for k, v in files.items() if k.endswith(".log")})
    assert first == second


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        ("train_cls --seed 1", {"cls.pth", "cls.log", "cls.csv"}),
        ("infer_cls --scales 1", {"cam", "la", "ha", "pred"}),
        ("infer_cls --low_alpha 16", {"la"}),
        ("infer_aff --beta 1", {"rw", "walks"}),
        ("infer_aff --full_graph", {"rw", "walks"}),
        ("infer_aff --crf", {"rw", "walks"}),
    ],
)
def test_flags_change_their_outputs_only(command, changed, copy):
    name, _, flags = command.partition(" ")
    before = contents(copy / "out")
    flags += " --overwrite" if name.startswith("infer") else ""
    run_program(f"{COMMANDS[name]} {flags}", copy).check()
    after = contents(copy / "out")
    assert before.keys() == after.keys()
    assert {Path(path).parts[0] for path in before if before[path] != after[path]} == changed


def test_images_that_walk_together_get_the_same_labels(copy, monkeypatch):
    before = contents(copy / "out" / "rw")
    monkeypatch.setitem(infer_aff.WALKS_AT_A_TIME, "cpu", 5)
    run_program(f"{COMMANDS['infer_aff']} --overwrite", copy).check()
    assert contents(copy / "out" / "rw") == before


# Command lines

# What the programs require, and the released README's other flags, all of them.
REQUIRED = dict.fromkeys(COMMANDS, "--voc12_root R --weights W")
REQUIRED["train_aff"] += " --la_crf_dir L --ha_crf_dir H"
REQUIRED["infer_aff"] += " --cam_dir C --out_rw O"
TRAINING = "--lr 0.1 --batch_size 16 --max_epoches 15 --crop_size 448 --wt_dec 5e-4 --train_list T"
PUBLISHED = {
    "train_cls": f"--network network.resnet38_cls {TRAINING} --val_list V --session_name S",
    "infer_cls": "--network network.resnet38_cls --infer_list I --out_cam D --out_la_crf D "
    "--out_ha_crf D --out_cam_pred D --low_alpha 4 --high_alpha 32",
    "train_aff": f"--network network.resnet38_aff {TRAINING} --session_name S",
    "infer_aff": "--network network.resnet38_aff --infer_list I --alpha 16 --beta 8 --logt 8",
}
DEFAULTS = {
    "train_cls": {"batch_size": 16, "max_epoches": 15, "crop_size": 448, "lr": 0.1, "wt_dec": 5e-4}
    | {"momentum": None, "resize_long": (256, 512), "val_crop_size": 500},
    "infer_cls": {"scales": (1, 0.5, 1.5, 2), "low_alpha": 4, "high_alpha": 32, "out_cam": None},
    "train_aff": {"batch_size": 8, "max_epoches": 8, "crop_size": 448, "lr": 0.1, "radius": 5},
    "infer_aff": {"alpha": 16, "beta": 8, "logt": 8, "radius": 5},
}


def parsed(name, flags):
    words = f"{REQUIRED[name]} {flags}".split()
    return vars(importlib.import_module(name).get_args_parser().parse_args(words))


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_the_methods_and_published_commands_parse(name):
    args = parsed(name, "")
    assert {flag: args[flag] for flag in DEFAULTS[name]} == DEFAULTS[name]
    assert (args["device"], args["seed"], args["classes"]) == ("auto", 0, None)
    assert args["network"].__name__ == f"network.vgg16_{name[-3:]}"
    assert parsed(name, f"{PUBLISHED[name]} --num_workers 8")["num_workers"] == 8


@pytest.mark.parametrize("name", [*COMMANDS, "voc12.prepare", "voc12.evaluate", "voc12.export"])
def test_help_explains_every_flag_with_its_default(name, tmp_path):
    text = " ".join(run_program(f"{name} --help", tmp_path).check().out.split())
    for action in importlib.import_module(name).get_args_parser()._actions:
        assert action.help, action.option_strings
        assert all(option in text for option in action.option_strings)
        if action.default not in (None, "==SUPPRESS=="):
            default = action.default
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            assert f"(default: {shown})" in text, action.dest
    run_program(name, tmp_path).assert_failed(2, "--voc12_root")


@pytest.mark.parametrize(
    ("number", "accepted", "refused"),
    [
        (cli.number(int, 1), "1 16", "0 -1 1.5 nan inf abc"),
        (cli.number(int, 0, 20), "0 20", f"-1 21 {10**30} 0.5"),
        (cli.number(float, 0, 1), "0 1", "-0.1 1.1 nan"),
        (cli.number(float, 0, above=True), "1e-30 10", "0 -1 nan inf"),
    ],
)
def test_numbers_have_a_range(number, accepted, refused):
    assert [number(text) for text in accepted.split()] == [float(t) for t in accepted.split()]
    for text in [*refused.split(), ""]:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not "):
            number(text)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_package", "'no_such_package'"),
        ("from network.no_such_network import Net", "'network.no_such_network'"),
        ("from network.tinyd import NoSuchName", "'NoSuchName'"),
        ("WIDTH = int('wide')", "network.mine_cls cannot be imported"),
    ],
)
def test_a_network_whose_import_fails_says_why(source, words, tmp_path, monkeypatch):
    (tmp_path / "mine_cls.py").write_text(source)
    monkeypatch.setattr("network.__path__", [str(tmp_path), *sys.modules["network"].__path__])
    with pytest.raises(ImportError, match=words):
        parsed("train_cls", "--network network.mine_cls")


def prepare(devkit, out_dir, stdout, **variables):
    command = [sys.executable, "-m", "voc12.prepare", "--voc12_root", devkit, "--out_dir", out_dir]
    root, environment = Path(__file__).parents[1], os.environ | variables
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, cwd=root, env=environment, **pipes)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"Gr\xf6\xdfe \u5199"), ("cp1252", r"Größe \u5199")]
)
def test_output_that_the_stream_lacks_is_escaped(encoding, shown, done, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "printed", "wb") as printed:
        folder = tmp_path / "Größe 写"
        prepare(done / "VOC", folder, printed, PYTHONIOENCODING=encoding).check_returncode()
    lines = (tmp_path / "out" / "printed").read_text(encoding).splitlines()
    assert f"{tmp_path / shown}/train.txt: 6 images" in lines


def test_processes_end_with_their_exit_code(done, tmp_path):
    failed = prepare(tmp_path, tmp_path, subprocess.PIPE)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert re.fullmatch(f"error: {tmp_path}: .*\n", failed.stderr)
    read, write = os.pipe()
    os.close(read)  # as | head does
    closed = prepare(done / "VOC", tmp_path, write)
    os.close(write)
    assert closed.returncode == 128 + signal.SIGPIPE
    assert "error" not in closed.stderr.lower()
