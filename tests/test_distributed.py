"""Several processes compute what one does; signals, devices and random numbers of any of them."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from forked import run_forked
from helpers import (
    REPOSITORY,
    TINY_TRAINING,
    Outcome,
    contents,
    run_program,
    write_training_data,
)

from tool.affinity import affinity_loss, pair_labels
from tool.run import devices
from tool.run.errors import UsageError

CPU = torch.device("cpu")
# Five steps; five images a step divide by neither two nor three ranks.
IMAGES = 32
COMMANDS = {
    name: f"{command} --batch_size 5 --max_epoches 1 --log_every 2 --num_workers 0"
    for name, command in TINY_TRAINING.items()
}
each_program = pytest.mark.parametrize("name", COMMANDS)
SIZES = (1, 2, 3)
MOST = max(SIZES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of several processes, made at once: (folder, outcomes by name of the run)."""
    folder = write_training_data(tmp_path_factory.mktemp("ranks"), IMAGES)
    planned = {}

    def plan(run, command, **options):
        (folder / run).mkdir(exist_ok=True)
        flags = f"--session_name {run}/net"
        planned[run] = {"command": f"{command} {flags}", "cwd": folder, **options}

    for name, command in COMMANDS.items():
        for ranks in SIZES:
            seen = f"{name}{ranks}"
            plan(seen, command, ranks=ranks, dropout=False, seen=folder / seen)
    plan("forked", COMMANDS["cls"], ranks=2)
    plan("dropout", COMMANDS["cls"], ranks=2, seen=folder / "dropout")
    stop = {"signal": "SIGTERM", "at_rank": 1, "at_step": 2}
    plan("stopped", COMMANDS["cls"], ranks=2, dropout=False, **stop)
    resumed = planned["stopped"]["command"]
    planned["resumed"] = {"command": resumed, "cwd": folder, "ranks": 3, "dropout": False}
    kill = {"signal": "SIGKILL", "at_rank": 1, "at_step": 2}
    plan("killed", COMMANDS["aff"], ranks=2, **kill)
    plan("crowded", f"{COMMANDS['cls']} --batch_size 1", ranks=2)
    outcomes = run_forked(*planned.values())
    return folder, {
        run: [Outcome(*rank) for rank in ranks]
        for run, ranks in zip(planned, outcomes, strict=True)
    }


def assert_close(folder, run, reference):
    """The weights, and the figures of the tables, differ by rounding only."""
    ours, theirs = (torch.load(folder / name / "net.pth") for name in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)
    ours, theirs = (table(folder / name / "net.csv") for name in (run, reference))
    assert [row["step"] for row in ours] == [2, 4, 5]
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=2e-6)


