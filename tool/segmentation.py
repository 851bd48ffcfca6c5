"""The segmenter: its loss, and its scores over several scales (the paper's Sec. 4)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tool.labels import VOID


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    on_grid: bool,
    sum_over_shards: Callable[[Tensor], Tensor] = lambda count: count,
) -> Tensor:
    """Cross entropy, averaged over all pixels of the batch that are not void.

    ``logits`` is B x labels x h x w, ``labels`` uint8 B x H x W. With ``on_grid`` the labels are
    resized to h x w (nearest), else the logits to H x W (bilinear, corners aligned). If the images
    are one shard of the batch, ``sum_over_shards`` maps the shard's number of pixels to the whole
    batch's; the losses of all shards then sum to that of the whole batch.
    """
    if on_grid:
        labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest")[:, 0]
    else:
        logits = resize_logits(logits, labels.shape[-2:])
    labels = labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum")
    return total / sum_over_shards((labels != VOID).sum()).clamp(min=1)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """B x labels x h x w -> B x labels x H x W, with (H, W) = ``size``."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def multi_scale_scores(net: nn.Module, scaled: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The labels' probabilities: softmax of the mean logits over scales and mirror images.

    ``scaled`` holds the normalized image at each scale, float32 3 x h x w, on the network's device;
    ``size`` is the image's (H, W) in pixels. Returns float32 labels x H x W, the background first.
    """

    def logits_of(image: Tensor) -> Tensor:
        logits, mirrored = net(torch.stack([image, image.flip(-1)])).float().split(1)
        return resize_logits((logits + mirrored.flip(-1)) / 2, size)[0]

    return (sum(map(logits_of, scaled)) / len(scaled)).softmax(dim=0)
