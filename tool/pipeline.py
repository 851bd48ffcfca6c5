"""The four programs and the evaluation of maps and labels, in a row, each as a process.

    python3 -m tool.pipeline --voc12_root VOC2012 --network vgg16 --weights vgg16_20M.caffemodel
        --out_dir runs/vgg16
    ... --dry_run                            print the commands that would be run, and run nothing
    ... --train_cls_args "--batch_size 8"    change a stage's settings
    ... --from train_aff                     run this stage and those after it again
    ... --stages infer_aff evaluate          see to these stages only

The stages are prepare, train_cls, infer_cls, train_aff, infer_aff and evaluate. Every command is
printed as it is run, to be copied. Repeat the pipeline's command after an interruption, or with
other settings: what is complete is not run again; a stage whose settings changed is, and so are all
those after it, and why is printed. SIGINT and SIGTERM end the running stage, too.

In --out_dir: lists/ (from voc12.prepare), cls.pth, aff.pth and their .log, the folders cam, la_crf,
ha_crf, rw, the figures cam_train.json, ..., pipeline.json (what was run with which settings), and
results.md and results.json: our mIoU beside that of the released code, and
{"cam": {"train": {"miou", "images", "missing"}, "val": ...}, "rw": {...}, "table": [...], ...}.
Labels are made and scored on train and val; training takes train_aug, or train where the devkit has
no augmented masks.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tool.files import atomic_write
from tool.run import cli
from tool.run.errors import DataError, UsageError
from tool.steps import History, Step, Word
from tool.tables import PUBLISHED, SPLIT_RULES, comparison, markdown
from tool.weights import WEIGHT_WORDS

REPOSITORY = Path(__file__).resolve().parent.parent
SCORED_SPLITS = ("train", "val")
PROGRAMS = ("train_cls", "infer_cls", "train_aff", "infer_aff")
STAGES = ("prepare", *PROGRAMS, "evaluate")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What the networks are trained and run with. The published figures were made with these of vgg16
# and resnet38, which differ in the learning rate only.
INFERENCE = {
    "infer_cls": "--low_alpha 4 --high_alpha 32",
    "infer_aff": "--alpha 16 --beta 8 --radius 5 --logt 8",
}
RECIPES: dict[str, dict[str, str]] = {
    network: {
        "train_cls": f"--lr {lr} --batch_size 16 --max_epoches 15 --crop_size 448 --wt_dec 5e-4",
        "train_aff": f"--lr {lr} --batch_size 8 --max_epoches 8 --crop_size 448 --wt_dec 5e-4",
        **INFERENCE,
    }
    for network, lr in (("vgg16", 0.1), ("resnet38", 0.01))
}
# From scratch, on the toy devkit: hence a customary momentum, small crops and a short walk.
RECIPES["tiny"] = {
    "train_cls": "--lr 0.05 --momentum 0.9 --batch_size 8 --max_epoches 40 --crop_size 160 "
    "--resize_long 128 224 --val_crop_size 192",
    "train_aff": "--lr 0.1 --momentum 0.9 --batch_size 8 --max_epoches 20 --crop_size 160",
    **INFERENCE,
    "infer_aff": "--alpha 16 --beta 8 --radius 5 --logt 4",
}


def recipes_text() -> str:
    """The recipes for --help."""
    lines = ["recipes (--train_cls_args and so on override them flag by flag):"]
    for network, recipe in RECIPES.items():
        lines.append(f"  {network}")
        lines += [f"    {program}  {recipe[program]}" for program in PROGRAMS]
    return "\n".join(lines)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m tool.pipeline",
        description=__doc__,
        epilog=recipes_text(),
        formatter_class=cli.help_formatter,
    )
    add = parser.add_argument
    add("--voc12_root", required=True, help="the devkit's folder VOC2012")
    add("--network", required=True, choices=sorted(RECIPES), help="backbone of both networks")
    add("--weights", required=True, help="what both trainings start from; see train_cls.py")
    add(
        "--aff_weights",
        help="weights that AffinityNet starts from (default: --weights, or with --weights none the "
        "trained classifier)",
    )
    add("--out_dir", required=True, help="folder for everything that is made")
    add("--list_dir", help="id lists made before by voc12.prepare (default: made in --out_dir)")
    add("--classes", metavar="FILE", help="class names of another data set, one a line")
    for program in PROGRAMS:
        add(
            f"--{program}_args",
            type=_shell_words,
            metavar="'--FLAG VALUE ...'",
            help=f"further flags of {program}.py; they override the network's recipe",
        )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        metavar="STAGE",
        help="see to these stages only, and leave alone those that are complete",
    )
    chosen.add_argument(
        "--from",
        dest="first_stage",
        choices=STAGES,
        metavar="STAGE",
        help="take what earlier stages made as it is, and run this one and those after it, also "
        "where they are complete; after an interruption leave it out, to go on",
    )
    add("--dry_run", action="store_true", help="print the commands that would be run, no more")
    cli.add_run_arguments(parser)
    return parser


def _shell_words(text: str) -> str:
    """argparse type: words as a shell takes them."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no flags ({error})") from error
    return text


