"""Weight files of every kind -> networks; no code from a file runs.

A file is a PyTorch checkpoint (.pth, .pt), .safetensors, a Caffe model (.caffemodel) or MXNet's
.params; its content decides which. ``python3 -m tool.weights`` shows and converts them.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
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

# A tensor by which a network's weights are recognized, for messages.
SIGNATURES = {
    "conv5_3.weight": "VGG-16",
    "b7.conv_branch2b2.weight": "ResNet-38",
    "trunk4.weight": "the tiny network",
    "features.28.weight": "torchvision's VGG-16",
    "layer4.0.conv1.weight": "torchvision's ResNet",
}
HEAD_SIGNATURES = {"fc8.weight": "classifier", "f9.weight": "AffinityNet"}
# Counters that batch norm keeps since PyTorch 0.4.1; they decide nothing.
OPTIONAL_SUFFIX = "num_batches_tracked"
NAMES_SHOWN = 8
DIFFERENCES_SHOWN = 3

PYTORCH, SAFETENSORS = "PyTorch state dict", "safetensors"
CAFFE, MXNET = "Caffe model", "MXNet parameters"
HEAD_BYTES = 512
# What people take for weight files: how it begins, what it is, what to do.
FOREIGN = (
    (rb"\Z", "empty"),
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the file itself by git lfs pull"),
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page; download the file itself again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar", "an archive; unpack it first"),
    (rb"\x89HDF", "HDF5 (Keras); save the weights as .safetensors"),
    (rb"\x93NUMPY", "a NumPy array; weights need names"),
    (rb"\x08.{1,64}(onnx|pytorch|keras)", "an ONNX model; save the weights as a state dict"),
    (rb"\{", "JSON; the weights are in another file (MXNet's in .params)"),
    (rb"#|name:|layers?\s*\{|input", "a description of a network; its weights are elsewhere"),
)


class WeightFile(NamedTuple):
    """What kind of file it is, and its tensors by the names that they have there."""

    form: str
    tensors: dict[str, Tensor]


# ---- files ----


def read_weight_file(path: str | os.PathLike) -> WeightFile:
    """The tensors in a weight file of any kind.

    A state dict is the whole content of its file, or its ``state_dict`` or ``model``. Caffe's blobs
    are named ``<layer>.0``, ``<layer>.1``, and nameless arrays of MXNet ``0``, ``1``. Raises
    DataError if the file is missing, damaged, of no known kind, or holds more than tensors.
    """
    if Path(path).is_dir():
        raise DataError(f"{path}: is a folder; name the weight file.")
    if not Path(path).is_file():
        raise DataError(
            f"{path}: no such weight file; --weights {FRESH} starts without one, and "
            f"--weights {IMAGENET} (VGG-16) downloads one."
        )
    try:
        with open(path, "rb") as file:
            form = _form_of(file.read(HEAD_BYTES))
        return WeightFile(form, _READERS[form](path))
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(f"{path}: not a readable weight file ({reason(error)}).") from error


def _form_of(head: bytes) -> str:
    """The kind of a file that begins so; raises ValueError if it is no weight file."""
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive or, before PyTorch 1.6, a pickle
        return PYTORCH
    if head.startswith(mxnet.LIST_MAGIC.to_bytes(8, "little")):
        return MXNET
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return SAFETENSORS
    for pattern, what in FOREIGN:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise ValueError(f"it is {what}")
    # A Caffe model has no magic number, but begins with a name, an input or a layer.
    if re.match(rb"[\x0a\x12\x1a]|\xa2\x06", head):
        return CAFFE
    raise ValueError("neither a PyTorch state dict nor .safetensors, .caffemodel or .params")


def _read_pytorch(path: str | os.PathLike) -> dict[str, Tensor]:
    content = load_tensors(path, "weight file")
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"{path}: holds no state dict (a dict of names and tensors).")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise DataError(f"{path}: holds more than names and tensors, so it is no state dict.")
    return dict(content)


def _read_arrays(read: Callable[[memoryview], dict[str, np.ndarray]], path: str | os.PathLike):
    """What ``read`` finds in the file's bytes, as tensors."""
    arrays = read(memoryview(np.fromfile(path, np.uint8)))
    if not arrays:
        raise DataError(f"{path}: holds no weights.")
    # PyTorch needs the machine's byte order and alignment.
    return {
        name: torch.from_numpy(a.astype(a.dtype.newbyteorder("="), copy=not a.flags.aligned))
        for name, a in arrays.items()
    }


_READERS: dict[str, Callable[[str | os.PathLike], dict[str, Tensor]]] = {
    PYTORCH: _read_pytorch,
    SAFETENSORS: load_file,
    CAFFE: lambda path: _read_arrays(caffe.read_caffemodel, path),
    MXNET: lambda path: _read_arrays(mxnet.read_params, path),
}


# ---- names ----


def network_names(file: WeightFile) -> dict[str, Tensor]:
    """The tensors of a file under the names that a network gives them.

    A ``module.`` prefix (DataParallel) is removed.
    """
    rename = {CAFFE: caffe.network_name, MXNET: mxnet.network_name}.get(
        file.form, lambda name: name.removeprefix("module.")
    )
    return {rename(name): value for name, value in file.tensors.items()}


