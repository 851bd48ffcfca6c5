"""The page and the sheet of what the stages made: every number on the page is counted here again.

The page is also tried in a headless Chromium, where one is installed.
"""

import base64
import io
import math
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from helpers import noise_image, run_program, write_image, write_mask
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tool.labels import VOID, voc_palette
from tool.maps import save_index_png, save_maps

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import voc12
from voc12.report import data as report_data
from voc12.report import page as report_page
from voc12.report import pictures as report_pictures
from voc12.report import plots as report_plots
from voc12.report import sheet as report_sheet

CLASSES = ["crack", '<img src=x onerror="alert(1)">', "$rust$ & moss", "nowhere"]
LABELS = ["background", *CLASSES]
IDS = ["a", "b", "<i>'c'&amp;", 'd"d', "unmasked"]
HEIGHT, WIDTH = 20, 28  # neither fills its cells of 8 pixels
REPORT = "voc12.report --voc12_root VOC --list list.txt --classes classes.txt"
STAGES = "--cam cam --la la --ha ha --rw rw"
PANEL = round(report_sheet.INCHES * report_sheet.DOTS_PER_INCH)
BYTES = 10_000_000  # of a page with 60 images, at most


class World:
    """A devkit of five images of random labels and maps, kept here to count with."""

    def __init__(self, root, rng):
        self.root = root
        (root / "classes.txt").write_text("\n".join(CLASSES))
        (root / "list.txt").write_text("\n".join([*IDS, "a"]))  # an image counts once
        self.masks, self.walks, self.cams, self.scores = {}, {}, {}, {}
        for seed, image_id in enumerate(IDS):
            write_image(root / "VOC", image_id, noise_image(HEIGHT, WIDTH, seed))
            present = [1, 2] if image_id == "b" else [1, 2, 3]
            truth = self.blocks(rng, [0, 0, *present], side=8)
            if image_id != "unmasked":
                self.masks[image_id] = np.where(self.blocks(rng, [0, 0, 0, 1]) == 1, VOID, truth)
                write_mask(root / "VOC", image_id, self.masks[image_id])
            self.walks[image_id] = np.where(self.blocks(rng, [0, 1]) == 1, truth, seed % 3)
            save_index_png(root / "rw" / f"{image_id}.png", self.walks[image_id].astype(np.uint8))
            self.cams[image_id] = {
                k - 1: rng.random((HEIGHT, WIDTH), np.float32) * (0.3 + 0.7 * (truth == k))
                for k in (present if seed else [])  # the first image has no CAM
            }
            save_maps(root / "cam" / f"{image_id}.npy", self.cams[image_id])
            self.scores[image_id] = [self.crf_scores(rng, truth, alpha) for alpha in (0.4, 0.1)]
            for folder, scores in zip(("la", "ha"), self.scores[image_id], strict=True):
                save_maps(root / folder / f"{image_id}.npy", scores)

    def blocks(self, rng, values, side=4):
        """Squares of a value each, H x W."""
        coarse = rng.choice(values, (-(-HEIGHT // side), -(-WIDTH // side)))
        return coarse.repeat(side, 0).repeat(side, 1)[:HEIGHT, :WIDTH]

    def crf_scores(self, rng, truth, background):
        strength = rng.random(truth.shape) * 0.1 + self.blocks(rng, [0.2, 0.8], side=8)
        maps = {k: (truth == k) * strength for k in (0, 1, 2, 3)}
        maps[0] = maps[0] + background
        return {k: (values / sum(maps.values())).astype(np.float32) for k, values in maps.items()}

    def cam_label(self, image_id, background=0.2, alpha=None):
        cams = self.cams[image_id]
        best = np.max([np.zeros((HEIGHT, WIDTH)), *cams.values()], axis=0)
        level = np.float32(background) if alpha is None else (1 - best) ** alpha
        label = np.zeros((HEIGHT, WIDTH), np.int64)
        for k, values in reversed(cams.items()):  # of equals, the first class has it
            label[(values == best) & (values > level)] = k + 1
        return label

    def confident(self, image_id):
        """Each whole cell's label by the rules of training; beyond the cells, none."""
        low, high = self.scores[image_id]
        label = np.full((HEIGHT, WIDTH), VOID)
        for top in range(0, HEIGHT - 7, 8):
            for left in range(0, WIDTH - 7, 8):
                cell = slice(top, top + 8), slice(left, left + 8)
                bold, timid = (
                    max(maps, key=lambda k, m=maps: m[k][cell].mean()) for maps in (low, high)
                )
                label[cell] = 0 if timid == 0 else bold if bold != 0 else VOID
        return label

    def figures(self, predictions):
        """Per cent by name, counted label by label over the masked images."""
        pairs = [(self.masks[i], predictions[i]) for i in self.masks]
        truth = np.concatenate([mask[mask != VOID] for mask, _ in pairs])
        given = np.concatenate([label[mask != VOID] for mask, label in pairs])
        per_label = [iou_precision_recall(truth, given, k) for k in range(len(LABELS))]
        union = np.count_nonzero((truth == 0) | (given == 0))
        return {
            "miou": np.nanmean([iou for iou, _, _ in per_label]),
            "accuracy": 100 * np.mean(truth == given),
            "false_positives": 100 * np.count_nonzero((given == 0) & (truth != 0)) / union,
            "false_negatives": 100 * np.count_nonzero((given != 0) & (truth == 0)) / union,
            "per_label": per_label,
        }

    def image_iou(self, image_id, label):
        """Of one image: mean IoU in per cent, and each label's."""
        if image_id not in self.masks:
            return math.nan, [math.nan] * len(LABELS)
        mask = self.masks[image_id]
        truth, given = mask[mask != VOID], label[mask != VOID]
        iou = [iou_precision_recall(truth, given, k)[0] for k in range(len(LABELS))]
        return np.nanmean(iou), iou


def iou_precision_recall(truth, given, label):
    """In per cent, NaN where there is nothing to divide by."""
    both = np.count_nonzero((truth == label) & (given == label))
    wholes = (
        np.count_nonzero((truth == label) | (given == label)),
        np.count_nonzero(given == label),
        np.count_nonzero(truth == label),
    )
    return [100 * both / whole if whole else math.nan for whole in wholes]


def text_of(value):
    return "-" if math.isnan(value) else f"{value:.1f}"


class Page(HTMLParser):
    """What stands on a page: tables, figures, cards, and every attribute of every element."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements = []  # (tag, attributes)
        self.tables, self.cards, self.plots, self.options = [], [], [], []
        self.words = {}  # of the last h1, h2, ...
        self._open = []
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag == "option":
            self.options.append("")
        if tag == "article":
            self.cards.append({**attributes, "panels": [], "chips": [], "h3": "", "iou": ""})
        if tag == "li" and "data-label" in attributes:
            self.cards[-1]["chips"].append({**attributes, "words": ""})
        if tag == "figure":
            self.figure = {"caption": "", "alt": None, "images": []}
            (self.cards[-1]["panels"] if self.cards else self.plots).append(self.figure)
        if tag in ("img", "source") or attributes.get("role") == "img":
            self.figure["alt"] = attributes.get("alt", attributes.get("aria-label"))
            self.figure["images"].append(attributes.get("src", attributes.get("srcset")))

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:  # img, meta and the like have no end
            pass

    def handle_data(self, data):
        data = " ".join(data.split())
        if not data or not self._open:
            return
        if {"th", "td"} & set(self._open):
            self.tables[-1][-1][-1] += data
        elif "option" in self._open:
            self.options[-1] += data
        elif "figcaption" in self._open:
            self.figure["caption"] += data + ("|" if "strong" in self._open else "")
        elif "article" in self._open and "h3" in self._open:
            self.cards[-1]["h3"] += data
        elif "article" in self._open and "li" in self._open:
            self.cards[-1]["chips"][-1]["words"] += data
        elif "article" in self._open and "p" in self._open:
            self.cards[-1]["iou"] += f"{data} "
        elif self._open[-1] in ("h1", "p"):
            self.words.setdefault(self._open[-1], []).append(data)

    def table(self, number):
        """A table by row and column title."""
        (_, *columns), *rows = self.tables[number]
        return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows}

    def card(self, image_id):
        return next(card for card in self.cards if card["data-id"] == image_id)


def make_page(root, flags, out="out/report.html"):
    run_program(f"{REPORT} {flags} --out {out}", root).check()
    return Page(root / out)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), np.random.default_rng(3))


@pytest.fixture(scope="module")
def page(world):
    return make_page(world.root, STAGES)


def decode(uri, media_type):
    prefix = f"data:{media_type};base64,"
    assert uri.startswith(prefix)
    return base64.b64decode(uri[len(prefix) :])


def test_scores_are_what_counting_gives(world, page):
    table = page.table(0)
    walk = world.figures(world.walks)
    cam = world.figures({i: world.cam_label(i) for i in IDS})
    for title, expected in (("random walk", walk), ("CAM, background score 0.2", cam)):
        assert list(table[title].values()) == [
            text_of(expected["miou"]),
            text_of(expected["accuracy"]),
            text_of(expected["false_positives"]),
            text_of(expected["false_negatives"]),
            str(len(world.masks)),
        ]
    assert "train_aug" in " ".join(page.words["p"])  # the rule of splits


@pytest.mark.parametrize(
    ("kind", "title", "thresholds"),
    [("bg", "background", [i / 100 for i in range(61)]), ("alpha", "alpha", range(1, 65))],
)
def test_thresholds_are_what_scoring_one_by_one_gives(kind, title, thresholds, world, monkeypatch):
    drawn = []
    monkeypatch.setattr(report_plots, "svg_uris", lambda draw, *args: drawn.append((draw, args)))
    devkit = report_page.Outputs(
        report_data.Devkit(world.root / "VOC", CLASSES), world.root / "cam"
    )
    miou = [
        world.figures(
            {i: world.cam_label(i, **{{"bg": "background"}.get(kind, kind): t}) for i in IDS}
        )["miou"]
        for t in thresholds
    ]
    result = report_data.sweep_cams(devkit, list(world.masks))[kind]
    plot = report_page.threshold_plot(kind, result)
    ((draw, args),) = drawn
    curve, best = draw(*args).axes[0].lines
    np.testing.assert_allclose(curve.get_xdata(), thresholds)
    np.testing.assert_allclose(curve.get_ydata(), miou)
    place = int(np.argmax(miou))
    np.testing.assert_allclose(best.get_xydata(), [[thresholds[place], miou[place]]])
    assert plot.caption.endswith(f"best {miou[place]:.1f} % at {thresholds[place]:g}")


def test_best_thresholds_stand_in_the_table(world, page):
    for title, name, options in (
        ("best background score", "background", [i / 100 for i in range(61)]),
        ("best alpha", "alpha", range(1, 65)),
    ):
        scored = [world.figures({i: world.cam_label(i, **{name: t}) for i in IDS}) for t in options]
        place = int(np.argmax([figures["miou"] for figures in scored]))
        row = page.table(0)[f"CAM, {title}: {options[place]:g}"]
        assert row["mIoU"] == text_of(scored[place]["miou"])
        assert row["pixel accuracy"] == text_of(scored[place]["accuracy"])


def test_confident_labels_are_counted_over_all_images(world, page):
    labels = {i: world.confident(i) for i in IDS}
    stacked = np.stack(list(labels.values()))
    pairs = np.stack([(labels[i], mask) for i, mask in world.masks.items()], axis=1)
    label, mask = pairs[:, (pairs != VOID).all(axis=0)]
    shares = [(stacked > 0) & (stacked < VOID), stacked == 0, stacked == VOID, label == mask]
    (row,) = page.table(1).values()
    assert list(row.values()) == [text_of(100 * share.mean()) for share in shares]
    assert min(share.sum() for share in shares) > 0


def test_classes_that_occur_have_a_row(world, page):
    table = page.table(2)
    walk = world.figures(world.walks)["per_label"]
    cam = world.figures({i: world.cam_label(i) for i in IDS})["per_label"]
    assert list(table) == LABELS[:4]  # "nowhere" is nowhere
    for name, row in table.items():
        label = LABELS.index(name)
        numbers = [cam[label][0], *walk[label]]
        assert list(row.values()) == [text_of(number) for number in numbers]
    assert any("predicted: 1." in words for words in page.words["p"])


def test_bars_are_as_long_as_the_table_says(world, monkeypatch):
    drawn = []
    monkeypatch.setattr(report_plots, "svg_uris", lambda draw, *args: drawn.append((draw, args)))
    per_class = {"x": 50.0, "gone": None, "$y$": 25.0}
    report_page.class_plot({"CAM": {"per_class": per_class}, "walk": {"per_class": per_class}})
    ((draw, args),) = drawn
    axes = draw(*args).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50, 25, 50, 25]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["x", "$y$"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top


def test_cards_are_sorted_and_scored(world, page):
    means = {i: world.image_iou(i, world.walks[i])[0] for i in IDS}
    ranked = sorted(world.masks, key=means.get)
    assert [card["data-id"] for card in page.cards] == [*ranked, "unmasked"]
    for image_id in IDS:
        card = page.card(image_id)
        assert card["h3"] == image_id
        cam_mean, _ = world.image_iou(image_id, world.cam_label(image_id))
        walk_mean, per_label = world.image_iou(image_id, world.walks[image_id])
        if image_id == "unmasked":
            assert card["data-iou"] == card["iou"] == ""
        else:
            assert float(card["data-iou"]) == pytest.approx(walk_mean)
            numbers = re.findall(r"-|\d+\.\d", card["iou"])
            assert numbers == [text_of(cam_mean), text_of(walk_mean)]
        mask = world.masks.get(image_id, np.zeros(1, int))
        present = {k + 1 for k in world.cams[image_id]}
        present |= set(np.unique(world.walks[image_id])) | set(np.unique(mask))
        chips = {int(chip["data-label"]): chip for chip in card["chips"]}
        assert list(chips) == sorted(present - {0, VOID})
        for label, chip in chips.items():
            value = per_label[label]
            has_iou = not math.isnan(value)
            assert chip["words"] == f"{LABELS[label]} {value:.1f}" if has_iou else LABELS[label]
            assert chip["data-iou"] == "" or float(chip["data-iou"]) == pytest.approx(value)
            assert (chip["data-iou"] != "") == has_iou


def test_the_filter_counts_the_cards(world, page):
    labels = [chip["data-label"] for card in page.cards for chip in card["chips"]]
    counted = [f"{LABELS[k]} ({labels.count(str(k))})" for k in (1, 2, 3) if str(k) in labels]
    assert page.options == ["all", *counted, "worst first", "best first", "by name"]


def test_captions_and_alternative_texts_say_what_is_to_be_seen(world, page):
    for image_id in IDS:
        expected = {"image": f"{WIDTH} \xd7 {HEIGHT} pixels"}
        for k, values in world.cams[image_id].items():
            expected[f"CAM of {CLASSES[k]}"] = f"{100 * np.mean(values > 0.2):.1f} % above 0.2"
        names = dict(enumerate(LABELS))
        expected["confident labels"] = shares(world.confident(image_id), {**names, VOID: "ignored"})
        expected["random walk"] = shares(world.walks[image_id], names)
        if image_id in world.masks:
            mask, walk = world.masks[image_id], world.walks[image_id]
            expected["mask"] = shares(mask, {**names, VOID: "void"})
            true, seen = (mask != 0) & (mask != VOID), walk != 0
            kinds = {
                "right": true & (walk == mask),
                "missed": true & ~seen,
                "too much": (mask == 0) & seen,
                "wrong class": true & seen & (walk != mask),
            }
            expected["differences"] = words(kinds)
        panels = page.card(image_id)["panels"]
        assert [panel["caption"] for panel in panels] == [
            f"{title}|{' '.join(text.split())}" for title, text in expected.items()
        ]
        assert panels[0]["alt"] == f"{image_id}: photograph"
        for panel, (title, text) in zip(panels[1:], list(expected.items())[1:], strict=True):
            assert panel["alt"].replace("\xa0", " ") == f"{image_id}: {title}, {text}"


def shares(label, names):
    return words({name: label == key for key, name in names.items()})


def words(where):
    share = {name: 100 * np.mean(pixels) for name, pixels in where.items() if pixels.any()}
    ranked = sorted(share, key=lambda name: -share[name])
    return ", ".join(f"{name} {share[name]:.1f} %" for name in ranked)


def test_pictures_show_the_files(world, page):
    palette = np.array(voc_palette()).reshape(-1, 3)
    for image_id in IDS:
        panels = {
            panel["caption"].partition("|")[0]: panel for panel in page.card(image_id)["panels"]
        }
        for title, label in {
            "confident labels": world.confident(image_id),
            "random walk": world.walks[image_id],
            "mask": world.masks.get(image_id),
        }.items():
            if label is None:
                assert title not in panels
                continue
            pixels = rgba(panels[title])
            shown = (label != 0) & (label != VOID)
            np.testing.assert_array_equal(pixels[shown][:, :3], palette[label[shown]])
            assert (pixels[label == 0][:, 3] == 0).all()  # background is the photograph
            assert (pixels[label == VOID] == [0, 0, 0, 255]).all()
        for k, values in world.cams[image_id].items():
            opacity = rgba(panels[f"CAM of {CLASSES[k]}"])[..., 3]
            np.testing.assert_allclose(opacity / opacity.max(), values / values.max(), atol=0.02)
        style = page.card(image_id)["style"]
        uri = re.fullmatch(r"--photograph: url\((data:.*)\)", style).group(1)
        with Image.open(io.BytesIO(decode(uri, "image/jpeg"))) as photograph:
            assert photograph.size == (WIDTH, HEIGHT)


def rgba(panel):
    (uri,) = panel["images"]
    with Image.open(io.BytesIO(decode(uri, "image/png"))) as image:
        return np.asarray(image.convert("RGBA")).astype(np.int64)


def test_names_are_text_and_nothing_is_fetched(page):
    assert {tag for tag, _ in page.elements} >= {"main", "nav", "article", "figcaption", "output"}
    assert not any("onerror" in attributes for _, attributes in page.elements)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), (tag, attributes)
        if tag == "img":
            assert attributes["alt"]
    assert all(uri.startswith("data:") for uri in re.findall(r"url\((.*?)\)", page.html))
    assert "default-src 'none'" in page.html
    assert "http://" not in page.html
    assert "https://" not in page.html


def test_plots_come_for_light_and_dark_pages(page):
    for plot in page.plots:
        light, dark = (decode(uri, "image/svg+xml") for uri in plot["images"][::-1])
        assert light.startswith(b"<?xml")
        assert light != dark
        assert plot["alt"]
    classes = decode(page.plots[0]["images"][0], "image/svg+xml").decode()
    for name in ("crack", "$rust$ &amp; moss", "&lt;img src=x"):
        assert name in classes


def test_the_same_files_give_the_same_page(world, page):
    again = make_page(world.root, STAGES, "again.html")
    assert again.html == page.html


def test_folders_that_are_not_named_are_left_out(world):
    page = make_page(world.root, "--rw rw --images 2", "rw.html")
    assert len(page.tables) == 2  # scores and classes
    assert list(page.table(0)) == ["random walk"]
    titles = [panel["caption"].partition("|")[0] for panel in page.cards[0]["panels"]]
    assert titles == ["image", "random walk", "mask", "differences"]
    means = {i: world.image_iou(i, world.walks[i])[0] for i in world.masks}
    worst, best = min(means, key=means.get), max(means, key=means.get)
    assert [card["data-id"] for card in page.cards] == [worst, best]
    assert any("2 of 4 images with a score: the 0 worst" in words for words in page.words["p"])

    page = make_page(world.root, "--cam cam", "cam.html")
    assert next(iter(page.table(0))) == "CAM, background score 0.2"
    titles = [panel["caption"].partition("|")[0] for panel in page.card("b")["panels"]]
    assert titles[-3:] == ["CAM", "mask", "differences"]


def test_data_without_masks_has_no_scores(world, tmp_path):
    for name in ("cam", "la", "ha", "rw", "VOC/JPEGImages"):
        shutil.copytree(world.root / name, tmp_path / name)
    for name in ("list.txt", "classes.txt"):
        shutil.copy(world.root / name, tmp_path / name)
    page = make_page(tmp_path, f"{STAGES} --images 3")
    assert list(page.table(0)) == ["confident labels"]
    assert page.table(0)["confident labels"]["right"] == "-"
    assert len(page.tables) == 1
    assert [card["data-id"] for card in page.cards] == [IDS[0], IDS[2], IDS[4]]
    assert all(card["iou"] == card["data-iou"] == "" for card in page.cards)
    assert "worst first" not in page.options
    assert "none of them with a mask" in page.words["p"][0]
    assert any("3 of 5 images: 0 with a score" in words for words in page.words["p"])


def test_masks_without_a_labelled_pixel_score_nothing(world, tmp_path):
    shutil.copytree(world.root, tmp_path, dirs_exist_ok=True)
    for image_id in IDS:
        write_mask(tmp_path / "VOC", image_id, np.full((HEIGHT, WIDTH), VOID))
    page = make_page(tmp_path, "--cam cam --rw rw")
    assert page.tables == []
    assert {card["data-iou"] for card in page.cards} == {""}


def test_a_mask_for_some_images_is_said(page):
    assert "5 images of list.txt, 4 with a mask" in page.words["p"][0]


@given(
    st.lists(st.floats(0, 100) | st.just(math.nan), min_size=1, max_size=40, unique_by=repr),
    st.integers(1, 45),
)
def test_the_worst_and_the_best_are_chosen(scores, count):
    ids = list(range(len(scores)))
    chosen = report_data.choose(dict(enumerate(scores)), count)
    assert len(chosen) == len(set(chosen)) == min(count, len(ids))
    ranked = sorted((s, i) for i, s in enumerate(scores) if not math.isnan(s))
    scored = [i for _, i in ranked]
    assert chosen == [i for i in [*scored, *(i for i in ids if i not in scored)] if i in chosen]
    ends = min(count // 3, len(scored) // 2)
    assert {*scored[:ends], *scored[len(scored) - ends :]} <= set(chosen)


def test_differences_by_hand():
    mask = np.array([[0, 0, 1, 1, 1, VOID]])
    prediction = np.array([[0, 2, 1, 0, 2, 1]])
    kinds = report_pictures.differences(mask, prediction)[0].tolist()
    names = [report_pictures.DIFFERENCES.get(kind, (kind,))[0] for kind in kinds]
    assert names == [0, "too much", "right", "missed", "wrong class", VOID]


@pytest.mark.parametrize(("size", "small"), [((720, 400), (360, 200)), ((100, 360), (100, 360))])
def test_thumbnails_keep_the_sides_ratio(size, small):
    label = np.zeros(size[::-1], np.uint8)
    uri = report_pictures.layer_uri(report_pictures.label_layer(label))
    assert rgba({"images": [uri]}).shape == (*small[::-1], 4)
    photograph = report_pictures.photograph_uri(noise_image(*size[::-1]))
    with Image.open(io.BytesIO(decode(photograph, "image/jpeg"))) as image:
        assert image.size == small


LOG = "step,epoch,lr,loss,bg,val_loss,images_per_second\n"


def test_every_loss_of_a_log_is_drawn(world, monkeypatch):
    rows = [(10, 2.0, 0.5, ""), (20, 1.0, 0.25, 0.75), (30, "nan", 0.125, "")]
    text = "".join(f"{step},1,0.1,{loss},{bg},{val},12.5\n" for step, loss, bg, val in rows)
    (world.root / "aff.csv").write_text(LOG + text)
    drawn = []
    draw_svg = report_plots.svg_uris
    monkeypatch.setattr(
        report_plots, "svg_uris", lambda *args: (drawn.append(args), draw_svg(*args))[1]
    )
    page = make_page(world.root, "--log aff.csv", "log.html")
    ((draw, losses),) = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in draw(losses).axes[0].lines}
    assert lines == {
        "loss": [[10, 2], [20, 1]],  # what is not finite is not drawn
        "bg": [[10, 0.5], [20, 0.25], [30, 0.125]],
        "val_loss": [[20, 0.75]],
    }
    assert page.plots[0]["caption"] == (
        "aff.csv, 30 steps: loss from 2.000 to 1.000, bg from 0.500 to 0.125, "
        "val_loss from 0.750 to 0.750"
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=1500))
def test_thinning_keeps_the_mean_and_short_curves(values):
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    thinned = report_plots.thin(report_plots.Curve(x, y))
    assert len(thinned.x) <= report_plots.MAX_POINTS
    if len(y) <= report_plots.MAX_POINTS:
        assert thinned.y.tolist() == values
    run = -(-len(y) // report_plots.MAX_POINTS)
    np.testing.assert_allclose(thinned.y[0], y[:run].mean(), atol=1e-9)
    np.testing.assert_allclose(thinned.y[-1], y[(len(thinned.y) - 1) * run :].mean(), atol=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("not a training's log", "step")),
        ("a,b\n1,2\n", ("not a training's log", "step")),
        ("step,epoch,lr\n1,1,0.1\n", ("not a training's log",)),
        (LOG, ("no loss yet",)),
        (LOG + "1,1,0.1,high,1,,3\n", ("line 2", "loss")),
        (LOG + "1,1,0.1,1\nlast,1,0.1,1\n", ("line 3", "step")),
        (b"\x89PNG\xff\xfe\x00", ("not a CSV file",)),
    ],
)
def test_what_is_no_log_is_refused(text, words, world):
    (world.root / "no.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = run_program(f"{REPORT} --log no.csv --out no.html", world.root)
    outcome.assert_failed(1, "no.csv", *words)
    assert not (world.root / "no.html").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--la la --out x.html", 2, ("--la", "--ha")),
        ("--images 0 --out x.html", 2, ("--images",)),
        ("--out x.pdf", 2, ("x.pdf", ".html", ".png")),
        ("--list no.txt --out x.html", 1, ("no.txt", "voc12.prepare")),
        ("--cam nowhere --out x.html", 1, ("nowhere/a.npy", "infer_cls.py")),
        ("--rw cam --out x.html", 1, ("cam/a.png", "infer_aff.py")),
        ("--rw cam --out x.png", 1, ("cam/a.png", "infer_aff.py")),
        ("--la cam --ha cam --out x.html", 1, ("cam/a.npy", "background")),
        ("--rw high --out x.html", 1, ("high/a.png", "label 5", "4 classes", "--classes")),
        ("--rw small --out x.html", 1, ("small/a.png", "4 x 4", f"{HEIGHT} x {WIDTH}")),
        ("--la high --ha high --out x.html", 1, ("high/a.npy", "label 5", "--classes")),
        ("--rw VOC/SegmentationClass --list masked.txt --out x.html", 1, ("/a.png", "(255)")),
        ("--log no_such.csv --out x.html", 1, ("no_such.csv",)),
    ],
)
def test_bad_input(flags, code, words, world):
    (world.root / "masked.txt").write_text("a\n")
    for image_id in IDS:
        save_index_png(world.root / f"small/{image_id}.png", np.zeros((4, 4), np.uint8))
        save_index_png(world.root / f"high/{image_id}.png", np.full((HEIGHT, WIDTH), 5, np.uint8))
        save_maps(
            world.root / f"high/{image_id}.npy", dict.fromkeys((0, 5), np.ones((HEIGHT, WIDTH)))
        )
    run_program(f"{REPORT} {flags}", world.root).assert_failed(code, *words)
    assert not list(world.root.glob("x.*"))


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(package, world, monkeypatch):
    for module in ("report_page", "report_data", "report_sheet", "report_plots", "report_pictures"):
        monkeypatch.delitem(sys.modules, f"voc12.{module}")
        monkeypatch.delattr(voc12, module)
    monkeypatch.setitem(sys.modules, package, None)
    outcome = run_program(f"{REPORT} --out x.html", world.root)
    outcome.assert_failed(1, package, "requirements.txt")


def test_sixty_real_photographs_stay_small(voc_mini, tmp_path):
    ids = (voc_mini / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:15]
    (tmp_path / "list.txt").write_text("\n".join(ids))
    for image_id in ids:
        with Image.open(voc_mini / "SegmentationClass" / f"{image_id}.png") as image:
            mask = np.asarray(image)
        save_index_png(tmp_path / "rw" / f"{image_id}.png", np.where(mask == VOID, 0, mask))
        labels = [label for label in np.unique(mask) if label not in (0, VOID)]
        blurred = {int(label): blur(mask == label) for label in labels}
        save_maps(tmp_path / "cam" / f"{image_id}.npy", {k - 1: v for k, v in blurred.items()})
        for folder, alpha in (("la", 4), ("ha", 32)):
            scores = {0: (1 - np.max(list(blurred.values()), axis=0)) ** alpha, **blurred}
            save_maps(tmp_path / folder / f"{image_id}.npy", scores)
    run_program(
        f"voc12.report --voc12_root {voc_mini} --list list.txt {STAGES} --out mini.html", tmp_path
    ).check()
    page = Page(tmp_path / "mini.html")
    assert len(page.cards) == len(ids)
    assert page.table(0)["random walk"]["mIoU"] == "100.0"  # void apart, the masks themselves
    assert len(page.html) < BYTES * len(ids) / 60


def blur(mask):
    image = Image.fromarray((255 * mask).astype(np.uint8)).filter(ImageFilter.GaussianBlur(20))
    return np.asarray(image) / 255


@pytest.mark.parametrize(
    ("flags", "rows", "columns"),
    [
        ("", 5, 2),
        ("--images 2 --rw rw", 2, 3),
        ("--images 1 --cam cam", 1, 3),
        (f"--images 9 {STAGES}", 5, 5),
    ],
)
def test_a_sheet_has_a_panel_for_each_image_and_folder(flags, rows, columns, world):
    run_program(f"{REPORT} {flags} --out sheet.png", world.root).check()
    with Image.open(world.root / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (columns * PANEL, rows * PANEL)
        pixels = np.asarray(sheet.convert("RGB"))
    for row in range(rows):
        for column in range(columns):
            panel = pixels[row * PANEL : (row + 1) * PANEL, column * PANEL : (column + 1) * PANEL]
            assert panel[PANEL // 4 : -PANEL // 4, PANEL // 4 : -PANEL // 4].std() > 3  # drawn


def test_labels_show_background_as_it_is_and_void_black():
    gray = np.full((1, 3, 3), 0.5)
    layer = report_pictures.label_layer(np.array([[0, 1, VOID]], np.uint8))
    painted = report_pictures.laid_over(gray, layer)
    assert painted[0, 0].tolist() == [0.5] * 3
    red, green, blue = painted[0, 1]
    assert red > green == blue  # VOC's label 1 is dark red
    assert painted[0, 2].tolist() == [0] * 3


def test_heat_is_strongest_where_the_map_is():
    gray = np.full((1, 3, 3), 0.5)
    layer = report_pictures.heat_layer(np.array([[0, 0.5, 1]], np.float32))
    difference = abs(report_pictures.laid_over(gray, layer) - gray).sum(-1)[0]
    assert difference[0] == 0 < difference[1] < difference[2]
    assert (gray == 0.5).all()


def test_confident_labels_are_those_of_training_on_whole_cells():
    low, high = (np.zeros((3, 20, 17), np.float32) for _ in range(2))
    low[0, :, 8:], low[2, :, :8] = 1, 1  # label 5 left; background, not believed, right
    high[2, :8], high[0, 8:] = 1, 1  # background below the first row of cells
    maps = [dict(zip((0, 3, 5), scores, strict=True)) for scores in (low, high)]
    label = report_pictures.confident_label(*maps)
    assert label.shape == (20, 17)
    assert (label[:8, :8] == 5).all()
    assert (label[:8, 8:16] == VOID).all()
    assert (label[8:16, :16] == 0).all()
    assert (label[16:] == VOID).all()
    assert (label[:, 16:] == VOID).all()


def test_an_image_without_a_whole_cell_has_no_confident_label():
    maps = {0: np.ones((5, 30), np.float32)}
    assert (report_pictures.confident_label(maps, maps) == VOID).all()


DESKTOP, PHONE = (1280, 900), (390, 844)
SHOWN = "[...document.querySelectorAll('.card:not([hidden])')].map((card) => card.dataset.id)"
FOCUS = "document.activeElement.dataset.id ?? document.activeElement.id"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, world, page):
    """The browser with the page just opened; neither it nor the page may complain."""
    browser.emulate(*DESKTOP)
    browser.messages.clear()
    browser.open(world.root / "out" / "report.html")
    yield browser
    assert browser.messages == []
    assert [url.rpartition("/")[2] for url in browser.requests()] == ["report.html"]


def select(browser, control, value):
    """Take a value of a drop-down list, as a person does."""
    browser.evaluate(f"""{{
        const control = document.getElementById({control!r});
        control.value = {value!r};
        control.dispatchEvent(new Event("change", {{ bubbles: true }}));
    }}""")


def test_the_browser_reports_what_a_page_does_wrong(browser, tmp_path):
    path = tmp_path / "wrong.html"
    path.write_text("<script>console.error('oh'); nothing()</script><img src='gone.png'>")
    browser.messages.clear()
    browser.open(path)
    assert len(browser.messages) >= 3, browser.messages
    assert [url.rpartition("/")[2] for url in browser.requests()] == ["wrong.html", "gone.png"]


def test_the_page_starts_with_all_cards_worst_first(opened, page):
    assert opened.evaluate(SHOWN) == [card["data-id"] for card in page.cards]
    assert opened.evaluate("document.getElementById('count').textContent") == "5 of 5 images"
    images = "[...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    assert opened.evaluate(images)


def test_cards_are_filtered_and_sorted_by_class(opened, world):
    for label in (1, 2, 3):
        select(opened, "class", str(label))
        iou = {i: world.image_iou(i, world.walks[i])[1][label] for i in IDS}
        having = [
            i
            for i in IDS
            if label - 1 in world.cams[i]
            or (world.walks[i] == label).any()
            or (world.masks.get(i, np.zeros(1)) == label).any()
        ]
        for order, sign in (("worst", 1), ("best", -1)):
            select(opened, "order", order)
            shown = opened.evaluate(SHOWN)
            assert sorted(shown) == sorted(having)
            scored = [sign * iou[i] for i in shown if not math.isnan(iou[i])]
            assert scored == sorted(scored)
            assert not any(math.isnan(iou[i]) for i in shown[: len(scored)])
        count = opened.evaluate("document.getElementById('count').textContent")
        assert count == f"{len(having)} of 5 images"
        chosen = "[...document.querySelectorAll('.chosen')].map((chip) => chip.dataset.label)"
        assert set(opened.evaluate(chosen)) == {str(label)}
    select(opened, "class", "")
    select(opened, "order", "id")
    assert len(opened.evaluate(SHOWN)) == 5
    assert opened.evaluate(chosen) == []


def test_the_keyboard_reaches_everything(opened, page):
    ids = [card["data-id"] for card in page.cards]
    opened.press("/")
    assert opened.evaluate(FOCUS) == "class"
    opened.press("/")  # in the list itself, the key is the list's
    assert opened.evaluate(FOCUS) == "class"
    for control in ("order", "size", "strength", *ids):
        opened.press("Tab")
        assert opened.evaluate(FOCUS) == control
    opened.press("Tab", shift=True)
    assert opened.evaluate(FOCUS) == ids[3]
    for key, place in (
        *(("ArrowLeft", 2), ("ArrowRight", 3), ("ArrowRight", 4), ("ArrowRight", 4)),
        *(("Home", 0), ("ArrowLeft", 0), ("End", 4)),
    ):
        opened.press(key)
        assert opened.evaluate(FOCUS) == ids[place]
        assert opened.evaluate("""(() => {
            const box = document.activeElement.getBoundingClientRect();
            return box.top < innerHeight && box.bottom > 0;
        })()""")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert opened.evaluate(outline) == "solid"


def test_arrows_pass_over_cards_that_the_filter_hides(opened):
    select(opened, "class", "3")
    shown = opened.evaluate(SHOWN)
    assert 2 <= len(shown) < len(IDS)
    opened.evaluate("document.querySelector('.card:not([hidden])').focus()")
    for image_id in shown[1:]:
        opened.press("ArrowRight")
        assert opened.evaluate(FOCUS) == image_id


def test_tab_leaves_the_page_at_its_end(opened):
    opened.evaluate("[...document.querySelectorAll('.card')].at(-1).focus()")
    opened.press("Tab")
    assert opened.evaluate(FOCUS) == ""


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_nothing_sticks_out(size, opened, world):
    opened.emulate(*size)
    opened.open(world.root / "out" / "report.html")
    assert opened.evaluate("document.documentElement.scrollWidth") == size[0]


def test_dark_mode_is_dark(opened, world):
    paper = "getComputedStyle(document.body).backgroundColor"
    plot = "document.querySelector('.plot img').currentSrc"
    light = opened.evaluate(paper), opened.evaluate(plot)
    opened.emulate(*DESKTOP, dark=True)
    opened.open(world.root / "out" / "report.html")
    dark = opened.evaluate(paper), opened.evaluate(plot)
    brightness = [sum(map(int, re.findall(r"\d+", colour))) / 3 for colour, _ in (light, dark)]
    assert brightness[0] > 200
    assert brightness[1] < 60
    assert light[1] != dark[1]


def test_sliders_change_size_and_colours(opened):
    width = "document.querySelector('.panels figure').getBoundingClientRect().width"
    opacity = "getComputedStyle(document.querySelector('.gray img')).opacity"
    before = opened.evaluate(width)
    for control, value in (("size", 20), ("strength", 0.25)):
        opened.evaluate(
            f"document.getElementById('{control}').value = {value};"
            f"document.getElementById('{control}').dispatchEvent(new Event('input'))"
        )
    assert opened.evaluate(width) > 1.5 * before
    assert opened.evaluate(opacity) == "0.25"


def test_without_masks_the_page_works_as_well(browser, world, tmp_path):
    shutil.copytree(world.root / "VOC" / "JPEGImages", tmp_path / "VOC" / "JPEGImages")
    for name in ("list.txt", "classes.txt"):
        shutil.copy(world.root / name, tmp_path / name)
    make_page(tmp_path, "")
    browser.messages.clear()
    browser.open(tmp_path / "out" / "report.html")
    assert sorted(browser.evaluate(SHOWN)) == sorted(IDS)
    assert browser.messages == []
