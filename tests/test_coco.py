"""A small made-up COCO becomes a devkit: masks, lists, labels; bad files give one sentence."""

import json

import numpy as np
import pytest
from helpers import contents, noise_image, run_program
from PIL import Image, ImageDraw

from tool.maps import load_index_png, load_npy_dict
from voc12.devkit import read_class_names, read_ids

mask_tools = pytest.importorskip("pycocotools.mask")

COCO = "voc12.coco --coco_root COCO --out_dir OUT --num_workers 0"
# Not in the order of their ids, with gaps.
CATEGORIES = {90: "toothbrush", 1: "person", 13: "stop sign", 7: "train"}
LABELS = {1: 1, 7: 2, 13: 3, 90: 4}
SIZE = HEIGHT, WIDTH = 40, 56
TRAIN = [f"COCO_train2014_{number:012}" for number in (9, 25, 581929)]
VAL = [f"COCO_val2014_{number:012}" for number in (42, 73)]


def pixels_of(*boxes):
    """bool H x W, true in boxes of whole pixels (left, top, right, bottom)."""
    image = Image.new("1", (WIDTH, HEIGHT))
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=1)
    return np.array(image)


def polygons(*boxes):
    return [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes]


def counts(pixels):
    """Run lengths by column, beginning with zeros."""
    runs = np.flatnonzero(np.diff(np.concatenate([[0], pixels.T.ravel(), [0]])))
    return np.diff([0, *runs, pixels.size]).tolist()


def encoded(pixels):
    return {"size": [*SIZE], "counts": counts(pixels)}


def compressed(pixels):
    rle = mask_tools.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


BIG, SMALL, SIDE, TWO = (4, 3, 40, 33), (10, 8, 20, 19), (30, 20, 54, 38), (1, 1, 3, 3)
# Objects (category, is crowd, segmentation, pixels) of an image, in the file's order: the small
# one comes before those that it lies on.
OBJECTS = {
    TRAIN[0]: [
        (90, 0, polygons(SMALL), pixels_of(SMALL)),
        (1, 0, polygons(BIG, TWO), pixels_of(BIG, TWO)),
        (13, 0, polygons(SIDE), pixels_of(SIDE)),
    ],
    TRAIN[1]: [
        (7, 1, encoded(pixels_of(SIDE)), pixels_of(SIDE)),
        (1, 0, compressed(pixels_of(SMALL, TWO)), pixels_of(SMALL, TWO)),
        (7, 0, compressed(pixels_of(BIG)), pixels_of(BIG)),
    ],
    TRAIN[2]: [],
    VAL[0]: [
        (13, 1, encoded(pixels_of(SMALL)), pixels_of(SMALL)),
        (13, 0, polygons(TWO), pixels_of(TWO)),
        (7, 0, [[1, 1, 2, 2]], None),  # encloses nothing
    ],
    VAL[1]: [],
}


def expected_mask(objects, crowd):
    mask = np.zeros(SIZE, np.uint8)
    shown = [entry for entry in objects if entry[3] is not None]
    for category, is_crowd, _, pixels in sorted(shown, key=lambda entry: -entry[3].sum()):
        mask[pixels] = 255 if is_crowd and not crowd else LABELS[category]
    return mask


def instances(ids):
    """What a file of COCO's instances holds."""
    annotations = [
        {
            "id": 1000 * i + k,
            "image_id": i,
            "category_id": category,
            "iscrowd": is_crowd,
            "segmentation": segmentation,
            "bbox": [0, 0, 1, 1],
            **({} if pixels is None else {"area": float(pixels.sum())}),
        }
        for i, image_id in enumerate(ids)
        for k, (category, is_crowd, segmentation, pixels) in enumerate(OBJECTS[image_id])
    ]
    images = [
        {"id": i, "file_name": f"{image_id}.jpg", "height": HEIGHT, "width": WIDTH}
        for i, image_id in enumerate(ids)
    ]
    categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    content = {"info": {}, "images": images, "annotations": annotations}
    return content | {"categories": categories}


def write_json(world, split, content):
    path = world / "COCO" / "annotations" / f"instances_{split}2014.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def world(tmp_path):
    for split, ids in {"train": TRAIN, "val": VAL}.items():
        write_json(tmp_path, split, instances(ids))
        (tmp_path / "COCO" / f"{split}2014").mkdir()
        for seed, image_id in enumerate(ids):
            path = tmp_path / "COCO" / f"{split}2014" / f"{image_id}.jpg"
            noise_image(*SIZE, seed).save(path)
    return tmp_path


