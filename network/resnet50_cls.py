"""ResNet-50 classifier with class activation maps, as IRN trains it."""

from network import resnet50d
from network.heads import ClassifierHead


class Net(ClassifierHead, resnet50d.Backbone):
    """``Net(num_classes=20)``."""

    stride = 16
    dropout = 0.0
