"""Mean IoU of predictions and of maps, on examples small enough to count by hand."""

import json

import numpy as np
import pytest
from helpers import run_program, write_mask
from PIL import Image

from tool.maps import save_index_png, save_maps

EVALUATE = "voc12.evaluate --voc12_root VOC --list list.txt --classes classes.txt"

# Labels 0 background, 1 crack, 2 rust, 3 moss (in neither), 255 void.
MASKS = {
    "a": [[0, 0, 1, 1], [0, 0, 1, 255]],
    "b": [[2, 2], [2, 255]],
}
PREDICTIONS = {
    "a": [[0, 0, 1, 1], [0, 1, 0, 1]],  # the void pixel does not count
    "b": [[2, 0], [1, 3]],
}
# Pixels in common, of either: background 3 of 3 + 1 + 1 + 1, crack 2 of 2 + 1 + 1 + 1, rust 1 of 3.
IOU = {"background": 50.0, "crack": 40.0, "rust": 100 / 3}
MIOU = (50.0 + 40.0 + 100 / 3) / 3


@pytest.fixture
def world(tmp_path):
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("crack\nrust\nmoss\n")
    (tmp_path / "list.txt").write_text("/JPEGImages/a.jpg /X/a.png\n/JPEGImages/b.jpg /X/b.png\n")
    for image_id in MASKS:
        write_mask(tmp_path / "VOC", image_id, MASKS[image_id])
        save_index_png(
            tmp_path / "pred" / f"{image_id}.png", np.array(PREDICTIONS[image_id], np.uint8)
        )
    return tmp_path


def figures(world, command):
    run_program(f"{EVALUATE} {command} --json figures.json", world).check()
    return json.loads((world / "figures.json").read_text())


def test_predictions_counted_by_hand(world):
    result = figures(world, "--pred pred")
    assert result.keys() == {"miou", "images", "per_class"}
    assert result["images"] == 2
    assert list(result["per_class"]) == ["background", "crack", "rust", "moss"]
    for name, value in IOU.items():
        assert result["per_class"][name] == pytest.approx(value)
    assert result["per_class"]["moss"] is None  # in no mask and, void apart, in no prediction
    assert result["miou"] == pytest.approx(MIOU)


def test_the_table_says_the_same(world):
    out = run_program(f"{EVALUATE} --pred pred", world).check().out
    rows = [line.split() for line in out.splitlines()]
    assert ["background", "50.0"] in rows
    assert ["rust", "33.3"] in rows
    assert ["moss", "-"] in rows
    assert rows[-1] == ["mIoU", f"{MIOU:.1f}", "over", "2", "images"]


def test_masks_score_100_against_themselves(world):
    for image_id, mask in MASKS.items():
        save_index_png(world / "self" / f"{image_id}.png", np.array(mask, np.uint8) % 255)
    result = figures(world, "--pred self")
    assert result["miou"] == 100
    assert {result["per_class"][name] for name in IOU} == {100}


def test_an_image_counts_once(world):
    (world / "list.txt").write_text("a\nb\na\na\n")
    result = figures(world, "--pred pred")
    assert result["images"] == 2
    assert result["miou"] == pytest.approx(MIOU)


def test_gray_predictions_are_indices_too(world):
    for image_id, label in PREDICTIONS.items():
        Image.fromarray(np.array(label, np.uint8)).save(world / "pred" / f"{image_id}.png")
    assert figures(world, "--pred pred")["miou"] == pytest.approx(MIOU)


# Maps


@pytest.fixture
def maps_world(world):
    """Maps of image a for class 0 (label 1); image b has no object: no maps."""
    scores = np.array([[0.1, 0.25, 0.45, 1.0], [0.0, 0.15, 0.6, 1.0]])
    save_maps(world / "cam" / "a.npy", {0: scores})
    save_maps(world / "cam" / "b.npy", {})
    return world


@pytest.mark.parametrize(
    ("flags", "correct", "wrong"),
    [
        # Of image a, where the mask is 1: 0.45, 1, 0.6; where it is 0: 0.1, 0.25, 0, 0.15.
        ("", 3, 1),
        ("--bg 0.2", 3, 1),
        ("--bg 0.05", 3, 3),
        ("--bg 0.3", 3, 0),
        ("--bg 0.5", 2, 0),
        # (1 - s) ** alpha: 0.55, 0.75 -> 0.30, 0.56; ** 4 -> 0.09, 0.32
        ("--alpha 1", 2, 0),
        ("--alpha 2", 3, 0),
        ("--alpha 8", 3, 1),
    ],
)
def test_maps_become_labels_by_a_background_score(flags, correct, wrong, maps_world):
    (maps_world / "list.txt").write_text("a\n")
    result = figures(maps_world, f"--cam cam {flags}")
    assert result["per_class"]["crack"] == pytest.approx(100 * correct / (3 + wrong))


