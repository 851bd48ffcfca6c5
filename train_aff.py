"""Stage 3: train AffinityNet on the confident labels that stage 2's CRF scores give.

VGG-16, as published (lr 0.1; take 0.01 and network.resnet38_aff for ResNet-38):
    python3 train_aff.py --lr 0.1 --batch_size 8 --max_epoches 8 --crop_size 448
        --voc12_root VOC2012 --network network.vgg16_aff --weights vgg16_20M.pth --wt_dec 5e-4
        --la_crf_dir LA --ha_crf_dir HA

Writes <session_name>.pth and <session_name>.log. LA and HA are what infer_cls.py wrote to
--out_la_crf and --out_ha_crf. Training starts from ImageNet weights, as stage 1 does.
"""

import argparse
from pathlib import Path

from torch import Tensor, nn

from tool import cli
from tool.affinity import affinity_loss, pair_labels, source_grid
from tool.distributed import choose_device, seed_torch
from tool.errors import UsageError
from tool.loading import load, shuffled
from tool.training import (
    SessionLog,
    add_training_arguments,
    build_optimizer,
    make_schedule,
    save_weights,
    session_name,
    train_one_epoch,
)
from tool.weights import load_for_training
from voc12.data import (
    AffinityTrainingSet,
    add_devkit_arguments,
    open_devkit,
    read_ids,
    require_files,
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.help_formatter)
    cli.add_network_argument(parser, cli.affinity_network, default="network.vgg16_aff")
    add_training_arguments(parser, batch_size=8, epochs=8, crop_size=448)
    add_devkit_arguments(parser, labels=False)
    parser.add_argument("--la_crf_dir", required=True, help="CRF scores with the low alpha")
    parser.add_argument("--ha_crf_dir", required=True, help="CRF scores with the high alpha")
    cli.add_radius_argument(parser)
    return parser


def check_crop_size(crop_size: int, stride: int, radius: int) -> None:
    """Raise UsageError where a crop would not divide into cells or would have no pairs."""
    if crop_size % stride:
        raise UsageError(f"--crop_size {crop_size}: must be a multiple of {stride}.")
    if 0 in source_grid(crop_size // stride, crop_size // stride, radius):
        raise UsageError(
            f"--crop_size {crop_size}: too small for pairs within --radius {radius}; "
            f"take at least {stride * (2 * radius - 1)}."
        )


def main(args: argparse.Namespace) -> None:
    if Path(args.la_crf_dir).resolve() == Path(args.ha_crf_dir).resolve():
        raise UsageError("--la_crf_dir and --ha_crf_dir are the same folder.")
    device = choose_device(args.device)
    session = session_name(args)
    seed_torch(args.seed)
    devkit = open_devkit(args)
    train_ids = read_ids(args.train_list)
    schedule = make_schedule(len(train_ids), args)

    net = args.network.Net(radius=args.radius)
    check_crop_size(args.crop_size, net.stride, args.radius)
    loaded: list[str] = []
    load_for_training(net, args.weights, loaded.append)
    net.to(device)
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
    optimizer = build_optimizer(net, args.lr, args.wt_dec, args.momentum)
    devkit.require_images(train_ids)
    require_files(args.la_crf_dir, train_ids, ".npy", "infer_cls.py --out_la_crf makes them")
    require_files(args.ha_crf_dir, train_ids, ".npy", "infer_cls.py --out_ha_crf makes them")

    log = SessionLog(f"{session}.log", args.seed, device)
    log.say("\n".join(loaded))
    log.say(f"images: {len(train_ids)} to train on")

    def losses_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = (tensor.to(device) for tensor in batch)
        return affinity_loss(net(images), *pair_labels(labels, args.radius))

    for epoch in range(schedule.epochs):
        train_set.epoch = epoch
        order = shuffled(len(train_set), args.seed, epoch)
        batches = load(train_set, order, args.batch_size, args.num_workers, drop_last=True)
        losses = train_one_epoch(net, batches, losses_of, optimizer, schedule, epoch)
        parts = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        log.say(f"epoch {epoch + 1}/{schedule.epochs}: {parts}")

    save_weights(f"{session}.pth", net)
    log.say(f"weights written to {session}.pth")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
