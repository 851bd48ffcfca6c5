"""Several processes compute what one does; signals and devices of any of them."""

import csv
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from forked import run_forked
from helpers import REPOSITORY, TINY_TRAINING, Outcome, contents, run_program, write_training_data

from tool.run import devices
from tool.run.cli import default_num_workers
from tool.run.errors import DataError, Interrupted, UsageError
from voc12.devkit import read_ids

CPU = torch.device("cpu")
# Five steps; five images a step divide by neither two nor three ranks.
IMAGES = 32
COMMANDS = {
    name: f"{command} --batch_size 5 --max_epoches 1 --log_every 2 --num_workers 0"
    for name, command in TINY_TRAINING.items()
}
COMMANDS["seg"] = COMMANDS["seg"].replace("--max_epoches 1", "--max_iters 5")
each_program = pytest.mark.parametrize("name", COMMANDS)
RANKS = {"cls": 3, "aff": 2, "seg": 2}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of several processes, made at once: (folder, outcomes by name of the run)."""
    folder = write_training_data(tmp_path_factory.mktemp("ranks"), IMAGES)
    planned = {}

    def plan(run, name, into=None, **options):
        into = into or run
        (folder / into).mkdir(exist_ok=True)
        command = f"{COMMANDS[name]} --session_name {into}/net"
        planned[run] = {"command": command, "cwd": folder, **options}

    for name, most in RANKS.items():
        for ranks in (1, most):
            run = f"{name}{ranks}"
            plan(run, name, ranks=ranks, dropout=False, seen=folder / run)
    plan("dropout", "cls", ranks=2, seen=folder / "dropout")
    stop = {"signal": "SIGTERM", "at_rank": 1, "at_step": 2}
    plan("stopped", "cls", ranks=2, dropout=False, **stop)
    plan("resumed", "cls", into="stopped", ranks=3, dropout=False)
    plan("killed", "aff", ranks=2, signal="SIGKILL", at_rank=1, at_step=2)
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


def seen(folder, run, ranks):
    """What each rank recorded of each step."""
    return [json.loads((folder / run / f"{rank}.json").read_text()) for rank in range(ranks)]


# Training with several ranks


@each_program
def test_several_ranks_give_the_weights_and_losses_of_one(name, runs):
    folder, outcomes = runs
    several = f"{name}{RANKS[name]}"
    for outcome in outcomes[several]:
        outcome.check()
    assert_close(folder, several, f"{name}1")
    weights = torch.load(folder / several / "net.pth")
    torch.manual_seed(0)
    network = __import__(f"network.tiny_{name}", fromlist="Net").Net()
    moved = max((weights[k] - v).abs().max() for k, v in network.state_dict().items())
    assert moved > 1e-3


@each_program
def test_several_ranks_see_the_data_of_one_in_each_step(name, runs):
    def steps(ranks):
        by_step = zip(*seen(runs[0], f"{name}{ranks}", ranks), strict=True)
        return [[image for rank in step for image in rank["images"]] for step in by_step]

    assert [len(set(step)) for step in steps(1)] == [5] * 5
    assert steps(RANKS[name]) == steps(1)


def test_ranks_draw_dropout_of_their_own(runs):
    masks = [step["kept"] for steps in seen(runs[0], "dropout", 2) for step in steps]
    assert len(masks) == len(set(masks)) == 10


def test_first_rank_alone_writes_and_prints(runs):
    folder, outcomes = runs
    first, *others = outcomes["cls3"]
    files = {path for path in contents(folder / "cls3") if not path.endswith(".json")}
    assert files == {"net.pth", "net.log", "net.csv"}
    assert "processes: 3" in (folder / "cls3/net.log").read_text()
    assert "epoch 1/1: " in first.out
    assert [outcome.out for outcome in others] == ["", ""]
    assert not any("%" in outcome.err for outcome in others)  # no progress bars


def test_signal_to_one_rank_stops_all_and_any_number_continues(runs):
    folder, outcomes = runs
    assert [outcome.code for outcome in outcomes["stopped"]] == [143, 143]
    for outcome in outcomes["stopped"]:
        assert "interrupted: stopped/net.ckpt holds the run after step 2 of 5" in outcome.err
    first, *_ = [outcome.check() for outcome in outcomes["resumed"]]
    assert first.out.startswith("resumed after step 2\n")
    assert_close(folder, "stopped", "cls1")


def test_lost_rank_is_one_clear_error_of_the_others(runs):
    left, lost = runs[1]["killed"]
    assert lost.code == -signal.SIGKILL
    left.assert_failed(1, "process 0 of 2 has lost the others")


def test_torchrun_starts_training(runs):
    folder = runs[0]
    (folder / "torchrun").mkdir()
    name, *words = f"{COMMANDS['cls']} --session_name torchrun/net".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", REPOSITORY / f"{name}.py", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SLURM_NTASKS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "epoch 1/1: " in done.stdout
    weights = [(folder / run / "net.pth").read_bytes() for run in ("torchrun", "dropout")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("task", ["RANK 1", "WORLD_SIZE 2", "SLURM_NTASKS 16"])
def test_tasks_that_torchrun_does_not_join_are_refused(task, runs, monkeypatch):
    name, value = task.split()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(name, value)
    infer = "infer_cls --network network.tiny_cls --weights none --voc12_root VOC --out_cam new"
    for command in (*COMMANDS.values(), infer):
        run_program(command, runs[0]).assert_failed(2, f"{name} is {value}", "torchrun", "srun")


@pytest.mark.parametrize("value", ["", "0", "1", "2(x3)"])
def test_a_single_task_of_another_launcher_runs_alone(value, monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.setenv(name, value)
    with devices.process_group(CPU):
        assert devices.world_size() == 1


# Shards


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_are_the_whole_in_order_and_even(size, monkeypatch):
    monkeypatch.setattr(devices, "world_size", lambda: size)
    for length in (0, 1, 5, 12):
        shards = []
        for rank in range(size):
            monkeypatch.setattr(devices, "rank", lambda rank=rank: rank)
            shards.append(list(devices.shard(range(length))))
        assert [item for shard in shards for item in shard] == list(range(length))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


# Devices


@pytest.fixture
def launched(monkeypatch):
    """This process believes that torchrun started it as the last of two on one machine."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_launched_processes_take_a_gpu_each(launched, monkeypatch):
    FakeGPU(monkeypatch)
    assert devices.choose_device("auto") == torch.device("cuda:1")
    assert devices.choose_device("cuda") == torch.device("cuda:1")
    assert devices.choose_device("cpu") == CPU
    with pytest.raises(UsageError, match=r"--device cuda:0: .*cannot share"):
        devices.choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"2 processes .* with 1 GPU.*--nproc_per_node"):
        devices.choose_device("cuda")