class Pipeline:
    """The commands, by stage; ``run`` carries them out."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = Path(args.out_dir)
        self.lists = Path(args.list_dir) if args.list_dir else self.out / "lists"
        self.data_flags: list[Word] = ["--voc12_root", Path(args.voc12_root)]
        if args.classes:
            self.data_flags += ["--classes", Path(args.classes)]

    def steps(self) -> list[Step]:
        """All commands in their order, but for that of prepare."""
        train_list, val_list = self.training_list(), self.lists / "val.txt"
        return [
            self.train("cls", _weights(self.args.weights), "--val_list", val_list),
            self.infer_cls("train", train_list, crf=True),
            self.infer_cls("val", val_list, crf=False),
            self.train(
                "aff",
                self.affinity_start(),
                *("--la_crf_dir", self.out / "la_crf", "--ha_crf_dir", self.out / "ha_crf"),
            ),
            *(self.infer_aff(split) for split in SCORED_SPLITS),
            *(self.evaluate(split, "--cam", "cam") for split in SCORED_SPLITS),
            *(self.evaluate(split, "--pred", "rw") for split in SCORED_SPLITS),
        ]

    def prepare(self) -> Step:
        command = ["-m", "voc12.prepare", *self.data_flags, "--out_dir", self.lists]
        return Step("prepare", "prepare", command, [self.lists])

    def train(self, kind: str, start: Word, *flags: Word) -> Step:
        """The training of the classifier ("cls") or of AffinityNet ("aff")."""
        session = self.out / kind
        flags = ("--train_list", self.training_list(), "--session_name", session, *flags)
        command = self.program(f"train_{kind}", "--weights", start, *flags)
        return Step(f"train_{kind}", f"train_{kind}", command, [session.with_suffix(".pth")])

    def infer_cls(self, name: str, images: Path, crf: bool) -> Step:
        folders = ["cam", "la_crf", "ha_crf"] if crf else ["cam"]
        outputs = [self.out / folder for folder in folders]
        flags = [word for folder in outputs for word in (f"--out_{folder.name}", folder)]
        weights = self.out / "cls.pth"
        command = self.program("infer_cls", "--weights", weights, "--infer_list", images, *flags)
        return Step("infer_cls", f"infer_cls {name}", command, outputs)

    def infer_aff(self, split: str) -> Step:
        images, labels = self.lists / f"{split}.txt", self.out / "rw"
        flags = ("--infer_list", images, "--cam_dir", self.out / "cam", "--out_rw", labels)
        command = self.program("infer_aff", "--weights", self.out / "aff.pth", *flags)
        return Step("infer_aff", f"infer_aff {split}", command, [labels])

    def evaluate(self, split: str, flag: str, folder: str) -> Step:
        figures = self.figures(folder, split)
        command = ["-m", "voc12.evaluate", *self.data_flags, "--list", self.lists / f"{split}.txt"]
        command += [flag, self.out / folder, "--json", figures]
        command += ["--num_workers", self.args.num_workers]
        return Step("evaluate", f"evaluate {folder} {split}", command, [figures])

    def program(self, name: str, *flags: Word) -> list[Word]:
        """The command of one of the four programs, with the recipe's flags and the user's."""
        kind = name.partition("_")[2]
        args = self.args
        command = [os.path.relpath(REPOSITORY / f"{name}.py"), *self.data_flags]
        command += ["--network", f"network.{args.network}_{kind}", *flags]
        if kind == "cls":
            command += ["--label_file", self.lists / "cls_labels.npy"]
        command += ["--device", args.device, "--seed", args.seed]
        command += ["--num_workers", args.num_workers]
        return command + self.recipe(name)

    def recipe(self, program: str) -> list[str]:
        """The flags of the network's recipe and, overriding them, the user's."""
        overrides = shlex.split(getattr(self.args, f"{program}_args") or "")
        return shlex.split(RECIPES[self.args.network][program]) + overrides

    def training_list(self) -> Path:
        """train_aug.txt, or train.txt where the devkit has no augmented masks."""
        augmented, plain = self.lists / "train_aug.txt", self.lists / "train.txt"
        if self.args.dry_run and not plain.exists():  # what voc12.prepare would find
            has_masks = Path(self.args.voc12_root, "SegmentationClassAug").is_dir()
            return augmented if has_masks else plain
        return augmented if augmented.exists() else plain

    def affinity_start(self) -> Word:
        """The weights that AffinityNet starts from."""
        if self.args.aff_weights:
            return _weights(self.args.aff_weights)
        return self.out / "cls.pth" if self.args.weights == "none" else _weights(self.args.weights)

    def figures(self, folder: str, split: str) -> Path:
        """Where the evaluation of a folder over a split stands."""
        return self.out / f"{folder}_{split}.json"

    def run(self) -> None:
        """Run what is not complete of the stages that the command line names.

        Raises UsageError if a stage would not take the flags that it is given.
        """
        changed = [name for name in PROGRAMS if getattr(self.args, f"{name}_args")]
        commands = {step.stage: step.command for step in self.steps()}
        require_flags({name: commands[name] for name in changed if name in self.stages()})
        history = History(self.out, pretend=self.args.dry_run)
        if not self.args.list_dir:
            # The lists' content is among the settings of what reads them: no step is stale because
            # prepare ran.
            self.run_steps([self.prepare()], history)
        self.run_steps(self.steps(), history)

    def run_steps(self, steps: Sequence[Step], history: History) -> None:
        for index, step in enumerate(steps):
            if step.stage not in self.stages():
                continue
            reason = history.reason_to_run(step)
            if reason is None and self.args.first_stage:
                reason = f"--from {self.args.first_stage}"
            if reason is None:
                print(f"\n# {step.name}: complete, not run again", flush=True)
                continue
            print(f"\n# {step.name}: {reason}", flush=True)
            command = step.command + self.fresh_start(step, history)
            history.begin(step, later=steps[index + 1 :])
            if self.args.dry_run:
                print(shown(command))
            else:
                run(command)
            history.end(step)

    def stages(self) -> Sequence[str]:
        """The stages that the command line names."""
        if self.args.first_stage:
            return STAGES[STAGES.index(self.args.first_stage) :]
        return self.args.stages or STAGES

    def fresh_start(self, step: Step, history: History) -> list[str]:
        """The flags by which a step does not go on from what another run of it has left."""
        if step.stage.startswith("infer"):
            again = self.args.first_stage or not history.goes_on(step)
            return ["--overwrite"] if again else []
        is_training = step.stage.startswith("train")
        checkpoint = step.outputs[0].with_suffix(".ckpt")
        if is_training and checkpoint.exists() and history.changed_settings(step):
            return ["--resume", "never"]
        return []

    def results(self) -> dict:
        """What results.json holds; raises DataError if a split was not evaluated."""
        args = self.args
        results = {
            folder: {split: self._score(folder, split) for split in SCORED_SPLITS}
            for folder in ("cam", "rw")
        }
        comparable = not args.classes and any(line.network == args.network for line in PUBLISHED)
        published = PUBLISHED if comparable else ()
        overrides = {name: getattr(args, f"{name}_args") for name in PROGRAMS}
        return {
            **results,
            "table": comparison(results, args.network, self.alphas(), published),
            "split_rules": list(SPLIT_RULES),
            "network": args.network,
            "weights": args.weights,
            "overrides": {name: flags for name, flags in overrides.items() if flags},
        }

    def _score(self, folder: str, split: str) -> dict:
        path = self.figures(folder, split)
        try:
            figures = json.loads(path.read_text())
            return {key: figures[key] for key in ("miou", "images", "missing")}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path}: no figures of voc12.evaluate; run --from evaluate."
            ) from error

    def alphas(self) -> tuple[float, float, float]:
        """The alphas in effect: of the low CRF, the random walk and the high CRF."""
        parser = argparse.ArgumentParser(add_help=False)
        for flag in ("--low_alpha", "--alpha", "--high_alpha"):
            parser.add_argument(flag, type=float)
        classifier, _ = parser.parse_known_args(self.recipe("infer_cls"))
        walk, _ = parser.parse_known_args(self.recipe("infer_aff"))
        return classifier.low_alpha, walk.alpha, classifier.high_alpha


def _weights(text: str) -> Word:
    return text if text in WEIGHT_WORDS else Path(text)


def shown(command: Sequence[Word]) -> str:
    """A command as one types it."""
    return f"$ python3 {shlex.join(str(word) for word in command)}"


# Parses the command lines of programs, and does no more; the program's name begins the error.
PARSE = """
import importlib, json, sys
for name, words in json.loads(sys.argv[1]).items():
    sys.argv[0] = name
    importlib.import_module(name).get_args_parser().parse_args(words)
