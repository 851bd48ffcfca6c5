"""Class activation maps over several scales, normalized; and the label that they give at once."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to a map's maximum before it divides (released code).
EPSILON = 1e-5
# Constant background score of labels made of CAMs alone (released code).
BACKGROUND_SCORE = 0.2


def multi_scale_cam(
    net: nn.Module, scaled: Sequence[Tensor], size: tuple[int, int], classes: Sequence[int]
) -> Tensor:
    """The CAMs of the classes that are present, summed over scales and mirror images, in 0..1.

    ``scaled`` holds the normalized image at each scale, 3 x h x w, on the network's device;
    ``size`` is the image's (H, W). The network sees each with its mirror image. Each map is
    resized to ``size``, bilinear, mirrored back, summed, and divided by its maximum. Returns
    float32 len(classes) x H x W. (Absent classes' maps would be zero: they are left out.)
    """
    total = torch.zeros(len(classes), *size, device=scaled[0].device)
    if not classes:
        return total
    for image in scaled:
        # Mirrored here, not in the loader: less to move between processes and to the device.
        cams = net.forward_cam(torch.stack([image, image.flip(-1)]))[:, list(classes)].float()
        cams = F.interpolate(cams, size=size, mode="bilinear", align_corners=False)
        total += cams[0] + cams[1].flip(-1)
    return total / (total.amax(dim=(1, 2), keepdim=True) + EPSILON)


def fixed_background_and_maps(maps: np.ndarray, background_score: float) -> np.ndarray:
    """[constant background, the maps]: K x H x W -> (K + 1) x H x W, of the maps' type."""
    background = np.full((1, *maps.shape[1:]), background_score, maps.dtype)
    return np.concatenate([background, maps])


def fixed_background_label(maps: np.ndarray, background_score: float) -> np.ndarray:
    """The winner of [constant background, maps]: K x H x W -> H x W, local indices from 0 on."""
    return fixed_background_and_maps(maps, background_score).argmax(axis=0)
