"""Weight files: every form is read, no code runs, and a file of another kind is named."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import REPOSITORY, noise_image, run_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torchvision.models import vgg
from weight_files import caffemodel, params

from network import tiny_aff, tiny_cls, vgg16_cls
from tool.run.errors import DataError, UsageError
from tool.weights import (
    describe,
    load_for_inference,
    load_for_training,
    match_tensors,
    mxnet,
    network_names,
    read_weight_file,
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
    return network_names(read_weight_file(path))


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
    with pytest.raises(DataError, match=re.escape(f"{path}: refused") + r".* posix\.mkdir"):
        _read(path)
    assert not marker.exists()


def test_torchscript_is_named(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("constants.pkl", "data.pkl", "code/a.py", "version"):
            archive.writestr(f"archive/{name}", b"2\n")
    with pytest.raises(DataError, match="is a TorchScript archive"):
        _read(path)


@pytest.mark.parametrize(
    "content", [torch.ones(2), [torch.ones(2)], {}, {"a": 1}, {1: torch.ones(2)}, 3]
)
def test_file_without_a_state_dict_is_a_data_error(content, path):
    torch.save(content, path)
    with pytest.raises(DataError, match="no state dict"):
        _read(path)


def test_missing_file_is_a_data_error_that_names_it(tmp_path, lines):
    for missing, words in (
        (tmp_path / "none.pth", "no such weight file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(DataError, match=re.escape(f"{missing}: {words}")):
            load_for_training(_classifier(1), str(missing), lines.append)


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
def test_content_decides_the_form_of_a_file(name, tmp_path):
    path = tmp_path / "weights.any"
    path.write_bytes(SAMPLES[name])
    assert _equal(read_weight_file(path).tensors, TENSORS)


@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_file_is_a_data_error(name, path):
    whole = SAMPLES[name]
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        # Caffe's format has no end of its own: cut between two layers, it is a smaller model.
        with contextlib.suppress(DataError) if name == "caffemodel" else pytest.raises(DataError):
            _read(path)


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_file_is_read_or_a_data_error(name, data, path):
    content = bytearray(SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=5), st.just(bytes(8))))
        content[start : start + len(new)] = new
    path.write_bytes(content)
    try:
        _read(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        assert str(error).isprintable()


# ---- the wrong network ----


@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_weights_of_another_network_are_named(load, path, lines):
    with torch.device("meta"):
        net = vgg16_cls.Net()
    torch.save(_classifier(1).state_dict(), path)
    with pytest.raises(DataError) as error:
        load(net, str(path), lines.append)
    for part in (str(path), "the tiny network classifier", "network.vgg16_cls", "conv1_1.weight"):
        assert part in str(error.value)
    assert lines == []


@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_missing_or_misshapen_backbone_tensor_is_a_data_error(load, path, lines):
    net = _classifier(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = _classifier(2).state_dict()
    whole = state["trunk3.weight"]
    for change in (None, whole[:5]):
        state["trunk3.weight"] = change
        torch.save({k: v for k, v in state.items() if v is not None}, path)
        with pytest.raises(DataError, match=r"First differences: trunk3\.weight"):
            load(net, str(path), lines.append)
    assert _equal(net.state_dict(), before)


def test_networks_are_recognized_by_their_names():
    assert describe(["conv5_3.weight", "fc8.weight"]) == "VGG-16 classifier"
    assert describe(["b7.conv_branch2b2.weight", "f9.weight"]) == "ResNet-38 AffinityNet"
    assert describe(["layer4.weight"]) == "no network of this project"


# ---- what may be missing ----


@pytest.mark.parametrize(
    ("num_classes", "problem"),
    [
        (None, "fc8.weight missing"),
        (1000, "fc8.weight (1000, 128, 1, 1) instead of (20, 128, 1, 1)"),
    ],
)
def test_head_may_be_missing_or_of_other_classes_for_training_only(
    num_classes, problem, path, lines
):
    source, net = _classifier(1, num_classes or 20), _classifier(2)
    fresh = net.fc8.weight.clone()
    state = source.state_dict()
    if num_classes is None:
        del state["fc8.weight"]
    torch.save(state, path)
    load_for_training(net, str(path), lines.append)
    assert torch.equal(net.fc8.weight, fresh)
    assert torch.equal(net.trunk4.weight, source.trunk4.weight)
    assert "random initialization: fc8.weight" in lines
    with pytest.raises(DataError, match=re.escape(problem)):
        load_for_inference(net, str(path), lines.append)


def test_classifier_weights_start_an_affinity_net(path, lines):
    source, net = _classifier(1), tiny_aff.Net()
    head = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("trunk")}
    torch.save(source.state_dict(), path)
    load_for_training(net, str(path), lines.append)
    state = net.state_dict()
    trunk = {k: v for k, v in source.state_dict().items() if k.startswith("trunk")}
    assert all(torch.equal(state[name], value) for name, value in {**trunk, **head}.items())
    assert "unused: fc8.weight" in lines
    assert f"random initialization: {', '.join(head)}" in lines


@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_none_leaves_every_tensor_fresh_and_warns(load, lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("none").write_text("not looked at")
    net = _classifier(1)
    load(net, "none", lines.append)
    assert _equal(net.state_dict(), _classifier(1).state_dict())
    assert [line[:23] for line in lines] == ["WARNING: --weights none"]


@pytest.mark.parametrize("load", [load_for_training, load_for_inference])
def test_weights_that_are_not_finite_are_refused(load, path, lines):
    state = _classifier(0).state_dict()
    state["trunk3.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)
    net = _classifier(1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(DataError, match=r"trunk3\.weight has values that are not finite"):
        load(net, str(path), lines.append)
    assert _equal(net.state_dict(), before)


# ---- names and shapes as published ----

NETWORKS = ("vgg16_cls", "vgg16_aff", "resnet38_cls", "resnet38_aff")


def _meta(shapes: dict) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _without_memory(name: str) -> nn.Module:
    with torch.device("meta"):
        return importlib.import_module(f"network.{name}").Net()


@pytest.mark.parametrize("counters", [True, False], ids=["", "PyTorch 0.4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_published_names_and_shapes_are_all_that_is_wanted(name, counters, golden):
    net = _without_memory(name)
    shapes = golden("meta")[f"{name}.state_dict"]
    found = _meta({k: v for k, v in shapes.items() if counters or "num_batches" not in k})
    match = match_tensors(net, found, ())
    assert match.taken.keys() == found.keys()
    assert match.fresh == match.unused == []
    if counters:
        net.load_state_dict(found, strict=True, assign=True)
    missing = list(shapes)[1]  # a bias, or a statistic of batch norm
    del found[missing]
    with pytest.raises(ValueError, match=f"{re.escape(missing)} missing"):
        match_tensors(net, found, ())


@pytest.mark.parametrize("name", NETWORKS)
def test_backbone_starts_both_networks(name, golden):
    net = _without_memory(name)
    other = name[:-3] + {"cls": "aff", "aff": "cls"}[name[-3:]]
    match = match_tensors(net, _meta(golden("meta")[f"{other}.state_dict"]), net.new_layers)
    assert {key.partition(".")[0] for key in match.fresh} == set(net.new_layers)
    assert {key.partition(".")[0] for key in match.unused} <= {"fc8", "f9", *_LEVEL_LAYERS}


_LEVEL_LAYERS = [f"{kind}8_{level}" for kind in ("f", "gn") for level in (3, 4, 5)]


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
        assert mxnet.network_name(theirs) == ours
    for other in ("arg:linear1000_weight", "0", "arg:res2a_branch2a_extra", "res2a"):
        assert mxnet.network_name(other) == other


@pytest.mark.parametrize("name", ["resnet38_cls", "resnet38_aff"])
def test_original_resnet38_names_start_both_networks(name, golden):
    shapes = golden("meta")["resnet38_cls.state_dict"]
    backbone = [key for key in shapes if key != "fc8.weight" and "num_batches" not in key]
    theirs = {_mxnet_name(key): shapes[key] for key in backbone}
    found = {mxnet.network_name(key): value for key, value in _meta(theirs).items()}
    net = _without_memory(name)
    match = match_tensors(net, {**found, "arg:linear1000_bias": torch.ones(1000)}, net.new_layers)
    assert match.taken.keys() == found.keys()
    assert match.unused == ["arg:linear1000_bias"]


def test_caffe_blobs_of_four_sides_take_the_networks_shapes(tmp_path, lines):
    source, net = _classifier(1), _classifier(2)
    blobs = {
        name.replace(".weight", ".0").replace(".bias", ".1"): value.numpy()
        for name, value in source.state_dict().items()
    }
    path = tmp_path / "tiny.caffemodel"
    path.write_bytes(caffemodel(blobs, legacy=True))
    load_for_inference(net, str(path), lines.append)
    assert _equal(net.state_dict(), source.state_dict())
    # The inner product that a 1 x 1 convolution is
    blobs["fc8.0"] = blobs["fc8.0"].reshape(20, 128)
    path.write_bytes(caffemodel(blobs, legacy=False))
    load_for_inference(net, str(path), lines.append)
    assert _equal(net.state_dict(), source.state_dict())


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
        (b"PK\x03\x04broken", "not a readable"),
        (b"\x80\x02}q\x00", "not a readable"),
        (pickle.dumps({"a": 1}, 2), "not a readable"),
        (b"\x0a\x03net", "no weights"),
    ],
)
def test_what_is_no_weight_file_is_named(content, words, path):
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        _read(path)
    assert str(error.value).startswith(f"{path}: ")


# ---- imagenet ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of our own for torchvision's downloads, from which nothing can be downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", _unreachable)
    return tmp_path / "checkpoints" / "vgg16_features-amdegroot-88682ab5.pth"


def _unreachable(*_args, **_kwargs):
    raise URLError("no network here")


@pytest.mark.slow
def test_imagenet_gives_torchvisions_features(hub, lines):
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])
    convolutions = [module for module in features if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        nn.init.normal_(convolution.bias)
    hub.parent.mkdir()
    torch.save({f"features.{key}": v for key, v in features.state_dict().items()}, hub)
    net = vgg16_cls.Net()
    load_for_training(net, "imagenet", lines.append)

    image = noise_image(80, 80, seed=1)
    transform = vgg.VGG16_Weights.IMAGENET1K_FEATURES.transforms(resize_size=80, crop_size=80)
    theirs = transform(image)[None]
    ours = torch.from_numpy(net.normalize(np.asarray(image))).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = features[:4](theirs)
        actual = F.relu(net.conv1_2(F.relu(net.conv1_1(ours))))
    inner = (..., slice(2, -2), slice(2, -2))
    assert (actual - expected)[inner].abs().max() < 1e-5 * expected.abs().max()
    assert (actual - expected).norm() < 1e-3 * expected.norm()
    layers = [n for n, _ in net.named_modules() if n.startswith("conv")]
    for convolution, layer in list(zip(convolutions, layers, strict=True))[1:]:
        assert _equal(net.get_submodule(layer).state_dict(), convolution.state_dict())
    assert lines[:2] == [
        "weights: 26 tensors taken from torchvision's VGG-16 (VGG-16)",
        "random initialization: fc6.weight, fc6.bias, fc7.weight, fc7.bias, fc8.weight",
    ]


def test_imagenet_is_for_training_of_vgg16_only(lines):
    with pytest.raises(UsageError, match=r"imagenet: .*network\.tiny_cls"):
        load_for_training(_classifier(1), "imagenet", lines.append)
    with pytest.raises(UsageError, match="imagenet: is for training"):
        load_for_inference(_without_memory("vgg16_cls"), "imagenet", lines.append)


@pytest.mark.parametrize("damaged", [None, b"", b"<html>", "other"])
def test_failed_download_says_where_the_file_can_be_put(damaged, hub, lines):
    if damaged is not None:
        hub.parent.mkdir()
    if isinstance(damaged, bytes):
        hub.write_bytes(damaged)
    elif damaged == "other":
        torch.save({"features.0.weight": torch.ones(2)}, hub)
    with pytest.raises(DataError) as error:
        load_for_training(_without_memory("vgg16_cls"), "imagenet", lines.append)
    url = vgg.VGG16_Weights.IMAGENET1K_FEATURES.url
    for part in ("--weights imagenet", url, f"put it at {hub}"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


# ---- the tool ----


def _tool(command, folder):
    return run_program(f"tool.weights.__main__ {command}", folder)


def test_show_lists_names_shapes_types_and_hashes(tmp_path):
    state = {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "b": torch.tensor(7),
        "c": torch.ones(2).bfloat16(),
    }
    torch.save(state, tmp_path / "a.pth")
    outcome = _tool("show a.pth --json a.json", tmp_path).check()
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


def test_converted_file_starts_everything(tmp_path, lines):
    source = _classifier(1, num_classes=7)
    state = {f"module.{name}": value.half() for name, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    command = "convert a.pth b.pth --network network.tiny_aff"
    outcome = _tool(command, tmp_path).check()
    assert "written to b.pth" in outcome.out
    converted = torch.load(tmp_path / "b.pth", weights_only=True)
    wanted = {k: v.half().float() for k, v in source.state_dict().items() if k != "fc8.weight"}
    assert _equal(converted, wanted)
    for net in (tiny_cls.Net(), tiny_aff.Net()):
        load_for_training(net, str(tmp_path / "b.pth"), lines.append)
        assert torch.equal(net.trunk4.weight, wanted["trunk4.weight"])


def test_file_of_another_network_is_not_converted(tmp_path):
    torch.save(_classifier(1).state_dict(), tmp_path / "a.pth")
    command = "convert a.pth b.pth --network network.vgg16_cls"
    _tool(command, tmp_path).assert_failed(1, "a.pth", "the tiny network", "conv1_1.weight")
    assert not (tmp_path / "b.pth").exists()


def test_importing_a_network_loads_no_reader_of_files():
    program = """
import sys, network.vgg16_cls
print(*sorted(sys.modules))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    readers = {"tool.maps", "tool.weights", "tool.run", "voc12", "PIL", "safetensors"}
    assert not readers & set(done.stdout.split())
