"""The page of voc12.report: tables, plots and a gallery, filled into report.html.jinja."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from tool.cam import BACKGROUND_SCORE
from tool.labels import VOID
from tool.run import cli
from voc12.devkit import BACKGROUND
from voc12.evaluate import figures
from voc12.report import plots
from voc12.report.data import CAM, WALK, Outputs, Scores, choose, read_log, score, sweep_cams
from voc12.report.pictures import (
    DIFFERENCES,
    class_colours,
    difference_layer,
    differences,
    heat_colours,
    heat_layer,
    label_layer,
    layer_uri,
    percents,
    photograph_uri,
    shares,
)

TEMPLATE = "report.html.jinja"
SCORE_COLUMNS = ("mIoU", "pixel accuracy", "background FP", "background FN", "images")
SCORE_NOTE = (
    "In per cent, over all pixels that are not void. False positives (FP) of the background are "
    "objects taken for it, its false negatives (FN) background taken for objects; with its IoU "
    "they add up to 100. Pseudo labels are scored on train and val, whose masks are official; "
    "those to train a segmenter with are made on train_aug."
)
SWEEP_WORDS = {"bg": "background score", "alpha": "alpha"}


class Panel(NamedTuple):
    """A picture of an image: its title, what is to be seen in numbers, and the data URI."""

    title: str
    words: str
    uri: str
    smooth: bool = False  # heat; labels are sharp


class Table(NamedTuple):
    """A table's columns after the first, its rows by title, and the note below."""

    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    note: str


class Plot(NamedTuple):
    """A figure's data URIs by theme, what it shows in words, and its caption."""

    uris: Mapping[str, str]
    alt: str
    caption: str


def page(
    outputs: Outputs, ids: Sequence[str], num_shown: int, list_path: str, log_paths: Sequence[str]
) -> bytes:
    """The page on a list of images, as an HTML file; the gallery shows so many of them."""
    logs = {path: read_log(path) for path in log_paths}
    class_names = outputs.devkit.class_names
    scores = score(outputs, ids)
    sweeps = sweep_cams(outputs, outputs.masked(ids)) if CAM in scores.confusion else {}
    results = {
        name: figures(confusion, scores.images, class_names)
        for name, confusion in scores.confusion.items()
    }
    shown = outputs.shown()
    iou = {image_id: scores.of_image(image_id).get(shown, math.nan) for image_id in ids}
    shown_ids = choose(iou, num_shown)
    num_scored = sum(not math.isnan(value) for value in iou.values())
    cards = [card(outputs, scores, image_id) for image_id in cli.progress(shown_ids, "pictures")]
    context = {
        "title": f"AffinityNet on {Path(list_path).stem}",
        "subtitle": subtitle(list_path, len(ids), scores.images),
        "scores": score_table(results, sweeps) if results else None,
        "confident": confident_table(scores) if outputs.la else None,
        "classes": class_table(results) if results else None,
        "class_plot": class_plot(results) if results else None,
        "thresholds": [threshold_plot(kind, result) for kind, result in sweeps.items()],
        "training": [loss_plot(path, losses) for path, losses in logs.items()],
        "note": gallery_note(num_scored, len(ids), len(cards)),
        "legend": legend(bool(results)),
        "heat": heat_scale() if outputs.cam else None,
        "counts": class_counts(cards),
        "cards": cards,
    }
    return render(context).encode()


def subtitle(list_path: str, num_ids: int, num_masks: int) -> str:
    """Which images the page is about."""
    masks = {0: "none of them with a mask", num_ids: "each with a mask"}
    return f"{num_ids} images of {list_path}, {masks.get(num_masks, f'{num_masks} with a mask')}"


def class_counts(cards: Sequence[Mapping]) -> dict[int, tuple[str, int]]:
    """For each label of the gallery its class and the number of images, by label."""
    chips = [chip for card in cards for chip in card["chips"]]
    counts = Counter((chip["label"], chip["name"]) for chip in chips)
    return {label: (name, counts[label, name]) for label, name in sorted(counts)}


def render(context: Mapping) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # ids and class names may be anybody's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(TEMPLATE).render(context)


