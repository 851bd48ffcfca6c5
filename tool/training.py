"""What both training stages share: optimizer, learning rate, one epoch, the session's log."""

import argparse
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tool import cli
from tool.errors import DataError, UsageError
from tool.maps import atomic_write

# Of the four parameter groups, pretrained weights and biases, new weights and biases: learning rate
# times this, and whether they decay (released code).
GROUP_RATES = (1, 2, 10, 20)
GROUP_DECAYS = (True, False, True, False)
POLY_POWER = 0.9
# Whose versions, besides PyTorch's, can change a training's numbers.
PACKAGES = ("torchvision", "numpy", "pillow")


def add_training_arguments(
    parser: argparse.ArgumentParser, batch_size: int, epochs: int, crop_size: int
) -> None:
    """The flags of both training programs, besides ``--network``, with a stage's defaults."""
    add = parser.add_argument
    add("--weights", required=True, help="weight file to start from, or none (random numbers)")
    add("--train_list", default="voc12/train_aug.txt", help="images to train on")
    add("--session_name", help="where to write .pth and .log (default: the network's name)")
    add("--batch_size", type=cli.positive_int, default=batch_size, help="images in a step")
    add("--max_epoches", type=cli.positive_int, default=epochs, help="passes over the list")
    add("--crop_size", type=cli.positive_int, default=crop_size, help="side of a crop, pixels")
    add(
        "--lr",
        type=cli.positive_float,
        default=0.1,
        help="first learning rate; ResNet-38: 0.01",
    )
    add("--wt_dec", type=cli.non_negative_float, default=5e-4, help="weight decay")
    add(
        "--momentum",
        type=cli.fraction,
        help="momentum (default: the value of --wt_dec, which the released code passes in its "
        "place, and with which the published numbers were made)",
    )
    cli.add_run_arguments(parser)


def session_name(args: argparse.Namespace) -> str:
    """``--session_name``, or the network's name; raises UsageError if no file can have it."""
    name = args.session_name or args.network.__name__.rpartition(".")[2]
    if not Path(name).name or name.endswith(("/", os.sep)):
        raise UsageError(f"--session_name {name}: must end in a file's name, without .pth.")
    for suffix in (".pth", ".log"):
        if Path(name + suffix).is_dir():
            raise UsageError(f"--session_name {name}: {name}{suffix} is a folder.")
    return name


def build_optimizer(
    net: nn.Module, lr: float, weight_decay: float, momentum: float | None = None
) -> torch.optim.SGD:
    """SGD over a network's four parameter groups.

    Momentum is the decay's value unless given: the released code passes the decay where momentum
    stands.
    """
    return torch.optim.SGD(
        [
            {"params": group, "base_lr": rate * lr, "weight_decay": weight_decay if decays else 0}
            for group, rate, decays in zip(
                net.get_parameter_groups(), GROUP_RATES, GROUP_DECAYS, strict=True
            )
        ],
        lr=lr,
        momentum=weight_decay if momentum is None else momentum,
    )


@dataclass(frozen=True)
class Schedule:
    """How many steps there are; a last short batch is dropped."""

    num_images: int
    batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size

    @property
    def max_step(self) -> int:
        return self.steps_per_epoch * self.epochs


def make_schedule(num_images: int, args: argparse.Namespace) -> Schedule:
    """The run's schedule; raises DataError if the list does not fill one batch."""
    if num_images < args.batch_size:
        raise DataError(
            f"{args.train_list}: its {num_images} images do not fill a batch of {args.batch_size}; "
            "take a smaller --batch_size."
        )
    return Schedule(num_images, args.batch_size, args.max_epoches)


def set_poly_lr(optimizer: torch.optim.Optimizer, step: int, max_step: int) -> None:
    """lr = base lr * (1 - step / max_step)^0.9, for the given step (from 0) and every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * (1 - step / max_step) ** POLY_POWER


def train_one_epoch(
    net: nn.Module,
    batches: Iterable[Any],
    losses_of: Callable[[nn.Module, Any], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    epoch: int,
) -> dict[str, float]:
    """One pass over the batches (``epoch`` from 0); returns the mean of each loss over the steps.

    ``losses_of(net, batch)`` gives scalars by name, ``loss`` being the one to minimize. Raises
    DataError as soon as that is not finite, with its parts and the step.
    """
    net.train()
    sums: dict[str, float] = {}
    first_step = epoch * schedule.steps_per_epoch
    num_images = schedule.steps_per_epoch * schedule.batch_size
    with cli.progress(None, f"epoch {epoch + 1}/{schedule.epochs}", total=num_images) as bar:
        for step, batch in enumerate(batches, start=first_step):
            set_poly_lr(optimizer, step, schedule.max_step)
            losses = losses_of(net, batch)
            values = {name: value.item() for name, value in losses.items()}
            _require_finite(values, step)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizer.step()

            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            bar.update(schedule.batch_size)
    return {name: total / schedule.steps_per_epoch for name, total in sums.items()}


def _require_finite(losses: dict[str, float], step: int) -> None:
    if not math.isfinite(losses["loss"]):
        parts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise diverged(f"the loss is not finite at step {step} ({parts})")


def diverged(what: str) -> DataError:
    """The error that ends a training whose numbers have run away."""
    return DataError(f"{what}; no weights were written; try a smaller --lr.")


def save_weights(path: str | os.PathLike, net: nn.Module) -> None:
    """Write the network's state dict, on the CPU, whole or not at all.

    Raises DataError if a weight is not finite: the last step can diverge after its loss was seen.
    """
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise diverged(f"{name} is not finite after the last step")
    with atomic_write(path) as file:
        torch.save(state, file)


class SessionLog:
    """``<session_name>.log``: what was run, with what, and what came of it.

    It holds neither times nor dates: two runs of the same command and seed have equal logs.
    """

    def __init__(self, path: str | os.PathLike, seed: int, device: torch.device):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        self._write(f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}")
        self._write(
            # torch's own name of its version tells the build, too (+cpu, +cu...)
            f"versions: python {platform.python_version()}, torch {torch.__version__}, "
            + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        )
        self._write(f"seed: {seed}, device: {device}, threads: {torch.get_num_threads()}")

    def say(self, message: str) -> None:
        """Write a line to the log and to stdout."""
        print(message, flush=True)
        self._write(message)

    def _write(self, message: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(message + "\n")
