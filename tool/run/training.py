"""What both training stages share: optimizer, learning rate, the loop, checkpoints."""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tool.affinity import source_grid
from tool.files import remove_leftovers
from tool.run import cli
from tool.run.checkpoint import find_checkpoint, read_checkpoint, settings_of, write_checkpoint
from tool.run.devices import (
    StopSignals,
    data_parallel,
    gather,
    is_main,
    random_states,
    rank,
    restore_random_states,
    seed_rank,
    shard,
    sum_over_ranks,
    to_device,
    world_size,
)
from tool.run.errors import DataError, Interrupted, UsageError
from tool.run.loading import shuffled
from tool.run.records import Records, describe_run
from tool.weights.pytorch import save_tensors

# Of the four parameter groups, pretrained weights and biases, new weights and biases: learning rate
# times this, and whether they decay (released code).
GROUP_RATES = (1, 2, 10, 20)
GROUP_DECAYS = (True, False, True, False)
POLY_POWER = 0.9
# What is written under the session's name.
SESSION_SUFFIXES = (".pth", ".log", ".csv", ".ckpt")


def add_training_arguments(
    parser: argparse.ArgumentParser, batch_size: int, epochs: int, crop_size: int
) -> None:
    """The flags of both training programs, besides ``--network``, with a stage's defaults."""
    add = parser.add_argument
    add(
        "--weights",
        required=True,
        help="file to start from (.pth, .safetensors, .caffemodel, .params), imagenet (VGG-16's, "
        "downloaded) or none (random numbers)",
    )
    add("--train_list", default="voc12/train_aug.txt", help="images to train on")
    add("--session_name", help="where to write .pth, .log, .csv (default: the network's name)")
    add(
        "--batch_size",
        type=cli.positive_int,
        default=batch_size,
        help="images in a step, all processes together",
    )
    add("--max_epoches", type=cli.positive_int, default=epochs, help="passes over the list")
    add("--crop_size", type=cli.side_length, default=crop_size, help="side of a crop, pixels")
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
    cli.add_speed_arguments(parser)
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on from <session_name>.ckpt where an unfinished run of the same settings "
        "left one; never: start anew; or the checkpoint to go on from",
    )
    add(
        "--save_every",
        type=cli.positive_int,
        metavar="STEPS",
        help="how often to write <session_name>.ckpt (default: after each epoch); SIGINT and "
        "SIGTERM write one, too; it goes when the .pth is complete",
    )
    add(
        "--log_every",
        type=cli.positive_int,
        default=10,
        metavar="STEPS",
        help="how often to read the losses from the device and add a row to the .csv",
    )
    add("--tensorboard", metavar="DIR", help="also write the figures there, for TensorBoard")


def session_name(args: argparse.Namespace) -> str:
    """``--session_name``, or the network's name; raises UsageError if no file can have it."""
    name = args.session_name or args.network.__name__.rpartition(".")[2]
    if not Path(name).name or name.endswith(("/", os.sep)):
        raise UsageError(f"--session_name {name}: must end in a file's name, without .pth.")
    folder = Path(name).parent
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--session_name {name}: {folder} is a file, not a folder; name another.")
    for suffix in SESSION_SUFFIXES:
        if Path(name + suffix).is_dir():
            raise UsageError(f"--session_name {name}: {name}{suffix} is a folder.")
    return name


