"""What every program's command line shares: argument types, exit codes, progress."""

import argparse
import importlib
import importlib.util
import io
import math
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

from tqdm import tqdm

from tool.crf import BACKENDS
from tool.run.devices import is_out_of_memory
from tool.run.errors import DataError, Interrupted, UsageError, reason
from tool.seeds import NORMALIZATIONS

EXIT_DATA, EXIT_USAGE = 1, 2
# Pairs reach at most over the width of most images' grids.
MAX_RADIUS = 64
MAX_WORKERS = 256
# A shell's exit code of a program that a signal ended: this and the signal's number.
EXIT_SIGNAL = 128


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line, call ``main(args)`` and turn a foreseen failure into one sentence.

    Exit codes: 0 done, 1 the data cannot be used, 2 the command line cannot, 130 interrupted,
    143 ended by SIGTERM between two steps, 141 the reader of the output has gone.
    An unforeseen exception keeps its traceback: it is a bug to report.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr escapes what it cannot encode, anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parser.parse_args()
    try:
        main(args)
        sys.stdout.flush()
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:
        # Whoever read the output has seen enough (| head).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_SIGNAL + 13)  # SIGPIPE, which Windows lacks
    except (DataError, OSError) as error:
        _leave(f"error: {sentence(error)}", EXIT_DATA)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _leave(f"error: out of memory ({reason(error)}); docs/hardware.md says what to lower.", 1)
    except Interrupted as error:
        _leave(f"interrupted: {error}", EXIT_SIGNAL + error.signal_number)
    except KeyboardInterrupt:
        _leave("interrupted: finished files are kept.", EXIT_SIGNAL + signal.SIGINT)


def require_distinct_outputs(
    outputs: Mapping[str, str | None], inputs: Mapping[str, str | None]
) -> None:
    """Raise UsageError if an output file is a folder, or also an input or another output.

    Both are paths by flag; None: not named.
    """
    taken = {os.path.realpath(path): name for name, path in inputs.items() if path}
    for name, path in outputs.items():
        if path is None:
            continue
        if os.path.isdir(path):
            raise UsageError(f"{name} {path}: is a folder; name a file.")
        other = taken.setdefault(os.path.realpath(path), name)
        if other != name:
            raise UsageError(f"{name} {path}: is {other}, too, which it would replace.")


def require_distinct_folders(args: argparse.Namespace, *flags: str) -> None:
    """Raise UsageError if two of these flags, where they are named, are the same folder."""
    taken: dict[str, str] = {}
    for flag in filter(vars(args).get, flags):
        path = getattr(args, flag)
        if other := taken.get(os.path.realpath(path)):
            raise UsageError(f"--{flag} {path}: is --{other}, too; name another folder.")
        taken[os.path.realpath(path)] = flag


def sentence(error: DataError | OSError) -> str:
    """What went wrong, for people."""
    if isinstance(error, DataError):
        return str(error)
    # Where a renaming failed, the second name is the one that the user knows.
    place = error.filename2 or error.filename
    reason = error.strerror or str(error)
    return f"{place}: {reason}." if place else f"{reason}."


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def make_parser(doc: str, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows a program's docstring, and each flag's default."""
    return argparse.ArgumentParser(prog, description=doc, formatter_class=help_formatter)


def help_formatter(prog: str) -> argparse.HelpFormatter:
    """Keeps the line breaks of a program's docstring and adds each flag's default."""
    return _HelpFormatter(prog, max_help_position=30, width=100)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None:
            return action.help
        if isinstance(action.default, tuple):  # as it is typed
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """argparse type: a finite int or float from ``low`` to ``high``, or ``above`` ``low``."""
    wanted = "a whole number" if kind is int else "a number"
    if above:
        wanted += f" above {low:g}"
    elif high < math.inf:
        wanted += f" from {low:g} to {high:.10g}"
    else:
        wanted += f" of at least {low:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


count = number(int, 1)
positive = number(float, 0, above=True)
side_length = number(int, 1, 65535)  # pixels, at most as many as a JPEG's side has
random_seed = number(int, 0, 2**32 - 1)


# The attribute by which a network's kind is known, and what the kind is called.
NETWORK_KINDS = {
    "forward_cam": "a classifier (..._cls)",
    "forward_features": "an AffinityNet (..._aff)",
    "loss_on_grid": "a segmenter (..._seg)",
}


def network(*attributes: str) -> Callable[[str], ModuleType]:
    """argparse type: a module like ``network.vgg16_cls``, whose ``Net`` has one of these."""

    def parse(name: str) -> ModuleType:
        # Only modules of the package ``network``: a flag must not import just anything.
        package, _, module = name.rpartition(".")
        if package not in ("", "network") or not module.isidentifier():
            raise argparse.ArgumentTypeError(f"{name!r} is not a module of the package network")
        try:
            loaded = importlib.import_module(f"network.{module}")
        except ModuleNotFoundError as error:
            if error.name != f"network.{module}":  # the module is there, but lacks one of its own
                raise
            modules = [info.name for info in pkgutil.iter_modules(sys.modules["network"].__path__)]
            known = ", ".join(
                module for module in modules if module.endswith(("_cls", "_aff", "_seg"))
            )
            message = f"there is no network {name!r}, but {known}"
            raise argparse.ArgumentTypeError(message) from error
        except (TypeError, ValueError) as error:  # argparse would blame the flag
            raise ImportError(f"network.{module} cannot be imported") from error
        if not any(hasattr(getattr(loaded, "Net", None), name) for name in attributes):
            kinds = " or ".join(NETWORK_KINDS[name] for name in attributes)
            raise argparse.ArgumentTypeError(f"{name!r} is not {kinds}")
        return loaded

    return parse


classifier, affinity_network = network("forward_cam"), network("forward_features")
segmenter = network("loss_on_grid")
any_network = network(*NETWORK_KINDS)


def add_network_argument(parser: argparse.ArgumentParser, kind: Callable, default: str) -> None:
    """``--network``; ``kind`` is ``classifier`` or ``affinity_network``."""
    text = "module of the network"
    parser.add_argument("--network", type=kind, default=default, metavar="MODULE", help=text)


def add_training_arguments(
    parser: argparse.ArgumentParser,
    batch_size: int,
    crop_size: int,
    epochs: int | None = None,
    lr: float = 0.1,
    momentum: float | None = None,
) -> None:
    """The flags of all training programs, besides ``--network``, with a stage's defaults."""
    add = parser.add_argument
    add(
        "--weights",
        required=True,
        help="file to start from; imagenet: the network's published start, downloaded; none",
    )
    add("--train_list", default="voc12/train_aug.txt", help="images to train on")
    add("--session_name", help="where to write .pth, .log, .csv (default: the network's name)")
    add("--batch_size", type=count, default=batch_size, help="images in a step, of all processes")
    if epochs:
        add("--max_epoches", type=count, default=epochs, help="passes over the list")
    add("--crop_size", type=side_length, default=crop_size, help="side of a crop, pixels")
    add("--lr", type=positive, default=lr, help="first learning rate; see the commands above")
    add("--wt_dec", type=number(float, 0), default=5e-4, help="weight decay")
    text = "momentum"
    if momentum is None:
        text += (
            " (default: the value of --wt_dec, which the released code passes in its place, and "
            "with which the published numbers were made)"
        )
    add("--momentum", type=number(float, 0, 1), default=momentum, help=text)
    add_run_arguments(parser)
    add_speed_arguments(parser)
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: continue from <session_name>.ckpt where an unfinished run of the same settings "
        "left one; never: start from the beginning; or the checkpoint to continue from",
    )
    add(
        "--save_every",
        type=count,
        metavar="STEPS",
        help="how often to write <session_name>.ckpt (default: after each epoch)",
    )
    text = "how often to add the mean losses to the .csv"
    add("--log_every", type=count, default=10, metavar="STEPS", help=text)
    add("--tensorboard", metavar="DIR", help="also write the figures there, for TensorBoard")


