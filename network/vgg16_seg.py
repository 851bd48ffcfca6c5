"""VGG-16 segmenter: DeepLab-LargeFOV (Chen et al. 2015)."""

import torch.nn.functional as F
from torch import Tensor

from network import vgg16d
from network.heads import SegmenterHead


class Net(SegmenterHead, vgg16d.Backbone):
    """``Net(num_classes=20)``."""

    fc6_dilation = 12

    def pool5(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
