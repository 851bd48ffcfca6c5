"""ResNet-50 segmenter."""

from network import resnet50d
from network.heads import WideSegmenterHead


class Net(WideSegmenterHead, resnet50d.Backbone):
    """``Net(num_classes=20)``."""

    stride = 8
