"""Whatever a user feeds the programs: one sentence, an exit code, and nothing lost or half-written.

``FAULTS`` is the table: what is spoilt, the command, the exit code, words of the sentence. Each
fault is set up in a fresh copy of a small finished run.
"""

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import contents, noise_image, run_program, write_annotation, write_image, write_mask
from PIL import Image, ImageFile

import infer_aff
import infer_cls
from network import tiny_aff, tiny_cls
from tool.maps import save_index_png, save_maps, save_npy_dict
from voc12.devkit import VOC_CLASSES

CLS = "--network network.tiny_cls --num_workers 0 --voc12_root VOC --label_file labels.npy"
AFF = "--network network.tiny_aff --num_workers 0 --voc12_root VOC"
TRAIN = "--weights none --train_list ids.txt --batch_size 1 --max_epoches 1 --lr 0.01"
COMMANDS = {
    "train_cls": f"train_cls {CLS} {TRAIN} --val_list ids.txt --crop_size 48 --resize_long 40 56 "
    "--val_crop_size 48 --session_name new/cls",
    "infer_cls": f"infer_cls {CLS} --weights cls.pth --infer_list ids.txt --scales 1 0.5 "
    "--out_cam new/cam --out_cam_pred new/pred",
    "train_aff": f"train_aff {AFF} {TRAIN} --crop_size 72 --la_crf_dir la --ha_crf_dir ha "
    "--session_name new/aff",
    "infer_aff": f"infer_aff {AFF} --weights aff.pth --infer_list ids.txt --cam_dir cam --logt 2 "
    "--out_rw new/rw",
    "prepare": "voc12.prepare --voc12_root VOC --out_dir new/lists",
    "evaluate": "voc12.evaluate --num_workers 0 --voc12_root VOC --list ids.txt --pred pred "
    "--json new/scores.json",
    "evaluate_cam": "voc12.evaluate --num_workers 0 --voc12_root VOC --list ids.txt --cam cam",
    "report": "voc12.report --voc12_root VOC --list ids.txt --cam cam --la la --ha ha --rw pred "
    "--log losses.csv --out new/page.html",
    "sheet": "voc12.report --voc12_root VOC --list ids.txt --cam cam --rw pred --out new/sheet.png",
    "export": "voc12.export --voc12_root VOC --rw pred --list train.txt --val_list val.txt "
    "--out new/tree",
    "show": "tool.weights show cls.pth --json new/tensors.json",
    "convert": "tool.weights convert cls.pth new/start.pth --network network.tiny_cls",
}
CLASSES = {"a": [7], "b": [11, 14], "c": []}  # cat; dog and person; nothing
SIZES = {"a": (40, 50), "b": (56, 40), "c": (33, 41)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Images this small gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three images with all that the programs read, made by hand."""
    root = tmp_path_factory.mktemp("finished")
    labels = {}
    for seed, (image_id, classes) in enumerate(CLASSES.items()):
        size = SIZES[image_id]
        write_image(root / "VOC", image_id, noise_image(*size, seed))
        write_annotation(root / "VOC", image_id, [VOC_CLASSES[k] for k in classes])
        mask = np.zeros(size)
        mask[:20] = max(classes, default=-1) + 1
        write_mask(root / "VOC", image_id, mask)
        save_index_png(root / "pred" / f"{image_id}.png", mask.astype(np.uint8))
        labels[image_id] = np.isin(np.arange(20), classes).astype(np.float32)
        object_map = np.where(mask > 0, 0.8, 0.1)
        save_maps(root / "cam" / f"{image_id}.npy", dict.fromkeys(classes, object_map))
        for folder, background in (("la", 0.3), ("ha", 0.2)):
            share = (1 - background) / max(1, len(classes))
            scores = {0: np.full(size, background if classes else 1)}
            scores |= {k + 1: np.full(size, share) for k in classes}
            save_maps(root / folder / f"{image_id}.npy", scores)
    save_npy_dict(root / "labels.npy", labels)
    write_lines(root / "ids.txt", CLASSES)
    write_lines(root / "train.txt", ["a", "b"])
    write_lines(root / "val.txt", ["c"])
    write_lines(root / "losses.csv", ["step,epoch,lr,loss", "1,1,0.1,0.7", "2,1,0.05,0.6"])
    write_lines(root / "classes.txt", VOC_CLASSES)
    split = root / "VOC" / "ImageSets" / "Segmentation" / "train.txt"
    split.parent.mkdir(parents=True)
    write_lines(split, CLASSES)
    for name, module in (("cls", tiny_cls), ("aff", tiny_aff)):
        torch.manual_seed(0)
        torch.save(module.Net().state_dict(), root / f"{name}.pth")
    return root


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def world(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "world")
    return tmp_path / "world"


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_fault_every_command_ends_well(name, world):
    run_program(COMMANDS[name], world).check()


# Faults of a file, whatever it should hold


def missing(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_kind(path: Path) -> None:
    path.write_bytes(b"\x93\xff\xfe not what it should be \x00\x01" * 9)


def symlink_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def unreadable(path: Path) -> None:
    """Not even root can open a socket as a file."""
    path.unlink()
    place = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(place)


FILE_FAULTS = (missing, directory, empty, truncated, of_another_kind, symlink_loop, unreadable)
IMAGE, ANNOTATION, MASK = "VOC/JPEGImages/a.jpg", "VOC/Annotations/a.xml", "pred/a.png"
SPLIT = "VOC/ImageSets/Segmentation/train.txt"
# Which files a command reads. A list, a class file or a table has no end that could be missed, and
# what a devkit lacks is not made by prepare, not scored by report, and no error.
WHOLE, TEXT = FILE_FAULTS, tuple(fault for fault in FILE_FAULTS if fault is not truncated)
FILES = [
    *((name, "", IMAGE, WHOLE) for name in ("train_cls", "infer_cls", "train_aff", "infer_aff")),
    *((name, "", "ids.txt", TEXT) for name in ("train_aff", "infer_cls", "evaluate")),
    ("infer_cls", "--classes classes.txt", "classes.txt", TEXT),
    ("train_cls", "", "labels.npy", WHOLE),
    ("infer_cls", "", "cls.pth", WHOLE),
    ("train_aff", "--weights cls.pth", "cls.pth", WHOLE),
    ("train_aff", "", "la/a.npy", WHOLE),
    ("train_aff", "", "ha/a.npy", WHOLE),
    ("infer_aff", "", "cam/a.npy", WHOLE),
    ("evaluate_cam", "", "cam/a.npy", WHOLE),
    ("evaluate", "", MASK, WHOLE),
    ("evaluate", "", "VOC/SegmentationClass/a.png", WHOLE),
    *((name, "", IMAGE, WHOLE) for name in ("report", "sheet", "export")),
    *((name, "", MASK, WHOLE) for name in ("report", "sheet", "export")),
    *(("report", "", file, WHOLE) for file in ("cam/a.npy", "la/a.npy", "ha/a.npy")),
    ("report", "", "VOC/SegmentationClass/a.png", (empty, truncated, of_another_kind)),
    ("report", "", "losses.csv", TEXT),
    ("report", "", "ids.txt", TEXT),
    ("report", "--classes classes.txt", "classes.txt", TEXT),
    ("export", "", "VOC/SegmentationClass/c.png", WHOLE),
    *(("export", "", file, TEXT) for file in ("train.txt", "val.txt")),
    *((name, "", "cls.pth", WHOLE) for name in ("show", "convert")),
    ("prepare", "", ANNOTATION, (empty, truncated, of_another_kind)),
    ("prepare", "", SPLIT, (empty, of_another_kind)),
]


@pytest.mark.parametrize(
    ("name", "flags", "file", "fault"),
    [
        pytest.param(*case[:3], fault, id=f"{case[0]}-{case[2]}-{fault.__name__}")
        for case in FILES
        for fault in case[3]
    ],
)
def test_files_that_cannot_be_used(name, flags, file, fault, world):
    fault(world / file)
    assert_refused(world, f"{COMMANDS[name]} {flags}", 1, Path(file).name)


def assert_refused(world: Path, command: str, code: int, *words: str) -> None:
    """One sentence with the words; the inputs are as they were, and no output is half there."""
    before = input_files(world)
    run_program(command, world).assert_failed(code, *words)
    assert input_files(world) == before
    assert not list(world.rglob("*.tmp"))


def input_files(world: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(world).items() if not name.startswith("new/")}


# The table


class Fault(NamedTuple):
    name: str
    spoil: Callable[[Path], object]
    command: str  # of COMMANDS, then more flags
    code: int
    words: tuple[str, ...]


def nothing(world: Path) -> None:
    pass


def lists(*lines: str) -> Callable[[Path], object]:
    """The list of images has these lines."""
    return lambda world: write_lines(world / "ids.txt", lines)


def annotates(text: str | bytes) -> Callable[[Path], object]:
    """The first image's annotation is this text."""
    data = text.encode() if isinstance(text, str) else text
    return lambda world: (world / ANNOTATION).write_bytes(data)


def names_classes(*names: str) -> Callable[[Path], object]:
    return lambda world: write_lines(world / "classes.txt", names)


def labels(value: object) -> Callable[[Path], object]:
    """The first image's entry in the label file."""
    return lambda world: save_npy_dict(world / "labels.npy", {"a": value})


def maps(folder: str, content: dict) -> Callable[[Path], object]:
    return lambda world: save_npy_dict(world / folder / "a.npy", content)


def photograph(image: Image.Image, kind: str = "PNG") -> Callable[[Path], object]:
    return lambda world: write_image(world / "VOC", "a", image, kind)


def mask(image: Image.Image, folder: str = "pred") -> Callable[[Path], object]:
    return lambda world: image.save(world / folder / "a.png", "PNG")


def masked(name: str) -> Callable[[Path], object]:
    """A mask in SegmentationClassAug, of which prepare makes train_aug."""
    return lambda world: write_mask(world / "VOC", name, np.zeros((4, 4)), "SegmentationClassAug")


def taken(name: str) -> Callable[[Path], object]:
    """A file where a folder should be."""
    return lambda world: (world / name).write_text("mine")


def loop(name: str) -> Callable[[Path], object]:
    return lambda world: (world / name).symlink_to(name)


def flat(value: float, size: tuple[int, int] = SIZES["a"]) -> np.ndarray:
    return np.full(size, value, np.float32)


def index(value: int, size: tuple[int, int] = SIZES["a"]) -> Image.Image:
    return Image.fromarray(np.full(size, value, np.uint8))


ENTITY = "<!DOCTYPE annotation [<!ENTITY x {}>]><annotation><object><name>&x;</name></object>"
HUGE = 10**30

FAULTS = [
    # Lists and ids
    Fault("id of two dots", lists(".."), "infer_cls", 1, ("ids.txt", "'..'", "image id")),
    Fault("id of one dot", lists("/JPEGImages/..jpg"), "infer_cls", 1, ("ids.txt", "image id")),
    Fault("id above", lists("../../a/.."), "train_aff", 1, ("ids.txt", "'..'")),
    Fault("id with backslash", lists("..\\a"), "infer_aff", 1, ("ids.txt", "image id")),
    Fault("id with NUL", lists("a\0b"), "infer_cls", 1, ("ids.txt", r"'a\x00b'")),
    Fault("id with an escape", lists("\x1b[2J"), "evaluate", 1, ("ids.txt", "image id")),
    Fault("id too long", lists("x" * 5000), "infer_cls", 1, ("ids.txt", "xxx...'", "rename")),
    Fault("id too long in bytes", lists("ü" * 111), "infer_cls", 1, ("ids.txt", "rename")),
    Fault("absolute path", lists("/etc/passwd"), "infer_cls", 1, ("VOC/JPEGImages/passwd.jpg",)),
    Fault("path above", lists("../../ids.txt"), "infer_aff", 1, ("VOC/JPEGImages/ids.jpg",)),
    Fault("mask with a line feed", masked("a\nb"), "prepare", 1, (r"'a\nb'", "ClassAug")),
    Fault("mask with a path in it", masked("a.jpg b"), "prepare", 1, ("'a.jpg b'", "ClassAug")),
    Fault("mask with a comment", masked("a #1"), "prepare", 1, ("'a #1'", "image id")),
    # Annotations
    Fault("entity", annotates(ENTITY.format('"cat"')), "prepare", 1, ("a.xml", "annotation")),
    Fault(
        "external entity",
        annotates(ENTITY.format('SYSTEM "file:///etc/hostname"')),
        "prepare",
        1,
        ("a.xml", "annotation"),
    ),
    Fault(
        "external parameter entity",
        annotates('<!DOCTYPE a [<!ENTITY % x SYSTEM "file:///etc/hostname"> %x;]><annotation/>'),
        "prepare",
        1,
        ("a.xml", "annotation"),
    ),
    Fault("unknown encoding", annotates('<?xml version="1.0" encoding="x"?><annotation/>'),
          "prepare", 1, ("a.xml", "annotation")),
    Fault("another root", annotates("<html><object/></html>"), "prepare", 1, ("a.xml", "'html'")),
    Fault("object without a name", annotates("<annotation><object/></annotation>"), "prepare", 1,
          ("a.xml", "class ''", "--classes")),
    Fault("unknown class",
          annotates(f"<annotation><object><name>{'x' * 999}</name></object></annotation>"),
          "prepare", 1, ("a.xml", "xxx...'", "--classes")),
    # Class files
    Fault("a class twice", names_classes("cat", "cat"), "prepare --classes classes.txt", 1,
          ("classes.txt", "twice")),
    Fault("background as a class", names_classes("background"), "prepare --classes classes.txt", 1,
          ("classes.txt", "background")),
    Fault("too many classes", names_classes(*map(str, range(255))), "prepare --classes classes.txt",
          1, ("classes.txt", "255 classes")),
    # Image-level labels
    Fault("label that is not a number", labels(flat(np.nan, (20,))), "infer_cls", 1,
          ("labels.npy", "label of a", "0 or 1")),
    Fault("label of a half", labels(flat(0.5, (20,))), "train_cls", 1, ("labels.npy", "0 or 1")),
    Fault("label of two", labels(flat(2, (20,))), "train_cls", 1, ("labels.npy", "0 or 1")),
    Fault("labels too few", labels(flat(1, (19,))), "infer_cls", 1, ("labels.npy", "20 classes")),
    Fault("label that is text", labels("cat"), "infer_cls", 1, ("labels.npy", "0 or 1")),
    Fault("label that is ragged", labels([1, [0, 1]]), "infer_cls", 1, ("labels.npy", "0 or 1")),
    Fault("no label", labels(None), "infer_cls", 1, ("labels.npy", "0 or 1")),
    Fault("maps for labels", nothing, "train_cls --label_file cam/a.npy", 1,
          ("cam/a.npy", "7 is no image id", "voc12.prepare")),
    # Maps
    Fault("map not a number", maps("cam", {7: flat(np.nan)}), "infer_aff", 1,
          ("cam/a.npy", "class 7", "not finite")),
    Fault("map infinite", maps("cam", {7: flat(-np.inf)}), "evaluate_cam", 1,
          ("cam/a.npy", "not finite")),
    Fault("map above one", maps("cam", {7: flat(3)}), "infer_aff", 1, ("cam/a.npy", "3", "0..1")),
    Fault("map below zero", maps("cam", {7: flat(-1)}), "infer_aff --alpha 4.5", 1,
          ("cam/a.npy", "-1", "0..1")),
    Fault("scores above one", maps("la", {0: flat(0), 8: flat(300)}), "train_aff", 1,
          ("la/a.npy", "300", "0..1")),
    Fault("scores not a number", maps("ha", {0: flat(np.nan), 8: flat(1)}), "train_aff", 1,
          ("ha/a.npy", "not finite")),
    Fault("scores of another size", maps("ha", {0: flat(1, (50, 40)), 8: flat(0, (50, 40))}),
          "train_aff", 1, ("ha/a.npy", "50 x 40", "40 x 50")),
    Fault("map of another size", maps("cam", {7: flat(1, (8, 8))}), "infer_aff", 1,
          ("cam/a.npy", "8 x 8")),
    Fault("map without pixels", maps("cam", {7: flat(1, (0, 50))}), "infer_aff", 1,
          ("cam/a.npy", "0 x 50")),
    Fault("map of an unknown class", maps("cam", {20: flat(1)}), "infer_aff", 1,
          ("cam/a.npy", "class 20", "--classes")),
    Fault("map of a class below zero", maps("cam", {-1: flat(1)}), "infer_aff", 1,
          ("cam/a.npy", "-1")),
    Fault("map by name", maps("cam", {"cat": flat(1)}), "evaluate_cam", 1, ("cam/a.npy", "'cat'")),
    Fault("maps of other classes", maps("la", {0: flat(1)}), "train_aff", 1,
          ("la/a.npy", "ha/a.npy", "same classes")),
    # Masks and predictions
    Fault("prediction beyond the classes", mask(index(21)), "evaluate", 1, ("a: ", "label 21")),
    Fault("prediction of void", mask(index(255)), "evaluate", 1, ("a: ", "label 255")),
    Fault("mask beyond the classes", mask(index(99), "VOC/SegmentationClass"), "evaluate", 1,
          ("a: ", "mask", "label 99")),
    Fault("prediction of another size", mask(index(0, (50, 40))), "evaluate", 1,
          ("a: ", "50 x 40", "40 x 50")),
    Fault("prediction in colour", mask(noise_image(*SIZES["a"])), "evaluate", 1,
          ("pred/a.png", "mode RGB")),
    Fault("prediction of 16 bits", mask(Image.fromarray(np.zeros(SIZES["a"], np.uint16))),
          "evaluate", 1, ("pred/a.png", "mode I")),
    # Images
    Fault("program for Ghostscript", photograph(noise_image(8, 8), "EPS"), "infer_cls", 1,
          ("VOC/JPEGImages/a.jpg", "not a readable image")),
    Fault("web page", lambda w: (w / IMAGE).write_text("<html>404</html>" * 99), "infer_aff", 1,
          ("VOC/JPEGImages/a.jpg", "not a readable image")),
    # Sizes and memory
    Fault("crop beyond memory", nothing, "train_cls --crop_size 65535", 2,
          ("--crop_size 65535", "GB", "take less")),
    Fault("crop beyond memory, aff", nothing, "train_aff --crop_size 65528", 2,
          ("--crop_size 65528", "GB")),
    Fault("validation beyond memory", nothing, "train_cls --val_crop_size 65535", 2,
          ("--val_crop_size 65535", "GB")),
    Fault("scale beyond memory", nothing, "infer_cls --scales 1 3000", 1,
          ("a: ", "40 x 50", "GB", "--scales")),
    # Huge numbers; small and negative ones and others are in test_cli
    *(
        Fault(f"{name} {flag} huge", nothing, f"{name} --{flag} {HUGE}", 2, (f"--{flag}",))
        for name, flags in {
            "train_cls": ("crop_size", "val_crop_size", "seed", "num_workers"),
            "infer_cls": ("seed", "num_workers"),
            "train_aff": ("crop_size", "radius", "seed"),
            "infer_aff": ("radius", "logt", "num_workers"),
        }.items()
        for flag in flags
    ),
    Fault("train_cls batch huge", nothing, f"train_cls --batch_size {HUGE}", 1, ("--batch_size",)),
    Fault("train_cls resize huge", nothing, f"train_cls --resize_long 1 {HUGE}", 2,
          ("--resize_long",)),
    # Outputs
    Fault("output is a file", taken("new"), "infer_aff", 1, ("new",)),
    Fault("session below a file", taken("new"), "train_aff", 1,
          ("--session_name new/aff", "new is a file")),
    Fault("lists below a file", taken("new"), "prepare", 1,
          ("new", "a file where a folder should be")),
    Fault("output below a file", taken("new"), "infer_cls --out_cam new/deep/cam", 1, ("new",)),
    Fault("figures over the list", nothing, "evaluate --json ids.txt", 2, ("--json", "--list")),
    Fault("figures into a folder", nothing, "evaluate --json VOC", 2, ("--json VOC", "a folder")),
    Fault("table over the figures", nothing,
          "evaluate_cam --sweep bg --json new/a --csv new/../new/a", 2, ("--csv", "--json")),
    Fault("plot that is no picture", nothing, "evaluate_cam --sweep bg --plot new/plot.txt", 2,
          ("--plot new/plot.txt", ".png")),
    Fault("page over the losses", lambda w: (w / "losses.csv").rename(w / "losses.html"),
          "report --log losses.html --out losses.html", 2, ("--out", "--log losses.html")),
    Fault("tensors over the weights", nothing, "show --json ./cls.pth", 2, ("--json", "FILE")),
    Fault("output is a loop", loop("new"), "infer_cls", 1, ("new",)),
    Fault("list folder is a loop", loop("new"), "prepare", 1, ("new",)),
    Fault("session below a loop", loop("new"), "train_aff", 1, ("new",)),
    Fault("walks and labels in one loop", loop("new"),
          "infer_aff --out_rw new --trace ./new", 2, ("--trace", "--out_rw")),
    *(
        Fault(f"{flag} among the inputs", nothing, f"{name} --{flag} {folder}", 2,
              (f"--{flag}", "devkit"))
        for name, flag, folder in (
            ("infer_cls", "out_cam", "VOC/JPEGImages"),
            ("infer_cls", "out_cam_pred", "VOC/SegmentationClass"),
            ("infer_cls", "out_la_crf", "VOC/Annotations/la"),
            ("infer_aff", "out_rw", "./VOC/../VOC/SegmentationClass"),
            ("infer_aff", "out_rw", "VOC/SegmentationClassAug"),
            ("infer_aff", "trace", "VOC/SegmentationClass"),
            ("train_cls", "session_name", "VOC/ImageSets/Segmentation/cls"),
            ("train_aff", "session_name", "VOC/JPEGImages/a"),
            ("evaluate", "json", "VOC/Annotations/a.xml"),
            ("evaluate_cam --sweep bg", "plot", "VOC/SegmentationClass/a.png"),
            ("sheet", "out", "VOC/SegmentationClass/a.png"),
            ("export", "out", "VOC/JPEGImages/tree"),
            ("prepare", "out_dir", "VOC/ImageSets/Segmentation"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_fault(fault, world):
    fault.spoil(world)
    name, *flags = fault.command.split(maxsplit=1)
    assert_refused(world, " ".join([COMMANDS[name], *flags]), fault.code, *fault.words)


@pytest.mark.parametrize(
    ("out", "words"), [(IMAGE, ("a.jpg", ".pth")), ("./cls.pth", ("OUT.pth", "is FILE, too"))]
)
def test_converted_weights_replace_nothing_else(out, words, world):
    command = f"tool.weights convert cls.pth {out} --network network.tiny_cls"
    assert_refused(world, command, 2, *words)


# Faults while a command runs (those that end its process are in test_infer, test_resume,
# test_workers and test_loading)


class Hindrance(NamedTuple):
    name: str
    hinder: Callable[[pytest.MonkeyPatch], object]
    command: str
    code: int
    words: tuple[str, ...]


def fails(owner: object, name: str, call: int, error: BaseException) -> Callable:
    """From its n-th call on, a function raises that error."""

    def hinder(monkeypatch: pytest.MonkeyPatch) -> None:
        function, calls = getattr(owner, name), []

        def failing(*args, **kwargs):
            calls.append(args)
            if len(calls) >= call:
                raise error
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)

    return hinder


LOST_LOADER = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
# What is written is brought to the disk before it gets its name.
FULL_DISK = fails(os, "fsync", 1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
READ_ERROR = fails(ImageFile.ImageFile, "load", 2, OSError(errno.EIO, os.strerror(errno.EIO)))
CTRL_C = fails(os, "fsync", 1, KeyboardInterrupt())
WRITERS = [name for name in COMMANDS if name != "evaluate_cam"]
# What reads images, and the beginning of the path of the second one.
IMAGE_READERS = {
    **dict.fromkeys(("train_cls", "train_aff"), "VOC/JPEGImages/"),
    **dict.fromkeys(("infer_cls", "infer_aff", "report", "sheet", "export"), IMAGE),
    "evaluate": MASK,
}
HINDRANCES = [
    *(
        Hindrance(f"full disk, {name}", FULL_DISK, name, 1, ("new", ": No space left on device"))
        for name in WRITERS
    ),
    # PyTorch notices the death of a loader by a signal: wherever the program is.
    *(
        Hindrance(f"lost loader, {name}", fails(*place, LOST_LOADER), name, 1, words)
        for name, place, words in (
            ("train_cls", (torch.optim.SGD, "step", 2), ("loader process", "--num_workers")),
            ("infer_cls", (infer_cls, "multi_scale_cam", 2), ("loader process", "1 of 3 images")),
            ("infer_aff", (infer_aff, "pair_affinity", 3), ("loader process", "2 of 3 images")),
        )
    ),
    *(
        Hindrance(f"read error, {name}", READ_ERROR, name, 1, (path, "Input/output error"))
        for name, path in IMAGE_READERS.items()
    ),
    *(
        Hindrance(f"Ctrl-C, {name}", CTRL_C, name, 130, ("interrupted: ", "kept"))
        for name in WRITERS
    ),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in HINDRANCES])
def test_hindrance(case, world, monkeypatch):
    """One sentence; and then the same command, undisturbed, ends well."""
    before = input_files(world)
    case.hinder(monkeypatch)
    outcome = run_program(COMMANDS[case.command], world)
    monkeypatch.undo()
    if case.code == 1:
        outcome.assert_failed(1, *case.words)
    else:
        assert outcome.code == case.code
        assert all(word in outcome.last_line for word in case.words), outcome.err
    assert input_files(world) == before
    assert not [path for path in world.rglob("*.tmp") if path.is_file()]
    run_program(COMMANDS[case.command], world).check()


# Faults that need more than a spoilt folder


@pytest.mark.parametrize("name", ["train_cls", "infer_cls", "train_aff", "infer_aff"])
def test_decompression_bombs_are_refused_by_name(name, world, monkeypatch):
    write_lines(world / "ids.txt", ["a"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # it has 2000
    assert_refused(world, COMMANDS[name], 1, IMAGE, "1500", "decompression bombs")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # above twice that, Pillow refuses
    assert_refused(world, COMMANDS[name], 1, IMAGE, "900", "decompression bombs")


NOBODY = 65534


@pytest.fixture
def owned(finished):
    """A copy of the finished run where every user may go."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(finished, Path(folder, "world")))


@contextlib.contextmanager
def without_roots_rights(world: Path) -> Iterator[None]:
    """Root may read and write what it likes: become nobody, to whom the files are given."""
    if os.geteuid() != 0:
        yield
        return
    for path in (world.parent, world, *world.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder_is_named(name, world, owned):
    run_program(COMMANDS[name], world).check()  # so that all is imported that nobody might not read
    (owned / "new").mkdir(mode=0o500)
    with without_roots_rights(owned):
        assert_refused(owned, COMMANDS[name], 1, "new", "denied")


@pytest.mark.parametrize(
    ("name", "file"),
    sorted({(name, file) for name, flags, file, _ in FILES if not flags and name != "prepare"}),
)
def test_a_file_that_may_not_be_read_is_named(name, file, world, owned):
    run_program(COMMANDS[name], world).check()
    (owned / file).chmod(0)
    with without_roots_rights(owned):
        run_program(COMMANDS[name], owned).assert_failed(1, Path(file).name, "ermission denied")


# What looks like a fault and is none


@pytest.mark.parametrize(
    "image_id", ["my photo", "Größe 写真", "a#1", "..hidden", "a.b.c", "-rf", "x" * 220, "50%"]
)
def test_names_that_are_unusual_work_in_every_stage(image_id, world):
    for folder, ending in {
        "VOC/JPEGImages": "jpg", "VOC/Annotations": "xml", "VOC/SegmentationClass": "png",
        "cam": "npy", "la": "npy", "ha": "npy",
    }.items():  # fmt: skip
        (world / folder / f"a.{ending}").rename(world / folder / f"{image_id}.{ending}")
    write_mask(world / "VOC", image_id, np.zeros((4, 4)), "SegmentationClassAug")
    (world / SPLIT).unlink()
    run_program(COMMANDS["prepare"], world).check()
    shutil.copy(world / "new" / "lists" / "train_aug.txt", world / "ids.txt")
    shutil.copy(world / "new" / "lists" / "cls_labels.npy", world / "labels.npy")
    for name in ("train_cls", "infer_cls", "train_aff", "infer_aff"):
        run_program(COMMANDS[name], world).check()
    run_program(COMMANDS["evaluate"].replace("--pred pred", "--pred new/rw"), world).check()
    assert (world / "new" / "cam" / f"{image_id}.npy").is_file()


ROTATED = noise_image(40, 50, 3)
ROTATED.getexif()[0x0112] = 6  # to be turned by 90 degrees


@pytest.mark.parametrize(
    ("image", "kind", "extra"),
    [
        (ROTATED, "JPEG", {"exif": ROTATED.getexif()}),
        (noise_image(1, 1, 1), "PNG", {}),
        (noise_image(3, 5, 1), "PNG", {}),  # less than a cell
        (noise_image(9, 17, 1), "PNG", {}),  # less than the radius, no multiple of 8
        (noise_image(5000, 3, 1), "PNG", {}),
        (noise_image(3, 5000, 1), "PNG", {}),
    ],
    ids=["rotated", "pixel", "cell", "grid", "high", "wide"],
)
def test_images_that_are_unusual_keep_their_size_in_every_stage(image, kind, extra, world):
    image.save(world / IMAGE, kind, **extra)
    write_lines(world / "ids.txt", ["a"])
    write_mask(world / "VOC", "a", np.zeros((image.height, image.width)))
    run_program(COMMANDS["train_cls"], world).check()
    for folder in ("cam", "la", "ha"):
        shutil.rmtree(world / folder)
    command = f"{COMMANDS['infer_cls']} --out_cam cam --out_la_crf la --out_ha_crf ha"
    run_program(command, world).check()
    run_program(COMMANDS["train_aff"], world).check()
    run_program(f"{COMMANDS['infer_aff']} --trace new/walks", world).check()
    run_program(COMMANDS["evaluate"].replace("--pred pred", "--pred new/rw"), world).check()
    with Image.open(world / "new" / "rw" / "a.png") as label:
        assert label.size == image.size
    with Image.open(world / "new" / "walks" / "a.png") as strip:
        assert strip.height < 1000
