"""Stage 3: train AffinityNet on the confident labels that stage 2's CRF scores give.

VGG-16, as published (lr 0.1; take 0.01 and network.resnet38_aff for ResNet-38):
    python3 train_aff.py --lr 0.1 --batch_size 8 --max_epoches 8 --crop_size 448
        --voc12_root VOC2012 --network network.vgg16_aff --weights imagenet
        --wt_dec 5e-4 --la_crf_dir LA --ha_crf_dir HA

Several GPUs (--batch_size stays the total; several machines: docs/clusters.md):
    torchrun --nproc_per_node=4 train_aff.py --lr 0.1 ...

Writes <session_name>.pth, .log and .csv. A run that was killed continues from <session_name>.ckpt
when its command is repeated. LA and HA are what infer_cls.py wrote to --out_la_crf and
--out_ha_crf. Training starts from ImageNet weights, as stage 1 does.
"""

import argparse

import torch
from torch import Tensor, nn

from tool.affinity import affinity_loss, pair_labels, source_grid
from tool.run import cli, devices
from tool.run.errors import UsageError
from tool.run.provenance import digest, digest_maps, digest_photographs
from tool.run.training import start_training, train
from voc12.datasets import AffinityTrainingSet
from voc12.devkit import add_devkit_arguments, open_devkit, read_ids, require_files


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    cli.add_network_argument(parser, cli.affinity_network, default="network.vgg16_aff")
    cli.add_training_arguments(parser, batch_size=8, crop_size=448, epochs=8)
    add_devkit_arguments(parser, labels=False)
    parser.add_argument("--la_crf_dir", required=True, help="CRF scores with the low alpha")
    parser.add_argument("--ha_crf_dir", required=True, help="CRF scores with the high alpha")
    cli.add_radius_argument(parser)
    return parser


def check_crop_size(crop_size: int, stride: int, radius: int) -> None:
    """Raise UsageError where crops would not divide into cells or have no pairs."""
    if crop_size % stride:
        raise UsageError(f"--crop_size {crop_size}: must be a multiple of {stride}.")
    if 0 in source_grid(crop_size // stride, crop_size // stride, radius):
        raise UsageError(
            f"--crop_size {crop_size}: too small for pairs within --radius {radius}; "
            f"take at least {stride * (2 * radius - 1)}."
        )


def pair_losses(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: int,
    device: torch.device,
    amp: str | None,
) -> dict[str, Tensor]:
    """images B x 3 x H x W, labels uint8 B x h x w -> ``affinity_loss``, means over all ranks."""
    with devices.autocast(device, amp):
        affinities = model(images.to(device, non_blocking=True))
    labels = labels.to(device, non_blocking=True)
    # The means are over the pairs of the whole batch, of which this rank has a shard.
    return affinity_loss(affinities, *pair_labels(labels, radius), devices.sum_over_ranks)


def train_affinity(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    devkit = open_devkit(args)
    devkit.require_output("--session_name", args.session_name)
    train_ids = read_ids(args.train_list)

    net = args.network.Net(radius=args.radius)
    check_crop_size(args.crop_size, net.stride, args.radius)
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

    def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return pair_losses(model, *batch, args.radius, device, args.amp)

    contents = {
        "train_list": digest(*train_ids),
        "classes": digest(*devkit.class_names),
        "voc12_root": digest_photographs([devkit.image_path(image_id) for image_id in train_ids]),
        "la_crf_dir": digest_maps(args.la_crf_dir),
        "ha_crf_dir": digest_maps(args.ha_crf_dir),
    }
    note = f"images: {len(train_ids)} to train on"
    training = start_training(args, net, len(train_ids), device, contents, note)
    train(training, train_set, args.num_workers, losses_of)


def main(args: argparse.Namespace) -> None:
    cli.require_distinct_folders(args, "la_crf_dir", "ha_crf_dir")
    device = devices.choose_device(args.device)
    with devices.process_group(device):
        train_affinity(args, device)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
