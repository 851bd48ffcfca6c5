"""The plots of voc12.report: each a matplotlib figure, for a light page or a dark one."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from voc12.report.pictures import data_uri

# Okabe and Ito's colours, which everybody tells apart, those first that the page lets stand out.
SERIES = {
    "light": ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    "dark": ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2"),
}
INK = {"light": "#3b4252", "dark": "#c8ced9"}
GRID = {"light": "#d5dae3", "dark": "#3a414d"}
STYLE = {
    "svg.fonttype": "none",  # the reader's fonts, which may know more letters
    "svg.hashsalt": "voc12.report",  # equal runs, equal bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a class may be called $x$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.transparent": True,
}
MAX_POINTS = 400  # of a curve; more do not show
CURVE_INCHES = (5.4, 2.9)
BAR_INCHES = 0.14  # height of one bar


class Curve(NamedTuple):
    """A line: x and y of its points, float arrays."""

    x: np.ndarray
    y: np.ndarray


@contextmanager
def style(theme: str) -> Iterator[None]:
    """matplotlib's settings for a ``light`` or a ``dark`` page."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colours = {**dict.fromkeys(inked, INK[theme]), "grid.color": GRID[theme]}
    colours["axes.prop_cycle"] = matplotlib.cycler(color=SERIES[theme])
    with matplotlib.rc_context({**STYLE, **colours}):
        yield


def svg_uris(draw, *args) -> dict[str, str]:
    """The figure that ``draw(*args)`` makes as an SVG data URI, for each theme."""
    uris = {}
    for theme in INK:
        with style(theme):
            buffer = io.BytesIO()
            draw(*args).savefig(buffer, format="svg", metadata={"Date": None})
        uris[theme] = data_uri("image/svg+xml", buffer.getvalue())
    return uris


def iou_bars(names: Sequence[str], series: Mapping[str, Sequence[float]]) -> Figure:
    """Bars of the labels' IoU in per cent, a bar for each series; NaN has none."""
    rows = len(names) * (len(series) + 0.8)
    figure = Figure(figsize=(CURVE_INCHES[0], 0.9 + BAR_INCHES * rows), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(series)
    places = np.arange(len(names))
    for number, (title, values) in enumerate(series.items()):
        axes.barh(places + (number - (len(series) - 1) / 2) * height, values, height, label=title)
    axes.set_yticks(places, names)
    axes.set(xlabel="IoU in %", xlim=(0, 100))
    axes.set_ylim(len(names) - 0.4, -0.6)  # from the top down
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper right", ncols=len(series))
    return figure


def loss_curves(losses: Mapping[str, Curve]) -> Figure:
    """The losses of a training over its steps; a curve with few points shows them."""
    figure = Figure(figsize=CURVE_INCHES, layout="constrained")
    axes = figure.subplots()
    for name, curve in losses.items():
        thinned = thin(curve)
        marker = "o" if len(thinned.x) <= 50 else None
        axes.plot(thinned.x, thinned.y, marker=marker, markersize=3, label=name)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(ncols=2)
    return figure


def threshold_curve(curve: Curve, best: tuple[float, float], xlabel: str) -> Figure:
    """mIoU in per cent over a threshold, with the best point marked."""
    figure = Figure(figsize=CURVE_INCHES, layout="constrained")
    axes = figure.subplots()
    (line,) = axes.plot(*curve)
    axes.plot(*best, "o", color=line.get_color())
    axes.annotate(f"{best[1]:.1f}", best, (0, 6), textcoords="offset points", ha="center")
    axes.set(xlabel=xlabel, ylabel="mIoU in %")
    axes.margins(y=0.15)
    return figure


def thin(curve: Curve) -> Curve:
    """At most ``MAX_POINTS`` points: means over runs of neighbours."""
    runs = -(-len(curve.x) // MAX_POINTS)
    if runs <= 1:
        return curve
    starts = np.arange(0, len(curve.x), runs)
    lengths = np.diff([*starts, len(curve.x)])
    return Curve(*(np.add.reduceat(values, starts) / lengths for values in curve))
