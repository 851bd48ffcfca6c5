"""VGG-16 in DeepLab-LargeFOV's form: stride 8, dilated conv5, fc6 and fc7 as convolutions."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean of the training images of ImageNet's Caffe models, BGR, 0..255.
MEAN_BGR = (104.008, 116.669, 122.675)

# (convolutions, channels, dilation) of the stages conv1_* to conv5_*.
STAGES = ((2, 64, 1), (2, 128, 1), (3, 256, 1), (3, 512, 1), (3, 512, 2))
# Stride of the pooling after each of the first four stages.
POOL_STRIDES = (2, 2, 2, 1)

# fc6 and fc7 start as the identity, for weights that lack them. ImageNet's conv5_3 has a standard
# deviation of 12 to 17 on photographs, which fc6 divides by.
FC6_GAIN, FC7_GAIN = 1 / 15, 1
NOISE = 0.1  # standard deviation of an output's noise, as a part of the input's times the gain


def pass_through(layer: nn.Conv2d, gain: float) -> None:
    """Initialize a layer's centre tap to pass its input on, times a gain, with a little noise.

    Where there are more outputs than inputs, the inputs repeat.
    """
    channels_out, channels_in, height, width = layer.weight.shape
    nn.init.normal_(layer.weight, std=NOISE * gain / (channels_in * height * width) ** 0.5)
    nn.init.zeros_(layer.bias)
    outputs = torch.arange(channels_out)
    with torch.no_grad():
        layer.weight[outputs, outputs % channels_in, height // 2, width // 2] += gain


class Backbone(nn.Module):
    """The layers conv1_1 to fc7. The network sets ``fc6_dilation``."""

    level_channels = (512, 512, 1024)
    stride = 8
    frozen = ("conv1_1", "conv1_2", "conv2_1", "conv2_2")
    optional_layers = ("fc6", "fc7")
    fc6_dilation: int

    def __init__(self):
        super().__init__()
        channels_in = 3
        for stage, (convolutions, channels, dilation) in enumerate(STAGES, start=1):
            for index in range(1, convolutions + 1):
                layer = nn.Conv2d(channels_in, channels, 3, padding=dilation, dilation=dilation)
                self.add_module(f"conv{stage}_{index}", layer)
                channels_in = channels
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=self.fc6_dilation, dilation=self.fc6_dilation)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        pass_through(self.fc6, FC6_GAIN)
        pass_through(self.fc7, FC7_GAIN)

    @staticmethod
    def normalize(image: np.ndarray) -> np.ndarray:
        """uint8 H x W x 3 RGB -> float32 H x W x 3 BGR minus the mean, scale 0..255."""
        return image[..., ::-1].astype(np.float32) - np.array(MEAN_BGR, np.float32)

    def _forward_stage(self, stage: int, x: Tensor) -> Tensor:
        for index in range(1, STAGES[stage - 1][0] + 1):
            x = F.relu(self.get_submodule(f"conv{stage}_{index}")(x))
        return x

    def pool5(self, x: Tensor) -> Tensor:
        """Pooling between conv5_3 and fc6, which a network may override; none by default."""
        return x

    def forward_levels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B x 3 x H x W -> the outputs of conv4_3 (512), conv5_3 (512) and fc7 (1024), stride 8."""
        for stage, stride in enumerate(POOL_STRIDES, start=1):
            conv4 = self._forward_stage(stage, x)  # after the loop, the fourth stage's output
            x = F.max_pool2d(conv4, kernel_size=3, stride=stride, padding=1)
        conv5 = self._forward_stage(5, x)
        x = F.dropout2d(F.relu(self.fc6(self.pool5(conv5))), 0.5, self.training)
        return conv4, conv5, F.relu(self.fc7(x))
