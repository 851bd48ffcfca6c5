"""Stage 5: train a segmenter on the pseudo labels of stage 4, or on any index images.

ResNet-38, the field's recipe:
    python3 train_seg.py --network network.resnet38_seg --weights imagenet --voc12_root VOC2012
        --train_list voc12/train_aug.txt --label_dir RW --poly_first_group
        --lr 0.001 --batch_size 10 --max_iters 20000 --crop_size 448
VGG-16, DeepLab-LargeFOV's recipe:
    python3 train_seg.py --network network.vgg16_seg --weights imagenet --voc12_root VOC2012
        --train_list voc12/train_aug.txt --label_dir RW --scale 1 1 --hsv_shift 0
        --lr 0.001 --batch_size 10 --max_iters 20000 --crop_size 321

Several GPUs (--batch_size stays the total; several machines: docs/clusters.md):
    torchrun --nproc_per_node=4 train_seg.py ...

Writes <session_name>.pth, .log and .csv. A run that was killed continues from <session_name>.ckpt
when its command is repeated. RW is what infer_aff.py --crf wrote to --out_rw; official masks are
labels, too. --weights also takes a trained classifier.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from tool.run import cli, devices
from tool.run.errors import UsageError
from tool.run.provenance import digest, digest_photographs
from tool.run.training import start_training, train
from tool.segmentation import segmentation_loss
from voc12.datasets import SegmenterTrainingSet
from voc12.devkit import add_devkit_arguments, open_devkit, read_ids, require_files


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_network_argument(parser, cli.segmenter, default="network.resnet38_seg")
    cli.add_training_arguments(parser, batch_size=10, crop_size=448, lr=1e-3, momentum=0.9)
    add_devkit_arguments(parser, labels=False)
    add("--label_dir", required=True, metavar="DIR", help="labels to train on, index images")
    add("--max_iters", type=cli.count, default=20_000, metavar="STEPS", help="length of training")
    text = "range of the factors that images are resized by"
    limits = {"nargs": 2, "metavar": ("MIN", "MAX")}
    add("--scale", **limits, type=cli.number(float, 0.1, 10), default=(0.5, 1.5), help=text)
    text = "largest shift of hue, saturation and value, of 255"
    add("--hsv_shift", type=cli.number(int, 0, 255), default=10, help=text)
    text = "only pretrained weights' learning rate falls, a quirk of ResNet-38's published recipe"
    add("--poly_first_group", action="store_true", help=text)
    return parser


def batch_loss(
    net: nn.Module, model: nn.Module, images: Tensor, labels: Tensor, device: torch.device, amp: str
) -> Tensor:
    """images B x 3 x H x W, labels uint8 B x H x W -> this rank's share of the batch's loss."""
    with devices.autocast(device, amp):
        logits = model(images.to(device, non_blocking=True))
    labels = labels.to(device, non_blocking=True)
    return segmentation_loss(logits.float(), labels, net.loss_on_grid, devices.sum_over_ranks)


def train_segmenter(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    devkit = open_devkit(args)
    devkit.require_output("--session_name", args.session_name)
    ids = read_ids(args.train_list)
    devkit.require_images(ids)
    require_files(args.label_dir, ids, ".png", "infer_aff.py --out_rw makes them")
    label_paths = [Path(args.label_dir, f"{image_id}.png") for image_id in ids]
    devkit.require_classes(label_paths)

    net = args.network.Net(num_classes=len(devkit.class_names))
    augmentation = args.crop_size, tuple(args.scale), args.hsv_shift, args.seed
    train_set = SegmenterTrainingSet(devkit, ids, net.normalize, args.label_dir, *augmentation)

    def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": batch_loss(net, model, *batch, device, args.amp)}

    contents = {
        "train_list": digest(*ids),
        "classes": digest(*devkit.class_names),
        "voc12_root": digest_photographs([devkit.image_path(image_id) for image_id in ids]),
        "label_dir": digest_photographs(label_paths),
    }
    note = f"images: {len(ids)} to train on"
    training = start_training(args, net, len(ids), device, contents, note)
    train(training, train_set, args.num_workers, losses_of)


def main(args: argparse.Namespace) -> None:
    if args.scale[0] > args.scale[1]:
        raise UsageError("--scale: MIN is larger than MAX.")
    device = devices.choose_device(args.device)
    with devices.process_group(device):
        train_segmenter(args, device)


if __name__ == "__main__":
    cli.run(get_args_parser(), main)