@pytest.mark.parametrize("flags", ["", "--crowd --copy"])
def test_masks_lists_and_labels(flags, world):
    result = run_program(f"{COCO} {flags}", world).check()
    out = world / "OUT"
    assert read_class_names(out / "classes.txt") == ("person", "train", "stop sign", "toothbrush")
    assert "train: 1 images without any object are left out" in result.out
    assert "labels of 4 images, 1 of no class" in result.out
    for folder in (out, out / "ImageSets" / "Segmentation"):
        assert read_ids(folder / "train.txt") == TRAIN[:2]
        assert read_ids(folder / "val.txt") == VAL
    assert (out / "ImageSets" / "Segmentation" / "val.txt").read_text().split() == VAL
    labels = load_npy_dict(out / "cls_labels.npy")
    assert {name: label.tolist() for name, label in labels.items()} == {
        TRAIN[0]: [1, 0, 1, 1],
        TRAIN[1]: [1, 1, 0, 0],
        VAL[0]: [0, 1, 1, 0],
        VAL[1]: [0, 0, 0, 0],
    }
    for image_id in labels:
        mask = load_index_png(out / "SegmentationClass" / f"{image_id}.png")
        assert np.array_equal(mask, expected_mask(OBJECTS[image_id], "--crowd" in flags))
        photograph = out / "JPEGImages" / f"{image_id}.jpg"
        assert photograph.is_symlink() == ("--copy" not in flags)
        split = image_id.split("_")[1]
        original = world / "COCO" / split / f"{image_id}.jpg"
        assert photograph.read_bytes() == original.read_bytes()


def test_a_repeated_command_keeps_what_is_complete(world):
    run_program(COCO.replace("--num_workers 0", "--num_workers 2"), world).check()
    first = contents(world / "OUT")
    (world / "OUT" / "SegmentationClass" / f"{VAL[0]}.png").unlink()
    result = run_program(COCO, world).check()
    assert "1 masks drawn, 3 were complete" in result.out
    assert contents(world / "OUT") == first
    run_program(f"{COCO} --crowd", world).assert_failed(2, "--crowd", "other settings")
    run_program(f"{COCO} --crowd --overwrite", world).check()


def _without(key):
    return lambda content: content.pop(key)


def _change(number, **entries):
    return lambda content: content["annotations"][number].update(entries)


FAULTS = {
    "category": (_change(0, category_id=2), "category 2"),
    "image": (_change(0, image_id=77), "image 77"),
    "no images": (_without("images"), "instances_train2014.json"),
    "captions": (lambda c: c["annotations"][0].pop("segmentation"), "segmentation"),
    "polygon": (_change(0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "polygon"),
    "not a number": (_change(0, segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "polygon"),
    "text": (_change(0, segmentation=[["a", "b"]]), "not a file"),
    "long": (_change(3, segmentation={"size": [*SIZE], "counts": [3, 9999]}), "RLE"),
    "short": (_change(3, segmentation={"size": [*SIZE], "counts": [3, 9]}), "encoding"),
    "turned": (_change(3, segmentation={"size": [56, 40], "counts": [3, 2237]}), "encoding"),
    "short text": (_change(4, segmentation={"size": [*SIZE], "counts": "04"}), "encoding"),
    "no shape": (_change(0, segmentation=None), "drawn"),
    "size": (lambda c: c["images"][0].update(height=41), "(41, 56)"),
    "same name": (lambda c: c["images"][0].update(file_name=f"{TRAIN[1]}.jpg"), "same file name"),
    "class": (lambda c: c["categories"][0].update(name="background"), "classes.txt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_annotations_give_one_sentence(fault, world):
    content, (damage, words) = instances(TRAIN), FAULTS[fault]
    damage(content)
    write_json(world, "train", content)
    if fault == "class":
        write_json(world, "val", instances(VAL) | {"categories": content["categories"]})
    run_program(COCO, world).assert_failed(1, words)


@pytest.mark.parametrize("text", ["", "[]", '{"images": 3}'])
def test_what_is_no_json_of_coco_gives_one_sentence(text, world):
    write_json(world, "val", text)
    run_program(COCO, world).assert_failed(1, "instances_val2014.json", "not a file")


def test_missing_files_and_others_in_the_folder_give_one_sentence(world):
    run_program(f"{COCO} --year 2017", world).assert_failed(1, "instances_train2017.json")
    (world / "OUT" / "JPEGImages").mkdir(parents=True)
    (world / "OUT" / "JPEGImages" / "x.jpg").touch()
    run_program(COCO, world).assert_failed(1, "x.jpg", "--out_dir")
    (world / "COCO" / "val2014" / f"{VAL[0]}.jpg").unlink()
    run_program(COCO, world).assert_failed(1, f"{VAL[0]}.jpg")
    write_json(world, "val", instances(TRAIN))
    run_program(COCO, world).assert_failed(1, "images of train")


def test_programs_train_on_the_result(world, one_thread):
    run_program(COCO, world).check()
    data = "--voc12_root OUT --classes OUT/classes.txt --num_workers 0 --device cpu"
    train = "--weights none --batch_size 2 --lr 0.01 --train_list OUT/train.txt --crop_size 48"
    cls = f"train_cls --network network.tiny_cls {data} {train} --label_file OUT/cls_labels.npy "
    cls += "--max_epoches 1 --val_list OUT/val.txt --resize_long 40 56 --val_crop_size 48"
    result = run_program(cls, world).check()
    assert "4 from OUT/cls_labels.npy, 0 from annotations, 1 of no class" in result.out
    seg = f"train_seg --network network.tiny_seg {data} {train} --max_iters 1"
    run_program(f"{seg} --label_dir OUT/SegmentationClass", world).check()
