"""The picture of what the stages made."""

import numpy as np
import pytest
from helpers import noise_image, run_program, write_image, write_mask
from PIL import Image

from tool.maps import VOID, save_index_png, save_maps
from voc12 import report

HEIGHT, WIDTH = 20, 28  # neither fills its cells of 8 pixels
REPORT = "voc12.report --voc12_root VOC --list list.txt --classes classes.txt --out out/sheet.png"
PANEL = round(report.INCHES * report.DOTS_PER_INCH)


@pytest.fixture
def world(tmp_path):
    (tmp_path / "classes.txt").write_text("crack\nrust\n")
    (tmp_path / "list.txt").write_text("a\nb\nc\n")
    half = np.zeros((HEIGHT, WIDTH))
    half[:, :14] = 0.9
    for seed, image_id in enumerate("abc"):
        write_image(tmp_path / "VOC", image_id, noise_image(HEIGHT, WIDTH, seed))
        write_mask(tmp_path / "VOC", image_id, half > 0)
        save_index_png(tmp_path / "rw" / f"{image_id}.png", (half > 0).astype(np.uint8))
        save_maps(tmp_path / "cam" / f"{image_id}.npy", {1: half} if image_id != "c" else {})
        for folder in ("la", "ha"):
            scores = {0: 1 - half, 2: half} if image_id != "c" else {0: np.ones_like(half)}
            save_maps(tmp_path / folder / f"{image_id}.npy", scores)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "rows", "columns"),
    [
        ("", 3, 2),
        ("--images 2 --rw rw", 2, 3),
        ("--images 1 --cam cam", 1, 3),
        ("--images 9 --cam cam --la la --ha ha --rw rw", 3, 5),
    ],
)
def test_a_panel_for_each_image_and_folder(flags, rows, columns, world):
    pytest.importorskip("matplotlib")
    run_program(f"{REPORT} {flags}", world).check()
    with Image.open(world / "out" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (columns * PANEL, rows * PANEL)
        pixels = np.asarray(sheet.convert("RGB"))
    for row in range(rows):
        for column in range(columns):
            panel = pixels[row * PANEL : (row + 1) * PANEL, column * PANEL : (column + 1) * PANEL]
            assert panel[PANEL // 4 : -PANEL // 4, PANEL // 4 : -PANEL // 4].std() > 3  # drawn


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--la la", 2, ("--la", "--ha")),
        ("--images 0", 2, ("--images",)),
        ("--list no.txt", 1, ("no.txt", "voc12.prepare")),
        ("--cam nowhere", 1, ("nowhere/a.npy",)),
        ("--rw cam", 1, ("cam/a.png", "no such file")),
    ],
)
def test_bad_input(flags, code, words, world):
    pytest.importorskip("matplotlib")
    run_program(f"{REPORT} {flags}", world).assert_failed(code, *words)
    assert not (world / "out").exists()


def test_labels_show_background_as_it_is_and_void_black():
    gray = np.full((1, 3, 3), 0.5)
    painted = report.paint_label(gray, np.array([[0, 1, VOID]], np.uint8))
    assert painted[0, 0].tolist() == [0.5] * 3
    red, green, blue = painted[0, 1]
    assert red > green == blue  # VOC's label 1 is dark red
    assert painted[0, 2].tolist() == [0] * 3


def test_heat_is_strongest_where_the_map_is():
    gray = np.full((1, 3, 3), 0.5)
    painted = report.paint_heat(gray, {0: np.array([[0, 0.5, 1]], np.float32)})
    difference = abs(painted - gray).sum(-1)[0]
    assert difference[0] == 0 < difference[1] < difference[2]
    assert (gray == 0.5).all()


def test_confident_labels_are_those_of_training_on_whole_cells():
    low, high = (np.zeros((3, 20, 17), np.float32) for _ in range(2))
    low[0, :, 8:], low[2, :, :8] = 1, 1  # label 5 left; background, not believed, right
    high[2, :8], high[0, 8:] = 1, 1  # background below the first row of cells
    maps = [dict(zip((0, 3, 5), scores, strict=True)) for scores in (low, high)]
    label = report.confident_label(*maps)
    assert label.shape == (20, 17)
    assert (label[:8, :8] == 5).all()
    assert (label[:8, 8:16] == VOID).all()
    assert (label[8:16, :16] == 0).all()
    assert (label[16:] == VOID).all()
    assert (label[:, 16:] == VOID).all()
