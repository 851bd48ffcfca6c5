"""The numbers of the method's released code (tests/golden), network by network, stage by stage."""

import copy
import importlib
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SEED
from golden import recipe

import infer_aff
import infer_cls
from tool.affinity import affinity_label, affinity_loss, pair_indices, pair_labels
from tool.crf import background_and_maps, dense_crf
from tool.maps import load_index_png, load_maps
from tool.random_walk import (
    TOLERANCE,
    pad_to_multiple,
    propagate,
    transition_matrix,
    upsample_scores,
    walk_seeds,
)
from tool.run.training import build_optimizer, set_poly_lr

CLASSIFIERS = ("vgg16_cls", "resnet38_cls")
AFFINITY_NETS = ("vgg16_aff", "resnet38_aff")
SIZES = {"104x136": (104, 136, 7), "75x101": (75, 101, 8)}  # height, width, image seed
HEIGHT, WIDTH, CLASSES = 97, 130, (4, 14)  # of the CRF's and the random walk's image
WALKS = ((16, 8, 8), (2, 8, 3), (1, 4, 5))  # alpha, beta, logt
STRIDE, RADIUS = 8, 5

MAP_TOLERANCE = 1e-4  # absolute, for maps in 0..1
# Untrained VGG-16's logits are in the hundreds, where float32 itself resolves no better than
# 3e-5 and each of 15 layers adds its rounding: so what has no unit scale is compared relative to
# its largest value.
RELATIVE_TOLERANCE = 1e-5
EQUAL_PIXELS = 0.999
# Of a parameter's sums after training: half a float32 step. What training changes is mostly above
# 1e-6 of them, the weight decay alone 1.5e-7.
AFTER_TOLERANCE = 3e-8

each_net = pytest.mark.parametrize("seeded_net", CLASSIFIERS + AFFINITY_NETS, indirect=True)
each_classifier = pytest.mark.parametrize("seeded_net", CLASSIFIERS, indirect=True)
each_affinity_net = pytest.mark.parametrize("seeded_net", AFFINITY_NETS, indirect=True)


def _name(net) -> str:
    return type(net).__module__.removeprefix("network.")


def _batch(net, *images: np.ndarray) -> torch.Tensor:
    return torch.stack(
        [torch.from_numpy(net.normalize(image).transpose(2, 0, 1).copy()) for image in images]
    )


def _assert_close_to_largest(actual: torch.Tensor, expected: np.ndarray) -> None:
    tolerance = max(MAP_TOLERANCE, RELATIVE_TOLERANCE * np.abs(expected).max())
    assert actual.shape == expected.shape
    assert np.abs(actual.numpy() - expected).max() <= tolerance


@pytest.fixture(scope="module")
def golden_weights(golden):
    """``golden_weights(name)``: a network's seeded state dict; networks share equal layers."""

    @cache
    def seeded(key: str, shape: tuple) -> torch.Tensor:
        arrays = recipe.seeded_state_dict({key: torch.empty(shape, device="meta")}, SEED)
        return torch.from_numpy(np.asarray(arrays[key]))

    def weights(name: str) -> dict[str, torch.Tensor]:
        shapes = golden("meta")[f"{name}.state_dict"]
        return {key: seeded(key, tuple(shape)) for key, shape in shapes.items()}

    return weights


@pytest.fixture(scope="module")
def seeded_net(request, golden_weights):
    """The network of that name with the golden weights, in eval mode; parametrized indirectly.

    Tests share it and must not change it; pytest groups them by network.
    """
    with torch.device("meta"):
        net = importlib.import_module(f"network.{request.param}").Net()
    net.load_state_dict(golden_weights(request.param), assign=True)
    return net.eval()


@pytest.fixture
def crf_input():
    image = recipe.synthetic_image(HEIGHT, WIDTH, SEED)
    cam = recipe.synthetic_cam(HEIGHT, WIDTH, CLASSES, SEED)
    return image, np.stack([cam[k] for k in CLASSES])


# ---- networks ----


@pytest.mark.slow
@each_net
def test_state_dict_has_the_published_names_and_shapes(seeded_net, golden):
    expected = golden("meta")[f"{_name(seeded_net)}.state_dict"]
    assert {k: list(v.shape) for k, v in seeded_net.state_dict().items()} == expected


@pytest.mark.slow
@each_net
def test_parameter_groups_have_the_released_members_in_order(seeded_net, golden):
    name_of = {parameter: name for name, parameter in seeded_net.named_parameters()}
    groups = [[name_of[p] for p in group] for group in seeded_net.get_parameter_groups()]
    assert groups == golden("meta")[f"{_name(seeded_net)}.groups"]


