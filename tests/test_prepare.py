"""The id lists and labels that are made of a devkit."""

import shutil

import numpy as np
import pytest
from helpers import contents, noise_image, run_program, write_annotation, write_mask

from tool.maps import load_npy_dict
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


def test_labels_of_other_classes_in_the_default_folder(world):
    (world / "classes.txt").write_text("tvmonitor\nperson\naeroplane\n")
    run_program("voc12.prepare --voc12_root VOC --classes classes.txt", world).check()
    labels = load_npy_dict(world / "voc12" / "cls_labels.npy")
    assert labels["t1"].tolist() == [0, 1, 0]


def test_what_a_devkit_lacks_is_not_made_and_named(world):
    shutil.rmtree(world / "VOC" / "SegmentationClassAug")
    (world / "VOC" / "ImageSets" / "Segmentation" / "test.txt").unlink()
    result = run_program(PREPARE, world).check()
    for name in ("test.txt", "train_aug.txt"):
        assert not (world / "lists" / name).exists()
        assert f"not made: {name}" in result.out
    assert "--sbd_root" in result.out


def test_ids_select_from_all_lists(world):
    (world / "VOC" / "SegmentationClassAug" / "t1.png").unlink()  # SBD's masks alone lack train
    result = run_program(f"{PREPARE} --ids [tv]1", world).check()
    for name, ids in {"train": ["t1"], "val": ["v1"], "train_aug": ["t1"]}.items():
        assert read_ids(world / "lists" / f"{name}.txt") == ids
    assert "not made: test.txt" in result.out
    assert sorted(load_npy_dict(world / "lists" / "cls_labels.npy")) == ["t1", "v1"]
    run_program(f"{PREPARE} --ids z*", world).assert_failed(2, "--ids z*", "VOC")
    run_program(f"{FOLDERS} --ids t1", world).assert_failed(2, "--ids", "--voc12_root")


@pytest.mark.parametrize("below", ["cls", "benchmark_RELEASE/dataset/cls"])
def test_train_aug_from_sbd(below, world):
    shutil.rmtree(world / "VOC" / "SegmentationClassAug")
    (world / "SBD" / below).mkdir(parents=True)
    for image_id in ("b1", "v1", "s9"):
        (world / "SBD" / below / f"{image_id}.mat").touch()
    run_program(f"{PREPARE} --sbd_root SBD", world).check()
    # SBD's images and VOC's train, without val.
    assert read_ids(world / "lists" / "train_aug.txt") == ["b1", "s9", "t1", "t2"]


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


def test_lists_and_labels_of_a_real_devkit(voc_mini, tmp_path):
    outcome = run_program(f"voc12.prepare --voc12_root {voc_mini} --out_dir lists", tmp_path)
    assert "not made: train_aug.txt" in outcome.check().out
    ids = {split: read_ids(tmp_path / "lists" / f"{split}.txt") for split in ("train", "val")}
    assert {split: len(members) for split, members in ids.items()} == {"train": 200, "val": 100}
    labels = load_npy_dict(tmp_path / "lists" / "cls_labels.npy")
    assert set(labels) == {*ids["train"], *ids["val"]}


TINY = (
    "--network network.tiny_cls --weights none --batch_size 2 --max_epoches 1 --crop_size 48 "
    "--resize_long 40 56 --val_crop_size 48 --num_workers 0 --device cpu"
)
FOLDERS = "voc12.prepare --image_folders DIR --out_dir OUT"
TABLE = "voc12.prepare --labels table.csv --images photos --out_dir OUT"


