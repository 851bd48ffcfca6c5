"""The report's page and sheet: every number on the page is counted here a second time.

The page is also opened in a headless Chromium, where one is installed.
"""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import noise_image, run_program, write_image, write_mask
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tool.labels import VOID, voc_palette
from tool.maps import save_index_png, save_maps

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from voc12.report import data, pictures

CLASSES = ["crack", '<script>alert("1")</script>', "$rust$ & moss", "nowhere"]
LABELS = ["background", *CLASSES]
IDS = ["a", "b", "<i>'c'&amp;", 'd"d', "unmasked"]
HEIGHT, WIDTH = 20, 28  # neither fills its cells of 8 pixels
REPORT = "voc12.report.__main__ --voc12_root VOC --list list.txt --classes classes.txt"
STAGES = "--cam cam --la la --ha ha --rw rw"
PREDICTIONS = ["CAM", "confident labels", "random walk"]


class World:
    """A devkit of five images with random labels and maps, kept here to count with."""

    def __init__(self, root, rng):
        self.root = root
        (root / "classes.txt").write_text("\n".join(CLASSES))
        (root / "list.txt").write_text("\n".join([*IDS, "a"]))  # an image counts once
        self.masks, self.walks, self.cams, self.scores = {}, {}, {}, {}
        for seed, image_id in enumerate(IDS):
            write_image(root / "VOC", image_id, noise_image(HEIGHT, WIDTH, seed))
            present = [1, 2] if image_id == "b" else [1, 2, 3]
            truth = blocks(rng, [0, 0, *present], side=8)
            if image_id != "unmasked":
                self.masks[image_id] = np.where(blocks(rng, [0, 0, 0, 1]) == 1, VOID, truth)
                write_mask(root / "VOC", image_id, self.masks[image_id])
            self.walks[image_id] = np.where(blocks(rng, [0, 1]) == 1, truth, seed % 3)
            save_index_png(root / "rw" / f"{image_id}.png", self.walks[image_id].astype(np.uint8))
            self.cams[image_id] = {
                k - 1: rng.random((HEIGHT, WIDTH), np.float32) * (0.3 + 0.7 * (truth == k))
                for k in (present if seed else [])  # the first image has no CAM
            }
            save_maps(root / "cam" / f"{image_id}.npy", self.cams[image_id])
            self.scores[image_id] = [crf_scores(rng, truth, alpha) for alpha in (0.4, 0.1)]
            for folder, scores in zip(("la", "ha"), self.scores[image_id], strict=True):
                save_maps(root / folder / f"{image_id}.npy", scores)

    def cam_label(self, image_id, bg=0.2, alpha=None):
        cams = self.cams[image_id]
        best = np.max([np.zeros((HEIGHT, WIDTH)), *cams.values()], axis=0)
        level = np.float32(bg) if alpha is None else (1 - best) ** alpha
        label = np.zeros((HEIGHT, WIDTH), np.int64)
        for k, values in reversed(cams.items()):  # of equals, the first class has it
            label[(values == best) & (values > level)] = k + 1
        return label

    def confident(self, image_id):
        """Each whole cell's label by the rules of training; beyond the cells, none."""
        label = np.full((HEIGHT, WIDTH), VOID)
        for top in range(0, HEIGHT - 7, 8):
            for left in range(0, WIDTH - 7, 8):
                cell = slice(top, top + 8), slice(left, left + 8)
                low, high = (
                    max(maps, key=lambda k, m=maps: m[k][cell].mean())
                    for maps in self.scores[image_id]
                )
                label[cell] = 0 if high == 0 else low if low != 0 else VOID
        return label

    def predictions(self, image_id):
        labels = self.cam_label(image_id), self.confident(image_id), self.walks[image_id]
        return dict(zip(PREDICTIONS, labels, strict=True))

    def figures(self, predict):
        """What the tables show of a prediction, counted label by label over the masked images."""
        truth = np.concatenate([mask.ravel() for mask in self.masks.values()])
        label = np.concatenate([predict(image_id).ravel() for image_id in self.masks])
        both = (truth != VOID) & (label != VOID)
        labelled = both.sum() / np.count_nonzero(truth != VOID)
        truth, label = truth[both], label[both]
        per_label = [iou_precision_recall(truth, label, k) for k in range(len(LABELS))]
        union = np.count_nonzero((truth == 0) | (label == 0))
        row = [
            np.nanmean([iou for iou, _, _ in per_label]),
            100 * np.mean(truth == label),
            100 * np.count_nonzero((label == 0) & (truth != 0)) / union,
            100 * np.count_nonzero((label != 0) & (truth == 0)) / union,
            100 * labelled,
        ]
        return row, per_label

    def image_iou(self, image_id, label):
        """Each label's IoU in one image in per cent."""
        mask = self.masks.get(image_id, np.full((HEIGHT, WIDTH), VOID))
        both = (mask != VOID) & (label != VOID)
        return [iou_precision_recall(mask[both], label[both], k)[0] for k in range(len(LABELS))]