def add_inference_arguments(parser: argparse.ArgumentParser, weights_required: bool = True) -> None:
    """The flags of all inference programs, besides ``--network``."""
    add = parser.add_argument
    text = "the network's trained weights; none: it is untrained"
    add("--weights", required=weights_required, help=text)
    add("--infer_list", default="voc12/train.txt", help="images to make outputs of")
    add(
        "--overwrite",
        action="store_true",
        help="make outputs again that are complete, or of other settings; these images' files "
        "are removed first",
    )
    text = "continue past images that cannot be read or need more memory than there is, and list "
    text += "them at the end (exit code 1)"
    add("--skip_bad", action="store_true", help=text)
    add_run_arguments(parser)
    add_speed_arguments(parser)


def add_normalize_argument(parser: argparse.ArgumentParser) -> None:
    """``--normalize`` of a program that reads class maps."""
    text = "scale each class map to 0..1: max (negative values to 0, by the largest) or minmax"
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help=text)


def add_crf_argument(parser: argparse.ArgumentParser) -> None:
    """``--crf_backend`` of a program that runs the dense CRF."""
    text = "what computes the dense CRF; both give the same, torch is faster"
    default = BACKENDS[0]
    parser.add_argument(
        "--crf_backend", type=_crf_backend, choices=BACKENDS, default=default, help=text
    )


def _crf_backend(name: str) -> str:
    if name == "pydensecrf" and importlib.util.find_spec(name) is None:
        raise argparse.ArgumentTypeError(
            "the module pydensecrf is not installed: pip install pydensecrf2 (needs g++ and "
            "Python 3.10 to 3.12), or take torch, which gives the same"
        )
    return name


def add_radius_argument(parser: argparse.ArgumentParser) -> None:
    """How near the cells of a pair are; both AffinityNet programs must agree on it."""
    text = "pairs are nearer than this many cells of the feature grid (the paper's gamma)"
    parser.add_argument("--radius", type=number(int, 2, MAX_RADIUS), default=5, help=text)


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that gain time and change rounding; all are off by default."""
    add = parser.add_argument
    add(
        "--amp",
        choices=("bf16", "fp16"),
        help="compute convolutions in 16 bits: faster and half the memory on recent GPUs; bf16 "
        "also on some CPUs; results differ in the third digit (default: 32 bits)",
    )
    text = "round the factors of convolutions to 10 bits, on GPUs from Ampere on; the fourth digit"
    add("--tf32", action="store_true", help=text)
    text = "compile the network by torch.compile; takes a minute, needs a C++ compiler"
    add("--compile", action="store_true", help=text)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``--num_workers``, ``--device`` and ``--seed``."""
    add = parser.add_argument
    workers, text = number(int, 0, MAX_WORKERS), "processes that load images; 0: the program itself"
    add("--num_workers", type=workers, default=default_num_workers(), help=text)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--seed", type=random_seed, default=0, help="same seed, same result on a CPU")


def default_num_workers() -> int:
    """The released code's 8, or this process's share of the cores that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, on this machine
    return min(8, max(1, (cores or 1) // processes))


def progress(items: Iterable, description: str, **kwargs) -> tqdm:
    """A tqdm bar on stderr that counts images per second; not at a terminal, it moves rarely."""
    bar = {"unit": "img", "mininterval": 0.1 if sys.stderr.isatty() else 10}
    return tqdm(items, desc=description, dynamic_ncols=True, **bar, **kwargs)
