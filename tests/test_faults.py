"""Bad data and bad command lines: one sentence, an exit code, and nothing lost or half written.

``FAULTS`` is the table. Each row is run in a fresh copy of a small devkit with lists, maps, labels
and weights: what is damaged there, the command, the exit code, and words of the sentence.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, noise_image, run_program, write_annotation, write_image
from PIL import Image, ImageFile

from network import tiny_aff, tiny_cls
from tool.maps import save_index_png, save_maps, save_npy_dict
from voc12.devkit import VOC_CLASSES

pytestmark = pytest.mark.usefixtures("one_thread")

CLS = "--network network.tiny_cls --num_workers 0 --voc12_root VOC --label_file labels.npy"
AFF = "--network network.tiny_aff --num_workers 0 --voc12_root VOC"
TRAIN = "--weights none --train_list ids.txt --batch_size 1 --max_epoches 1 --lr 0.01"
SCORE = "voc12.evaluate --num_workers 0 --voc12_root VOC --list ids.txt"
COMMANDS = {
    "train_cls": f"train_cls {CLS} {TRAIN} --val_list ids.txt --crop_size 48 --resize_long 40 56 "
    "--val_crop_size 48 --session_name new/cls",
    "infer_cls": f"infer_cls {CLS} --weights cls.pth --infer_list ids.txt --scales 1 0.5 "
    "--out_cam new/cam --out_cam_pred new/pred",
    "train_aff": f"train_aff {AFF} {TRAIN} --crop_size 72 --la_crf_dir la --ha_crf_dir ha "
    "--session_name new/aff",
    "infer_aff": f"infer_aff {AFF} --weights aff.pth --infer_list ids.txt --cam_dir cam --logt 2 "
    "--out_rw new/rw",
    "seeds": "infer_cls --num_workers 0 --voc12_root VOC --infer_list ids.txt --cam_dir cam "
    "--out_cam new/cam --out_la_crf new/la",
    "sweep": f"infer_aff {AFF} --weights aff.pth --infer_list ids.txt --cam_dir cam --logts 0 1 "
    "--sweep --json new/walks.json",
    "prepare": "voc12.prepare --voc12_root VOC --out_dir new/lists",
    "evaluate": f"{SCORE} --pred pred --json new/scores.json",
    "evaluate_cam": f"{SCORE} --cam cam",
    "report": "voc12.report --voc12_root VOC --list ids.txt --cam cam --la la --ha ha --rw pred "
    "--log losses.csv --out new/page.html",
    "sheet": "voc12.report --voc12_root VOC --list ids.txt --cam cam --rw pred --out new/sheet.png",
    "export": "voc12.export --voc12_root VOC --rw pred --list train.txt --val_list val.txt "
    "--out new/tree",
    "show": "tool.weights show cls.pth --json new/tensors.json",
    "convert": "tool.weights convert --network network.tiny_cls cls.pth new/start.pth",
    "convert_to": "tool.weights convert --network network.tiny_cls cls.pth",
}
NO_LABEL_FILE = "--label_file voc12/cls_labels.npy"  # the default, which need not exist
CLASSES = {"a": [7], "b": [11, 14], "c": []}  # cat; dog and person; nothing
SIZES = {"a": (40, 50), "b": (56, 40), "c": (33, 41)}
IMAGE, ANNOTATION = "VOC/JPEGImages/a.jpg", "VOC/Annotations/a.xml"
MASK, SPLIT = "VOC/SegmentationClass/a.png", "VOC/ImageSets/Segmentation/train.txt"

Damage = Callable[[Path], object]


def holds(file: str, content: object) -> Damage:
    """The file has this content: text, bytes, an image, a dict of arrays (.npy), or tensors."""

    def damage(world: Path) -> None:
        path = world / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str | bytes):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        elif isinstance(content, Image.Image):
            content.save(path, "PNG")
        elif path.suffix == ".npy":
            save_npy_dict(path, content)
        else:
            torch.save(content, path)

    return damage


def flat(value: float, *size: int) -> np.ndarray:
    return np.full(size or SIZES["a"], value, np.float32)


def white_masks(world: Path) -> None:
    """All masks are an editor's: 255 is an object."""
    for path in (world / "VOC/SegmentationClass").iterdir():
        Image.fromarray(255 * np.eye(*SIZES[path.stem], dtype=np.uint8)).save(path)


