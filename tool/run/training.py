"""What all trainings share: start, resume, the loop over an epoch, and the end."""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from tool.files import remove_leftovers
from tool.run import cli, devices
from tool.run.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from tool.run.devices import StopSignals, Switches
from tool.run.errors import DataError, Interrupted, UsageError
from tool.run.loading import load, shuffled
from tool.run.log import Log, describe_run
from tool.run.optimizer import build_optimizer, set_poly_lr
from tool.run.provenance import digest_file, settings_of
from tool.weights import ADVICE, WEIGHT_WORDS, load_for_training
from tool.weights.pytorch import save_tensors

# Flags that decide where and how a training runs, not its numbers.
IRRELEVANT_FLAGS = {"device", "num_workers", "session_name", "resume", "save_every", "log_every",
                    "tensorboard"}  # fmt: skip

# losses_of(model, batch) gives scalars by name, "loss" being the one to minimize.
Losses = Callable[[nn.Module, Any], dict[str, Tensor]]


@dataclass
class Training:
    """A training: its network and optimizer, and where it stands."""

    net: nn.Module
    model: nn.Module  # the network, or with several ranks what keeps its copies equal
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    num_images: int
    batch_size: int
    max_step: int
    device: torch.device
    session: str
    settings: dict[str, str]
    seed: int
    log: Log
    stop: StopSignals
    log_every: int
    save_every: int | None
    fresh_layers: Sequence[str]  # of the backbone, that the start weights lack
    poly_first_only: bool  # see set_poly_lr
    step: int = 0  # steps done
    epoch: int = 0  # epochs done, with what follows their last step
    losses: list[dict[str, float]] = field(default_factory=list)  # of the epoch's steps
    row_start: int = 0  # of these, the first that no row of the table counts
    pending: list[dict[str, Tensor]] = field(default_factory=list)  # still on the device

    @property
    def checkpoint(self) -> Path:
        return Path(f"{self.session}.ckpt")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size  # a last short batch is dropped

    @property
    def epochs(self) -> int:
        return math.ceil(self.max_step / self.steps_per_epoch)


def train(
    training: Training,
    dataset: Dataset,
    num_workers: int,
    losses_of: Losses,
    validate: Callable[[], dict[str, float]] = dict,
) -> None:
    """Take all steps to come, and write the weights; signals wait for the end of a step.

    ``validate`` returns figures for the log after each epoch. All ranks must call it.
    """
    order, on_gpu = remaining_batches(training), training.device.type == "cuda"
    loaded = load(dataset, order, num_workers, pin_memory=on_gpu)
    with closing(training.log), training.stop, loaded as batches:
        while training.epoch < training.epochs:
            losses = train_one_epoch(training, batches, losses_of)
            end_epoch(training, losses | validate())
        finish(training)


def train_one_epoch(
    training: Training, batches: Iterator[Any], losses_of: Losses
) -> dict[str, float]:
    """Take the steps that the epoch still lacks; returns the mean of each loss over all its steps.

    With several ranks, the losses are this rank's shares: their sum over ranks is the batch's loss.
    Raises DataError within ``log_every`` steps after a loss that is not finite, or for lack of
    memory, and Interrupted after the step in which a signal came. All ranks must call it.
    """
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    end = min((training.epoch + 1) * training.steps_per_epoch, training.max_step)
    timed_from, timed_step = time.perf_counter(), training.step
    model.train()
    with _progress_bar(training, end) as bar:
        while training.step < end:
            set_poly_lr(optimizer, training.step, training.max_step, training.poly_first_only)
            optimizer.zero_grad(set_to_none=True)
            with name_lack_of_memory(f"on {training.device} in step {training.step + 1}"):
                losses = losses_of(model, next(batches))
                # Gradients become the mean over ranks, but the batch's loss is a sum over them.
                scaler.scale(losses["loss"] * devices.world_size()).backward()
                scaler.step(optimizer)
                scaler.update()
            training.step += 1

            training.pending.append({name: loss.detach() for name, loss in losses.items()})
            bar.update(training.batch_size)
            if training.step % training.log_every == 0 or training.step == end:
                now = time.perf_counter()
                images = (training.step - timed_step) * training.batch_size
                row = _log_row(training, images / (now - timed_from))
                timed_from, timed_step = now, training.step
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            leave_if_stopped(training)
            if training.save_every and training.step % training.save_every == 0:
                save_checkpoint(training)
    return _means(training.losses)


