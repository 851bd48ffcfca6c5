"""The toy devkit is complete, repeatable and true to its own annotations."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tool.maps import load_index_png
from tool.run import cli
from tool.run.errors import DataError
from voc12 import toy
from voc12.devkit import VOC_CLASSES

IMAGES, SIZE, SEED = 30, 96, 3
VOID_WIDTH = 2  # pixels from a border, at most


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "devkit"
    toy.make_devkit(out, IMAGES, SIZE, SEED)
    return out


def _contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _split(devkit, name):
    return (devkit / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()


def _annotation(devkit, image_id):
    return ElementTree.parse(devkit / "Annotations" / f"{image_id}.xml").getroot()


def _class_indices(annotation):
    return {VOC_CLASSES.index(name.text) + 1 for name in annotation.iterfind("object/name")}


def test_layout_is_complete_and_splits_are_disjoint(devkit):
    ids, train, val = (_split(devkit, name) for name in ("trainval", "train", "val"))
    assert len(ids) == IMAGES
    assert sorted(train + val) == ids
    assert len(train) == 4 * len(val)
    folders = ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "Annotations")
    for folder in folders:
        assert sorted(path.stem for path in (devkit / folder).iterdir()) == ids


def test_same_arguments_same_bytes(devkit, tmp_path):
    toy.make_devkit(tmp_path / "again", IMAGES, SIZE, SEED)
    contents = _contents(devkit)
    assert _contents(tmp_path / "again") == contents
    toy.make_devkit(devkit, IMAGES, SIZE, SEED)  # in place: mends, changes nothing
    assert _contents(devkit) == contents


def test_image_depends_on_seed_and_index_only(devkit, tmp_path):
    toy.make_devkit(tmp_path / "fewer", 4, SIZE, SEED)
    toy.make_devkit(tmp_path / "other", 4, SIZE, SEED + 1)
    for path in (tmp_path / "fewer" / "JPEGImages").iterdir():
        assert path.read_bytes() == (devkit / "JPEGImages" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / "JPEGImages" / path.name).read_bytes()


def test_masks_and_sizes_agree_with_annotations(devkit):
    for image_id in _split(devkit, "trainval"):
        annotation = _annotation(devkit, image_id)
        full = load_index_png(devkit / "SegmentationClassAug" / f"{image_id}.png")
        with_void = load_index_png(devkit / "SegmentationClass" / f"{image_id}.png")
        with Image.open(devkit / "JPEGImages" / f"{image_id}.jpg") as image:
            width, height = image.size
            assert image.mode == "RGB"
        assert (height, width) == full.shape == with_void.shape
        assert [int(annotation.find(f"size/{side}").text) for side in ("width", "height")] == [
            width,
            height,
        ]
        assert max(width, height) == SIZE
        assert min(width, height) >= toy.SHORT_SIDE[0] * SIZE

        classes = _class_indices(annotation)
        assert set(np.unique(full)) == {0} | classes
        assert set(np.unique(with_void)) == {0, toy.VOID} | classes
        assert all((full == k).mean() >= 0.015 for k in classes)


def test_void_lies_along_borders_only(devkit):
    for image_id in _split(devkit, "val"):
        full = load_index_png(devkit / "SegmentationClassAug" / f"{image_id}.png")
        void = load_index_png(devkit / "SegmentationClass" / f"{image_id}.png") == toy.VOID
        padded = np.pad(full, VOID_WIDTH, mode="edge")
        around = np.lib.stride_tricks.sliding_window_view(padded, (2 * VOID_WIDTH + 1,) * 2)
        assert not void[(around == full[..., None, None]).all((2, 3))].any()


def test_boxes_hold_their_class(devkit):
    for image_id in _split(devkit, "val"):
        full = load_index_png(devkit / "SegmentationClassAug" / f"{image_id}.png")
        for element in _annotation(devkit, image_id).iterfind("object"):
            xmin, ymin, xmax, ymax = (int(bound.text) for bound in element.find("bndbox"))
            rows, columns = np.nonzero(full == VOC_CLASSES.index(element.find("name").text) + 1)
            box = (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
            assert (xmin, ymin, xmax, ymax) == box


def test_every_class_is_in_both_splits(devkit):
    for split in ("train", "val"):
        seen = [_class_indices(_annotation(devkit, image_id)) for image_id in _split(devkit, split)]
        assert len(set.union(*seen)) == len(toy.TOY_CLASSES)


def test_foreign_folders_are_refused(devkit, tmp_path):
    (tmp_path / "work.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "work.txt"):
        with pytest.raises(DataError, match=str(out)):
            toy.make_devkit(out, IMAGES, SIZE, SEED)
    with pytest.raises(DataError, match="other arguments"):
        toy.make_devkit(devkit, IMAGES - 1, SIZE, SEED)
    assert [path.name for path in tmp_path.iterdir()] == ["work.txt"]


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--images", "1"], 2), (["--size", "63"], 2), (["--seed", "-1"], 2), (["--images", "2"], 0)],
)
def test_command_line(flags, code, tmp_path, monkeypatch, capsys):
    out = tmp_path / "devkit"
    monkeypatch.setattr(sys, "argv", ["toy", str(out), "--size", "64", *flags])
    if code:
        with pytest.raises(SystemExit) as stopped:
            cli.run(toy.get_args_parser(), toy.main)
        assert stopped.value.code == code
        assert flags[0] in capsys.readouterr().err
        assert not out.exists()
    else:
        cli.run(toy.get_args_parser(), toy.main)
        assert capsys.readouterr().out == f"{out}: 2 images (1 train, 1 val).\n"
