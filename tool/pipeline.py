"""The six programs and the evaluation of their outputs, in a row, each as a process.

    python3 -m tool.pipeline --voc12_root VOC2012 --network vgg16 --weights imagenet
        --out_dir runs/vgg16
    ... --dry_run                            print the commands and run nothing
    ... --train_cls_args "--batch_size 8"    change a stage's settings
    ... --from train_aff                     remove what this and all later stages made, run them
    ... --stages infer_aff evaluate          run these stages only
    ... --cam_dir SEEDS                      class maps of any method in place of stage 1
    ... --ids '2007_*' --recipe small        a benchmark for two CPU cores, see docs/small.md

The stages are prepare, train_cls, infer_cls, train_aff, infer_aff, train_seg, infer_seg and
evaluate. To continue after an interruption, repeat the command without --from: finished trainings
and images are skipped. After a change of settings, name the first stage that it concerns by --from.

--out_dir gets lists/, cls.pth, aff.pth, seg.pth and their .log; the folders cam, la_crf, ha_crf,
rw, rw_crf (refined by the dense CRF, the segmenter's labels) and seg; the scores cam_train.json,
..., and our mIoU beside the published one in results.md and results.json. Training takes train_aug,
or train where the devkit has no augmented masks. Labels are scored on train and val, the segmenter
on val. --cam_dir needs maps of all these images; see docs/seeds.md.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tool.files import write_bytes, write_json
from tool.recipes import NETWORKS, PUBLISHED, PUBLISHED_TEST, RECIPES
from tool.run import cli
from tool.run.errors import DataError, Interrupted, UsageError
from tool.weights import FRESH

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = ("train_cls", "infer_cls", "train_aff", "infer_aff", "train_seg", "infer_seg")
STAGES = ("prepare", *PROGRAMS, "evaluate")
# What --from removes, in --out_dir.
OUTPUTS = {
    "train_cls": ("cls.pth", "cls.ckpt"),
    "infer_cls": ("cam/*", "la_crf/*", "ha_crf/*"),
    "train_aff": ("aff.pth", "aff.ckpt"),
    "infer_aff": ("rw/*", "rw_crf/*"),
    "train_seg": ("seg.pth", "seg.ckpt"),
    "infer_seg": ("seg/*",),
}
RUN_FLAGS = re.compile(r" --(device|num_workers) \S+")  # a training's result is the same

# The stages' commands, besides the flags that all commands or all programs share.
COMMANDS = (
    "prepare --out_dir {lists}",
    "train_cls --weights {weights} --train_list {train_list} --val_list {val} "
    "--label_file {labels} --session_name {out}/cls",
    "infer_cls --weights {out}/cls.pth --infer_list {train_list} --label_file {labels} "
    "--out_cam {out}/cam --out_la_crf {out}/la_crf --out_ha_crf {out}/ha_crf",
    "infer_cls --weights {out}/cls.pth --infer_list {val} --label_file {labels} "
    "--out_cam {out}/cam",
    "train_aff --weights {aff_weights} --train_list {train_list} "
    "--la_crf_dir {out}/la_crf --ha_crf_dir {out}/ha_crf --session_name {out}/aff",
    "infer_aff --weights {out}/aff.pth --infer_list {train} --cam_dir {out}/cam --out_rw {out}/rw",
    "infer_aff --weights {out}/aff.pth --infer_list {val} --cam_dir {out}/cam --out_rw {out}/rw",
    "infer_aff --weights {out}/aff.pth --infer_list {train_list} --cam_dir {out}/cam "
    "--out_rw {out}/rw_crf --crf",
    "train_seg --weights {seg_weights} --train_list {train_list} --label_dir {out}/rw_crf "
    "--session_name {out}/seg",
    "infer_seg --weights {out}/seg.pth --infer_list {val} --out_seg {out}/seg",
    "evaluate --list {train} --cam {out}/cam --json {out}/cam_train.json",
    "evaluate --list {val} --cam {out}/cam --json {out}/cam_val.json",
    "evaluate --list {train} --pred {out}/rw --json {out}/rw_train.json",
    "evaluate --list {val} --pred {out}/rw --json {out}/rw_val.json",
    "evaluate --list {train} --pred {out}/rw_crf --json {out}/rw_crf_train.json",
    "evaluate --list {val} --pred {out}/seg --json {out}/seg_val.json",
)

OPTIONAL = ("rw_crf", "seg")  # of what is scored; without them, there is no segmenter
SCORED = {  # what evaluate's results are called, and the splits that it scores
    "cam": ("CAM", ("train", "val")),
    "rw": ("random walk", ("train", "val")),
    "rw_crf": ("random walk + CRF", ("train",)),
    "seg": ("segmenter", ("val",)),
}


def get_args_parser() -> argparse.ArgumentParser:
    recipes = ["recipes (--train_cls_args and so on override them flag by flag):"]
    for recipe, programs in RECIPES.items():
        recipes += [f"  {recipe}", *(f"    {name}  {flags}" for name, flags in programs.items())]
    parser = cli.make_parser("\n".join([__doc__, *recipes]), "python3 -m tool.pipeline")
    add = parser.add_argument
    add("--voc12_root", required=True, help="the devkit's folder VOC2012")
    add("--network", required=True, choices=NETWORKS, help="backbone of both networks")
    add("--recipe", choices=RECIPES, help="settings of the stages (default: the network's)")
    add("--weights", required=True, help="start weights of both trainings; see train_cls.py")
    add("--aff_weights", help="those of AffinityNet (default: --weights; for none, the classifier)")
    add("--out_dir", required=True, help="folder for all outputs")
    add("--list_dir", help="id lists made before by voc12.prepare (default: made in --out_dir)")
    add("--ids", metavar="PATTERN", help="only images whose ids match, such as '2007_*'")
    add("--cam_dir", metavar="DIR", help="class maps of any method: no classifier is trained")
    add("--classes", metavar="FILE", help="class names of another data set, one a line")
    for program in PROGRAMS:
        text = f"further flags of {program}.py; they override the network's recipe"
        add(f"--{program}_args", type=shlex.split, metavar="'--FLAG VALUE ...'", help=text)
    chosen = parser.add_mutually_exclusive_group()
    stage = {"choices": STAGES, "metavar": "STAGE"}
    text = "run these only (default: all); a complete training is skipped here, too"
    chosen.add_argument("--stages", nargs="+", **stage, help=text)
    text = "remove the outputs of this and all later stages, and make them again"
    chosen.add_argument("--from", dest="first_stage", **stage, help=text)
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    add("--amp", choices=("bf16", "fp16"), help="of all programs: compute convolutions in 16 bits")
    cli.add_run_arguments(parser)
    return parser


def templates(args: argparse.Namespace) -> list[str]:
    """The stages' commands; with --cam_dir, its maps take the place of stage 1."""
    if not args.cam_dir:
        return list(COMMANDS)
    weights, labels = "--weights {out}/cls.pth", "--label_file {labels} "
    kept = (line for line in COMMANDS if not line.startswith("train_cls"))
    return [line.replace(weights, "--cam_dir {cam_dir}").replace(labels, "") for line in kept]


