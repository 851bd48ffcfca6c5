"""The four programs and the evaluation of maps and labels, in a row, each as a process.

    python3 -m tool.pipeline --voc12_root VOC2012 --network vgg16 --weights W --out_dir runs/vgg16

Every command is printed as it is run, to be copied. In --out_dir: lists/ (from voc12.prepare),
cls.pth, aff.pth and their .log, the folders cam, la_crf, ha_crf, rw, and results.json:
{"cam": {"train": {"miou", "images"}, "val": ...}, "rw": {...}}.
Labels are made and scored on train and val; training takes train_aug, or train where the devkit has
no augmented masks.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tool import cli
from tool.errors import DataError
from tool.maps import atomic_write

REPOSITORY = Path(__file__).resolve().parent.parent
SCORED_SPLITS = ("train", "val")

# What a network is trained and run with, where that is not the programs' default.
RECIPES: dict[str, dict[str, list[str]]] = {
    "vgg16": {"train_cls": ["--lr", "0.1"], "train_aff": ["--lr", "0.1"]},
    "resnet38": {"train_cls": ["--lr", "0.01"], "train_aff": ["--lr", "0.01"]},
    # From scratch, on the toy devkit: hence a customary momentum, small crops and a short walk.
    "tiny": {
        "train_cls": shlex.split(
            "--lr 0.05 --momentum 0.9 --batch_size 8 --max_epoches 40 --crop_size 160 "
            "--resize_long 128 224 --val_crop_size 192"
        ),
        "train_aff": shlex.split(
            "--lr 0.1 --momentum 0.9 --batch_size 8 --max_epoches 20 --crop_size 160"
        ),
        "infer_aff": ["--logt", "4"],
    },
}
STAGES = ("train_cls", "infer_cls", "train_aff", "infer_aff")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m tool.pipeline", description=__doc__, formatter_class=cli.help_formatter
    )
    add = parser.add_argument
    add("--voc12_root", required=True, help="the devkit's folder VOC2012")
    add("--network", required=True, choices=sorted(RECIPES), help="backbone of both networks")
    add("--weights", required=True, help="weights that both trainings start from, or none")
    add(
        "--aff_weights",
        help="weights that AffinityNet starts from (default: --weights, or with --weights none the "
        "trained classifier)",
    )
    add("--out_dir", required=True, help="folder for everything that is made")
    add("--list_dir", help="id lists made before by voc12.prepare (default: made in --out_dir)")
    add("--classes", metavar="FILE", help="class names of another data set, one a line")
    for stage in STAGES:
        add(
            f"--{stage}_args",
            default="",
            metavar="'--FLAG VALUE ...'",
            help=f"further flags of {stage}.py; they override the network's recipe",
        )
    cli.add_run_arguments(parser)
    return parser


class Pipeline:
    """The commands, by stage; ``run`` carries them out."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = Path(args.out_dir)
        self.lists = Path(args.list_dir) if args.list_dir else self.out / "lists"
        self.data_flags = ["--voc12_root", args.voc12_root]
        if args.classes:
            self.data_flags += ["--classes", args.classes]

    def stage(self, name: str, *flags: str | Path) -> None:
        """Run one of the four programs, with the recipe's flags and the user's."""
        kind = "cls" if name.endswith("cls") else "aff"
        args = self.args
        command = [os.path.relpath(REPOSITORY / f"{name}.py"), *self.data_flags]
        command += ["--network", f"network.{args.network}_{kind}", *flags]
        if kind == "cls":
            command += ["--label_file", self.lists / "cls_labels.npy"]
        command += ["--device", args.device, "--seed", args.seed]
        command += ["--num_workers", args.num_workers]
        command += RECIPES[args.network].get(name, [])
        command += shlex.split(getattr(args, f"{name}_args"))
        run(command)

    def prepare(self) -> None:
        run(["-m", "voc12.prepare", *self.data_flags, "--out_dir", self.lists])

    def training_list(self) -> Path:
        """train_aug.txt, or train.txt where the devkit has no augmented masks."""
        augmented = self.lists / "train_aug.txt"
        return augmented if augmented.exists() else self.lists / "train.txt"

    def run(self) -> dict:
        """All stages; returns the results."""
        if not self.args.list_dir:
            self.prepare()
        out, train_list, val_list = self.out, self.training_list(), self.lists / "val.txt"
        print(f"training list: {train_list}", flush=True)
        train_flags = ["--train_list", train_list, "--session_name"]

        self.stage(
            "train_cls",
            *("--weights", self.args.weights, *train_flags, out / "cls", "--val_list", val_list),
        )
        classifier = ["--weights", out / "cls.pth", "--out_cam", out / "cam", "--infer_list"]
        crf_outputs = ["--out_la_crf", out / "la_crf", "--out_ha_crf", out / "ha_crf"]
        self.stage("infer_cls", *classifier, train_list, *crf_outputs)
        self.stage("infer_cls", *classifier, val_list)

        crf_inputs = ["--la_crf_dir", out / "la_crf", "--ha_crf_dir", out / "ha_crf"]
        self.stage(
            "train_aff",
            *("--weights", self.affinity_start(), *train_flags, out / "aff", *crf_inputs),
        )
        for split in SCORED_SPLITS:
            self.stage(
                "infer_aff",
                *("--weights", out / "aff.pth", "--infer_list", self.lists / f"{split}.txt"),
                *("--cam_dir", out / "cam", "--out_rw", out / "rw"),
            )
        return {
            "cam": {split: self.score(split, "--cam", out / "cam") for split in SCORED_SPLITS},
            "rw": {split: self.score(split, "--pred", out / "rw") for split in SCORED_SPLITS},
        }

    def affinity_start(self) -> str | Path:
        """The weights that AffinityNet starts from."""
        if self.args.aff_weights:
            return self.args.aff_weights
        return self.out / "cls.pth" if self.args.weights == "none" else self.args.weights

    def score(self, split: str, flag: str, folder: Path) -> dict:
        """Run the evaluation of a folder over a split; returns its mIoU and number of images."""
        figures = self.out / f"{folder.name}_{split}.json"
        run(
            [
                *("-m", "voc12.evaluate", *self.data_flags),
                *("--list", self.lists / f"{split}.txt", flag, folder, "--json", figures),
            ]
        )
        result = json.loads(figures.read_text())
        return {"miou": result["miou"], "images": result["images"]}


def run(command: list[str | Path | int]) -> None:
    """Print a Python command and run it; raises DataError if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ python3 {shlex.join(words)}", flush=True)
    environment = dict(os.environ)
    # python3 -m must find the packages also where the pipeline is started from another folder.
    paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    code = subprocess.run([sys.executable, *words], env=environment, check=False).returncode
    if code:
        raise DataError(f"the last command above failed (exit code {code}).")


def table(results: dict) -> str:
    """The results for people, mIoU in per cent, with the number of images that it stands on."""
    rows = [f"{'mIoU':<12}" + "".join(f"{split:>18}" for split in SCORED_SPLITS)]
    for key, title in (("cam", "CAM"), ("rw", "random walk")):
        cells = [results[key][split] for split in SCORED_SPLITS]
        texts = [f"{cell['miou']:.1f} ({cell['images']} images)" for cell in cells]
        rows.append(f"{title:<12}" + "".join(f"{text:>18}" for text in texts))
    return "\n".join(rows)


def main(args: argparse.Namespace) -> None:
    results = Pipeline(args).run()
    path = Path(args.out_dir, "results.json")
    with atomic_write(path) as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    print(f"\n{table(results)}\n\nwritten to {path}")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
