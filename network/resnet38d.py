"""Wide ResNet-38, model A1 (Wu, Shen, van den Hengel 2016), dilated to stride 8.

Pre-activation blocks: x' = relu(bn_branch2a(x)); the shortcut is conv_branch1(x') if the shape
changes, else x; the branch starts from x'. Batch norm uses its stored statistics.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A dilated convolution without bias that keeps the grid, except for the stride."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, dilation, dilation, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a dilation each; the first has the stride."""

    def __init__(self, channels: tuple[int, int, int], stride: int, dilations: tuple[int, int]):
        super().__init__()
        channels_in, channels_mid, channels_out = channels
        self.bn_branch2a = nn.BatchNorm2d(channels_in)
        self.conv_branch2a = conv3x3(channels_in, channels_mid, stride, dilations[0])
        self.bn_branch2b1 = nn.BatchNorm2d(channels_mid)
        self.conv_branch2b1 = conv3x3(channels_mid, channels_out, dilation=dilations[1])
        self.conv_branch1 = None
        if channels_in != channels_out or stride != 1:
            self.conv_branch1 = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """B x C x H x W -> the block's output, and x' (the activated input)."""
        activated = F.relu(self.bn_branch2a(x))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(activated)
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(F.relu(self.bn_branch2b1(branch)))
        return shortcut + branch, activated


class Bottleneck(nn.Module):
    """1x1 to a quarter of the output, 3x3 to a half, 1x1; 2-d dropout before the last two."""

    def __init__(self, channels_in: int, channels_out: int, dilation: int, dropout: float):
        super().__init__()
        quarter, half = channels_out // 4, channels_out // 2
        self.dropout = dropout
        self.bn_branch2a = nn.BatchNorm2d(channels_in)
        self.conv_branch2a = nn.Conv2d(channels_in, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.conv_branch2b1 = conv3x3(quarter, half, dilation=dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.conv_branch2b2 = nn.Conv2d(half, channels_out, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """B x C x H x W -> the block's output, and x' (the activated input)."""
        activated = F.relu(self.bn_branch2a(x))
        branch = F.relu(self.bn_branch2b1(self.conv_branch2a(activated)))
        branch = F.dropout2d(branch, self.dropout, self.training)
        branch = F.relu(self.bn_branch2b2(self.conv_branch2b1(branch)))
        branch = F.dropout2d(branch, self.dropout, self.training)
        return self.conv_branch1(activated) + self.conv_branch2b2(branch), activated


# Blocks b2 to b5 in order: name, channels in, middle and out, stride, dilations.
BLOCKS = (
    ("b2", (64, 128, 128), 2, (1, 1)),
    ("b2_1", (128, 128, 128), 1, (1, 1)),
    ("b2_2", (128, 128, 128), 1, (1, 1)),
    ("b3", (128, 256, 256), 2, (1, 1)),
    ("b3_1", (256, 256, 256), 1, (1, 1)),
    ("b3_2", (256, 256, 256), 1, (1, 1)),
    ("b4", (256, 512, 512), 2, (1, 1)),
    ("b4_1", (512, 512, 512), 1, (1, 1)),
    ("b4_2", (512, 512, 512), 1, (1, 1)),
    ("b4_3", (512, 512, 512), 1, (1, 1)),
    ("b4_4", (512, 512, 512), 1, (1, 1)),
    ("b4_5", (512, 512, 512), 1, (1, 1)),
    ("b5", (512, 512, 1024), 1, (1, 2)),
    ("b5_1", (1024, 512, 1024), 1, (2, 2)),
    ("b5_2", (1024, 512, 1024), 1, (2, 2)),
)


class Backbone(nn.Module):
    """The layers conv1a to bn7."""

    level_channels = (512, 1024, 4096)
    stride = 8
    frozen = ("conv1a", "b2", "b2_1", "b2_2")

    def __init__(self):
        super().__init__()
        self.conv1a = conv3x3(3, 64)
        for name, *shape in BLOCKS:
            self.add_module(name, ResidualBlock(*shape))
        self.b6 = Bottleneck(1024, 2048, dilation=4, dropout=0.3)
        self.b7 = Bottleneck(2048, 4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)

    @staticmethod
    def normalize(image: np.ndarray) -> np.ndarray:
        """uint8 H x W x 3 RGB -> float32 H x W x 3 RGB of mean 0 and deviation 1 on ImageNet."""
        scaled = image.astype(np.float32) / 255
        return (scaled - np.array(MEAN_RGB, np.float32)) / np.array(STD_RGB, np.float32)

    def forward_levels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B x 3 x H x W -> b5's activated input (512), b6's (1024), relu(bn7) (4096); stride 8."""
        x = self.conv1a(x)
        for name, *_ in BLOCKS:
            x, activated = self.get_submodule(name)(x)
            if name == "b5":
                low = activated
        x, middle = self.b6(x)
        x, _ = self.b7(x)
        return low, middle, F.relu(self.bn7(x))
