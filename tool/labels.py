"""Index images: their values (0 background, k + 1 class k, 255 void) and VOC's colours."""

from collections.abc import Sequence

import numpy as np

# The label of ignored pixels in every index image (VOC's "void").
VOID = 255


def index_image(local_label: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Local indices, int H x W (0 background, k the k-th present class) -> uint8 class + 1."""
    return np.array([0, *(k + 1 for k in classes)], np.uint8)[local_label]


def voc_palette() -> list[int]:
    """PASCAL VOC's 256 colours as a flat list R, G, B, R, G, B, ...

    Bits 0, 3, 6, ... of an index are red's bits from the highest down; 1, 4, 7, ... are green's;
    2, 5, 8, ... are blue's (the VOC development kit's colour map).
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for position in range(8):
        for channel in range(3):
            bit = (index >> (3 * position + channel)) & 1
            palette[:, channel] |= (bit << (7 - position)).astype(np.uint8)
    return palette.ravel().tolist()
