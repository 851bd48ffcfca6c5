"""The id lists and labels that are made of a devkit."""

import shutil

import numpy as np
import pytest
from helpers import contents, run_program, write_annotation, write_mask

from tool.maps import load_index_png, load_npy_dict
from voc12.devkit import Devkit, read_ids

PREPARE = "voc12.prepare --voc12_root VOC --out_dir lists"


@pytest.fixture
def world(tmp_path):
    """A folder with a devkit: train t1 t2, val v1, test x1 (no annotation), and b1 from SBD."""
    root = tmp_path / "VOC"
    (root / "JPEGImages").mkdir(parents=True)
    splits = root / "ImageSets" / "Segmentation"
    splits.mkdir(parents=True)
    for split, ids in {"train": "t2\nt1\n", "val": "v1\n", "test": "x1\n"}.items():
        (splits / f"{split}.txt").write_text(ids)
    for image_id, names in {
        "t1": ["person"],
        "t2": ["tvmonitor", "aeroplane", "person"],
        "v1": [],
        "b1": ["person"],
    }.items():
        write_annotation(root, image_id, names)
        write_mask(root, image_id, np.zeros((2, 2)), "SegmentationClassAug")
    return tmp_path


def test_lists_name_images_and_masks_and_labels_are_in_voc_order(world):
    result = run_program(PREPARE, world).check()
    lists = world / "lists"
    assert (lists / "val.txt").read_text() == "/JPEGImages/v1.jpg /SegmentationClassAug/v1.png\n"
    assert (lists / "test.txt").read_text() == "/JPEGImages/x1.jpg\n"
    assert read_ids(lists / "train.txt") == ["t2", "t1"]  # the devkit's order
    assert read_ids(lists / "train_aug.txt") == ["b1", "t1", "t2"]  # every mask but val's
    for name, count in {"train": 2, "val": 1, "test": 1, "train_aug": 3}.items():
        assert f"{name}.txt: {count} images\n" in result.out
    assert "not made" not in result.out
    names = {"cls_labels.npy", "test.txt", "train.txt", "train_aug.txt", "val.txt"}
    assert {path.name for path in lists.iterdir()} == names

    labels = load_npy_dict(lists / "cls_labels.npy")
    assert sorted(labels) == ["b1", "t1", "t2", "v1"]
    for label in labels.values():
        assert label.dtype == np.float32
        assert label.shape == (20,)
    assert np.flatnonzero(labels["t2"]).tolist() == [0, 14, 19]
    assert np.flatnonzero(labels["b1"]).tolist() == [14]
    assert not labels["v1"].any()
    assert "cls_labels.npy: labels of 4 images" in result.out
    assert "images without an annotation, hence without a label: 1 " in result.out
    # NumPy's own reader can load the file.
    again = np.load(lists / "cls_labels.npy", allow_pickle=True).item()
    assert again.keys() == labels.keys()


def test_labels_of_other_classes_in_the_default_folder(world):
    (world / "classes.txt").write_text("tvmonitor\nperson\naeroplane\n")
    run_program("voc12.prepare --voc12_root VOC --classes classes.txt", world).check()
    labels = load_npy_dict(world / "voc12" / "cls_labels.npy")
    assert labels["t1"].tolist() == [0, 1, 0]


def test_what_a_devkit_lacks_is_not_made_and_named(world):
    shutil.rmtree(world / "VOC" / "SegmentationClassAug")
    (world / "VOC" / "ImageSets" / "Segmentation" / "test.txt").unlink()
    result = run_program(PREPARE, world).check()
    assert not (world / "lists" / "test.txt").exists()
    assert not (world / "lists" / "train_aug.txt").exists()
    assert "not made: test.txt" in result.out
    assert "not made: train_aug.txt" in result.out
    assert "--sbd_root" in result.out


@pytest.mark.parametrize("below", ["cls", "benchmark_RELEASE/dataset/cls"])
def test_train_aug_from_sbd(below, world):
    shutil.rmtree(world / "VOC" / "SegmentationClassAug")
    (world / "SBD" / below).mkdir(parents=True)
    for image_id in ("b1", "v1", "s9"):
        (world / "SBD" / below / f"{image_id}.mat").touch()
    run_program(f"{PREPARE} --sbd_root SBD", world).check()
    # SBD's images and VOC's train, without val.
    assert read_ids(world / "lists" / "train_aug.txt") == ["b1", "s9", "t1", "t2"]


def test_lists_name_the_photograph_that_is_there(world):
    for name in ("t1.JPG", "t2.tif", "t2.png", "x1.jpeg", "v1.webp"):
        (world / "VOC" / "JPEGImages" / name).touch()
    run_program(PREPARE, world).check()
    lines = [(world / "lists" / f"{name}.txt").read_text().split() for name in ("train", "test")]
    assert lines[0][::2] == ["/JPEGImages/t2.png", "/JPEGImages/t1.JPG"]
    assert lines[0][1::2] == ["/SegmentationClassAug/t2.png", "/SegmentationClassAug/t1.png"]
    assert lines[1] == ["/JPEGImages/x1.jpeg"]


@pytest.mark.parametrize("flags", ["", "--sbd_root SBD"])
def test_hidden_files_of_an_archive_are_no_masks(flags, world):
    expected = run_program(PREPARE, world).check() and contents(world / "lists")
    for folder in ("VOC/SegmentationClassAug", "SBD/__MACOSX/cls", "SBD/cls"):
        (world / folder).mkdir(parents=True, exist_ok=True)
        for name in ("._b1.png", "._t1.mat", ".DS_Store", ".png"):
            (world / folder / name).write_bytes(b"\0")
    (world / "SBD" / "cls" / "b1.mat").touch()
    run_program(f"{PREPARE} {flags}", world).check()
    assert contents(world / "lists") == expected


def test_real_photographs_masks_and_annotations_agree(voc_mini, tmp_path):
    outcome = run_program(f"voc12.prepare --voc12_root {voc_mini} --out_dir lists", tmp_path)
    assert "not made: train_aug.txt" in outcome.check().out
    ids = {split: read_ids(tmp_path / "lists" / f"{split}.txt") for split in ("train", "val")}
    assert {split: len(members) for split, members in ids.items()} == {"train": 200, "val": 100}
    labels = load_npy_dict(tmp_path / "lists" / "cls_labels.npy")
    assert set(labels) == {*ids["train"], *ids["val"]}

    devkit = Devkit(voc_mini)
    for image_id in ids["val"][:20]:
        image = devkit.load_image(image_id)
        mask = load_index_png(devkit.mask_path(image_id))
        assert (image.height, image.width) == mask.shape
        classes = np.unique(mask[(mask > 0) & (mask < 255)]) - 1
        assert classes.size
        assert labels[image_id][classes].all(), image_id
