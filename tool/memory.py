"""What a network takes of memory, told before it is taken, and what there is to take.

Beyond it, a kernel ends some process without a word. The networks' part is counted, not guessed:
the network runs on tensors without content (PyTorch's device ``meta``), and each tensor's bytes
count from its making to its end. The rest are sums of what the programs hold.
"""

import copy
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tool.distributed import world_size
from tool.errors import DataError, UsageError

GIGABYTE = 1e9
FLOAT = 4  # bytes
# Convolutions copy their input into another layout, and need scratch space. Measured at half a
# megapixel and more, in shares of the count: VGG-16 1.0, the tiny network 1.1 to 1.55, ResNet-38
# 1.2, and 1.55 with the channels last.
OVERHEAD = 1.7
# The dense CRF with five labels; measured: 470 by PyTorch, 320 by pydensecrf.
CRF_BYTES_PER_PIXEL = 480
# Sides of the image that is counted; a tensor's size is proportional to the pixels.
COUNTED_SIDE = 256
# Bytes per pixel of a photograph that is augmented and normalized: Pillow's 4 and three times
# float32.
LOADED = 4 + 3 * 3 * FLOAT
# Samples that each loader process holds ready (PyTorch's default).
PREFETCHED = 2
# Maps of an image that its memory is reckoned with; most images have fewer classes.
USUAL_MAPS = 4


class _Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._sum = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:  # another view of it
            return
        self._alive[key] = storage.nbytes()
        self._sum += storage.nbytes()
        self.peak = max(self.peak, self._sum)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._sum -= self._alive.pop(key)


