"""Shows what is in a weight file, or converts it.

    python3 -m tool.weights show FILE [--json OUT]
    python3 -m tool.weights convert FILE OUT.pth --network network.resnet38_cls

FILE is a PyTorch checkpoint (.pth, .pt), .safetensors, a Caffe model (.caffemodel) or MXNet's
.params. show lists name, shape and type of each tensor, and the first 16 digits of the SHA-256 of
its little-endian bytes. convert writes a state dict from which both trainings can start.
"""

import argparse
import hashlib

import torch

from tool.files import write_json
from tool.run import cli
from tool.run.errors import UsageError, printable
from tool.weights import describe, read_weight_file, take_weights
from tool.weights.pytorch import save_tensors


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python3 -m tool.weights")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("show", help="list the tensors in a file").add_argument
    add("file", metavar="FILE", help="weight file of any kind")
    add("--json", metavar="OUT", help="also write {name: {shape, dtype, sha256}} to this file")
    add = commands.add_parser("convert", help="write what a network takes").add_argument
    add("file", metavar="FILE", help="weight file of any kind")
    add("out", metavar="OUT.pth", help="state dict to write")
    add("--network", required=True, type=cli.any_network, metavar="MODULE", help="its module")
    return parser


def show(args: argparse.Namespace) -> None:
    """Print what is in a file, and write it as JSON."""
    cli.require_distinct_outputs({"--json": args.json}, {"FILE": args.file})
    file = read_weight_file(args.file)
    count = sum(value.numel() for value in file.tensors.values())
    title = f"{file.form}, {len(file.tensors)} tensors, {count:,} values ({describe(file.found)})"
    print(f"{args.file}: {title}")
    contents = {}
    for name, value in file.tensors.items():
        shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
        raw = value.detach().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(raw).hexdigest()[:16]
        contents[name] = {"shape": shape, "dtype": dtype, "sha256": digest}
        print(f"{printable(name)}  {' x '.join(map(str, shape)) or 'scalar'}  {dtype}  {digest}")
    if args.json:
        write_json(args.json, contents)


def convert(args: argparse.Namespace) -> None:
    """Write what a network takes of a file as a state dict."""
    if not args.out.endswith((".pth", ".pt")):
        raise UsageError(f"{args.out}: is no name for a state dict; it must end in .pth.")
    cli.require_distinct_outputs({"OUT.pth": args.out}, {"FILE": args.file})
    with torch.device("meta"):  # names and shapes are all that is needed
        net = args.network.Net()
    found, wanted = read_weight_file(args.file).found, net.state_dict()
    taken = take_weights(net, args.file, found, net.new_layers, print)
    state = {name: value.to(wanted[name].dtype).clone() for name, value in taken.items()}
    save_tensors(args.out, state)
    print(f"written to {args.out}")


def main(args: argparse.Namespace) -> None:
    {"show": show, "convert": convert}[args.command](args)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
