"""The report's page and sheet: numbers are counted a second time, the page runs in Chromium."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
from helpers import noise_image, run_program, write_image, write_mask
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tool.labels import VOID, voc_palette
from tool.maps import save_index_png, save_maps
from tool.run.errors import DataError
from voc12.evaluate import SWEEPS
from voc12.report import data, pictures

CLASSES = ["crack", '<script>alert("1")</script>', "$rust$ & moss", "nowhere"]
LABELS = ["background", *CLASSES]
IDS = ["a", "b", "<i>'c'&amp;", 'd"d', "unmasked"]
SIZE = HEIGHT, WIDTH = 20, 28  # neither fills its cells of 8 pixels
REPORT = "voc12.report --voc12_root VOC --list list.txt --classes classes.txt"
STAGES = "--cam cam --la la --ha ha --rw rw"
PREDICTIONS = ["CAM", "confident labels", "random walk"]


class World:
    """A devkit of five images with random labels and maps, kept here to count with."""

    def __init__(self, root, rng):
        self.root = root
        (root / "classes.txt").write_text("\n".join(CLASSES))
        (root / "list.txt").write_text("\n".join([*IDS, "a"]))  # an image counts once
        self.masks, self.cams, self.labels, self.iou = {}, {}, {}, {}
        for seed, image_id in enumerate(IDS):
            write_image(root / "VOC", image_id, noise_image(HEIGHT, WIDTH, seed))
            present = [1, 2] if image_id == "b" else [1, 2, 3]
            truth = blocks(rng, [0, 0, *present], side=8)
            if image_id != "unmasked":
                self.masks[image_id] = np.where(blocks(rng, [0, 0, 0, 1]) == 1, VOID, truth)
                write_mask(root / "VOC", image_id, self.masks[image_id])
            self.cams[image_id] = {
                k - 1: rng.random(SIZE, np.float32) * (0.3 + 0.7 * (truth == k))
                for k in (present if seed else [])  # the first image has no CAM
            }
            save_maps(root / "cam" / f"{image_id}.npy", self.cams[image_id])
            confident = blocks(rng, [0, 2, VOID], side=8)
            for folder, void in (("la", 0), ("ha", 2)):  # both alphas agree, or the cell is void
                winner = np.where(confident == VOID, void, confident)
                scores = {k: (winner == k).astype(np.float32) for k in (0, 2)}
                save_maps(root / folder / f"{image_id}.npy", scores)
            confident[16:], confident[:, 24:] = VOID, VOID
            walked = np.where(blocks(rng, [0, 1]) == 1, truth, seed % 3)
            save_index_png(root / "rw" / f"{image_id}.png", walked.astype(np.uint8))
            labels = self.cam_label(image_id), confident, walked
            self.labels[image_id] = dict(zip(PREDICTIONS, labels, strict=True))
            mask = self.masks.get(image_id, np.full(SIZE, VOID))
            self.iou[image_id] = [iou for iou, _, _ in iou_precision_recall(mask, walked)]

    def cam_label(self, image_id, bg=0.2, alpha=None):
        maps = np.stack([np.zeros(SIZE, np.float32), *self.cams[image_id].values()])
        maps[0] = bg if alpha is None else (1 - maps.max(axis=0)) ** alpha
        return np.array([0, *(k + 1 for k in self.cams[image_id])])[maps.argmax(axis=0)]

    def figures(self, predict):
        """What the tables show of a prediction, counted label by label over the masked images."""
        truth = np.concatenate([mask.ravel() for mask in self.masks.values()])
        label = np.concatenate([predict(image_id).ravel() for image_id in self.masks])
        per_label = iou_precision_recall(truth, label)
        both = (truth != VOID) & (label != VOID)
        labelled = both.sum() / np.count_nonzero(truth != VOID)
        truth, label = truth[both], label[both]
        missed, too_much = (label == 0) & (truth != 0), (label != 0) & (truth == 0)
        union = np.count_nonzero((truth == 0) | (label == 0))
        figures = [np.mean(truth == label), missed.sum() / union, too_much.sum() / union, labelled]
        miou = np.nanmean([iou for iou, _, _ in per_label])
        return [miou, *(100 * figure for figure in figures)], per_label


def blocks(rng, values, side=4):
    """Squares of a value each, H x W."""
    coarse = rng.choice(values, (-(-HEIGHT // side), -(-WIDTH // side)))
    return coarse.repeat(side, 0).repeat(side, 1)[:HEIGHT, :WIDTH]


def iou_precision_recall(truth, label):
    """Of each label, in per cent of the pixels that both label; NaN for nothing to divide by."""
    both = (truth != VOID) & (label != VOID)
    rows = []
    for k in range(len(LABELS)):
        true, predicted = both & (truth == k), both & (label == k)
        right = 100 * np.count_nonzero(true & predicted)
        wholes = [whole.sum() for whole in (true | predicted, predicted, true)]
        rows.append([right / whole if whole else math.nan for whole in wholes])
    return rows


def text_of(values):
    return ["-" if math.isnan(value) else f"{value:.1f}" for value in values]


class Page(HTMLParser):
    """What a page shows: tables, cards, and every element with its attributes."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements, self.tables, self.cards, self.options = [], [], [], []
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "article":
            self.cards.append({**attributes, "chips": {}, "panels": {}})
        elif tag == "li" and "data-label" in attributes:
            self.cards[-1]["chips"][int(attributes["data-label"])] = float(attributes["data-iou"])
        elif tag == "img" and self.cards:
            title = attributes["alt"].removeprefix(f"{self.cards[-1]['data-id']}: ")
            self.cards[-1]["panels"][title] = attributes["src"]

    def handle_data(self, words):
        tag = self.elements[-1][0] if self.elements else ""
        if words.strip() and tag in ("th", "td"):
            self.tables[-1][-1].append(words)
        elif words.strip() and tag == "option":
            self.options.append(words)

    def table(self, number):
        """A table's rows by their titles."""
        return {title: cells for title, *cells in self.tables[number][1:]}


