"""Fixtures of all test files: golden numbers, seeded networks, shared data; what is skipped."""

import json
import os
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
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


# Asked here, before it is hidden: CUDA remembers which devices it saw first.
HAS_CUDA = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that is not marked cuda sees no GPU, nor do its fixtures and processes."""
    if "cuda" in item.keywords:
        return (yield)
    hidden = mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="")
    with hidden, mock.patch.object(torch.cuda, "is_available", lambda: False):
        return (yield)


@pytest.fixture(scope="session")
def golden():
    """``golden("crf")``: a golden file's arrays by key; ``golden("meta")``: the JSON file."""

    @cache
    def load(name: str) -> dict:
        if name == "meta":
            return json.loads((GOLDEN / "meta.json").read_text())
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


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
