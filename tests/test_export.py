"""The tree that pseudo labels are handed over in, read as those read it who train on it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers import contents, noise_image, run_program, write_image, write_mask
from PIL import Image

from tool.labels import VOID, voc_palette
from tool.maps import load_index_png, save_index_png
from voc12.devkit import read_ids

EXPORT = "voc12.export --voc12_root VOC --rw rw --list train.txt --val_list val.txt --out out"
HEIGHT, WIDTH = 12, 17
TRAIN, VAL = ["a", "b.2", "c"], ["d", "e"]
TREE = Path("out", "VOCdevkit", "VOC2012")


@pytest.fixture
def world(tmp_path, rng):
    for seed, image_id in enumerate(TRAIN + VAL):
        write_image(tmp_path / "VOC", image_id, noise_image(HEIGHT, WIDTH, seed), kind="JPEG")
        write_mask(tmp_path / "VOC", image_id, rng.choice([0, 3, 20, VOID], (HEIGHT, WIDTH)))
    for image_id in TRAIN:
        label = rng.integers(0, 21, (HEIGHT, WIDTH)).astype(np.uint8)
        save_index_png(tmp_path / "rw" / f"{image_id}.png", label)
    (tmp_path / "train.txt").write_text("".join(f"/JPEGImages/{i}.jpg /X/{i}.png\n" for i in TRAIN))
    (tmp_path / "val.txt").write_text("\n".join(VAL))
    return tmp_path


def read_by_torchvision(world, split):
    """The (photograph, label) pairs of torchvision's references, --dataset voc --data-path out."""
    dataset = torchvision.datasets.VOCSegmentation(world / "out", image_set=split, download=False)
    return [(np.asarray(image), np.asarray(label)) for image, label in dataset]


def read_by_mmsegmentation(world, split, labels):
    """The pairs of a dataset of mmsegmentation's VOC configs with that list and label folder."""
    root = world / TREE
    lines = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split("\n")
    return [
        (
            np.asarray(Image.open(root / "JPEGImages" / f"{line.strip()}.jpg")),
            np.asarray(Image.open(root / labels / f"{line.strip()}.png")),
        )
        for line in lines
        if line
    ]


def expected_pairs(world, ids, labels):
    return [
        (
            np.asarray(Image.open(world / "VOC" / "JPEGImages" / f"{image_id}.jpg")),
            load_index_png(world / labels / f"{image_id}.png"),
        )
        for image_id in ids
    ]


def assert_same_pairs(pairs, expected):
    assert len(pairs) == len(expected) > 0
    for pair, wanted in zip(pairs, expected, strict=True):
        for image, other in zip(pair, wanted, strict=True):
            assert np.array_equal(image, other)


def assert_read_as_written(world):
    train = expected_pairs(world, TRAIN, "rw")
    val = expected_pairs(world, VAL, "VOC/SegmentationClass")
    assert_same_pairs(read_by_torchvision(world, "train"), train)
    assert_same_pairs(read_by_torchvision(world, "val"), val)
    for split, labels, pairs in (
        ("train", "SegmentationClass", train),
        ("aug", "SegmentationClassAug", train),
        ("val", "SegmentationClass", val),
    ):
        assert_same_pairs(read_by_mmsegmentation(world, split, labels), pairs)


def test_the_tree_is_read_by_torchvision_and_mmsegmentation(world):
    out = run_program(EXPORT, world).check().out
    assert_read_as_written(world)
    assert "3 images with pseudo labels" in out
    assert "2 with official masks" in out
    assert (world / TREE / "JPEGImages" / "a.jpg").is_symlink()
    assert [path.name for path in (world / "out").iterdir()] == ["VOCdevkit"]


def test_the_tree_can_be_moved(world):
    run_program(EXPORT, world).check()
    (world / "out").rename(world / "elsewhere")
    (world / "out").mkdir()
    (world / "elsewhere" / "VOCdevkit").rename(world / "out" / "VOCdevkit")
    assert_read_as_written(world)


