"""Multi-scale class activation maps, and labels with a constant background."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from network import tiny_cls
from tool.cam import fixed_background_label, multi_scale_cam

SIZE = (40, 56)


class PooledChannels(nn.Module):
    """Its CAMs are the image's channels, pooled: class 0 red, 1 green, 2 blue, 3 nothing."""

    def forward_cam(self, x):
        pooled = F.avg_pool2d(x, 8)
        return torch.cat([pooled, torch.zeros_like(pooled[:, :1])], dim=1)


def _scaled():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in (SIZE, (20, 28), (60, 84))]


def _tiny():
    torch.manual_seed(0)
    return tiny_cls.Net(num_classes=5).eval()


def test_cam_is_the_sum_over_scales_and_mirrors_divided_by_its_maximum():
    scaled = _scaled()
    total = torch.zeros(2, *SIZE)
    for image in scaled:
        for mirrored in (False, True):
            cam = F.avg_pool2d((image.flip(-1) if mirrored else image)[None], 8)
            cam = F.interpolate(cam, size=SIZE, mode="bilinear", align_corners=False)[0]
            total += (cam.flip(-1) if mirrored else cam)[[2, 0]]
    expected = total / (total.amax(dim=(1, 2), keepdim=True) + 1e-5)
    actual = multi_scale_cam(PooledChannels(), scaled, SIZE, [2, 0])
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_cam_of_a_class_has_maximum_one_and_no_negative_value():
    cam = multi_scale_cam(_tiny(), _scaled(), SIZE, [0, 2, 4])
    assert cam.shape == (3, *SIZE)
    assert cam.dtype == torch.float32
    assert (cam >= 0).all()
    maxima = cam.amax(dim=(1, 2))
    assert ((maxima > 0.99) & (maxima < 1)).all()


@pytest.mark.parametrize("classes", [[0], [3, 1], [4, 0, 2]])
@torch.no_grad()
def test_cam_of_a_class_does_not_depend_on_the_other_classes(classes):
    net, scaled = _tiny(), _scaled()
    every = multi_scale_cam(net, scaled, SIZE, range(5))
    assert torch.equal(multi_scale_cam(net, scaled, SIZE, classes), every[classes])


def test_cam_of_a_class_without_evidence_is_zero():
    cam = multi_scale_cam(PooledChannels(), _scaled(), SIZE, [3, 1])
    assert torch.equal(cam[0], torch.zeros(SIZE))
    assert cam[1].max() > 0.99
    assert multi_scale_cam(PooledChannels(), _scaled(), SIZE, []).shape == (0, *SIZE)


@torch.no_grad()
def test_cam_of_the_mirrored_image_is_the_mirrored_cam():
    net, scaled = _tiny(), _scaled()
    mirrored = [image.flip(-1) for image in scaled]
    straight = multi_scale_cam(net, scaled, SIZE, [0, 1])
    torch.testing.assert_close(multi_scale_cam(net, mirrored, SIZE, [0, 1]), straight.flip(-1))
    assert not torch.allclose(straight, straight.flip(-1))


def test_label_is_background_where_no_map_is_above_the_constant_score():
    maps = np.array([[[0.1, 0.3, 0.5, 0.2]], [[0.19, 0.25, 0.6, 0.1]]], np.float32)
    assert fixed_background_label(maps, 0.2).tolist() == [[0, 1, 2, 0]]
    assert not fixed_background_label(np.empty((0, 4, 5), np.float32), 0.2).any()
