"""Weight files of every kind -> networks: nothing is executed, and what was loaded is always said.

    python3 -m tool.weights show FILE [--json OUT]
    python3 -m tool.weights convert FILE OUT.pth --network network.resnet38_cls

FILE is a PyTorch checkpoint (.pth, .pt), .safetensors, a Caffe model (.caffemodel) or MXNet's
.params; its content tells which. show lists what is in it: name, shape, type, and the beginning of
the SHA-256 of each tensor's little-endian bytes. convert writes what the network takes of it as a
state dict, from which every program starts without further ado.
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tool.files import atomic_write
from tool.pickles import map_file
from tool.run import cli
from tool.run.errors import DataError, UsageError, printable, reason
from tool.weights.caffe import read_caffemodel
from tool.weights.mxnet import LIST_MAGIC, read_params
from tool.weights.pytorch import ZIP_MAGIC, explained, load_tensors, save_tensors

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
HASH_DIGITS = 16
STATE_DICT_SUFFIXES = (".pth", ".pt")
NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)

PYTORCH, SAFETENSORS = "PyTorch state dict", "safetensors"
CAFFE, MXNET = "Caffe model", "MXNet parameters"
HEAD_BYTES = 512
# Of .safetensors: 20,000 tensors have a header of this size.
MAX_HEADER_BYTES = 4 * 2**20
# What people take for weight files: how it begins, what it is, what to do.
FOREIGN = (
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
    """The tensors of a file, by the names that they have there, and what kind of file it is."""

    form: str
    tensors: dict[str, Tensor]


# ---- files ----


def read_weight_file(path: str | os.PathLike) -> WeightFile:
    """The tensors in a weight file of any kind; they may share its mapped memory.

    A state dict stands plain in its file, or under ``state_dict`` or ``model``. Caffe's blobs are
    named ``<layer>.0``, ``<layer>.1``, and nameless arrays of MXNet ``0``, ``1``. Raises DataError
    if the file is missing, damaged, of no known kind, or wants to execute anything.
    """
    if Path(path).is_dir():
        raise DataError(f"{path}: is a folder; name the weight file.")
    if not Path(path).is_file():
        raise DataError(
            f"{path}: no such weight file; --weights {FRESH} starts without one, and "
            f"--weights {IMAGENET} (VGG-16) downloads one."
        )
    with explained(path, "weight file"):
        with open(path, "rb") as file:
            form = _form_of(file.read(HEAD_BYTES))
        return WeightFile(form, _READERS[form](path))


def _form_of(head: bytes) -> str:
    """What kind of file begins so; raises ValueError if it is none of weights."""
    if head.startswith((ZIP_MAGIC, b"\x80")):
        return PYTORCH
    if head.startswith(LIST_MAGIC.to_bytes(8, "little")):
        return MXNET
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return SAFETENSORS
    for pattern, what in FOREIGN:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise ValueError(f"it is {what}")
    # A Caffe model has no magic number, but begins with a name, an input or a layer.
    if re.match(rb"[\x0a\x12\x1a]|\xa2\x06", head):
        return CAFFE
    raise ValueError(
        "neither a PyTorch state dict nor .safetensors, .caffemodel or .params"
        if head
        else "it is empty"
    )


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


def _read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_arrays(read: Callable[[memoryview], dict[str, np.ndarray]], path: str | os.PathLike):
    arrays = read(memoryview(map_file(path)))
    if not arrays:
        raise DataError(f"{path}: holds no weights.")
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor; copied where its numbers do not lie as PyTorch needs them."""
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(array.astype(native, copy=not array.flags.aligned))


_READERS: dict[str, Callable[[str | os.PathLike], dict[str, Tensor]]] = {
    PYTORCH: _read_pytorch,
    SAFETENSORS: _read_safetensors,
    CAFFE: lambda path: _read_arrays(read_caffemodel, path),
    MXNET: lambda path: _read_arrays(read_params, path),
}


# ---- names ----

