"""Optimizer, schedule, the loop and what it writes, on a network of four numbers."""

import argparse
import csv
import errno
import math
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import TINY_TRAINING, run_program, write_training_data
from torch import nn

from tool.run import cli
from tool.run.cli import add_training_arguments
from tool.run.errors import DataError, UsageError
from tool.run.loading import shuffled
from tool.run.log import Log, describe_run
from tool.run.training import (
    build_optimizer,
    diverged,
    end_epoch,
    finish,
    name_lack_of_memory,
    remaining_batches,
    session_name,
    start_training,
    train_one_epoch,
)

CPU = torch.device("cpu")
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

    def start(net, steps, epochs=1, flags="", num_images=None):
        parser = argparse.ArgumentParser()
        add_training_arguments(parser, batch_size=2, epochs=epochs, crop_size=8)
        words = f"--weights none --session_name {tmp_path / 'run'} --lr {LR} {flags}".split()
        num_images = num_images or 2 * steps
        return start_training(parser.parse_args(words), net, num_images, CPU, {}, "a note")

    return start


def _batches(*values):
    return iter([torch.tensor(value) for value in values])


def train(run, epochs, *values):
    """Train that many epochs on these batches; returns the last one's mean losses."""
    batches = _batches(*values)
    for _ in range(epochs):
        means = train_one_epoch(run, batches, _losses_of)
        end_epoch(run, {})
    assert next(batches, None) is None
    return means


@pytest.mark.parametrize(("given", "momentum"), [((), DECAY), ((0.9,), 0.9), ((0.0,), 0)])
def test_momentum_is_the_decay_unless_given(given, momentum):
    optimizer = build_optimizer(FourGroups(), LR, DECAY, *given)
    assert {group["momentum"] for group in optimizer.param_groups} == {momentum}


def test_two_steps_equal_sgd_by_hand(training):
    net = FourGroups()
    train(training(net, 2), 1, 0.5, -0.25)

    for value, rate, decay in zip(net.values, RATES, (DECAY, 0, DECAY, 0), strict=True):
        expected, velocity = 1.0, 0.0
        for step, gradient in enumerate((0.5, -0.25)):
            velocity = DECAY * velocity + gradient + decay * expected  # momentum is the decay
            expected -= rate * LR * (1 - step / 2) ** 0.9 * velocity
        assert value.item() == pytest.approx(expected, rel=1e-6)


def test_a_last_short_batch_is_dropped(training):
    run = training(FourGroups(), 0, epochs=15, flags="--batch_size 16", num_images=10_582)
    assert (run.steps_per_epoch, run.max_step) == (661, 661 * 15)


def test_session_is_named_after_the_network_unless_named():
    network = type(sys)("network.tiny_cls")
    assert session_name(argparse.Namespace(session_name=None, network=network)) == "tiny_cls"
    assert session_name(argparse.Namespace(session_name="mine", network=network)) == "mine"


def test_batches_follow_the_order_of_their_epoch(training):
    run = training(FourGroups(), 0, epochs=3, flags="--seed 3", num_images=7)
    batches = list(remaining_batches(run))
    assert [len(batch) for batch in batches] == [2] * 9
    pairs = [(epoch, index) for epoch in range(3) for index in shuffled(7, 3, epoch)[:6]]
    assert [pair for batch in batches for pair in batch] == pairs
    for run.step in range(10):
        assert list(remaining_batches(run)) == batches[run.step :]


def test_epoch_returns_the_mean_of_each_loss(training):
    run = training(FourGroups(), 3, flags="--lr 1e-12 --wt_dec 0 --log_every 2")  # hardly moves
    means = train(run, 1, 1.0, 2.0, 6.0)
    assert means == pytest.approx({"loss": 3 * 4, "half": 3 * 2}, rel=1e-5)


def test_epochs_are_in_training_mode_and_continue_the_learning_rate(training):
    net, modes, rates = FourGroups().eval(), [], []
    run = training(net, 4, epochs=3)
    run.optimizer.register_step_pre_hook(lambda *_: modes.append(net.training))
    run.optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    train(run, 3, *[0.1] * 12)
    assert modes == [True] * 12
    assert rates == pytest.approx([LR * (1 - step / 12) ** 0.9 for step in range(12)], rel=1e-12)


