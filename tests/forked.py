"""Runs programs in processes of their own, forked from one that has imported torch already.

    python tests/forked.py '[{"command": "train_cls --lr 0.1", "cwd": DIR, ...}, ...]'

Runs are made one after the other. Each may have

``ranks``: so many processes, which find each other as under torchrun;
``copies``: so many processes at once, which do not know of each other;
``signal`` with ``at_step`` or ``at_rename``: which signal a process sends itself in the midst of
its n-th step, or when its n-th file is complete but for its name; with ``at_rank``, that rank only;
``dropout`` False: no dropout;
``seen``: a folder where each rank writes what it trained on, see ``_record``.

Prints a JSON list with a list for each run: of each rank [exit code, stdout, stderr]; a negative
code is the signal that it died of.

pytest's own process must not be forked: it has computed gradients, and may have used CUDA.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def run_forked(*runs: dict) -> list[list[list]]:
    """The outcomes of the runs, by run and rank: [exit code, stdout, stderr]."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(runs, default=str)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=200,
    )
    return json.loads(done.stdout)


def _signal_self(number: int, owner: Any, name: str, at_call: int) -> None:
    """Have this process send itself a signal before the n-th call of a function from now on."""
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


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
        y = dropout2d(x, p, training)
        if training:
            steps[-1]["kept"] = digest(dropout2d(torch.ones(1, 64, 1, 1), p, True))
            path.write_text(json.dumps(steps))
        return y

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
            if "at_step" in run:
                _signal_self(number, torch.optim.SGD, "step", run["at_step"])
            else:
                _signal_self(number, os, "replace", run["at_rename"])
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
        outcomes = []
        for rank, child in enumerate(children):
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            outcomes.append(
                [code, "", ""] if code else json.loads(Path(folder, str(rank)).read_text())
            )
    return outcomes


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import torch
    import torchvision.transforms.functional  # noqa: F401 (once, not in each child)

    import infer_aff  # noqa: F401
    import infer_cls  # noqa: F401
    import train_aff  # noqa: F401
    import train_cls  # noqa: F401

    torch.set_num_threads(1)
    print(json.dumps([_run(run) for run in json.loads(sys.argv[1])]))
