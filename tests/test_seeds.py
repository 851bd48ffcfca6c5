"""Class maps of other methods: every form gives the same labels; settings of their walk."""

import csv
import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import at_call, run_forked
from helpers import Outcome, run_program
from PIL import Image

from network import tiny_aff
from tool import pipeline, random_walk
from tool.maps import load_cams, load_index_png, load_maps, save_maps
from tool.run.errors import DataError
from voc12 import toy
from voc12.devkit import Devkit, read_ids

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (11, 18)


# Forms


def reduced(stack, stride):
    """K x H x W -> K x ceil(H / stride) x ceil(W / stride), as a torch tensor."""
    size = [-(-side // stride) for side in stack.shape[1:]]
    if not len(stack):
        return torch.zeros(0, *size)
    return F.interpolate(torch.from_numpy(stack)[None], size, mode="bilinear")[0]


def by_class(keys, maps):
    return dict(zip(keys.tolist(), maps, strict=True))


# What the methods write of the classes ``keys``, int64 K, and maps float32 K x H x W.
FORMS = {
    "float64": lambda keys, maps: by_class(keys, maps.astype(float)),
    "tensors": lambda keys, maps: by_class(keys, torch.from_numpy(maps)),
    "halves": lambda keys, maps: by_class(keys, torch.from_numpy(maps).half()),
    "own, quarter": lambda keys, maps: by_class(keys, reduced(maps, 4).numpy()),
    "IRN": lambda keys, maps: {
        "keys": torch.from_numpy(keys),
        "cam": reduced(maps, 4),
        "high_res": maps,
    },
    "PuzzleCAM": lambda keys, maps: {
        "keys": np.pad(keys + 1, (1, 0)),
        "cam": reduced(maps, 4),
        "hr_cam": torch.from_numpy(maps),
    },
    "PuzzleCAM's walk": lambda keys, maps: {"keys": np.pad(keys + 1, (1, 0)), "rw": maps},
    "ToCo": lambda keys, maps: {"keys": keys.astype("i4"), "high_res": maps},
    "AFA": lambda keys, maps: {"keys": keys, "cam": maps},
    "CLIP-ES": lambda keys, maps: {"keys": keys, "attn_highres": maps.astype(np.float16)},
    "quarter": lambda keys, maps: {"keys": torch.from_numpy(keys), "cam": reduced(maps, 4)},
}
ROUNDED = ("CLIP-ES", "halves")
SMALLER = ("quarter", "own, quarter")


def write(path, form, keys, maps):
    """The maps K x H x W of the classes ``keys`` in one of the forms, as .npy or .npz."""
    content = FORMS[form](np.array(keys, np.int64), maps)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, content)
    else:
        np.savez(path, **{str(key): np.asarray(value) for key, value in content.items()})


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", [(0, 3), (7,), ()])
def test_every_form_holds_the_same_maps(keys, form, suffix, tmp_path, rng):
    maps = rng.random((len(keys), *SIZE), np.float32) / 2
    write(tmp_path / f"a{suffix}", form, keys, maps)
    loaded = load_cams(tmp_path / "a.npy", SIZE, 8)
    assert list(loaded) == list(keys)
    for values, expected in zip(loaded.values(), maps, strict=True):
        assert (values.dtype, values.shape) == (np.float32, SIZE)
        if form in SMALLER:
            small = reduced(expected[None], 4)[None]
            expected = F.interpolate(small, SIZE, mode="bilinear", align_corners=False)[0, 0]
            assert torch.equal(torch.from_numpy(values), expected)
        else:
            np.testing.assert_allclose(values, expected, atol=2**-11 if form in ROUNDED else 0)


STACK = np.full((2, *SIZE), 0.4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"img_name": "a", "cams": STACK}, "'img_name', 'cams'"),
        ({"keys": np.array([1, 2]), "cams": STACK}, "high_res, .* not 'keys', 'cams'"),
        ({"keys": np.array([1, 2, 3]), "high_res": STACK}, "3 keys .* 2 maps of high_res"),
        ({"keys": np.array([1, 1]), "high_res": STACK}, "2 keys .* 2 maps"),
        ({"keys": np.array([0, 8]), "high_res": STACK}, "class 8, but classes are 0 to 7"),
        ({"keys": np.array([0.5, 1]), "cam": STACK}, "whole numbers"),
        ({"keys": np.array([1, 2]), "cam": STACK[0]}, "whole numbers"),
        ({"keys": np.array([1, 2]), "cam": STACK.transpose(0, 2, 1)}, "11 x 18 and 18 x 11"),
        ({0: np.zeros((5, 5))}, "11 x 18 and 5 x 5"),  # of an image with other proportions
        ({0: np.zeros((0, 0))}, "0 x 0 and 11 x 18"),
        ({0: STACK[0] - 0.5}, "-0.1 to -0.1, not in 0..1.*--normalize max"),
        ({0: torch.full(SIZE, 7.0)}, "7 to 7, not in 0..1.*--normalize max"),
    ],
)
def test_what_is_not_recognized_is_named(content, words, tmp_path):
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(DataError, match=rf"a\.npy: .*{words}"):
        load_cams(tmp_path / "a.npy", SIZE, 8)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max", [[[0, 0], [1 / 3, 1]], [[2 / 3, 1], [2 / 3, 2 / 3]]]),
        ("minmax", [[[0, 0.25], [0.5, 1]], [[0, 1], [0, 0]]]),
    ],
)
def test_normalization_is_of_each_class(how, expected, tmp_path):
    save_maps(tmp_path / "a.npy", {0: [[-2, 0], [2, 6]], 3: [[4, 6], [4, 4]]})
    loaded = load_cams(tmp_path / "a.npy", (2, 2), 8, how)
    np.testing.assert_allclose([*loaded.values()], expected, atol=1e-5)
    assert [values.dtype for values in loaded.values()] == ["f4", "f4"]


