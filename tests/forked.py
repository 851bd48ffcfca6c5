"""Runs programs in processes of their own, forked from one that has imported torch already.

``run_forked(run, ...)`` makes the runs one after the other. Each is a dict with "command" and
"cwd", and may have

``ranks``: so many processes, which find each other as under torchrun;
``copies``: so many processes at once, which do not know of each other;
``signal`` with ``at_step`` or ``at_rename``: which signal a process sends itself in the midst of
its n-th step, or when its n-th file is complete but for its name; with ``at_rank``, that rank only;
``dropout`` False: no dropout;
``seen``: a folder where each rank writes what it trained on, see ``_record``.

pytest's own process must not be forked: it has computed gradients, and may have used CUDA. So a
server, which is started once, reads a JSON list of runs from each line of stdin, and prints a list
with a list for each run: of each rank [exit code, stdout, stderr]; a negative code is the signal
that it died of.
"""

import atexit
import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def run_forked(*runs: dict) -> list[list[list]]:
    """The outcomes of the runs, by run and rank: [exit code, stdout, stderr]."""
    server = _server()
    print(json.dumps(runs, default=str), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
    atexit.register(server.communicate)  # closes its stdin, and waits for its end
    return server


def at_call(owner: Any, name: str, number: int, act: Callable, replace: Callable = setattr) -> None:
    """Call ``act`` before the n-th call of a function from now on; replace(owner, name, new)."""
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    replace(owner, name, counted)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _record(path: Path) -> None:
    """Write, for each training step, a digest of each image and a digest of dropout's mask."""
    import torch
    import torch.nn.functional as F

    from network.tinyd import Backbone

    forward_levels, dropout2d, steps = Backbone.forward_levels, F.dropout2d, []

    def digest(tensor):
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    def recorded_levels(self, x):
        if self.training:
            steps.append({"images": [digest(image) for image in x]})
            path.write_text(json.dumps(steps))
        return forward_levels(self, x)

    def recorded_dropout(x, p, training):
        if training:
            state = torch.get_rng_state()
            steps[-1]["kept"] = digest(dropout2d(torch.ones(*x.shape[:2], 1, 1), p, True))
            path.write_text(json.dumps(steps))
            torch.set_rng_state(state)
        return dropout2d(x, p, training)

    Backbone.forward_levels, F.dropout2d = recorded_levels, recorded_dropout


def _become_rank(run: dict, rank: int, port: int, folder: str) -> None:
    import torch
    from helpers import run_program

    code, out, err = 1, "", ""
    try:
        if "ranks" in run:
            size = str(run["ranks"])
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
            os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_PORT=str(port))
        if "signal" in run and run.get("at_rank", rank) == rank:
            number = getattr(signal, run["signal"])
            owner, name, key = os, "replace", "at_rename"
            if "at_step" in run:
                owner, name, key = torch.optim.SGD, "step", "at_step"
            at_call(owner, name, run[key], lambda: os.kill(os.getpid(), number))
        if not run.get("dropout", True):
            torch.nn.functional.dropout2d = lambda x, *_: x
        if "seen" in run:
            _record(Path(run["seen"], f"{rank}.json"))
        code, out, err = run_program(run["command"], run["cwd"])
    except BaseException as error:
        err += repr(error)
    Path(folder, str(rank)).write_text(json.dumps([code, out, err]))
    os._exit(0)


def _run(run: dict) -> list[list]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(run.get("ranks", run.get("copies", 1))):
            child = os.fork()
            if not child:
                _become_rank(run, rank, port, folder)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [
            [code, "", ""] if code else json.loads(Path(folder, str(rank)).read_text())
            for rank, code in enumerate(codes)
        ]


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import torch
    import torchvision.transforms.functional  # noqa: F401 (once, not in each child)

    import infer_aff  # noqa: F401
    import infer_cls  # noqa: F401
    import train_aff  # noqa: F401
    import train_cls  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        signal.alarm(200)  # seconds; it ends the server, and the test with it
        print(json.dumps([_run(run) for run in json.loads(line)]), flush=True)
        signal.alarm(0)
