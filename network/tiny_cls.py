"""The demo's classifier; not for results (see ``network.tinyd``)."""

from network import tinyd
from network.heads import ClassifierHead


class Net(ClassifierHead, tinyd.Backbone):
    """``Net(num_classes=20)``."""