def describe(names: Iterable[str]) -> str:
    """What network a state dict's names look like, e.g. "VGG-16 classifier"."""
    names = set(names)
    backbone = [title for name, title in SIGNATURES.items() if name in names]
    head = [title for name, title in HEAD_SIGNATURES.items() if name in names]
    return " ".join(backbone + head) if backbone else "no network of this project"


# ---- loading ----


class Match(NamedTuple):
    """What a network takes of the tensors found, by name."""

    taken: dict[str, Tensor]
    fresh: list[str]
    unused: list[str]


def load_for_training(net: nn.Module, source: str, report: Callable[[str], None]) -> None:
    """Start a network from ``--weights``: a file, ``imagenet``, or ``none``.

    The file must have every tensor but those of ``net.new_layers``. ``report`` gets a line each:
    what was taken, what is initialized at random, and what of the file is unused. Raises DataError
    if the file is of another network, or the download failed, and UsageError if ``imagenet`` has
    nothing for the network.
    """
    if source == FRESH:
        report(
            "WARNING: --weights none: random initialization of every layer; "
            "the published recipes start from ImageNet weights."
        )
        return
    if source == IMAGENET:
        source, found = "torchvision's VGG-16", imagenet_weights(net)
        match = Match(found, _left(net, found), [])
    else:
        match = match_file(net, source, net.new_layers)
    _load(net, source, match, report)


def load_for_inference(net: nn.Module, source: str, report: Callable[[str], None]) -> None:
    """Give a trained network its weights; the file must have every tensor of the network.

    ``none`` leaves it as initialized. Raises DataError as ``load_for_training`` does, UsageError
    for ``imagenet``.
    """
    if source == IMAGENET:
        raise UsageError("--weights imagenet: is for training; name the weights that it wrote.")
    if source == FRESH:
        report("WARNING: --weights none: the network is untrained, its output means nothing.")
        return
    _load(net, source, match_file(net, source, ()), report)


def _load(net: nn.Module, source: str, match: Match, report: Callable[[str], None]) -> None:
    net.load_state_dict(match.taken, strict=False)  # completeness was checked before
    for line in summary(source, match):
        report(line)


def match_file(net: nn.Module, path: str | os.PathLike, optional: tuple[str, ...]) -> Match:
    """What the network takes of a file that must have all but the layers ``optional``.

    Raises DataError if tensors are missing, of another shape or not finite.
    """
    file = read_weight_file(path)
    found = network_names(file)
    if file.form == CAFFE:
        found = _without_padding(found, net.state_dict())
    try:
        match = match_tensors(net, found, optional)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    for name, value in match.taken.items():
        extremes = value.float().aminmax() if value.numel() else ()  # no tensor beside it
        if not all(extreme.isfinite() for extreme in extremes):
            raise DataError(f"{path}: {name} has values that are not finite; train again.")
    return match


def match_tensors(net: nn.Module, found: Mapping[str, Tensor], optional: tuple[str, ...]) -> Match:
    """What the network takes; raises ValueError if more is missing than the layers ``optional``."""
    taken = {
        name: found[name]
        for name, value in net.state_dict().items()
        if name in found and found[name].shape == value.shape
    }
    fresh = _left(net, taken)
    # A head trained for other classes is as good as none.
    required = [name for name in fresh if name.rpartition(".")[0] not in optional]
    if required:
        raise ValueError(_difference(net, found, required))
    return Match(taken, fresh, [name for name in found if name not in taken])


def _left(net: nn.Module, taken: Mapping[str, Tensor]) -> list[str]:
    """The network's tensors that are not taken, without counters."""
    return [n for n in net.state_dict() if n not in taken and not n.endswith(OPTIONAL_SUFFIX)]


def _without_padding(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict:
    """Caffe's tensors in the network's shapes, where these differ in sides of 1 only.

    Caffe's old generation writes four sides always, and an inner product is a 1 x 1 convolution.
    """

    def sides(tensor: Tensor) -> list[int]:
        return [side for side in tensor.shape if side != 1]

    return {
        name: value.reshape(wanted[name].shape)
        if name in wanted and sides(value) == sides(wanted[name])
        else value
        for name, value in found.items()
    }


def _difference(net: nn.Module, found: Mapping[str, Tensor], required: list[str]) -> str:
    """What the tensors look like instead, and the first that differ."""
    wanted, network = net.state_dict(), type(net).__module__
    differences = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        if name in found
        else f"{name} missing"
        for name in required
    ]
    if describe(found) == describe(wanted):
        problem = "this network for other classes, or not all of them; see --classes"
    else:
        problem = f"another network: this looks like {describe(found)}"
    return (
        f"these are weights of {problem}; --network is {network} ({describe(wanted)}). "
        f"First differences: {_names(differences, DIFFERENCES_SHOWN)}."
    )


def summary(source: str, match: Match) -> list[str]:
    """A line each: what was taken, what is initialized at random, what of the file is unused."""
    title = describe([*match.taken, *match.unused])
    return [
        f"weights: {len(match.taken)} tensors taken from {source} ({title})",
        f"random initialization: {', '.join(match.fresh) or 'none'}",
        f"unused: {_names(match.unused, NAMES_SHOWN) or 'none'}",
    ]


def _names(names: list[str], shown: int) -> str:
    text = ", ".join(printable(name) for name in names[:shown])
    return text + (f" and {len(names) - shown} more" if len(names) > shown else "")