def percent(value: float | None) -> str:
    """A figure in per cent for people; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def label_names(class_names: Sequence[str]) -> dict[int, str]:
    """What each label of an index image is called, void apart."""
    return dict(enumerate((BACKGROUND, *class_names)))


def card(outputs: Outputs, scores: Scores, image_id: str) -> dict:
    """What the gallery shows of an image: its photograph, panels, scores and classes."""
    devkit = outputs.devkit
    names = label_names(devkit.class_names)
    photograph = devkit.load_image(image_id)
    size = photograph.height, photograph.width
    cams = outputs.cams(image_id, size) if outputs.cam else {}
    panels = [cam_panel(names[index + 1], values) for index, values in cams.items()]
    labels = {index + 1 for index in cams}
    if outputs.la:
        confident = outputs.confident(image_id, size)
        panels.append(label_panel("confident labels", confident, {**names, VOID: "ignored"}))
    prediction, shown = None, outputs.shown()
    if shown:
        prediction = outputs.predictions()[shown](image_id, size)
        panels.append(label_panel(shown, prediction, names))
        labels |= set(np.unique(prediction).tolist())
    mask = outputs.mask(image_id, size)
    if mask is not None:
        panels.append(label_panel("mask", mask, {**names, VOID: "void"}))
        labels |= set(np.unique(mask).tolist())
        if prediction is not None:
            panels.append(difference_panel(mask, prediction))

    colours = class_colours()
    iou = scores.iou.get(image_id, {}).get(shown)
    chips = [
        {
            "label": label,
            "name": names[label],
            "colour": css_colour(colours[label]),
            "iou": None if iou is None or math.isnan(iou[label]) else 100 * float(iou[label]),
        }
        for label in sorted(labels - {0, VOID})
    ]
    of_image = scores.of_image(image_id)
    return {
        "id": image_id,
        "width": photograph.width,
        "height": photograph.height,
        "photograph": photograph_uri(photograph),
        "panels": panels,
        "chips": chips,
        "scores": of_image,
        "iou": of_image.get(shown, math.nan),
    }


def cam_panel(name: str, values: np.ndarray) -> Panel:
    """A class's map as heat, and how much of it a label would take."""
    words = f"{percents(np.mean(values > BACKGROUND_SCORE))} above {BACKGROUND_SCORE:g}"
    return Panel(f"CAM of {name}", words, layer_uri(heat_layer(values), smooth=True))


def label_panel(title: str, label: np.ndarray, names: Mapping[int, str]) -> Panel:
    """An index image and the shares of its labels."""
    return Panel(title, shares(label, names), layer_uri(label_layer(label)))


def difference_panel(mask: np.ndarray, prediction: np.ndarray) -> Panel:
    """Where a prediction is right or wrong."""
    difference = differences(mask, prediction)
    kinds = {kind: name for kind, (name, _) in DIFFERENCES.items()}
    return Panel("differences", shares(difference, kinds), layer_uri(difference_layer(difference)))


def css_colour(colour: Sequence[int]) -> str:
    """An RGB colour, 0..255, for a style sheet."""
    red, green, blue = map(int, colour)
    return f"rgb({red} {green} {blue})"


def score_table(results: Mapping[str, dict], sweeps: Mapping[str, dict]) -> Table:
    """The figures over all images that have a mask: of CAMs with several backgrounds, of the walk.

    ``results`` and ``sweeps`` are what voc12.evaluate makes, by prediction and kind of background.
    """
    scored = {}
    if CAM in results:
        scored[f"CAM, background score {BACKGROUND_SCORE:g}"] = results[CAM]
    for kind, result in sweeps.items():
        scored[f"CAM, best {SWEEP_WORDS[kind]}: {result['best'][kind]:g}"] = result["best"]
    if WALK in results:
        scored[WALK] = results[WALK]
    rows = {
        title: [
            percent(result["miou"]),
            percent(result["pixel_accuracy"]),
            percent(result["background"]["false_positives_percent"]),
            percent(result["background"]["false_negatives_percent"]),
            str(result["images"]),
        ]
        for title, result in scored.items()
    }
    return Table(SCORE_COLUMNS, rows, SCORE_NOTE)