def blocks(rng, values, side=4):
    """Squares of a value each, H x W."""
    coarse = rng.choice(values, (-(-HEIGHT // side), -(-WIDTH // side)))
    return coarse.repeat(side, 0).repeat(side, 1)[:HEIGHT, :WIDTH]


def crf_scores(rng, truth, background):
    strength = rng.random(truth.shape) * 0.1 + blocks(rng, [0.2, 0.8], side=8)
    maps = {k: (truth == k) * strength for k in (0, 1, 2, 3)}
    maps[0] = maps[0] + background
    return {k: (values / sum(maps.values())).astype(np.float32) for k, values in maps.items()}


def iou_precision_recall(truth, label, k):
    """In per cent, NaN where there is nothing to divide by."""
    both = np.count_nonzero((truth == k) & (label == k))
    wholes = (truth == k) | (label == k), label == k, truth == k
    return [100 * both / whole.sum() if whole.any() else math.nan for whole in wholes]


def text_of(values):
    return ["-" if math.isnan(value) else f"{value:.1f}" for value in values]


class Page(HTMLParser):
    """What a page shows: tables, cards, and every element with its attributes."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements, self.tables, self.cards, self.options = [], [], [], []
        self._tag = None
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self._tag = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "article":
            self.cards.append({**attributes, "chips": {}, "panels": {}})
        elif tag == "li" and "data-label" in attributes:
            self.cards[-1]["chips"][int(attributes["data-label"])] = float(attributes["data-iou"])
        elif tag == "img" and self.cards:
            title = attributes["alt"].removeprefix(f"{self.cards[-1]['data-id']}: ")
            self.cards[-1]["panels"][title] = attributes["src"]

    def handle_data(self, words):
        if self._tag in ("th", "td"):
            self.tables[-1][-1][-1] += words.strip()
        elif self._tag == "option" and words.strip():
            self.options.append(words)
        elif self._tag == "h3" and words.strip():
            self.cards[-1]["h3"] = words

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


def test_scores_are_what_counting_gives(world, page):
    for name in PREDICTIONS:
        row, _ = world.figures(lambda image_id, name=name: world.predictions(image_id)[name])
        assert page.table(0)[name] == text_of(row)


@pytest.mark.parametrize(
    ("name", "flag", "thresholds"),
    [("background score", "bg", [i / 100 for i in range(61)]), ("alpha", "alpha", range(1, 65))],
)
def test_best_thresholds_are_those_of_scoring_one_by_one(name, flag, thresholds, world, page):
    rows = [
        world.figures(lambda image_id, t=t: world.cam_label(image_id, **{flag: t}))[0]
        for t in thresholds
    ]
    place = int(np.argmax([row[0] for row in rows]))
    assert page.table(0)[f"CAM, best {name}: {thresholds[place]:g}"] == text_of(rows[place])


def test_classes_that_occur_have_a_row(world, page):
    counted = [
        world.figures(lambda image_id, name=name: world.predictions(image_id)[name])[1]
        for name in PREDICTIONS
    ]
    table = page.table(1)
    assert list(table) == LABELS[:4]  # "nowhere" is nowhere
    for label, cells in enumerate(table.values()):
        iou = [per_label[label][0] for per_label in counted]
        assert cells == text_of([*iou, *counted[-1][label][1:]])


def test_cards_are_sorted_and_scored(world, page):
    iou = {image_id: world.image_iou(image_id, world.walks[image_id]) for image_id in IDS}
    ranked = sorted(world.masks, key=lambda image_id: np.nanmean(iou[image_id]))
    assert [card["data-id"] for card in page.cards] == [*ranked, "unmasked"]
    for card in page.cards:
        image_id = card["h3"]
        mean = np.nanmean(iou[image_id]) if image_id in world.masks else math.nan
        assert float(card["data-iou"]) == pytest.approx(mean, nan_ok=True)
        shown = [world.confident(image_id), world.walks[image_id]]
        shown += [world.masks[image_id]] if image_id in world.masks else []
        labels = {k + 1 for k in world.cams[image_id]}.union(*map(np.unique, shown)) - {0, VOID}
        assert list(card["chips"]) == sorted(labels)
        expected = [iou[image_id][label] for label in card["chips"]]
        np.testing.assert_allclose([*card["chips"].values()], expected)


def test_the_filter_counts_the_cards(page):
    labels = [label for card in page.cards for label in card["chips"]]
    counted = [f"{LABELS[k]} ({labels.count(k)})" for k in (1, 2, 3)]
    assert page.options == ["all", *counted, "worst first", "best first", "by name"]


def test_pictures_show_the_files(world, page):
    palette = np.array(voc_palette()).reshape(-1, 3)
    for card in page.cards:
        image_id, panels = card["data-id"], dict(card["panels"])
        labels = {name: world.predictions(image_id)[name] for name in PREDICTIONS[1:]}
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
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not {"i", "b"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), (tag, attributes)
    assert all(uri.startswith("data:") for uri in re.findall(r"url\((.*?)\)", page.html))
    assert "default-src 'none'" in page.html
    assert not re.search("https?://", page.html)


def test_the_same_files_give_the_same_page(world, page):
    assert make_page(world.root, STAGES, "again.html").html == page.html


def test_folders_that_are_not_named_are_left_out(world):
    page = make_page(world.root, "--rw rw --images 2", "rw.html")
    assert list(page.table(0)) == ["random walk"]
    assert list(page.cards[0]["panels"]) == ["random walk", "mask", "differences"]
    means = {i: np.nanmean(world.image_iou(i, world.walks[i])) for i in world.masks}
    worst, best = min(means, key=means.get), max(means, key=means.get)
    assert [card["data-id"] for card in page.cards] == [worst, best]
    page = make_page(world.root, "--cam cam", "cam.html")
    assert list(page.cards[0]["panels"])[-3:] == ["CAM", "mask", "differences"]


@pytest.mark.parametrize("void", [False, True])
def test_without_labelled_pixels_there_are_no_scores(void, world, tmp_path):
    shutil.copytree(world.root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "VOC" / "SegmentationClass")
    for image_id in IDS if void else ():
        write_mask(tmp_path / "VOC", image_id, np.full((HEIGHT, WIDTH), VOID))
    page = make_page(tmp_path, f"{STAGES} --images 3")
    assert page.tables == []
    assert [card["data-id"] for card in page.cards] == [IDS[0], IDS[2], IDS[4]]
    assert "worst first" not in page.options


@given(
    st.lists(st.floats(0, 100) | st.just(math.nan), min_size=1, max_size=40, unique_by=repr),
    st.integers(1, 45),
)
def test_the_worst_and_the_best_are_chosen(scores, count):
    ids = list(range(len(scores)))
    chosen = data.choose(dict(enumerate(scores)), count)
    assert len(chosen) == len(set(chosen)) == min(count, len(ids))
    scored = [i for _, i in sorted((s, i) for i, s in enumerate(scores) if not math.isnan(s))]
    assert chosen == [i for i in [*scored, *(i for i in ids if i not in scored)] if i in chosen]
    ends = min(count, len(scored)) // 3
    assert {*scored[:ends], *scored[len(scored) - ends :]} <= set(chosen)


def test_differences_by_hand():
    mask = np.array([[0, 0, 1, 1, 1, VOID, 1]])
    prediction = np.array([[0, 2, 1, 0, 2, 1, VOID]])
    kinds = np.asarray(pictures.difference_layer(mask, prediction))[0].tolist()
    names = [0, "right", "missed", "too much", "wrong class"]
    assert list(pictures.DIFFERENCES) == names[1:]
    expected = [0, "too much", "right", "missed", "wrong class"]
    assert kinds == [*map(names.index, expected), VOID, VOID]


def test_an_image_without_a_whole_cell_has_no_confident_label():
    maps = {0: np.ones((5, 30), np.float32)}
    assert (data.confident_label(maps, maps) == VOID).all()


LOG = "step,epoch,lr,loss,bg,val_loss,images_per_second\n"


def test_the_losses_of_a_log_are_read_and_drawn(world):
    (world.root / "aff.csv").write_text(
        f"{LOG}10,1,0.1,2,0.5,,9\n20,1,0.1,1,0.25,3,9\n30,1,0.1,nan"
    )
    losses = data.read_log(world.root / "aff.csv")
    assert {name: points.tolist() for name, points in losses.items()} == {
        "loss": [[10, 2], [20, 1]],  # what is not finite is not drawn
        "bg": [[10, 0.5], [20, 0.25]],
        "val_loss": [[20, 3]],
    }
    page = make_page(world.root, "--log aff.csv", "log.html")
    assert "losses of aff.csv" in [attributes.get("alt") for _, attributes in page.elements]


@pytest.mark.parametrize(
    "text",
    [b"", b"a,b\n1,2\n", b"step,epoch,lr\n1,1,0.1\n", LOG.encode(), b"\x89PNG\xff\xfe\x00"]
    + [f"{LOG}{row}\n".encode() for row in ("1,1,0.1,high,1,,3", "last,1,0.1,1")],
)
def test_what_is_no_log_is_refused(text, world):
    (world.root / "no.csv").write_bytes(text)
    run_program(f"{REPORT} --log no.csv --out x.html", world.root).assert_failed(
        1, "no.csv", "loss"
    )
    assert not (world.root / "x.html").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--la la --out x.html", 2, ("--la", "--ha")),
        ("--images 0 --out x.html", 2, ("--images",)),
        ("--out x.pdf", 2, ("x.pdf", ".html", ".png")),
        ("--out list.txt/../list.txt", 2, ("list.txt",)),
        ("--list no.txt --out x.html", 1, ("no.txt", "voc12.prepare")),
        ("--cam nowhere --out x.html", 1, ("nowhere/a.npy", "infer_cls.py")),
        ("--rw cam --out x.html", 1, ("cam/a.png", "--rw", "infer_aff.py")),
        ("--rw cam --out x.png", 1, ("cam/a.png", "--rw", "infer_aff.py")),
        ("--la cam --ha cam --out x.html", 1, ("cam/a.npy", "background")),
        ("--rw high --out x.html", 1, ("high/a.png", "label 5", "4 classes", "--classes")),
        ("--rw small --out x.html", 1, ("small/a.png", "4 x 4", f"{HEIGHT} x {WIDTH}")),
        ("--la high --ha high --out x.html", 1, ("high/a.npy", "label 5", "--classes")),
        ("--log no_such.csv --out x.html", 1, ("no_such.csv",)),
    ],
)
def test_bad_input(flags, code, words, world):
    for image_id in IDS:
        save_index_png(world.root / f"small/{image_id}.png", np.zeros((4, 4), np.uint8))
        save_index_png(world.root / f"high/{image_id}.png", np.full((HEIGHT, WIDTH), 5, np.uint8))
        maps = dict.fromkeys((0, 5), np.ones((HEIGHT, WIDTH)))
        save_maps(world.root / f"high/{image_id}.npy", maps)
    run_program(f"{REPORT} {flags}", world.root).assert_failed(code, *words)
    assert not list(world.root.glob("x.*"))


def test_sixty_real_photographs_stay_small(voc_mini, tmp_path):
    ids = (voc_mini / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:6]
    (tmp_path / "list.txt").write_text("\n".join(ids))
    for image_id in ids:
        with Image.open(voc_mini / "SegmentationClass" / f"{image_id}.png") as image:
            mask = np.asarray(image)
        save_index_png(tmp_path / "rw" / f"{image_id}.png", np.where(mask == VOID, 0, mask))
        cams = {int(k) - 1: blur(mask == k) for k in np.unique(mask) if k not in (0, VOID)}
        save_maps(tmp_path / "cam" / f"{image_id}.npy", cams)
    flags = f"--voc12_root {voc_mini} --list list.txt --cam cam --rw rw --out mini.html"
    run_program(f"voc12.report.__main__ {flags}", tmp_path).check()
    page = Page(tmp_path / "mini.html")
    assert page.table(0)["random walk"][0] == "100.0"  # void apart, the masks themselves
    assert len(page.html) * 60 / len(ids) < 10e6


def blur(mask):
    image = Image.fromarray((255 * mask).astype(np.uint8)).filter(ImageFilter.GaussianBlur(20))
    return np.asarray(image) / 255


@pytest.mark.parametrize(
    ("flags", "rows", "columns"),
    [("", 5, 2), ("--images 2 --rw rw", 2, 3), (f"--images 9 {STAGES}", 5, 5)],
)
def test_a_sheet_has_a_panel_for_each_image_and_folder(flags, rows, columns, world):
    run_program(f"{REPORT} {flags} --out sheet.png", world.root).check()
    with Image.open(world.root / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("L"))
    drawn = [
        panel[20:-20, 20:-20].std() > 3
        for row in np.split(pixels, rows)
        for panel in np.split(row, columns, axis=1)
    ]
    assert drawn.count(False) == 1  # the last image has no mask


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync"
ACTIONS = """
const result = [];
function look() {
  const drawn = shown().filter((card) => card.offsetHeight > 0).map((card) => card.dataset.id);
  const focus = document.activeElement.dataset.id ?? document.activeElement.id;
  result.push([drawn, focus, get("count").textContent]);
}
function choose(id, value) {
  get(id).value = value;
  get(id).dispatchEvent(new Event("change", { bubbles: true }));
  look();
}
function press(key) {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  look();
}
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_cards_are_filtered_sorted_and_reached_by_keys(page, tmp_path):
    orders = [(label, order) for label in (1, 2, 3) for order in ("worst", "best")]
    keys = ("ArrowRight", "ArrowLeft", "ArrowRight", "End", "ArrowRight", "Home", "ArrowLeft", "/")
    looks = look_after(
        page,
        tmp_path,
        "look()",
        *(f"choose('class', {label}); result.pop(); choose('order', '{o}')" for label, o in orders),
        "shown()[0].focus(); press('ArrowRight')",
        "choose('class', ''); result.pop(); choose('order', 'id'); cards[0].focus()",
        *(f"press('{key}')" for key in keys),
    )
    ids = [card["data-id"] for card in page.cards]
    assert looks.pop(0) == [ids, "", "5 of 5 images"]  # as in the file
    for label, order in orders:
        shown, _, count = looks.pop(0)
        chips = {card["data-id"]: card["chips"] for card in page.cards}
        iou = [chips[image_id][label] for image_id in shown]
        scored = [value if order == "worst" else -value for value in iou if not math.isnan(value)]
        assert {i for i in ids if label in chips[i]} == set(shown)
        assert scored == sorted(scored)
        assert not any(map(math.isnan, iou[: len(scored)]))
        assert count == f"{len(shown)} of 5 images"
    assert 2 <= len(shown) < len(ids)
    assert looks.pop(0)[1] == shown[1]  # over the cards that are hidden
    by_name = looks.pop(0)[0]
    assert sorted(by_name) == sorted(ids)
    places = 1, 0, 1, 4, 4, 0, 0
    assert [focus for _, focus, _ in looks] == [*(by_name[place] for place in places), "class"]


def look_after(page, folder, *actions):
    """After each action in the page: the cards it shows, what has the focus, and the count."""
    script = f"{ACTIONS}{';'.join(actions)}; document.body.textContent = JSON.stringify(result);"
    (folder / "page.html").write_text(f"{page.html}<script>{script}</script>")
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}/profile", "--dump-dom"]
    command.append(str(folder / "page.html"))
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return json.loads(html.unescape(re.search("<body[^>]*>(.*?)</body>", dom, re.DOTALL)[1]))