def session_name(args: argparse.Namespace) -> str:
    """``--session_name``, or the network's name; raises UsageError if no file can have it."""
    name = args.session_name or args.network.__name__.rpartition(".")[2]
    if not Path(name).name or name.endswith(("/", os.sep)):
        raise UsageError(f"--session_name {name}: must end in a file's name, without .pth.")
    for suffix in (".pth", ".log", ".csv", ".ckpt"):
        if Path(name + suffix).is_dir():
            raise UsageError(f"--session_name {name}: {name}{suffix} is a folder.")
    return name


def remaining_batches(training: Training) -> Iterator[list]:
    """This rank's shard of each batch of the steps to come, as (epoch, index) pairs.

    The batches depend on the seed alone, not on where a run was resumed or on the number of ranks.
    """
    order: list[int] = []
    for step in range(training.step, training.max_step):
        epoch, done = divmod(step, training.steps_per_epoch)
        if not order or done == 0:
            order = shuffled(training.num_images, training.seed, epoch)
        batch = order[done * training.batch_size :][: training.batch_size]
        yield [(epoch, index) for index in devices.shard(batch)]


def start_training(
    args: argparse.Namespace,
    net: nn.Module,
    num_images: int,
    device: torch.device,
    contents: dict[str, str],
    note: str,
) -> Training:
    """The training that the flags ask for, continued where ``--resume`` finds a checkpoint.

    ``contents`` are digests of what other flags name, by flag; ``note`` is a line for a new log.
    Raises DataError if the start weights or the checkpoint cannot be used or the images do not fill
    a batch, UsageError if settings differ, the session is in use, or a rank gets no image. All
    ranks must call it.
    """
    session, batch_size = session_name(args), args.batch_size
    if batch_size < devices.world_size():
        raise UsageError(
            f"--batch_size {batch_size}: too small for {devices.world_size()} processes."
        )
    if num_images < batch_size:
        raise DataError(
            f"{args.train_list}: its {num_images} images do not fill a batch of {batch_size}; "
            "take a smaller --batch_size."
        )
    if "max_iters" in args:
        max_step = args.max_iters
    else:
        max_step = num_images // batch_size * args.max_epoches
    settings = settings_of(args, vars(args).keys() - IRRELEVANT_FLAGS) | contents
    if args.weights not in WEIGHT_WORDS:
        settings["weights"] = digest_file(args.weights)
    notes: list[str] = []
    with devices.main_first():  # which may download
        fresh_layers = load_for_training(net, args.weights, notes.append)
    devices.to_device(net, device, Switches(args.amp, args.tf32, args.compile))
    training = Training(
        net=net,
        model=net,
        optimizer=build_optimizer(net, args.lr, args.wt_dec, args.momentum),
        # float16 has so small a range that gradients must be scaled; otherwise this does nothing.
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        num_images=num_images,
        batch_size=batch_size,
        max_step=max_step,
        device=device,
        session=session,
        settings=settings,
        seed=args.seed,
        log=Log(session, describe_run(args.seed, device), args.tensorboard),
        stop=StopSignals(),
        log_every=args.log_every,
        save_every=args.save_every,
        fresh_layers=fresh_layers,
        poly_first_only=getattr(args, "poly_first_group", False),
    )
    weights = Path(f"{session}.pth")
    found = find_checkpoint(args.resume, training.checkpoint)
    if found:
        _restore(training, read_checkpoint(found, settings))
    else:
        if weights.exists():
            hint = "is of a finished training and will be replaced; another --session_name keeps it"
            devices.print_main(f"WARNING: {weights} {hint}.")
        training.log.start([*notes, note])
        devices.seed_rank(args.seed, step=0)
    if devices.is_main():  # now that the log is locked
        for path in (training.checkpoint, weights):
            remove_leftovers(path)
        if not found:
            training.checkpoint.unlink(missing_ok=True)
    training.model = devices.data_parallel(net, device)
    return training


