"""The demo's AffinityNet; not for results (see ``network.tinyd``)."""

from network import tinyd
from network.heads import GroupNormAffinityHead


class Net(GroupNormAffinityHead, tinyd.Backbone):
    """``Net(radius=5)``, with half of the real networks' channels in its head."""

    reduced_channels = (32, 64, 128)
