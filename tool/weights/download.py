"""``--weights imagenet``: the file that a network's training starts from, downloaded once."""

import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tool.run.errors import DataError, reason

MIRROR = "https://download.visinf.tu-darmstadt.de/data/2020-cvpr-araslanov-1-stage-wseg/models"
TORCHVISION = "https://download.pytorch.org/models"
# The files for each kind of network; the first that can be had is taken.
START_FILES = {
    "VGG-16": (f"{MIRROR}/vgg16_20M.pth", f"{TORCHVISION}/vgg16-397923af.pth"),
    "ResNet-38": (f"{MIRROR}/ilsvrc-cls_rna-a1_cls1000_ep-0001.pth",),
    "ResNet-50": (f"{TORCHVISION}/resnet50-0676ba61.pth",),
}
SILENT_SECONDS = 30  # a server that sends nothing for so long is given up

T = TypeVar("T")


def first_usable(
    urls: tuple[str, ...], use: Callable[[str, Path], T], report: Callable[[str], None]
) -> T:
    """What ``use(url, path)`` returns for the first file that can be downloaded and used.

    ``report`` gets a line for each that cannot. Raises DataError if none can, which says where to
    put a file by hand.
    """
    cache, problems = Path(torch.hub.get_dir(), "checkpoints"), []
    for url in urls:
        try:
            return _use_file(url, cache / Path(url).name, use)
        except Exception as error:  # a network or a damaged file can raise nearly anything
            problems.append(f"{url} cannot be used ({reason(error).removesuffix('.')})")
            if url != urls[-1]:
                report(f"--weights imagenet: {problems[-1]}")
    raise DataError(
        f"--weights imagenet: {'; '.join(problems)}; download it by hand and put it into {cache}, "
        "or name another file."
    )


def _use_file(url: str, path: Path, use: Callable[[str, Path], T]) -> T:
    """Use a file of the cache, or download it; a new one is kept only if it can be used."""
    if path.exists():
        return use(url, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unchecked = path.with_name(f"{path.name}.{os.getpid()}.unchecked")
    digits = re.search(r"-([0-9a-f]{8})\.", path.name)  # of torchvision's files, of their SHA-256
    print(f"downloading {url} to {path}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENT_SECONDS)
    try:
        torch.hub.download_url_to_file(url, str(unchecked), digits and digits[1])
        result = use(url, unchecked)
        unchecked.replace(path)
        return result
    finally:
        socket.setdefaulttimeout(timeout)
        unchecked.unlink(missing_ok=True)
