"""The demo's segmenter; not for results (see ``network.tinyd``)."""

from network import tinyd
from network.heads import SegmenterHead


class Net(SegmenterHead, tinyd.Backbone):
    """``Net(num_classes=20)``."""
