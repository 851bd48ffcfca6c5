"""What the programs iterate over: augmented crops to train on, whole images to infer.

A training sample is asked for as (epoch, index) and depends on (seed, epoch, id) alone.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tool import transforms
from tool.affinity import affinity_label
from tool.maps import load_cams, load_crf_scores, maps_file, require_scores, stack_maps
from voc12.devkit import Devkit

Normalize = Callable[[np.ndarray], np.ndarray]


class _ImageSet(Dataset):
    """A list of images of a devkit, normalized for one network."""

    def __init__(self, devkit: Devkit, ids: Sequence[str], normalize: Normalize):
        self.devkit = devkit
        self.ids = list(ids)
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.ids)


class ClassifierTrainingSet(_ImageSet):
    """Augmented square crops with labels: (float32 3 x crop x crop, float32 [classes])."""

    def __init__(
        self,
        devkit: Devkit,
        ids: Sequence[str],
        normalize: Normalize,
        crop_size: int,
        resize_long: tuple[int, int],
        seed: int,
    ):
        super().__init__(devkit, ids, normalize)
        self.crop_size, self.resize_long, self.seed = crop_size, resize_long, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image_id = self.ids[index]
        rng = transforms.sample_rng(self.seed, epoch, image_id)
        image = self.devkit.load_image(image_id)
        image = transforms.random_resize_long_side(image, *self.resize_long, rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = transforms.colour_jitter(image, rng)
        # Cropped after normalization: what lies beyond the image is zero, the mean colour.
        array = self.normalize(np.asarray(image))
        box = transforms.crop_box(*array.shape[:2], self.crop_size, rng)
        array = transforms.crop_to_canvas(array, box, self.crop_size)
        label = self.devkit.image_label(image_id)
        return torch.from_numpy(transforms.to_chw(array)), torch.from_numpy(label)


class ClassifierValidationSet(_ImageSet):
    """Centre crops with labels: (float32 3 x crop x crop, float32 [classes])."""

    def __init__(self, devkit: Devkit, ids: Sequence[str], normalize: Normalize, crop_size: int):
        super().__init__(devkit, ids, normalize)
        self.crop_size = crop_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        array = self.normalize(np.asarray(self.devkit.load_image(self.ids[index])))
        box = transforms.centre_box(*array.shape[:2], self.crop_size)
        array = transforms.crop_to_canvas(array, box, self.crop_size)
        label = self.devkit.image_label(self.ids[index])
        return torch.from_numpy(transforms.to_chw(array)), torch.from_numpy(label)


class MultiScaleSample(NamedTuple):
    """One image for multi-scale inference."""

    image_id: str
    photograph: np.ndarray  # uint8 H x W x 3 RGB
    label: np.ndarray  # float32 [classes]
    scaled: list[Tensor]  # a scale each: float32 3 x h x w, normalized


class MultiScaleSet(_ImageSet):
    """Whole images at several scales: ``MultiScaleSample``."""

    def __init__(
        self, devkit: Devkit, ids: Sequence[str], normalize: Normalize, scales: Sequence[float]
    ):
        super().__init__(devkit, ids, normalize)
        self.scales = tuple(scales)

    def __getitem__(self, index: int) -> MultiScaleSample:
        image_id = self.ids[index]
        image = self.devkit.load_image(image_id)
        scaled = []
        for scale in self.scales:
            array = self.normalize(np.asarray(transforms.rescale(image, scale)))
            scaled.append(torch.from_numpy(transforms.to_chw(array)))
        label = self.devkit.image_label(image_id)
        return MultiScaleSample(image_id, np.array(image), label, scaled)


class AffinityTrainingSet(_ImageSet):
    """Augmented square crops with confident labels of their cells.

    Gives (float32 3 x crop x crop, uint8 crop/stride x crop/stride): local class indices, 255 void.
    ``low_alpha_dir`` and ``high_alpha_dir`` hold the CRF scores of stage 2.
    """

    def __init__(
        self,
        devkit: Devkit,
        ids: Sequence[str],
        normalize: Normalize,
        low_alpha_dir: str | os.PathLike,
        high_alpha_dir: str | os.PathLike,
        crop_size: int,
        stride: int,
        seed: int,
    ):
        super().__init__(devkit, ids, normalize)
        self.low_alpha_dir, self.high_alpha_dir = Path(low_alpha_dir), Path(high_alpha_dir)
        self.crop_size, self.stride, self.seed = crop_size, stride, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image_id = self.ids[index]
        rng = transforms.sample_rng(self.seed, epoch, image_id)
        image = self.devkit.load_image(image_id)
        scores = self._load_scores(image_id, (image.height, image.width))
        # Cropped before normalization: what lies beyond the image is black.
        array = np.asarray(transforms.colour_jitter(image, rng))
        box = transforms.crop_box(*array.shape[:2], self.crop_size, rng)
        array = self.normalize(transforms.crop_to_canvas(array, box, self.crop_size))
        scores = transforms.crop_to_canvas(scores, box, self.crop_size)
        if rng.random() < 0.5:
            array, scores = transforms.flip(array), transforms.flip(scores)
        low, high = torch.from_numpy(transforms.to_chw(scores)).chunk(2)
        label = affinity_label(low, high, self.stride)
        return torch.from_numpy(transforms.to_chw(array)), label

    def _load_scores(self, image_id: str, size: tuple[int, int]) -> np.ndarray:
        """float32 H x W x 2(K + 1): low-alpha scores, then high-alpha scores, background first."""
        paths = (folder / f"{image_id}.npy" for folder in (self.low_alpha_dir, self.high_alpha_dir))
        low, high = load_crf_scores(*paths, size)
        return np.stack([*low.values(), *high.values()], axis=-1)


class AffinitySample(NamedTuple):
    """One image for the random walk."""

    image_id: str
    photograph: np.ndarray  # uint8 H x W x 3 RGB
    image: Tensor  # float32 3 x H x W, normalized
    classes: list[int]  # those present
    maps: Tensor  # float32 classes x H x W


class AffinityInferenceSet(_ImageSet):
    """Whole images with the class maps of stage 2: ``AffinitySample``."""

    def __init__(
        self,
        devkit: Devkit,
        ids: Sequence[str],
        normalize: Normalize,
        cam_dir: str | os.PathLike,
    ):
        super().__init__(devkit, ids, normalize)
        self.cam_dir = Path(cam_dir)

    def __getitem__(self, index: int) -> AffinitySample:
        image_id = self.ids[index]
        photograph = np.array(self.devkit.load_image(image_id))
        size = photograph.shape[:2]
        path = maps_file(self.cam_dir / f"{image_id}.npy")
        maps = load_cams(path, size, len(self.devkit.class_names))
        require_scores(path, maps)
        image = torch.from_numpy(transforms.to_chw(self.normalize(photograph)))
        stacked = torch.from_numpy(stack_maps(maps, size))
        return AffinitySample(image_id, photograph, image, list(maps), stacked)