def check_crop_size(crop_size: int, stride: int, radius: int) -> None:
    """Raise UsageError where AffinityNet's crops would not divide into cells or have no pairs."""
    if crop_size % stride:
        raise UsageError(f"--crop_size {crop_size}: must be a multiple of {stride}.")
    if 0 in source_grid(crop_size // stride, crop_size // stride, radius):
        raise UsageError(
            f"--crop_size {crop_size}: too small for pairs within --radius {radius}; "
            f"take at least {stride * (2 * radius - 1)}."
        )


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
    """The run's schedule; raises DataError if the list does not fill one batch.

    Raises UsageError if a batch does not have an image for each rank.
    """
    if args.batch_size < world_size():
        raise UsageError(
            f"--batch_size {args.batch_size}: less than an image for each of the {world_size()} "
            "processes; start fewer."
        )
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


def remaining_batches(schedule: Schedule, seed: int, step: int) -> Iterator[list]:
    """This rank's share of each batch from a step (from 0) to the last, as (epoch, index) pairs.

    The batches depend on the seed alone, not on where a run was resumed or on the number of ranks.
    """
    for epoch in range(step // schedule.steps_per_epoch, schedule.epochs):
        order = shuffled(schedule.num_images, seed, epoch)
        first = step - epoch * schedule.steps_per_epoch
        for batch in range(max(0, first), schedule.steps_per_epoch):
            start = batch * schedule.batch_size
            indices = order[start : start + schedule.batch_size]
            yield [(epoch, index) for index in shard(indices)]


@dataclass
class Position:
    """Where a training stands, with the sums of losses that are not recorded yet."""

    step: int = 0  # steps done
    epoch: int = 0  # epochs done, with what follows their last step
    epoch_sums: dict[str, float] = field(default_factory=dict)
    row_sums: dict[str, float] = field(default_factory=dict)
    row_steps: int = 0


class Training:
    """A run of either stage: its network, optimizer and records, and where it stands.

    Goes on from the checkpoint that ``--resume`` means, else starts anew. ``contents`` are digests
    of what flags name (see ``settings_of``), ``notes`` what a new log begins with. Raises DataError
    if the checkpoint cannot be used. All ranks must call each method.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        net: nn.Module,
        schedule: Schedule,
        device: torch.device,
        stop: StopSignals,
        contents: dict[str, str],
        notes: list[str],
    ):
        self.args, self.net, self.schedule = args, net, schedule
        self.device, self.stop = device, stop
        self.session = session_name(args)
        self.checkpoint = Path(f"{self.session}.ckpt")
        self.settings = settings_of(args, contents)
        to_device(net, device, args)
        self.optimizer = build_optimizer(net, args.lr, args.wt_dec, args.momentum)
        # float16 has so small a range that gradients must be scaled; otherwise this does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.records = Records(self.session, describe_run(args.seed, device), args.tensorboard)
        self.position = Position()
        self._unread: list[dict[str, Tensor]] = []  # losses on the device

        if is_main():
            for path in (self.checkpoint, f"{self.session}.pth"):
                remove_leftovers(path)
        found = find_checkpoint(args.resume, self.checkpoint)
        if found:
            self._resume(read_checkpoint(found, self.settings))
        else:
            self._start(notes)
        self.model = data_parallel(net, device)

    def _start(self, notes: list[str]) -> None:
        if is_main():
            self.checkpoint.unlink(missing_ok=True)
        self.records.start()
        self.records.say("\n".join(notes))
        seed_rank(self.args.seed, step=0)

    def _resume(self, content: dict[str, Any]) -> None:
        self.net.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.position = Position(**content["position"])
        self.records.resume(content["records"], self.position.step)
        if rank() < len(content["random"]):
            restore_random_states(content["random"][rank()], self.device)
        else:
            seed_rank(self.args.seed, self.position.step)

    def train_epoch(
        self,
        batches: Iterator[Any],
        losses_of: Callable[[nn.Module, Any], dict[str, Tensor]],
    ) -> dict[str, float]:
        """Take the steps that the epoch still lacks; returns the mean of each loss over all steps.

        ``losses_of(model, batch)`` gives scalars by name, ``loss`` being the one to minimize. With
        several ranks they are this rank's shares: their sum over ranks is the batch's loss. Raises
        DataError within ``--log_every`` steps after a loss that is not finite, and Interrupted
        after the step in which a signal came.
        """
        at, schedule, optimizer = self.position, self.schedule, self.optimizer
        end = (at.epoch + 1) * schedule.steps_per_epoch
        self._timed_from, self._timed_steps = time.perf_counter(), 0
        self.model.train()
        with self._progress_bar(end) as bar:
            while at.step < end:
                set_poly_lr(optimizer, at.step, schedule.max_step)
                losses = losses_of(self.model, next(batches))
                optimizer.zero_grad(set_to_none=True)
                # Gradients become the mean over ranks, but the batch's loss is a sum over them.
                self.scaler.scale(losses["loss"] * world_size()).backward()
                self.scaler.step(optimizer)
                self.scaler.update()
                at.step += 1

                self._unread.append({name: loss.detach() for name, loss in losses.items()})
                if at.step % self.args.log_every == 0 or at.step == end:
                    row = self._end_row()
                    bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                bar.update(schedule.batch_size)
                self.leave_if_stopped()
                if self.args.save_every and at.step % self.args.save_every == 0:
                    self.save()
        return {name: total / schedule.steps_per_epoch for name, total in at.epoch_sums.items()}

    def _progress_bar(self, end: int) -> tqdm:
        size, steps = self.schedule.batch_size, self.schedule.steps_per_epoch
        return cli.progress(
            None,
            f"epoch {self.position.epoch + 1}/{self.schedule.epochs}",
            total=steps * size,
            initial=(steps - end + self.position.step) * size,
            disable=not is_main(),
        )

    def _read_losses(self) -> None:
        """Add the losses of the last steps to the sums; nothing else waits for the device."""
        if not self._unread:
            return
        names = list(self._unread[0])
        steps = [torch.stack([losses[name] for name in names]) for losses in self._unread]
        self._unread = []
        values = sum_over_ranks(torch.stack(steps)).tolist()
        at = self.position
        for step, row in enumerate(values, start=at.step - len(values) + 1):
            losses = dict(zip(names, row, strict=True))
            _require_finite(losses, step)
            for sums in (at.epoch_sums, at.row_sums):
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value
        at.row_steps += len(values)
        self._timed_steps += len(values)

    def _end_row(self) -> dict[str, float]:
        """Write the means since the last row into the table; returns them."""
        self._read_losses()
        at, now = self.position, time.perf_counter()
        means = {name: total / at.row_steps for name, total in at.row_sums.items()}
        num_images = self._timed_steps * self.schedule.batch_size
        self.records.row(
            at.step,
            {
                "epoch": at.epoch + 1,
                "lr": self.optimizer.param_groups[0]["lr"],
                **means,
                "images_per_second": num_images / (now - self._timed_from),
            },
        )
        at.row_sums, at.row_steps = {}, 0
        self._timed_from, self._timed_steps = now, 0
        return means

    def leave_if_stopped(self) -> None:
        """Write a checkpoint and raise Interrupted if a signal came."""
        number = self.stop.agreed()
        if number:
            self.save()
            raise Interrupted(
                number,
                f"{self.checkpoint} holds the run after step {self.position.step} of "
                f"{self.schedule.max_step}, and the same command goes on from there.",
            )

    def end_epoch(self, summary: str) -> None:
        """Log what came of the epoch, and write a checkpoint where each epoch has one."""
        at = self.position
        self.records.say(f"epoch {at.epoch + 1}/{self.schedule.epochs}: {summary}")
        at.epoch += 1
        at.epoch_sums = {}
        if not self.args.save_every and at.epoch < self.schedule.epochs:
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        self._read_losses()
        states = gather(random_states(self.device))
        if is_main():
            content = {
                "settings": self.settings,
                "network": _on_cpu(self.net),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "position": asdict(self.position),
                "random": states,
                "records": self.records.texts,
            }
            write_checkpoint(self.checkpoint, content)

    def finish(self) -> None:
        """Write the weights; the checkpoint is not needed any more."""
        if is_main():
            save_weights(f"{self.session}.pth", self.net)
            self.records.say(f"weights written to {self.session}.pth")
            self.checkpoint.unlink(missing_ok=True)


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
    state = _on_cpu(net)
    for name, value in state.items():
        if not value.isfinite().all():
            raise diverged(f"{name} is not finite after the last step")
    save_tensors(path, state)


def _on_cpu(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
