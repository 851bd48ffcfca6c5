"""``--weights imagenet``: VGG-16's convolutions from torchvision, converted for this network."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tool.run.errors import DataError, UsageError, reason


def imagenet_weights(net: nn.Module) -> dict[str, Tensor]:
    """The convolutions conv1_1 to conv5_3 of VGG-16, trained on ImageNet, for ``net.normalize``.

    torchvision's ``IMAGENET1K_FEATURES`` are the original Caffe model's for RGB and another mean.
    Raises UsageError if the network has no such layers, DataError if the download fails.
    """
    from torchvision.models import VGG16_Weights  # slow to import, and rarely needed

    layers = [name for name, _ in net.named_modules() if re.fullmatch(r"conv\d_\d", name)]
    if not layers:
        raise UsageError(f"--weights imagenet: is for VGG-16, not {type(net).__module__}.")
    weights = VGG16_Weights.IMAGENET1K_FEATURES
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        # features.<n>.weight and .bias, in the order of our layers; its classifier is void
        found = {}
        for kind in ("weight", "bias"):
            values = [v for name, v in state.items() if re.fullmatch(rf"features.*{kind}", name)]
            found |= {f"{layer}.{kind}": v for layer, v in zip(layers, values, strict=True)}
    except Exception as error:  # a network or a damaged file can raise nearly anything
        target = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        raise DataError(
            f"--weights imagenet: {weights.url} could not be loaded ({reason(error)}); "
            f"download it by hand and put it at {target}."
        ) from error
    weight, bias = f"{layers[0]}.weight", f"{layers[0]}.bias"
    converted = _for_normalization(net, found[weight], found[bias], weights.transforms())
    return found | dict(zip((weight, bias), converted, strict=True))


def _for_normalization(net: nn.Module, weight: Tensor, bias: Tensor, transform) -> list[Tensor]:
    """A first convolution that gives for ``net.normalize(image)`` what it gave for torchvision's.

    weight C x 3 x h x w, bias C, for RGB in 0..1 normalized by ``transform``. Both normalizations
    are affine in the colour; ours is found by its values for black, red, green and blue. The result
    differs only where the kernel leaves the image, by the difference of the means.
    """
    colours = 255 * np.concatenate([np.zeros((1, 3)), np.eye(3)]).astype(np.uint8)[None]
    black, *primaries = net.normalize(colours)[0].astype(np.float64)
    ours = torch.tensor(np.array([(colour - black) / 255 for colour in primaries]).T)
    mean, std = torch.tensor(transform.mean).double(), torch.tensor(transform.std).double()
    # x = ours rgb + black, and theirs = (rgb / 255 - mean) / std, hence theirs = matrix x + shift
    matrix = torch.linalg.inv(ours) / (255 * std[:, None])
    shift = -mean / std - matrix @ torch.tensor(black)
    new_weight = torch.einsum("ocij,cd->odij", weight.double(), matrix)
    new_bias = bias.double() + torch.einsum("ocij,c->o", weight.double(), shift)
    return [new_weight.to(weight.dtype), new_bias.to(bias.dtype)]