@pytest.fixture
def photographs(tmp_path):
    """Ten photographs in folders, one of them of two classes, one of none; the same in a table."""
    for number in range(10):
        names = {0: ("cat", "ox cart"), 9: ("background",)}.get(number, ("cat",))
        for name in (*(f"DIR/{name}" for name in names), "photos"):
            path = tmp_path / name / ("my 0.PNG" if number == 0 else f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(40, 50, number).save(path, "PNG")
    rows = [f"{number}.jpg,cat" for number in range(1, 9)]
    text = "\n".join(["my 0,cat", *rows, "my 0,ox cart", "9,"])
    (tmp_path / "table.csv").write_text(text)
    return tmp_path


def assert_prepared(out, is_link=True):
    assert (out / "classes.txt").read_text() == "cat\nox cart\n"
    labels = load_npy_dict(out / "cls_labels.npy")
    singles = {str(number): [1, 0] for number in range(1, 9)}
    assert {key: label.tolist() for key, label in labels.items()} == {
        **singles,
        "my 0": [1, 1],
        "9": [0, 0],
    }
    train, val = (read_ids(out / f"{split}.txt") for split in ("train", "val"))
    assert len(val) == 3
    assert sorted(train + val) == sorted(labels)
    assert (
        "/JPEGImages/my 0.PNG\n" in (out / "train.txt").read_text() + (out / "val.txt").read_text()
    )
    for image_id in labels:
        path = Devkit(out).image_path(image_id)
        assert path.is_symlink() == is_link
        assert Devkit(out).load_image(image_id).size == (50, 40)


@pytest.mark.parametrize("command", [FOLDERS, TABLE])
def test_folders_and_a_table_give_the_same_devkit(command, photographs):
    command += " --val_share 0.3"
    result = run_program(command, photographs).check()
    assert_prepared(photographs / "OUT")
    assert "labels of 10 images, 1 of no class" in result.out
    before = contents(photographs)
    run_program(command, photographs).check()
    assert contents(photographs) == before
    run_program(command.replace("OUT", "OTHER --copy"), photographs).check()
    assert_prepared(photographs / "OTHER", is_link=False)
    line = next(line for line in result.out.splitlines() if "--train_list" in line)
    command = line.replace("train_cls.py", "train_cls").replace("...", TINY)
    trained = run_program(command, photographs).check()
    assert "10 from OUT/cls_labels.npy, 0 from annotations, 1 of no class" in trained.out


def test_a_table_of_columns_and_other_photographs(photographs):
    (photographs / "table.csv").write_text("id,dog,cat\n1,0,1\n2.jpg,1,1\n3,0,0\n")
    result = run_program(TABLE, photographs).check()
    assert "7 photographs are not in table.csv" in result.out
    assert (photographs / "OUT" / "classes.txt").read_text() == "dog\ncat\n"
    labels = load_npy_dict(photographs / "OUT" / "cls_labels.npy")
    assert [labels[key].tolist() for key in "123"] == [[0, 1], [1, 1], [0, 0]]
    (photographs / "classes.txt").write_text("cat\nfox\ndog\n")
    run_program(f"{TABLE.replace('OUT', 'OUT2')} --classes classes.txt", photographs).check()
    labels = load_npy_dict(photographs / "OUT2" / "cls_labels.npy")
    assert labels["2"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("command", "file", "content", "words"),
    [
        (FOLDERS, "DIR/dog/1.jpg", b"another", ("DIR/dog/1.jpg", "DIR/cat/1.jpg")),
        (FOLDERS, "DIR/dog/1.png", b"", ("DIR/dog/1.png", "DIR/cat/1.jpg")),
        (FOLDERS, "DIR/cat/1.png", b"", ("DIR/cat/1.png", "DIR/cat/1.jpg")),
        (FOLDERS, "DIR/dog/readme.txt", b"", ("DIR/dog", "no photographs")),
        (FOLDERS, "DIR/#1/x.jpg", b"", ("classes.txt", "#1")),
        (FOLDERS, "OUT/JPEGImages/x.jpg", b"", ("x.jpg", "--out_dir")),
        (FOLDERS, "OUT/JPEGImages/1.jpg", b"another", ("OUT/JPEGImages/1.jpg", "DIR/cat/1.jpg")),
        (FOLDERS.replace("DIR", "none"), "x", b"", ("none",)),
        (TABLE, "table.csv", b"11,cat\n1,dog", ("table.csv", "'11'")),
        (TABLE, "table.csv", b"id,class\n1,dog", ("table.csv", "'id'")),
        (TABLE, "table.csv", b"1,0\n2,1", ("table.csv", "first line")),
        (TABLE, "table.csv", b"1", ("table.csv", "comma")),
        (TABLE, "photos/1.png", b"", ("photos/1.png", "photos/1.jpg")),
        (f"{TABLE} --classes c.txt", "c.txt", b"cat", ("table.csv", "ox cart", "c.txt")),
        (f"{TABLE} --val_share 0.99", "x", b"", ("--val_share",)),
        (TABLE.replace("photos", "none"), "x", b"", ("none",)),
    ],
)
def test_bad_folders_and_tables_give_one_sentence(command, file, content, words, photographs):
    (photographs / file).parent.mkdir(parents=True, exist_ok=True)
    (photographs / file).write_bytes(content)
    run_program(command, photographs).assert_failed(1, *words)


@pytest.mark.parametrize("flags", ["", "--labels a.csv", "--voc12_root VOC --image_folders DIR"])
def test_one_source_must_be_named(flags, tmp_path):
    run_program(f"voc12.prepare {flags}", tmp_path).assert_failed(2, "--image_folders")