@pytest.mark.slow
@each_net
def test_frozen_parameters_are_the_released_ones(seeded_net, golden):
    frozen = [name for name, p in seeded_net.named_parameters() if not p.requires_grad]
    assert sorted(frozen) == sorted(golden("meta")[f"{_name(seeded_net)}.frozen"])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@each_classifier
@torch.no_grad()
def test_classifier_gives_the_golden_logits_and_cams(seeded_net, size, golden):
    name = _name(seeded_net)
    x = _batch(seeded_net, recipe.synthetic_image(*SIZES[size]))
    expected = golden("networks")
    _assert_close_to_largest(seeded_net(x), expected[f"{name}/{size}/logits"])
    _assert_close_to_largest(seeded_net.forward_cam(x), expected[f"{name}/{size}/cam"])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@each_affinity_net
@torch.no_grad()
def test_affinity_net_gives_the_golden_affinities(seeded_net, size, golden):
    affinity = seeded_net(_batch(seeded_net, recipe.synthetic_image(*SIZES[size])))
    expected = golden("networks")[f"{_name(seeded_net)}/{size}/affinity"]
    assert affinity.shape == expected.shape
    assert np.abs(affinity.numpy() - expected).max() <= MAP_TOLERANCE


# ---- pairs and labels ----


@pytest.mark.parametrize(("radius", "height", "width"), [(5, 14, 14), (5, 13, 17), (4, 9, 20)])
def test_pair_indices_are_the_released_ones(radius, height, width, golden):
    sources, targets = pair_indices(height, width, radius)
    expected = golden("affinity_labels")
    key = f"pairs_r{radius}_{height}x{width}"
    assert np.array_equal(sources, expected[f"{key}_from"])
    assert np.array_equal(targets.flatten(), expected[f"{key}_to"])


def test_pair_labels_are_the_released_ones(golden):
    expected = golden("affinity_labels")
    labels = pair_labels(torch.from_numpy(expected["label"])[None], RADIUS)
    for kind, actual in zip(("bg", "fg", "neg"), labels, strict=True):
        assert np.array_equal(actual[0], expected[kind])


def test_label_map_is_the_released_one(golden):
    # Golden class numbers are k + 1, ours are local: 1 for class 4, 2 for class 14.
    scores = []
    for alpha in (4, 32):
        cut = golden("crf")[f"alpha{alpha}"][:, :96, :128].copy()
        cut[:, 40:60, 90:128] = 0
        scores.append(torch.from_numpy(cut))
    label = affinity_label(*scores, STRIDE).numpy()
    expected = golden("affinity_labels")["label_map"]
    assert label.shape == expected.shape
    assert np.array_equal(label, expected)


# ---- CRF ----


@pytest.mark.parametrize("alpha", [4, 24, 32])
def test_crf_gives_the_golden_probabilities(alpha, crf_input, golden):
    image, maps = crf_input
    (probabilities,) = dense_crf(image, [background_and_maps(maps, alpha)])
    assert np.abs(probabilities - golden("crf")[f"alpha{alpha}"]).max() <= MAP_TOLERANCE


# ---- random walk ----


@pytest.mark.parametrize(("alpha", "beta", "logt"), WALKS)
@pytest.mark.parametrize("name", AFFINITY_NETS)
@pytest.mark.parametrize("tolerance", [0, TOLERANCE])
def test_random_walk_gives_the_golden_scores_and_label(
    tolerance, name, alpha, beta, logt, crf_input, golden
):
    expected = golden("random_walk")
    affinity = torch.from_numpy(expected[f"{name}/affinity"][0])
    maps = torch.from_numpy(crf_input[1])
    height, width = math.ceil(HEIGHT / STRIDE), math.ceil(WIDTH / STRIDE)
    transition = transition_matrix(affinity, height, width, RADIUS, beta)
    seeds = walk_seeds(maps, alpha, STRIDE)
    scores = propagate(seeds, transition, 2**logt, tolerance)
    label = upsample_scores(scores, (HEIGHT, WIDTH), STRIDE).argmax(dim=0)

    key = f"{name}/alpha{alpha}_beta{beta}_logt{logt}"
    assert np.abs(scores.numpy() - expected[f"{key}/scores"]).max() <= MAP_TOLERANCE / 10
    global_label = np.array([0, *(k + 1 for k in CLASSES)])[label.numpy()]
    assert (global_label == expected[f"{key}/label"]).mean() >= EQUAL_PIXELS


@pytest.mark.slow
@each_affinity_net
@torch.no_grad()
def test_affinities_of_a_padded_image_are_the_golden_ones(seeded_net, crf_input, golden):
    x = pad_to_multiple(_batch(seeded_net, crf_input[0]), STRIDE)
    expected = golden("random_walk")[f"{_name(seeded_net)}/affinity"]
    assert np.abs(seeded_net(x).numpy() - expected).max() <= MAP_TOLERANCE


