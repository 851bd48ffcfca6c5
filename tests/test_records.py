"""The log, the table and TensorBoard's figures of a session."""

import sys
import types

import numpy as np
import pytest
import torch

from tool.run.errors import UsageError
from tool.run.records import Records, describe_run

CPU = torch.device("cpu")
HEAD = ["command: a", "hardware: b"]


def _write_log(session, seed):
    records = Records(session, describe_run(seed, CPU))
    records.start()
    records.say("epoch 1/2: loss 0.5")
    records.say("epoch 2/2: loss 0.25")
    return session.with_suffix(".log").read_text()


def test_logs_of_equal_runs_are_equal(tmp_path):
    first = _write_log(tmp_path / "a" / "s", 3)
    assert _write_log(tmp_path / "b" / "s", 3) == first
    assert _write_log(tmp_path / "a" / "s", 3) == first  # an old log is replaced
    assert _write_log(tmp_path / "a" / "s", 4) != first


def test_log_names_command_versions_hardware_and_says_what_it_is_told(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", "--session_name", "two words"])
    text = _write_log(tmp_path / "s", 3)
    for part in (
        "train_cls.py --session_name 'two words'\n",
        f"torch {torch.__version__}",
        f"numpy {np.__version__}",
        "\nhardware: ",
        " cores\n",
        "seed: 3, device: cpu",
        "processes: 1",
        "\nepoch 1/2: loss 0.5\nepoch 2/2: loss 0.25\n",
    ):
        assert part in text
    assert capsys.readouterr().out == "epoch 1/2: loss 0.5\nepoch 2/2: loss 0.25\n"


def test_table_has_one_head_and_a_row_for_each_step(tmp_path):
    records = Records(tmp_path / "s", HEAD)
    records.start()
    records.row(10, {"epoch": 1, "lr": 0.1, "loss": 1 / 3})
    records.row(20, {"epoch": 2, "lr": 1e-12, "loss": 12345678})
    expected = "step,epoch,lr,loss\n10,1,0.1,0.3333333\n20,2,1e-12,1.234568e+07\n"
    assert (tmp_path / "s.csv").read_text() == expected


def test_resumed_records_forget_what_came_after_the_checkpoint(tmp_path):
    records = Records(tmp_path / "s", HEAD)
    records.start()
    records.say("kept")
    records.row(1, {"loss": 1})
    texts = dict(records.texts)
    records.say("lost")
    records.row(2, {"loss": 2})

    resumed = Records(tmp_path / "s", ["command: a", "hardware: c"])
    resumed.resume(texts, 1)
    resumed.row(2, {"loss": 3})
    log = ["command: a", "hardware: b", "kept", "resumed after step 1", "resumed hardware: c"]
    assert (tmp_path / "s.log").read_text().splitlines() == log
    assert (tmp_path / "s.csv").read_text() == "step,loss\n1,1\n2,3\n"
    assert resumed.texts["csv"] == (tmp_path / "s.csv").read_text()


def test_tensorboard_is_asked_for_only_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Records(tmp_path / "s", HEAD).start()
    with pytest.raises(UsageError, match=r"--tensorboard tb: .*not installed.*pip install"):
        Records(tmp_path / "s", HEAD, "tb")


def test_tensorboard_gets_the_rows_and_more(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, *values):
            seen.append(values)

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    records = Records(tmp_path / "s", HEAD, "tb")
    records.start()
    records.row(10, {"lr": 0.1, "loss": 0.5})
    records.plot(10, {"validation loss": 0.25})
    assert seen == ["tb", ("lr", 0.1, 10), ("loss", 0.5, 10), ("validation loss", 0.25, 10)]
