"""Weight files: every form is read, no code runs, and a foreign file says what it is."""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import REPOSITORY, noise_image, run_program
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg
from weight_files import caffemodel, params

from network import resnet38_aff, tiny_aff, tiny_cls, vgg16_cls
from tool.run.errors import DataError, UsageError
from tool.weights import (
    _match,
    _rename_caffe,
    _rename_mxnet,
    describe,
    load_for_inference,
    load_for_training,
    read_state_dict,
)


class Messages(list):
    """``say``: keeps what it is told."""

    def __call__(self, message):
        self.append(message)

    @property
    def text(self):
        return "\n".join(self)


@pytest.fixture
def say():
    return Messages()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def _classifier(seed, num_classes=20):
    torch.manual_seed(seed)
    return tiny_cls.Net(num_classes)


def _equal(first, second) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# ---- forms of a file ----


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module.{name}": v for name, v in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "module.", "both"],
)
def test_every_form_of_a_checkpoint_is_read(wrap, zipped, path, say):
    source, net = _classifier(1), _classifier(2)
    torch.save(wrap(source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert _equal(read_state_dict(path), source.state_dict())
    load_for_inference(net, str(path), say)
    assert _equal(net.state_dict(), source.state_dict())


def test_half_precision_weights_become_the_networks_own(path, say):
    source, net = _classifier(1), _classifier(2)
    torch.save({name: value.half() for name, value in source.state_dict().items()}, path)
    load_for_inference(net, str(path), say)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    torch.testing.assert_close(net.fc8.weight, source.fc8.weight, rtol=1e-3, atol=1e-3)


class _Executes:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_file_with_code_is_refused_and_not_executed(zipped, path, tmp_path):
    marker = tmp_path / "executed"
    content = {"conv1a.weight": torch.ones(1), "x": _Executes(str(marker))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=re.escape(f"{path}: refused")):
        read_state_dict(path)
    assert not marker.exists()


def test_whole_pickled_network_is_refused(path):
    torch.save(_classifier(1), path)
    with pytest.raises(DataError, match="refused"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", b"\x80\x02}q\x00"])
def test_damaged_file_is_a_data_error(content, path):
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_state_dict(path)


def test_truncated_file_is_a_data_error(path):
    torch.save(_classifier(1).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_state_dict(path)


@pytest.mark.parametrize(
    "content", [torch.ones(2), [torch.ones(2)], {}, {"a": 1}, {1: torch.ones(2)}, 3]
)
def test_file_without_a_state_dict_is_a_data_error(content, path):
    torch.save(content, path)
    with pytest.raises(DataError, match="no state dict"):
        read_state_dict(path)


def test_missing_file_is_a_data_error_that_names_it(tmp_path, say):
    for missing, words in (
        (tmp_path / "none.pth", "no such weight file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(DataError, match=re.escape(f"{missing}: {words}")):
            load_for_training(_classifier(1), str(missing), say)


# ---- the wrong network ----


@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_weights_of_another_network_are_named(load, path, say):
    with torch.device("meta"):
        net = vgg16_cls.Net()
    torch.save(_classifier(1).state_dict(), path)
    with pytest.raises(DataError) as error:
        load(net, str(path), say)
    for part in (str(path), "the tiny network classifier", "network.vgg16_cls", "conv1_1.weight"):
        assert part in str(error.value)
    assert say == []


def test_affinity_weights_are_no_classifiers_at_inference(path, say):
    torch.save(tiny_aff.Net().state_dict(), path)
    with pytest.raises(DataError, match=r"tiny network AffinityNet.*fc8\.weight missing"):
        load_for_inference(_classifier(1), str(path), say)


@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_missing_or_misshapen_backbone_tensor_is_a_data_error(load, path, say):
    net = _classifier(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = _classifier(2).state_dict()
    whole = state["trunk3.weight"]
    for change in (None, whole[:5]):
        state["trunk3.weight"] = change
        torch.save({k: v for k, v in state.items() if v is not None}, path)
        with pytest.raises(DataError, match=r"First differences: trunk3\.weight"):
            load(net, str(path), say)
    assert _equal(net.state_dict(), before)


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (("conv5_3.weight", "fc8.weight"), "VGG-16 classifier"),
        (("b7.conv_branch2b2.weight", "f9.weight"), "ResNet-38 AffinityNet"),
        (("conv5_3.weight",), "VGG-16"),
        (("layer4.weight",), "no network of this project"),
    ],
)
def test_describe_recognizes_networks_by_their_names(names, title):
    assert describe(dict.fromkeys(names)) == title


# ---- what may be missing ----


def test_head_may_be_missing_for_training_and_stays_fresh(path, say):
    source, net = _classifier(1), _classifier(2)
    fresh = net.fc8.weight.clone()
    state = source.state_dict()
    del state["fc8.weight"]
    torch.save(state, path)
    load_for_training(net, str(path), say)
    assert torch.equal(net.fc8.weight, fresh)
    assert torch.equal(net.trunk0.weight, source.trunk0.weight)
    assert "fresh: fc8.weight (new head)" in say
    with pytest.raises(DataError, match=r"fc8\.weight missing"):
        load_for_inference(net, str(path), say)


def test_head_of_other_classes_is_fresh_for_training_and_wrong_at_inference(path, say):
    source, net = _classifier(1, num_classes=1000), _classifier(2, num_classes=3)
    fresh = net.fc8.weight.clone()
    torch.save(source.state_dict(), path)
    load_for_training(net, str(path), say)
    assert torch.equal(net.fc8.weight, fresh)
    assert torch.equal(net.trunk4.weight, source.trunk4.weight)
    assert "fresh: fc8.weight (new head)" in say
    with pytest.raises(DataError, match=r"fc8\.weight \(1000, 128, 1, 1\) instead of \(3, 128"):
        load_for_inference(net, str(path), say)


def test_classifier_weights_start_an_affinity_net(path, say):
    # Stage 3 starts from a file of the backbone; the head that it has besides is said to be unused.
    source, net = _classifier(1), tiny_aff.Net()
    head = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("trunk")}
    torch.save(source.state_dict(), path)
    load_for_training(net, str(path), say)
    state = net.state_dict()
    for name, value in source.state_dict().items():
        if name.startswith("trunk"):
            assert torch.equal(state[name], value)
    assert all(torch.equal(state[name], value) for name, value in head.items())
    assert "unused: fc8.weight" in say
    assert f"fresh: {', '.join(head)} (new head)" in say


def test_whole_file_leaves_nothing_fresh(path, say):
    torch.save(_classifier(1).state_dict(), path)
    load_for_training(_classifier(2), str(path), say)
    assert "fresh: none" in say
    assert str(path) in say.text
    assert "unused: none" in say
    assert len(say) == 3


class _WithBatchNorm(nn.Module):
    new_layers = ()

    def __init__(self):
        super().__init__()
        self.bn7 = nn.BatchNorm2d(4)


def test_batch_norm_counters_may_be_missing_but_its_statistics_may_not(path, say):
    source, net = _WithBatchNorm(), _WithBatchNorm()
    nn.init.normal_(source.bn7.running_mean)
    state = source.state_dict()
    del state["bn7.num_batches_tracked"]
    torch.save(state, path)
    load_for_inference(net, str(path), say)
    assert torch.equal(net.bn7.running_mean, source.bn7.running_mean)

    del state["bn7.running_mean"]
    torch.save(state, path)
    with pytest.raises(DataError, match=r"bn7\.running_mean missing"):
        load_for_inference(net, str(path), say)


@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_none_leaves_every_tensor_fresh_and_warns(load, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("none").write_text("not looked at")
    net = _classifier(1)
    load(net, "none", say)
    assert _equal(net.state_dict(), _classifier(1).state_dict())
    assert len(say) == 1
    assert say.text.startswith("WARNING: --weights none")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_weights_that_are_not_finite_are_refused(load, value, path, say):
    state = _classifier(0).state_dict()
    state["trunk3.weight"][0, 0, 0, 0] = value
    torch.save(state, path)
    net = _classifier(1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(DataError, match=r"trunk3\.weight has values that are not finite"):
        load(net, str(path), say)
    assert _equal(net.state_dict(), before)


# ---- names and shapes as published ----

NETWORKS = ("vgg16_cls", "vgg16_aff", "resnet38_cls", "resnet38_aff")


def _without_memory(name: str) -> nn.Module:
    with torch.device("meta"):
        return importlib.import_module(f"network.{name}").Net()


@pytest.mark.parametrize("counters", [True, False], ids=["", "PyTorch 0.4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_published_names_and_shapes_are_all_that_is_wanted(name, counters, golden):
    net = _without_memory(name)
    found = {
        key: torch.empty(shape, device="meta")
        for key, shape in golden("meta")[f"{name}.state_dict"].items()
        if counters or not key.endswith("num_batches_tracked")
    }
    match = _match(net, found, ())
    assert match.taken.keys() == found.keys()
    assert match.fresh == match.unused == []
    if counters:
        net.load_state_dict(found, strict=True, assign=True)
    for key in found:  # nothing else may be missing
        if not key.endswith("num_batches_tracked"):
            with pytest.raises(ValueError, match=f"{re.escape(key)} missing"):
                _match(net, {k: v for k, v in found.items() if k != key}, ())


@pytest.mark.parametrize("name", NETWORKS)
def test_backbone_starts_both_networks(name, golden):
    net = _without_memory(name)
    other = name[:-3] + {"cls": "aff", "aff": "cls"}[name[-3:]]
    shapes = golden("meta")[f"{other}.state_dict"]
    found = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    match = _match(net, found, net.new_layers)
    assert {key.partition(".")[0] for key in match.fresh} == set(net.new_layers)
    assert {key.partition(".")[0] for key in match.unused} <= {"fc8", "f9", *_LEVEL_LAYERS}


_LEVEL_LAYERS = [f"{kind}8_{level}" for kind in ("f", "gn") for level in (3, 4, 5)]


def test_file_of_another_network_is_guessed(golden):
    shapes = golden("meta")["resnet38_cls.state_dict"]
    found = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    sentence = r"this looks like ResNet-38 .*; --network is network\.vgg16_aff"
    with pytest.raises(ValueError, match=sentence):
        _match(_without_memory("vgg16_aff"), found, ())


# ---- other forms ----


def _mxnet_name(name: str) -> str:
    """The original's name of one of ResNet-38's tensors: b4_5.bn_branch2a.weight, ..."""
    module, _, kind = name.rpartition(".")
    if module in ("conv1a", "bn7"):
        layer = module
    else:
        block, branch = module.split(".")
        stage, _, index = block[1:].partition("_")
        kind_of_layer, branch = branch.split("_")
        layer = {"conv": "res", "bn": "bn"}[kind_of_layer] + stage
        layer += (f"b{index}" if index else "a") + f"_{branch}"
    if "conv" in module:
        return f"arg:{layer}_weight"
    return {
        "weight": f"arg:{layer}_gamma",
        "bias": f"arg:{layer}_beta",
        "running_mean": f"aux:{layer}_moving_mean",
        "running_var": f"aux:{layer}_moving_var",
    }[kind]


def test_names_of_the_original_files():
    examples = {
        "conv1a.weight": "arg:conv1a_weight",
        "b2.conv_branch2a.weight": "arg:res2a_branch2a_weight",
        "b2_1.bn_branch2b1.running_mean": "aux:bn2b1_branch2b1_moving_mean",
        "b4_5.conv_branch2b1.weight": "arg:res4b5_branch2b1_weight",
        "b7.bn_branch2b2.running_var": "aux:bn7a_branch2b2_moving_var",
        "b6.conv_branch1.weight": "arg:res6a_branch1_weight",
        "bn7.bias": "arg:bn7_beta",
    }
    for ours, theirs in examples.items():
        assert _mxnet_name(ours) == theirs
        assert _rename_mxnet(theirs) == ours
    for other in ("arg:linear1000_weight", "0", "arg:res2a_branch2a_extra", "res2a"):
        assert _rename_mxnet(other) == other


def _random_arrays(shapes: dict, rng) -> dict[str, np.ndarray]:
    return {name: rng.random(tuple(shape), np.float32) for name, shape in shapes.items()}


def _backbone_shapes(golden, name: str) -> dict:
    shapes = golden("meta")[f"{name}.state_dict"]
    other = {"fc8.weight", *(key for key in shapes if key.endswith("num_batches_tracked"))}
    return {key: shape for key, shape in shapes.items() if key not in other}


@pytest.fixture(scope="module")
def vgg16_blobs(golden):
    """What vgg16_20M.caffemodel holds: the backbone, and a head of 21 classes."""
    rng = np.random.default_rng(0)
    arrays = _random_arrays(_backbone_shapes(golden, "vgg16_cls"), rng)
    arrays |= _random_arrays({"fc8_voc.weight": (21, 1024, 1, 1), "fc8_voc.bias": (21,)}, rng)
    return {
        name.replace(".weight", ".0").replace(".bias", ".1"): array
        for name, array in arrays.items()
    }


@pytest.mark.parametrize(
    ("name", "legacy", "form"),
    [("vgg16_cls", True, "packed"), ("vgg16_aff", False, "unpacked")],
)
@pytest.mark.slow
def test_original_vgg16_file_starts_training(name, legacy, form, vgg16_blobs, tmp_path, say):
    path = tmp_path / "vgg16_20M.caffemodel"
    path.write_bytes(caffemodel(vgg16_blobs, legacy, form))
    net = importlib.import_module(f"network.{name}").Net()
    load_for_training(net, str(path), say)
    path.unlink()
    state = net.state_dict()
    taken = {k: v for k, v in vgg16_blobs.items() if not k.startswith("fc8")}
    for blob, expected in taken.items():
        assert np.array_equal(state[_rename_caffe(blob)].numpy(), expected)
    assert f"weights: {len(taken)} tensors taken from {path} (VGG-16)" in say
    assert "unused: fc8_voc.weight, fc8_voc.bias" in say


@pytest.mark.slow
def test_original_resnet38_file_starts_training(golden, tmp_path, say):
    path = tmp_path / "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"
    rng = np.random.default_rng(0)
    expected = _random_arrays(_backbone_shapes(golden, "resnet38_cls"), rng)
    unused = {"arg:linear1000_bias": np.zeros(1000, np.float32)}
    arrays = {_mxnet_name(key): array for key, array in expected.items()} | unused
    assert len(arrays) == len(expected) + 1
    path.write_bytes(params(arrays))
    net = resnet38_aff.Net()
    load_for_training(net, str(path), say)
    path.unlink()
    state = net.state_dict()
    for key, array in expected.items():
        assert np.array_equal(state[key].numpy(), array)
    assert f"weights: {len(expected)} tensors taken from {path} (ResNet-38)" in say
    assert "unused: arg:linear1000_bias" in say


def test_safetensors_are_read(tmp_path, say):
    source, net = _classifier(1), _classifier(2)
    path = tmp_path / "weights.any"  # the content tells, not the name
    save_file(source.state_dict(), path)
    load_for_inference(net, str(path), say)
    assert _equal(net.state_dict(), source.state_dict())


def test_caffe_blobs_of_four_sides_take_the_networks_shapes(tmp_path, say):
    source, net = _classifier(1), _classifier(2)
    blobs = {
        name.replace(".weight", ".0").replace(".bias", ".1"): value.numpy()
        for name, value in source.state_dict().items()
    }
    path = tmp_path / "tiny.caffemodel"
    path.write_bytes(caffemodel(blobs, legacy=True))
    load_for_inference(net, str(path), say)
    assert _equal(net.state_dict(), source.state_dict())
    # The inner product that a 1 x 1 convolution is
    blobs["fc8.0"] = blobs["fc8.0"].reshape(20, 128)
    path.write_bytes(caffemodel(blobs, legacy=False))
    load_for_inference(net, str(path), say)
    assert _equal(net.state_dict(), source.state_dict())


MEASURE = """
import re, sys
from pathlib import Path
import tool.weights
def peak():  # getrusage would tell of the parent process, where that was larger
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
tensors = tool.weights.read_weight_file(sys.argv[1]).tensors
total = sum(value.sum().item() for value in tensors.values())  # every page is needed
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_caffe_model_needs_little_more_than_its_size_and_its_tensors(tmp_path, rng):
    path = tmp_path / "a.caffemodel"
    blobs = {f"layer{k}.0": rng.random((1000, 1000 + k), np.float32) for k in range(15)}
    path.write_bytes(caffemodel(blobs, legacy=False))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 * path.stat().st_size < int(done.stdout) < 2.2 * path.stat().st_size


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b"\x1f\x8b\x08\x00", "archive"),
        (bytes(257) + b"ustar\x0000", "archive"),
        (b"\x08\x07\x12\x07pytorch\x1a\x03", "ONNX"),
        (b'{"nodes": []}', "JSON"),
        (b'name: "VGG"\nlayers {', "description of a network"),
        (b"hello", "neither"),
        (b"\x0a\x03net", "no weights"),
    ],
)
def test_what_is_no_weight_file_is_named(content, words, path):
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        read_state_dict(path)
    assert str(error.value).startswith(f"{path}: ")


# ---- imagenet ----


@pytest.fixture(scope="module")
def torchvision_features():
    """torchvision's VGG-16 features with random weights."""
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.normal_(module.bias)
    return features.eval()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A place of our own for torchvision's downloads, from which nothing can be downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", _unreachable)
    return tmp_path / "checkpoints" / "vgg16_features-amdegroot-88682ab5.pth"


def _unreachable(*_args, **_kwargs):
    raise URLError("no network here")


def _put(features: nn.Module, place: Path) -> None:
    place.parent.mkdir()
    torch.save({f"features.{key}": v for key, v in features.state_dict().items()}, place)


@pytest.mark.parametrize("name", ["vgg16_cls", "vgg16_aff"])
@pytest.mark.slow
def test_imagenet_gives_torchvisions_features(name, torchvision_features, hub, say):
    _put(torchvision_features, hub)
    net = importlib.import_module(f"network.{name}").Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    load_for_training(net, "imagenet", say)

    image = noise_image(80, 96, seed=1)
    transform = vgg.VGG16_Weights.IMAGENET1K_FEATURES.transforms(resize_size=80, crop_size=80)
    left, right = (image.width - 80) // 2, (image.width + 80) // 2
    theirs = transform(image)[None]
    ours = torch.from_numpy(net.normalize(np.asarray(image)[:, left:right]))
    ours = ours.permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = torchvision_features[:4](theirs)
        actual = F.relu(net.conv1_2(F.relu(net.conv1_1(ours))))
        inner = (..., slice(2, -2), slice(2, -2))
        assert (actual - expected)[inner].abs().max() < 1e-5 * expected.abs().max()
        assert (actual - expected).norm() < 1e-3 * expected.norm()
        # The other layers pool and dilate differently in the two networks; not so here.
        copy = vgg.make_layers(vgg.cfgs["D"])
        convolutions = [module for module in copy if isinstance(module, nn.Conv2d)]
        ours_by_name = [n for n, _ in net.named_modules() if n.startswith("conv")]
        for convolution, layer in zip(convolutions, ours_by_name, strict=True):
            convolution.load_state_dict(net.get_submodule(layer).state_dict())
        expected = torchvision_features(theirs)
        assert (copy(ours) - expected).norm() < 1e-3 * expected.norm()

    fresh = [key for key in before if not key.startswith("conv")]
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in fresh)
    assert "weights: 26 tensors taken from torchvision's VGG-16 (VGG-16)" in say
    lost = "fc6.weight, fc6.bias, fc7.weight, fc7.bias (random, not in the file)"
    assert any(message.startswith(f"fresh: {lost}; ") for message in say)


def test_imagenet_is_for_vgg16_only(say):
    with pytest.raises(UsageError, match=r"imagenet: .*network\.tiny_cls"):
        load_for_training(_classifier(1), "imagenet", say)


def test_imagenet_is_for_training_only(say):
    with pytest.raises(UsageError, match="imagenet: is for training"):
        load_for_inference(_without_memory("vgg16_cls"), "imagenet", say)


@pytest.mark.parametrize("name", ["train_cls", "infer_cls"])
def test_imagenet_for_another_network_is_a_usage_error(name, golden_voc, tmp_path):
    (tmp_path / "ids.txt").write_text("".join(f"{p.stem}\n" for p in _images(golden_voc)))
    lists = {
        "train_cls": "--train_list ids.txt --val_list ids.txt --batch_size 1",
        "infer_cls": "--infer_list ids.txt --out_cam cam",
    }[name]
    command = f"{name} {lists} --voc12_root {golden_voc} --network network.tiny_cls"
    outcome = run_program(f"{command} --weights imagenet --device cpu --num_workers 0", tmp_path)
    outcome.assert_failed(2, "--weights imagenet")


def _images(root: Path) -> list[Path]:
    return sorted((root / "JPEGImages").glob("*"))


@pytest.mark.parametrize("damaged", [None, b"", b"<html>", "other"])
def test_failed_download_says_where_the_file_can_be_put(damaged, hub, say):
    if damaged is not None:
        hub.parent.mkdir()
    if isinstance(damaged, bytes):
        hub.write_bytes(damaged)
    elif damaged == "other":
        torch.save({"features.0.weight": torch.ones(2)}, hub)
    with pytest.raises(DataError) as error:
        load_for_training(_without_memory("vgg16_cls"), "imagenet", say)
    url = vgg.VGG16_Weights.IMAGENET1K_FEATURES.url
    for part in ("--weights imagenet", url, f"put it at {hub}"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


# ---- the tool ----


def test_show_tells_names_shapes_types_and_hashes(tmp_path):
    state = {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "b": torch.tensor(7),
        "c": torch.ones(2).bfloat16(),
    }
    torch.save(state, tmp_path / "a.pth")
    outcome = run_program("tool.weights show a.pth --json a.json", tmp_path).check()
    raw = {
        "a.weight": np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes(),
        "b": (7).to_bytes(8, "little"),
        "c": b"\x80\x3f" * 2,
    }
    hashes = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in raw.items()}
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a.weight": {"shape": [3, 2], "dtype": "float32", "sha256": hashes["a.weight"]},
        "b": {"shape": [], "dtype": "int64", "sha256": hashes["b"]},
        "c": {"shape": [2], "dtype": "bfloat16", "sha256": hashes["c"]},
    }
    first, *lines = outcome.out.splitlines()
    assert "PyTorch state dict, 3 tensors, 9 values" in first
    assert lines[0].split() == ["a.weight", "3", "x", "2", "float32", hashes["a.weight"]]


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (lambda a: caffemodel(a, legacy=True), ["conv.0", "conv.1"]),
        (lambda a: params(a), ["conv.0", "conv.1"]),
        (lambda a: params(a, named=False), ["0", "1"]),
    ],
    ids=["Caffe", "MXNet", "nameless"],
)
def test_show_names_as_the_file_does(write, names, tmp_path):
    arrays = {"conv.0": np.ones((2, 3, 1, 1), "f4"), "conv.1": np.ones(2, "f4")}
    (tmp_path / "file").write_bytes(write(arrays))
    run_program("tool.weights show file --json file.json", tmp_path).check()
    content = json.loads((tmp_path / "file.json").read_text())
    assert list(content) == names
    digest = hashlib.sha256(np.ones(6, "<f4").tobytes()).hexdigest()[:16]
    assert content[names[0]] == {"shape": [2, 3, 1, 1], "dtype": "float32", "sha256": digest}


def test_converted_file_starts_everything(tmp_path, say):
    source = _classifier(1, num_classes=7)
    state = {f"module.{name}": value.half() for name, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    command = "tool.weights convert a.pth b.pth --network network.tiny_aff"
    outcome = run_program(command, tmp_path).check()
    assert "written to b.pth" in outcome.out
    converted = torch.load(tmp_path / "b.pth", weights_only=True)
    wanted = {k: v.half().float() for k, v in source.state_dict().items() if k != "fc8.weight"}
    assert _equal(converted, wanted)
    for net in (tiny_cls.Net(), tiny_aff.Net()):
        load_for_training(net, str(tmp_path / "b.pth"), say)
        assert torch.equal(net.trunk4.weight, wanted["trunk4.weight"])


def test_tool_fails_in_one_sentence(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"<html>")
    torch.save(_classifier(1).state_dict(), tmp_path / "b.pth")
    run_program("tool.weights show a.pth", tmp_path).assert_failed(1, "a.pth", "web page")
    run_program("tool.weights show none.pth", tmp_path).assert_failed(1, "none.pth", "no such")
    command = "tool.weights convert b.pth c.pth --network network.vgg16_cls"
    run_program(command, tmp_path).assert_failed(1, "b.pth", "the tiny network", "conv1_1.weight")
    command = "tool.weights convert b.pth c.pth --network os.path"
    run_program(command, tmp_path).assert_failed(2, "--network")
    assert not (tmp_path / "c.pth").exists()
