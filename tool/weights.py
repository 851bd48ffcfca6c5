"""Weight files -> networks: nothing is executed, and what was loaded is always said."""

import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tool.errors import DataError
from tool.maps import atomic_write

# A tensor by which a network's weights are recognized, for messages.
SIGNATURES = {
    "conv5_3.weight": "VGG-16",
    "b7.conv_branch2b2.weight": "ResNet-38",
    "trunk4.weight": "the tiny network",
}
HEAD_SIGNATURES = {"fc8.weight": "classifier", "f9.weight": "AffinityNet"}
FRESH = "none"
# Counters that batch norm keeps since PyTorch 0.4.1; they decide nothing.
OPTIONAL_SUFFIX = "num_batches_tracked"
NAMES_SHOWN = 3


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a ``.pth`` file: plain, or under ``state_dict`` or ``model``.

    A ``module.`` prefix (DataParallel) is taken off. Raises DataError if the file is missing,
    damaged, wants to execute anything, or holds no state dict.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such weight file; --weights {FRESH} starts without one.")
    content = load_tensors(path, "weight file")
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"{path}: holds no state dict (a dict of names and tensors).")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise DataError(f"{path}: holds more than names and tensors, so it is no state dict.")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_tensors(path: str | os.PathLike, kind: str) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, plain containers, numbers and strings.

    Raises DataError, with the ``kind`` of file, if it is damaged or wants to execute anything.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: refused, because it is damaged or holds more than tensors "
            "(torch.load with weights_only=True does not read it)."
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable {kind} ({reason}).") from error


def save_tensors(path: str | os.PathLike, content: Any) -> None:
    """Write what ``load_tensors`` reads, whole or not at all; raises OSError on a full disk."""
    buffer = io.BytesIO()  # torch.save's own error on a full disk would not say so
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def describe(names: Mapping) -> str:
    """What network a state dict's names look like, e.g. "VGG-16 classifier"."""
    backbone = [title for name, title in SIGNATURES.items() if name in names]
    head = [title for name, title in HEAD_SIGNATURES.items() if name in names]
    return " ".join(backbone + head) if backbone else "no network of this project"


def load_for_training(net: nn.Module, source: str, say: Callable[[str], None]) -> None:
    """Start a network from ``--weights``: a file, or ``none`` for fresh initialization.

    The file must have every tensor but those of ``net.new_layers``. ``say`` is told what was taken,
    what stayed fresh and what was left. Raises DataError if the file is of another network.
    """
    if source == FRESH:
        say(
            "WARNING: --weights none: every layer starts from random numbers; "
            "the published recipes start from ImageNet weights."
        )
        return
    fresh = _load(net, source, say, net.new_layers)
    say(f"fresh: {_names(fresh)}" if fresh else "fresh: none")


def load_for_inference(net: nn.Module, source: str, say: Callable[[str], None]) -> None:
    """Give a trained network its weights; every tensor must be in the file (or ``none``: fresh)."""
    if source == FRESH:
        say("WARNING: --weights none: the network is untrained, its output means nothing.")
        return
    _load(net, source, say, ())


def _load(
    net: nn.Module, path: str, say: Callable[[str], None], optional_layers: tuple[str, ...]
) -> list[str]:
    """Copy a file's tensors into the network; returns the names of those that stay as they are."""
    found = read_state_dict(path)
    wanted = net.state_dict()

    def fits(name: str) -> bool:
        return name in found and found[name].shape == wanted[name].shape

    missing = [name for name in wanted if not fits(name) and not name.endswith(OPTIONAL_SUFFIX)]
    # A head trained for other classes is as good as none.
    required = [name for name in missing if name.rpartition(".")[0] not in optional_layers]
    if required:
        differences = [
            f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
            if name in found
            else f"{name} missing"
            for name in required
        ]
        if describe(found) == describe(wanted):
            problem = "weights of this network for other classes, or not all of them; see --classes"
        else:
            problem = f"weights of another network ({describe(found)})"
        raise DataError(
            f"{path}: these are {problem}; --network is {type(net).__module__} "
            f"({describe(wanted)}). First differences: {_names(differences)}."
        )
    taken = {name: found[name] for name in wanted if fits(name)}
    for name, value in taken.items():
        if not value.isfinite().all():
            raise DataError(f"{path}: {name} has values that are not finite; train again.")
    unused = [name for name in found if name not in taken]
    net.load_state_dict(taken, strict=False)  # completeness was checked above
    say(f"weights: {len(taken)} tensors taken from {path} ({describe(found)})")
    if unused:
        say(f"unused: {_names(unused)}")
    return missing


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
