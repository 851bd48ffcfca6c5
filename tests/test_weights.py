"""Weight files: every form is read, no code runs, and a foreign file says what it is."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from network import tiny_aff, tiny_cls, vgg16_cls
from tool.errors import DataError
from tool.weights import describe, load_for_inference, load_for_training, read_state_dict


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
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(DataError, match=re.escape(f"{missing}: no such weight file")):
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
    assert "fresh: fc8.weight" in say
    with pytest.raises(DataError, match=r"fc8\.weight missing"):
        load_for_inference(net, str(path), say)


def test_head_of_other_classes_is_fresh_for_training_and_wrong_at_inference(path, say):
    source, net = _classifier(1, num_classes=1000), _classifier(2, num_classes=3)
    fresh = net.fc8.weight.clone()
    torch.save(source.state_dict(), path)
    load_for_training(net, str(path), say)
    assert torch.equal(net.fc8.weight, fresh)
    assert torch.equal(net.trunk4.weight, source.trunk4.weight)
    assert "fresh: fc8.weight" in say
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
    fresh = next(message for message in say if message.startswith("fresh: "))
    assert f"and {len(head) - 3} more" in fresh


def test_whole_file_leaves_nothing_fresh(path, say):
    torch.save(_classifier(1).state_dict(), path)
    load_for_training(_classifier(2), str(path), say)
    assert "fresh: none" in say
    assert str(path) in say.text
    assert "unused" not in say.text


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
