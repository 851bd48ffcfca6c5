"""Stage 1: train a classifier from image-level labels; its class activation maps come next.

VGG-16, as published:
    python3 train_cls.py --lr 0.1 --batch_size 16 --max_epoches 15 --crop_size 448
        --network network.vgg16_cls --voc12_root VOC2012 --weights vgg16_20M.pth --wt_dec 5e-4
ResNet-38, as published:
    python3 train_cls.py --lr 0.01 --batch_size 16 --max_epoches 15 --crop_size 448
        --network network.resnet38_cls --voc12_root VOC2012 --weights rna-a1.pth --wt_dec 5e-4

Writes <session_name>.pth and <session_name>.log. The lists come from python3 -m voc12.prepare.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tool import cli
from tool.distributed import choose_device, seed_torch
from tool.errors import UsageError
from tool.loading import load, shuffled
from tool.training import (
    SessionLog,
    add_training_arguments,
    build_optimizer,
    diverged,
    make_schedule,
    save_weights,
    session_name,
    train_one_epoch,
)
from tool.weights import load_for_training
from voc12.data import (
    ClassifierTrainingSet,
    ClassifierValidationSet,
    add_devkit_arguments,
    open_devkit,
    read_ids,
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.help_formatter)
    cli.add_network_argument(parser, cli.classifier, default="network.vgg16_cls")
    add_training_arguments(parser, batch_size=16, epochs=15, crop_size=448)
    add_devkit_arguments(parser)
    parser.add_argument("--val_list", default="voc12/val.txt", help="images to validate on")
    parser.add_argument(
        "--resize_long",
        nargs=2,
        type=cli.positive_int,
        default=(256, 512),
        metavar=("MIN", "MAX"),
        help="long side in pixels that training images are resized to, drawn from this range",
    )
    parser.add_argument(
        "--val_crop_size",
        type=cli.positive_int,
        default=500,
        help="side of the validation images' centre crop, in pixels",
    )
    return parser


def classification_losses(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """images B x 3 x H x W, labels B x classes -> the multilabel soft margin loss."""
    return {"loss": F.multilabel_soft_margin_loss(net(images), labels)}


@torch.no_grad()
def validate(
    net: nn.Module, dataset: ClassifierValidationSet, args: argparse.Namespace, device: torch.device
) -> float:
    """The mean loss over the images."""
    net.eval()
    total = 0.0
    batches = load(dataset, range(len(dataset)), args.batch_size, args.num_workers)
    with cli.progress(None, "validation", total=len(dataset)) as bar:
        for images, labels in batches:
            losses = classification_losses(net, images.to(device), labels.to(device))
            total += losses["loss"].item() * len(images)
            bar.update(len(images))
    return total / len(dataset)


def main(args: argparse.Namespace) -> None:
    if args.resize_long[0] > args.resize_long[1]:
        raise UsageError("--resize_long: MIN is larger than MAX.")
    device = choose_device(args.device)
    session = session_name(args)
    seed_torch(args.seed)
    devkit = open_devkit(args)
    train_ids, val_ids = read_ids(args.train_list), read_ids(args.val_list)
    schedule = make_schedule(len(train_ids), args)

    net = args.network.Net(num_classes=len(devkit.class_names))
    loaded: list[str] = []
    load_for_training(net, args.weights, loaded.append)
    net.to(device)
    train_set = ClassifierTrainingSet(
        devkit, train_ids, net.normalize, args.crop_size, tuple(args.resize_long), args.seed
    )
    val_set = ClassifierValidationSet(devkit, val_ids, net.normalize, args.val_crop_size)
    optimizer = build_optimizer(net, args.lr, args.wt_dec, args.momentum)
    labels = devkit.require_labelled_images([*train_ids, *val_ids])

    log = SessionLog(f"{session}.log", args.seed, device)
    log.say("\n".join(loaded))
    log.say(f"images: {len(train_ids)} to train on, {len(val_ids)} to validate on; {labels}")

    def losses_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        return classification_losses(net, images.to(device), labels.to(device))

    for epoch in range(args.max_epoches):
        train_set.epoch = epoch
        order = shuffled(len(train_set), args.seed, epoch)
        batches = load(train_set, order, args.batch_size, args.num_workers, drop_last=True)
        losses = train_one_epoch(net, batches, losses_of, optimizer, schedule, epoch)
        val_loss = validate(net, val_set, args, device)
        if not math.isfinite(val_loss):
            raise diverged(f"the validation loss is not finite after epoch {epoch + 1}")
        log.say(
            f"epoch {epoch + 1}/{args.max_epoches}: loss {losses['loss']:.4f}, "
            f"validation loss {val_loss:.4f}"
        )

    save_weights(f"{session}.pth", net)
    log.say(f"weights written to {session}.pth")


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
