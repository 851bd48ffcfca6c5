"""What a computation takes of memory: counted, measured, and refused where there is not enough."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY
from torch import nn

from tool import memory
from tool.errors import DataError, UsageError
from tool.memory import MemoryLimit, available_bytes, forward_bytes_per_pixel, training_bytes

CPU = torch.device("cpu")


def tiny(kind="cls"):
    return importlib.import_module(f"network.tiny_{kind}").Net().eval()


@pytest.mark.parametrize(("inplace", "channels_held"), [(False, 8), (True, 5)])
def test_tensors_count_while_they_live_and_once(inplace, channels_held):
    # 4 channels; then 4 of a ReLU of their own, or a quarter as many pixels of 4
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    net = nn.Sequential(convolution, nn.ReLU(inplace), nn.AvgPool2d(2))
    assert forward_bytes_per_pixel(net, "forward") == 4 * channels_held


def test_a_network_is_counted_and_left_as_it_is():
    net = tiny()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    forward_bytes_per_pixel(net, "forward_cam")
    training_bytes(net, 2, 64)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training
    assert all(p.device == CPU and p.grad is None for p in net.parameters())


def test_a_compiled_network_is_counted_as_it_was_written():
    net, expected = tiny(), forward_bytes_per_pixel(tiny(), "forward_cam")
    net.forward_cam = torch.compile(net.forward_cam, backend="eager")
    net.compile(backend="eager")
    assert forward_bytes_per_pixel(net, "forward_cam") == expected
    assert training_bytes(net, 2, 64) == training_bytes(tiny(), 2, 64)


def test_training_holds_more_than_seeing_and_grows_with_the_batch():
    net = tiny()
    one, two = training_bytes(net, 1, 128), training_bytes(net, 2, 128)
    assert two > one > 128**2 * forward_bytes_per_pixel(net, "forward")
    assert two - one == training_bytes(net, 3, 128) - two


MEASURE = """
import importlib, sys, torch
from tool.memory import OVERHEAD, forward_bytes_per_pixel

def status(field):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines[field].split()[0])

kind, method = sys.argv[1:]
torch.set_num_threads(1)
net = importlib.import_module(f"network.tiny_{kind}").Net().eval()
counted = forward_bytes_per_pixel(net, method)
with torch.no_grad():
    getattr(net, method)(torch.zeros(1, 3, 64, 64))
    images = torch.zeros(2, 3, 1000, 1000)
    before = status("VmRSS")
    getattr(net, method)(images)