def make_page(root, flags, out="out/report.html"):
    run_program(f"{REPORT} {flags} --out {out}", root).check()
    return Page(root / out)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), np.random.default_rng(3))


@pytest.fixture(scope="module")
def page(world):
    return make_page(world.root, STAGES)


def decode(uri):
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(";base64,")[2]))) as image:
        return np.asarray(image.convert("RGBA")).astype(np.int64)


def test_tables_are_what_counting_gives(world, page):
    counted = []
    for name in PREDICTIONS:
        row, per_label = world.figures(lambda image_id, name=name: world.labels[image_id][name])
        assert page.table(0)[name] == text_of(row)
        counted.append(per_label)
    assert list(page.table(1)) == LABELS[:4]  # "nowhere" is nowhere
    for label, cells in enumerate(page.table(1).values()):
        iou = [per_label[label][0] for per_label in counted]
        assert cells == text_of([*iou, *counted[-1][label][1:]])


@pytest.mark.parametrize(("flag", "name"), [("bg", "background score"), ("alpha", "alpha")])
def test_best_thresholds_are_those_of_scoring_one_by_one(flag, name, world, page):
    def score(value):
        return world.figures(lambda image_id: world.cam_label(image_id, **{flag: value}))[0]

    best = max(SWEEPS[flag], key=lambda value: score(value)[0])
    assert page.table(0)[f"CAM, best {name}: {best:g}"] == text_of(score(best))


def test_cards_are_sorted_scored_and_counted(world, page):
    ranked = sorted(world.masks, key=lambda image_id: np.nanmean(world.iou[image_id]))
    assert [card["data-id"] for card in page.cards] == [*ranked, "unmasked"]
    for card in page.cards:
        image_id = card["data-id"]
        iou, mask = world.iou[image_id], world.masks.get(image_id, np.full(SIZE, VOID))
        mean = np.nanmean(iou) if image_id in world.masks else math.nan
        assert float(card["data-iou"]) == pytest.approx(mean, nan_ok=True)
        shown = [mask, *(world.labels[image_id][name] for name in PREDICTIONS[1:])]
        labels = {k + 1 for k in world.cams[image_id]}.union(*map(np.unique, shown)) - {0, VOID}
        assert list(card["chips"]) == sorted(labels)
        np.testing.assert_allclose([*card["chips"].values()], np.array(iou)[[*card["chips"]]])
    labels = [label for card in page.cards for label in card["chips"]]
    counted = [f"{LABELS[k]} ({labels.count(k)})" for k in (1, 2, 3)]
    assert page.options == ["all", *counted, "worst first", "best first", "by name"]