def test_gray_labels_get_the_palette_and_keep_their_values(world):
    label = load_index_png(world / "rw" / "a.png")
    Image.fromarray(label).save(world / "rw" / "a.png")
    run_program(EXPORT, world).check()
    with Image.open(world / TREE / "SegmentationClass" / "a.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette()
        assert np.array_equal(np.asarray(image), label)


def test_copies_stand_by_themselves(world):
    kept = expected_pairs(world, TRAIN, "rw") + expected_pairs(world, VAL, "VOC/SegmentationClass")
    run_program(f"{EXPORT} --copy", world).check()
    shutil.rmtree(world / "VOC")
    shutil.rmtree(world / "rw")
    read = read_by_torchvision(world, "train") + read_by_torchvision(world, "val")
    assert_same_pairs(read, kept)


def test_where_links_fail_it_copies(world, monkeypatch):
    def refuse(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run_program(EXPORT, world).check()
    assert_read_as_written(world)
    assert not any(path.is_symlink() for path in (world / "out").rglob("*"))


def test_nothing_of_the_devkit_or_the_labels_changes(world):
    before = contents(world)
    run_program(EXPORT, world).check()
    after = contents(world)
    assert {name: after[name] for name in before} == before


def test_real_photographs_with_labels_made_of_masks(voc_mini, tmp_path):
    lists = voc_mini / "ImageSets" / "Segmentation"
    chosen = {split: read_ids(lists / f"{split}.txt")[:3] for split in ("train", "val")}
    for split, ids in chosen.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(ids))
    for image_id in chosen["train"]:
        mask = load_index_png(voc_mini / "SegmentationClass" / f"{image_id}.png")
        save_index_png(tmp_path / "rw" / f"{image_id}.png", np.where(mask == VOID, 0, mask))
    (tmp_path / "VOC").symlink_to(voc_mini)
    run_program(EXPORT, tmp_path).check()
    for split, labels in (("train", "rw"), ("val", "VOC/SegmentationClass")):
        expected = expected_pairs(tmp_path, chosen[split], labels)
        assert_same_pairs(read_by_torchvision(tmp_path, split), expected)


# Bad input


def drop(*paths):
    def spoil(world):
        for path in paths:
            (world / path).unlink()

    return spoil


def write(path, label):
    return lambda world: save_index_png(world / path, np.asarray(label, np.uint8))


def same_id_in_both(world):
    (world / "val.txt").write_text("d\na\n")


def colours(world):
    Image.new("RGB", (WIDTH, HEIGHT)).save(world / "rw" / "a.png")


def half_a_photograph(world):
    path = world / "VOC" / "JPEGImages" / "a.jpg"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("spoil", "flags", "words"),
    [
        (drop("rw/a.png", "rw/c.png"), "", ("rw/a.png", "c.png", "2 of 3 are missing", "--out_rw")),
        (drop("VOC/JPEGImages/e.jpg"), "", ("JPEGImages/e.jpg", "1 of 5 are missing")),
        (drop("VOC/SegmentationClass/d.png"), "", ("SegmentationClass/d.png", "official")),
        (write("rw/b.2.png", np.zeros((WIDTH, HEIGHT))), "", ("rw/b.2.png", "17 x 12", "12 x 17")),
        (write("VOC/SegmentationClass/e.png", np.zeros((1, 1))), "", ("e.png", "1 x 1")),
        (write("rw/a.png", np.full((HEIGHT, WIDTH), 21)), "", ("rw/a.png", "label 21", "20 cl")),
        (same_id_in_both, "", ("a: ", "--list", "--val_list")),
        (colours, "", ("rw/a.png", "RGB")),
        (half_a_photograph, "", ("a.jpg", "not a readable image")),
        (lambda world: None, "--list no.txt", ("no.txt", "voc12.prepare")),
        (lambda world: None, "--voc12_root no", ("no: ", "--voc12_root")),
        (lambda world: None, "--out train.txt", ("train.txt",)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_and_nothing_is_written(spoil, flags, words, world):
    spoil(world)
    before = contents(world)
    run_program(f"{EXPORT} {flags}", world).assert_failed(1, *words)
    assert contents(world) == before


def test_an_export_is_never_overwritten(world):
    run_program(EXPORT, world).check()
    before = contents(world)
    run_program(EXPORT, world).assert_failed(1, "out/VOCdevkit", "already")
    assert contents(world) == before
