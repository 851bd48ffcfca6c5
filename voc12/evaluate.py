"""Scores predictions or class maps against a devkit's masks: IoU, precision, recall, thresholds.

    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --pred RW --json rw.json
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --cam CAM --bg 0.2
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/val.txt --cam CAM --alpha 16 --crf
    python3 -m voc12.evaluate --voc12_root VOC2012 --list voc12/train.txt --cam CAM
        --sweep bg --json sweep.json --csv sweep.csv --plot sweep.png

One confusion matrix counts all pixels of all images whose mask is not 255; means are over the
labels that occur in masks or predictions (on VOC's full splits, all of them). --json writes
percentages, null where a label does not occur:
    {"miou", "pixel_accuracy", "images", "missing", "per_class": {name: IoU},
     "precision": {name: %}, "recall": {name: %},
     "background": {"false_positives", "false_negatives" (pixels: objects predicted as background,
                    background predicted as objects), and each "..._percent" of the union, so that
                    the background's IoU and the two add up to 100}}
A sweep scores the maps at every threshold (--sweep bg: 0, 0.01, ... 0.6; --sweep alpha: 1, 2, ...
64) in one pass over the files, with exactly the results of --bg and --alpha. Its --json is
    {"sweep", "images", "missing", "points": [{"bg" or "alpha", "miou", "per_class"}, ...],
     "best": {"bg" or "alpha", and all the figures above}}
"""

import argparse
import csv
import functools
import io
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from tool import metrics
from tool.cam import BACKGROUND_SCORE, fixed_background_and_maps
from tool.crf import background_and_maps, dense_crf
from tool.files import atomic_write, write_bytes, write_json
from tool.labels import index_image
from tool.maps import SizeError, load_cams, load_index_png, maps_file, stack_maps
from tool.run import cli
from tool.run.errors import DataError, UsageError
from tool.run.loading import load
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids, require_files

# How maps K x H x W and a threshold become (K + 1) x H x W scores, background first.
BACKGROUNDS = {"bg": fixed_background_and_maps, "alpha": background_and_maps}
# The thresholds of --sweep, ascending.
SWEEPS = {"bg": tuple(step / 100 for step in range(61)), "alpha": tuple(map(float, range(1, 65)))}


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m voc12.evaluate")
    add = parser.add_argument
    add_devkit_arguments(parser, labels=False)
    add("--list", required=True, help="images to score")
    scored = parser.add_mutually_exclusive_group(required=True).add_argument
    scored("--pred", metavar="DIR", help="index images <id>.png, palette or gray")
    scored("--cam", metavar="DIR", help="class maps <id>.npy, scored with a background")
    add("--gt", metavar="DIR", help="masks <id>.png (default: the devkit's SegmentationClass)")
    background = parser.add_mutually_exclusive_group().add_argument
    background("--bg", type=cli.number(float, 0, 1), help="constant background (default: 0.2)")
    background("--alpha", type=cli.positive, help="background (1 - max score)^alpha")
    background("--sweep", choices=sorted(SWEEPS), help="score at every threshold")
    add("--crf", action="store_true", help="score --cam after a dense CRF (0.3 s an image)")
    cli.add_crf_argument(parser)
    cli.add_normalize_argument(parser)
    add("--allow_missing", action="store_true", help="score what exists and count what is missing")
    add_figure_files(parser)
    workers, workers_help = cli.default_num_workers(), "processes that count; 0: the program itself"
    add("--num_workers", type=cli.number(int, 0), default=workers, help=workers_help)
    return parser


