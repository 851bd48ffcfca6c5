"""Weight files of every kind -> networks; no code from a file runs.

A file's content decides how it is read. ``python3 -m tool.weights`` shows and converts files.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tool.run.errors import DataError, UsageError, printable, reason
from tool.weights import caffe, mxnet
from tool.weights.download import START_FILES, first_usable
from tool.weights.pytorch import load_tensors
from tool.weights.vgg import from_torchvision

# What --weights takes besides files: random initialization, and a download of ImageNet's.
WEIGHT_WORDS = FRESH, IMAGENET = "none", "imagenet"
Report = Callable[[str], None]  # prints a line

# A tensor by which a network's weights are recognized, for messages.
SIGNATURES = {
    "conv5_3.weight": "VGG-16",
    "b7.conv_branch2b2.weight": "ResNet-38",
    "trunk4.weight": "the tiny network",
    "layer3.5.conv3.weight": "ResNet-50",
    "features.28.weight": "torchvision's VGG",
    "layer4.0.conv1.weight": "torchvision's ResNet",
}
# The bias comes first: a segmenter has the weight, too.
HEAD_SIGNATURES = {"fc8.bias": "segmenter", "fc8.weight": "classifier", "f9.weight": "AffinityNet"}
# What a checkpoint may have its weights under, the first in this order.
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "student", "ema")
# Where layers of the backbone are not in the file, the published learning rate is too large.
ADVICE = "--lr 0.003 or less and --momentum 0.9; see docs/weights.md"


class WeightFile(NamedTuple):
    """The kind of a file, its tensors by their names there, and by those of a network."""

    form: str
    tensors: dict[str, Tensor]
    found: dict[str, Tensor]


def read_weight_file(path: str | os.PathLike) -> WeightFile:
    """The tensors in a weight file of any kind.

    A PyTorch file may have the state dict within other dicts, and plain data beside it. Raises
    DataError if the file is missing, damaged, of no known kind, or holds what could be code.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        _, form, *readers = next(row for row in BEGINNINGS if re.match(b"(?is)" + row[0], head))
        if not readers:
            raise ValueError(f"it is {form}")
        read, network_name = readers
        tensors = read(path)
        if not tensors:
            raise ValueError("it holds no weights")
        found = {network_name(name): value for name, value in tensors.items()}
        return WeightFile(form, tensors, found)
    except DataError:
        raise
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder; name the weight file.") from error
    except OSError as error:
        ways = f"--weights {IMAGENET} and {FRESH} need no file"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {ways}.") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(f"{path}: not a readable weight file ({reason(error)}).") from error


def _read_pytorch(path: str | os.PathLike) -> dict[str, Tensor]:
    dicts = _dicts_of_tensors(load_tensors(path, "weight file"))
    if not dicts:
        form = "no state dict: names and tensors, and nothing else"
        raise DataError(f"{path}: holds no weights ({form}).")
    wrapped = [name for key in WRAPPERS for name in dicts if name.split(".")[-1] == key]
    if len(dicts) > 1 and not wrapped:
        raise DataError(f"{path}: holds several state dicts ({_names(list(dicts))}); save one.")
    return dict(dicts[[*wrapped, *dicts][0]])