_CAFFE_KINDS = {"0": "weight", "1": "bias"}
_MXNET_KINDS = {
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
# conv1a_weight, bn7_gamma; res2a_branch1_weight, bn4b5_branch2b1_moving_mean.
_MXNET_PLAIN = re.compile(r"(?:arg:|aux:)?(conv1a|bn7)_(\w+)")
_MXNET_BLOCK = re.compile(r"(?:arg:|aux:)?(res|bn)(\d)(?:a|[b-z](\d+))_(branch[0-9a-z]+)_(\w+)")


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors in a weight file under the names that a network gives them.

    A ``module.`` prefix (DataParallel) is taken off. Raises DataError as ``read_weight_file`` does.
    """
    return _network_names(read_weight_file(path))


def _network_names(file: WeightFile) -> dict[str, Tensor]:
    rename = {CAFFE: _rename_caffe, MXNET: _rename_mxnet}.get(
        file.form, lambda name: name.removeprefix("module.")
    )
    return {rename(name): value for name, value in file.tensors.items()}


def _rename_caffe(name: str) -> str:
    layer, _, index = name.rpartition(".")
    return f"{layer}.{_CAFFE_KINDS.get(index, index)}"


def _rename_mxnet(name: str) -> str:
    """Layers ``conv1a`` and ``bn7``, and blocks: 2a is b2, 4b5 is b4_5; other names stay."""
    if match := _MXNET_PLAIN.fullmatch(name):
        layer, kind = match.groups()
    elif match := _MXNET_BLOCK.fullmatch(name):
        layer_type, stage, index, branch, kind = match.groups()
        block = f"b{stage}_{index}" if index else f"b{stage}"
        layer = f"{block}.{'conv' if layer_type == 'res' else 'bn'}_{branch}"
    else:
        return name
    return f"{layer}.{_MXNET_KINDS[kind]}" if kind in _MXNET_KINDS else name


def describe(names: Iterable[str]) -> str:
    """What network a state dict's names look like, e.g. "VGG-16 classifier"."""
    names = set(names)
    backbone = [title for name, title in SIGNATURES.items() if name in names]
    head = [title for name, title in HEAD_SIGNATURES.items() if name in names]
    return " ".join(backbone + head) if backbone else "no network of this project"


# ---- loading ----


class _Match(NamedTuple):
    """What a network takes of the tensors found, by name."""

    taken: dict[str, Tensor]
    fresh: list[str]
    unused: list[str]


def load_for_training(net: nn.Module, source: str, say: Callable[[str], None]) -> None:
    """Start a network from ``--weights``: a file, ``imagenet``, or ``none`` (fresh).

    The file must have every tensor but those of ``net.new_layers``. ``say`` is told what was taken,
    what stayed fresh and what was left. Raises DataError if the file is of another network, or the
    download failed, and UsageError if ``imagenet`` has nothing for the network.
    """
    if source == FRESH:
        say(
            "WARNING: --weights none: every layer starts from random numbers; "
            "the published recipes start from ImageNet weights."
        )
    elif source == IMAGENET:
        found = imagenet_weights(net)
        _take(net, "torchvision's VGG-16", _Match(found, _left(net, found), []), say)
    else:
        _take(net, source, _match_file(net, source, net.new_layers), say)


def load_for_inference(net: nn.Module, source: str, say: Callable[[str], None]) -> None:
    """Give a trained network its weights; every tensor must be in the file (or ``none``: fresh).

    Raises DataError as ``load_for_training`` does, UsageError for ``imagenet``.
    """
    if source == IMAGENET:
        raise UsageError("--weights imagenet: is for training; name the weights that it wrote.")
    if source == FRESH:
        say("WARNING: --weights none: the network is untrained, its output means nothing.")
    else:
        _take(net, source, _match_file(net, source, ()), say)


def _match_file(net: nn.Module, path: str | os.PathLike, optional: tuple[str, ...]) -> _Match:
    """What the network takes of a file that must have all but the layers ``optional``."""
    file = read_weight_file(path)
    found = _network_names(file)
    if file.form == CAFFE:
        found = _without_padding(found, net.state_dict())
    try:
        match = _match(net, found, optional)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    for name, value in match.taken.items():
        extremes = value.float().aminmax() if value.numel() else ()  # no tensor beside it
        if not all(extreme.isfinite() for extreme in extremes):
            raise DataError(f"{path}: {name} has values that are not finite; train again.")
    return match


def _match(net: nn.Module, found: Mapping[str, Tensor], optional: tuple[str, ...]) -> _Match:
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
    return _Match(taken, fresh, [name for name in found if name not in taken])


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


def _left(net: nn.Module, taken: Mapping[str, Tensor]) -> list[str]:
    """The network's tensors that are not taken, without counters."""
    return [n for n in net.state_dict() if n not in taken and not n.endswith(OPTIONAL_SUFFIX)]


def _difference(net: nn.Module, found: Mapping[str, Tensor], required: list[str]) -> str:
    """Says of tensors that do not fit what they look like, and the first that differ."""
    wanted = net.state_dict()
    differences = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        if name in found
        else f"{name} missing"
        for name in required
    ]
    if describe(found) == describe(wanted):
        problem = "these are weights of this network for other classes, or not all of them"
        advice = "; see --classes"
    else:
        problem = f"these are weights of another network: this looks like {describe(found)}"
        advice = ""
    return (
        f"{problem}{advice}; --network is {type(net).__module__} ({describe(wanted)}). "
        f"First differences: {_names(differences, DIFFERENCES_SHOWN)}."
    )


