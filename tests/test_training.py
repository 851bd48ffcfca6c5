"""Optimizer, schedule, the loop and what it writes, on a network of four numbers."""

import argparse
import builtins
import csv
import math
import os
import signal
import sys

import pytest
import torch
from torch import nn

from tool.run.devices import StopSignals
from tool.run.errors import DataError, Interrupted
from tool.run.loading import shuffled
from tool.run.training import (
    Schedule,
    Training,
    add_training_arguments,
    build_optimizer,
    make_schedule,
    remaining_batches,
    save_weights,
    session_name,
    set_poly_lr,
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


@pytest.fixture
def training(tmp_path):
    """``training(net, steps_per_epoch, epochs, flags)``: a run on the CPU, session ``run``."""

    def start(net, steps, epochs=1, flags=""):
        parser = argparse.ArgumentParser()
        add_training_arguments(parser, batch_size=2, epochs=epochs, crop_size=8)
        words = f"--weights none --session_name {tmp_path / 'run'} --lr {LR} {flags}".split()
        args = parser.parse_args(words)
        schedule = Schedule(2 * steps, args.batch_size, epochs)
        device = torch.device("cpu")
        return Training(args, net, schedule, device, StopSignals(), {}, ["a note"])

    return start


def _batches(*values):
    return iter([torch.tensor(value) for value in values])


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


def test_two_steps_equal_sgd_by_hand(training):
    net = FourGroups()
    training(net, 2).train_epoch(_batches(0.5, -0.25), _losses_of)

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


def test_arguments_default_to_the_method():
    parser = argparse.ArgumentParser()
    add_training_arguments(parser, batch_size=8, epochs=3, crop_size=448)
    args = parser.parse_args(["--weights", "none"])
    assert (args.batch_size, args.max_epoches, args.crop_size) == (8, 3, 448)
    assert (args.lr, args.wt_dec, args.momentum) == (0.1, 5e-4, None)


def test_session_is_named_after_the_network_unless_named():
    network = type(sys)("network.tiny_cls")
    assert session_name(argparse.Namespace(session_name=None, network=network)) == "tiny_cls"
    assert session_name(argparse.Namespace(session_name="mine", network=network)) == "mine"


def test_batches_follow_the_order_of_their_epoch():
    schedule = Schedule(num_images=7, batch_size=2, epochs=3)
    batches = list(remaining_batches(schedule, seed=3, step=0))
    assert len(batches) == schedule.max_step
    for epoch in range(3):
        expected = [(epoch, index) for index in shuffled(7, 3, epoch)[:6]]
        found = [pair for batch in batches[3 * epoch : 3 * epoch + 3] for pair in batch]
        assert found == expected


@pytest.mark.parametrize("step", range(10))
def test_batches_after_a_step_are_the_rest(step):
    schedule = Schedule(num_images=7, batch_size=2, epochs=3)
    rest = list(remaining_batches(schedule, 3, 0))[step:]
    assert list(remaining_batches(schedule, 3, step)) == rest


# ---- an epoch ----


def test_epoch_returns_the_mean_of_each_loss(training):
    run = training(FourGroups(), 3, flags="--lr 1e-12 --wt_dec 0 --log_every 2")  # hardly moves
    means = run.train_epoch(_batches(1.0, 2.0, 6.0), _losses_of)
    assert means == pytest.approx({"loss": 3 * 4, "half": 3 * 2}, rel=1e-5)


def test_learning_rate_goes_on_from_epoch_to_epoch(training):
    run = training(FourGroups(), 4, epochs=3)
    rates = []
    run.optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    batches = _batches(*[0.1] * 12)
    for _ in range(3):
        run.train_epoch(batches, _losses_of)
        run.end_epoch("")
    assert rates == pytest.approx([LR * (1 - step / 12) ** 0.9 for step in range(12)])
    assert next(batches, None) is None


def test_epoch_puts_the_network_into_training_mode(training):
    modes = []

    def losses_of(net, batch):
        modes.append(net.training)
        return _losses_of(net, batch)

    training(FourGroups().eval(), 1).train_epoch(_batches(1.0), losses_of)
    assert modes == [True]


@pytest.mark.parametrize("log_every", [1, 2, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_with_its_parts_and_the_step(bad, log_every, training):
    run = training(FourGroups(), 3, epochs=2, flags=f"--log_every {log_every} --lr 1e-6")
    run.train_epoch(_batches(0.01, 0.01, 0.01), _losses_of)
    run.end_epoch("")
    before = run.checkpoint.read_bytes()
    with pytest.raises(DataError, match=rf"step 5 \(loss {bad}, half {bad}\)"):
        run.train_epoch(_batches(0.01, bad, 0.01), _losses_of)
    assert run.checkpoint.read_bytes() == before


def test_checkpoint_is_not_written_after_a_loss_that_is_not_finite(training):
    run = training(FourGroups(), 3, flags="--save_every 1")
    with pytest.raises(DataError, match="step 1 "):
        run.train_epoch(_batches(math.nan, 0.01, 0.01), _losses_of)
    assert not run.checkpoint.exists()


def test_losses_are_read_every_few_steps_only(training, monkeypatch):
    reads = []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(len(x)) or read(x))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("a step waits for its loss"))
    run = training(FourGroups(), 10, flags="--log_every 4 --lr 1e-6")
    run.train_epoch(_batches(*[0.1] * 10), _losses_of)
    assert reads == [4, 4, 2]


def test_table_has_the_mean_losses_of_the_steps_between_its_rows(training):
    run = training(FourGroups(), 5, epochs=2, flags="--log_every 3 --lr 1e-12 --wt_dec 0")
    batches = _batches(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    for _ in range(2):
        run.train_epoch(batches, _losses_of)
        run.end_epoch("")
    with open(f"{run.session}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "5", "6", "9", "10"]
    assert [row["epoch"] for row in rows] == ["1", "1", "2", "2", "2"]
    batch_means = [2.0, 4.5, 6.0, 8.0, 10.0]
    assert [float(row["loss"]) for row in rows] == pytest.approx([4 * mean for mean in batch_means])
    assert [float(row["half"]) for row in rows] == pytest.approx([2 * mean for mean in batch_means])
    rates = [1e-12 * (1 - (step - 1) / 10) ** 0.9 for step in (3, 5, 6, 9, 10)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    assert all(float(row["images_per_second"]) > 0 for row in rows)


def test_signal_ends_after_the_step_with_a_checkpoint(training):
    run = training(FourGroups(), 3)

    def losses_of(net, batch):
        run.stop.received = signal.SIGTERM
        return _losses_of(net, batch)

    with pytest.raises(Interrupted, match=r"run\.ckpt .* step 1 of 3") as interrupted:
        run.train_epoch(_batches(0.1, 0.1, 0.1), losses_of)
    assert interrupted.value.signal_number == signal.SIGTERM
    assert training(FourGroups(), 3).position.step == 1


def test_checkpoint_goes_when_the_weights_are_complete(training, tmp_path):
    run = training(FourGroups(), 2, epochs=2, flags="--lr 1e-6")
    for _ in range(2):
        run.train_epoch(_batches(0.1, 0.1), _losses_of)
        run.end_epoch("")
        assert run.checkpoint.exists()
    run.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "run.log", "run.pth"]


# ---- what is written ----


def test_weights_come_back_as_they_were(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    save_weights(tmp_path / "net.pth", net)
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert list(state) == list(net.state_dict())
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_is_named_and_leaves_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "net.pth"
    path.write_text("old")
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda _, mode: real("/dev/full", mode.replace("x", "w")))
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, nn.Conv2d(3, 4, 1))
    monkeypatch.undo()
    assert path.read_text() == "old"


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    net = FourGroups()
    net.values[2].data.fill_(math.inf)
    with pytest.raises(DataError, match=r"values\.2 is not finite.*no weights were written.*--lr"):
        save_weights(tmp_path / "net.pth", net)
    assert list(tmp_path.iterdir()) == []