def add_figure_files(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--csv`` and ``--plot`` of a program with ``--sweep``."""
    add = parser.add_argument
    add("--json", metavar="FILE", help="also write the figures to this file")
    add("--csv", metavar="FILE", help="write the --sweep to this file as a table")
    add("--plot", metavar="FILE.png", help="draw the --sweep to this file")


def winning_score(kind: str, value: float) -> np.float32:
    """The smallest score in 0..1 of a map that wins against the background.

    Bisects the float32 numbers with the comparison of an evaluation at one threshold, so that both
    round alike.
    """

    def wins(bits: int) -> bool:
        score = np.int32(bits).view(np.float32)  # positive floats sort as their bits do
        return BACKGROUNDS[kind](score.reshape(1, 1, 1), value).argmax() == 1

    bits = bisect_left(range(np.float32(1).view(np.int32)), True, key=wins)
    return np.int32(bits).view(np.float32)


@dataclass
class Scorer:
    """Counts the pixels of one image by true and predicted label.

    Raises DataError for a file that cannot be used, ValueError if two files do not fit together.
    """

    devkit: Devkit
    masks: Path  # folder of <id>.png
    scored: Path  # folder of <id>.png or <id>.npy
    normalization: str | None = None  # of tool.seeds

    def _load_mask(self, image_id: str, path: Path, size: tuple[int, int] | None) -> np.ndarray:
        """An image's mask, uint8 H x W; DataError if the (H, W) of what is at ``path`` differs."""
        mask_path = self.masks / f"{image_id}.png"
        mask = load_index_png(mask_path, len(self.devkit.label_names))
        self.devkit.require_size(path, size or mask.shape, f"its mask {mask_path}", mask.shape)
        return mask

    def _load(self, image_id: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """An image's mask, uint8 H x W, its class maps, float32 K x H x W, and their classes."""
        path = maps_file(self.scored / f"{image_id}.npy")
        mask = self._load_mask(image_id, path, None)
        try:
            maps = load_cams(path, mask.shape, len(self.devkit.class_names), self.normalization)
        except SizeError as error:
            self._load_mask(image_id, path, error.size)  # names the mask, too
            raise
        return mask, stack_maps(maps, mask.shape), list(maps)

    def count_labels(self, image_id: str) -> np.ndarray:
        """The confusion matrix of an index image."""
        path = self.scored / f"{image_id}.png"
        prediction = load_index_png(path, len(self.devkit.label_names))
        mask = self._load_mask(image_id, path, prediction.shape)
        return metrics.confusion_matrix(mask, prediction, len(self.devkit.label_names))

    def count_maps(
        self, image_id: str, kind: str, value: float, crf_backend: str | None = None
    ) -> np.ndarray:
        """The confusion matrix of class maps and a background, after a CRF if one is named."""
        mask, maps, classes = self._load(image_id)
        scores = BACKGROUNDS[kind](maps, value)
        if crf_backend:
            photograph = np.array(self.devkit.load_image(image_id))
            self._load_mask(image_id, self.devkit.image_path(image_id), photograph.shape[:2])
            (scores,) = dense_crf(photograph, [scores], backend=crf_backend)
        prediction = index_image(scores.argmax(axis=0), classes)
        return metrics.confusion_matrix(mask, prediction, len(self.devkit.label_names))

    def count_sweep(self, image_id: str, winning_scores: np.ndarray) -> np.ndarray:
        """The confusion matrix of class maps at each threshold, by its winning score."""
        mask, maps, classes = self._load(image_id)
        scores = fixed_background_and_maps(maps, 0)  # a score of 0 never wins
        winner, score = index_image(scores.argmax(axis=0), classes), scores.max(axis=0)
        num_labels = len(self.devkit.label_names)
        return metrics.sweep_confusions(mask, winner, score, winning_scores, num_labels)


@dataclass
class _Counts(Dataset):
    """The counts of an image by its id; an error names the image."""

    count: Callable[[str], np.ndarray]

    def __getitem__(self, image_id: str) -> np.ndarray:
        try:
            return self.count(image_id)
        except ValueError as error:
            raise DataError(f"{image_id}: {error}.") from error


def total_counts(ids: Sequence[str], count: Callable, num_workers: int) -> np.ndarray:
    """The sum of ``count(image_id)`` over the images, computed in ``num_workers`` processes."""
    keys = ([image_id] for image_id in ids)
    with load(_Counts(count), keys, min(num_workers, len(ids)), collate=sum) as counts:
        return sum(cli.progress(counts, "evaluate", total=len(ids)))


def sweep(scorer: Scorer, ids: Sequence[str], kind: str, num_workers: int) -> np.ndarray:
    """The confusion matrices at the thresholds of ``SWEEPS[kind]``: int64 x labels x labels."""
    winning = np.array([winning_score(kind, value) for value in SWEEPS[kind]])
    count = functools.partial(scorer.count_sweep, winning_scores=winning)
    return total_counts(ids, count, num_workers)


def figures(confusion: np.ndarray, num_images: int, names: Sequence[str]) -> dict:
    """What --json holds, except "missing": percentages, None for a label that does not occur."""

    def by_name(fractions: np.ndarray) -> dict[str, float | None]:
        return {
            name: None if math.isnan(fraction) else 100 * float(fraction)
            for name, fraction in zip(names, fractions, strict=True)
        }

    false_positives = int(confusion[1:, 0].sum())
    false_negatives = int(confusion[0, 1:].sum())
    union = max(1, int(confusion[0, 0]) + false_positives + false_negatives)
    return {
        "miou": 100 * metrics.mean_iou(confusion),
        "pixel_accuracy": 100 * metrics.pixel_accuracy(confusion),
        "images": num_images,
        "per_class": by_name(metrics.intersection_over_union(confusion)),
        "precision": by_name(metrics.precision(confusion)),
        "recall": by_name(metrics.recall(confusion)),
        "background": {
            "false_positives": false_positives,
            "false_negatives": false_negatives,
            "false_positives_percent": 100 * false_positives / union,
            "false_negatives_percent": 100 * false_negatives / union,
        },
    }


def percent(value: float | None) -> str:
    """A figure in per cent for people; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def table(result: dict) -> str:
    """The figures as text."""

    def row(name: str, *values: float | None) -> str:
        return f"{name:<16}" + "".join(f"{percent(value):>10}" for value in values)

    columns = [result[column] for column in ("per_class", "precision", "recall")]
    background = result["background"]
    missing = f", {result['missing']} missing" if result.get("missing") else ""
    rows = [
        f"{'label':<16}{'IoU':>10}{'precision':>10}{'recall':>10}",
        *(row(name, *(column[name] for column in columns)) for name in result["per_class"]),
        f"background: {background['false_positives_percent']:.1f} % false positives (predicted on "
        f"objects), {background['false_negatives_percent']:.1f} % false negatives",
        row("pixel accuracy", result["pixel_accuracy"]),
        row("mIoU", result["miou"]) + f"   over {result['images']} images{missing}",
    ]
    return "\n".join(rows)


def sweep_figures(
    points: Sequence[dict], confusions: np.ndarray, num_images: int, names: Sequence[str]
) -> dict:
    """What --json holds of a sweep over ``points`` {setting: value}, except "missing".

    The best is the first of the largest mIoU.
    """
    settings = [*points[0]]
    scored = [
        {**point, **figures(confusion, num_images, names)}
        for point, confusion in zip(points, confusions, strict=True)
    ]
    shown = [*settings, "miou", "per_class"]
    return {
        "sweep": " ".join(settings),
        "images": num_images,
        "points": [{key: point[key] for key in shown} for point in scored],
        "best": max(scored, key=lambda point: point["miou"]),
    }


def sweep_table(result: dict) -> str:
    """The mIoU at every point as text, the best one marked, and its figures."""
    settings, best = result["sweep"].split(), result["best"]
    rows = ["".join(f"{name:>6}" for name in settings) + f"{'mIoU':>8}"]
    for point in result["points"]:
        mark = "  <- best" if all(point[name] == best[name] for name in settings) else ""
        values = "".join(f"{point[name]:>6g}" for name in settings)
        rows.append(f"{values}{point['miou']:>8.2f}{mark}")
    place = ", ".join(f"{name} {best[name]:g}" for name in settings)
    return "\n".join([*rows, "", f"at {place}:", table(best)])


def sweep_csv(result: dict) -> str:
    """One line for each point: mIoU, whether it is the best, and the IoU of each class."""
    settings, best = result["sweep"].split(), result["best"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*settings, "miou", "best", *best["per_class"]])
    for point in result["points"]:
        values = [point[name] for name in settings]
        marked = int(values == [best[name] for name in settings])
        writer.writerow([*values, point["miou"], marked, *point["per_class"].values()])
    return text.getvalue()


def sweep_plot(result: dict):
    """A matplotlib figure of mIoU over the thresholds, the best one marked."""
    from matplotlib.figure import Figure  # slow to import, and few need it

    kind, best = result["sweep"], result["best"]
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    values = [point[kind] for point in result["points"]]
    axis.plot(values, [point["miou"] for point in result["points"]])
    axis.plot(best[kind], best["miou"], "o", label=f"best: {best['miou']:.1f} at {best[kind]:g}")
    title = {"bg": "background score", "alpha": "alpha of the background (1 - max score)^alpha"}
    axis.set(xlabel=title[kind], ylabel="mIoU (%)")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go together."""
    of_maps = args.crf, args.bg is not None, args.alpha, args.sweep, args.normalize
    if args.pred and any(of_maps):
        flags = "--bg, --alpha, --sweep, --crf and --normalize"
        raise UsageError(f"{flags} need --cam; --pred holds labels.")
    if args.crf and args.sweep:
        raise UsageError("--crf needs one threshold, --bg or --alpha, and not --sweep.")
    if not args.sweep and (args.csv or args.plot):
        raise UsageError("--csv and --plot show the results of --sweep; add --sweep.")


def check_files(args: argparse.Namespace, list_flag: str, devkit: Devkit) -> None:
    """Raise UsageError if --json, --csv or --plot would replace an input, or each other."""
    if args.plot and not args.plot.endswith(".png"):
        raise UsageError(f"--plot {args.plot}: must end in .png.")
    outputs = {"--json": args.json, "--csv": args.csv, "--plot": args.plot}
    inputs = {f"--{name}": getattr(args, name) for name in (list_flag, "classes")}
    cli.require_distinct_outputs(outputs, inputs)
    for flag, path in outputs.items():
        devkit.require_output(flag, path)


def write_files(args: argparse.Namespace, result: dict, plot: Callable) -> None:
    """Write --json, --csv and --plot, those that are named; ``plot(result)`` makes the figure."""
    if args.json:
        write_json(args.json, result)
    if args.csv:
        write_bytes(args.csv, sweep_csv(result).encode())
    if args.plot:
        with atomic_write(args.plot) as file:
            plot(result).savefig(file, format="png")


def present_ids(args: argparse.Namespace, ids: Sequence[str]) -> Sequence[str]:
    """The images that can be scored; raises DataError if there is none, or not --allow_missing."""
    folder, suffix = (args.pred, ".png") if args.pred else (args.cam, ".npy")
    if args.allow_missing:
        ids = [name for name in ids if maps_file(Path(folder, name + suffix)).is_file()] or ids
    program = "infer_aff.py --out_rw" if args.pred else "infer_cls.py --out_cam"
    require_files(folder, ids, suffix, f"{program} makes them")
    return ids


def count_images(args: argparse.Namespace, scorer: Scorer, ids: Sequence[str]) -> np.ndarray:
    """The confusion matrix, or one for each threshold of --sweep; DataError if no pixel counts."""
    if args.sweep:
        counts = sweep(scorer, ids, args.sweep, args.num_workers)
    elif args.pred:
        counts = total_counts(ids, scorer.count_labels, args.num_workers)
    else:
        constant = BACKGROUND_SCORE if args.bg is None else args.bg
        kind, value = ("alpha", args.alpha) if args.alpha else ("bg", constant)
        crf = args.crf_backend if args.crf else None
        count = functools.partial(scorer.count_maps, kind=kind, value=value, crf_backend=crf)
        counts = total_counts(ids, count, args.num_workers)
    if not counts.any():
        raise DataError(f"{args.list}: no pixel of its masks is labelled; nothing to score.")
    return counts


def main(args: argparse.Namespace) -> None:
    check_flags(args)
    devkit = open_devkit(args)
    check_files(args, "list", devkit)
    ids = list(dict.fromkeys(read_ids(args.list)))  # an image counts once
    present = present_ids(args, ids)
    masks = Path(args.gt) if args.gt else devkit.root / "SegmentationClass"
    require_files(masks, present, ".png", "--voc12_root or --gt, and the list must belong together")
    devkit.require_classes(masks / f"{image_id}.png" for image_id in present)
    scorer = Scorer(devkit, masks, Path(args.pred or args.cam), args.normalize)
    counts = count_images(args, scorer, present)

    scored = counts, len(present), devkit.label_names
    points = [{args.sweep: value} for value in SWEEPS.get(args.sweep, ())]
    result = sweep_figures(points, *scored) if args.sweep else figures(*scored)
    result["missing"] = len(ids) - len(present)
    if args.sweep:
        result["best"]["missing"] = result["missing"]
    write_files(args, result, sweep_plot)
    print(sweep_table(result) if args.sweep else table(result))


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