def index(value: int, *size: int) -> Image.Image:
    return Image.fromarray(flat(value, *size).astype(np.uint8))


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Three images with all that the programs read."""
    root, labels = tmp_path_factory.mktemp("intact"), {}
    for seed, (image_id, classes) in enumerate(CLASSES.items()):
        size = SIZES[image_id]
        write_image(root / "VOC", image_id, noise_image(*size, seed))
        write_annotation(root / "VOC", image_id, [VOC_CLASSES[k] for k in classes])
        for folder in ("VOC/SegmentationClass", "pred"):
            label = flat(max(classes, default=-1) + 1, *size).astype(np.uint8)
            save_index_png(root / folder / f"{image_id}.png", label)
        labels[image_id] = np.isin(np.arange(20), classes).astype(np.float32)
        save_maps(root / "cam" / f"{image_id}.npy", dict.fromkeys(classes, flat(0.8, *size)))
        for folder, background in (("la", 0.3), ("ha", 0.2)):
            scores = {0: flat(background if classes else 1, *size)}
            scores |= {k + 1: flat((1 - background) / len(classes), *size) for k in classes}
            save_maps(root / folder / f"{image_id}.npy", scores)
    save_npy_dict(root / "labels.npy", labels)
    texts = dict.fromkeys(("ids.txt", SPLIT), "a\nb\nc\n")
    texts |= {"train.txt": "a\nb\n", "val.txt": "c\n", "classes.txt": "\n".join(VOC_CLASSES)}
    texts |= {"losses.csv": "step,epoch,lr,loss\n1,1,0.1,0.7\n2,1,0.05,0.6\n"}
    for name, text in texts.items():
        holds(name, text)(root)
    (root / "empty").mkdir()
    torch.manual_seed(0)
    for name, module in (("cls", tiny_cls), ("aff", tiny_aff)):
        torch.save(module.Net().state_dict(), root / f"{name}.pth")
    return root


@pytest.fixture
def world(intact, tmp_path):
    return Path(shutil.copytree(intact, tmp_path / "world"))


def input_files(world: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(world).items() if not name.startswith("new/")}


def assert_refused(world: Path, name_and_flags: str, code: int, *words: str) -> None:
    """One sentence with the words; all inputs unchanged; no weights, no partly written file."""
    name, _, flags = name_and_flags.partition(" ")
    before = input_files(world)
    run_program(f"{COMMANDS[name]} {flags}", world).assert_failed(code, *words)
    assert input_files(world) == before
    assert not [*world.rglob("*.tmp"), *world.glob("new/**/*.pth")]


# Damaged files

GARBAGE = b"\x93\xff\xfe not what it should be \x00\x01" * 9
# What a command reads, and must have whole.
FILES = {
    "train_cls": f"{IMAGE} ids.txt labels.npy",
    "infer_cls --classes classes.txt": f"{IMAGE} ids.txt labels.npy cls.pth classes.txt",
    "train_aff --weights cls.pth": f"{IMAGE} ids.txt cls.pth la/a.npy ha/a.npy",
    "infer_aff": f"{IMAGE} ids.txt aff.pth cam/a.npy",
    "evaluate": f"ids.txt pred/a.png {MASK}",
    "evaluate_cam": "cam/a.npy",
    "report": f"{IMAGE} ids.txt pred/a.png cam/a.npy la/a.npy ha/a.npy losses.csv",
    "sheet": f"{IMAGE} cam/a.npy",
    "export": f"{IMAGE} train.txt val.txt pred/a.png {MASK.replace('a.', 'c.')}",
    "show": "cls.pth",
    "convert": "cls.pth",
}


@pytest.mark.parametrize(
    ("command", "file", "damage"),
    [
        (command, file, damage)
        for command, files in FILES.items()
        for file in files.split()
        for damage in ("missing", "a folder", "empty", "garbage", "half")
        if damage != "half" or not file.endswith((".txt", ".csv"))  # half a list is a list
    ],
)
def test_a_damaged_file_is_named(command, file, damage, world):
    path = world / file
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        damaged = {"empty": b"", "half": content[: len(content) // 2], "garbage": GARBAGE}
        path.write_bytes(damaged[damage])
    assert_refused(world, command, 1, path.name)


# The table


def removed(*files: str) -> Damage:
    return lambda world: [(world / file).unlink() for file in files]


nothing = removed()


def data(name: str, damage: Damage, command: str, *words: str):
    """A row of exit code 1: the data cannot be used."""
    return pytest.param(damage, command, 1, words, id=name)


def usage(command: str, *words: str, damage: Damage = nothing):
    """A row of exit code 2: the command line cannot be carried out."""
    return pytest.param(damage, command, 2, words, id=command)


def after(name: str) -> Damage:
    """The outputs of that command are there."""
    return lambda world: run_program(COMMANDS[name], world).check()


WOMBAT = "<annotation><object><name>wombat</name></object></annotation>"
VGG = {"conv5_3.weight": torch.zeros(2, 2), "fc8.weight": torch.zeros(2, 2)}

FAULTS = [
    # Devkits, lists and ids
    *(data(f"{name}: no devkit", nothing, f"{name} --voc12_root no", "no: ", "--voc12_root")
      for name, command in COMMANDS.items() if "--voc12_root" in command),
    data("no lists", removed(SPLIT), "prepare", "VOC", "ImageSets/Segmentation"),
    data("SBD without masks", nothing, "prepare --sbd_root empty", "empty", "--sbd_root"),
    data("no list", nothing, "infer_cls --infer_list no.txt", "no.txt", "voc12.prepare"),
    data("list of comments", holds("ids.txt", "\n# nothing\n"), "train_aff", "ids.txt", "empty"),
    data("garbage as list", holds(SPLIT, GARBAGE), "prepare", SPLIT),
    data("id of dots", holds("ids.txt", ".."), "infer_cls", "ids.txt", "'..'", "image id"),
    data("id too long", holds("ids.txt", "ü" * 111), "infer_cls", "ids.txt", "image id"),
    data("absolute path", holds("ids.txt", "/etc/passwd"), "infer_cls", "JPEGImages/passwd.jpg"),
    data("id in both lists", holds("val.txt", "a"), "export", "a: ", "--list", "--val_list"),
    # Annotations, class files, image-level labels
    data("half an annotation", holds(ANNOTATION, "<annotation><object>"), "prepare", "a.xml"),
    data("web page as annotation", holds(ANNOTATION, "<html/>"), "prepare", "a.xml", "'html'"),
    data("unknown class", holds(ANNOTATION, WOMBAT), "prepare", "a.xml", "'wombat'", "--classes"),
    data("half a label", holds("labels.npy", {"a": flat(1, 10)}), "infer_cls", "labels.npy", " a "),
    data("labels of more classes", holds("classes.txt", "cat\ndog"),
         "train_cls --classes classes.txt", "labels.npy", "2 classes"),
    *(data(f"{name}: no label", removed(ANNOTATION), f"{name} {NO_LABEL_FILE}", "a: ", "a.xml")
      for name in ("train_cls", "infer_cls")),
    data("maps as labels", nothing, "train_cls --label_file cam/a.npy", "cam/a.npy", "image id"),
    # Photographs
    data("missing photographs", removed(IMAGE, "VOC/JPEGImages/b.jpg"), "train_aff", IMAGE, "2 of"),
    data("EPS", lambda world: noise_image(8, 8).save(world / IMAGE, "EPS"), "infer_cls", IMAGE),
    data("photograph turned", holds(IMAGE, noise_image(50, 40)), "evaluate_cam --crf", "a: "),
    # Maps and CRF scores
    *(data(f"map {name}", holds("cam/a.npy", content), command, "cam/a.npy", *words)
      for name, content, command, *words in (
          ("of NaN", {7: flat(np.nan)}, "infer_aff", "class 7", "finite"),
          ("above one", {7: flat(3)}, "infer_aff", "class 7", "3"),
          ("of another size", {7: flat(1, 8, 8)}, "infer_aff", "8 x 8", "40 x 50"),
          ("of an unknown class", {20: flat(1)}, "infer_aff", "20", "--classes"),
          ("by name", {"cat": flat(1)}, "evaluate_cam", "'cat'"),
      )),
    data("maps above one, --bg", holds("cam/a.npy", {7: flat(3)}), "evaluate_cam", "--normalize"),
    data("no maps", holds("cam/a.npy", {"keys": flat(1), "cams": flat(1)}), "report", "'cams'"),
    data("no seeds", removed("cam/b.npy"), "seeds", "cam/b.npy", "1 of 3", "--cam_dir"),
    data("sweep without masks", removed(MASK), "sweep", MASK, "1 of 3", "--sweep"),
    data("scores above one", holds("la/a.npy", {0: flat(0), 8: flat(3)}), "train_aff", "la/a.npy"),
    data("scores of another size", holds("ha/a.npy", {0: flat(1, 8, 8)}), "train_aff", "8 x 8"),
    data("scores of other classes", holds("la/a.npy", {0: flat(1)}), "train_aff", "ha/a.npy"),
    data("scores of an unknown class", holds("la/a.npy", {0: flat(1), 21: flat(0)}),
         "report --ha la", "la/a.npy", "label 21", "--classes"),
    data("CAMs as scores", nothing, "report --la cam --ha cam", "cam/a.npy", "background"),
    data("swapped alphas", nothing, "train_aff --la_crf_dir ha --ha_crf_dir la", "--out_la_crf"),
    data("CRF scores to walk", nothing, "infer_aff --cam_dir la", "la/a.npy", "CRF", "--out_cam"),
    data("CRF scores to score", nothing, "evaluate_cam --cam ha", "ha/a.npy", "CRF", "--out_cam"),
    *(data(f"{command} empty", nothing, f"{command} empty", "empty/a.", "of ", *words)
      for command, *words in (
          ("train_aff --la_crf_dir", "--out_la_crf"),
          ("train_aff --ha_crf_dir", "--out_ha_crf"),
          ("infer_aff --cam_dir", "--out_cam"),
          ("evaluate --pred",),
          ("evaluate --allow_missing --pred",),
          ("evaluate --gt", "--gt"),
          ("report --cam", "--cam"),
          ("export --rw", "--out_rw"),
      )),
    # Masks and predictions
    *(data(f"{command}: {name}", holds(file, content), command, *words)
      for command, name, file, content, *words in (
          ("evaluate", "prediction 21", "pred/a.png", index(21), "a: ", "21"),
          ("evaluate", "void prediction", "pred/a.png", index(255), "a: ", "255"),
          ("evaluate", "mask 99", MASK, index(99), "a: ", "mask", "99"),
          ("evaluate", "sizes differ", "pred/a.png", index(0, 8, 8), "a: ", "8 x 8", "40 x 50"),
          *((command, "both are named", MASK, index(8, 50, 40), MASK, path, "50 x 40", "40 x 50")
            for command, path in (("evaluate", "pred/a.png"), ("evaluate_cam", "cam/a.npy"),
                                  ("evaluate_cam --sweep bg", "cam/a.npy"))),
          ("evaluate", "coloured", "pred/a.png", noise_image(40, 50), "pred/a.png", "RGB"),
          *((command, "label 21", "pred/a.png", index(21), "pred/a.png", "21", "--classes")
            for command in ("export", "report")),
          *((command, "sizes differ", "pred/a.png", index(0, 8, 8), "a.png", "8 x 8", "40 x 50")
            for command in ("export", "report")),
      )),
    data("garbage as mask", holds(MASK, GARBAGE), "report", MASK),
    *(data(f"{command}: white masks", white_masks, command, "SegmentationClass: ", "255", "class")
      for command in ("evaluate", "evaluate_cam --sweep bg", "report", "export",
                      "evaluate --classes classes.txt")),
    # Weights
    data("code", holds("cls.pth", {"net": os.system}), "infer_cls", "cls.pth"),
    data("no state dict", holds("cls.pth", [torch.zeros(2)]), "infer_cls", "cls.pth", "state dict"),
    data("weights of VGG-16", holds("aff.pth", VGG), "infer_aff", "aff.pth", "VGG-16"),
    data("weights of stage 3", nothing, "infer_cls --weights aff.pth", "aff.pth", "fc8.weight"),
    data("weights of stage 1", nothing, "infer_aff --weights cls.pth", "cls.pth", "f8_3.weight"),
    data("weights of 20 classes", holds("classes.txt", "\n".join([*VOC_CLASSES, "zebra"])),
         f"infer_cls --classes classes.txt {NO_LABEL_FILE}", "cls.pth", "(21, 128, 1, 1)"),
    # Training
    data("batch too large", nothing, "train_aff --batch_size 4", "ids.txt", "3", "--batch_size"),
    data("no checkpoint", nothing, "train_cls --resume no.ckpt", "no.ckpt", "--resume"),
    data("weights as a checkpoint", nothing, "train_aff --resume aff.pth", "aff.pth", "--resume"),
    data("diverged, cls", nothing, "train_cls --lr 1e30", "not finite at step 2", "--lr"),
    data("diverged, aff", nothing, "train_aff --lr 1e30", "not finite at step 2", "neg ", "--lr"),
    data("diverged at last", holds("ids.txt", "a"), "train_cls --lr 1e30", "validation", "--lr"),
    # Outputs
    *(data(f"{name}: file for a folder", holds("new", "mine"), name, "new")
      for name in ("train_aff", "infer_cls", "infer_aff", "prepare", "report", "export")),
    *(data(f"{command}: nobody may write there", nothing, f"{command} /proc/new/a", "/proc/new")
      for command in ("train_aff --session_name", "infer_aff --out_rw", "evaluate --json")),
    data("export twice", after("export"), "export", "new/tree/VOCdevkit", "--out"),
    usage("train_cls --session_name empty/", "--session_name empty/"),
    usage("train_aff --session_name new/a", "--session_name new/a", "new/a.log",
          damage=lambda world: (world / "new" / "a.log").mkdir(parents=True)),
    usage("infer_cls --scales 1", "--out_cam new/cam", "--scales", damage=after("infer_cls")),
    usage("infer_aff --alpha 4", "--out_rw new/rw", "--alpha", damage=after("infer_aff")),
    usage("infer_aff --overwrite", "--out_rw new/rw", "record",
          damage=holds("new/rw/mine.png", index(0))),
    usage("report --log page.html --out page.html", "--out", "--log",
          damage=lambda world: (world / "losses.csv").rename(world / "page.html")),
    *(usage(f"{command} {path}", command.split()[-1], path)
      for command, path in (
          ("train_cls --session_name", "VOC/ImageSets/Segmentation/cls"),
          ("infer_cls --out_cam", "VOC/JPEGImages"),
          ("train_aff --session_name", "VOC/JPEGImages/a"),
          ("infer_aff --out_rw", "./VOC/../VOC/SegmentationClassAug"),
          ("prepare --out_dir", "VOC/ImageSets/Segmentation"),
          ("evaluate --json", ANNOTATION),
          ("sheet --out", MASK),
          ("export --out", "VOC/JPEGImages/tree"),
      )),
    # Command lines
    *(usage(f"train_cls --network {name}", "--network", name)
      for name in ("network.vgg19_cls", "os", "os.path", "network.tinyd", "network.tiny_aff")),
    *(usage(command, *words)
      for command, *words in (
          ("infer_aff --network network.tiny_cls", "--network", "network.tiny_cls"),
          ("infer_cls --device nonsense", "--device nonsense"),
          ("train_aff --device cuda:99", "--device cuda:99"),
          ("train_cls --device cpu --amp fp16", "--amp fp16"),
          ("train_aff --device cpu --tf32", "--tf32"),
          ("train_cls --lerning_rate 1", "--lerning_rate"),
          ("train_cls --lr nan", "--lr", "'nan'"),
          ("train_aff --radius 1", "--radius", "'1'"),
          ("infer_cls --scales 1 0", "--scales", "'0'"),
          ("infer_aff --logt 21", "--logt", "'21'"),
          ("evaluate_cam --bg 1.5", "--bg", "'1.5'"),
          ("train_cls --resize_long 64 32", "--resize_long"),
          ("train_aff --crop_size 84", "--crop_size 84", "multiple of 8"),
          ("train_aff --crop_size 64", "--crop_size 64", "72", "--radius"),
          ("train_aff --la_crf_dir ha --ha_crf_dir la/../ha", "--la_crf_dir", "--ha_crf_dir"),
          ("infer_cls --crf_backend none", "--crf_backend"),
          ("infer_cls --out_la_crf new/../new/cam", "--out_cam", "--out_la_crf"),
          ("infer_aff --trace ./new/rw", "--trace", "--out_rw"),
          ("infer_aff --trace_ids a", "--trace_ids", "--trace"),
          ("infer_aff --trace new/walks --trace_ids nobody", "nobody", "ids.txt"),
          ("seeds --weights cls.pth", "--weights", "--cam_dir"),
          ("seeds --out_la_crf cam/../cam", "--cam_dir", "--out_la_crf"),
          ("infer_cls --normalize max", "--normalize", "--cam_dir"),
          ("infer_aff --out_scores ./cam", "--out_scores", "--cam_dir"),
          ("infer_aff --plot new/plot.png", "--plot", "--sweep"),
          ("sweep --out_rw new/rw", "--sweep", "--out_rw"),
          ("sweep --bg 0.3", "--bgs"),
          ("sweep --logts 1 21", "--logts", "'21'"),
          ("sweep --csv ids.txt", "--csv", "--infer_list"),
          ("evaluate --normalize max", "--normalize", "--cam"),
          ("evaluate --json ids.txt", "--json", "--list"),
          ("evaluate --json VOC", "--json VOC", "folder"),
          ("evaluate --crf", "--crf", "--cam"),
          ("evaluate --sweep bg", "--sweep", "--cam"),
          ("evaluate_cam --bg 0.1 --alpha 4", "--bg", "--alpha"),
          ("evaluate_cam --sweep bg --crf", "--crf", "--sweep"),
          ("evaluate_cam --csv new/figures.csv", "--csv", "--sweep"),
          ("evaluate_cam --plot new/figures.png", "--plot", "--sweep"),
          ("evaluate_cam --sweep bg --plot new/plot.txt", "--plot new/plot.txt", ".png"),
          ("evaluate_cam --sweep bg --json new/a --csv new/../new/a", "--csv", "--json"),
          ("report --out new/page.txt", "--out new/page.txt", ".html"),
          ("report --la ''", "--la", "--ha"),
          ("show --json ./cls.pth", "--json", "FILE"),
          ("convert_to ./cls.pth", "cls.pth", "FILE"),
          (f"convert_to {IMAGE}", "a.jpg", ".pth"),
      )),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "command", "code", "words"), FAULTS)
def test_fault(damage, command, code, words, world):
    damage(world)
    assert_refused(world, command, code, *words)


# Faults while a command runs


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


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
UNREADABLE = OSError(errno.EIO, os.strerror(errno.EIO))
FULL_DISK = fails(os, "fsync", 1, NO_SPACE)  # a file is synced before it gets its name
READ_ERROR = fails(ImageFile.ImageFile, "load", 2, UNREADABLE)
CTRL_C = fails(os, "fsync", 1, KeyboardInterrupt())
WRITERS = [name for name in COMMANDS if name not in ("evaluate_cam", "convert_to")]
READERS = dict.fromkeys(("train_cls", "infer_cls", "train_aff", "infer_aff"), "VOC/JPEGImages/")
READERS |= {"evaluate": "a.png", "report": IMAGE, "export": IMAGE}
HINDRANCES = [
    *((FULL_DISK, name, 1, ("new", "No space left on device")) for name in WRITERS),
    *((CTRL_C, name, 130, ("interrupted",)) for name in ("train_aff", "infer_cls", "export")),
    *((READ_ERROR, name, 1, (path, "Input/output error")) for name, path in READERS.items()),
    # Pillow warns of more pixels than this, and refuses twice as many.
    (lambda m: m.setattr(Image, "MAX_IMAGE_PIXELS", 2100), "infer_aff", 1, ("b.jpg", "2100")),
    (lambda m: m.setattr(Image, "MAX_IMAGE_PIXELS", 900), "infer_aff", 1, ("a.jpg", "900")),
]


@pytest.mark.parametrize(("hinder", "name", "code", "words"), HINDRANCES)
def test_after_a_hindrance_the_same_command_succeeds(hinder, name, code, words, world, monkeypatch):
    before = input_files(world)
    hinder(monkeypatch)
    outcome = run_program(COMMANDS[name], world)
    monkeypatch.undo()
    assert outcome.code == code, outcome.err
    assert all(word in outcome.last_line for word in words), outcome.err
    assert "Traceback" not in outcome.err
    assert input_files(world) == before
    assert not [path for path in world.rglob("*.tmp") if path.is_file()]
    run_program(COMMANDS[name], world).check()