def commands(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """What the command line asks for, as (stage, words): the command is ``python3 <words>``."""
    first = STAGES.index(args.first_stage) if args.first_stage else 0
    stages = args.stages or STAGES[first:]
    out = Path(args.out_dir)
    lists = Path(args.list_dir or out / "lists")
    train, augmented = lists / "train.txt", lists / "train_aug.txt"
    is_made = not args.list_dir and Path(args.voc12_root, "SegmentationClassAug").is_dir()
    aff_default = out / "cls.pth" if args.weights == FRESH and not args.cam_dir else args.weights
    paths = {
        "out": out,
        "lists": lists,
        "train": train,
        "val": lists / "val.txt",
        "labels": lists / "cls_labels.npy",
        "train_list": augmented if is_made or augmented.exists() else train,
        "weights": args.weights,
        "cam_dir": args.cam_dir,
        "aff_weights": args.aff_weights or aff_default,
        "seg_weights": aff_default,
    }
    data = ["--voc12_root", args.voc12_root, *(["--classes", args.classes] if args.classes else [])]
    workers = ["--num_workers", str(args.num_workers)]
    chosen = []
    for command in templates(args):
        stage, *flags = (word.format(**paths) for word in command.split())
        if stage in PROGRAMS:
            file = os.path.relpath(REPOSITORY / f"{stage}.py")
            words = [file, "--network", f"network.{args.network}_{stage[-3:]}", *data, *flags]
            words += ["--device", args.device, "--seed", str(args.seed), *workers]
            words += ["--amp", args.amp] if args.amp else []
            words += RECIPES[args.recipe or args.network][stage].split()
            words += getattr(args, f"{stage}_args") or []  # the last of equal flags counts
        else:
            words = ["-m", f"voc12.{stage}", *data, *flags]
            words += workers if stage == "evaluate" else []
            words += ["--ids", args.ids] if args.ids and stage == "prepare" else []
        if stage in stages and not (stage == "prepare" and args.list_dir):
            chosen.append((stage, words))
    return [command for command in chosen if _can_run(command, chosen)]


def _can_run(command: tuple[str, list[str]], chosen: list[tuple[str, list[str]]]) -> bool:
    """False for the evaluation of a segmenter that is left out."""
    stage, words = command
    if stage != "evaluate":
        return True
    folder = Path(words[words.index("--json") - 1])
    made = any(str(folder) in other for stage, other in chosen if stage != "evaluate")
    return made or folder.is_dir() or folder.name not in OPTIONAL


def is_complete(args: argparse.Namespace, stage: str, words: list[str]) -> bool:
    """Whether a command is a training that has ended; prints a line if so."""
    session = Path(args.out_dir, stage.removeprefix("train_"))
    weights = session.with_suffix(".pth")
    if not weights.exists() or session.with_suffix(".ckpt").exists():
        return False
    print(f"# {stage} is skipped: {weights} is complete; --from {stage} trains again")
    log = session.with_suffix(".log")  # its first line is the training's command
    line = log.read_text("utf-8").partition("\n")[0] if log.exists() else ""
    _, program, flags = line.partition(f"{stage}.py ")
    if program and RUN_FLAGS.sub("", flags) != RUN_FLAGS.sub("", shlex.join(words[1:])):
        print(f"# warning: it was made by another command: {program}{flags}")
    return True


def remove_outputs(args: argparse.Namespace, stage: str) -> None:
    """Remove what --out_dir holds of a stage's outputs, with printed lines."""
    for pattern in OUTPUTS.get(stage, ()):
        files = list(Path(args.out_dir).glob(pattern))
        if files:
            print(f"$ rm {args.out_dir}/{pattern}")
        for file in [] if args.dry_run else files:
            file.unlink()


def require_flags(args: argparse.Namespace, words_of: dict[str, list[str]]) -> None:
    """Raise UsageError if a program does not take the user's flags: now, not days later."""
    for stage, words in words_of.items():
        own = {word.partition("=")[0] for word in getattr(args, f"{stage}_args", None) or []}
        if not own:
            continue
        fixed = own & {
            word for line in templates(args) if line.startswith(stage) for word in line.split()
        }
        if fixed:
            raise UsageError(f"--{stage}_args: the pipeline itself sets {min(fixed)}.")
        parse = f"import {stage}; {stage}.get_args_parser().parse_args()"
        command = [sys.executable, "-c", parse, *words[1:]]
        output = {"capture_output": True, "text": True, "errors": "backslashreplace"}
        done = subprocess.run(command, env=environment(), **output)
        if done.returncode == cli.EXIT_USAGE:  # for any other reason, the stage itself says why
            problem = done.stderr.strip().rpartition("error: ")[2]
            raise UsageError(f"--{stage}_args: {problem}")


def environment() -> dict[str, str]:
    """In which python3 finds the packages also where the pipeline is started from elsewhere."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(stage: str, words: list[str]) -> None:
    """Run a stage's command; raises DataError if it fails.

    SIGINT, SIGTERM and SIGHUP are passed on to it; when it has ended, Interrupted is raised.
    """
    received: list[int] = []
    process = None

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        if process:
            process.send_signal(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    handlers = {number: signal.signal(number, forward) for number in numbers}
    try:
        # In a session of its own, so that Ctrl-C at a terminal reaches it once, through us.
        command = [sys.executable, *words]
        process = subprocess.Popen(command, env=environment(), start_new_session=True)
        if received:  # before there was a process
            process.send_signal(received[0])
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        hint = "repeat the command, without --from, to continue."
        raise Interrupted(received[0], f"{stage} has ended; {hint}")
    if code:
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        if code == cli.EXIT_USAGE:
            how += f"; if it refuses outputs of other settings, add --from {stage}"
        raise DataError(f"{stage}, the last command above, failed ({how}).")


def results(args: argparse.Namespace) -> tuple[dict, str]:
    """What results.json and results.md hold; raises OSError if a split was not evaluated."""
    is_other = args.classes or args.cam_dir or args.ids
    theirs = {} if is_other else PUBLISHED.get(args.network, {})
    scores: dict[str, dict] = {key: {} for key in SCORED}
    lines = [
        f"mIoU in per cent, {args.network}.\n",
        "| stage | split | ours | images | published | difference |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for stage, (title, splits) in SCORED.items():
        for split in splits:
            published = theirs.get(stage, (None, None))[split == "val"]
            path = Path(args.out_dir, f"{stage}_{split}.json")
            if stage in OPTIONAL and not path.exists():
                continue
            content = json.loads(path.read_text())
            ours = {key: content[key] for key in ("miou", "images", "missing")}
            scores[stage][split] = {**ours, "published": published}
            beside = f"{published} | {ours['miou'] - published:+.1f}" if published else "- | -"
            figures = f"{ours['miou']:.1f} | {ours['images']:,} | {beside}"
            lines.append(f"| {title} | {split} | {figures} |")
    notes = notes_on(args, has_published=bool(theirs))
    return {**scores, "notes": notes}, "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def notes_on(args: argparse.Namespace, has_published: bool) -> list[str]:
    """What one must know to read the table: the splits, and how the run differs from the recipe."""
    notes = [
        "VOC 2012: scores are of train (1,464 images) and val (1,449) against SegmentationClass.",
        "VOC 2012: labels to train a segmenter with are made on train_aug (10,582 images).",
    ]
    if args.ids:
        notes = [f"Only the images whose ids match {args.ids}."]
    if args.recipe:
        notes.append(f"Recipe: {args.recipe}.")
    for program in PROGRAMS:
        if flags := getattr(args, f"{program}_args"):
            notes.append(f"Not the network's recipe: {program} was run with {shlex.join(flags)}.")
    if has_published and args.network in PUBLISHED_TEST:
        figure = PUBLISHED_TEST[args.network]
        notes.append(f"The segmenter's published figure on test is {figure}: infer_seg --help.")
    if not has_published:
        notes.append("There are no published figures of this network and data.")
    elif args.weights == FRESH:
        notes.append("Trained from random numbers; the published figures start from ImageNet.")
    return notes


def main(args: argparse.Namespace) -> None:
    if args.ids and args.list_dir:
        raise UsageError("--ids selects what prepare lists; leave it out, or --list_dir.")
    todo = commands(args)
    require_flags(args, dict(todo))
    if args.first_stage:
        for stage in dict(todo):
            remove_outputs(args, stage)
    else:
        todo = [(stage, words) for stage, words in todo if not is_complete(args, stage, words)]
    for stage, words in todo:
        print(f"\n$ python3 {shlex.join(words)}", flush=True)
        if not args.dry_run:
            run(stage, words)
    if args.dry_run or "evaluate" not in dict(todo):
        return
    content, text = results(args)
    write_json(Path(args.out_dir, "results.json"), content)
    write_bytes(Path(args.out_dir, "results.md"), f"{text}\n".encode())
    print(f"\n{text}\n\nwritten to {Path(args.out_dir, 'results.md')} and results.json")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
