"""Weight files: every form is read, no code runs, and a file of another kind is named."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import noise_image, run_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torchvision.models import vgg
from weight_files import Calls, caffemodel, damaged, params

from network import tiny_aff, tiny_cls, vgg16_cls
from tool.run.errors import DataError
from tool.weights import (
    load_for_inference,
    load_for_training,
    mxnet,
    read_weight_file,
    take_weights,
)


@pytest.fixture
def lines() -> list[str]:
    """What loading reports."""
    return []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def _classifier(seed, num_classes=20):
    torch.manual_seed(seed)
    return tiny_cls.Net(num_classes)


def _read(path) -> dict[str, torch.Tensor]:
    return read_weight_file(path).found


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
        lambda state: {
            "epoch": 1,
            "state": {"anything": state},
            "optimizer": {"state": {0: state}},
        },
        lambda state: {
            "ema": {"x": torch.ones(1)},
            "args": Namespace(lr=[0.1, None]),
            "net": state,
        },
        lambda state: {"best": [np.float64(61.2), np.int32(7), np.bool_(True)], "weights": state},
    ],
    ids=["plain", "state_dict", "model", "module.", "both", "nested", "several", "NumPy"],
)
def test_every_form_of_a_checkpoint_is_read(wrap, zipped, path, lines):
    source, net = _classifier(1), _classifier(2)
    torch.save(wrap(source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert _equal(_read(path), source.state_dict())
    load_for_inference(net, str(path), lines.append)
    assert _equal(net.state_dict(), source.state_dict())
    assert lines == [
        f"weights: {len(net.state_dict())} tensors taken from {path} (the tiny network classifier)",
        "random initialization: none",
        "unused: none",
    ]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.model.", "student.backbone."])
def test_prefix_under_which_all_names_fit_is_taken_off(prefix, path, lines):
    source, net = _classifier(1), _classifier(2)
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save(state | {"projection.weight": torch.ones(3), "trunk0.weight": torch.ones(1)}, path)
    load_for_inference(net, str(path), lines.append)
    assert _equal(net.state_dict(), source.state_dict())
    torch.save(state | {f"other.{name}": value for name, value in state.items()}, path)
    with pytest.raises(DataError, match=f"several times .*{re.escape(prefix)}"):
        load_for_inference(net, str(path), lines.append)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_file_with_code_is_refused_and_not_executed(zipped, path, tmp_path):
    marker = tmp_path / "executed"
    content = {"conv1a.weight": torch.ones(1), "x": Calls(os.mkdir, str(marker))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=re.escape(f"{path}: refused") + r".* posix\.mkdir"):
        _read(path)
    assert not marker.exists()


TENSORS = {f"layer{k}.0": torch.arange(6.0 * k + 6).reshape(3, k + 1, 2, 1) for k in range(3)}


def _samples() -> dict[str, bytes]:
    """The same tensors in a small file of each form."""
    arrays = {name: tensor.numpy() for name, tensor in TENSORS.items()}
    samples = {
        "safetensors": save(TENSORS),
        "caffemodel": caffemodel(arrays, legacy=True),
        "params": params(arrays),
    }
    for name, zipped in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
        samples[name] = file.getvalue()
    return samples


SAMPLES = _samples()


@pytest.mark.parametrize("name", SAMPLES)
def test_content_decides_the_form_of_a_file_and_a_part_is_a_data_error(name, path):
    whole = SAMPLES[name]
    path.write_bytes(whole)
    assert _equal(read_weight_file(path).tensors, TENSORS)
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        # Caffe's format has no end of its own: cut between two layers, it is a smaller model.
        with contextlib.suppress(DataError) if name == "caffemodel" else pytest.raises(DataError):
            _read(path)


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_file_is_read_or_a_data_error(name, data, path):
    path.write_bytes(data.draw(damaged(SAMPLES[name])))
    try:
        _read(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        assert str(error).isprintable()


# ---- the wrong network ----


LOADS = pytest.mark.parametrize("load", [load_for_training, load_for_inference])


@LOADS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, r"First differences: trunk3\.weight missing"),
        (lambda whole: {"trunk3.weight": whole[:5]}, r"First differences: trunk3\.weight \(5, "),
        (lambda whole: {"trunk3.weight": whole / 0}, r"trunk3\.weight has values that are not fin"),
    ],
    ids=["missing", "misshapen", "not finite"],
)
def test_unusable_backbone_tensor_is_a_data_error(change, message, load, path, lines):
    net, state = _classifier(1), _classifier(2).state_dict()
    torch.save(state | change(state.pop("trunk3.weight")), path)
    with pytest.raises(DataError, match=message):
        load(net, str(path), lines.append)
    assert _equal(net.state_dict(), _classifier(1).state_dict())


# ---- what may be missing ----


HEADS = {
    "fc8.weight missing": {},
    "fc8.weight (7, 128, 1, 1) instead of (20, 128, 1, 1)": {
        "fc8.weight": torch.ones(7, 128, 1, 1)
    },
}


@pytest.mark.parametrize("problem", HEADS)
def test_head_may_be_missing_or_of_other_classes_for_training_only(problem, path, lines):
    net, trunk = _classifier(2), _classifier(1).state_dict()
    del trunk["fc8.weight"]
    torch.save(trunk | HEADS[problem], path)
    load_for_training(net, str(path), lines.append)
    fresh = {"fc8.weight": _classifier(2).fc8.weight}
    assert _equal(net.state_dict(), trunk | fresh)
    assert "random initialization: fc8.weight" in lines
    with pytest.raises(DataError, match=re.escape(problem)):
        load_for_inference(net, str(path), lines.append)


@LOADS
def test_none_leaves_every_tensor_fresh_and_warns(load, lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("none").write_text("not looked at")
    net = _classifier(1)
    load(net, "none", lines.append)
    assert _equal(net.state_dict(), _classifier(1).state_dict())
    assert [line[:23] for line in lines] == ["WARNING: --weights none"]


# ---- names and shapes as published ----


def test_deeper_network_is_refused(lines):
    net = _classifier(1)
    found = net.state_dict() | {"fc8.bias": torch.ones(20)}  # as Caffe's classifiers have
    assert "fc8.bias" not in take_weights(net, "a.pth", found, (), lines.append)
    found |= {"trunk4.1.weight": torch.ones(1)}
    with pytest.raises(DataError, match=r"more layers than network\.tiny_cls: trunk4\.1\.weight"):
        take_weights(net, "a.pth", found, (), lines.append)


NETWORKS = {
    "vgg16_cls": "VGG-16 classifier",
    "vgg16_aff": "VGG-16 AffinityNet",
    "resnet38_cls": "ResNet-38 classifier",
    "resnet38_aff": "ResNet-38 AffinityNet",
}


def _zeros(shapes: dict) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def _without_memory(name: str) -> nn.Module:
    with torch.device("meta"):
        return importlib.import_module(f"network.{name}").Net()


@pytest.mark.parametrize("counters", [True, False], ids=["", "PyTorch 0.4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_published_names_and_shapes_are_all_that_is_wanted(name, counters, golden, lines):
    net = _without_memory(name)
    shapes = golden("meta")[f"{name}.state_dict"]
    found = _zeros({k: v for k, v in shapes.items() if counters or "num_batches" not in k})
    assert take_weights(net, "a.pth", found, (), lines.append).keys() == found.keys()
    first = f"weights: {len(found)} tensors taken from a.pth ({NETWORKS[name]})"
    assert lines == [first, "random initialization: none", "unused: none"]
    if counters:
        net.load_state_dict(found, strict=True, assign=True)
    missing = list(shapes)[1]  # a bias, or a statistic of batch norm
    del found[missing]
    with pytest.raises(DataError, match=f"a.pth: .*{re.escape(missing)} missing"):
        take_weights(net, "a.pth", found, (), lines.append)


@pytest.mark.parametrize("name", NETWORKS)
def test_backbone_starts_both_networks(name, golden, lines):
    net = _without_memory(name)
    other = name[:-3] + {"cls": "aff", "aff": "cls"}[name[-3:]]
    found = _zeros(golden("meta")[f"{other}.state_dict"])
    taken = take_weights(net, "a.pth", found, net.new_layers, lines.append)
    fresh = lines[1].removeprefix("random initialization: ").split(", ")
    assert {key.partition(".")[0] for key in fresh} == set(net.new_layers)
    unused = {key.partition(".")[0] for key in found.keys() - taken.keys()}
    assert unused <= set(_without_memory(other).new_layers)


# ---- other forms ----


def test_names_of_the_original_files():
    examples = {
        "conv1a.weight": "arg:conv1a_weight",
        "b3.bn_branch2a.weight": "arg:bn3a_branch2a_gamma",
        "b2.conv_branch2a.weight": "arg:res2a_branch2a_weight",
        "b2_1.bn_branch2b1.running_mean": "aux:bn2b1_branch2b1_moving_mean",
        "b4_5.conv_branch2b1.weight": "arg:res4b5_branch2b1_weight",
        "b7.bn_branch2b2.running_var": "aux:bn7a_branch2b2_moving_var",
        "b6.conv_branch1.weight": "arg:res6a_branch1_weight",
        "bn7.bias": "arg:bn7_beta",
    }
    for ours, theirs in examples.items():
        assert mxnet.network_name(theirs) == ours
    for other in ("arg:linear1000_weight", "0", "arg:res2a_branch2a_extra", "res2a"):
        assert mxnet.network_name(other) == other


def test_caffe_blobs_of_four_sides_take_the_networks_shapes(path, lines):
    source = _classifier(1)
    blobs = {
        name.replace(".weight", ".0").replace(".bias", ".1"): value.numpy()
        for name, value in source.state_dict().items()
    }
    inner_product = {"fc8.0": blobs["fc8.0"].reshape(20, 128)}  # that a 1 x 1 convolution is
    for content in (caffemodel(blobs, legacy=True), caffemodel(blobs | inner_product, False)):
        net = _classifier(2)
        path.write_bytes(content)
        load_for_inference(net, str(path), lines.append)
        assert _equal(net.state_dict(), source.state_dict())


def test_convolutions_alone_start_vgg16_and_name_the_recipe(golden, lines, path):
    shapes = golden("meta")["vgg16_cls.state_dict"]
    torch.save(_zeros({k: v for k, v in shapes.items() if k.startswith("conv")}), path)
    net = vgg16_cls.Net()
    assert load_for_training(net, str(path), lines.append) == ["fc6", "fc7"]
    assert (
        lines[1] == "random initialization: fc6.weight, fc6.bias, fc7.weight, fc7.bias, fc8.weight"
    )
    assert lines[3].startswith("fc6 and fc7 are not in the weights: train with --lr 0.003 ")
    with pytest.raises(DataError, match=r"fc6\.weight missing"):
        load_for_inference(net, str(path), lines.append)


@pytest.mark.parametrize("origin", ["IMAGENET1K_V1", "IMAGENET1K_FEATURES"])
def test_torchvisions_vgg16_is_converted(origin, path, lines):
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    rows, columns = torch.arange(4096.0), torch.arange(25088.0)
    whole = {
        "classifier.0.weight": columns.expand(4096, -1),
        "classifier.0.bias": rows,
        "classifier.3.weight": (rows[:, None] - rows) / 4,
        "classifier.3.bias": -rows,
    }
    void = {"classifier.0.weight": torch.tensor(torch.nan)}
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save(state | (whole if origin.endswith("V1") else void), path)
    net = vgg16_cls.Net()
    fresh = load_for_training(net, str(path), lines.append)
    assert f"normalized as its {origin}" in lines[0]

    image = noise_image(80, 80, seed=1)
    transform = vgg.VGG16_Weights[origin].transforms(resize_size=80, crop_size=80)
    theirs = transform(image)[None]
    ours = torch.from_numpy(net.normalize(np.asarray(image))).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = features[:4](theirs)
        actual = F.relu(net.conv1_2(F.relu(net.conv1_1(ours))))
    inner = (..., slice(2, -2), slice(2, -2))
    assert (actual - expected)[inner].abs().max() < 1e-5 * expected.abs().max()
    layers = [name for name, _ in net.named_modules() if name.startswith("conv")]
    convolutions = [module for module in features if isinstance(module, nn.Conv2d)]
    for convolution, layer in list(zip(convolutions, layers, strict=True))[1:]:
        assert _equal(net.get_submodule(layer).state_dict(), convolution.state_dict())

    if origin == "IMAGENET1K_FEATURES":
        assert fresh == ["fc6", "fc7"]
        return
    assert fresh == []
    channel, y, x = 200, 1, 2  # of 7 x 7 taps, the rows and columns 0, 3 and 6
    assert (net.fc6.weight[:, channel, y, x] == channel * 49 + 3 * y * 7 + 3 * x).all()
    assert torch.equal(net.fc6.bias, rows[::4])
    assert torch.equal(net.fc7.weight[..., 0, 0], rows[:1024, None] - rows[:1024])
    assert torch.equal(net.fc7.bias, -rows[::4])


def _torchscript() -> bytes:
    """An archive that torch.load takes for a TorchScript module."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("constants.pkl", "data.pkl", "version"):
            archive.writestr(f"net/{name}", b"3")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_torchscript(), "TorchScript archive, .*; save its state_dict"),
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "archive"),
        (bytes(257) + b"ustar\x0000", "archive"),
        (b'name: "VGG"\nlayers {', "neither"),
        (pickle.dumps({"a": 1}, 2), "not a readable"),
        (b"\x0a\x03net", "no weights"),
        ({}, "no weights"),
        ([torch.ones(2)], "no state dict"),
        ({"a": torch.ones(2), "b": 1}, "no state dict"),
        ({1: torch.ones(2)}, "no state dict"),
        ({"a": {"x": torch.ones(2)}, "b": {"x": torch.ones(2)}}, r"several state dicts \(a, b\)"),
    ],
)
def test_what_is_no_weight_file_is_named(content, words, path):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=words) as error:
        _read(path)
    assert str(error.value).startswith(f"{path}: ")


# ---- the tool ----


def test_show_lists_names_shapes_types_and_hashes(tmp_path):
    state = {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "b": torch.tensor(7),
        "c": torch.ones(2).bfloat16(),
    }
    torch.save(state, tmp_path / "a.pth")
    outcome = run_program("tool.weights show a.pth --json a.json", tmp_path).check()
    raw = {
        "a.weight": ([3, 2], "float32", np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()),
        "b": ([], "int64", (7).to_bytes(8, "little")),
        "c": ([2], "bfloat16", b"\x80\x3f" * 2),
    }
    expected = {
        name: {"shape": shape, "dtype": dtype, "sha256": hashlib.sha256(content).hexdigest()[:16]}
        for name, (shape, dtype, content) in raw.items()
    }
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    assert "PyTorch state dict, 3 tensors, 9 values" in outcome.out
    assert f"\na.weight  3 x 2  float32  {expected['a.weight']['sha256']}\n" in outcome.out


def test_converted_file_starts_everything(tmp_path, lines):
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
        load_for_training(net, str(tmp_path / "b.pth"), lines.append)
        assert torch.equal(net.trunk4.weight, wanted["trunk4.weight"])
