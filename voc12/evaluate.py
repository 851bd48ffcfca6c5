"""Scores predictions or class maps against a devkit's masks: IoU, precision, recall, thresholds.

    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --pred RW --json rw.json
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --cam CAM --bg 0.2
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --cam CAM --alpha 16 --crf
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/train.txt --cam CAM
        --sweep bg --json sweep.json --csv sweep.csv --plot sweep.png

One confusion matrix over all pixels of all images whose mask is not 255; means are over the labels
that occur in masks or predictions (on VOC's full splits, all of them). --json writes percentages,
null where a label does not occur:
    {"miou", "pixel_accuracy", "images", "missing", "per_class": {name: IoU},
     "precision": {name: %}, "recall": {name: %},
     "background": {"false_positives", "false_negatives" (pixels: objects taken for background,
                    background taken for objects), and each "..._percent" of the union, so that
                    the background's IoU and the two add up to 100}}
A sweep scores the maps at every threshold (--sweep bg: 0, 0.01, ... 0.6; --sweep alpha: 1, 2, ...
64) in one pass over the files, exactly as --bg and --alpha do one by one. Its --json is
    {"sweep", "images", "missing", "points": [{"bg" or "alpha", "miou", "per_class"}, ...],
     "best": {"bg" or "alpha", and all the figures above}}
"""

import argparse
import csv
import functools
import importlib.util
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from tool import metrics
from tool.cam import BACKGROUND_SCORE, fixed_background_and_maps
from tool.crf import background_and_maps, dense_crf
from tool.files import atomic_write
from tool.labels import index_image
from tool.maps import load_cams, load_index_png, maps_file, stack_maps
from tool.run import cli
from tool.run.errors import DataError, UsageError
from tool.run.loading import in_batches, load
from voc12.devkit import (
    BACKGROUND,
    Devkit,
    add_devkit_arguments,
    open_devkit,
    read_ids,
    require_files,
)

# The thresholds of --sweep, ascending.
SWEEPS = {
    "bg": tuple(step / 100 for step in range(61)),
    "alpha": tuple(float(alpha) for alpha in range(1, 65)),
}
IMAGES_AT_ONCE = 4  # that a process counts before it hands its counts over


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m voc12.evaluate", description=__doc__, formatter_class=cli.help_formatter
    )
    add = parser.add_argument
    add_devkit_arguments(parser, labels=False)
    add("--list", required=True, help="images to score")
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--pred", metavar="DIR", help="index images <id>.png, palette or gray")
    scored.add_argument("--cam", metavar="DIR", help="maps <id>.npy, made labels with a background")
    add("--gt", metavar="DIR", help="masks <id>.png (default: the devkit's SegmentationClass)")
    background = parser.add_mutually_exclusive_group()
    background.add_argument(
        "--bg",
        type=cli.number(float, 0, 1),
        help="constant background score for --cam (default: 0.2)",
    )
    background.add_argument(
        "--alpha",
        type=cli.number(float, 0, above=True),
        help="background (1 - max score)^alpha for --cam",
    )
    background.add_argument(
        "--sweep", choices=sorted(SWEEPS), help="score --cam at every threshold of this kind"
    )
    add(
        "--crf",
        action="store_true",
        help="score --cam after the dense CRF, whose input are the maps and the background that "
        "--bg or --alpha gives (about a third of a second an image and core)",
    )
    cli.add_crf_argument(parser)
    add(
        "--allow_missing",
        action="store_true",
        help="score what there is and count what is missing; without it, a missing file is an "
        "error",
    )
    add("--json", metavar="FILE", help="write the figures there, too")
    add("--csv", metavar="FILE", help="write the --sweep there as a table")
    add("--plot", metavar="FILE.png", help="draw the --sweep there")
    add(
        "--num_workers",
        type=cli.number(int, 0),
        default=cli.usable_cores(),
        help="processes that read and count; 0 counts in the program itself",
    )
    return parser


class Background(NamedTuple):
    """How maps get a background to compete with: a constant ("bg"), or by "alpha"."""

    kind: str
    value: float

    def with_maps(self, maps: np.ndarray) -> np.ndarray:
        """[background, the maps]: K x H x W -> float32 (K + 1) x H x W."""
        if self.kind == "alpha":
            return background_and_maps(maps, self.value)
        return fixed_background_and_maps(maps, self.value)


