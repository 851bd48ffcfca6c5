"""Where a program computes: its device, its random numbers, and its fellow processes, if any.

``torchrun`` starts a program several times, each process being a *rank* with a device of its own.
Every function here also works in a process that was started alone: it is then rank 0 of 1. Those
that say "all ranks must call it" exchange something.
"""

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tool.run.errors import DataError, UsageError

DEVICE_TYPES = ("cpu", "cuda")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds after a signal before another SIGTERM means that the program has not obeyed.
PATIENCE = 10
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What torchrun tells a process; with fewer of them, it was started alone.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Words by which a failed exchange between ranks is told from other runtime errors.
EXCHANGE_ERRORS = ("gloo", "nccl", "connection closed", "connection reset", "tcpstore")

T = TypeVar("T")


# Devices


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` takes CUDA where there is a usable one.

    Under torchrun, ``auto`` and ``cuda`` are the GPU that has the process's number on its machine.
    Raises UsageError for a device that this machine or build does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in DEVICE_TYPES:
            raise RuntimeError(f"it is none of {', '.join(DEVICE_TYPES)}")
        if device.type == "cuda" and was_launched():
            device = _device_of_local_rank(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name}: not usable here ({reason}); try auto or cpu."
        ) from error
    return device


def _device_of_local_rank(device: torch.device) -> torch.device:
    local_rank, local_size = (
        int(os.environ.get(f"LOCAL_{name}", 1)) for name in ("RANK", "WORLD_SIZE")
    )
    if device.index is not None and local_size > 1:
        raise UsageError(f"--device {device}: torchrun's processes cannot share it; take cuda.")
    if local_rank >= torch.cuda.device_count() > 0:
        raise UsageError(
            f"--device {device}: torchrun starts {local_size} processes on a machine with "
            f"{torch.cuda.device_count()} GPUs; take a smaller --nproc_per_node."
        )
    return torch.device("cuda", local_rank if device.index is None else device.index)


def configure_backends(device: torch.device, args: Any, fixed_size: bool = True) -> None:
    """Carry out ``--tf32`` and check ``--amp``; let cuDNN look for the fastest algorithms.

    That search is for inputs of one ``fixed_size``: it would be made again for each new one.

    Raises UsageError for a switch that the device does not offer.
    """
    if device.type != "cuda":
        if args.tf32:
            raise UsageError("--tf32: only GPUs have it; on a CPU, try --amp bf16.")
        if args.amp == "fp16":
            raise UsageError("--amp fp16: only for GPUs; on a CPU, try bf16.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = fixed_size


def to_device(
    net: nn.Module, device: torch.device, args: Any, method: str | None = None
) -> nn.Module:
    """The network on its device, compiled with ``--compile``: as a whole, or one ``method``.

    ``method`` is what inference calls; None: the network is trained.
    """
    # Tensor cores want the channels last. So does a CPU's inference, by 5 to 30 per cent of the
    # time; its training takes as long, or longer with the narrow layers of the tiny network.
    on_tensor_cores = device.type == "cuda" and (args.amp or args.tf32)
    infers_on_cpu = device.type == "cpu" and method is not None
    layout = torch.channels_last if on_tensor_cores or infers_on_cpu else torch.preserve_format
    net.to(device, memory_format=layout)
    if args.compile and method:
        setattr(net, method, torch.compile(getattr(net, method)))
    elif args.compile:
        net.compile()
    return net


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager:
    """Where a network is run: convolutions compute in ``--amp``'s type, in float32 without it."""
    return torch.autocast(device.type, AMP_DTYPES[amp]) if amp else nullcontext()


# Random numbers


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch.

    Only fresh initialization and dropout draw from them: order and augmentation have their own.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one is meant)
    torch.manual_seed(seed)


def seed_rank(seed: int, step: int) -> None:
    """Let ranks but the first draw dropout of their own, from a step on."""
    if not is_main():
        sequence = np.random.SeedSequence([seed, rank(), step])
        seed_generators(int(sequence.generate_state(1)[0]))


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators, in types that ``weights_only=True`` can load."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put the global generators back to what ``random_states`` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# Ranks


def was_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES)


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Iterator[None]:
    """Join the processes that torchrun started; nothing to do in a process started alone.

    NCCL for tensors on GPUs, gloo for those on CPUs. ``timeout`` is how long a rank may have to
    wait for another one (default: PyTorch's). Raises DataError where another rank is lost.
    """
    if not was_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=timeout)
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in EXCHANGE_ERRORS):
            raise
        raise DataError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has lost the others: one "
            f"has ended or cannot be reached; what it said is above ({str(error).splitlines()[0]})."
        ) from error
    # Not after an error: it would wait for those that are lost.
    dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def print_main(text: str) -> None:
    """Print, in one process of all."""
    if is_main():
        print(text, flush=True)


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of a sequence: neighbours stay together, lengths differ by one at most."""
    first, last = (len(items) * r // world_size() for r in (rank(), rank() + 1))
    return items[first:last]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, without gradient; all ranks must call it."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather(value: T) -> list[T]:
    """Every rank's value, in their order; all ranks must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def data_parallel(net: nn.Module, device: torch.device) -> nn.Module:
    """The network for training: its gradients become the mean over ranks.

    Its weights become those of rank 0. A process started alone gets the network itself. Outside of
    training steps, use the network itself: this one may wait for the other ranks.
    """
    if world_size() == 1:
        return net
    return nn.parallel.DistributedDataParallel(
        net,
        device_ids=None if device.index is None else [device.index],
        gradient_as_bucket_view=True,
    )


# Signals


class StopSignals:
    """SIGINT and SIGTERM are remembered, so that a program ends between two steps, not within one.

        with StopSignals() as stop:
            for ...:
                <a step>
                if stop.agreed(): <save>; raise Interrupted(...)

    A second SIGINT does interrupt at once, and so does a SIGTERM a while after the first signal,
    unless torchrun is between: it may pass one on twice.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.received and not was_launched():
            # Batch systems send SIGTERM to all processes, which then pass it on to each other.
            if number == signal.SIGINT or now - self._received_at > PATIENCE:
                raise KeyboardInterrupt(number)
            return
        self.received, self._received_at = number, now

    def agreed(self) -> int:
        """The number of a signal that any rank has received, or 0; all ranks must call it."""
        if world_size() == 1:
            return self.received
        number = torch.tensor(self.received)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)
