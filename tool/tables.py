"""The tables of the method's released code, and a run's own figures beside them."""

from collections.abc import Sequence
from typing import NamedTuple

# Images of the official splits that the published figures stand on.
PUBLISHED_IMAGES = {"train": 1464, "val": 1449}
SPLIT_RULES = (
    "Pseudo labels are scored on train (1,464 images) and val (1,449 images) with the official "
    "masks of SegmentationClass.",
    "Labels to train a segmenter with are made on train_aug (10,582 images).",
)


class Published(NamedTuple):
    """mIoU in per cent, as the released code reports it; beta 8, gamma 5, 256 steps."""

    stage: str  # "cam" or "rw"
    network: str
    alphas: tuple[
        float, float, float
    ]  # low (CRF), random walk, high (CRF); CAMs do not depend on it
    miou: dict[str, float]
    variant: str = ""


RELEASED_ALPHAS, SUBMISSION_ALPHAS = (4, 16, 32), (4, 16, 24)
SUBMISSION = "CVPR submission"
PUBLISHED = (
    Published("cam", "vgg16", RELEASED_ALPHAS, {"train": 48.9, "val": 46.6}),
    Published("cam", "resnet38", RELEASED_ALPHAS, {"train": 47.7, "val": 47.2}),
    Published("cam", "resnet38", SUBMISSION_ALPHAS, {"train": 48.0, "val": 46.8}, SUBMISSION),
    Published("rw", "vgg16", RELEASED_ALPHAS, {"train": 59.6, "val": 54.0}),
    Published("rw", "resnet38", RELEASED_ALPHAS, {"train": 61.0, "val": 60.2}),
    Published("rw", "resnet38", SUBMISSION_ALPHAS, {"train": 58.1, "val": 57.0}, SUBMISSION),
)
STAGE_NAMES = {"cam": "CAM", "rw": "random walk"}
NETWORK_NAMES = {"vgg16": "VGG-16", "resnet38": "ResNet-38"}


def comparison(
    results: dict[str, dict[str, dict]],
    network: str,
    alphas: tuple[float, float, float],
    published: Sequence[Published] = PUBLISHED,
) -> list[dict]:
    """A row for each figure, published or ours, for people and JSON.

    ``results`` is {"cam" or "rw": {split: {"miou": %, "images": n}}}, of one network. Where a
    figure is ours alone or theirs alone, the other is None. CAMs do not depend on the alphas: they
    stand beside the released ones, unless the alphas are the submission's.
    """
    rows = []
    for stage in STAGE_NAMES:
        theirs = [line for line in published if line.stage == stage]
        match = _match(theirs, network, alphas)
        if match is None:
            own = Published(stage, network, alphas, {})
            rows += [_row(own, split, figure) for split, figure in results[stage].items()]
        for line in theirs:
            for split in line.miou:
                rows.append(_row(line, split, results[stage].get(split) if line is match else None))
    return rows


def _match(
    lines: Sequence[Published], network: str, alphas: tuple[float, float, float]
) -> Published | None:
    """The published line that our figures are to be compared with."""
    lines = [line for line in lines if line.network == network]
    same = [line for line in lines if line.alphas == alphas]
    if not same:
        same = [line for line in lines if line.stage == "cam" and not line.variant]
    return same[0] if same else None


def _row(line: Published, split: str, ours: dict | None) -> dict:
    theirs = line.miou.get(split)
    images = ours["images"] if ours else None
    expected = PUBLISHED_IMAGES[split]
    remarks = []
    if ours and theirs is not None and images != expected:
        comparison_word = "fewer" if images < expected else "more"
        remarks.append(f"{comparison_word} images than the published figure stands on")
    if ours and ours.get("missing"):
        remarks.append(f"{ours['missing']} images of the list are missing")
    return {
        "stage": line.stage,
        "network": line.network,
        "variant": line.variant,
        "alphas": "/".join(f"{alpha:g}" for alpha in line.alphas) if line.stage == "rw" else "",
        "split": split,
        "ours": ours["miou"] if ours else None,
        "images": images,
        "published": theirs,
        "published_images": expected if theirs is not None else None,
        "difference": ours["miou"] - theirs if ours and theirs is not None else None,
        "remark": "; ".join(remarks),
    }


def markdown(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| stage | network | alpha | split | ours | images | published | images | difference "
        "| note |",
        "|---|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        variant = f", {row['variant']}" if row["variant"] else ""
        cells = (
            STAGE_NAMES[row["stage"]] + variant,
            NETWORK_NAMES.get(row["network"], row["network"]),
            row["alphas"],
            row["split"],
            _cell(row["ours"], ".1f"),
            _cell(row["images"], ","),
            _cell(row["published"], ".1f"),
            _cell(row["published_images"], ","),
            _cell(row["difference"], "+.1f"),
            row["remark"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