@pytest.mark.parametrize("log_every", [1, 2, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_with_its_parts_and_the_step(bad, log_every, training):
    run = training(FourGroups(), 3, epochs=2, flags=f"--log_every {log_every} --lr 1e-6")
    train(run, 1, 0.01, 0.01, 0.01)
    before = run.checkpoint.read_bytes()
    with pytest.raises(DataError, match=rf"step 5 \(loss {bad}, half {bad}\)"):
        train(run, 1, 0.01, bad, 0.01)
    assert run.checkpoint.read_bytes() == before


def test_checkpoint_is_not_written_after_a_loss_that_is_not_finite(training):
    run = training(FourGroups(), 3, flags="--save_every 1")
    with pytest.raises(DataError, match="step 1 "):
        train(run, 1, math.nan, 0.01, 0.01)
    assert not run.checkpoint.exists()


def test_table_has_the_mean_losses_of_the_steps_between_its_rows(training):
    run = training(FourGroups(), 5, epochs=2, flags="--log_every 3 --lr 1e-12 --wt_dec 0")
    train(run, 2, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    rows = list(csv.DictReader(Path(f"{run.session}.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["3", "5", "6", "9", "10"]
    assert [row["epoch"] for row in rows] == ["1", "1", "2", "2", "2"]
    batch_means = [2.0, 4.5, 6.0, 8.0, 10.0]
    assert [float(row["loss"]) for row in rows] == pytest.approx([4 * mean for mean in batch_means])
    assert [float(row["half"]) for row in rows] == pytest.approx([2 * mean for mean in batch_means])
    rates = [1e-12 * (1 - (step - 1) / 10) ** 0.9 for step in (3, 5, 6, 9, 10)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    assert all(float(row["images_per_second"]) > 0 for row in rows)


def test_a_file_system_or_platform_without_locks_is_no_obstacle(training, monkeypatch):
    lockf = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr("tool.run.log.fcntl.lockf", lockf)
    assert Path(f"{training(FourGroups(), 1).session}.log").read_text().endswith("a note\n")
    monkeypatch.setattr("tool.run.log.fcntl", None)
    assert Path(f"{training(FourGroups(), 1).session}.log").read_text().endswith("a note\n")
    lockf.assert_called()


def test_checkpoint_goes_when_the_weights_are_complete(training, tmp_path, capsys):
    run = training(FourGroups(), 2, epochs=2, flags="--lr 1e-6")
    train(run, 2, 0.1, 0.1, 0.1, 0.1)
    assert run.checkpoint.exists()
    finish(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "run.log", "run.pth"]
    finished = (tmp_path / "run.pth").read_bytes()
    assert "of a finished training" not in capsys.readouterr().out
    training(FourGroups(), 2)  # which replaces it when it ends
    assert re.search(r"WARNING: .*run\.pth .*finished.*--session_name", capsys.readouterr().out)
    assert (tmp_path / "run.pth").read_bytes() == finished


def test_lack_of_memory_is_one_sentence_with_the_flags(training):
    run = training(FourGroups(), 1)
    run.optimizer.register_step_pre_hook(mock.Mock(side_effect=MemoryError))
    with pytest.raises(DataError, match=r"out of memory on cpu in step 1; .*--batch_size.*--amp"):
        train_one_epoch(run, _batches(0.1), _losses_of)
    error = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    with pytest.raises(DataError, match="out of memory here; "), name_lack_of_memory("here"):
        raise error
    with mock.patch("sys.argv", ["p"]), pytest.raises(SystemExit) as ended:
        cli.run(argparse.ArgumentParser(), mock.Mock(side_effect=error))
    assert ended.value.code == 1


def test_fp16_that_overflows_names_bf16(training):
    run = training(FourGroups(), 1)
    run.scaler = mock.Mock(is_enabled=lambda: True)
    assert "--amp bf16" in str(diverged(run, "the loss is not finite"))


def test_loss_that_is_not_finite_names_the_fresh_layers(training):
    run = training(FourGroups(), 1)
    run.fresh_layers = ["fc6", "fc7"]
    with pytest.raises(
        DataError, match=r"step 1 .*; fc6 and fc7 were not in the weights: try --lr"
    ):
        train_one_epoch(run, _batches(math.nan), _losses_of)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cls", "aff"])
def test_resnet50_learns(kind, tmp_path):
    write_training_data(tmp_path, 5)
    command = TINY_TRAINING[kind].replace("tiny_", "resnet50_")
    flags = "--lr 1e-4 --max_epoches 6 --num_workers 0 --log_every 1 --session_name run"
    run_program(f"{command} {flags}", tmp_path).check()
    with open(tmp_path / "run.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert max(losses[-2:]) < min(losses[:2])


def test_weights_that_are_not_finite_are_not_written(training, tmp_path):
    net = FourGroups()
    run = training(net, 1)
    net.values[2].data.fill_(math.inf)
    with pytest.raises(DataError, match=r"values\.2 is not finite.*no weights were written.*--lr"):
        finish(run)
    assert not (tmp_path / "run.pth").exists()


def test_logs_of_equal_runs_are_equal_and_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", "--session_name", "two words"])

    def text(session, seed):
        log = Log(session, describe_run(seed, CPU))
        log.start(["a note"])
        log.write("epoch 1/2: loss 0.5")
        return session.with_suffix(".log").read_text()

    first = text(tmp_path / "a" / "s", 3)
    assert text(tmp_path / "b" / "s", 3) == text(tmp_path / "a" / "s", 3) == first
    assert text(tmp_path / "a" / "s", 4) != first
    versions = (f"torch {torch.__version__}", f"numpy {np.__version__}", "seed: 3, device: cpu")
    for part in ("train_cls.py --session_name 'two words'\n", *versions, "\nhardware: "):
        assert part in first
    assert first.endswith("processes: 1\na note\nepoch 1/2: loss 0.5\n")
    assert capsys.readouterr().out.startswith("a note\nepoch 1/2: loss 0.5\n")


def test_resumed_log_and_table_forget_what_came_after_the_checkpoint(tmp_path):
    log = Log(tmp_path / "s", ["command: a", "hardware: b"])
    log.start(["kept"])
    log.write_row(10, {"epoch": 1, "lr": 0.1, "loss": 1 / 3})
    texts = dict(log.texts)
    log.write("lost")
    log.write_row(20, {"epoch": 2, "lr": 0.1, "loss": 2})

    resumed = Log(tmp_path / "s", ["command: a", "hardware: c"])
    resumed.resume(texts, 10)
    resumed.write_row(20, {"epoch": 2, "lr": 1e-12, "loss": 12345678})
    lines = ["command: a", "hardware: b", "kept", "resumed after step 10", "resumed hardware: c"]
    assert (tmp_path / "s.log").read_text().splitlines() == lines
    rows = "step,epoch,lr,loss\n10,1,0.1,0.3333333\n20,2,1e-12,1.234568e+07\n"
    assert (tmp_path / "s.csv").read_text() == rows


def test_a_line_that_cannot_be_printed_is_in_the_log(tmp_path, monkeypatch):
    log = Log(tmp_path / "s", [])
    log.start([])
    monkeypatch.setattr("builtins.print", mock.Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        log.write("epoch 1/2: 写 \udcfc")  # as in a path that is not UTF-8
    assert (tmp_path / "s.log").read_text().endswith("epoch 1/2: 写 \\udcfc\n")


def test_tensorboard_gets_the_rows_where_it_is_asked_for(tmp_path, monkeypatch):
    module = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = Log(tmp_path / "s", [], "tb")
    log.start([])
    log.write_row(10, {"lr": 0.1, "loss": 0.5})
    log.plot(10, {"validation loss": 0.25})
    module.SummaryWriter.assert_called_once_with("tb")
    added = [call.args for call in module.SummaryWriter.return_value.add_scalar.call_args_list]
    assert added == [("lr", 0.1, 10), ("loss", 0.5, 10), ("validation loss", 0.25, 10)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Log(tmp_path / "s", []).start([])
    with pytest.raises(UsageError, match=r"--tensorboard tb: .*not installed.*pip install"):
        Log(tmp_path / "s", [], "tb")
