"""The benchmarks compare equals and measure what they print; no test depends on a duration."""

import json

import pytest
import torch
from helpers import REPOSITORY, needs_pydensecrf, run_program

from tool.bench import __main__ as bench
from tool.bench import stages
from tool.bench.released import compare, peak_megabytes

CPU = torch.device("cpu")


@pytest.fixture
def figures_of(tmp_path, monkeypatch):
    """``figures_of(command)``: the figures that a benchmark prints and writes, of small images."""
    monkeypatch.setattr(stages, "LONG_SIDE", 96)

    def run(command):
        file = tmp_path / "figures.json"
        words = f"tool.bench.__main__ {command} --repeats 1 --device cpu --json {file}"
        out = run_program(words, REPOSITORY).check().out
        figures = json.loads(file.read_text())
        for name, value in figures.items():
            assert f"{value:.4g}" in out, name
        return figures

    return run


@pytest.mark.parametrize(
    "command",
    [
        "random_walk --height 12 --width 15",
        "affinity --height 12 --width 14 --channels 16 --batch 2",
        pytest.param("crf --height 40 --width 52", marks=needs_pydensecrf),
    ],
)
def test_ours_and_the_released_way_give_the_same(command, figures_of, monkeypatch):
    if not command.startswith("random_walk"):  # one is enough for the processes that it takes
        monkeypatch.setattr(bench, "peak_in_child", lambda side: 1.0)
    figures = figures_of(command)
    assert 0 <= figures["max_rel_diff"] < 1e-5
    assert figures["speedup"] == pytest.approx(figures["baseline_s"] / figures["ours_s"])
    assert {"baseline_peak_mb", "ours_peak_mb"} < figures.keys()


PARTS = {
    "step --batch 2 --crop_size 72 --num_workers 0": ("loading_s", "forward_s", "backward_s"),
    "infer": ("loading_s", "network_s", "output_s"),
}


@pytest.mark.parametrize("command", PARTS)
@pytest.mark.parametrize("flags", ["tiny_cls", "network.tiny_aff --amp bf16", "tiny_seg"])
def test_programs_are_timed_by_parts(command, flags, figures_of):
    figures = figures_of(f"{command} --network {flags}")
    parts = [figures.pop(part) for part in PARTS[command]]
    assert min(parts) > 0
    total = figures.pop("total_s")
    assert sum(parts) == pytest.approx(total)  # of the one that counts
    batch = 2 if command.startswith("step") else 1
    assert figures.pop("images_per_s") == pytest.approx(batch / total)
    assert figures.pop("train_aug_min") == pytest.approx(10_582 * total / batch / 60)
    assert figures == {}


def test_all_runs_every_network_and_names_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ALL", ["affinity --bad"])
    monkeypatch.setattr(bench, "BACKBONES", ["tiny"])
    monkeypatch.setattr(bench, "BATCHES", {"cls": 1})
    command = f"tool.bench.__main__ all --repeats 1 --device cpu --json {tmp_path / 'f.json'}"
    outcome = run_program(command, REPOSITORY)
    outcome.assert_failed(1, "1 of 5 failed", "affinity --bad")
    figures = json.loads((tmp_path / "f.json").read_text())
    failed, *measured = figures.values()
    assert failed == {}
    assert ["total_s" in values for values in measured] == [True] * 4


def test_sides_take_turns_and_are_compared_with_exact_results():
    calls = []
    sides = {
        "baseline": lambda: calls.append("baseline") or [torch.tensor([1.0, 2.0])],
        "ours": lambda: calls.append("ours") or [torch.tensor([1.0, 3.0])],
        "exact": lambda: [torch.tensor([1.0, 4.0])],
    }
    figures = compare(sides, 3, CPU)
    assert calls == ["baseline", "ours"] * 4  # the first of each is not timed
    assert (figures["max_rel_diff"], figures["baseline_max_rel_diff"]) == (0.25, 0.5)


def test_peak_memory_is_that_of_the_call():
    # Twice, since the allocator may reuse some of the first.
    held = [torch.ones(16 * 2**20) for _ in range(2)]
    peak = peak_megabytes(lambda: [torch.ones(64 * 2**20).sum() for _ in range(2)], CPU)
    assert 200 < peak < 400
    del held
