"""Scores of predictions and of maps: counted by hand, by torchmetrics, and one by one."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import noise_image, run_program, write_image, write_mask
from PIL import Image, ImageFilter

from tool.crf import dense_crf
from tool.maps import load_index_png, load_maps, save_index_png, save_maps
from voc12.devkit import VOC_CLASSES, Devkit, read_ids
from voc12.evaluate import SWEEPS, Background, Scorer, sweep, total_counts, winning_score

EVALUATE = "voc12.evaluate --voc12_root VOC --list list.txt --classes classes.txt --num_workers 0"

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
PRECISION = {"background": 60.0, "crack": 50.0, "rust": 100.0}  # of 5, 4 and 1 predicted pixels
RECALL = {"background": 75.0, "crack": 200 / 3, "rust": 100 / 3}  # of 4, 3 and 3 true pixels


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
    assert result["images"] == 2
    assert result["missing"] == 0
    assert list(result["per_class"]) == ["background", "crack", "rust", "moss"]
    for name, value in IOU.items():
        assert result["per_class"][name] == pytest.approx(value)
        assert result["precision"][name] == pytest.approx(PRECISION[name])
        assert result["recall"][name] == pytest.approx(RECALL[name])
    for column in ("per_class", "precision", "recall"):
        assert result[column]["moss"] is None  # in no mask and, void apart, in no prediction
    assert result["miou"] == pytest.approx(MIOU)
    assert result["pixel_accuracy"] == pytest.approx(100 * 6 / 10)
    background = result["background"]
    assert background["false_positives"] == 2  # a pixel of crack and one of rust
    assert background["false_negatives"] == 1
    assert background["false_positives_percent"] == pytest.approx(100 * 2 / 6)
    assert background["false_negatives_percent"] == pytest.approx(100 * 1 / 6)


def test_the_table_says_the_same(world):
    out = run_program(f"{EVALUATE} --pred pred", world).check().out
    rows = [line.split() for line in out.splitlines()]
    assert ["background", "50.0", "60.0", "75.0"] in rows
    assert ["rust", "33.3", "100.0", "33.3"] in rows
    assert ["moss", "-", "-", "-"] in rows
    assert ["pixel", "accuracy", "60.0"] in rows
    assert "33.3 % false positives" in out
    assert rows[-1] == ["mIoU", f"{MIOU:.1f}", "over", "2", "images"]


def test_masks_of_another_folder(world):
    masks = world / "VOC" / "SegmentationClass"
    expected = figures(world, "--pred pred")
    masks.rename(world / "masks")
    assert figures(world, "--pred pred --gt masks") == expected


def test_missing_predictions_are_counted_where_they_are_allowed(world):
    (world / "pred" / "a.png").unlink()
    result = figures(world, "--pred pred --allow_missing")
    assert (result["images"], result["missing"]) == (1, 1)
    assert result["per_class"]["rust"] == pytest.approx(100 / 3)
    assert "1 missing" in run_program(f"{EVALUATE} --pred pred --allow_missing", world).out


def test_the_number_of_processes_does_not_matter(world):
    alone = figures(world, "--pred pred")
    assert figures(world, "--pred pred --num_workers 3") == alone


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


# Recounted


def random_pairs(rng):
    """Masks and predictions of 4 labels: void, absent labels and images without objects."""
    masks = [rng.choice([0, 1, 2, 3, 255], (17, 23)), rng.choice([0, 2, 255], (5, 40))]
    masks += [np.zeros((9, 9)), np.full((3, 4), 255), np.full((6, 2), 3)]
    predictions = [rng.integers(0, 4, mask.shape) for mask in masks]
    predictions[2][:] = 0
    return [mask.astype(np.uint8) for mask in masks], [p.astype(np.uint8) for p in predictions]


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4), (1,), (2,), (4, 3)])
def test_figures_are_those_of_torchmetrics(chosen, world, rng):
    reference = pytest.importorskip("torchmetrics.functional.classification")
    pairs = [[images[index] for index in chosen] for images in random_pairs(rng)]
    ids = [str(index) for index in chosen]
    for image_id, mask, prediction in zip(ids, *pairs, strict=True):
        write_mask(world / "VOC", image_id, mask)
        save_index_png(world / "pred" / f"{image_id}.png", prediction)
    (world / "list.txt").write_text("\n".join(ids))
    truth, prediction = (
        torch.from_numpy(np.concatenate([image.ravel() for image in images])).long()
        for images in pairs
    )
    flags = {"num_classes": 4, "ignore_index": 255}

    devkit = Devkit(world / "VOC", ("crack", "rust", "moss"))
    scorer = Scorer(devkit, world / "VOC" / "SegmentationClass", world / "pred")
    confusion = reference.multiclass_confusion_matrix(prediction, truth, **flags)
    assert total_counts(ids, scorer.count_labels, 0).tolist() == confusion.tolist()

    result = figures(world, "--pred pred")
    for column, function in (
        ("per_class", reference.multiclass_jaccard_index),
        ("precision", reference.multiclass_precision),
        ("recall", reference.multiclass_recall),
    ):
        theirs = function(prediction, truth, average=None, **flags).tolist()
        for value, expected in zip(result[column].values(), theirs, strict=True):
            # Where nothing is divided by nothing, theirs is 0.
            assert (0 if value is None else value) == pytest.approx(100 * expected)
    accuracy = reference.multiclass_accuracy(prediction, truth, average="micro", **flags)
    assert result["pixel_accuracy"] == pytest.approx(100 * accuracy.item())


@pytest.fixture
def real_maps(voc_mini, tmp_path):
    """Maps and predictions of ten photographs, made of their masks, eroded and blurred."""
    ids = read_ids(voc_mini / "ImageSets" / "Segmentation" / "val.txt")[::10]
    (tmp_path / "list.txt").write_text("\n".join(ids))
    for image_id in ids:
        mask = load_index_png(voc_mini / "SegmentationClass" / f"{image_id}.png")
        maps = {}
        for label in sorted(set(np.unique(mask)) - {0, 255}):
            inside = Image.fromarray(np.where(mask == label, 255, 0).astype(np.uint8))
            inside = inside.filter(ImageFilter.MinFilter(9)).filter(ImageFilter.GaussianBlur(12))
            blurred = np.asarray(inside, np.float32)
            maps[int(label) - 1] = blurred / (blurred.max() + 1e-5)
        save_maps(tmp_path / "cam" / f"{image_id}.npy", maps)
        eroded = Image.fromarray(np.where(mask == 255, 0, mask)).filter(ImageFilter.MinFilter(5))
        eroded.save(tmp_path / f"{image_id}.png")
    return tmp_path


def naive_figures(masks, labels, num_labels):
    """IoU of each label by counting it alone, and their mean over those that occur."""
    ious = []
    for label in range(num_labels):
        both = either = 0
        for mask, predicted in zip(masks, labels, strict=True):
            true, given = mask == label, (predicted == label) & (mask != 255)
            both, either = both + np.sum(true & given), either + np.sum(true | given)
        ious.append(100 * both / either if either else None)
    return ious, float(np.mean([iou for iou in ious if iou is not None]))


def naive_labels(maps, score):
    """Each pixel's class of the largest map, where that is above the score."""
    labels = []
    for image in maps:
        largest = np.full(next(iter(image.values())).shape, score, np.float32)
        label = np.zeros(largest.shape, np.uint8)
        for index, values in image.items():
            label[values > largest] = index + 1
            largest = np.maximum(values, largest)
        labels.append(label)
    return labels


