"""ResNet-50 AffinityNet."""

from network import resnet50d
from network.heads import AffinityHead


class Net(AffinityHead, resnet50d.Backbone):
    """``Net(radius=5)``."""

    stride = 8
