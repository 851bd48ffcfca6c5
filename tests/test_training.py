"""Optimizer, schedule, one epoch and the session's log, on a network of four numbers."""

import argparse
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tool.errors import DataError
from tool.training import (
    Schedule,
    SessionLog,
    add_training_arguments,
    build_optimizer,
    make_schedule,
    save_weights,
    session_name,
    set_poly_lr,
    train_one_epoch,
)

LR, DECAY = 0.1, 5e-4
RATES = (1, 2, 10, 20)


class FourGroups(nn.Module):
    """One parameter a group, all 1; each batch's loss is batch * (sum of parameters)."""

    def __init__(self):
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in RATES)

    def get_parameter_groups(self):
        return tuple([value] for value in self.values)


def _losses_of(net, batch):
    total = sum(net.values).squeeze()
    return {"loss": batch * total, "half": batch * total.detach() / 2}


def _train(net, batches, optimizer=None, epoch=0, epochs=1):
    optimizer = optimizer or build_optimizer(net, LR, DECAY)
    schedule = Schedule(num_images=2 * len(batches), batch_size=2, epochs=epochs)
    return train_one_epoch(net, batches, _losses_of, optimizer, schedule, epoch)


# ---- optimizer and learning rate ----


def test_groups_learn_at_1_2_10_20_and_weights_alone_decay():
    optimizer = build_optimizer(FourGroups(), LR, DECAY)
    set_poly_lr(optimizer, 0, 100)
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([rate * LR for rate in RATES])
    assert [group["weight_decay"] for group in groups] == [DECAY, 0, DECAY, 0]


def test_momentum_is_the_decay_unless_given():
    def momenta(*given):
        return {g["momentum"] for g in build_optimizer(FourGroups(), LR, 3e-4, *given).param_groups}

    assert momenta() == {3e-4}
    assert momenta(0.9) == {0.9}
    assert momenta(0.0) == {0}


def test_optimizer_is_plain_sgd():
    optimizer = build_optimizer(FourGroups(), LR, DECAY)
    assert type(optimizer) is torch.optim.SGD
    assert not any(group["nesterov"] or group["dampening"] for group in optimizer.param_groups)


@pytest.mark.parametrize("step", [0, 1, 7, 19])
def test_learning_rate_falls_by_the_power_0_9(step):
    optimizer = build_optimizer(FourGroups(), LR, DECAY)
    for s in range(step + 1):  # it does not compound
        set_poly_lr(optimizer, s, 20)
    expected = [rate * LR * (1 - step / 20) ** 0.9 for rate in RATES]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)


def test_two_steps_equal_sgd_by_hand():
    net = FourGroups()
    _train(net, [torch.tensor(0.5), torch.tensor(-0.25)])

    for value, rate, decay in zip(net.values, RATES, (DECAY, 0, DECAY, 0), strict=True):
        expected, velocity = 1.0, 0.0
        for step, gradient in enumerate((0.5, -0.25)):
            velocity = DECAY * velocity + gradient + decay * expected  # momentum is the decay
            expected -= rate * LR * (1 - step / 2) ** 0.9 * velocity
        assert value.item() == pytest.approx(expected, rel=1e-6)


# ---- schedule ----


def test_schedule_drops_the_last_short_batch():
    schedule = Schedule(num_images=10_582, batch_size=16, epochs=15)
    assert schedule.steps_per_epoch == 661
    assert schedule.max_step == 661 * 15


def test_schedule_of_a_list_smaller_than_a_batch_is_a_data_error():
    args = argparse.Namespace(train_list="few.txt", batch_size=8, max_epoches=2)
    with pytest.raises(DataError, match=r"few\.txt.* 7 images .*batch of 8.*--batch_size"):
        make_schedule(7, args)
    assert make_schedule(8, args) == Schedule(8, 8, 2)