@contextmanager
def name_lack_of_memory(where: str) -> Iterator[None]:
    """Raises DataError, with what to lower, where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise DataError(
            f"out of memory {where}; take a smaller --batch_size or --crop_size, --amp, or more "
            "processes (torchrun)."
        ) from error


def _progress_bar(training: Training, end: int) -> tqdm:
    size, start = training.batch_size, training.epoch * training.steps_per_epoch
    return cli.progress(
        None,
        f"epoch {training.epoch + 1}/{training.epochs}",
        total=(end - start) * size,
        initial=(training.step - start) * size,
        disable=not devices.is_main(),
    )


def _log_row(training: Training, images_per_second: float) -> dict[str, float]:
    """Write the means since the last row into the table; returns them."""
    _read_losses(training)
    means = _means(training.losses[training.row_start :])
    training.row_start = len(training.losses)
    lr = training.optimizer.param_groups[0]["lr"]
    values = {"epoch": training.epoch + 1, "lr": lr, **means}
    training.log.write_row(training.step, values | {"images_per_second": images_per_second})
    return means


def _read_losses(training: Training) -> None:
    """Read the losses of the last steps from the device, which nothing else waits for."""
    if not training.pending:
        return
    names = list(training.pending[0])
    steps = [torch.stack([losses[name] for name in names]) for losses in training.pending]
    training.pending = []
    values = devices.sum_over_ranks(torch.stack(steps)).tolist()
    for step, row in enumerate(values, start=training.step - len(values) + 1):
        losses = dict(zip(names, row, strict=True))
        if not math.isfinite(losses["loss"]):
            parts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            raise diverged(training, f"the loss is not finite at step {step} ({parts})")
        training.losses.append(losses)


def _means(losses: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in losses) / len(losses) for name in losses[0]}


def diverged(training: Training, what: str) -> DataError:
    """The error that ends a training whose numbers are not finite any more."""
    advice = "try a smaller --lr"
    if training.fresh_layers:
        advice = f"{' and '.join(training.fresh_layers)} were not in the weights: try {ADVICE}"
    if training.scaler.is_enabled():
        advice += ", or --amp bf16, whose range is wider than that of --amp fp16"
    return DataError(f"{what}; no weights were written; {advice}.")


def leave_if_stopped(training: Training) -> None:
    """Write a checkpoint and raise Interrupted if a signal came; all ranks must call it."""
    number = training.stop.agreed()
    if number:
        save_checkpoint(training)
        raise Interrupted(
            number,
            f"{training.checkpoint} holds the run after step {training.step} of "
            f"{training.max_step}; the same command continues from there.",
        )


def end_epoch(training: Training, figures: dict[str, float]) -> None:
    """Log the epoch's figures, and write a checkpoint where each epoch has one."""
    summary = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    training.log.write(f"epoch {training.epoch + 1}/{training.epochs}: {summary}")
    training.epoch += 1
    training.losses, training.row_start = [], 0
    if not training.save_every and training.epoch < training.epochs:
        save_checkpoint(training)


def save_checkpoint(training: Training) -> None:
    """Write ``<session_name>.ckpt``; all ranks must call it."""
    _read_losses(training)
    states = devices.gather(devices.random_states(training.device))
    if devices.is_main():
        content = {
            "settings": training.settings,
            "network": _on_cpu(training.net),
            "optimizer": training.optimizer.state_dict(),
            "scaler": training.scaler.state_dict(),
            "step": training.step,
            "epoch": training.epoch,
            "losses": training.losses,
            "row_start": training.row_start,
            "random": states,
            "texts": training.log.texts,
        }
        write_checkpoint(training.checkpoint, content)


def _restore(training: Training, content: dict[str, Any]) -> None:
    training.net.load_state_dict(content["network"])
    training.optimizer.load_state_dict(content["optimizer"])
    training.scaler.load_state_dict(content["scaler"])
    training.step, training.epoch = content["step"], content["epoch"]
    training.losses, training.row_start = content["losses"], content["row_start"]
    training.log.resume(content["texts"], training.step)
    if devices.rank() < len(content["random"]):
        devices.restore_random_states(content["random"][devices.rank()], training.device)
    else:
        devices.seed_rank(training.seed, training.step)


def finish(training: Training) -> None:
    """Write ``<session_name>.pth``; the checkpoint is not needed any more.

    Raises DataError if a weight is not finite: the last step can diverge after its loss was read.
    """
    if not devices.is_main():
        return
    state = _on_cpu(training.net)
    for name, value in state.items():
        if not value.isfinite().all():
            raise diverged(training, f"{name} is not finite after the last step")
    save_tensors(f"{training.session}.pth", state)
    training.log.write(f"weights written to {training.session}.pth")
    training.checkpoint.unlink(missing_ok=True)


def _on_cpu(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
