"""Dense CRF (Krähenbühl and Koltun 2011) that sharpens class scores along the image's edges.

The inference is pydensecrf's; the parameters are those of the released code.
"""

from collections.abc import Sequence

import numpy as np

from tool.errors import DataError

# Scores below this count as this, so that their logarithm is finite.
SCORE_FLOOR = 1e-5


def background_and_maps(maps: np.ndarray, alpha: float) -> np.ndarray:
    """[(1 - the largest score)^alpha, the maps]: K x H x W -> float32 (K + 1) x H x W, not summing
    to one (eq. 2)."""
    background = (1 - np.max(maps, axis=0, keepdims=True, initial=0)) ** alpha
    return np.concatenate([background, maps]).astype(np.float32)


def dense_crf(
    image: np.ndarray,
    score_sets: Sequence[np.ndarray],
    steps: int = 10,
    gaussian_sxy: float = 3,
    gaussian_compat: float = 3,
    bilateral_sxy: float = 80,
    bilateral_srgb: float = 13,
    bilateral_compat: float = 10,
) -> list[np.ndarray]:
    """Label probabilities after ``steps`` mean-field steps, for each set of scores of one image.

    ``image`` is uint8 H x W x 3 RGB; each set is labels x H x W in 0..1 (sets of one image have the
    same number of labels). The unary term is -log of the score; sxy are pixels, srgb gray levels,
    compat weights of the Potts terms; kernels are diagonal with symmetric normalization. Returns
    float32 arrays of the sets' shapes, which sum to one over the labels.
    """
    height, width = image.shape[:2]
    labels = {scores.shape[0] for scores in score_sets}
    if any(scores.shape[1:] != (height, width) for scores in score_sets) or len(labels) != 1:
        shapes = [scores.shape for scores in score_sets]
        raise ValueError(f"score sets {shapes} do not fit an image of {height} x {width}")
    model = _pydensecrf().DenseCRF2D(width, height, labels.pop())
    model.addPairwiseGaussian(sxy=gaussian_sxy, compat=gaussian_compat)
    model.addPairwiseBilateral(
        sxy=bilateral_sxy,
        srgb=bilateral_srgb,
        rgbim=np.ascontiguousarray(image),
        compat=bilateral_compat,
    )
    # The pairwise terms are built once; each set only exchanges the unary term.
    results = []
    for scores in score_sets:
        unary = -np.log(np.clip(scores, SCORE_FLOOR, 1)).astype(np.float32)
        model.setUnaryEnergy(np.ascontiguousarray(unary.reshape(len(scores), -1)))
        probabilities = np.array(model.inference(steps), dtype=np.float32)
        results.append(probabilities.reshape(scores.shape))
    return results


def _pydensecrf():
    try:
        import pydensecrf.densecrf
    except ImportError as error:
        raise DataError(
            "the dense CRF needs the module pydensecrf: pip install pydensecrf2 "
            "(needs g++ and Python 3.10 to 3.12), or leave out the CRF's output folders."
        ) from error
    return pydensecrf.densecrf
