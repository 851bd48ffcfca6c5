"""Shows what the stages made of a list of images, on one page to look at with a browser.

    python3 -m voc12.report --voc12_root VOC2012 --list voc12/train.txt --cam CAM --la LA --ha HA
        --rw RW --log cls.csv aff.csv --out report.html

The page contains everything it shows and fetches nothing: it can be sent as it is. Tables and
curves are computed from all images of the list; the gallery shows --images of them. Folders that
are not named are left out, and images without a mask have no scores.

--out FILE.png instead draws one sheet of pictures, a row per image, evenly from the list: the
photograph, its CAMs as heat in their classes' colours, the confident labels that AffinityNet learns
from (black where they are ignored), the random walk's label, and the mask.
"""

import argparse
from pathlib import Path

from tool.files import atomic_write
from tool.run import cli
from tool.run.errors import UsageError
from voc12.devkit import add_devkit_arguments, open_devkit, read_ids
from voc12.report.data import Outputs, spread
from voc12.report.page import page, sheet

# How many images are shown where the command line does not say.
PAGE_IMAGES, SHEET_IMAGES = 60, 6


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m voc12.report", description=__doc__, formatter_class=cli.help_formatter
    )
    add = parser.add_argument
    add_devkit_arguments(parser, labels=False)
    add("--list", required=True, help="images to report on")
    add("--cam", metavar="DIR", help="class activation maps")
    add("--la", metavar="DIR", help="CRF scores with the low alpha; needs --ha")
    add("--ha", metavar="DIR", help="CRF scores with the high alpha; needs --la")
    add("--rw", metavar="DIR", help="the random walk's index images")
    add("--log", metavar="CSV", nargs="+", default=[], help="tables of losses that training wrote")
    add(
        "--images",
        type=cli.count,
        help=f"images to show: on the page the worst, the best and evenly between (default: "
        f"{PAGE_IMAGES}), on a sheet evenly from the list (default: {SHEET_IMAGES})",
    )
    add("--out", required=True, metavar="FILE.html", help="the page; FILE.png makes a sheet")
    return parser


def main(args: argparse.Namespace) -> None:
    if bool(args.la) != bool(args.ha):
        raise UsageError("--la and --ha go together: a confident label needs both.")
    suffix = Path(args.out).suffix.lower()
    if suffix not in (".html", ".png"):
        raise UsageError(f"--out {args.out}: must end in .html or .png.")
    inputs = {"--list": args.list, "--classes": args.classes}
    inputs |= {f"--log {log}": log for log in args.log}
    cli.require_distinct_outputs({"--out": args.out}, inputs)
    devkit = open_devkit(args)
    devkit.require_output("--out", args.out)
    ids = list(dict.fromkeys(read_ids(args.list)))  # an image counts once
    folders = {name: getattr(args, name) for name in ("cam", "la", "ha", "rw")}
    outputs = Outputs(devkit, {name: folder for name, folder in folders.items() if folder})
    if suffix == ".png":
        shown = spread(ids, args.images or SHEET_IMAGES)
        outputs.require(shown)
        content = sheet([outputs.load(image_id) for image_id in shown])
    else:
        outputs.require(ids)
        content = page(outputs, ids, args.images or PAGE_IMAGES, args.list, args.log)
    with atomic_write(args.out) as file:
        file.write(content)
    print(f"written to {args.out}")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