def winning_score(background: Background) -> np.float32:
    """The smallest score in 0..1 of a map that the background loses to.

    By bisection over the float32 numbers with the very comparison that makes labels, so that a
    sweep rounds as a plain evaluation does. A score of 0 never wins, one of 1 always, as the
    thresholds of sweeps are below 1.
    """
    loses, wins = np.float32([0, 1]).view(np.int32)  # the order of positive floats is their bits'
    while wins - loses > 1:
        middle = (loses + wins) // 2
        score = np.array(middle, np.int32).view(np.float32).reshape(1, 1, 1)
        if background.with_maps(score).argmax(axis=0).item():
            wins = middle
        else:
            loses = middle
    return np.array(wins, np.int32).view(np.float32)[()]


@dataclass
class Scorer:
    """Counts the pixels of one image at a time, true label by predicted."""

    devkit: Devkit
    masks: Path  # folder of <id>.png
    scored: Path  # folder of <id>.png or <id>.npy

    @property
    def num_labels(self) -> int:
        return len(self.devkit.class_names) + 1

    def mask(self, image_id: str) -> np.ndarray:
        return load_index_png(self.masks / f"{image_id}.png")

    def maps(
        self, image_id: str, size: tuple[int, int], background_kind: str
    ) -> tuple[np.ndarray, list[int]]:
        """An image's class maps, float32 K x H x W, and their classes."""
        path = self.scored / f"{image_id}.npy"
        maps = load_cams(path, size, self.num_labels - 1)
        stacked = stack_maps(maps, size)
        if background_kind == "alpha" and stacked.max(initial=0) > 1:
            raise DataError(
                f"{path}: has scores above 1, of which --alpha can make no background; divide "
                "each map by its maximum, or use --bg."
            )
        return stacked, list(maps)

    def count_labels(self, image_id: str) -> np.ndarray:
        """The confusion matrix of an index image."""
        prediction = load_index_png(self.scored / f"{image_id}.png")
        return metrics.confusion_matrix(self.mask(image_id), prediction, self.num_labels)

    def count_maps(
        self, image_id: str, background: Background, crf_backend: str | None
    ) -> np.ndarray:
        """The confusion matrix of the label that class maps give, through a CRF or none."""
        mask = self.mask(image_id)
        maps, classes = self.maps(image_id, mask.shape, background.kind)
        scores = background.with_maps(maps)
        if crf_backend:
            photograph = np.array(self.devkit.load_image(image_id))
            if photograph.shape[:2] != mask.shape:
                raise ValueError("photograph and mask differ in size")
            (scores,) = dense_crf(photograph, [scores], backend=crf_backend)
        prediction = index_image(scores.argmax(axis=0), classes)
        return metrics.confusion_matrix(mask, prediction, self.num_labels)

    def count_sweep(self, image_id: str, kind: str, winning_scores: np.ndarray) -> np.ndarray:
        """The histogram over thresholds that ``metrics.sweep_histogram`` makes."""
        mask = self.mask(image_id)
        maps, classes = self.maps(image_id, mask.shape, kind)
        if not classes:
            maps, classes = np.zeros((1, *mask.shape), np.float32), [0]  # a score of 0 never wins
        winner = index_image(maps.argmax(axis=0) + 1, classes)
        score = maps.max(axis=0)
        return metrics.sweep_histogram(mask, winner, score, winning_scores, self.num_labels)


class _Counts(Dataset):
    """The counts of each image; an error names the image."""

    def __init__(self, ids: Sequence[str], count: Callable[[str], np.ndarray]):
        self.ids = ids
        self.count = count

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return self.count(self.ids[index])
        except ValueError as error:
            raise DataError(f"{self.ids[index]}: {error}.") from error


def _number_and_sum(counts: Sequence[np.ndarray]) -> tuple[int, np.ndarray]:
    return len(counts), sum(counts)


def total_counts(
    ids: Sequence[str], count: Callable[[str], np.ndarray], num_workers: int
) -> np.ndarray:
    """The sum of the counts of the images, which ``num_workers`` processes share among them."""
    dataset = _Counts(ids, count)
    num_workers = min(num_workers, math.ceil(len(ids) / IMAGES_AT_ONCE))
    batches = in_batches(range(len(ids)), IMAGES_AT_ONCE)
    total: np.ndarray | int = 0
    with (
        load(dataset, batches, num_workers, _number_and_sum) as loaded,
        cli.progress(None, "evaluate", total=len(ids)) as bar,
    ):
        for number, counts in loaded:
            total = total + counts
            bar.update(number)
    return total


