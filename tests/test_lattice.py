"""The permutohedral lattice against the dense Gaussian filter that it approximates."""

import numpy as np
import pytest
import torch
from golden import recipe

from tool.lattice import GaussianFilter


def _features(height: int, width: int, sxy: float, srgb: float | None = None) -> torch.Tensor:
    """Positions, and colours of a synthetic image where ``srgb`` is given: d x N."""
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    features = [x / sxy, y / sxy]
    if srgb:
        features += list(recipe.synthetic_image(height, width, 1).reshape(-1, 3).T / srgb)
    return torch.tensor(np.stack(features), dtype=torch.float32)


def _exact(features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(features.t(), features.t())
    kernel = torch.exp(-(distances**2) / 2)
    norm = kernel.sum(dim=1).rsqrt()
    return norm[:, None] * (kernel @ (norm[:, None] * values))


@pytest.fixture(params=[(3, None), (12, 40)], ids=["positions", "positions and colours"])
def features(request):
    return _features(24, 31, *request.param)


def test_filter_approximates_the_normalized_gaussian_sum(features):
    values = torch.rand(features.shape[1], 3, generator=torch.Generator().manual_seed(0))
    filtered, exact = GaussianFilter(features)(values), _exact(features, values)
    # The lattice's kernel only resembles a Gaussian, but wider and narrower ones fit less.
    error = (filtered - exact).abs().mean()
    for factor in (0.7, 1.4):
        assert error < (filtered - _exact(features * factor, values)).abs().mean()
    assert error < 0.03


def test_filter_is_linear_and_filters_each_column_alone(features):
    kernel = GaussianFilter(features)
    values = torch.rand(features.shape[1], 3, generator=torch.Generator().manual_seed(0))
    filtered = kernel(values)
    for column in range(3):
        alone = kernel(values[:, column : column + 1].contiguous())
        torch.testing.assert_close(filtered[:, column : column + 1], alone)
    torch.testing.assert_close(
        kernel(2 * values + 1), 2 * filtered + kernel(torch.ones(len(values), 3))
    )


def test_distant_pixels_do_not_affect_each_other():
    features = torch.tensor([[0.0, 0.1, 50, 50.1]])
    filtered = GaussianFilter(features)(torch.tensor([[1.0], [1], [0], [0]]))
    assert (filtered[:2] > 0.9).all()
    assert (filtered[2:] == 0).all()


def test_one_pixel_keeps_its_value():
    filtered = GaussianFilter(torch.tensor([[0.3], [0.7]]))(torch.tensor([[5.0]]))
    torch.testing.assert_close(filtered, torch.tensor([[5.0]]))


def test_splat_by_atomic_additions_equals_the_sparse_product(features):
    kernel = GaussianFilter(features)
    values = torch.rand(features.shape[1], 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernel._splat_by_atomics(values), kernel._splat @ values)


def test_pixels_read_in_parts_equal_the_whole(features):
    kernel = GaussianFilter(features)
    values = torch.rand(features.shape[1], 2, generator=torch.Generator().manual_seed(0))
    points = kernel.spread(values)
    parts = [kernel.read(points, 0, 5), kernel.read(points, 5, len(values))]
    assert torch.equal(torch.cat(parts), kernel(values))


def test_too_many_cells_for_an_int64_are_a_value_error():
    features = torch.tensor([[0.0, 1e6]] * 5)
    with pytest.raises(ValueError, match="too many to number"):
        GaussianFilter(features)
