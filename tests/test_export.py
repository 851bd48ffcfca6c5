"""The exported tree holds the pseudo labels as the frameworks that train on it read them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers import contents, noise_image, run_program, write_image, write_mask
from PIL import Image

from tool.labels import VOID, voc_palette
from tool.maps import load_index_png, save_index_png

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
        write_mask(tmp_path, image_id, rng.integers(0, 21, (HEIGHT, WIDTH)), "rw")
    (tmp_path / "train.txt").write_text("".join(f"/JPEGImages/{i}.jpg /X/{i}.png\n" for i in TRAIN))
    (tmp_path / "val.txt").write_text("\n".join(VAL))
    return tmp_path


def read_pairs(images, labels, ids):
    paths = ((images / f"{image_id}.jpg", labels / f"{image_id}.png") for image_id in ids)
    return [tuple(Image.open(path).tobytes() for path in pair) for pair in paths]


def expected_pairs(world):
    """The photographs with the pseudo labels of train, and with the official masks of val."""
    images = world / "VOC" / "JPEGImages"
    train = read_pairs(images, world / "rw", TRAIN)
    val = read_pairs(images, world / "VOC" / "SegmentationClass", VAL)
    return {"train": train, "aug": train, "val": val}


def assert_read_as_written(world, expected):
    """By torchvision's references, and by mmsegmentation's VOC configs."""
    root = world / TREE
    for split, pairs in expected.items():
        ids = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        labels = root / ("SegmentationClassAug" if split == "aug" else "SegmentationClass")
        assert read_pairs(root / "JPEGImages", labels, ids) == pairs
        if split != "aug":
            dataset = torchvision.datasets.VOCSegmentation(world / "out", image_set=split)
            assert [tuple(image.tobytes() for image in pair) for pair in dataset] == pairs


def test_torchvision_and_mmsegmentation_read_the_tree(world):
    before, expected = contents(world), expected_pairs(world)
    out = run_program(EXPORT, world).check().out
    assert_read_as_written(world, expected)
    assert "3 images with pseudo labels" in out
    assert "2 with official masks" in out
    assert (world / TREE / "JPEGImages" / "a.jpg").is_symlink()
    assert [path.name for path in (world / "out").iterdir()] == ["VOCdevkit"]
    after = contents(world)
    assert {name: after[name] for name in before} == before


def test_masks_get_vocs_indices_and_photographs_the_ending_jpg(world):
    path = world / "VOC" / "SegmentationClass" / "d.png"
    mask = load_index_png(path)
    image = Image.fromarray(255 - mask)
    image.putpalette(np.array(voc_palette(), np.uint8).reshape(256, 3)[::-1].tobytes())
    image.save(path)
    (world / "VOC" / "JPEGImages" / "d.jpg").rename(world / "VOC" / "JPEGImages" / "d.JPEG")
    run_program(EXPORT, world).check()
    with Image.open(world / TREE / "SegmentationClass" / "d.png") as image:
        assert np.array_equal(image, mask)
        assert image.getpalette() == voc_palette()
    assert (world / TREE / "JPEGImages" / "d.jpg").resolve().name == "d.JPEG"


def test_copies_do_not_need_their_sources(world):
    expected = expected_pairs(world)
    run_program(f"{EXPORT} --copy", world).check()
    shutil.rmtree(world / "VOC")
    shutil.rmtree(world / "rw")
    assert_read_as_written(world, expected)
    assert not any(path.is_symlink() for path in (world / "out").rglob("*"))


@pytest.mark.parametrize(
    ("path", "size", "words"),
    [
        ("VOC/JPEGImages/e.jpg", None, ("JPEGImages/e.jpg", "1 of 5 are missing")),
        ("VOC/SegmentationClass/d.png", None, ("SegmentationClass/d.png", "official")),
        ("rw/b.2.png", (WIDTH, HEIGHT), ("rw/b.2.png", "17 x 12", "12 x 17")),
        ("VOC/SegmentationClass/e.png", (1, 1), ("e.png", "1 x 1")),
    ],
)
def test_a_refused_export_writes_nothing(path, size, words, world):
    (world / path).unlink()
    if size:
        save_index_png(world / path, np.zeros(size, np.uint8))
    before = contents(world)
    run_program(EXPORT, world).assert_failed(1, *words)
    assert contents(world) == before