def test_figures_of_real_masks(voc_mini, real_maps):
    ids = read_ids(real_maps / "list.txt")
    masks = [np.array(Image.open(voc_mini / "SegmentationClass" / f"{i}.png")) for i in ids]
    maps = [load_maps(real_maps / "cam" / f"{i}.npy") for i in ids]
    eroded = [np.array(Image.open(real_maps / f"{i}.png")) for i in ids]

    def evaluated(flags):
        command = f"voc12.evaluate --voc12_root {voc_mini} --list list.txt --json out.json {flags}"
        run_program(command, real_maps).check()
        return json.loads((real_maps / "out.json").read_text())

    for flags, labels in (
        ("--pred .", eroded),
        ("--cam cam", naive_labels(maps, 0.2)),
        ("--cam cam --bg 0.37", naive_labels(maps, 0.37)),
    ):
        result = evaluated(flags)
        ious, miou = naive_figures(masks, labels, len(VOC_CLASSES) + 1)
        assert list(result["per_class"].values()) == pytest.approx(ious)
        assert result["miou"] == pytest.approx(miou)
        assert 20 < miou < 100

    points = evaluated("--cam cam --sweep bg")["points"]
    for step in (0, 20, 37, 60):
        labels = naive_labels(maps, step / 100)
        _, miou = naive_figures(masks, labels, len(VOC_CLASSES) + 1)
        assert points[step]["miou"] == pytest.approx(miou)


