"""The benchmarks measure what they say; how long it took is not for tests."""

import json

import pytest
import torch
from helpers import REPOSITORY, needs_pydensecrf, run_program

from tool.bench import Contest, measure, peak_megabytes

KEYS = {"baseline_s", "ours_s", "speedup", "baseline_peak_mb", "ours_peak_mb", "max_rel_diff"}
CPU = torch.device("cpu")
WALK = ["random_walk", "--height", "12", "--width", "15"]
AFFINITY = ["affinity", "--height", "12", "--width", "14", "--channels", "16", "--batch", "2"]


@pytest.mark.parametrize(
    "command",
    [
        WALK,
        [*WALK, "--estimate_baseline"],
        AFFINITY,
        pytest.param(["crf", "--height", "40", "--width", "52"], marks=needs_pydensecrf),
    ],
)
def test_benchmark_compares_equals_and_says_so(command, tmp_path):
    figures_file = tmp_path / "figures.json"
    words = " ".join([*command, "--repeats", "2", "--device", "cpu", "--json", str(figures_file)])
    outcome = run_program(f"tool.bench {words}", REPOSITORY).check()
    figures = json.loads(figures_file.read_text())
    assert set(figures) - {"baseline_rel_diff"} == KEYS
    assert 0 <= figures["max_rel_diff"] < 1e-5
    assert figures["speedup"] == pytest.approx(figures["baseline_s"] / figures["ours_s"])
    assert f"{figures['speedup']:.1f} x" in outcome.out
    assert ("estimated" in outcome.out) == ("--estimate_baseline" in command)


STEP = "tool.bench step --batch 2 --crop_size 72 --num_workers 0 --repeats 2 --device cpu"
PARTS = ("loading_s", "forward_s", "backward_s", "optimizer_s", "step_s")


@pytest.mark.parametrize("network", ["tiny_cls", "network.tiny_aff"])
@pytest.mark.parametrize("switches", ["", "--amp bf16"])
def test_step_is_split_into_parts_and_beside_one_without_switches(network, switches, tmp_path):
    figures_file = tmp_path / "figures.json"
    command = f"{STEP} --network {network} {switches} --json {figures_file}"
    outcome = run_program(command, REPOSITORY).check()
    figures = json.loads(figures_file.read_text())
    sides = ("baseline_", "") if switches else ("",)
    for side in sides:
        parts = [figures.pop(side + part) for part in PARTS]
        assert all(seconds > 0 for seconds in parts)
        assert max(parts[:-1]) < parts[-1]
        assert figures.pop(f"{side}images_per_second") == pytest.approx(2 / parts[-1])
    assert set(figures) == ({"speedup"} if switches else set())
    for part in PARTS:
        assert f"\n{part.removesuffix('_s')} " in outcome.out
    assert ("baseline" in outcome.out) == bool(switches)


INFER = "tool.bench infer --height 40 --width 52 --repeats 2 --device cpu"
INFER_PARTS = {
    "network.tiny_cls": ("loading_s", "forward_s", "crf_s", "writing_s"),
    "network.tiny_aff": ("loading_s", "forward_s", "walk_s", "writing_s"),
}


@pytest.mark.parametrize("network", INFER_PARTS)
@pytest.mark.parametrize("switches", ["", "--amp bf16"])
@pytest.mark.parametrize("form", ["", "--out_format npz --out_dtype float16"])
def test_inference_is_split_into_parts_and_beside_one_without_switches(
    network, switches, form, tmp_path
):
    figures_file = tmp_path / "figures.json"
    command = f"{INFER} --network {network} {switches} {form} --json {figures_file}"
    outcome = run_program(command, REPOSITORY).check()
    figures = json.loads(figures_file.read_text())
    for side in ("baseline_", "") if switches else ("",):
        parts = [figures.pop(side + part) for part in INFER_PARTS[network]]
        assert all(seconds > 0 for seconds in parts)
        assert max(parts) < figures[f"{side}image_s"]
    image_s = figures.pop("image_s")
    if switches:
        assert figures.pop("speedup") == pytest.approx(figures.pop("baseline_image_s") / image_s)
        assert 0 < figures.pop("max_rel_diff") < 0.1
    assert figures == {}
    assert network in outcome.out
    assert ("largest relative difference" in outcome.out) == bool(switches)


def test_step_refuses_nonsense():
    command = f"{STEP} --network tiny_aff --crop_size 70"
    run_program(command, REPOSITORY).assert_failed(2, "--crop_size 70")
    run_program(f"{STEP} --network os", REPOSITORY).assert_failed(2, "--network", "'os'")


def test_estimated_baseline_counts_all_its_parts_and_ours_is_compared_with_the_exact():
    calls = []
    contest = Contest(
        baseline=lambda: calls.append("baseline") or [torch.zeros(2)],
        ours=lambda: calls.append("ours") or [torch.tensor([1.0, 3.0])],
        baseline_parts=1000,
        reference=lambda: [torch.tensor([1.0, 4.0])],
    )
    figures = measure(contest, 3, CPU)
    assert calls == ["baseline", "ours"] * 4  # taking turns, the first of each not timed
    assert figures["max_rel_diff"] == 0.25
    assert "baseline_rel_diff" not in figures


def test_peak_memory_is_that_of_the_call():
    # Twice, since the allocator may have some of the first at hand from before.
    held = [torch.ones(16 * 2**20) for _ in range(2)]
    peak = peak_megabytes(lambda: [torch.ones(64 * 2**20).sum() for _ in range(2)], CPU)
    assert 200 < peak < 400
    del held


@pytest.mark.parametrize(
    ("command", "word"),
    [("tool.bench", "BENCHMARK"), ("tool.bench random_walk --height 0", "--height")],
)
def test_benchmark_refuses_nonsense(command, word):
    run_program(command, REPOSITORY).assert_failed(2, word)
