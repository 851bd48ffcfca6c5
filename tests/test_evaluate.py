"""Scores of predictions, maps and sweeps: counted by hand, class by class and one by one."""

import csv
import json

import numpy as np
import pytest
from helpers import noise_image, run_program, write_image, write_mask
from PIL import Image

from tool.crf import dense_crf
from tool.maps import save_maps
from tool.metrics import confusion_matrix, mean_iou
from voc12.devkit import Devkit
from voc12.evaluate import SWEEPS, Scorer, sweep, winning_score

pytestmark = pytest.mark.usefixtures("one_thread")  # faster for images this small
EVALUATE = "voc12.evaluate --voc12_root VOC --list list.txt --classes classes.txt --num_workers 0"
CLASSES = ("crack", "rust", "moss")

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
IOU = {"background": 50.0, "crack": 40.0, "rust": 100 / 3, "moss": None}
MIOU = (50.0 + 40.0 + 100 / 3) / 3
PRECISION = {"background": 60.0, "crack": 50.0, "rust": 100.0, "moss": None}  # of 5, 4, 1 predicted
RECALL = {"background": 75.0, "crack": 200 / 3, "rust": 100 / 3, "moss": None}  # of 4, 3, 3 true


@pytest.fixture
def world(tmp_path):
    """Two masks and predictions, and maps of image a (class 0) and of b, which has no object."""
    (tmp_path / "VOC" / "JPEGImages").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "list.txt").write_text("/JPEGImages/a.jpg /X/a.png\n/JPEGImages/b.jpg /X/b.png\n")
    for image_id in MASKS:
        write_mask(tmp_path / "VOC", image_id, MASKS[image_id])
        write_mask(tmp_path, image_id, PREDICTIONS[image_id], "pred")
    scores = np.array([[0.1, 0.25, 0.45, 1.0], [0.0, 0.15, 0.6, 1.0]])
    save_maps(tmp_path / "cam" / "a.npy", {0: scores})
    save_maps(tmp_path / "cam" / "b.npy", {})
    return tmp_path


def figures(world, command):
    run_program(f"{EVALUATE} {command} --json figures.json", world).check()
    return json.loads((world / "figures.json").read_text())


def test_predictions_are_counted_as_by_hand(world):
    out = run_program(f"{EVALUATE} --pred pred --json figures.json", world).check().out
    result = json.loads((world / "figures.json").read_text())
    assert result["per_class"] == pytest.approx(IOU)
    assert result["precision"] == pytest.approx(PRECISION)
    assert result["recall"] == pytest.approx(RECALL)
    assert result["miou"] == pytest.approx(MIOU)
    assert result["pixel_accuracy"] == pytest.approx(100 * 6 / 10)
    assert (result["images"], result["missing"]) == (2, 0)
    assert result["background"] == pytest.approx(
        {
            "false_positives": 2,  # a pixel of crack and one of rust
            "false_negatives": 1,
            "false_positives_percent": 100 * 2 / 6,
            "false_negatives_percent": 100 * 1 / 6,
        }
    )
    rows = [line.split() for line in out.splitlines()]
    assert ["background", "50.0", "60.0", "75.0"] in rows
    assert ["rust", "33.3", "100.0", "33.3"] in rows
    assert ["moss", "-", "-", "-"] in rows
    assert ["pixel", "accuracy", "60.0"] in rows
    assert "33.3 % false positives" in out
    assert rows[-1] == ["mIoU", f"{MIOU:.1f}", "over", "2", "images"]


def test_masks_of_another_folder_repeated_ids_gray_images_and_workers_change_nothing(world):
    expected = figures(world, "--pred pred")
    (world / "VOC" / "SegmentationClass").rename(world / "masks")
    (world / "list.txt").write_text("a\nb\na\na\n")
    for image_id, label in PREDICTIONS.items():
        Image.fromarray(np.array(label, np.uint8)).save(world / "pred" / f"{image_id}.png")
    assert figures(world, "--pred pred --gt masks --num_workers 3") == expected


def test_missing_predictions_are_counted_with_allow_missing(world):
    (world / "pred" / "a.png").unlink()
    result = figures(world, "--pred pred --allow_missing")
    assert (result["images"], result["missing"]) == (1, 1)
    assert result["per_class"]["rust"] == pytest.approx(100 / 3)
    assert "1 missing" in run_program(f"{EVALUATE} --pred pred --allow_missing", world).out


# Maps


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
def test_maps_win_against_the_background_score(flags, correct, wrong, world):
    (world / "list.txt").write_text("a\n")
    result = figures(world, f"--cam cam {flags}")
    assert result["per_class"]["crack"] == pytest.approx(100 * correct / (3 + wrong))


@pytest.mark.parametrize("kind", ["bg", "alpha"])
def test_an_image_without_maps_is_background_at_every_threshold(kind, world):
    write_mask(world / "VOC", "b", np.zeros((3, 5)))
    (world / "list.txt").write_text("b\n")
    assert figures(world, f"--cam cam --{kind} 0.2")["per_class"]["background"] == 100
    points = figures(world, f"--cam cam --sweep {kind}")["points"]
    assert {point["miou"] for point in points} == {100}