def test_processes_of_a_machine_share_its_cores_out(launched, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    for processes, workers in ((1, 8), (2, 6), (5, 2), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_num_workers() == workers


class FakeGPU:
    """A GPU of this compute capability, whose first kernel raises ``error``."""

    def __init__(self, monkeypatch, error=None, capability=(6, 1)):
        def run_kernel(device):
            if error and device.type == "cuda":
                raise error

        monkeypatch.setattr(devices, "_run_kernel", run_kernel)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "set_device", self.choose)
        self.chosen = None

    def choose(self, device):
        self.chosen = device


NO_KERNEL = RuntimeError("CUDA error: no kernel image is available for execution on the device")


def test_auto_leaves_a_gpu_without_kernels_and_says_so(monkeypatch, capsys):
    FakeGPU(monkeypatch, NO_KERNEL)
    assert devices.choose_device("auto") == CPU
    assert "WARNING: using the CPU: the GPU fails (CUDA error: no kernel" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--device cuda: not usable .*no kernel.*cpu"):
        devices.choose_device("cuda")


def test_auto_does_not_leave_a_full_gpu_or_other_ranks(monkeypatch, request):
    FakeGPU(monkeypatch, RuntimeError("CUDA error: out of memory"))
    with pytest.raises(UsageError, match="out of memory"):
        devices.choose_device("auto")
    FakeGPU(monkeypatch, NO_KERNEL)
    request.getfixturevalue("launched")
    with pytest.raises(UsageError, match="no kernel"):
        devices.choose_device("auto")


@pytest.mark.parametrize(("name", "chosen"), [("cuda:1", "cuda:1"), ("cuda", None), ("cpu", None)])
def test_current_device_is_the_one_that_is_named(name, chosen, monkeypatch):
    gpu = FakeGPU(monkeypatch)
    with devices.process_group(torch.device(name)):
        assert gpu.chosen == (chosen and torch.device(chosen))


@pytest.mark.parametrize(
    ("capability", "switches", "useless"),
    [
        ((6, 1), devices.Switches("fp16"), ["--amp fp16"]),
        ((7, 5), devices.Switches("fp16", tf32=True), ["--tf32"]),
        ((7, 5), devices.Switches("bf16", tf32=True), ["--amp bf16", "--tf32"]),
        ((8, 0), devices.Switches("bf16", tf32=True), []),
        ((6, 1), devices.Switches(), []),
    ],
)
def test_switches_that_gain_nothing_are_named(capability, switches, useless, monkeypatch, capsys):
    FakeGPU(monkeypatch, capability=capability)
    devices._warn_of_useless(switches, torch.device("cuda"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" gains")[0] for line in lines] == [f"WARNING: {flag}" for flag in useless]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[../gloo/tcp/pair.cc:534] Connection closed by peer [::1]:99", "has lost the others"),
        ("The client socket has timed out after 60s while trying to connect", "has lost"),
        ("NCCL error\nLast error:\nDuplicate GPU detected", "NCCL error Last error: Duplicate"),
        ("shape '[2]' is invalid", None),
        ("NCCL error: unhandled cuda error, out of memory", None),
    ],
)
def test_failed_exchange_is_told_from_other_errors(text, words, launched, monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    with (
        pytest.raises(DataError if words else RuntimeError, match=re.escape(words or text)),
        devices.process_group(CPU),
    ):
        raise RuntimeError(text)


def test_group_is_left_when_all_ranks_are_interrupted(launched, monkeypatch):
    left = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(1))
    with pytest.raises(Interrupted), devices.process_group(CPU):
        raise Interrupted(15, "")
    assert left == [1]


@each_program
def test_bf16_changes_the_losses_by_rounding(name, runs):
    folder = runs[0]
    (folder / "two.txt").write_text("\n".join(read_ids(folder / "lists" / "train.txt")[:2]))
    losses = []
    for amp in ("", "--amp bf16"):
        flags = f"--train_list two.txt --batch_size 2 --session_name half/{name} {amp}"
        run_program(f"{COMMANDS[name]} {flags}", folder).check()
        losses.append(table(folder / f"half/{name}.csv")[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_compile_compiles_the_network(runs, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net)))
    run_program(f"{COMMANDS['cls']} --compile --session_name compiled/cls", runs[0]).check()
    assert [net.__module__ for net in compiled] == ["network.tiny_cls"]


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