def test_arguments_default_to_the_method(monkeypatch):
    parser = argparse.ArgumentParser()
    add_training_arguments(parser, batch_size=8, epochs=3, crop_size=448)
    args = parser.parse_args(["--weights", "none"])
    assert (args.batch_size, args.max_epoches, args.crop_size) == (8, 3, 448)
    assert (args.lr, args.wt_dec, args.momentum) == (0.1, 5e-4, None)


def test_session_is_named_after_the_network_unless_named():
    network = type(sys)("network.tiny_cls")
    assert session_name(argparse.Namespace(session_name=None, network=network)) == "tiny_cls"
    assert session_name(argparse.Namespace(session_name="mine", network=network)) == "mine"


# ---- an epoch ----


def test_epoch_returns_the_mean_of_each_loss():
    net = FourGroups()
    optimizer = build_optimizer(net, 1e-12, 0)  # hardly moves
    means = _train(net, [torch.tensor(b) for b in (1.0, 2.0, 6.0)], optimizer)
    assert means == pytest.approx({"loss": 3 * 4, "half": 3 * 2}, rel=1e-5)


def test_learning_rate_goes_on_from_epoch_to_epoch():
    net = FourGroups()
    optimizer = build_optimizer(net, LR, DECAY)
    rates = []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    for epoch in range(3):
        _train(net, [torch.tensor(0.1)] * 4, optimizer, epoch, epochs=3)
    assert rates == pytest.approx([LR * (1 - step / 12) ** 0.9 for step in range(12)])


def test_epoch_puts_the_network_into_training_mode():
    net = FourGroups().eval()
    modes = []

    def losses_of(net, batch):
        modes.append(net.training)
        return _losses_of(net, batch)

    train_one_epoch(
        net, [torch.tensor(1.0)], losses_of, build_optimizer(net, LR, DECAY), Schedule(1, 1, 1), 0
    )
    assert modes == [True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_with_its_parts_and_the_step(bad):
    net = FourGroups()
    before = []

    def batches():
        yield torch.tensor(0.01)
        before.extend(value.item() for value in net.values)
        yield torch.tensor(bad)

    schedule = Schedule(num_images=2, batch_size=1, epochs=3)
    optimizer = build_optimizer(net, LR, DECAY)
    with pytest.raises(DataError, match=rf"step 3 \(loss {bad}, half {bad}\)"):
        train_one_epoch(net, batches(), _losses_of, optimizer, schedule, epoch=1)
    assert [value.item() for value in net.values] == before


# ---- what is written ----


def test_weights_come_back_as_they_were(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    save_weights(tmp_path / "net.pth", net)
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert list(state) == list(net.state_dict())
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    net = FourGroups()
    net.values[2].data.fill_(math.inf)
    with pytest.raises(DataError, match=r"values\.2 is not finite.*no weights were written.*--lr"):
        save_weights(tmp_path / "net.pth", net)
    assert list(tmp_path.iterdir()) == []


def _write_log(path, seed):
    log = SessionLog(path, seed, torch.device("cpu"))
    log.say("epoch 1/2: loss 0.5")
    log.say("epoch 2/2: loss 0.25")
    return path.read_text()


def test_logs_of_equal_runs_are_equal(tmp_path):
    first = _write_log(tmp_path / "a" / "s.log", 3)
    assert _write_log(tmp_path / "b" / "s.log", 3) == first
    assert _write_log(tmp_path / "a" / "s.log", 3) == first  # an old log is replaced
    assert _write_log(tmp_path / "a" / "s.log", 4) != first


def test_log_names_command_versions_seed_and_says_what_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", "--session_name", "two words"])
    text = _write_log(tmp_path / "s.log", 3)
    for part in (
        "train_cls.py --session_name 'two words'\n",
        f"torch {torch.__version__}",
        f"numpy {np.__version__}",
        "seed: 3, device: cpu",
        "\nepoch 1/2: loss 0.5\nepoch 2/2: loss 0.25\n",
    ):
        assert part in text
    assert capsys.readouterr().out == "epoch 1/2: loss 0.5\nepoch 2/2: loss 0.25\n"
