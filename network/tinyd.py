"""A small stride-8 backbone that trains from scratch on a CPU in minutes.

It is for the demo and for tests, not part of the method; its results do not measure the method.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

# Convolutions 3x3 with ReLU: name, channels in, out, stride, dilation. Those with a stride have
# group norm; the last two have none, because the classifier uses the maps' averages, and normalized
# maps hardly differ in these.
LAYERS = (
    ("trunk0", 3, 32, 2, 1),
    ("trunk1", 32, 48, 2, 1),
    ("trunk2", 48, 96, 2, 1),
    ("trunk3", 96, 128, 1, 1),
    ("trunk4", 128, 128, 1, 2),
)


class Backbone(nn.Module):
    """Five convolutions, the first three of stride 2; 0.3 million weights."""

    level_channels = (96, 128, 128)
    stride = 8
    frozen = ()

    def __init__(self):
        super().__init__()
        for name, channels_in, channels_out, stride, dilation in LAYERS:
            layer = nn.Conv2d(channels_in, channels_out, 3, stride, dilation, dilation, bias=False)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            self.add_module(name, layer)
            if stride > 1:
                self.add_module(f"{name}_norm", nn.GroupNorm(8, channels_out))

    @staticmethod
    def normalize(image: np.ndarray) -> np.ndarray:
        """uint8 H x W x 3 RGB -> float32 H x W x 3 in -1..1."""
        return image.astype(np.float32) / 127.5 - 1

    def forward_levels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B x 3 x H x W -> the outputs of trunk2 (96), trunk3 (128) and trunk4 (128), stride 8."""
        levels = []
        for name, _, _, stride, _ in LAYERS:
            x = self.get_submodule(name)(x)
            if stride > 1:
                x = self.get_submodule(f"{name}_norm")(x)
            x = F.relu(x)
            levels.append(x)
        return levels[2], levels[3], levels[4]
