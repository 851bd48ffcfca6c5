"""The heads: a classifier with class activation maps, AffinityNet, and two segmenters.

A network inherits from a head and a backbone, ``class Net(ClassifierHead, vgg16d.Backbone)``:
published weights have the layers of both at one level (``fc8.weight``, ``conv1_1.weight``).

A backbone has:

- ``stride``: pixels per feature cell;
- ``level_channels``: the channels of its three feature levels, all of that stride, lowest first;
- ``forward_levels(x)``: B x 3 x H x W -> the three levels, each B x channels x h x w;
- ``normalize(image)``: uint8 H x W x 3 RGB -> float32 H x W x 3, as the pretrained weights expect;
- ``frozen``: the names of the modules whose parameters do not train;
- ``optional_layers``: those of its layers that some files to start from lack, if there are any.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tool.affinity import pair_affinity


class _Head(nn.Module):
    """The frozen layers and the parameter groups of all heads."""

    # Modules that pretrained weights lack, and those of them with ten times the learning rate.
    new_layers: tuple[str, ...] = ()
    fast_layers: tuple[str, ...] = ()

    def _freeze(self) -> None:
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and name not in self.new_layers:
                module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "_Head":
        """Set the mode, but keep frozen layers and the backbone's batch norm as they are."""
        super().train(mode)
        self._freeze()
        return self

    def get_parameter_groups(self) -> tuple[list, list, list, list]:
        """The trainable parameters: pretrained weights and biases, new weights and biases."""
        groups: tuple[list, list, list, list] = ([], [], [], [])
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            module, _, kind = name.rpartition(".")
            groups[2 * (module in self.fast_layers) + (kind == "bias")].append(parameter)
        return groups


class ClassifierHead(_Head):
    """A 1x1 convolution classifies; its maps before pooling are the CAMs (Sec. 3.1, eq. 1)."""

    new_layers = fast_layers = ("fc8",)
    dropout = 0.5  # released code

    def __init__(self, num_classes: int = 20):
        super().__init__()
        self.fc8 = nn.Conv2d(self.level_channels[-1], num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        self._freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images B x 3 x H x W -> logits B x classes."""
        features = self.forward_levels(x)[-1]
        features = F.dropout2d(features, self.dropout, self.training)
        return self.fc8(features).mean(dim=(2, 3))

    def forward_cam(self, x: Tensor) -> Tensor:
        """Normalized images B x 3 x H x W -> CAMs B x classes x h x w, at least 0."""
        return self.scale_cam(F.relu(self.fc8(self.forward_levels(x)[-1])))

    def scale_cam(self, cam: Tensor) -> Tensor:
        """Scaling of the CAMs that a network may override; the identity by default."""
        return cam


class AffinityHead(_Head):
    """AffinityNet: reduces the channels of three levels, and mixes them (Sec. 3.2, Figure 3)."""

    new_layers = fast_layers = ("f8_3", "f8_4", "f8_5", "f9")
    reduced_channels = (64, 128, 256)  # released code

    def __init__(self, radius: int = 5):
        super().__init__()
        self.radius = radius
        reduced = self.reduced_channels
        self.f8_3 = nn.Conv2d(self.level_channels[0], reduced[0], 1, bias=False)
        self.f8_4 = nn.Conv2d(self.level_channels[1], reduced[1], 1, bias=False)
        self.f8_5 = nn.Conv2d(self.level_channels[2], reduced[2], 1, bias=False)
        self.f9 = nn.Conv2d(sum(reduced), sum(reduced), 1, bias=False)
        for reduce in (self.f8_3, self.f8_4, self.f8_5):
            nn.init.kaiming_normal_(reduce.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)  # 4: released code
        self._freeze()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalized images B x 3 x H x W -> the features that pairs compare, B x C x h x w."""
        low, middle, high = self.forward_levels(x)
        low = F.elu(self.normalize_level("3", self.f8_3(low)))
        middle = F.elu(self.normalize_level("4", self.f8_4(middle)))
        high = F.elu(self.normalize_level("5", self.f8_5(high)))
        return F.elu(self.f9(torch.cat([low, middle, high], dim=1)))

    def normalize_level(self, level: str, x: Tensor) -> Tensor:
        """Normalization of a reduced level ("3", "4" or "5"); the identity by default."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images B x 3 x H x W -> affinities B x offsets x sources, in 0..1, eq. (5)."""
        return pair_affinity(self.forward_features(x), self.radius)


class GroupNormAffinityHead(AffinityHead):
    """AffinityNet with group norm on each reduced level, for backbones without batch norm."""

    new_layers = (*AffinityHead.new_layers, "gn8_3", "gn8_4", "gn8_5")
    level_groups = (8, 16, 32)

    def __init__(self, radius: int = 5):
        super().__init__(radius)
        levels = zip("345", self.level_groups, self.reduced_channels, strict=True)
        for level, groups, channels in levels:
            self.add_module(f"gn8_{level}", nn.GroupNorm(groups, channels))

    def normalize_level(self, level: str, x: Tensor) -> Tensor:
        return self.get_submodule(f"gn8_{level}")(x)


class SegmenterHead(_Head):
    """Scores each cell: dropout and a 1x1 convolution (DeepLab-LargeFOV, Chen et al. 2015)."""

    new_layers = fast_layers = ("fc8",)
    loss_on_grid = True  # the labels are resized to the logits, not the logits to the labels

    def __init__(self, num_classes: int = 20):
        super().__init__()
        self.fc8 = nn.Conv2d(self.level_channels[-1], num_classes + 1, 1)
        nn.init.normal_(self.fc8.weight, std=0.01)
        nn.init.zeros_(self.fc8.bias)
        self._freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images B x 3 x H x W -> logits B x (classes + 1) x h x w, background first."""
        return self.fc8(F.dropout2d(self.forward_levels(x)[-1], 0.5, self.training))


class WideSegmenterHead(_Head):
    """A dilated 3x3 convolution and two 1x1, on a backbone with batch norm (SEAM's segmenter)."""

    new_layers = ("fov", "fov_norm", "mix", "mix_norm", "fc8")
    fast_layers = ("fov", "mix", "fc8")
    loss_on_grid = False
    channels, norm_momentum = 512, 3e-4

    def __init__(self, num_classes: int = 20):
        super().__init__()
        width = self.channels
        self.fov = nn.Conv2d(self.level_channels[-1], width, 3, padding=12, dilation=12, bias=False)
        self.fov_norm = nn.BatchNorm2d(width, momentum=self.norm_momentum)
        self.mix = nn.Conv2d(width, width, 1, bias=False)
        self.mix_norm = nn.BatchNorm2d(width, momentum=self.norm_momentum)
        self.fc8 = nn.Conv2d(width, num_classes + 1, 1)
        for layer in (self.fov, self.mix, self.fc8):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc8.bias)
        self._freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images B x 3 x H x W -> logits B x (classes + 1) x h x w, background first."""
        x = F.relu(self.fov_norm(self.fov(self.forward_levels(x)[-1])))
        x = F.relu(self.mix_norm(self.mix(x)))
        return self.fc8(F.dropout(x, 0.5, self.training))