# From seeds to scored labels

QUICK = (
    "tool.pipeline --voc12_root VOC --network tiny --weights none --num_workers 0 "
    "--infer_aff_args '--logt 3' "
    "--train_aff_args '--max_epoches 1 --batch_size 2 --crop_size 72' "
    "--train_seg_args '--max_iters 1 --batch_size 2 --crop_size 64' --infer_seg_args '--scales 1' "
    "--cam_dir base_seeds --out_dir base"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy devkit, its lists, weights of AffinityNet, and smooth seeds of its images."""
    folder = tmp_path_factory.mktemp("seeds")
    toy.make_devkit(folder / "VOC", 5, 64, 0)
    run_program("voc12.prepare --voc12_root VOC --out_dir lists", folder).check()
    devkit = Devkit(folder / "VOC")
    rng = np.random.default_rng(1)
    for path in sorted((folder / "VOC" / "JPEGImages").iterdir()):
        image_id = path.stem
        mask = load_index_png(devkit.mask_path(image_id))
        classes = np.flatnonzero(devkit.image_label(image_id))
        maps = [(mask == k + 1) * 0.7 + 0.3 * rng.random() for k in classes]
        maps = reduced(np.array(maps, np.float32), 9)[None]
        maps = F.interpolate(maps, mask.shape, mode="bicubic").clamp(0, 1)[0].numpy()
        save_maps(folder / "base_seeds" / f"{image_id}.npy", by_class(classes, maps))
    torch.manual_seed(0)
    torch.save(tiny_aff.Net().state_dict(), folder / "aff.pth")
    return folder


def test_the_pipeline_makes_labels_from_seeds_without_stage_1(folder, monkeypatch):
    def run_here(stage, words):
        module, flags = (words[1], words[2:]) if words[0] == "-m" else (stage, words[1:])
        run_program(" ".join([module, *flags]), folder).check()

    monkeypatch.setattr(pipeline, "run", run_here)
    monkeypatch.setattr(pipeline, "require_flags", lambda *_: None)  # starts processes
    run_program(QUICK, folder).check()
    assert not list((folder / "base").glob("cls.*"))
    results = json.loads((folder / "base" / "results.json").read_text())
    assert results["rw"]["train"]["images"] == 4
    assert results["rw"]["val"]["published"] is None
    for image_id in read_ids(folder / "lists" / "val.txt"):
        seeds = load_maps(folder / "base_seeds" / f"{image_id}.npy")
        kept = load_maps(folder / "base" / "cam" / f"{image_id}.npy")
        assert kept.keys() == seeds.keys()
        assert all(np.array_equal(kept[k], seeds[k]) for k in seeds)


# infer_cls.py --cam_dir


def test_the_classes_are_those_with_a_map_and_a_label_file_restricts_them(folder):
    image_id = read_ids(folder / "lists" / "train.txt")[0]
    seeds = load_maps(folder / "base_seeds" / f"{image_id}.npy")
    first = min(seeds)
    stack = np.array([seeds[first], 3 * seeds[first] - 1])
    write(folder / "raw" / f"{image_id}.npz", "PuzzleCAM", [first, 19], stack)
    (folder / "one.txt").write_text(image_id)
    command = "infer_cls --cam_dir raw --normalize max --voc12_root VOC --infer_list one.txt "
    command += "--num_workers 0 --out_cam out/cam --out_la_crf out/la"
    run_program(command, folder).check()
    maps = load_maps(folder / "out" / "cam" / f"{image_id}.npy")
    assert list(maps) == [first, 19]
    assert (maps[19].min(), maps[19].max()) == (0, pytest.approx(1, abs=1e-4))
    assert list(load_maps(folder / "out" / "la" / f"{image_id}.npy")) == [0, first + 1, 20]
    labels = f"{command} --label_file lists/cls_labels.npy"
    run_program(labels, folder).assert_failed(2, "--label_file")
    run_program(f"{labels} --overwrite", folder).check()
    assert list(load_maps(folder / "out" / "cam" / f"{image_id}.npy")) == [first]


# The walk: constant background, scores, sweep

WALK = (
    "infer_aff --network network.tiny_aff --weights aff.pth --voc12_root VOC --num_workers 0 "
    "--infer_list lists/train.txt --cam_dir base_seeds"
)


def miou(folder, flags):
    command = "voc12.evaluate --voc12_root VOC --list lists/train.txt --num_workers 0 --json m.json"
    run_program(f"{command} {flags}", folder).check()
    return json.loads((folder / "m.json").read_text())["miou"]


def test_walked_scores_with_a_background_are_the_labels_of_a_constant_background(folder):
    flags = "--bg 0.35 --beta 4 --logt 4 --out_rw bg/rw --out_scores bg/scores"
    run_program(f"{WALK} {flags}", folder).check()
    run_program(f"{WALK} {flags}", folder).check()  # the same settings
    run_program(f"{WALK} {flags} --alpha 4 --bg 0.4", folder).assert_failed(2, "--bg (0.35 there")
    for path in (folder / "bg" / "rw").glob("*.png"):
        label = load_index_png(path)
        maps = load_maps(folder / "bg" / "scores" / f"{path.stem}.npz", label.shape)
        scores = np.array([np.full(label.shape, 0.35), *maps.values()])
        found = np.array([0, *(k + 1 for k in maps)])[scores.argmax(axis=0)]
        # Where the image fills whole cells, the background stays what it is.
        inner = tuple(slice(side // 8 * 8 - 32) for side in label.shape)
        assert (found == label)[inner].mean() > 0.995
    assert miou(folder, "--cam bg/scores --bg 0.35") > 0


@pytest.mark.parametrize(
    ("flags", "kind", "points"),
    [
        ("--alphas 2 8 16", "alpha", [(4, 0, 8), (8, 3, 2), (8, 3, 16)]),
        ("--bgs 0.2 0.5 --exact", "bg", [(4, 3, 0.2), (8, 0, 0.5)]),
    ],
)
def test_a_sweep_equals_the_walks_one_by_one(flags, kind, points, folder):
    flags = f"--sweep {flags} --betas 4 8 --logts 0 3"
    outcome = run_program(f"{WALK} {flags} --json s.json --csv s.csv --plot s.png", folder).check()
    result = json.loads((folder / "s.json").read_text())
    assert (result["sweep"], result["images"]) == (f"beta logt {kind}", 4)
    found = {(p["beta"], p["logt"], p[kind]): p["miou"] for p in result["points"]}
    for beta, logt, value in points:
        walk = f"--beta {beta} --logt {logt} --{kind} {value} --out_rw walk --overwrite"
        run_program(f"{WALK} {walk}", folder).check()
        assert found[beta, logt, value] == pytest.approx(miou(folder, "--pred walk"), abs=0.02)
    best = max(result["points"], key=lambda point: point["miou"])
    assert result["best"].items() >= best.items()
    with open(folder / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["miou"]) for row in rows] == [point["miou"] for point in result["points"]]
    (marked,) = [line.split() for line in outcome.out.splitlines() if "best" in line]
    assert [float(cell) for cell in marked[:3]] == [best["beta"], best["logt"], best[kind]]
    with Image.open(folder / "s.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_ranks_share_a_sweep(folder):
    command = f"{WALK} --sweep --logts 0 2"
    run_program(f"{command} --json one.json", folder).check()
    run = {"command": f"{command} --json two.json", "cwd": folder, "ranks": 2}
    ((first, second),) = run_forked(run)
    assert Outcome(*second).check().out == ""
    assert "<- best" in Outcome(*first).check().out
    assert (folder / "two.json").read_bytes() == (folder / "one.json").read_bytes()


def test_a_signal_ends_a_sweep_between_two_images(folder, monkeypatch):
    stop = partial(os.kill, os.getpid(), signal.SIGTERM)
    at_call(random_walk, "transition_matrix", 2, stop, monkeypatch.setattr)
    outcome = run_program(f"{WALK} --sweep --json never.json", folder)
    assert outcome.code == 143
    assert "0 of 4 images are done" in outcome.last_line
    assert not (folder / "never.json").exists()
