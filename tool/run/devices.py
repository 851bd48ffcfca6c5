"""Where a program computes: its device, its ranks, and the signals that end it.

``torchrun`` starts a program several times, each process being a *rank* with a device of its own. A
process that was started alone is rank 0 of 1. Functions that say "all ranks must call it" exchange
something.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tool.run.errors import DataError, Interrupted, UsageError, reason

DEVICE_TYPES = ("cpu", "cuda")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What torchrun sets in the environment of a process; with fewer of them, it was started alone.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What other launchers set in the environment of a task, and the largest value where there is one.
SINGLE_TASK = {"RANK": 0, "WORLD_SIZE": 1, "SLURM_NTASKS": 1, "OMPI_COMM_WORLD_SIZE": 1}
# The compute capability from which on a switch gains time on a GPU.
GAINS_FROM = {"--amp bf16": (8, 0), "--amp fp16": (7, 0), "--tf32": (8, 0)}
# Words that tell a failed exchange between ranks from other runtime errors.
EXCHANGE_ERRORS = ("gloo", "nccl", "connection closed", "connection reset", "socket", "tcpstore")
# Words of errors that are a lack of memory, and no torch.OutOfMemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "_status_alloc_failed")

T = TypeVar("T")


# Devices


class Switches(NamedTuple):
    """The flags that gain speed and change rounding, all off by default."""

    amp: str | None = None  # "bf16" or "fp16"
    tf32: bool = False
    compile: bool = False


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` takes CUDA where there is a usable one.

    Under torchrun, ``auto`` and ``cuda`` are the GPU with the process's local rank. Raises
    UsageError for a device that cannot be used, except where ``auto`` has the CPU instead.
    """
    wanted = name
    if name == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        if device.type not in DEVICE_TYPES:
            raise RuntimeError(f"it is none of {', '.join(DEVICE_TYPES)}")
        if device.type == "cuda" and was_launched():
            device = _device_of_local_rank(device)
        _run_kernel(device)
    except (RuntimeError, AssertionError) as error:
        # A GPU that is merely full is worth waiting for, and processes must not differ.
        if name == "auto" and not (was_launched() or is_out_of_memory(error)):
            print(f"WARNING: using the CPU: the GPU fails ({reason(error)}).", file=sys.stderr)
            return torch.device("cpu")
        raise UsageError(
            f"--device {wanted}: not usable here ({reason(error)}); try auto or cpu."
        ) from error
    return device


def _run_kernel(device: torch.device) -> None:
    """Raise RuntimeError where PyTorch sees a GPU, but has no kernels for it."""
    torch.ones(1, device=device).sum().item()


