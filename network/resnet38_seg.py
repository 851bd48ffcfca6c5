"""ResNet-38 segmenter."""

from network import resnet38d
from network.heads import WideSegmenterHead


class Net(WideSegmenterHead, resnet38d.Backbone):
    """``Net(num_classes=20)``."""