"""


def require_flags(commands: Mapping[str, Sequence[Word]]) -> None:
    """Raise UsageError if a program does not take its command's flags.

    Better before the first stage than days later.
    """
    if not commands:
        return
    words = json.dumps(
        {name: [str(word) for word in words[1:]] for name, words in commands.items()}
    )
    command = [sys.executable, "-c", PARSE, words]
    done = subprocess.run(
        command, env=_environment(), stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == cli.EXIT_USAGE:  # for any other reason, the stage itself says why
        program, _, problem = done.stderr.strip().rpartition("\n")[2].partition(": error: ")
        raise UsageError(f"--{program}_args: {problem}")


def _environment() -> dict[str, str]:
    """In which python3 finds the packages also where the pipeline is started from elsewhere."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(command: Sequence[Word]) -> None:
    """Print a Python command and run it; raises DataError if it fails.

    A signal that asks this program to end reaches the command, which may take its time; then
    KeyboardInterrupt is raised for SIGINT, else SystemExit.
    """
    print(shown(command), flush=True)
    with stop_signals() as (received, receivers):
        # In a session of its own, so that Ctrl-C at a terminal reaches it once, through us.
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=_environment(), start_new_session=True
        )
        receivers.append(process)
        for number in received:  # those that came before there was a process
            process.send_signal(number)
        code = process.wait()
    if received:
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        name = signal.Signals(received[0]).name
        print(f"ended by {name}, and the stage above with it.", file=sys.stderr)
        raise SystemExit(cli.EXIT_SIGNAL + received[0])
    if code:
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        raise DataError(f"the last command above failed ({how}).")


