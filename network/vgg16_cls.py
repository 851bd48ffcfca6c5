"""VGG-16 classifier with class activation maps."""

import torch
from torch import Tensor

from network import vgg16d
from network.heads import ClassifierHead


class Net(ClassifierHead, vgg16d.Backbone):
    """``Net(num_classes=20)``; its CAMs are the square root of the rectified class scores."""

    fc6_dilation = 1

    def scale_cam(self, cam: Tensor) -> Tensor:
        return torch.sqrt(cam)
