"""torchvision's ResNet-50, the backbone of most later methods, dilated where a stride is left out.

The names are torchvision's, so that its weights load as they are. Batch norm uses its stored
statistics.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from network import resnet38d

LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


class Backbone(nn.Module):
    """The layers conv1 to layer4. The network sets ``stride``: 8 or 16."""

    level_channels = (512, 1024, 2048)
    stride: int
    frozen = ("conv1",)
    normalize = staticmethod(resnet38d.Backbone.normalize)  # ImageNet's mean and deviation

    def __init__(self):
        super().__init__()
        dilated = [False, self.stride == 8, True]  # in place of the strides of layer2, 3 and 4
        whole = resnet50(replace_stride_with_dilation=dilated)
        for name in LAYERS:
            self.add_module(name, whole.get_submodule(name))

    def forward_levels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B x 3 x H x W -> the outputs of layer2 (512), layer3 (1024) and layer4 (2048).

        With stride 8 all have that stride; with stride 16 layer2 has 8, the others 16.
        """
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), kernel_size=3, stride=2, padding=1)
        low = self.layer2(self.layer1(x))
        middle = self.layer3(low)
        return low, middle, self.layer4(middle)