def _device_of_local_rank(device: torch.device) -> torch.device:
    rank, size = (int(os.environ.get(name, 1)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device.index is not None and size > 1:
        raise UsageError(f"--device {device}: torchrun's processes cannot share it; take cuda.")
    gpus = torch.cuda.device_count()
    if rank >= gpus > 0:
        raise UsageError(
            f"--device {device}: torchrun starts {size} processes on a machine with {gpus} GPUs; "
            "take a smaller --nproc_per_node."
        )
    return torch.device("cuda", rank if device.index is None else device.index)


def configure_backends(device: torch.device, switches: Switches, fixed_size: bool) -> None:
    """Apply ``--tf32``, check ``--amp``, and let cuDNN search for the fastest algorithms.

    That search pays where inputs have one ``fixed_size``: it is repeated for each new size. Raises
    UsageError for a switch that the device does not offer.
    """
    if device.type != "cuda" and switches.tf32:
        raise UsageError("--tf32: only GPUs have it; on a CPU, try --amp bf16.")
    if device.type != "cuda" and switches.amp == "fp16":
        raise UsageError("--amp fp16: only for GPUs; on a CPU, try bf16.")
    if device.type == "cuda":
        _warn_of_useless(switches, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = switches.tf32
    torch.backends.cudnn.benchmark = fixed_size


def _warn_of_useless(switches: Switches, device: torch.device) -> None:
    """Say which switches gain no time on this GPU."""
    capability = torch.cuda.get_device_capability(device)
    for flag, is_on in ((f"--amp {switches.amp}", switches.amp), ("--tf32", switches.tf32)):
        if is_on and capability < GAINS_FROM[flag]:
            needed = "{}.{}".format(*GAINS_FROM[flag])
            print_main(f"WARNING: {flag} gains time from compute capability {needed} on only.")


def to_device(
    net: nn.Module, device: torch.device, switches: Switches, method: str | None = None
) -> nn.Module:
    """The network on its device, compiled with ``--compile``: as a whole, or one ``method``.

    ``method`` is what inference calls; None: the network is trained, on crops of one size. Raises
    UsageError for a switch that the device does not offer.
    """
    configure_backends(device, switches, fixed_size=method is None)
    # Matrix units, of GPUs and CPUs, want the channels last. So does a CPU's inference in float32,
    # by 5 to 30 per cent of the time; its training gains little, the tiny network's loses.
    on_matrix_units = switches.amp or switches.tf32
    infers_on_cpu = device.type == "cpu" and method is not None
    layout = torch.channels_last if on_matrix_units or infers_on_cpu else torch.preserve_format
    net.to(device, memory_format=layout)
    if switches.compile and method:
        setattr(net, method, torch.compile(getattr(net, method)))
    elif switches.compile:
        if world_size() > 1:
            # PyTorch would cut the network at the gradients' buckets, and must not cut it where it
            # has a function with its own gradient, as AffinityNet has.
            torch._dynamo.config.optimize_ddp = False
        net.compile()
    return net


def wait_for(device: torch.device) -> None:
    """Return when the device has finished all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager:
    """Where a network runs: convolutions compute in ``--amp``'s type, in float32 without it."""
    return torch.autocast(device.type, AMP_DTYPES[amp]) if amp else nullcontext()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is a lack of memory, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _has(error, OUT_OF_MEMORY)


def _has(error: BaseException, phrases: Sequence[str]) -> bool:
    return any(phrase in str(error).lower() for phrase in phrases)


# Random numbers: fresh layers and dropout draw from torch's generators, nothing else does.


def seed_rank(seed: int, step: int) -> None:
    """Let every rank draw its own dropout from a step on; rank 0 continues the seed's sequence."""
    if not is_main():
        sequence = np.random.SeedSequence([seed, rank(), step])
        torch.manual_seed(int(sequence.generate_state(1)[0]))


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators back to what ``random_states`` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# Ranks


def was_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in LAUNCHER_VARIABLES)


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Iterator[None]:
    """Within the block: the processes that torchrun started are joined, if it started any.

    ``timeout`` is how long a rank may have to wait for another one (default: PyTorch's). Raises
    DataError where another rank is lost or cannot be reached, UsageError for one of several tasks
    that are not joined.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # or pinning memory would take some on GPU 0, too
    if not was_launched():
        _require_single_task()
        yield
        return
    try:
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=timeout)
        yield
    except RuntimeError as error:
        if not _has(error, EXCHANGE_ERRORS) or is_out_of_memory(error):
            raise
        problem = " ".join(str(error).split())  # NCCL's last line has what went wrong
        raise DataError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has lost the others or "
            f"cannot work with them; see their messages above ({problem})."
        ) from error
    except Interrupted:  # nobody is lost
        dist.destroy_process_group()
        raise
    # Not after an error: it would wait for those that are lost.
    dist.destroy_process_group()


def _require_single_task() -> None:
    for name, largest in SINGLE_TASK.items():
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > largest:
            raise UsageError(
                f"{name} is {value}, but torchrun did not start these tasks: each would do all of "
                "the work; use torchrun (docs/clusters.md) or, for one task, srun --ntasks=1."
            )


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
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


@contextmanager
def main_first() -> Iterator[None]:
    """The block runs in the first rank, and then in the others; all ranks must enter it."""
    if not is_main():
        gather(None)
    yield
    if is_main():
        gather(None)


def data_parallel(net: nn.Module, device: torch.device) -> nn.Module:
    """The network for training steps: its gradients become the mean over ranks.

    Its weights become those of rank 0. On GPUs, batch norm that trains is over all ranks. A process
    started alone gets the network itself.
    """
    if world_size() == 1:
        return net
    if device.type == "cuda":  # PyTorch has it there only
        for name, layer in list(net.named_children()):
            if isinstance(layer, nn.BatchNorm2d) and layer.weight.requires_grad:
                net.add_module(name, nn.SyncBatchNorm.convert_sync_batchnorm(layer))
    return nn.parallel.DistributedDataParallel(
        net,
        device_ids=None if device.index is None else [device.index],
        gradient_as_bucket_view=True,
        # On GPUs, all ranks have the same statistics of batch norm anyway.
        broadcast_buffers=device.type != "cuda",
    )


# Signals


class StopSignals:
    """Within the block, SIGINT and SIGTERM are remembered: a program ends between two steps.

    A second SIGINT interrupts at once, except under torchrun, which may pass one on twice.
    """

    received = 0  # the number of the first signal

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.received and number == signal.SIGINT and not was_launched():
            raise KeyboardInterrupt
        self.received = self.received or number

    def agreed(self) -> int:
        """The number of a signal that any rank has received, or 0; all ranks must call it."""
        if world_size() == 1:
            return self.received
        number = torch.tensor(self.received)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)
