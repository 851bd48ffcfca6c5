"""What the programs iterate over: augmented crops to train on, whole images to infer.

A training sample is asked for as (epoch, index) and depends on (seed, epoch, id) alone.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tool import transforms
from tool.affinity import affinity_label
from tool.labels import VOID
from tool.maps import load_cams, load_crf_scores, stack_maps
from voc12.devkit import Devkit, load_photograph


@dataclass
class _ImageSet(Dataset):
    """A list of images of a devkit, normalized for one network."""

    devkit: Devkit
    ids: Sequence[str]
    normalize: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class ClassifierTrainingSet(_ImageSet):
    """Augmented square crops with labels: (float32 3 x crop x crop, float32 [classes])."""

    crop_size: int
    resize_long: tuple[int, int]  # shortest and longest long side of the resized image
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image_id = self.ids[index]
        label = self.devkit.image_label(image_id)
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
        return torch.from_numpy(transforms.to_chw(array)), torch.from_numpy(label)


@dataclass
class ClassifierValidationSet(_ImageSet):
    """Centre crops with labels: (float32 3 x crop x crop, float32 [classes])."""

    crop_size: int

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        array = self.normalize(np.asarray(self.devkit.load_image(self.ids[index])))
        box = transforms.centre_box(*array.shape[:2], self.crop_size)
        array = transforms.crop_to_canvas(array, box, self.crop_size)
        label = self.devkit.image_label(self.ids[index])
        return torch.from_numpy(transforms.to_chw(array)), torch.from_numpy(label)


def at_scales(image: Image.Image, scales: Sequence[float], normalize: Callable) -> list[Tensor]:
    """The image at each scale, normalized: float32 3 x h x w."""
    arrays = (normalize(np.asarray(transforms.rescale(image, scale))) for scale in scales)
    return [torch.from_numpy(transforms.to_chw(array)) for array in arrays]


class MultiScaleSample(NamedTuple):
    """One image for multi-scale inference."""

    image_id: str
    photograph: np.ndarray  # uint8 H x W x 3 RGB
    label: np.ndarray  # float32 [classes]
    scaled: list[Tensor]  # a scale each: float32 3 x h x w, normalized


@dataclass
class MultiScaleSet(_ImageSet):
    """Whole images at several scales: ``MultiScaleSample``."""

    scales: Sequence[float]

    def __getitem__(self, index: int) -> MultiScaleSample:
        image_id = self.ids[index]
        image = self.devkit.load_image(image_id)
        scaled = at_scales(image, self.scales, self.normalize)
        label = self.devkit.image_label(image_id)
        return MultiScaleSample(image_id, np.array(image), label, scaled)


@dataclass
class AffinityTrainingSet(_ImageSet):
    """Augmented square crops with confident labels of their cells.

    Gives (float32 3 x crop x crop, uint8 crop/stride x crop/stride): local class indices, 255 void.
    ``low_alpha_dir`` and ``high_alpha_dir`` hold the CRF scores of stage 2.
    """

    low_alpha_dir: str | os.PathLike
    high_alpha_dir: str | os.PathLike
    crop_size: int
    stride: int
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image_id = self.ids[index]
        rng = transforms.sample_rng(self.seed, epoch, image_id)
        image = self.devkit.load_image(image_id)
        folders = self.low_alpha_dir, self.high_alpha_dir
        paths = (Path(folder, f"{image_id}.npy") for folder in folders)
        low, high = load_crf_scores(*paths, (image.height, image.width))
        scores = np.stack([*low.values(), *high.values()], axis=-1)  # H x W x 2 (K + 1)
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


@dataclass
class SegmenterTrainingSet(_ImageSet):
    """Augmented square crops with labels: (float32 3 x crop x crop, uint8 crop x crop, 255 void).

    ``label_dir`` holds the labels, index images.
    """

    label_dir: str | os.PathLike
    crop_size: int
    scales: tuple[float, float]  # smallest and largest factor of the image's size
    hsv_shift: int
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image_id = self.ids[index]
        rng = transforms.sample_rng(self.seed, epoch, image_id)
        image = self.devkit.load_image(image_id)
        path = Path(self.label_dir, f"{image_id}.png")
        label = Image.fromarray(self.devkit.load_label(path, (image.height, image.width)))
        image = transforms.rescale(image, rng.uniform(*self.scales))
        label = np.asarray(label.resize(image.size, resample=Image.Resampling.NEAREST))
        array = self.normalize(np.asarray(transforms.shift_hsv(image, self.hsv_shift, rng)))
        # Cropped after normalization: what lies beyond the image is the mean colour, and void.
        box = transforms.crop_box(*label.shape, self.crop_size, rng)
        array = transforms.crop_to_canvas(array, box, self.crop_size)
        label = transforms.crop_to_canvas(label, box, self.crop_size, fill=VOID)
        if rng.random() < 0.5:
            array, label = transforms.flip(array), transforms.flip(label)
        return torch.from_numpy(transforms.to_chw(array)), torch.from_numpy(label)


class PhotographSample(NamedTuple):
    """One photograph at several scales."""

    image_id: str
    photograph: np.ndarray  # uint8 H x W x 3 RGB
    scaled: list[Tensor]  # a scale each: float32 3 x h x w, normalized


@dataclass
class PhotographSet(Dataset):
    """Photographs of any place, by id, at several scales: ``PhotographSample``."""

    photographs: Sequence[tuple[str, Path]]  # id and file
    normalize: Callable[[np.ndarray], np.ndarray]
    scales: Sequence[float]
    upright: bool  # as EXIF says

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> PhotographSample:
        image_id, path = self.photographs[index]
        image = load_photograph(path, self.upright)
        scaled = at_scales(image, self.scales, self.normalize)
        return PhotographSample(image_id, np.array(image), scaled)


class AffinitySample(NamedTuple):
    """One image with its class maps, for the random walk or the CRF."""

    image_id: str
    photograph: np.ndarray  # uint8 H x W x 3 RGB
    image: Tensor  # float32 3 x H x W, normalized
    classes: list[int]  # those present
    maps: Tensor  # float32 classes x H x W


@dataclass
class AffinityInferenceSet(_ImageSet):
    """Whole images with their class maps: ``AffinitySample``."""

    cam_dir: str | os.PathLike
    normalization: str | None = None  # of tool.seeds
    by_label: bool = False  # leave out classes that the image-level label does not have

    def __getitem__(self, index: int) -> AffinitySample:
        image_id = self.ids[index]
        photograph = np.array(self.devkit.load_image(image_id))
        size, num_classes = photograph.shape[:2], len(self.devkit.class_names)
        path = Path(self.cam_dir, f"{image_id}.npy")
        maps = load_cams(path, size, num_classes, self.normalization)
        if self.by_label:
            label = self.devkit.image_label(image_id)
            maps = {k: values for k, values in maps.items() if label[k]}
        image = torch.from_numpy(transforms.to_chw(self.normalize(photograph)))
        stacked = torch.from_numpy(stack_maps(maps, size))
        return AffinitySample(image_id, photograph, image, list(maps), stacked)
