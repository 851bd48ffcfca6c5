"""Class activation maps over several scales (Sec. 3.1), and labels with a constant background."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Constant background score of labels from CAMs alone (released code).
BACKGROUND_SCORE = 0.2


def multi_scale_cam(
    net: nn.Module, scaled: Sequence[Tensor], size: tuple[int, int], classes: Sequence[int]
) -> Tensor:
    """The CAMs of the present classes, summed over scales and mirror images, in 0..1.

    ``scaled`` holds the normalized image at each scale, float32 3 x h x w, on the network's
    device; ``size`` is the image's (H, W) in pixels. Maps are resized to ``size`` (bilinear) before
    they are summed; the sum is divided by its maximum + 1e-5. Returns float32 classes x H x W.
    """
    total = torch.zeros(len(classes), *size, device=scaled[0].device)
    if not classes:
        return total
    present = torch.tensor(classes, device=total.device)
    for image in scaled:
        # Mirrored here, not in the loader: this halves what is sent to the device.
        cams = net.forward_cam(torch.stack([image, image.flip(-1)]))[:, present].float()
        cams = F.interpolate(cams, size=size, mode="bilinear", align_corners=False)
        total += cams[0] + cams[1].flip(-1)
    return total / (total.amax(dim=(1, 2), keepdim=True) + 1e-5)


def fixed_background_and_maps(maps: np.ndarray, background_score: float) -> np.ndarray:
    """[constant background, the maps]: K x H x W -> (K + 1) x H x W, of the maps' dtype."""
    background = np.full((1, *maps.shape[1:]), background_score, maps.dtype)
    return np.concatenate([background, maps])


def fixed_background_label(maps: np.ndarray, background_score: float) -> np.ndarray:
    """argmax of [constant background, maps]: K x H x W -> int64 H x W, local indices 0..K."""
    return fixed_background_and_maps(maps, background_score).argmax(axis=0)
