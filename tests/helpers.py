"""What several test files share: programs run in this process, and devkits made by hand."""

import contextlib
import importlib
import importlib.util
import io
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tool.maps import save_index_png, save_maps
from tool.run import cli
from voc12 import toy
from voc12.devkit import Devkit, read_ids

REPOSITORY = Path(__file__).resolve().parent.parent
needs_pydensecrf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf is not installed"
)

# All trainings on the data of write_training_data, in steps of three images.
_TRAIN = (
    "--voc12_root VOC --weights none --train_list lists/train.txt --batch_size 3 --lr 0.02 "
    "--momentum 0.9"
)
TINY_TRAINING = {
    "cls": f"train_cls --network network.tiny_cls {_TRAIN} --label_file lists/cls_labels.npy "
    "--val_list lists/val.txt --crop_size 64 --resize_long 48 80 --val_crop_size 72",
    "aff": f"train_aff --network network.tiny_aff {_TRAIN} --crop_size 80 --la_crf_dir la "
    "--ha_crf_dir ha",
    "seg": f"train_seg --network network.tiny_seg {_TRAIN} --crop_size 64 --scale 0.8 1.2 "
    "--label_dir VOC/SegmentationClass",
}


class Outcome(NamedTuple):
    """A program's exit code and output."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of stderr, after any progress bars."""
        return self.err.strip().splitlines()[-1]

    def check(self) -> "Outcome":
        assert self.code == 0, self.err
        return self

    def assert_failed(self, code: int, *words: str) -> None:
        """It failed with one sentence, on the last line of stderr, that holds all the words."""
        assert self.code == code, f"exit code {self.code}: {self.err[-1000:]}"
        assert "Traceback" not in self.err
        assert self.err.count("error: ") == self.last_line.count("error: ") == 1, self.err
        for word in words:
            assert word in self.last_line, f"{word!r} is not in {self.last_line!r}"


@contextlib.contextmanager
def working_directory(path: str | os.PathLike) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def run_program(command: str, cwd: str | os.PathLike) -> Outcome:
    """Run e.g. ``train_cls --lr 0.1`` or ``voc12.evaluate --list L`` in this process, in ``cwd``.

    An exception that ``cli.run`` does not handle is raised.
    """
    name, *words = shlex.split(command)
    module = importlib.import_module(name)
    if not hasattr(module, "get_args_parser"):  # a package that python3 -m runs
        module = importlib.import_module(f"{name}.__main__")
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        working_directory(cwd),
        mock.patch.object(sys, "argv", [f"{name}.py", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.run(module.get_args_parser(), module.main)
        except SystemExit as stopped:
            code = stopped.code or 0
            _release(stopped)
    return Outcome(code, out.getvalue(), err.getvalue())


def _release(error: BaseException | None) -> None:
    """Drop what the frames of an error hold, such as loader processes, as a process's end does."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def timeless(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files; tables (.csv) without the last column, the images per second."""
    return {
        name: b"\n".join(line.rpartition(b",")[0] for line in content.splitlines())
        if name.endswith(".csv")
        else content
        for name, content in files.items()
    }


def npy(payload: bytes, shape: tuple = (), descr: str = "|O") -> bytes:
    """An .npy file with this payload after its header."""
    file, header = io.BytesIO(), {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + payload


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image of many colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_image(root: Path, image_id: str, image: Image.Image, kind: str = "PNG") -> Path:
    """The image as JPEGImages/<id>.jpg; PNG, which programs recognize, keeps its pixels."""
    path = root / "JPEGImages" / f"{image_id}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format=kind)
    return path


def write_annotation(root: Path, image_id: str, names: Sequence[str]) -> Path:
    """Annotations/<id>.xml with an object of each name."""
    path = root / "Annotations" / f"{image_id}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(f"<object><name>{name}</name></object>" for name in names)
    path.write_text(f"<annotation>{objects}</annotation>")
    return path


def write_training_data(folder: Path, num_images: int) -> Path:
    """VOC, lists, and CRF scores la and ha (rectangles of one class); four of five images train."""
    toy.make_devkit(folder / "VOC", num_images, 96, 0)
    run_program("voc12.prepare --voc12_root VOC --out_dir lists", folder).check()
    rng = np.random.default_rng(0)
    for image_id in read_ids(folder / "lists" / "train.txt"):
        width, height = Devkit(folder / "VOC").load_image(image_id).size
        score = np.kron(rng.random((4, 4)), np.ones((24, 24)))[:height, :width]
        save_maps(folder / "la" / f"{image_id}.npy", {0: 1 - score**2, 1: score**2})
        save_maps(folder / "ha" / f"{image_id}.npy", {0: 1 - score, 1: score})
    return folder


def write_mask(
    root: Path, image_id: str, mask: np.ndarray, folder: str = "SegmentationClass"
) -> Path:
    """<folder>/<id>.png from uint8 H x W."""
    path = root / folder / f"{image_id}.png"
    save_index_png(path, np.asarray(mask, np.uint8))
    return path