@pytest.mark.parametrize("flags", ["", "--alpha 4"])
def test_crf_refines_the_maps_and_their_background(flags, world, rng):
    size = (12, 16)
    image = noise_image(*size, seed=3)
    write_image(world / "VOC", "a", image)
    mask = rng.choice([0, 1, 3, 255], size).astype(np.uint8)
    write_mask(world / "VOC", "a", mask)
    maps = rng.random((2, *size), np.float32)
    save_maps(world / "cam" / "a.npy", {0: maps[0], 2: maps[1]})
    (world / "list.txt").write_text("a\n")

    background = np.full(size, 0.2) if flags == "" else (1 - maps.max(axis=0)) ** 4
    scores = np.concatenate([background[None], maps]).astype(np.float32)
    (probabilities,) = dense_crf(np.array(image), [scores])
    label = np.array([0, 1, 3], np.uint8)[probabilities.argmax(axis=0)]
    expected = 100 * mean_iou(confusion_matrix(mask, label, 4))
    assert figures(world, f"--cam cam --crf {flags}")["miou"] == pytest.approx(expected)
    assert figures(world, f"--cam cam {flags}")["miou"] != pytest.approx(expected)


# Sweeps


def awkward_maps(rng, kind):
    """Scores that equal a threshold or lie a few float32 steps beside one; equal classes."""
    switches = [winning_score(kind, value) for value in SWEEPS[kind]]
    if kind == "bg":
        switches += SWEEPS[kind]
    bits = np.array(switches, np.float32).view(np.int32)[:, None] + np.arange(-40, 41)
    near = bits.clip(0).astype(np.int32).ravel().view(np.float32)
    scores = np.concatenate([near, [0, 1], rng.random(500)]).astype(np.float32).clip(0, 1)
    scores = scores[: len(scores) // 4 * 4].reshape(4, -1)
    other = rng.permuted(scores, axis=1)
    other[0] = scores[0]
    return {0: scores, 2: other}


@pytest.mark.parametrize("kind", ["bg", "alpha"])
def test_a_sweep_equals_the_plain_evaluation_at_each_threshold(kind, world, rng):
    awkward = awkward_maps(rng, kind)
    size = awkward[0].shape
    ids = ["awkward", "random", "without"]
    for image_id, maps in zip(ids, (awkward, {1: rng.random(size) ** 2}, {}), strict=True):
        save_maps(world / "cam" / f"{image_id}.npy", maps)
        write_mask(world / "VOC", image_id, rng.choice([0, 1, 2, 3, 255], size))
    devkit = Devkit(world / "VOC", CLASSES)
    scorer = Scorer(devkit, world / "VOC" / "SegmentationClass", world / "cam")
    confusions = sweep(scorer, ids, kind, num_workers=0)
    for value, confusion in zip(SWEEPS[kind], confusions, strict=True):
        expected = sum(scorer.count_maps(image_id, kind, value) for image_id in ids)
        assert np.array_equal(confusion, expected), value
    assert len({confusion.tobytes() for confusion in confusions}) == len(SWEEPS[kind])


def test_the_thresholds_of_the_sweeps():
    assert SWEEPS["bg"] == tuple(float(f"{0.01 * step:.2f}") for step in range(61))
    assert SWEEPS["alpha"] == tuple(range(1, 65))


@pytest.mark.parametrize("kind", ["bg", "alpha"])
def test_a_sweep_as_table_json_csv_and_plot(kind, world):
    files = "--json out/s.json --csv out/s.csv --plot out/s.png"
    out = run_program(f"{EVALUATE} --cam cam --sweep {kind} {files}", world).check().out
    result = json.loads((world / "out" / "s.json").read_text())
    assert (result["sweep"], result["images"], result["missing"]) == (kind, 2, 0)
    assert [point[kind] for point in result["points"]] == list(SWEEPS[kind])
    mious = [point["miou"] for point in result["points"]]
    best = SWEEPS[kind][mious.index(max(mious))]  # the first of the best
    assert len(set(mious)) > 1
    plain = figures(world, f"--cam cam --{kind} {best}")
    assert result["best"] == {kind: best, **plain}
    assert plain["miou"] == max(mious)

    with open(world / "out" / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row[kind]) for row in rows] == list(SWEEPS[kind])
    assert [float(row["miou"]) for row in rows] == mious
    assert [float(row[kind]) for row in rows if row["best"] == "1"] == [best]
    for row, point in zip(rows, result["points"], strict=True):
        expected = {name: "" if v is None else str(v) for name, v in point["per_class"].items()}
        assert {name: row[name] for name in expected} == expected

    (marked,) = [line.split() for line in out.splitlines() if "best" in line]
    assert marked[:2] == [f"{best:g}", f"{max(mious):.2f}"]
    with Image.open(world / "out" / "s.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