def _without_content(net: nn.Module) -> nn.Module:
    """A copy of the network whose parameters and buffers have shapes only."""
    replaced = {
        id(tensor): nn.Parameter(tensor.to("meta"), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in (*net.parameters(), *net.buffers())
    }
    return copy.deepcopy(net, replaced)


def forward_bytes_per_pixel(net: nn.Module, method: str) -> float:
    """The most that ``net.method(image)`` holds at a time, in bytes, over the image's pixels."""
    twin = _without_content(net).eval()
    image = torch.empty(1, 3, COUNTED_SIDE, COUNTED_SIDE, device="meta")
    with torch.no_grad(), _Tally() as tally:
        # Of the class: the network's own may be compiled, for its own content.
        getattr(type(twin), method)(twin, image)
    return tally.peak / COUNTED_SIDE**2


def training_bytes(net: nn.Module, batch_size: int, crop_size: int) -> int:
    """The most that ``net(images)`` and its gradients hold at a time, for B x 3 x crop x crop."""
    twin = _without_content(net).train()
    images = torch.empty(batch_size, 3, crop_size, crop_size, device="meta")
    with _Tally() as tally:
        twin(images).sum().backward()
    return tally.peak


def available_bytes(device: torch.device, root: str | os.PathLike = "/") -> int | None:
    """The memory that is free on a device; None where that cannot be told (no Linux).

    On a CPU, what the machine can give without swapping, and no more than the limits of the
    control groups leave. ``root`` is where ``proc`` and ``sys`` are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = Path(root, "proc/meminfo").read_text().split()
        machine = 1024 * int(fields[fields.index("MemAvailable:") + 1])
    except (OSError, ValueError):
        return None
    return min([machine, *_group_leftovers(Path(root))])


def _group_leftovers(root: Path) -> Iterator[int]:
    """What each limit of this process's control groups (version 2) leaves."""
    try:
        entries = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for entry in entries:
        hierarchy, _, group = entry.split(":", 2)
        if hierarchy != "0":
            continue
        folder = Path(root, "sys/fs/cgroup", group.lstrip("/"))
        for level in (folder, *folder.parents):
            try:
                limit = int((level / "memory.max").read_text())  # or "max"
                used = int((level / "memory.current").read_text())
                statistics = (level / "memory.stat").read_text().split()
                # Pages of files are given up first.
                cached = int(statistics[statistics.index("inactive_file") + 1])
            except (OSError, ValueError):
                continue
            yield max(0, limit - used + cached)


class MemoryLimit(NamedTuple):
    """Which images fit into memory, as it was before the first of them."""

    bytes_per_pixel: float
    available: int | None
    where: str
    advice: str

    def require(self, image_id: str, size: tuple[int, int]) -> None:
        """Raise DataError if an image of that (H, W) does not fit."""
        height, width = size
        needed = self.bytes_per_pixel * height * width
        if self.available is not None and needed > self.available:
            raise DataError(
                f"{image_id}: an image of {height} x {width} takes about {_gigabytes(needed)} of "
                f"memory on {self.where}, and {_gigabytes(self.available)} are free; {self.advice}."
            )


def cam_limit(
    net: nn.Module,
    scales: Sequence[float],
    num_workers: int,
    device: torch.device,
    crf_workers: int | None = None,
) -> MemoryLimit:
    """Which images fit while their CAMs are computed, each scale with its mirror image.

    ``crf_workers`` processes compute the CRF meanwhile; 0: it comes after the network; None: never.
    """
    pairs = 2 * 3 * FLOAT * sum(scale**2 for scale in scales)
    seen = 2 * max(scales) ** 2 * forward_bytes_per_pixel(net, "forward_cam")
    # The sum, and one scale's two maps at the image's size.
    network = OVERHEAD * seen + 3 * FLOAT * USUAL_MAPS
    advice = (
        "take smaller --scales, fewer --num_workers or --crf_workers, a smaller image or a larger "
        "machine"
    )
    computing = _with_crf(network, crf_workers)
    return _limit(computing, pairs, num_workers, device, advice)


def walk_limit(
    net: nn.Module, num_workers: int, device: torch.device, crf_workers: int | None = None
) -> MemoryLimit:
    """Which images fit while their maps walk along their affinities; ``crf_workers`` as above."""
    sample = FLOAT * (3 + USUAL_MAPS)
    # Padded maps with the background, then the scores and the largest of them.
    maps = 3 * FLOAT * (USUAL_MAPS + 1)
    network = OVERHEAD * forward_bytes_per_pixel(net, "forward_features") + maps
    advice = "take fewer --num_workers, a smaller image or a larger machine"
    return _limit(_with_crf(network, crf_workers), sample, num_workers, device, advice)


def _with_crf(network: float, crf_workers: int | None) -> float:
    if crf_workers is None:
        return network
    return max(network, CRF_BYTES_PER_PIXEL, network + crf_workers * CRF_BYTES_PER_PIXEL)


def _limit(
    computing: float, sample: float, num_workers: int, device: torch.device, advice: str
) -> MemoryLimit:
    """All arguments are bytes per pixel: of the computation, and of what is loaded for it."""
    on_device = computing + sample
    if device.type == "cpu":
        on_device += PREFETCHED * num_workers * sample
    return MemoryLimit(on_device, available_bytes(device), str(device), advice)


def require_memory_to_train(
    net: nn.Module,
    device: torch.device,
    batch_size: int,
    crop_size: int,
    amp: str | None = None,
    val_crop_size: int | None = None,
    longest_side: int | None = None,
) -> None:
    """Raise UsageError if a training step, or one of validation, does not fit into the memory.

    Nor may an image that is resized to ``longest_side`` be too large to be loaded. Each rank has
    its share of the batch; with ``amp``, most tensors have half of the bytes.
    """
    batch, cpu = f"--batch_size {batch_size}", torch.device("cpu")
    images, width = -(-batch_size // world_size()), 0.5 if amp else 1
    needed = width * training_bytes(net, images, crop_size)
    needs = [(f"{batch} --crop_size {crop_size}", needed, device)]
    if val_crop_size is not None:
        needed = width * images * val_crop_size**2 * forward_bytes_per_pixel(net, "forward")
        needs.append((f"{batch} --val_crop_size {val_crop_size}", needed, device))
    if longest_side is not None:
        needed = LOADED * longest_side**2
        needs.append((f"--resize_long up to {longest_side}", needed, cpu))
    for flags, needed, place in needs:
        free = available_bytes(place)
        if free is not None and needed > free:
            raise UsageError(
                f"{flags}: takes about {_gigabytes(needed)} of memory on {place}, and "
                f"{_gigabytes(free)} are free; take less."
            )


def _gigabytes(count: float) -> str:
    return f"{count / GIGABYTE:.1f} GB"