def test_pictures_show_the_files(world, page):
    palette = np.array(voc_palette()).reshape(-1, 3)
    for card in page.cards:
        image_id, panels = card["data-id"], dict(card["panels"])
        labels = {name: world.labels[image_id][name] for name in PREDICTIONS[1:]}
        if image_id in world.masks:
            labels["mask"] = world.masks[image_id]
            panels.pop("differences")
        assert list(panels) == [*(f"CAM of {CLASSES[k]}" for k in world.cams[image_id]), *labels]
        for title, label in labels.items():
            pixels = decode(panels[title])
            shown = (label != 0) & (label != VOID)
            np.testing.assert_array_equal(pixels[shown][:, :3], palette[label[shown]])
            assert (pixels[label == 0][:, 3] == 0).all()  # background is the photograph
            assert (pixels[label == VOID] == [0, 0, 0, 255]).all()
        for k, values in world.cams[image_id].items():
            opacity = decode(panels[f"CAM of {CLASSES[k]}"])[..., 3]
            np.testing.assert_allclose(opacity / opacity.max(), values / values.max(), atol=0.02)
        uri = re.search(r"url\((data:image/jpeg.*?)\)", card["style"]).group(1)
        assert decode(uri).shape == (HEIGHT, WIDTH, 4)


def test_names_are_text_and_nothing_is_fetched(page):
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert not {"i", "b"} & {*tags}
    addresses = re.findall(r"""(?:src|href)=['"]?([^'" >]*)|url\((.*?)\)""", page.html)
    assert all(uri.startswith(("data:image/", "#")) for uri in map("".join, addresses))
    assert "default-src 'none'" in page.html
    assert not re.search("https?://", page.html)


def test_folders_that_are_not_named_are_left_out(world):
    page = make_page(world.root, "--rw rw --images 2", "rw.html")
    assert list(page.table(0)) == ["random walk"]
    assert list(page.cards[0]["panels"]) == ["random walk", "mask", "differences"]
    means = {image_id: np.nanmean(world.iou[image_id]) for image_id in world.masks}
    worst_and_best = [min(means, key=means.get), max(means, key=means.get)]
    assert [card["data-id"] for card in page.cards] == worst_and_best
    page = make_page(world.root, "--cam cam", "cam.html")
    assert list(page.cards[0]["panels"])[-3:] == ["CAM", "mask", "differences"]


@pytest.mark.parametrize("void", [False, True])
def test_without_labelled_pixels_there_are_no_scores(void, world, tmp_path):
    shutil.copytree(world.root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "VOC" / "SegmentationClass")
    for image_id in IDS if void else ():
        write_mask(tmp_path / "VOC", image_id, np.full(SIZE, VOID))
    page = make_page(tmp_path, f"{STAGES} --images 3")
    assert page.tables == []
    assert [card["data-id"] for card in page.cards] == [IDS[0], IDS[2], IDS[4]]
    assert "worst first" not in page.options


@given(
    st.lists(st.floats(0, 100) | st.just(math.nan), min_size=1, max_size=40, unique_by=repr),
    st.integers(1, 45),
)
def test_the_worst_and_the_best_are_chosen(scores, count):
    chosen = data.choose(dict(enumerate(scores)), count)
    assert len(chosen) == len(set(chosen)) == min(count, len(scores))
    ranked = sorted(enumerate(scores), key=lambda item: (math.isnan(item[1]), item[1]))
    assert chosen == [i for i, _ in ranked if i in chosen]
    scored = [i for i, value in ranked if not math.isnan(value)]
    ends = min(count, len(scored)) // 3
    assert {*scored[:ends], *scored[len(scored) - ends :]} <= set(chosen)


