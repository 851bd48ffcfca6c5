"""The toy devkit is complete, reproducible and consistent with its annotations."""

import numpy as np
import pytest
from helpers import contents
from PIL import Image

from tool.labels import VOID
from tool.maps import load_index_png
from tool.run.errors import DataError
from voc12 import toy
from voc12.devkit import Devkit

IMAGES, SIZE, SEED = 30, 64, 3


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "devkit"
    toy.make_devkit(out, IMAGES, SIZE, SEED)
    return out


def _split(devkit, name):
    return (devkit / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()


def _annotated_labels(devkit, image_id):
    return set(np.flatnonzero(Devkit(devkit).annotated_label(image_id)) + 1)


def test_layout_is_complete_and_splits_are_disjoint(devkit):
    train, val = (_split(devkit, name) for name in ("train", "val"))
    ids = sorted(train + val)
    assert len(set(ids)) == IMAGES
    assert len(train) == 4 * len(val)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "Annotations"):
        assert sorted(path.stem for path in (devkit / folder).iterdir()) == ids
    for split in (train, val):
        seen = [_annotated_labels(devkit, image_id) for image_id in split]
        assert len(set().union(*seen)) == len(toy.TOY_CLASSES)


def test_images_depend_on_seed_and_index_only(devkit, tmp_path):
    before = contents(devkit)
    (devkit / "JPEGImages" / "toy_000003.jpg").unlink()
    toy.make_devkit(devkit, IMAGES, SIZE, SEED)  # completes an interrupted call
    assert contents(devkit) == before
    toy.make_devkit(tmp_path / "fewer", 4, SIZE, SEED)
    toy.make_devkit(tmp_path / "other", 4, SIZE, SEED + 1)
    for name, image in contents(tmp_path / "fewer").items():
        if name.startswith("JPEGImages"):
            assert image == before[name]
            assert image != (tmp_path / "other" / name).read_bytes()


def test_masks_agree_with_images_and_annotations(devkit):
    for image_id in _split(devkit, "train"):
        folders = ("SegmentationClassAug", "SegmentationClass")
        full, with_void = (load_index_png(devkit / name / f"{image_id}.png") for name in folders)
        with Image.open(devkit / "JPEGImages" / f"{image_id}.jpg") as image:
            size = list(image.size)
            assert image.mode == "RGB"
        assert size[::-1] == [*full.shape] == [*with_void.shape]
        assert max(size) == SIZE
        assert min(size) >= toy.SHORT_SIDE[0] * SIZE

        classes = _annotated_labels(devkit, image_id)
        assert set(np.unique(full)) == {0} | classes
        assert set(np.unique(with_void)) == {0, VOID} | classes
        assert all((full == k).mean() >= 0.015 for k in classes)
        padded = np.pad(full, 1, mode="edge")
        around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        inside = (around == full[..., None, None]).all((2, 3))
        assert np.array_equal(with_void, np.where(inside, full, VOID))


def test_folders_with_other_content_are_refused(devkit, tmp_path):
    (tmp_path / "work.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "work.txt"):
        with pytest.raises(DataError, match=str(out)):
            toy.make_devkit(out, IMAGES, SIZE, SEED)
    with pytest.raises(DataError, match="these arguments"):
        toy.make_devkit(devkit, IMAGES - 1, SIZE, SEED)
    assert [path.name for path in tmp_path.iterdir()] == ["work.txt"]
