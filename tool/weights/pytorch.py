"""PyTorch's checkpoints, by ``torch.load(weights_only=True)``, which runs no code from a file."""

import argparse
import io
import os
import pickle
import re
import warnings
from typing import Any

import numpy as np
import torch

from tool.files import atomic_write
from tool.run.errors import DataError, printable, reason

# Plain data that checkpoints of other programs hold beside the tensors; none of it runs code.
_scalar, _ = np.float64().__reduce__()  # what NumPy pickles a scalar by; it has moved once
_codes = f"?{np.typecodes['AllFloat']}{np.typecodes['AllInteger']}"
PLAIN_DATA = [
    argparse.Namespace,
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(code)) for code in _codes},
]


def load_tensors(path: str | os.PathLike, kind: str) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, plain containers, numbers and strings.

    Raises DataError, with the ``kind`` of file, if it is missing, damaged, or more than tensors.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN_DATA):
            warnings.simplefilter("ignore")  # about old forms of checkpoints
            # From PyTorch 2.6 on, no file makes this run code (CVE-2025-32434).
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S{1,100})", str(error))
        wish = f"wants to load {printable(name[1])}" if name else "is damaged or more than tensors"
        raise DataError(f"{path}: refused: it {wish}; a {kind} holds tensors only.") from error
    except Exception as error:  # a damaged file can raise nearly anything
        if "TorchScript archives" in str(error):
            wish = "is a TorchScript archive, which holds code; save its state_dict by torch.save"
            raise DataError(f"{path}: {wish}.") from error
        problem = "damaged or incomplete" if "zip archive" in str(error) else reason(error)
        raise DataError(f"{path}: not a readable {kind} ({problem}).") from error


def save_tensors(path: str | os.PathLike, content: Any) -> None:
    """Write what ``load_tensors`` reads, whole or not at all; raises OSError on a full disk."""
    buffer = io.BytesIO()  # torch.save's own error does not name a full disk
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
