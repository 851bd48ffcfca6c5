"""Shows what is in a weight file, or converts it.

    python3 -m tool.weights show FILE [--json OUT]
    python3 -m tool.weights convert FILE OUT.pth --network network.resnet38_cls

FILE is a PyTorch checkpoint (.pth, .pt), .safetensors, a Caffe model (.caffemodel) or MXNet's
.params; its content decides which. show lists name, shape and type of each tensor, and the
beginning of the SHA-256 of its little-endian bytes. convert writes what the network takes of it as
a state dict, from which every program can start.
"""

import argparse
import hashlib
import json

import torch
from torch import Tensor

from tool.files import atomic_write
from tool.run import cli
from tool.run.errors import UsageError, printable
from tool.weights import describe, match_file, network_names, read_weight_file, summary
from tool.weights.pytorch import save_tensors

HASH_DIGITS = 16
STATE_DICT_SUFFIXES = (".pth", ".pt")
NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


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
    network = {"type": cli.any_network, "metavar": "MODULE", "help": "module of the network"}
    convert.add_argument("--network", required=True, **network)
    return parser


def show(args: argparse.Namespace) -> None:
    """Print what is in a file, and write it as JSON."""
    cli.require_distinct_outputs({"--json": args.json}, {"FILE": args.file})
    file = read_weight_file(args.file)
    contents = {
        name: {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "sha256": _sha256(value),
        }
        for name, value in file.tensors.items()
    }
    count = sum(value.numel() for value in file.tensors.values())
    title = describe(network_names(file))
    print(f"{args.file}: {file.form}, {len(contents)} tensors, {count:,} values ({title})")
    for name, entry in contents.items():
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        print(f"{printable(name)}  {shape}  {entry['dtype']}  {entry['sha256']}")
    if args.json:
        with atomic_write(args.json) as out:
            out.write((json.dumps(contents, indent=2) + "\n").encode())


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
    match = match_file(net, args.file, net.new_layers)
    wanted = net.state_dict()
    state = {
        name: value.to(wanted[name].dtype, copy=True, memory_format=torch.contiguous_format)
        for name, value in match.taken.items()
    }
    save_tensors(args.out, state)
    print("\n".join(summary(args.file, match)))
    print(f"written to {args.out}")


def main(args: argparse.Namespace) -> None:
    {"show": show, "convert": convert}[args.command](args)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
