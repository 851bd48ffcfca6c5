"""torchvision's VGG-16 -> the layers of ``network.vgg16d``, for its input and with its fc6 and fc7.

The first convolution is converted to the network's normalization. fc6 and fc7 are cut down as
DeepLab did it: every fourth channel, and every third row and column of fc6's 7 x 7 kernel.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

SIGNATURE = "features.28.weight"
# The normalizations of torchvision's two files, mean and deviation of RGB in 0..1: of its own
# training, and of Caffe's convolutions, in whose file the fully connected layers are not finite.
NORMALIZATIONS = {
    "IMAGENET1K_V1": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "IMAGENET1K_FEATURES": ((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
}


def from_torchvision(
    net: nn.Module, found: Mapping[str, Tensor], report: Callable[[str], None]
) -> dict[str, Tensor]:
    """The tensors of torchvision's VGG-16 under the network's names, with a line for ``report``.

    Without fc6 and fc7 where the file has the convolutions alone. Other tensors, and those of
    another VGG or for another network, are returned as they are.
    """
    layers = [name for name, _ in net.named_modules() if re.fullmatch(r"conv\d_\d", name)]
    names = [name for name in found if re.fullmatch(r"features\.\d+\.weight", name)]
    if SIGNATURE not in found or len(names) != len(layers):
        return dict(found)
    converted = {}
    for layer, name in zip(layers, sorted(names, key=lambda n: int(n.split(".")[1])), strict=True):
        converted[f"{layer}.weight"] = found[name]
        converted[f"{layer}.bias"] = found[name.replace("weight", "bias")]
    dense = {name: value for name, value in found.items() if name.startswith("classifier.")}
    is_whole = bool(dense) and all(value.isfinite().all() for value in dense.values())
    origin = "IMAGENET1K_V1" if is_whole else "IMAGENET1K_FEATURES"
    weight, bias = f"{layers[0]}.weight", f"{layers[0]}.bias"
    converted[weight], converted[bias] = _for_normalization(
        net, converted[weight], converted[bias], *NORMALIZATIONS[origin]
    )
    if is_whole:
        converted |= _cut_down(dense)
    report(f"torchvision's VGG-16, normalized as its {origin}: the first convolution is converted")
    return converted


def _cut_down(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kernel = dense["classifier.0.weight"].unflatten(1, (-1, 7, 7))
    return {
        "fc6.weight": kernel[::4, :, ::3, ::3],
        "fc6.bias": dense["classifier.0.bias"][::4],
        "fc7.weight": dense["classifier.3.weight"][::4, ::4, None, None],
        "fc7.bias": dense["classifier.3.bias"][::4],
    }


def _for_normalization(
    net: nn.Module, weight: Tensor, bias: Tensor, mean: tuple, std: tuple
) -> list[Tensor]:
    """A first convolution that gives for ``net.normalize(image)`` what it gave for torchvision's.

    weight C x 3 x h x w, bias C, for RGB in 0..1 with this mean and deviation. Both normalizations
    are affine in the colour; ours is found by its values for black, red, green and blue. The result
    differs only where the kernel leaves the image, by the difference of the means.
    """
    colours = 255 * np.concatenate([np.zeros((1, 3)), np.eye(3)]).astype(np.uint8)[None]
    black, *primaries = net.normalize(colours)[0].astype(np.float64)
    ours = torch.tensor(np.array([(colour - black) / 255 for colour in primaries]).T)
    means, deviations = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    # x = ours rgb + black, and theirs = (rgb / 255 - mean) / std, hence theirs = matrix x + shift
    matrix = torch.linalg.inv(ours) / (255 * deviations[:, None])
    shift = -means / deviations - matrix @ torch.tensor(black)
    new_weight = torch.einsum("ocij,cd->odij", weight.double(), matrix)
    new_bias = bias.double() + torch.einsum("ocij,c->o", weight.double(), shift)
    return [new_weight.to(weight.dtype), new_bias.to(bias.dtype)]
