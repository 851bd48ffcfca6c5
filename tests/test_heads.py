"""All networks: shapes, frozen layers, parameter groups, dropout and initialization."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import recipe
from torch import nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor

TINY = ("tiny_cls", "tiny_aff")
BACKBONES = ("vgg16", "resnet38", "resnet50")
REAL = tuple(f"{backbone}_{kind}" for backbone in BACKBONES for kind in ("cls", "aff"))


def _named(kind=""):
    return [
        pytest.param(name, marks=[] if name in TINY else pytest.mark.slow)
        for name in TINY + REAL
        if name.endswith(kind)
    ]


def _module(name):
    return importlib.import_module(f"network.{name}")


# pytest groups the tests by network: each is built once, at most one is in memory.
@pytest.fixture(scope="module")
def net(request):
    torch.manual_seed(0)
    return _module(request.param).Net()


each_net = pytest.mark.parametrize("net", _named(), indirect=True)
each_classifier = pytest.mark.parametrize("net", _named("cls"), indirect=True)
each_affinity_net = pytest.mark.parametrize("net", _named("aff"), indirect=True)


def _batch(net, height, width, count=1) -> torch.Tensor:
    images = [recipe.synthetic_image(height, width, seed) for seed in range(count)]
    return torch.stack(
        [torch.from_numpy(net.normalize(image).transpose(2, 0, 1).copy()) for image in images]
    )


@each_classifier
@torch.no_grad()
def test_logits_and_cams_come_from_the_same_class_scores(net):
    x = _batch(net.eval(), height=41, width=53)
    scores, cam, logits = net.fc8(net.forward_levels(x)[-1]), net.forward_cam(x), net(x)
    assert cam.shape == (1, 20, math.ceil(41 / net.stride), math.ceil(53 / net.stride))
    assert cam.min() == 0
    assert cam.max() > 0
    if type(net).__module__ == "network.vgg16_cls":
        cam = cam**2  # VGG-16's CAMs are square roots
    torch.testing.assert_close(cam, scores.clamp(min=0), rtol=1e-4, atol=1e-5)
    assert logits.shape == (1, 20)
    torch.testing.assert_close(logits, scores.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


@each_affinity_net
@torch.no_grad()
def test_affinity_net_returns_an_affinity_per_pair(net):
    affinity = net.eval()(_batch(net, height=43, width=75))
    rows, columns = math.ceil(43 / 8) - 4, math.ceil(75 / 8) - 8
    assert affinity.shape == (1, 34, rows * columns)
    assert ((affinity > 0) & (affinity <= 1)).all()
    assert affinity.std() > 0


@pytest.mark.parametrize("name", _named())
def test_number_of_classes_and_radius_are_arguments(name):
    with torch.device("meta"):  # shapes without values
        x = torch.empty(2, 3, 64, 64)
        if name.endswith("aff"):
            assert _module(name).Net(radius=3)(x).shape == (2, 12, 6 * 4)
        else:
            net = _module(name).Net(num_classes=3)
            assert net(x).shape == (2, 3)
            assert net.forward_cam(x).shape == (2, 3, 64 // net.stride, 64 // net.stride)


@each_net
@torch.no_grad()
def test_evaluation_is_repeatable_and_a_batch_equals_each_image(net):
    x = _batch(net.eval(), count=2, height=40, width=72)
    together, again = net(x), net(x)
    assert torch.equal(again, together)
    each = torch.cat([net(one[None]) for one in x])
    torch.testing.assert_close(together, each, rtol=1e-3, atol=1e-4)


@each_net
def test_train_freezes_layers_and_keeps_batch_norm_in_evaluation(net):
    net.requires_grad_(True).train()
    assert net.training
    prefixes = tuple(f"{name}." for name in net.frozen)
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        frozen = name.startswith(prefixes) or isinstance(owner, nn.BatchNorm2d)
        assert parameter.requires_grad == (not frozen), name
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert bool(norms) == ("resnet" in type(net).__module__)
    assert not net.eval().training


@each_net
def test_parameter_groups_have_each_trainable_parameter_once(net):
    name_of = {parameter: name for name, parameter in net.train().named_parameters()}
    groups = [[name_of[parameter] for parameter in group] for group in net.get_parameter_groups()]
    assert len(groups) == 4
    trainable = [name for parameter, name in name_of.items() if parameter.requires_grad]
    assert sorted(name for group in groups for name in group) == sorted(trainable)
    for number, group in enumerate(groups):
        for name in group:
            module, _, kind = name.rpartition(".")
            assert (kind == "bias") == (number % 2 == 1)
            assert (module in ("fc8", "f8_3", "f8_4", "f8_5", "f9")) == (number >= 2)


@each_net
def test_gradients_reach_trainable_parameters_alone(net):
    net.train().zero_grad()
    state = {name: value.clone() for name, value in net.named_buffers()}
    net(_batch(net, height=40, width=72)).sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
    assert all(torch.equal(value, state[name]) for name, value in net.named_buffers())
    net.zero_grad()


DROPOUTS = {  # (probability, channels) in the order of the forward pass
    "vgg16_cls": [(0.5, 1024), (0.5, 1024)],
    "vgg16_aff": [(0.5, 1024)],
    "resnet38_cls": [(0.3, 512), (0.3, 1024), (0.5, 1024), (0.5, 2048), (0.5, 4096)],
    "resnet38_aff": [(0.3, 512), (0.3, 1024), (0.5, 1024), (0.5, 2048)],
    "resnet50_cls": [(0.0, 2048)],
    "resnet50_aff": [],
}


@pytest.mark.parametrize("name", _named()[len(TINY) :])
def test_dropout_is_in_its_layers_and_in_training_alone(name, monkeypatch):
    active = []

    def record(x, p, training):
        if training:
            active.append((p, x.shape[1]))
        return x

    monkeypatch.setattr(F, "dropout2d", record)
    with torch.device("meta"):
        net, x = _module(name).Net(), torch.empty(1, 3, 64, 64)
        net.train()(x)
        assert active == DROPOUTS[name]
        net.eval()(x)
        if name.endswith("cls"):
            net.forward_cam(x)
    assert active == DROPOUTS[name]


@each_classifier
def test_initial_classifier_layer_is_xavier_uniform(net):
    _assert_xavier_uniform(net.fc8.weight, gain=1)


@each_affinity_net
def test_initial_affinity_layers_are_kaiming_normal_and_xavier_uniform(net):
    _assert_xavier_uniform(net.f9.weight, gain=4)
    for layer in (net.f8_3, net.f8_4, net.f8_5):
        expected = math.sqrt(2 / layer.in_channels)  # Kaiming normal
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert layer.weight.abs().max() > 3 * expected
        assert layer.bias is None


def _assert_xavier_uniform(weight, gain):
    bound = gain * math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(("name", "dilated"), [("cls", (0, 0, 1)), ("aff", (0, 1, 1))])
@torch.no_grad()
def test_resnet50_levels_are_those_of_torchvisions_dilated_network(name, dilated):
    torch.manual_seed(0)
    theirs = resnet50(replace_stride_with_dilation=[bool(flag) for flag in dilated]).eval()
    ours = _module(f"resnet50_{name}").Net().eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == ["fc.weight", "fc.bias"]
    assert {key.partition(".")[0] for key in missing} == set(ours.new_layers)
    x = torch.randn(1, 3, 64, 80)
    levels = create_feature_extractor(theirs, ["layer2", "layer3", "layer4"])(x).values()
    for level, expected in zip(ours.forward_levels(x), levels, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fresh_fc6_and_fc7_pass_conv5_on():
    torch.manual_seed(0)
    net = _module("vgg16_aff").Net().eval()
    conv5 = 15 * torch.randn(1, 512, 9, 9).relu()  # as on photographs
    passed = F.relu(net.fc7(F.relu(net.fc6(conv5))))
    for half in passed.split(512, dim=1):
        assert torch.corrcoef(torch.stack([half.flatten(), conv5.flatten()]))[0, 1] > 0.95
        assert half.std().item() == pytest.approx(conv5.std().item() / 15, rel=0.1)


@pytest.mark.parametrize(
    ("name", "black", "red"),
    [
        ("vgg16_cls", (-104.008, -116.669, -122.675), (-104.008, -116.669, 132.325)),  # BGR
        ("resnet38_aff", (-2.117904, -2.035714, -1.804444), (2.248908, -2.035714, -1.804444)),
        ("tiny_cls", (-1, -1, -1), (1, -1, -1)),
    ],
)
def test_normalize_gives_the_values_that_pretrained_weights_expect(name, black, red):
    image = np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8)
    normalized = _module(name).Net.normalize(image)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, [[black, red]], rtol=1e-5)
    assert image.max() == 255