def figures(confusion: np.ndarray, num_images: int, class_names: Sequence[str]) -> dict:
    """What --json holds, "missing" apart: percentages, None for a label that does not occur."""
    names = (BACKGROUND, *class_names)

    def by_name(shares: np.ndarray) -> dict[str, float | None]:
        return {
            name: None if math.isnan(share) else 100 * float(share)
            for name, share in zip(names, shares, strict=True)
        }

    return {
        "miou": 100 * metrics.mean_iou(confusion),
        "pixel_accuracy": 100 * metrics.pixel_accuracy(confusion),
        "images": num_images,
        "per_class": by_name(metrics.intersection_over_union(confusion)),
        "precision": by_name(metrics.precision(confusion)),
        "recall": by_name(metrics.recall(confusion)),
        "background": background_errors(confusion),
    }


def background_errors(confusion: np.ndarray) -> dict[str, float]:
    """Pixels of objects taken for background (its false positives), and of background for objects.

    Each also in per cent of the background's union: with its IoU, they add up to 100.
    """
    false_positives = int(confusion[1:, 0].sum())
    false_negatives = int(confusion[0, 1:].sum())
    union = int(confusion[0, 0]) + false_positives + false_negatives
    return {
        "false_positives": false_positives,
        "false_negatives": false_negatives,
        "false_positives_percent": 100 * false_positives / union if union else 0.0,
        "false_negatives_percent": 100 * false_negatives / union if union else 0.0,
    }


def table(result: dict) -> str:
    """The figures for people."""

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else format(value, '.1f'):>10}"

    columns = ("per_class", "precision", "recall")
    rows = [f"{'label':<16}{'IoU':>10}{'precision':>10}{'recall':>10}"]
    for name in result["per_class"]:
        rows.append(f"{name:<16}" + "".join(cell(result[column][name]) for column in columns))
    background = result["background"]
    rows += [
        f"background: {background['false_positives_percent']:.1f} % false positives (objects taken "
        f"for it), {background['false_negatives_percent']:.1f} % false negatives",
        f"{'pixel accuracy':<16}{cell(result['pixel_accuracy'])}",
        f"{'mIoU':<16}{cell(result['miou'])}   over {result['images']} images"
        + (f", {result['missing']} missing" if result["missing"] else ""),
    ]
    return "\n".join(rows)


def sweep(scorer: Scorer, ids: Sequence[str], kind: str, num_workers: int) -> np.ndarray:
    """The confusion matrices at the thresholds of ``SWEEPS[kind]``: int64 x labels x labels."""
    winning = np.array([winning_score(Background(kind, value)) for value in SWEEPS[kind]])
    # The histogram wants them ascending: of alphas, the largest needs the smallest score.
    order = np.argsort(winning, kind="stable")
    count = functools.partial(scorer.count_sweep, kind=kind, winning_scores=winning[order])
    histogram = total_counts(ids, count, num_workers)
    return metrics.confusions_of_sweep(histogram)[np.argsort(order)]


def sweep_figures(
    kind: str, confusions: np.ndarray, num_images: int, class_names: Sequence[str]
) -> dict:
    """What --json holds of a sweep, "missing" apart; the best is the first of the largest mIoU."""
    scored = [
        {kind: value, **figures(confusion, num_images, class_names)}
        for value, confusion in zip(SWEEPS[kind], confusions, strict=True)
    ]
    return {
        "sweep": kind,
        "images": num_images,
        "points": [{key: point[key] for key in (kind, "miou", "per_class")} for point in scored],
        "best": max(scored, key=lambda point: point["miou"]),
    }


def sweep_table(result: dict) -> str:
    """The mIoU at every threshold for people, the best one marked, and its figures."""
    kind, best = result["sweep"], result["best"]
    rows = [f"{kind:>6}{'mIoU':>8}"]
    for point in result["points"]:
        mark = "  <- best" if point[kind] == best[kind] else ""
        rows.append(f"{point[kind]:>6g}{point['miou']:>8.2f}{mark}")
    return "\n".join([*rows, "", f"at {kind} {best[kind]:g}:", table(best)])


