"""The report's page, which fills report.html.jinja, and its sheet of pictures."""

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from tool.cam import BACKGROUND_SCORE
from tool.labels import VOID
from tool.run import cli
from voc12.evaluate import SWEEPS, Scorer, percent, sweep, sweep_figures, sweep_plot
from voc12.report import pictures
from voc12.report.data import CAM, Example, Outputs, choose, read_log, score

# The salt makes equal runs give equal bytes.
PLOT_STYLE = ("seaborn-v0_8-whitegrid", "seaborn-v0_8-colorblind", {"svg.hashsalt": "report"})
HEAT_COLOURS = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]  # uint8 256 x 3


def page(
    outputs: Outputs, ids: Sequence[str], num_shown: int, list_path: str, log_paths: Sequence[str]
) -> bytes:
    """The page on a list of images as an HTML file; its gallery shows ``num_shown`` of them."""
    names = outputs.devkit.label_names
    masked = [image_id for image_id in ids if outputs.devkit.mask_path(image_id).is_file()]
    losses = {path: read_log(path) for path in log_paths}
    results, iou = score(outputs, masked)
    outputs.devkit.require_classes(map(outputs.devkit.mask_path, masked))
    columns = {f"IoU, {name}": result["per_class"] for name, result in results.items()}
    columns |= {key: last(results)[key] for key in ("precision", "recall") if results}
    with matplotlib.style.context(PLOT_STYLE):
        best, curves = sweep_cams(outputs, masked) if CAM in results else ({}, {})
        curves |= {f"losses of {path}": svg_uri(loss_plot(read)) for path, read in losses.items()}
    ranking = {image_id: mean(last(iou.get(image_id, {}))) for image_id in ids}
    cards = [
        card(outputs.load(image_id), iou.get(image_id, {}), names)
        for image_id in cli.progress(choose(ranking, num_shown), "pictures")
    ]
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    # Names may be anybody's: they are escaped.
    template = jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = template.render(
        percent=percent,
        list_path=Path(list_path),
        num_images=len(ids),
        num_masked=len(masked),
        background_score=BACKGROUND_SCORE,
        score_rows={title: score_row(result) for title, result in (results | best).items()},
        class_columns=["class", *columns],
        class_rows={name: [column[name] for column in columns.values()] for name in names},
        curves=curves,
        legend={"void or ignored": (0, 0, 0)} | pictures.DIFFERENCES,
        names=names,
        colours=pictures.CLASS_COLOURS,
        counts=sorted(Counter(label for shown in cards for label in shown["labels"]).items()),
        cards=cards,
    )
    return html.encode()


def score_row(result: Mapping) -> list[float]:
    """What the table of scores shows of a prediction's figures."""
    background = result["background"]
    errors = [background[f"false_{kind}_percent"] for kind in ("positives", "negatives")]
    return [result["miou"], result["pixel_accuracy"], *errors, result.get("labelled", 100)]


def last(values: Mapping) -> Any:
    """The last of a dict's values, None where it is empty."""
    return next(reversed(values.values()), None)


def mean(iou: np.ndarray | None) -> float:
    """An image's mean IoU over the labels that occur; NaN if there is none."""
    return math.nan if iou is None or np.isnan(iou).all() else float(np.nanmean(iou))


def sweep_cams(outputs: Outputs, ids: Sequence[str]) -> tuple[dict[str, dict], dict[str, str]]:
    """The CAMs' figures at the best background score and alpha, and the curves as data URIs."""
    devkit, best, curves = outputs.devkit, {}, {}
    masks, cams = devkit.root / "SegmentationClass", Path(outputs.folders["cam"])
    scorer = Scorer(devkit, masks, cams, outputs.normalization)
    for kind, name in (("bg", "background score"), ("alpha", "alpha")):
        confusions = sweep(scorer, ids, kind, cli.default_num_workers())
        points = [{kind: value} for value in SWEEPS[kind]]
        result = sweep_figures(points, confusions, len(ids), devkit.label_names)
        best[f"{CAM}, best {name}: {result['best'][kind]:g}"] = result["best"]
        curves[f"{CAM}, mIoU over the {name}"] = svg_uri(sweep_plot(result))
    return best, curves


def loss_plot(losses: Mapping[str, np.ndarray]) -> Figure:
    """A figure of curves {loss: points (step, loss), N x 2}."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for name, points in losses.items():
        axes.plot(*points.T, label=name)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)
    return figure


def svg_uri(figure: Figure) -> str:
    """The figure in the size of the page's plots, as a data URI."""
    buffer = io.BytesIO()
    figure.set_size_inches(5.4, 2.9)
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return pictures.data_uri("image/svg+xml", buffer.getvalue())


def card(example: Example, iou: Mapping[str, np.ndarray], names: Sequence[str]) -> dict:
    """What the gallery shows of an image; ``iou`` is by prediction, ``names`` are the labels'."""
    layers = {
        f"CAM of {names[k + 1]}": pictures.heat_layer(values, HEAT_COLOURS)
        for k, values in example.cams.items()
    }
    layers |= {title: pictures.label_layer(label) for title, label in example.labels.items()}
    prediction, label_iou = last(example.predictions), last(iou)
    if example.mask is not None and prediction is not None:
        layers["differences"] = pictures.difference_layer(example.mask, prediction)
    labels = {k + 1 for k in example.cams}.union(*map(np.unique, example.labels.values()))
    return {
        "id": example.image_id,
        "size": example.photograph.size,
        "photograph": pictures.image_uri(example.photograph),
        "panels": {title: pictures.image_uri(layer) for title, layer in layers.items()},
        "means": [f"{name} {percent(mean(values))}" for name, values in iou.items()],
        "mean": mean(label_iou),
        "labels": {int(k): label_iou[k] if iou else math.nan for k in sorted(labels - {0, VOID})},
    }


def sheet(examples: Iterable[Example]) -> bytes:
    """A PNG file with a row per image: the photograph, and the outputs stage by stage."""
    rows = []
    for example in examples:
        gray = example.photograph.convert("L").convert("RGB")
        colours = pictures.CLASS_COLOURS[1:]
        heat = [pictures.heat_layer(cam, colours[k]) for k, cam in example.cams.items()]
        layers = {"class activation maps": heat} if CAM in example.predictions else {}
        layers |= {title: [pictures.label_layer(label)] for title, label in example.labels.items()}
        row = [pictures.panel(gray, title, over) for title, over in layers.items()]
        rows.append([pictures.panel(example.photograph, "image"), *row])
    buffer = io.BytesIO()
    pictures.grid(rows).save(buffer, "PNG")
    return buffer.getvalue()
