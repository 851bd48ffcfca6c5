"""Dense CRF (Krähenbühl and Koltun 2011) that aligns class scores with the image's edges.

Two backends give the same numbers: ``torch``, this project's own, on any device; and
``pydensecrf``, which the released code used. They differ by less than 1e-4, except at single pixels
on the boundary of two labels, where one bit of the scores changes pydensecrf's own result by more.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tool.lattice import GaussianFilter
from tool.random_walk import background_map

BACKENDS = ("torch", "pydensecrf")
# A mean-field step computes this many values at a time: to fit in a CPU's cache, and in a GPU's
# memory, where each part costs the time of launching its kernels.
VALUES_AT_ONCE, VALUES_AT_ONCE_ON_GPU = 2**19, 2**25


def background_and_maps(maps: np.ndarray, alpha: float) -> np.ndarray:
    """[(1 - the largest score)^alpha, the maps] (eq. 2): K x H x W -> float32 (K + 1) x H x W.

    The scores of a pixel do not sum to one.
    """
    maps = torch.from_numpy(np.ascontiguousarray(maps, np.float32))
    return torch.cat([background_map(maps, alpha)[None], maps]).numpy()


@torch.no_grad()
def dense_crf(
    image: np.ndarray,
    score_sets: Sequence[np.ndarray],
    steps: int = 10,
    gaussian_sxy: float = 3,
    gaussian_compat: float = 3,
    bilateral_sxy: float = 80,
    bilateral_srgb: float = 13,
    bilateral_compat: float = 10,
    backend: str = "torch",
    device: torch.device | str = "cpu",
) -> list[np.ndarray]:
    """Label probabilities after ``steps`` mean-field steps, for each set of scores of one image.

    ``image`` is uint8 H x W x 3 RGB; each set is labels x H x W in 0..1, all sets with the same
    number of labels. The unary term is -log(max(score, 1e-5)); sxy is in pixels, srgb in gray
    levels, compat is the weight of a Potts term (defaults: the released code).
    Only the torch backend uses ``device``. Returns float32 arrays of the sets' shapes, which sum to
    one over the labels. Raises ValueError if the shapes do not fit.
    """
    height, width = image.shape[:2]
    labels = {scores.shape[0] for scores in score_sets}
    if any(scores.shape[1:] != (height, width) for scores in score_sets) or len(labels) != 1:
        shapes = [scores.shape for scores in score_sets]
        raise ValueError(f"score sets {shapes} do not fit an image of {height} x {width}")
    image = np.ascontiguousarray(image)
    log_scores = np.log(np.clip(np.stack(score_sets), 1e-5, 1)).astype(np.float32)
    if backend == "pydensecrf":
        gaussian = {"sxy": gaussian_sxy, "compat": gaussian_compat}
        bilateral = {"sxy": bilateral_sxy, "srgb": bilateral_srgb, "compat": bilateral_compat}
        return _pydensecrf_inference(image, log_scores, steps, gaussian, bilateral)
    pixels = torch.from_numpy(image).to(device)
    filters = [
        (_position_filter(height, width, gaussian_sxy, pixels.device), gaussian_compat),
        (_bilateral_filter(pixels, bilateral_sxy, bilateral_srgb), bilateral_compat),
    ]
    probabilities = mean_field(torch.from_numpy(log_scores).to(device).flatten(2), filters, steps)
    return list(probabilities.view(log_scores.shape).cpu().numpy())


def mean_field(
    log_scores: Tensor, filters: Sequence[tuple[GaussianFilter, float]], steps: int
) -> Tensor:
    """Krähenbühl and Koltun's algorithm 1 with Potts terms, for several sets of scores at once.

    ``log_scores`` (the negative unary terms) is float32 sets x labels x N; ``filters`` are pairs
    (filter, weight). Returns the probabilities, of the same shape.
    """
    sets, labels, pixels = log_scores.shape
    probabilities = _softmax(log_scores)
    # The filters read and write N x values: one row per pixel.
    rows = log_scores.new_empty(pixels, sets * labels)
    values_at_once = VALUES_AT_ONCE_ON_GPU if log_scores.is_cuda else VALUES_AT_ONCE
    rows_at_once = max(1, values_at_once // (sets * labels))
    for _ in range(steps):
        rows.copy_(probabilities.view(-1, pixels).t())
        lattices = [kernel.spread(rows) for kernel, _ in filters]
        for start in range(0, pixels, rows_at_once):
            stop = min(start + rows_at_once, pixels)
            # Potts: adding a label's own message equals subtracting all others', up to a constant.
            logits = log_scores[:, :, start:stop]
            for (kernel, weight), lattice in zip(filters, lattices, strict=True):
                message = kernel.read(lattice, start, stop)
                logits = torch.add(logits, message.t().unflatten(0, (sets, labels)), alpha=weight)
            probabilities[:, :, start:stop] = _softmax(logits)
    return probabilities


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over dimension 1, bit-identical for any number of parts and threads.

    torch.softmax and torch.sum compute the last few values of each part in another order.
    """
    exponentials = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    return exponentials.div_(sum(exponentials.split(1, dim=1)))


@lru_cache(4)  # one of 500 x 375 pixels takes 11 MB
def _position_filter(height: int, width: int, sxy: float, device: torch.device) -> GaussianFilter:
    return GaussianFilter(_positions(height, width, sxy, device))


def _bilateral_filter(image: Tensor, sxy: float, srgb: float) -> GaussianFilter:
    height, width, channels = image.shape
    colours = image.reshape(-1, channels).t().float()
    positions = _positions(height, width, sxy, image.device)
    return GaussianFilter(torch.cat([positions, _divided(colours, srgb)]))


def _positions(height: int, width: int, sxy: float, device: torch.device) -> Tensor:
    """x / sxy and y / sxy of each pixel, float32 2 x (H * W)."""
    x, y = (torch.arange(side, dtype=torch.float32, device=device) for side in (width, height))
    return _divided(torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1), sxy)


def _divided(numbers: Tensor, divisor: float) -> Tensor:
    # On CUDA, division by a Python number multiplies by its reciprocal, which rounds differently.
    return numbers / torch.full((), divisor, device=numbers.device)


def _pydensecrf_inference(
    image: np.ndarray, log_scores: np.ndarray, steps: int, gaussian: dict, bilateral: dict
) -> list[np.ndarray]:
    from pydensecrf.densecrf import DenseCRF2D  # optional, see requirements-crf.txt

    height, width = image.shape[:2]
    model = DenseCRF2D(width, height, log_scores.shape[1])
    model.addPairwiseGaussian(**gaussian)
    model.addPairwiseBilateral(rgbim=image, **bilateral)
    # The pairwise terms are built once; only the unary term differs between the sets.
    results = []
    for unary in -log_scores:
        model.setUnaryEnergy(unary.reshape(len(unary), -1))
        probabilities = np.array(model.inference(steps), dtype=np.float32)
        results.append(probabilities.reshape(unary.shape))
    return results
