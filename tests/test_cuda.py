"""What a GPU computes is what a CPU computes; every program runs on one. Skipped without a GPU."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from forked import at_call
from helpers import REPOSITORY, TINY_TRAINING, run_program, write_training_data

from tool.affinity import affinity_loss, pair_affinity, pair_labels, pair_offsets, source_grid
from tool.maps import load_maps
from tool.random_walk import propagate_together, transition_matrix
from voc12.devkit import read_ids

pytestmark = pytest.mark.cuda
RADIUS = 5
TRAIN = {name: f"{command} --max_epoches 3" for name, command in TINY_TRAINING.items()}
TRAIN["seg"] = (
    "train_seg --network network.tiny_seg --weights none --voc12_root VOC --label_dir rw "
    "--train_list lists/train.txt --max_iters 3 --batch_size 3 --crop_size 64"
)
DATA = "--voc12_root VOC --infer_list lists/train.txt"
CAMS = f"infer_cls --network network.tiny_cls {DATA} --weights cls.pth --label_file "
CAMS += "lists/cls_labels.npy"
INFER = {
    "cls": f"{CAMS} --out_cam cam --out_la_crf la_crf --out_cam_pred pred",
    "aff": f"infer_aff --network network.tiny_aff {DATA} --weights aff.pth --cam_dir cam "
    "--out_rw rw --crf --logt 4",
    "seg": f"infer_seg --network network.tiny_seg {DATA} --weights seg.pth --out_seg seg --crf",
}


@pytest.mark.parametrize("maps", [[3], [1, 4]])
@pytest.mark.parametrize("sizes", [[(12, 15), (9, 20)], [(47, 63), (30, 30)]])
def test_walk_equals_the_cpus(sizes, maps):
    torch.manual_seed(0)
    inputs = []
    for (height, width), count in zip(sizes, maps, strict=False):
        rows, columns = source_grid(height, width, RADIUS)
        affinity = torch.rand(len(pair_offsets(RADIUS)), rows * columns)
        inputs.append((affinity, torch.rand(count, height, width)))
    walked = {}
    for device in ("cpu", "cuda"):
        seeds = [seed.to(device) for _, seed in inputs]
        matrices = [
            transition_matrix(affinity.to(device), *seed.shape[1:], RADIUS, 8)
            for affinity, seed in inputs
        ]
        walked[device] = propagate_together(seeds, matrices, 256)
    for ours, expected in zip(walked["cuda"], walked["cpu"], strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("channels_last", [False, True])
def test_affinity_and_its_gradient_equal_the_cpus(channels_last):
    torch.manual_seed(0)
    features, labels = torch.randn(2, 32, 14, 17), torch.randint(0, 3, (2, 14, 17)).byte()
    results = {}
    for device in ("cpu", "cuda"):
        given = features.clone().to(device)
        if channels_last:
            given = given.contiguous(memory_format=torch.channels_last)
        given.requires_grad_()
        affinity = pair_affinity(given, RADIUS)
        loss = affinity_loss(affinity, *pair_labels(labels.to(device), RADIUS))["loss"]
        loss.backward()
        results[device] = [affinity.detach().cpu(), loss.detach().cpu(), given.grad.cpu()]
    torch.testing.assert_close(results["cuda"], results["cpu"], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_training_data(tmp_path_factory.mktemp("cuda"), 6)


@pytest.mark.parametrize("flags", ["", "--amp fp16"])
def test_all_programs_run_and_trainings_continue(flags, data, monkeypatch):
    for kind in ("cls", "aff", "seg"):
        command = f"{TRAIN[kind]} {flags} --device cuda --session_name {kind}"
        with monkeypatch.context() as patch:
            stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
            at_call(torch.amp.GradScaler, "update", 2, stop, patch.setattr)
            assert run_program(command, data).code == 143
        assert "resumed after step 2" in run_program(command, data).check().out
        run_program(f"{INFER[kind]} {flags} --device cuda --overwrite", data).check()
    if not flags:
        run_program(f"{CAMS} --out_cam cpu_cam --device cpu", data).check()
        for image_id in read_ids(data / "lists" / "train.txt"):
            maps, expected = (load_maps(data / d / f"{image_id}.npy") for d in ("cam", "cpu_cam"))
            for key, values in expected.items():
                np.testing.assert_allclose(maps[key], values, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_infer_on_two_gpus(data):
    run_program(f"{TRAIN['cls']} --device cuda --session_name cls", data).check()
    name, *words = f"{INFER['cls']} --overwrite".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node=2", REPOSITORY / f"{name}.py", *words]
    subprocess.run(command, cwd=data, check=True)
    for image_id in read_ids(data / "lists" / "train.txt"):
        assert (data / "cam" / f"{image_id}.npy").exists()
