"""Where a program computes: device choice and random seeds."""

import torch

from tool.errors import UsageError

DEVICE_TYPES = ("cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` takes CUDA where there is a usable one.

    Raises UsageError for a device that this machine or build does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in DEVICE_TYPES:
            raise RuntimeError(f"it is none of {', '.join(DEVICE_TYPES)}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name}: not usable here ({reason}); try auto or cpu."
        ) from error
    return device


def seed_torch(seed: int) -> None:
    """Seed torch's global generator; it decides fresh initialization and dropout, and no more."""
    torch.manual_seed(seed)
