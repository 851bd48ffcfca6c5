"""ResNet-38 AffinityNet."""

from network import resnet38d
from network.heads import AffinityHead


class Net(AffinityHead, resnet38d.Backbone):
    """``Net(radius=5)``."""