def confident_table(scores: Scores) -> Table:
    """How much of all images the confident labels cover, and how far they are right."""
    share = 100 * scores.confident / scores.confident.sum()
    right = 100 * scores.right / scores.compared if scores.compared else None
    cells = [share[1:VOID].sum(), share[0], share[VOID], right]
    return Table(
        ["classes", "background", "ignored", "right"],
        {"confident labels": [percent(cell) for cell in cells]},
        "Per cent of all pixels; right: of the labelled ones that the masks label, too.",
    )


def class_table(results: Mapping[str, dict]) -> Table:
    """The IoU of each label that occurs, by prediction; the last one's precision and recall."""
    last = list(results.values())[-1]
    columns = {f"IoU, {name}": result["per_class"] for name, result in results.items()}
    columns |= {"precision": last["precision"], "recall": last["recall"]}
    rows = {
        name: [percent(values[name]) for values in columns.values()] for name in occurring(results)
    }
    absent = len(last["per_class"]) - len(rows)
    note = f"CAM: with a background score of {BACKGROUND_SCORE:g}. " if CAM in results else ""
    note += f"Precision and recall: {list(results)[-1]}."
    if absent:
        note += f" Classes neither in the masks nor predicted: {absent}."
    return Table(list(columns), rows, note)


def occurring(results: Mapping[str, dict]) -> list[str]:
    """The names of the labels that masks or predictions hold."""
    names = next(iter(results.values()))["per_class"]
    return [
        name
        for name in names
        if any(result["per_class"][name] is not None for result in results.values())
    ]


def class_plot(results: Mapping[str, dict]) -> Plot:
    """The class table's IoU as bars."""
    names = occurring(results)
    series = {
        title: np.array([result["per_class"][name] for name in names], np.float64)
        for title, result in results.items()
    }
    uris = plots.svg_uris(plots.iou_bars, names, series)
    return Plot(uris, "Bars of each class's IoU, as in the table.", "IoU of each class in per cent")


def threshold_plot(kind: str, result: dict) -> Plot:
    """The mIoU of a sweep's thresholds."""
    points = np.array([(point[kind], point["miou"]) for point in result["points"]])
    best = result["best"][kind], result["best"]["miou"]
    uris = plots.svg_uris(plots.threshold_curve, plots.Curve(*points.T), best, SWEEP_WORDS[kind])
    words = f"mIoU of the CAMs over the {SWEEP_WORDS[kind]}: best {best[1]:.1f} % at {best[0]:g}"
    return Plot(uris, f"Curve of the {words}.", words)


def loss_plot(path: str, losses: Mapping[str, plots.Curve]) -> Plot:
    """A training's losses over its steps."""
    words = ", ".join(
        f"{name} from {curve.y[0]:.3f} to {curve.y[-1]:.3f}" for name, curve in losses.items()
    )
    steps = max(int(curve.x[-1]) for curve in losses.values())
    uris = plots.svg_uris(plots.loss_curves, losses)
    caption = f"{Path(path).name}, {steps} steps: {words}"
    return Plot(uris, f"Curves of the losses in {caption}.", caption)


def heat_scale() -> str:
    """The colours of heat from 0 to 1, for a style sheet's gradient."""
    return ", ".join(map(css_colour, heat_colours()[::51, :3]))


def legend(with_differences: bool) -> dict[str, str]:
    """What the colours mean that are no class's."""
    kinds = DIFFERENCES.values() if with_differences else ()
    return {"void or ignored": "black", **{name: css_colour(colour) for name, colour in kinds}}


def gallery_note(num_scored: int, num_ids: int, num_cards: int) -> str:
    """Which images the gallery shows (as ``choose`` does), and what their scores are."""
    ends = num_cards // 3
    if num_cards == num_ids:
        words = f"All {num_ids} images of the list."
    elif num_scored >= num_cards:
        words = (
            f"{num_cards} of {num_scored} images with a score: the {ends} worst, the {ends} best, "
            "and evenly those between."
        )
    else:
        words = (
            f"{num_cards} of {num_ids} images: {num_scored} with a score, the others evenly from "
            "the list."
        )
    if num_scored:
        words += (
            " The IoU of an image is the mean over the labels, background among them, that its "
            "mask or its prediction holds."
        )
    return words