def _take(net: nn.Module, source: str, match: _Match, say: Callable[[str], None]) -> None:
    """Copy the tensors into the network, and say what was taken, stayed fresh and was left."""
    net.load_state_dict(match.taken, strict=False)  # completeness was checked before
    for line in _account(net, source, match):
        say(line)


def _account(net: nn.Module, source: str, match: _Match) -> list[str]:
    """A line each: what was taken, what stayed fresh, and what of the file was left."""
    new = [name for name in match.fresh if name.rpartition(".")[0] in net.new_layers]
    old = [name for name in match.fresh if name not in new]
    fresh = [f"{', '.join(old)} (random, not in the file)"] if old else []
    fresh += [f"{', '.join(new)} (new head)"] if new else []
    title = describe([*match.taken, *match.unused])
    return [
        f"weights: {len(match.taken)} tensors taken from {source} ({title})",
        f"fresh: {'; '.join(fresh) or 'none'}",
        f"unused: {_names(match.unused, NAMES_SHOWN) or 'none'}",
    ]


def _names(names: list[str], shown: int) -> str:
    text = ", ".join(printable(name) for name in names[:shown])
    return text + (f" and {len(names) - shown} more" if len(names) > shown else "")


# ---- ImageNet weights ----

_CONVOLUTION = re.compile(r"conv\d_\d")


def imagenet_weights(net: nn.Module) -> dict[str, Tensor]:
    """The convolutions conv1_1 to conv5_3 of VGG-16, trained on ImageNet, for ``net.normalize``.

    They are torchvision's ``VGG16_Weights.IMAGENET1K_FEATURES``, which are the original Caffe
    model's for another order of channels and a mean that differs a little. Raises UsageError if the
    network has no such layers, DataError if the download fails.
    """
    from torchvision.models import VGG16_Weights  # slow to import, and rarely needed

    layers = [name for name, _ in net.named_modules() if _CONVOLUTION.fullmatch(name)]
    if not layers:
        raise UsageError(
            f"--weights {IMAGENET}: is for the VGG-16 networks, and --network is "
            f"{type(net).__module__}; name a weight file."
        )
    weights = VGG16_Weights.IMAGENET1K_FEATURES
    place = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        found = _convolutions(state, layers)
    except Exception as error:  # a network or a damaged file can raise nearly anything
        raise DataError(
            f"--weights {IMAGENET}: {weights.url} could not be loaded ({reason(error)}); "
            f"download it by hand and put it at {place}."
        ) from error
    transform, first = weights.transforms(), layers[0]
    found[f"{first}.weight"], found[f"{first}.bias"] = _for_normalization(
        found[f"{first}.weight"], found[f"{first}.bias"], net, transform.mean, transform.std
    )
    return found