# Sweeps


def awkward_maps(rng, kind):
    """Scores that tie with a threshold or lie a rounding's breadth beside one; classes that tie."""
    switches = [winning_score(Background(kind, value)) for value in SWEEPS[kind]]
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
def test_a_sweep_is_the_plain_evaluation_at_each_threshold(kind, world, rng):
    awkward = awkward_maps(rng, kind)
    size = awkward[0].shape
    ids = ["awkward", "random", "without"]
    for image_id, maps in zip(ids, (awkward, {1: rng.random(size) ** 2}, {}), strict=True):
        save_maps(world / "cam" / f"{image_id}.npy", maps)
        write_mask(world / "VOC", image_id, rng.choice([0, 1, 2, 3, 255], size))
    devkit = Devkit(world / "VOC", ("crack", "rust", "moss"))
    scorer = Scorer(devkit, world / "VOC" / "SegmentationClass", world / "cam")
    confusions = sweep(scorer, ids, kind, num_workers=0)
    for value, confusion in zip(SWEEPS[kind], confusions, strict=True):
        plain = sum(scorer.count_maps(i, Background(kind, value), None) for i in ids)
        assert np.array_equal(confusion, plain), value
    assert len({confusion.tobytes() for confusion in confusions}) == len(SWEEPS[kind])


def test_the_thresholds_of_the_sweeps():
    assert SWEEPS["bg"] == tuple(float(f"{0.01 * step:.2f}") for step in range(61))
    assert SWEEPS["alpha"] == tuple(range(1, 65))