def table(path):
    """A .csv's rows as numbers, without the speed."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if k != "images_per_second"} for row in rows]


# Training with several ranks


@each_program
@pytest.mark.parametrize("ranks", SIZES[1:])
def test_several_ranks_give_the_weights_and_losses_of_one(name, ranks, runs):
    folder, outcomes = runs
    for outcome in outcomes[f"{name}{ranks}"]:
        outcome.check()
    assert_close(folder, f"{name}{ranks}", f"{name}1")
    start = torch.load(folder / f"{name}1" / "net.pth")
    torch.manual_seed(0)
    network = __import__(f"network.tiny_{name}", fromlist="Net").Net()
    moved = max((start[k] - v).abs().max() for k, v in network.state_dict().items())
    assert moved > 1e-3


@each_program
@pytest.mark.parametrize("ranks", SIZES[1:])
def test_several_ranks_see_the_data_of_one_in_each_step(name, ranks, runs):
    folder, _ = runs

    def steps(count):
        seen = [json.loads((folder / f"{name}{count}/{r}.json").read_text()) for r in range(count)]
        return [[d for rank in step for d in rank["images"]] for step in zip(*seen, strict=True)]

    assert [len(set(step)) for step in steps(ranks)] == [5] * 5
    assert steps(ranks) == steps(1)


def test_ranks_share_a_batch_evenly(runs):
    folder, _ = runs
    counts = [
        {len(step["images"]) for step in json.loads((folder / f"cls3/{r}.json").read_text())}
        for r in range(3)
    ]
    assert sorted(counts, key=max) == [{1}, {2}, {2}]


def test_ranks_draw_dropout_of_their_own(runs):
    folder, _ = runs
    masks = [
        step["kept"]
        for rank in range(2)
        for step in json.loads((folder / f"dropout/{rank}.json").read_text())
    ]
    assert len(masks) == len(set(masks)) == 10


@each_program
def test_first_rank_alone_writes_and_prints(name, runs):
    folder, outcomes = runs
    first, *others = outcomes[f"{name}3"]
    files = {path for path in contents(folder / f"{name}3") if not path.endswith(".json")}
    assert files == {"net.pth", "net.log", "net.csv"}
    assert "processes: 3" in (folder / f"{name}3/net.log").read_text()
    assert "epoch 1/1: " in first.out
    assert [outcome.out for outcome in others] == ["", ""]
    assert not any("%" in outcome.err for outcome in others)  # no progress bars


def test_signal_to_one_rank_stops_all_and_any_number_continues(runs):
    folder, outcomes = runs
    assert [outcome.code for outcome in outcomes["stopped"]] == [143, 143]
    for outcome in outcomes["stopped"]:
        assert "interrupted: stopped/net.ckpt holds the run after step 2 of 5" in outcome.err
    for outcome in outcomes["resumed"]:
        outcome.check()
    assert outcomes["resumed"][0].out.startswith("resumed after step 2\n")
    assert_close(folder, "stopped", "cls1")


def test_lost_rank_is_one_clear_error_of_the_others(runs):
    left, lost = runs[1]["killed"]
    assert lost.code == -signal.SIGKILL
    left.assert_failed(1, "process 0 of 2 has lost the others")


def test_torchrun_starts_training(runs):
    folder, _ = runs
    (folder / "torchrun").mkdir()
    name, *words = f"{COMMANDS['cls']} --session_name torchrun/net".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", REPOSITORY / f"{name}.py", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "epoch 1/1: " in done.stdout
    weights = [(folder / run / "net.pth").read_bytes() for run in ("torchrun", "forked")]
    assert weights[0] == weights[1]


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 5, 12])
def test_shares_are_the_whole_in_order_and_even(size, length, monkeypatch):
    monkeypatch.setattr(devices, "world_size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(devices, "rank", lambda rank=rank: rank)
        shares.append(list(devices.shard(range(length))))
    assert [item for share in shares for item in share] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_the_affinity_loss_add_up_to_the_whole():
    torch.manual_seed(0)
    affinity = torch.rand(5, 34, 30, dtype=torch.float64)
    label = torch.randint(0, 3, (5, 9, 14)) * 255 % 257  # 0, 255 and 253
    radius = 5
    kinds = pair_labels(label, radius)
    affinity = affinity[..., : kinds[0].shape[-1]]
    counts = torch.stack([kind.sum() for kind in kinds])
    whole = affinity_loss(affinity, *kinds)
    shares = [
        affinity_loss(*(tensor[part] for tensor in (affinity, *kinds)), lambda own: counts)
        for part in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    assert counts.min() > 0
    for name, value in whole.items():
        assert sum(share[name] for share in shares).item() == pytest.approx(value.item(), rel=1e-12)


# Devices


@pytest.fixture
def launched(monkeypatch):
    """This process believes that torchrun started it as the last of two on one machine."""
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_launched_processes_take_a_gpu_each(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert devices.choose_device("auto") == torch.device("cuda:1")
    assert devices.choose_device("cuda") == torch.device("cuda:1")
    assert devices.choose_device("cpu") == CPU
    with pytest.raises(UsageError, match=r"--device cuda:0: .*cannot share"):
        devices.choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"2 processes .* with 1 GPU.*--nproc_per_node"):
        devices.choose_device("cuda")


@each_program
def test_bf16_changes_the_losses_by_rounding(name, runs):
    folder, _ = runs
    command = f"{COMMANDS[name]} --device cpu --lr 1e-6 --session_name half/{name}"
    losses = []
    for flags in ("", "--amp bf16"):
        run_program(f"{command} {flags}", folder).check()
        losses.append(table(folder / f"half/{name}.csv")[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_compile_compiles_the_network(runs, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net)))
    run_program(f"{COMMANDS['cls']} --compile --session_name compiled/cls", runs[0]).check()
    assert [net.__module__ for net in compiled] == ["network.tiny_cls"]


# Random numbers


def test_random_states_come_back_from_a_file(tmp_path):
    torch.save(devices.random_states(CPU), tmp_path / "states")
    first = torch.rand(3)
    states = torch.load(tmp_path / "states", weights_only=True)
    devices.restore_random_states(states, CPU)
    assert torch.equal(torch.rand(3), first)


def test_ranks_but_the_first_are_seeded_by_themselves(monkeypatch):
    drawn = set()
    for rank in range(3):
        monkeypatch.setattr(devices, "rank", lambda rank=rank: rank)
        for step in (0, 7):
            torch.manual_seed(5)
            devices.seed_rank(5, step)
            drawn.add(torch.rand(()).item())
    torch.manual_seed(5)
    assert torch.rand(()).item() in drawn
    assert len(drawn) == 1 + 2 * 2


# Signals


@pytest.mark.parametrize("number", devices.STOP_SIGNALS)
def test_signal_is_remembered(number):
    before = [signal.getsignal(n) for n in devices.STOP_SIGNALS]
    with devices.StopSignals() as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), number)
        assert stop.agreed() == stop.received == number
        os.kill(os.getpid(), signal.SIGTERM)  # adds nothing to the first
    assert [signal.getsignal(n) for n in devices.STOP_SIGNALS] == before


def test_second_sigint_interrupts_at_once():
    with devices.StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_second_sigint_from_a_launcher_does_not(launched):
    with devices.StopSignals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