def _convolutions(state: Mapping[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """The convolutions among torchvision's ``features.<n>``, under the names of our layers."""
    numbers = [re.fullmatch(r"features\.(\d+)\.weight", name) for name in state]
    indices = sorted(int(match[1]) for match in numbers if match)
    return {
        f"{layer}.{kind}": state[f"features.{index}.{kind}"]
        for layer, index in zip(layers, indices, strict=True)
        for kind in ("weight", "bias")
    }


def _for_normalization(
    weight: Tensor, bias: Tensor, net: nn.Module, mean: Iterable[float], std: Iterable[float]
) -> tuple[Tensor, Tensor]:
    """A first convolution that gives for ``net.normalize(image)`` what it gave for torchvision's.

    weight C x 3 x h x w, bias C, for RGB in 0..1 with ``mean`` subtracted, divided by ``std``. Both
    normalizations are affine in the colour; ours is found by its values for black, red, green and
    blue. Only where the kernel leaves the image do the two differ, by the difference of the means.
    """
    colours = 255 * np.concatenate([np.zeros((1, 3)), np.eye(3)]).astype(np.uint8)[None]
    black, *primaries = net.normalize(colours)[0].astype(np.float64)
    ours = torch.tensor(np.array([(colour - black) / 255 for colour in primaries]).T)
    mean, std = torch.tensor(mean).double(), torch.tensor(std).double()
    # x = ours rgb + black, and theirs = (rgb / 255 - mean) / std, hence theirs = matrix x + shift
    matrix = torch.linalg.inv(ours) / (255 * std[:, None])
    shift = -mean / std - matrix @ torch.tensor(black)
    new_weight = torch.einsum("ocij,cd->odij", weight.double(), matrix)
    new_bias = bias.double() + torch.einsum("ocij,c->o", weight.double(), shift)
    return new_weight.to(weight.dtype), new_bias.to(bias.dtype)


# ---- the tool ----


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python3 -m tool.weights", description=__doc__, formatter_class=cli.help_formatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="list the tensors in a file")
    show.add_argument("file", metavar="FILE", help="weight file of any kind")
    show.add_argument(
        "--json", metavar="OUT", help="also write {name: {shape, dtype, sha256}} to this file"
    )
    convert = commands.add_parser("convert", help="write what a network takes as a state dict")
    convert.add_argument("file", metavar="FILE", help="weight file of any kind")
    convert.add_argument("out", metavar="OUT.pth", help="state dict to write")
    convert.add_argument(
        "--network",
        type=cli.any_network,
        required=True,
        metavar="MODULE",
        help="module of the network",
    )
    return parser


def show(args: argparse.Namespace) -> None:
    """Print what is in a file, and write it as JSON."""
    cli.require_distinct_outputs({"--json": args.json}, {"FILE": args.file})
    file = read_weight_file(args.file)
    contents = {
        name: {"shape": list(value.shape), "dtype": _dtype(value), "sha256": _sha256(value)}
        for name, value in file.tensors.items()
    }
    count = sum(value.numel() for value in file.tensors.values())
    title = describe(_network_names(file))
    print(f"{args.file}: {file.form}, {len(contents)} tensors, {count:,} values ({title})")
    for name, entry in contents.items():
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        print(f"{printable(name)}  {shape}  {entry['dtype']}  {entry['sha256']}")
    if args.json:
        with atomic_write(args.json) as out:
            out.write((json.dumps(contents, indent=2) + "\n").encode())


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _sha256(value: Tensor) -> str:
    """The first digits of the hash of a tensor's bytes, row-major and little-endian."""
    value = value.detach().contiguous()
    if value.dtype.is_floating_point and value.dtype not in NUMPY_FLOATS:
        value = value.view(torch.int16 if value.itemsize == 2 else torch.uint8)
    array = value.numpy()
    raw = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(raw.tobytes()).hexdigest()[:HASH_DIGITS]


def convert(args: argparse.Namespace) -> None:
    """Write what a network takes of a file as a state dict."""
    if not args.out.endswith(STATE_DICT_SUFFIXES):
        raise UsageError(f"{args.out}: is no name for a state dict; it must end in .pth.")
    cli.require_distinct_outputs({"OUT.pth": args.out}, {"FILE": args.file})
    with torch.device("meta"):  # names and shapes are all that is needed
        net = args.network.Net()
    match = _match_file(net, args.file, net.new_layers)
    wanted = net.state_dict()
    state = {
        name: value.to(wanted[name].dtype, copy=True, memory_format=torch.contiguous_format)
        for name, value in match.taken.items()
    }
    save_tensors(args.out, state)
    print("\n".join(_account(net, args.file, match)))
    print(f"written to {args.out}")


def main(args: argparse.Namespace) -> None:
    {"show": show, "convert": convert}[args.command](args)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
