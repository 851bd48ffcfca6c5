"""ResNet-38 classifier with class activation maps."""

from network import resnet38d
from network.heads import ClassifierHead


class Net(ClassifierHead, resnet38d.Backbone):
    """``Net(num_classes=20)``."""
