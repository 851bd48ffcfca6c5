"""``--weights imagenet``: VGG-16's convolutions from torchvision, converted for this network."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tool.run.errors import DataError, UsageError, reason

_CONVOLUTION = re.compile(r"conv\d_\d")


def imagenet_weights(net: nn.Module) -> dict[str, Tensor]:
    """The convolutions conv1_1 to conv5_3 of VGG-16, trained on ImageNet, for ``net.normalize``.

    They are torchvision's ``VGG16_Weights.IMAGENET1K_FEATURES``, which are the original Caffe
    model's for another order of channels and a mean that differs a little. Raises UsageError if the
    network has no such layers, DataError if the download fails.
    """
    from torchvision.models import VGG16_Weights  # slow to import, and rarely needed

    layers = [name for name, _ in net.named_modules() if _CONVOLUTION.fullmatch(name)]
    if not layers:
        raise UsageError(
            "--weights imagenet: is for the VGG-16 networks, and --network is "
            f"{type(net).__module__}; name a weight file."
        )
    weights = VGG16_Weights.IMAGENET1K_FEATURES
    target = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        found = _convolutions(state, layers)
    except Exception as error:  # a network or a damaged file can raise nearly anything
        raise DataError(
            f"--weights imagenet: {weights.url} could not be loaded ({reason(error)}); "
            f"download it by hand and put it at {target}."
        ) from error
    transform, first = weights.transforms(), layers[0]
    found[f"{first}.weight"], found[f"{first}.bias"] = _for_normalization(
        found[f"{first}.weight"], found[f"{first}.bias"], net, transform.mean, transform.std
    )
    return found


def _convolutions(state: Mapping[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """The convolutions among torchvision's ``features.<n>``, under the names of our layers."""
    numbers = [re.fullmatch(r"features\.(\d+)\.weight", name) for name in state]
    indices = sorted(int(match[1]) for match in numbers if match)
    return {
        f"{layer}.{kind}": state[f"features.{index}.{kind}"]
        for layer, index in zip(layers, indices, strict=True)
        for kind in ("weight", "bias")
    }


def _for_normalization(
    weight: Tensor, bias: Tensor, net: nn.Module, mean: Iterable[float], std: Iterable[float]
) -> tuple[Tensor, Tensor]:
    """A first convolution that gives for ``net.normalize(image)`` what it gave for torchvision's.

    weight C x 3 x h x w, bias C, for RGB in 0..1 with ``mean`` subtracted, divided by ``std``. Both
    normalizations are affine in the colour; ours is found by its values for black, red, green and
    blue. Only where the kernel leaves the image do the two differ, by the difference of the means.
    """
    colours = 255 * np.concatenate([np.zeros((1, 3)), np.eye(3)]).astype(np.uint8)[None]
    black, *primaries = net.normalize(colours)[0].astype(np.float64)
    ours = torch.tensor(np.array([(colour - black) / 255 for colour in primaries]).T)
    mean, std = torch.tensor(mean).double(), torch.tensor(std).double()
    # x = ours rgb + black, and theirs = (rgb / 255 - mean) / std, hence theirs = matrix x + shift
    matrix = torch.linalg.inv(ours) / (255 * std[:, None])
    shift = -mean / std - matrix @ torch.tensor(black)
    new_weight = torch.einsum("ocij,cd->odij", weight.double(), matrix)
    new_bias = bias.double() + torch.einsum("ocij,c->o", weight.double(), shift)
    return new_weight.to(weight.dtype), new_bias.to(bias.dtype)
