"""Shows what the stages made of a list of images, on one page to look at with a browser.

    python3 -m voc12.report --voc12_root VOC2012 --list voc12/train.txt --cam CAM --la LA --ha HA
        --rw RW --log cls.csv aff.csv --out report.html

The page contains everything it shows and fetches nothing: it can be sent as it is. Tables and
curves are computed from all images of the list; the gallery shows --images of them, from the worst
to the best. Folders that are not named are left out, and images without a mask have no scores.

--out FILE.png instead draws a sheet with a row per image, evenly from the list: the photograph, its
CAMs as heat in their classes' colours, the confident labels that AffinityNet learns from (black
where they are ignored), the random walk's label, and the mask.
"""

import argparse
from pathlib import Path

from tool.files import write_bytes
from tool.run import cli
from tool.run.errors import UsageError
from voc12.devkit import add_devkit_arguments, open_devkit, read_ids, require_files
from voc12.report.data import SUFFIXES, Outputs, spread
from voc12.report.page import page, sheet


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m voc12.report")
    add = parser.add_argument
    add_devkit_arguments(parser, labels=False)
    add("--list", required=True, help="images to report on")
    add("--cam", metavar="DIR", help="class maps of any method")
    cli.add_normalize_argument(parser)
    add("--la", metavar="DIR", help="CRF scores with the low alpha; needs --ha")
    add("--ha", metavar="DIR", help="CRF scores with the high alpha; needs --la")
    add("--rw", metavar="DIR", help="the random walk's index images")
    add("--seg", metavar="DIR", help="the segmenter's index images")
    add("--log", metavar="CSV", nargs="+", default=[], help="tables of losses that training wrote")
    add("--images", type=cli.count, help="images to show (default: 60 on a page, 6 on a sheet)")
    add("--out", required=True, metavar="FILE.html", help="the page; FILE.png makes a sheet")
    return parser


def main(args: argparse.Namespace) -> None:
    if bool(args.la) != bool(args.ha):
        raise UsageError("--la and --ha go together: a confident label needs both.")
    suffix = Path(args.out).suffix.lower()
    if suffix not in (".html", ".png"):
        raise UsageError(f"--out {args.out}: must end in .html or .png.")
    logs = {f"--log {log}": log for log in args.log}
    inputs = {"--list": args.list, "--classes": args.classes} | logs
    cli.require_distinct_outputs({"--out": args.out}, inputs)
    devkit = open_devkit(args)
    devkit.require_output("--out", args.out)
    ids = list(dict.fromkeys(read_ids(args.list)))  # an image counts once
    folders = {key: getattr(args, key) for key in SUFFIXES if getattr(args, key)}
    devkit.require_images(ids)
    for key, folder in folders.items():
        hint = f"--{key} is what an inference program made of the images of --list"
        require_files(folder, ids, SUFFIXES[key], hint)
    outputs = Outputs(devkit, folders, args.normalize)
    if suffix == ".png":
        content = sheet(map(outputs.load, spread(ids, args.images or 6)))
    else:
        content = page(outputs, ids, args.images or 60, args.list, args.log)
    write_bytes(args.out, content)
    print(f"written to {args.out}")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