def sweep_csv(result: dict) -> str:
    """A line a threshold: its mIoU, the IoU of each class, and whether it is the best."""
    kind, best = result["sweep"], result["best"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([kind, "miou", "best", *best["per_class"]])
    for point in result["points"]:
        marked = int(point[kind] == best[kind])
        writer.writerow([point[kind], point["miou"], marked, *point["per_class"].values()])
    return text.getvalue()


def sweep_plot(result: dict):
    """A matplotlib figure of mIoU over the thresholds, the best one marked."""
    from matplotlib.figure import Figure

    kind, best = result["sweep"], result["best"]
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    values = [point[kind] for point in result["points"]]
    axis.plot(values, [point["miou"] for point in result["points"]])
    axis.plot(best[kind], best["miou"], "o", label=f"best: {best['miou']:.1f} at {best[kind]:g}")
    title = {"bg": "background score", "alpha": "alpha of the background (1 - max score)^alpha"}
    axis.set(xlabel=title[kind], ylabel="mIoU (%)", title=f"{result['images']} images")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go together, DataError if there is no matplotlib."""
    given = [
        flag for flag in ("bg", "alpha", "sweep", "crf") if getattr(args, flag) not in (None, False)
    ]
    if args.pred and given:
        raise UsageError(f"--{given[0]} makes labels of --cam; --pred holds labels already.")
    if args.crf and args.sweep:
        raise UsageError(
            "--crf does not go with --sweep: each threshold would need a CRF of its own; name "
            "one with --bg or --alpha."
        )
    if not args.sweep and (args.csv or args.plot):
        raise UsageError("--csv and --plot show a --sweep.")
    if args.plot and not args.plot.endswith(".png"):
        raise UsageError(f"--plot {args.plot}: must end in .png.")
    inputs = {"--list": args.list, "--classes": args.classes}
    cli.require_distinct_outputs(output_files(args), inputs)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise DataError("--plot needs matplotlib: pip install matplotlib.")


def present_ids(args: argparse.Namespace, ids: Sequence[str]) -> list[str]:
    """The images that can be scored; raises DataError if there is none, or not --allow_missing."""
    folder, suffix, hint = (
        (args.pred, ".png", "infer_aff.py --out_rw makes them")
        if args.pred
        else (args.cam, ".npy", "infer_cls.py --out_cam makes them")
    )
    if args.allow_missing:
        paths = {image_id: maps_file(Path(folder, image_id + suffix)) for image_id in ids}
        present = [image_id for image_id in ids if paths[image_id].is_file()]
        if present:
            return present
    require_files(folder, ids, suffix, hint)
    return list(ids)


def background_of(args: argparse.Namespace) -> Background:
    """The background that --bg or --alpha asks for; the released code's where neither does."""
    if args.alpha is not None:
        return Background("alpha", args.alpha)
    return Background("bg", BACKGROUND_SCORE if args.bg is None else args.bg)


def counter(args: argparse.Namespace, scorer: Scorer) -> Callable[[str], np.ndarray]:
    """What counts an image for a plain evaluation."""
    if args.pred:
        return scorer.count_labels
    crf_backend = args.crf_backend if args.crf else None
    return functools.partial(
        scorer.count_maps, background=background_of(args), crf_backend=crf_backend
    )


def require_labelled_pixels(args: argparse.Namespace, counts: np.ndarray) -> None:
    """Raise DataError if nothing was counted."""
    if not counts.any():
        raise DataError(f"{args.list}: not one pixel of its masks is labelled, nothing to score.")


def output_files(args: argparse.Namespace) -> dict[str, str | None]:
    """The files to write, by flag."""
    return {"--json": args.json, "--csv": args.csv, "--plot": args.plot}


def write_outputs(args: argparse.Namespace, result: dict) -> None:
    """Write the files that were asked for."""
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    if args.csv:
        write_text(args.csv, sweep_csv(result))
    if args.plot:
        with atomic_write(args.plot) as file:
            sweep_plot(result).savefig(file, format="png")


def write_text(path: str, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    devkit = open_devkit(args)
    for flag, path in output_files(args).items():
        devkit.require_output(flag, path)
    ids = list(dict.fromkeys(read_ids(args.list)))  # an image counts once
    present = present_ids(args, ids)
    missing = len(ids) - len(present)
    masks = Path(args.gt) if args.gt else devkit.root / "SegmentationClass"
    require_files(masks, present, ".png", "--voc12_root or --gt, and the list must belong together")
    scorer = Scorer(devkit, masks, Path(args.pred or args.cam))

    if args.sweep:
        confusions = sweep(scorer, present, args.sweep, args.num_workers)
        require_labelled_pixels(args, confusions)
        result = sweep_figures(args.sweep, confusions, len(present), devkit.class_names)
        result["best"]["missing"] = missing
    else:
        confusion = total_counts(present, counter(args, scorer), args.num_workers)
        require_labelled_pixels(args, confusion)
        result = figures(confusion, len(present), devkit.class_names)
    result["missing"] = missing
    print(sweep_table(result) if args.sweep else table(result))
    write_outputs(args, result)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