print((status("VmHWM") - before) / (2e6 * counted), OVERHEAD)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux does")
@pytest.mark.parametrize("network", ["cls forward_cam", "aff forward_features"])
def test_measured_memory_is_what_is_counted_and_some_overhead(network):
    command = [sys.executable, "-c", MEASURE, *network.split()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    share, overhead = map(float, done.stdout.split())
    assert 0.9 < share < overhead


def test_what_is_free_is_known_here():
    if Path("/proc/meminfo").exists():
        assert 2**20 < available_bytes(CPU) < 2**50


def fake_system(root, available_kb=None, group="/", groups=()):
    """proc and sys as Linux has them; groups: {path: (limit, used, cached)}."""
    (root / "proc" / "self").mkdir(parents=True)
    if available_kb is not None:
        text = f"MemTotal: 99999999 kB\nMemAvailable:   {available_kb} kB\nBuffers: 7 kB\n"
        (root / "proc" / "meminfo").write_text(text)
    (root / "proc" / "self" / "cgroup").write_text(f"1:name=systemd:/x\n0::{group}\n")
    for path, (limit, used, cached) in dict(groups).items():
        folder = root / "sys" / "fs" / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 1\n")
    return root


@pytest.mark.parametrize(
    ("group", "groups", "free"),
    [
        ("/", {}, 1000 * 1024),
        ("/a/b", {}, 1000 * 1024),
        ("/", {".": (50_000, 20_000, 0)}, 30_000),
        ("/", {".": (50_000, 20_000, 5000)}, 35_000),
        ("/a/b", {"a/b": ("max", 20_000, 0)}, 1000 * 1024),
        ("/a/b", {"a/b": ("max", 20_000, 0), "a": (90_000, 30_000, 0)}, 60_000),
        ("/a/b", {"a/b": (40_000, 30_000, 0), "a": (90_000, 30_000, 0)}, 10_000),
        ("/a", {"a": (40_000, 50_000, 0)}, 0),
        ("/a", {"a": (2**60, 0, 0)}, 1000 * 1024),
    ],
)
def test_the_nearest_limit_counts(group, groups, free, tmp_path):
    assert available_bytes(CPU, fake_system(tmp_path, 1000, group, groups)) == free


def test_without_proc_nothing_is_known_and_nothing_refused(tmp_path):
    assert available_bytes(CPU, tmp_path) is None
    assert available_bytes(CPU, fake_system(tmp_path)) is None
    MemoryLimit(1e9, None, "cpu", "").require("a", (10**6, 10**6))


def test_an_image_beyond_the_limit_is_named_with_what_it_takes():
    limit = MemoryLimit(1000, 2_000_000_000, "cpu", "take less")
    limit.require("a", (1000, 2000))
    words = r"^a: an image of 2001 x 1000 takes about 2\.0 GB .* cpu, and 2\.0 GB are free; take l"
    with pytest.raises(DataError, match=words):
        limit.require("a", (2001, 1000))


def test_limits_follow_scales_and_loader_processes(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)

    def cam(scales, num_workers=0):
        return memory.cam_limit(tiny(), scales, num_workers, CPU).bytes_per_pixel

    seen = forward_bytes_per_pixel(tiny(), "forward_cam")
    assert cam([1]) > 2 * seen  # the image and its mirror image
    assert cam([2]) - cam([1]) > 3 * 2 * seen
    assert cam([1, 2]) - cam([2]) == 2 * 3 * 4  # the small pair
    assert cam([1], 3) - cam([1]) == 3 * 2 * 2 * 3 * 4  # two more samples a process
    crf = [memory.cam_limit(tiny(), [0.1], 0, CPU, workers).bytes_per_pixel for workers in (0, 1)]
    limits = [memory.walk_limit(tiny("aff"), workers, CPU) for workers in (0, 2)]
    assert limits[1].bytes_per_pixel > limits[0].bytes_per_pixel
    assert crf[0] > memory.CRF_BYTES_PER_PIXEL > cam([0.1])
    assert crf[1] == cam([0.1]) + memory.CRF_BYTES_PER_PIXEL
    assert {limit.available for limit in limits} == {10**9}


def test_training_beyond_the_memory_names_its_flags(monkeypatch):
    net = tiny()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)
    memory.require_memory_to_train(net, CPU, 2, 64, None, 64, 64)
    for sizes, flags in (
        ((1000, 448), "--batch_size 1000 --crop_size 448: "),
        ((2, 20000), "--batch_size 2 --crop_size 20000: "),
        ((2, 64, None, 20000), "--batch_size 2 --val_crop_size 20000: "),
        ((2, 64, None, 64, 9000), "--resize_long up to 9000: "),
    ):
        with pytest.raises(UsageError, match=rf"^{flags}takes about [\d.]+ GB .* 1\.0 GB are free"):
            memory.require_memory_to_train(net, CPU, *sizes)
    just_enough = training_bytes(net, 2, 64) / 2
    monkeypatch.setattr(memory, "available_bytes", lambda device: just_enough)
    memory.require_memory_to_train(net, CPU, 2, 64, "bf16")
    with pytest.raises(UsageError, match="--crop_size 64: "):
        memory.require_memory_to_train(net, CPU, 2, 64)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    memory.require_memory_to_train(net, CPU, 2, 20000)


@pytest.mark.cuda
def test_free_memory_of_a_cuda_device():
    device = torch.device("cuda")
    assert 0 < available_bytes(device) <= torch.cuda.get_device_properties(device).total_memory
