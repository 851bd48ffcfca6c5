"""Fixtures of all test files: golden numbers, seeded networks, shared data; what is skipped."""

import importlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import recipe
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"
VOC_MINI, WEIGHT_SAMPLES = SHARED / "voc2012_mini", SHARED / "weight_samples"
SEED = 7  # of all golden numbers

torch.set_num_threads(2)
settings.register_profile("affinitynet", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("affinitynet")


def pytest_configure(config):
    # tool.random_walk silences it, but pytest sets its own filters for each test.
    config.addinivalue_line("filterwarnings", "ignore:Sparse (CSR|CSC) tensor support is in beta")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@cache
def _golden_meta() -> dict:
    return json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture(scope="session")
def golden():
    """``golden("crf")``: a golden file's arrays by key; ``golden("meta")``: the JSON file."""

    @cache
    def load(name: str) -> dict:
        if name == "meta":
            return _golden_meta()
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


def golden_weights(name: str) -> dict[str, torch.Tensor]:
    """The seeded state dict of a network, from the golden names and shapes alone."""
    shapes = _golden_meta()[f"{name}.state_dict"]
    template = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    seeded = recipe.seeded_state_dict(template, seed=SEED)
    return {key: torch.from_numpy(np.asarray(value)) for key, value in seeded.items()}


@pytest.fixture(scope="session")
def seeded_net(request):
    """The network of that name with the golden weights, in eval mode; parametrized indirectly.

    Tests share it and must not change it. pytest groups tests by network, so that each is built
    once and at most one is in memory.
    """
    net = importlib.import_module(f"network.{request.param}").Net()
    net.load_state_dict(golden_weights(request.param), strict=True)
    return net.eval()


@pytest.fixture(scope="module")
def one_thread():
    """torch computes with a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def golden_voc():
    """The devkit of three images that the command-line numbers were computed from."""
    return GOLDEN / "voc"


def _folder_or_skip(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture
def voc_mini():
    """Real VOC 2012 images with masks, where they are beside the repository."""
    return _folder_or_skip(VOC_MINI)


@pytest.fixture
def weight_samples():
    """Small files that Caffe and MXNet wrote, where they are beside the repository."""
    return _folder_or_skip(WEIGHT_SAMPLES)


@pytest.fixture
def rng():
    """A NumPy generator, the same in every run."""
    return np.random.default_rng(0)