def test_differences_by_hand():
    mask = np.array([[0, 0, 1, 1, 1, VOID, 1]])
    prediction = np.array([[0, 2, 1, 0, 2, 1, VOID]])
    kinds = np.asarray(pictures.difference_layer(mask, prediction))[0].tolist()
    assert list(pictures.DIFFERENCES) == ["right", "missed", "too much", "wrong class"]
    assert kinds == [0, 3, 1, 2, 4, VOID, VOID]


LOG = "step,epoch,lr,loss,bg,val_loss,images_per_second\n"


def test_the_losses_of_a_log_are_read_and_drawn(world):
    rows = "10,1,0.1,2,0.5,,9\n20,1,0.1,1,0.25,3,9\n30,1,0.1,nan"
    (world.root / "aff.csv").write_text(LOG + rows)
    losses = data.read_log(world.root / "aff.csv")
    assert {name: points.tolist() for name, points in losses.items()} == {
        "loss": [[10, 2], [20, 1]],  # what is not finite is not drawn
        "bg": [[10, 0.5], [20, 0.25]],
        "val_loss": [[20, 3]],
    }
    assert 'alt="losses of aff.csv"' in make_page(world.root, "--log aff.csv", "log.html").html


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,2", "step,epoch,lr\n1,1,0.1", LOG, f"{LOG}1,1,0.1,high,1,,3", f"{LOG}last,1,0.1,1"],
)
def test_what_is_no_log_is_refused(text, world):
    (world.root / "no.csv").write_text(text)
    with pytest.raises(DataError, match=r"no\.csv: .*loss"):
        data.read_log(world.root / "no.csv")


@pytest.mark.parametrize(
    ("flags", "rows", "columns"),
    [("", 5, 2), ("--images 2 --rw rw", 2, 3), (f"--images 9 {STAGES}", 5, 5)],
)
def test_a_sheet_has_a_panel_for_each_image_and_folder(flags, rows, columns, world):
    run_program(f"{REPORT} {flags} --out sheet.png", world.root).check()
    with Image.open(world.root / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    panels = [panel for row in np.split(pixels, rows) for panel in np.split(row, columns, axis=1)]
    drawn = [panel[20:-20, 20:-20].std() > 3 for panel in panels]
    assert drawn.count(False) == 1  # the last image has no mask


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"
# What is pressed, and which of the cards that are shown it leads to.
KEYS = ["ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home", "/"]
PLACES = 0, 1, 2, 1, -1, -1, 0
LOOKS = f"""<script>
const looks = [];
const drawn = () => cards.filter((card) => card.offsetHeight).map((card) => card.dataset.id);
for (const label of ["", "1", "2", "3"]) for (const order of get("order").options) {{
  get("class").value = label;
  get("order").value = order.value;
  get("order").dispatchEvent(new Event("change", {{ bubbles: true }}));
  looks.push([drawn(), get("count").textContent]);
}}
shown()[0].focus();
for (const key of {KEYS}) {{
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }}));
  looks.push(document.activeElement.dataset.id ?? document.activeElement.id);
}}
document.body.textContent = JSON.stringify(looks);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_cards_are_filtered_sorted_and_reached_by_keys(page, tmp_path):
    (tmp_path / "page.html").write_text(page.html + LOOKS)
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path}/profile", "page.html"]
    dom = subprocess.check_output(command, text=True, timeout=60, cwd=tmp_path)
    looks = json.loads(html.unescape(re.search(r"<body>(.*?)</body>", dom, re.DOTALL)[1]))
    scores = {
        card["data-id"]: {"": float(card["data-iou"]), **card["chips"]} for card in page.cards
    }
    for label, order in product(("", 1, 2, 3), ("worst", "best", "name")):
        shown, count = looks.pop(0)
        assert {*shown} == {image_id for image_id in scores if label in scores[image_id]}
        assert count == f"{len(shown)} of 5 images"
        iou = [scores[image_id][label] for image_id in shown]
        if order != "name":  # the worst or the best first, those without a score last
            sign = 1 if order == "worst" else -1
            assert iou == sorted(iou, key=lambda value: (math.isnan(value), sign * value))
    assert 2 < len(shown) < 5  # keys pass over the cards that are hidden
    assert looks == [*(shown[place] for place in PLACES), "class"]