@pytest.mark.parametrize("kind", ["bg", "alpha"])
def test_a_sweep_as_table_json_csv_and_picture(kind, maps_world):
    pytest.importorskip("matplotlib")
    files = "--json out/s.json --csv out/s.csv --plot out/s.png"
    out = run_program(f"{EVALUATE} --cam cam --sweep {kind} {files}", maps_world).check().out
    result = json.loads((maps_world / "out" / "s.json").read_text())
    assert (result["sweep"], result["images"], result["missing"]) == (kind, 2, 0)
    assert [point[kind] for point in result["points"]] == list(SWEEPS[kind])
    mious = [point["miou"] for point in result["points"]]
    best = SWEEPS[kind][mious.index(max(mious))]  # the first of the best
    assert len(set(mious)) > 1
    plain = figures(maps_world, f"--cam cam --{kind} {best}")
    assert result["best"] == {kind: best, **plain}
    assert plain["miou"] == max(mious)

    with open(maps_world / "out" / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row[kind]) for row in rows] == list(SWEEPS[kind])
    assert [float(row["miou"]) for row in rows] == mious
    assert [float(row[kind]) for row in rows if row["best"] == "1"] == [best]
    for row, point in zip(rows, result["points"], strict=True):
        expected = {name: "" if v is None else str(v) for name, v in point["per_class"].items()}
        assert {name: row[name] for name in expected} == expected

    (marked,) = [line.split() for line in out.splitlines() if "best" in line]
    assert marked[:2] == [f"{best:g}", f"{max(mious):.2f}"]
    with Image.open(maps_world / "out" / "s.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


@pytest.mark.parametrize("kind", ["bg", "alpha"])
def test_without_maps_everything_is_background_at_every_threshold(kind, maps_world):
    write_mask(maps_world / "VOC", "b", np.zeros((3, 5)))
    (maps_world / "list.txt").write_text("b\n")
    result = figures(maps_world, f"--cam cam --sweep {kind}")
    assert {point["miou"] for point in result["points"]} == {100.0}


# After the dense CRF


@pytest.mark.parametrize(
    ("flags", "background"),
    [
        ("", lambda maps: np.full(maps.shape[1:], 0.2)),
        ("--bg 0.4", lambda maps: np.full(maps.shape[1:], 0.4)),
        ("--alpha 4", lambda maps: (1 - maps.max(axis=0)) ** 4),
    ],
)
def test_maps_after_the_crf(flags, background, maps_world, rng):
    pytest.importorskip("pydensecrf")
    size = (24, 32)
    image = noise_image(*size, seed=3)
    write_image(maps_world / "VOC", "a", image)
    mask = rng.choice([0, 1, 3, 255], size).astype(np.uint8)
    write_mask(maps_world / "VOC", "a", mask)
    maps = rng.random((2, *size), np.float32)
    save_maps(maps_world / "cam" / "a.npy", {0: maps[0], 2: maps[1]})
    (maps_world / "list.txt").write_text("a\n")

    scores = np.concatenate([background(maps)[None], maps]).astype(np.float32)
    (probabilities,) = dense_crf(np.array(image), [scores])
    label = np.array([0, 1, 3], np.uint8)[probabilities.argmax(axis=0)]
    _, expected = naive_figures([mask], [label], 4)
    assert figures(maps_world, f"--cam cam --crf {flags}")["miou"] == pytest.approx(expected)
    assert figures(maps_world, f"--cam cam {flags}")["miou"] != pytest.approx(expected)


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


def raise_maps(world):
    save_maps(world / "cam" / "a.npy", {0: np.full((2, 4), 3)})


def photograph_of_another_size(world):
    write_image(world / "VOC", "a", noise_image(4, 2))


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
        (spoil_nothing, "--pred pred --crf", 2, ("--crf", "--cam")),
        (spoil_nothing, "--pred pred --sweep bg", 2, ("--sweep", "--cam")),
        (spoil_nothing, "--cam cam --sweep bg --bg 0.2", 2, ("--bg", "--sweep")),
        (spoil_nothing, "--cam cam --sweep bg --crf", 2, ("--crf", "--sweep")),
        (spoil_nothing, "--cam cam --sweep gamma", 2, ("--sweep", "gamma")),
        (spoil_nothing, "--cam cam --csv figures.csv", 2, ("--csv", "--sweep")),
        (spoil_nothing, "--cam cam --plot figures.png", 2, ("--plot", "--sweep")),
        (spoil_nothing, "--pred no --allow_missing", 1, ("no/a.png", "2 of 2")),
        (drop_prediction, "--pred pred --gt pred", 1, ("pred/b.png", "1 of 2")),
        (spoil_nothing, "--pred pred --gt no", 1, ("no/a.png", "--gt")),
        (raise_maps, "--cam cam --alpha 4", 1, ("cam/a.npy", "above 1", "--bg")),
        (raise_maps, "--cam cam --sweep alpha", 1, ("cam/a.npy", "above 1", "--bg")),
        (void_everywhere, "--cam cam --sweep alpha", 1, ("list.txt", "nothing to score")),
        (photograph_of_another_size, "--cam cam --crf", 1, ("a: ", "photograph", "size")),
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