def _dicts_of_tensors(content: Any, name: str = "") -> dict[str, Mapping[str, Tensor]]:
    """The state dicts in nested dicts, by their keys, as in "model.ema"."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return {}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {name: content}
    found = {}
    for key, value in content.items():
        found |= _dicts_of_tensors(value, f"{name}.{key}".removeprefix("."))
    return found


def _read_arrays(read: Callable[[bytes], dict[str, np.ndarray]], path: str | os.PathLike):
    """The arrays that ``read`` finds in a file, as tensors."""
    return {name: torch.tensor(array) for name, array in read(Path(path).read_bytes()).items()}


_without_module = methodcaller("removeprefix", "module.")  # DataParallel's
_read_caffe = partial(_read_arrays, caffe.read_caffemodel)
_read_mxnet = partial(_read_arrays, mxnet.read_params)
# How a file begins, its form, what reads it, and the network's name of a tensor from its name
# there; or how it begins, and what it is instead. The first row that fits counts.
BEGINNINGS = (
    # A zip archive or, before PyTorch 1.6, a pickle
    (rb"PK\x03\x04|\x80", "PyTorch state dict", _read_pytorch, _without_module),
    (rb"\x12\x01\x00{6}", "MXNet parameters", _read_mxnet, mxnet.network_name),
    (rb".{4}\x00{4}\{", "safetensors", load_file, _without_module),
    (rb"\Z", "empty"),
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the file itself by git lfs pull"),
    (rb"\s*<(!doctype|html|\?xml|head)", "a web page; download the file itself again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar", "an archive; unpack it first"),
    # No magic number, but a name, an input or a layer
    (rb"[\x0a\x12\x1a]|\xa2\x06", "Caffe model", _read_caffe, caffe.network_name),
    (rb"", "neither a PyTorch state dict nor .safetensors, .caffemodel or .params"),
)


def describe(state: Mapping[str, Tensor]) -> str:
    """What network a state dict looks like by its names, e.g. "VGG-16 classifier"."""

    def titles(signatures: Mapping[str, str]) -> list[str]:
        names = tuple(f".{name}" for name in state)  # perhaps with a prefix before the point
        return [t for end, t in signatures.items() if any(n.endswith(f".{end}") for n in names)]

    backbone, head = titles(SIGNATURES), titles(HEAD_SIGNATURES)
    return " ".join(backbone[:1] + head[:1]) if backbone else "no network of this project"


def load_for_training(net: nn.Module, source: str, report: Report) -> list[str]:
    """Start a network from ``--weights``: a file, ``imagenet``, or ``none``.

    The file must have every tensor but those of the head and of the backbone's
    ``optional_layers``; returns the latter's layers that it lacks. Raises DataError as
    ``take_weights`` or if the download fails, UsageError if there is none for the network.
    """
    optional = getattr(net, "optional_layers", ())
    if source == FRESH:
        report("WARNING: --weights none: random initialization; published results need ImageNet.")
        return []
    if source == IMAGENET:
        taken = _download(net, report)
    else:
        found = read_weight_file(source).found
        taken = take_weights(net, source, found, (*net.new_layers, *optional), report)
    net.load_state_dict(taken, strict=False)
    fresh = [name for name in optional if f"{name}.weight" not in taken]
    if fresh:
        report(f"{' and '.join(fresh)} are not in the weights: train with {ADVICE}")
    return fresh


def _download(net: nn.Module, report: Report) -> dict[str, Tensor]:
    """The tensors that the network takes of its start weights."""
    kind = describe(net.state_dict()).rpartition(" ")[0]
    if kind not in START_FILES:
        raise UsageError(f"--weights imagenet: there are none for {type(net).__module__}.")

    def use(url: str, path: Path) -> dict[str, Tensor]:
        return take_weights(net, url, read_weight_file(path).found, net.new_layers, report)

    return first_usable(START_FILES[kind], use, report)


def load_for_inference(net: nn.Module, source: str, report: Report) -> None:
    """Load a trained network's weights; the file must have every tensor. ``none`` loads nothing.

    Raises DataError as ``take_weights``, UsageError for ``imagenet``.
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

    Names may have a prefix (``module.``, ``student.``, ...). ``report`` gets a line each: what was
    taken, what is initialized at random, what is unused. Raises DataError if more is missing than
    the layers ``optional``, if there are more layers, or a tensor is not finite.
    """
    wanted = net.state_dict()
    found = from_torchvision(net, _without_prefix(net, source, found), report)
    # Sides of 1 may differ: Caffe once wrote four sides always, and fc8 as an inner product.
    taken = {
        name: found[name].reshape(value.shape)
        for name, value in wanted.items()
        if name in found and found[name].squeeze().shape == value.squeeze().shape
    }
    # A batch norm counts its batches since PyTorch 0.4.1, which changes no output.
    missing = [name for name in wanted if name not in taken]
    fresh = [name for name in missing if not name.endswith("num_batches_tracked")]
    # A head trained for other classes is as good as none.
    required = [name for name in fresh if name.rpartition(".")[0] not in optional]
    if required:
        raise DataError(f"{source}: {_difference(net, found, required)}")
    for name, value in taken.items():
        extremes = torch.stack(value.float().aminmax())  # isfinite of all is ten times slower
        if not extremes.isfinite().all():
            raise DataError(f"{source}: {name} has values that are not finite; train again.")
    unused = [name for name in found if name not in taken]
    # ResNet-101 has all of ResNet-50, and more; a head with a bias is merely another head.
    backbone = dict(net.named_children()).keys() - set(net.new_layers)
    deeper = [name for name in unused if name not in wanted and name.split(".")[0] in backbone]
    if deeper:
        network = type(net).__module__
        raise DataError(f"{source}: has more layers than {network}: {_names(deeper)}.")
    report(f"weights: {len(taken)} tensors taken from {source} ({describe(found)})")
    report(f"random initialization: {', '.join(fresh) or 'none'}")
    report(f"unused: {_names(unused) or 'none'}")
    return taken


def _without_prefix(
    net: nn.Module, source: str, found: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The tensors with the names that they have after the prefix of this network's names.

    Raises DataError if two prefixes fit equally well: they are two networks.
    """
    wanted = [name for name in net.state_dict() if not name.endswith("num_batches_tracked")]
    prefixes = {"", *(name[: -len(wanted[0])] for name in found if name.endswith(f".{wanted[0]}"))}
    fitting = {p: sum(p + name in found for name in wanted) for p in sorted(prefixes)}
    best = max(fitting, key=fitting.get)
    if best and list(fitting.values()).count(fitting[best]) > 1:
        shown = _names([p for p in fitting if fitting[p] == fitting[best]])
        raise DataError(f"{source}: holds the network several times ({shown}); save one of them.")
    others = {name: value for name, value in found.items() if not name.startswith(best)}
    return others | {n.removeprefix(best): v for n, v in found.items() if n.startswith(best)}


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
    if describe(wanted).startswith(describe(found)):
        problem = "a part of this network, or of it for other classes; see --classes"
    problem += f"; --network is {network} ({describe(wanted)})"
    return f"these are weights of {problem}. First differences: {_names(differences)}."


def _names(names: list[str], shown: int = 5) -> str:
    text = ", ".join(printable(name) for name in names[:shown])
    return text + (f" and {len(names) - shown} more" if len(names) > shown else "")