@contextmanager
def stop_signals() -> Iterator[tuple[list[int], list[subprocess.Popen]]]:
    """Within the block, signals that would end this program go into the first list.

    Those that are ignored (by nohup, say) stay so; the processes in the second list get the others.
    """
    received: list[int] = []
    receivers: list[subprocess.Popen] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for process in receivers:
            process.send_signal(number)

    before = {
        number: signal.signal(number, forward)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield received, receivers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(results: dict) -> str:
    """The table of results as Markdown, with what it takes to read it right."""
    notes = [*results["split_rules"], *departures(results)]
    return "\n".join(
        ["mIoU in per cent.", "", markdown(results["table"]), "", *(f"- {note}" for note in notes)]
    )


def departures(results: dict) -> list[str]:
    """How a run differs from the one that the published figures stand for."""
    notes = [f"{name} was run with {flags}" for name, flags in results["overrides"].items()]
    notes = [f"Not the network's recipe: {note}." for note in notes]
    if not any(row["published"] for row in results["table"]):
        notes.append("There are no published figures of this network and data.")
    elif results["weights"] == "none":
        notes.append("Trained from random numbers; the published figures start from ImageNet.")
    return notes


def main(args: argparse.Namespace) -> None:
    pipeline = Pipeline(args)
    pipeline.run()
    if args.dry_run or "evaluate" not in pipeline.stages():
        return
    results = pipeline.results()
    text = report(results)
    for name, content in (("results.json", json.dumps(results, indent=2)), ("results.md", text)):
        with atomic_write(pipeline.out / name) as file:
            file.write(f"{content}\n".encode())
    print(f"\n{text}\n\nwritten to {pipeline.out / 'results.md'} and results.json")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
