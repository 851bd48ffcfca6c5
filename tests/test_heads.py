"""What every network offers: its interface, what is frozen, who trains, and its dropout."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import recipe
from torch import nn

REAL = ("vgg16_cls", "resnet38_cls", "vgg16_aff", "resnet38_aff")
TINY = ("tiny_cls", "tiny_aff")


def _named(names):
    return [pytest.param(n, marks=[] if n in TINY else pytest.mark.slow) for n in names]


# pytest keeps tests of one network together: each is built once, at most one is in memory.
@pytest.fixture(scope="module")
def net(request):
    torch.manual_seed(0)
    return importlib.import_module(f"network.{request.param}").Net()


each_net = pytest.mark.parametrize("net", _named(TINY + REAL), indirect=True)
each_classifier = pytest.mark.parametrize(
    "net", _named(n for n in TINY + REAL if n.endswith("cls")), indirect=True
)
each_affinity_net = pytest.mark.parametrize(
    "net", _named(n for n in TINY + REAL if n.endswith("aff")), indirect=True
)


def _batch(net, height, width, count=1) -> torch.Tensor:
    images = [recipe.synthetic_image(height, width, seed) for seed in range(count)]
    return torch.stack(
        [torch.from_numpy(net.normalize(image).transpose(2, 0, 1).copy()) for image in images]
    )


# ---- shapes ----


@each_classifier
@torch.no_grad()
def test_classifier_gives_logits_and_cams_from_the_same_class_scores(net):
    x = _batch(net.eval(), height=41, width=53)
    scores, cam, logits = net.fc8(net.forward_levels(x)[-1]), net.forward_cam(x), net(x)
    assert cam.shape == (1, 20, math.ceil(41 / 8), math.ceil(53 / 8))
    assert cam.min() == 0
    assert cam.max() > 0
    if type(net).__module__ == "network.vgg16_cls":
        cam = cam**2  # VGG-16's maps are square roots
    torch.testing.assert_close(cam, scores.clamp(min=0), rtol=1e-4, atol=1e-5)
    assert logits.shape == (1, 20)
    torch.testing.assert_close(logits, scores.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


@each_affinity_net
@torch.no_grad()
def test_affinity_net_gives_affinities_of_its_pairs(net):
    affinity = net.eval()(_batch(net, height=43, width=75))
    rows, columns = math.ceil(43 / 8) - 4, math.ceil(75 / 8) - 8
    assert affinity.shape == (1, 34, rows * columns)
    assert ((affinity > 0) & (affinity <= 1)).all()
    assert affinity.std() > 0


@pytest.mark.parametrize("name", _named(n for n in TINY + REAL if n.endswith("cls")))
@pytest.mark.parametrize("num_classes", [1, 3, 200])
def test_number_of_classes_is_an_argument(name, num_classes):
    with torch.device("meta"):  # shapes alone
        net = importlib.import_module(f"network.{name}").Net(num_classes=num_classes)
        assert net(torch.empty(2, 3, 64, 64)).shape == (2, num_classes)
        assert net.forward_cam(torch.empty(2, 3, 64, 64)).shape == (2, num_classes, 8, 8)


@pytest.mark.parametrize("name", _named(n for n in TINY + REAL if n.endswith("aff")))
@pytest.mark.parametrize(("radius", "pairs"), [(2, (4, 7 * 6)), (3, (12, 6 * 4)), (4, (None, 10))])
def test_radius_is_an_argument(name, radius, pairs):
    with torch.device("meta"):
        affinity = importlib.import_module(f"network.{name}").Net(radius=radius)(
            torch.empty(2, 3, 64, 64)
        )
    offsets, sources = pairs
    assert affinity.shape[0::2] == (2, sources)
    if offsets is not None:
        assert affinity.shape[1] == offsets


# ---- evaluation ----


@each_net
@torch.no_grad()
def test_evaluation_is_repeatable_and_a_batch_equals_each_image(net):
    x = _batch(net.eval(), count=2, height=40, width=72)
    together, again = net(x), net(x)
    assert torch.equal(again, together)
    each = torch.cat([net(one[None]) for one in x])
    torch.testing.assert_close(together, each, rtol=1e-3, atol=1e-4)


# ---- what trains ----


@each_net
def test_train_freezes_and_keeps_batch_norm_on_its_statistics(net):
    for module in net.modules():  # as if someone had thawed everything
        module.requires_grad_(True)
    net.train()
    assert net.training
    prefixes = tuple(f"{name}." for name in net.frozen)
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        frozen = name.startswith(prefixes) or isinstance(owner, nn.BatchNorm2d)
        assert parameter.requires_grad == (not frozen), name
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert bool(norms) == ("resnet38" in type(net).__module__)
    assert not net.eval().training


@each_net
def test_parameter_groups_hold_each_parameter_that_trains_once(net):
    net.train()
    groups = net.get_parameter_groups()
    assert len(groups) == 4
    grouped = [parameter for group in groups for parameter in group]
    training = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert len(grouped) == len(training)
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in training}
    name_of = {id(parameter): name for name, parameter in net.named_parameters()}
    heads = ("fc8", "f8_3", "f8_4", "f8_5", "f9")
    for number, group in enumerate(groups):
        for parameter in group:
            module, _, kind = name_of[id(parameter)].rpartition(".")
            assert (kind == "bias") == (number % 2 == 1)
            assert (module in heads) == (number >= 2)


@each_net
def test_gradients_reach_what_trains_and_nothing_else(net):
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


# ---- dropout ----

DROPOUTS = {  # probability and channels, in the order of the forward pass
    "vgg16_cls": [(0.5, 1024), (0.5, 1024)],
    "vgg16_aff": [(0.5, 1024)],
    "resnet38_cls": [(0.3, 512), (0.3, 1024), (0.5, 1024), (0.5, 2048), (0.5, 4096)],
    "resnet38_aff": [(0.3, 512), (0.3, 1024), (0.5, 1024), (0.5, 2048)],
}


@pytest.mark.parametrize("net", _named(REAL), indirect=True)
@torch.no_grad()
def test_dropout_acts_where_it_should_and_in_training_alone(net, monkeypatch):
    acting = []

    def record(x, p, training):
        if training:
            acting.append((p, x.shape[1]))
        return x

    monkeypatch.setattr(F, "dropout2d", record)
    name = type(net).__module__.removeprefix("network.")
    x = _batch(net, height=40, width=72)
    net.train()(x)
    assert acting == DROPOUTS[name]
    acting.clear()
    net.eval()(x)
    if hasattr(net, "forward_cam"):
        net.forward_cam(x)
    assert acting == []


# ---- beginnings ----


@pytest.mark.parametrize("name", _named(TINY + REAL[::2]))
def test_same_seed_gives_the_same_fresh_network(name):
    module = importlib.import_module(f"network.{name}")
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(module.Net().state_dict())
    head = "fc8.weight" if name.endswith("cls") else "f9.weight"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][head], states[2][head])


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_new_layers_begin_as_specified(name):
    torch.manual_seed(0)
    net = importlib.import_module(f"network.{name}").Net()
    if name.endswith("cls"):
        _assert_xavier_uniform(net.fc8.weight, gain=1)
        return
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


# ---- images in ----


@pytest.mark.parametrize(
    ("name", "black", "white"),
    [
        ("vgg16_cls", (-104.008, -116.669, -122.675), (150.992, 138.331, 132.325)),
        ("resnet38_aff", (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225), None),
        ("resnet38_cls", None, (0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225)),
        ("tiny_cls", (-1, -1, -1), (1, 1, 1)),
    ],
)
def test_normalize_gives_the_values_that_pretrained_weights_expect(name, black, white):
    normalize = importlib.import_module(f"network.{name}").Net.normalize
    for level, expected in ((0, black), (255, white)):
        if expected is not None:
            image = np.full((2, 3, 3), level, np.uint8)
            normalized = normalize(image)
            assert (normalized.dtype, normalized.shape) == (np.float32, (2, 3, 3))
            np.testing.assert_allclose(normalized, np.broadcast_to(expected, (2, 3, 3)), rtol=1e-5)
            assert (image == level).all()


def test_normalize_puts_blue_first_for_vgg16_and_red_for_the_others():
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 255
    for name, channel in (("vgg16_cls", 2), ("resnet38_cls", 0), ("tiny_aff", 0)):
        normalize = importlib.import_module(f"network.{name}").Net.normalize
        assert (normalize(red) - normalize(np.zeros_like(red))).argmax() == channel
