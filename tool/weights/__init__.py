"""Weight files of every kind -> networks; no code from a file runs.

A file is a PyTorch checkpoint (.pth, .pt), .safetensors, a Caffe model (.caffemodel) or MXNet's
.params; its content decides which. ``python3 -m tool.weights`` shows and converts them.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tool.run.errors import DataError, UsageError, printable, reason
from tool.weights import caffe, mxnet
from tool.weights.imagenet import imagenet_weights
from tool.weights.pytorch import load_tensors

# What --weights takes besides files: random initialization, and VGG-16's trained on ImageNet.
WEIGHT_WORDS = FRESH, IMAGENET = "none", "imagenet"
Report = Callable[[str], None]  # prints a line

# A tensor by which a network's weights are recognized, for messages.
SIGNATURES = {
    "conv5_3.weight": "VGG-16",
    "b7.conv_branch2b2.weight": "ResNet-38",
    "trunk4.weight": "the tiny network",
    "features.28.weight": "torchvision's VGG-16",
    "layer4.0.conv1.weight": "torchvision's ResNet",
}
HEAD_SIGNATURES = {"fc8.weight": "classifier", "f9.weight": "AffinityNet"}
# A batch norm's tensor since PyTorch 0.4.1, which changes no output.
COUNTER = "num_batches_tracked"
NAMES_SHOWN = 5

PYTORCH, SAFETENSORS = "PyTorch state dict", "safetensors"
CAFFE, MXNET = "Caffe model", "MXNet parameters"
# How a file begins, and its form; or what it is instead, and what to do.
BEGINNINGS = (
    (rb"PK\x03\x04|\x80", PYTORCH),  # a zip archive or, before PyTorch 1.6, a pickle
    (rb"\x12\x01\x00{6}", MXNET),
    (rb".{4}\x00{4}\{", SAFETENSORS),
    (rb"\Z", "empty"),
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the file itself by git lfs pull"),
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page; download the file itself again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar", "an archive; unpack it first"),
    (rb"[\x0a\x12\x1a]|\xa2\x06", CAFFE),  # no magic number, but a name, an input or a layer
    (rb"", "neither a PyTorch state dict nor .safetensors, .caffemodel or .params"),
)


class WeightFile(NamedTuple):
    """The kind of a file, its tensors by their names there, and by those of a network."""

    form: str
    tensors: dict[str, Tensor]
    found: dict[str, Tensor]


def read_weight_file(path: str | os.PathLike) -> WeightFile:
    """The tensors in a weight file of any kind.

    A state dict may be under ``state_dict`` or ``model``, with DataParallel's prefix ``module.``.
    Caffe's blobs are named ``<layer>.0``, ``<layer>.1``, and nameless arrays of MXNet ``0``, ``1``.
    Raises DataError if the file is missing, damaged, of no known kind, or holds more than tensors.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        form = next(form for pattern, form in BEGINNINGS if re.match(b"(?is)" + pattern, head))
        if form not in _FORMS:
            raise ValueError(f"it is {form}")
        read, network_name = _FORMS[form]
        tensors = read(path)
        if not tensors:
            raise ValueError("it holds no weights")
        found = {network_name(name): value for name, value in tensors.items()}
        return WeightFile(form, tensors, found)
    except DataError:
        raise
    except OSError as error:
        ways = f"--weights {IMAGENET} (VGG-16) and {FRESH} need no file"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {ways}.") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(f"{path}: not a readable weight file ({reason(error)}).") from error


def _read_pytorch(path: str | os.PathLike) -> dict[str, Tensor]:
    content = load_tensors(path, "weight file")
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise DataError(f"{path}: holds no state dict (names and tensors, and nothing else).")
    return dict(content)


def _read_arrays(read: Callable[[bytes], dict[str, np.ndarray]], path: str | os.PathLike):
    """The arrays that ``read`` finds in a file, as tensors."""
    return {name: torch.tensor(array) for name, array in read(Path(path).read_bytes()).items()}


