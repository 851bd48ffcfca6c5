"""VGG-16 AffinityNet."""

from network import vgg16d
from network.heads import GroupNormAffinityHead


class Net(GroupNormAffinityHead, vgg16d.Backbone):
    """``Net(radius=5)``."""

    fc6_dilation = 4