# ---- three steps of training ----


def _classifier_losses(net, x, golden):
    labels = torch.zeros(2, 20)
    labels[0, [4, 14]] = labels[1, 7] = 1
    return [F.multilabel_soft_margin_loss(net(x), labels)]


def _affinity_losses(net, x, golden):
    label = torch.from_numpy(golden("affinity_labels")["label"])
    losses = affinity_loss(net(x), *pair_labels(torch.stack([label, label]), RADIUS))
    return [losses[part] for part in ("loss", "bg", "fg", "neg")]


@pytest.mark.slow
@each_net
def test_three_training_steps_give_the_golden_losses_rates_and_weights(
    seeded_net, golden, monkeypatch
):
    # The golden steps were made with every dropout's p at 0.
    monkeypatch.setattr(F, "dropout2d", lambda x, *args, **kwargs: x)
    name = _name(seeded_net)
    net = copy.deepcopy(seeded_net).train()
    losses_of = _classifier_losses if name in CLASSIFIERS else _affinity_losses
    x = _batch(net, *(recipe.synthetic_image(112, 112, seed) for seed in (17, 18)))
    optimizer = build_optimizer(net, lr=1e-4, weight_decay=5e-4)

    steps, rates = [], []
    for step in range(3):
        set_poly_lr(optimizer, step, max_step=10)
        losses = losses_of(net, x, golden)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        steps.append([loss.item() for loss in losses])
        rates.append([group["lr"] for group in optimizer.param_groups])

    expected = golden("train_steps")
    np.testing.assert_allclose(rates, expected[f"{name}/lr"], rtol=1e-9)
    np.testing.assert_allclose(steps, expected[f"{name}/loss"], rtol=1e-5)
    _assert_weights_after_training(net, seeded_net, golden("meta")[f"{name}.after3"])


def _assert_weights_after_training(net, before, expected: dict) -> None:
    start, training = before.state_dict(), {n for n, p in net.named_parameters() if p.requires_grad}
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert set(state) == set(expected)
    for name, values in state.items():
        if name not in training:
            assert torch.equal(values, start[name]), name
        values = values.double()
        total, squares = expected[name]
        # A sum cancels: its rounding is that of its terms.
        assert abs(values.sum().item() - total) <= AFTER_TOLERANCE * values.abs().sum(), name
        assert abs(values.square().sum().item() - squares) <= AFTER_TOLERANCE * squares, name


# ---- the programs ----


def _run(program, *flags) -> None:
    arguments = [*map(str, flags), "--num_workers", "0", "--device", "cpu"]
    program.main(program.get_args_parser().parse_args(arguments))


@pytest.fixture
def weight_file(tmp_path, golden_weights):
    """``weight_file(name)``: the golden weights on disk; removed at the end, for their size."""
    paths = []

    def write(name: str):
        paths.append(tmp_path / f"{name}_weights.pth")
        torch.save(golden_weights(name), paths[-1])
        return paths[-1]

    yield write
    for path in paths:
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vgg16", "resnet38"])
def test_inference_programs_give_the_golden_files(
    backbone, golden, golden_voc, tmp_path, weight_file
):
    devkit = ("--voc12_root", golden_voc, "--infer_list", golden_voc / "list.txt")
    _run(
        infer_cls,
        *devkit,
        *("--network", f"network.{backbone}_cls", "--weights", weight_file(f"{backbone}_cls")),
        *("--out_cam", tmp_path / "cam", "--out_cam_pred", tmp_path / "pred"),
        *("--out_la_crf", tmp_path / "la", "--out_ha_crf", tmp_path / "ha"),
    )
    _run(
        infer_aff,
        *devkit,
        *("--network", f"network.{backbone}_aff", "--weights", weight_file(f"{backbone}_aff")),
        *("--cam_dir", tmp_path / "cam", "--out_rw", tmp_path / "rw"),
    )

    expected = golden(f"cli_{backbone}")
    keys = set()
    for folder in ("cam", "la", "ha"):
        for path in (tmp_path / folder).glob("*.npy"):
            for k, actual in load_maps(path).items():
                keys.add(key := f"{path.stem}/{folder}/{k}")
                assert np.abs(actual - expected[key]).max() <= MAP_TOLERANCE, key
    for folder in ("pred", "rw"):
        for path in (tmp_path / folder).glob("*.png"):
            keys.add(key := f"{path.stem}/{folder}")
            assert (load_index_png(path) == expected[key]).mean() >= EQUAL_PIXELS, key
    assert keys == set(expected)