# What reads a file, and the network's name of a tensor from its name there.
_without_module = methodcaller("removeprefix", "module.")
_FORMS = {
    PYTORCH: (_read_pytorch, _without_module),
    SAFETENSORS: (load_file, _without_module),
    CAFFE: (partial(_read_arrays, caffe.read_caffemodel), caffe.network_name),
    MXNET: (partial(_read_arrays, mxnet.read_params), mxnet.network_name),
}


def describe(names: Iterable[str]) -> str:
    """What network a state dict's names look like, e.g. "VGG-16 classifier"."""
    names = set(names)
    backbone = [title for name, title in SIGNATURES.items() if name in names]
    head = [title for name, title in HEAD_SIGNATURES.items() if name in names]
    return " ".join(backbone + head) if backbone else "no network of this project"


def load_for_training(net: nn.Module, source: str, report: Report) -> None:
    """Start a network from ``--weights``: a file, ``imagenet``, or ``none``.

    The file must have every tensor but those of ``net.new_layers``; ``report`` as in
    ``take_weights``. Raises DataError if the file is of another network, or the download failed,
    and UsageError if ``imagenet`` has nothing for the network.
    """
    if source == FRESH:
        report(
            "WARNING: --weights none: random initialization; published results start from ImageNet."
        )
        return
    if source == IMAGENET:
        source, found = "torchvision's VGG-16", imagenet_weights(net)
        optional = ("fc6", "fc7", *net.new_layers)
    else:
        found, optional = read_weight_file(source).found, net.new_layers
    net.load_state_dict(take_weights(net, source, found, optional, report), strict=False)


def load_for_inference(net: nn.Module, source: str, report: Report) -> None:
    """Load a trained network's weights; the file must have every tensor. ``none`` loads nothing.

    Raises DataError as ``load_for_training`` does, UsageError for ``imagenet``.
    """
    if source == IMAGENET:
        raise UsageError("--weights imagenet: is for training; name the weights that it wrote.")
    if source == FRESH:
        report("WARNING: --weights none: the network is untrained, its output means nothing.")
        return
    found = read_weight_file(source).found
    net.load_state_dict(take_weights(net, source, found, (), report), strict=False)


def take_weights(
    net: nn.Module, source: str, found: dict[str, Tensor], optional: Sequence[str], report: Report
) -> dict[str, Tensor]:
    """What the network takes of the tensors found in ``source``, in its names and shapes.

    ``report`` gets a line each: what was taken, what is initialized at random, what is unused.
    Raises DataError if more is missing than the layers ``optional``, or a tensor is not finite.
    """
    wanted = net.state_dict()
    # Sides of 1 may differ: Caffe once wrote four sides always, and fc8 as an inner product.
    taken = {
        name: found[name].reshape(value.shape)
        for name, value in wanted.items()
        if name in found and found[name].squeeze().shape == value.squeeze().shape
    }
    fresh = [name for name in wanted if name not in taken and not name.endswith(COUNTER)]
    # A head trained for other classes is as good as none.
    required = [name for name in fresh if name.rpartition(".")[0] not in optional]
    if required:
        raise DataError(f"{source}: {_difference(net, found, required)}")
    for name, value in taken.items():
        extremes = torch.stack(value.float().aminmax())  # isfinite of all is ten times slower
        if not extremes.isfinite().all():
            raise DataError(f"{source}: {name} has values that are not finite; train again.")
    unused = [name for name in found if name not in taken]
    report(f"weights: {len(taken)} tensors taken from {source} ({describe(found)})")
    report(f"random initialization: {', '.join(fresh) or 'none'}")
    report(f"unused: {_names(unused) or 'none'}")
    return taken


def _difference(net: nn.Module, found: Mapping[str, Tensor], required: list[str]) -> str:
    """What the tensors look like instead, and the first that differ."""
    wanted, network = net.state_dict(), type(net).__module__
    differences = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        if name in found
        else f"{name} missing"
        for name in required
    ]
    problem = f"another network: this looks like {describe(found)}"
    if describe(found) == describe(wanted):
        problem = "this network for other classes, or not all of them; see --classes"
    return (
        f"these are weights of {problem}; --network is {network} ({describe(wanted)}). "
        f"First differences: {_names(differences)}."
    )


def _names(names: list[str]) -> str:
    text = ", ".join(printable(name) for name in names[:NAMES_SHOWN])
    return text + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
