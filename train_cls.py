"""Stage 1: train a classifier from image-level labels; its class activation maps come next.

VGG-16, as published:
    python3 train_cls.py --lr 0.1 --batch_size 16 --max_epoches 15 --crop_size 448
        --network network.vgg16_cls --voc12_root VOC2012 --wt_dec 5e-4 --weights imagenet
ResNet-38, as published:
    python3 train_cls.py --lr 0.01 --batch_size 16 --max_epoches 15 --crop_size 448
        --network network.resnet38_cls --voc12_root VOC2012 --wt_dec 5e-4 --weights imagenet

Several GPUs (--batch_size stays the total; several machines: docs/clusters.md):
    torchrun --nproc_per_node=4 train_cls.py --lr 0.1 ...

Writes <session_name>.pth, .log and .csv. A run that was killed continues from <session_name>.ckpt
when its command is repeated. The lists come from python3 -m voc12.prepare.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tool.run import cli, devices
from tool.run.devices import StopSignals
from tool.run.errors import UsageError
from tool.run.loading import in_batches, load
from tool.run.provenance import digest, digest_photographs
from tool.run.training import (
    diverged,
    leave_if_stopped,
    name_lack_of_memory,
    start_training,
    train,
)
from voc12.datasets import ClassifierTrainingSet, ClassifierValidationSet
from voc12.devkit import add_devkit_arguments, open_devkit, read_ids


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    cli.add_network_argument(parser, cli.classifier, default="network.vgg16_cls")
    cli.add_training_arguments(parser, batch_size=16, crop_size=448, epochs=15)
    add_devkit_arguments(parser)
    add = parser.add_argument
    add("--val_list", default="voc12/val.txt", help="images to validate on")
    add(
        "--resize_long",
        nargs=2,
        type=cli.side_length,
        default=(256, 512),
        metavar=("MIN", "MAX"),
        help="range in pixels that training images' long sides are drawn from",
    )
    text = "side of the validation images' centre crop, in pixels"
    add("--val_crop_size", type=cli.side_length, default=500, help=text)
    return parser


def classification_loss(
    net: nn.Module, images: Tensor, labels: Tensor, device: torch.device, amp: str | None
) -> Tensor:
    """images B x 3 x H x W, labels B x classes -> the multilabel soft margin loss, a scalar."""
    with devices.autocast(device, amp):
        logits = net(images.to(device, non_blocking=True))
    return F.multilabel_soft_margin_loss(logits.float(), labels.to(device, non_blocking=True))


@torch.no_grad()
def validate(
    net: nn.Module,
    dataset: ClassifierValidationSet,
    args: argparse.Namespace,
    device: torch.device,
    stop: StopSignals,
) -> float:
    """The mean loss over the images, of which each rank sees a shard; cut short by a signal."""
    net.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    own = devices.shard(range(len(dataset)))
    batches = in_batches(own, math.ceil(args.batch_size / devices.world_size()))
    with (
        load(dataset, batches, args.num_workers, pin_memory=device.type == "cuda") as loaded,
        cli.progress(None, "validation", total=len(own), disable=not devices.is_main()) as bar,
    ):
        for images, labels in loaded:
            if stop.received:
                break
            total += classification_loss(net, images, labels, device, args.amp) * len(images)
            bar.update(len(images))
    return devices.sum_over_ranks(total).item() / len(dataset)


def train_classifier(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    devkit = open_devkit(args)
    devkit.require_output("--session_name", args.session_name)
    train_ids, val_ids = read_ids(args.train_list), read_ids(args.val_list)
    ids = [*train_ids, *val_ids]
    labels = devkit.require_labelled_images(ids)

    net = args.network.Net(num_classes=len(devkit.class_names))
    train_set = ClassifierTrainingSet(
        devkit, train_ids, net.normalize, args.crop_size, tuple(args.resize_long), args.seed
    )
    val_set = ClassifierValidationSet(devkit, val_ids, net.normalize, args.val_crop_size)

    def losses_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        loss = classification_loss(net, images, labels, device, args.amp)
        # The batch's loss is a mean over its images, of which this rank has a shard.
        return {"loss": loss * (len(images) / args.batch_size)}

    def validation() -> dict[str, float]:
        with name_lack_of_memory(f"on {device} in the validation (see --val_crop_size)"):
            val_loss = validate(net, val_set, args, device, training.stop)
        leave_if_stopped(training)
        if not math.isfinite(val_loss):
            raise diverged(training, f"the validation loss is not finite at step {training.step}")
        training.log.plot(training.step, {"validation loss": val_loss})
        return {"validation loss": val_loss}

    contents = {
        "train_list": digest(*train_ids),
        "val_list": digest(*val_ids),
        "classes": digest(*devkit.class_names),
        "label_file": digest(*(devkit.image_label(image_id).tobytes() for image_id in ids)),
        "voc12_root": digest_photographs([devkit.image_path(image_id) for image_id in ids]),
    }
    note = f"images: {len(train_ids)} to train on, {len(val_ids)} to validate on; {labels}"
    training = start_training(args, net, len(train_ids), device, contents, note)
    train(training, train_set, args.num_workers, losses_of, validation)


def main(args: argparse.Namespace) -> None:
    if args.resize_long[0] > args.resize_long[1]:
        raise UsageError("--resize_long: MIN is larger than MAX.")
    device = devices.choose_device(args.device)
    with devices.process_group(device):
        train_classifier(args, device)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