def test_maps_of_an_image_without_objects_are_background(maps_world):
    write_mask(maps_world / "VOC", "b", np.zeros((3, 5)))
    (maps_world / "list.txt").write_text("b\n")
    for flags in ("--bg 0.2", "--alpha 16"):
        result = figures(maps_world, f"--cam cam {flags}")
        assert result["per_class"]["background"] == 100
        assert result["images"] == 1


def test_maps_are_keyed_by_class(maps_world):
    save_maps(maps_world / "cam" / "a.npy", {1: np.ones((2, 4)), 2: np.full((2, 4), 0.5)})
    (maps_world / "list.txt").write_text("a\n")
    write_mask(maps_world / "VOC", "a", np.full((2, 4), 2))
    assert figures(maps_world, "--cam cam")["per_class"]["rust"] == 100


# Bad input


def spoil_nothing(world):
    pass


def drop_prediction(world):
    (world / "pred" / "b.png").unlink()


def drop_mask(world):
    (world / "VOC" / "SegmentationClass" / "b.png").unlink()


def turn_prediction(world):
    save_index_png(world / "pred" / "a.png", np.zeros((4, 2), np.uint8))


def predict_unknown(world):
    save_index_png(world / "pred" / "a.png", np.full((2, 4), 4, np.uint8))


def predict_void(world):
    save_index_png(world / "pred" / "a.png", np.full((2, 4), 255, np.uint8))


def mask_unknown(world):
    write_mask(world / "VOC", "b", np.full((2, 2), 7))


def predict_colours(world):
    Image.new("RGB", (4, 2)).save(world / "pred" / "a.png")


def break_prediction(world):
    (world / "pred" / "b.png").write_bytes((world / "pred" / "b.png").read_bytes()[:60])


def void_everywhere(world):
    for image_id, mask in MASKS.items():
        write_mask(world / "VOC", image_id, np.full_like(mask, 255))


def turn_maps(world):
    save_maps(world / "cam" / "b.npy", {0: np.zeros((3, 2))})


def map_unknown(world):
    save_maps(world / "cam" / "b.npy", {3: np.zeros((2, 2))})


def drop_maps(world):
    (world / "cam" / "b.npy").unlink()


def empty_list(world):
    (world / "list.txt").write_text("# nothing\n")


@pytest.mark.parametrize(
    ("spoil", "flags", "code", "words"),
    [
        (drop_prediction, "--pred pred", 1, ("pred/b.png", "no such file")),
        (drop_mask, "--pred pred", 1, ("SegmentationClass/b.png", "no such file")),
        (turn_prediction, "--pred pred", 1, ("a: ", "size", "2 x 4", "4 x 2")),
        (predict_unknown, "--pred pred", 1, ("a: ", "prediction has the label 4", "4 labels")),
        (predict_void, "--pred pred", 1, ("a: ", "prediction has the label 255")),
        (mask_unknown, "--pred pred", 1, ("b: ", "mask has the label 7", "4 labels")),
        (predict_colours, "--pred pred", 1, ("pred/a.png", "mode RGB")),
        (break_prediction, "--pred pred", 1, ("pred/b.png", "not a readable image")),
        (void_everywhere, "--pred pred", 1, ("list.txt", "nothing to score")),
        (empty_list, "--pred pred", 1, ("list.txt", "empty")),
        (turn_maps, "--cam cam", 1, ("cam/b.npy", "size", "2 x 2", "3 x 2")),
        (map_unknown, "--cam cam", 1, ("cam/b.npy", "class 3", "--classes")),
        (drop_maps, "--cam cam", 1, ("cam/b.npy",)),
        (spoil_nothing, "--cam cam --list no.txt", 1, ("no.txt", "voc12.prepare")),
        (spoil_nothing, "--cam cam --voc12_root no", 1, ("no: ", "--voc12_root")),
        (spoil_nothing, "--cam cam --json list.txt/figures.json", 1, ("list.txt",)),
        (spoil_nothing, "", 2, ("--pred", "--cam")),
        (spoil_nothing, "--pred pred --cam cam", 2, ("--cam", "--pred")),
        (spoil_nothing, "--pred pred --bg 0.1", 2, ("--bg",)),
        (spoil_nothing, "--pred pred --alpha 4", 2, ("--alpha",)),
        (spoil_nothing, "--cam cam --bg 0.1 --alpha 4", 2, ("--alpha", "--bg")),
        (spoil_nothing, "--cam cam --bg 1.5", 2, ("--bg", "'1.5'")),
        (spoil_nothing, "--cam cam --bg nan", 2, ("--bg", "'nan'")),
        (spoil_nothing, "--cam cam --alpha 0", 2, ("--alpha", "'0'")),
    ],
)
def test_bad_input(spoil, flags, code, words, maps_world):
    spoil(maps_world)
    run_program(f"{EVALUATE} --json figures.json {flags}", maps_world).assert_failed(code, *words)
    assert not (maps_world / "figures.json").exists()
