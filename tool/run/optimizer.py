"""The optimizer of all trainings, and its learning rate."""

import torch
from torch import nn

# Factors of learning rate and weight decay of the four parameter groups: pretrained weights and
# biases, new weights and biases (released code).
GROUPS = ((1, 1), (2, 0), (10, 1), (20, 0))
POLY_POWER = 0.9


def build_optimizer(
    net: nn.Module, lr: float, weight_decay: float, momentum: float | None = None
) -> torch.optim.SGD:
    """SGD over a network's four parameter groups.

    Momentum is the decay's value unless given: the released code passes the decay in its place.
    """
    momentum = weight_decay if momentum is None else momentum
    groups = [
        {"params": group, "base_lr": rate * lr, "weight_decay": decay * weight_decay}
        for group, (rate, decay) in zip(net.get_parameter_groups(), GROUPS, strict=True)
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def set_poly_lr(
    optimizer: torch.optim.Optimizer, step: int, max_step: int, first_only: bool = False
) -> None:
    """lr = base lr * (1 - step / max_step)^0.9, for the given step (from 0), in every group.

    With ``first_only``, the other groups keep their base lr.
    """
    for group in optimizer.param_groups[: 1 if first_only else None]:
        group["lr"] = group["base_lr"] * (1 - step / max_step) ** POLY_POWER
