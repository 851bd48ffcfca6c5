"""Stage 3: train AffinityNet on the confident labels that stage 2's CRF scores give.

VGG-16, as published (lr 0.1; take 0.01 and network.resnet38_aff for ResNet-38):
    python3 train_aff.py --lr 0.1 --batch_size 8 --max_epoches 8 --crop_size 448
        --voc12_root VOC2012 --network network.vgg16_aff --weights vgg16_20M.caffemodel
        --wt_dec 5e-4 --la_crf_dir LA --ha_crf_dir HA

Several GPUs of one machine, or of two (run the second on both; --batch_size stays the total):
    torchrun --nproc_per_node=4 train_aff.py --lr 0.1 ...
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500
        train_aff.py --lr 0.1 ...

Writes <session_name>.pth, .log and .csv. A run that was killed goes on from <session_name>.ckpt
when its command is repeated. LA and HA are what infer_cls.py wrote to --out_la_crf and
--out_ha_crf. Training starts from ImageNet weights, as stage 1 does.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tool.affinity import affinity_loss, pair_labels
from tool.maps import maps_file
from tool.run import cli
from tool.run.checkpoint import digest, digest_files
from tool.run.devices import (
    StopSignals,
    autocast,
    choose_device,
    configure_backends,
    process_group,
    seed_generators,
    sum_over_ranks,
)
from tool.run.errors import UsageError
from tool.run.loading import load_epochs
from tool.run.training import (
    Training,
    add_training_arguments,
    check_crop_size,
    make_schedule,
    remaining_batches,
    session_name,
)
from tool.weights import load_for_training
from voc12.datasets import AffinityTrainingSet
from voc12.devkit import Devkit, add_devkit_arguments, open_devkit, read_ids, require_files


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.help_formatter)
    cli.add_network_argument(parser, cli.affinity_network, default="network.vgg16_aff")
    add_training_arguments(parser, batch_size=8, epochs=8, crop_size=448)
    add_devkit_arguments(parser, labels=False)
    parser.add_argument("--la_crf_dir", required=True, help="CRF scores with the low alpha")
    parser.add_argument("--ha_crf_dir", required=True, help="CRF scores with the high alpha")
    cli.add_radius_argument(parser)
    return parser


def digests(args: argparse.Namespace, devkit: Devkit, train_ids: Sequence[str]) -> dict[str, str]:
    """What the files hold that the flags name; a checkpoint of other contents is not continued."""
    return {
        "train_list": digest(*train_ids),
        "classes": digest(*devkit.class_names),
        "voc12_root": digest_files(map(devkit.image_path, train_ids)),
        "la_crf_dir": digest_files(maps_file(Path(args.la_crf_dir, f"{i}.npy")) for i in train_ids),
        "ha_crf_dir": digest_files(maps_file(Path(args.ha_crf_dir, f"{i}.npy")) for i in train_ids),
        "weights": args.weights
        if args.weights in cli.WEIGHT_WORDS
        else digest_files([args.weights]),
    }


def train(args: argparse.Namespace, device: torch.device) -> None:
    session = session_name(args)
    configure_backends(device, args)
    seed_generators(args.seed)
    devkit = open_devkit(args)
    devkit.require_output("--session_name", session)
    train_ids = read_ids(args.train_list)
    schedule = make_schedule(len(train_ids), args)

    net = args.network.Net(radius=args.radius)
    check_crop_size(args.crop_size, net.stride, args.radius)
    notes: list[str] = []
    load_for_training(net, args.weights, notes.append)
    train_set = AffinityTrainingSet(
        devkit,
        train_ids,
        net.normalize,
        args.la_crf_dir,
        args.ha_crf_dir,
        args.crop_size,
        net.stride,
        args.seed,
    )
    devkit.require_images(train_ids)
    require_files(args.la_crf_dir, train_ids, ".npy", "infer_cls.py --out_la_crf makes them")
    require_files(args.ha_crf_dir, train_ids, ".npy", "infer_cls.py --out_ha_crf makes them")
    notes.append(f"images: {len(train_ids)} to train on")
    contents = digests(args, devkit, train_ids)

    def losses_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        with autocast(device, args.amp):
            affinities = net(images)
        # The means are over the pairs of the whole batch, of which this rank has a share.
        return affinity_loss(affinities, *pair_labels(labels, args.radius), sum_over_ranks)

    with StopSignals() as stop:
        training = Training(args, net, schedule, device, stop, contents, notes)
        order = remaining_batches(schedule, args.seed, training.position.step)
        batches = load_epochs(train_set, order, args.num_workers)
        for _ in range(training.position.epoch, schedule.epochs):
            losses = training.train_epoch(batches, losses_of)
            training.end_epoch(", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        training.finish()


def main(args: argparse.Namespace) -> None:
    if os.path.realpath(args.la_crf_dir) == os.path.realpath(args.ha_crf_dir):
        raise UsageError("--la_crf_dir and --ha_crf_dir are the same folder.")
    device = choose_device(args.device)
    with process_group(device):
        train(args, device)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
