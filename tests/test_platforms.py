"""What other systems lack is not needed: a C++ compiler, and what Windows and macOS do not have."""

import subprocess
import sys

from helpers import REPOSITORY
from test_rooms import MODULES

# The modules are imported, then again without the names that some platform lacks.
HIDDEN = """
import importlib, os, signal, sys
names = sys.argv[1:]
[importlib.import_module(name) for name in names]
[sys.modules.pop(name) for name in names]
for name in "SIGHUP SIGKILL SIGPIPE SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGQUIT alarm pause".split():
    delattr(signal, name)
for name in "fork getuid geteuid getpgid killpg setsid sched_getaffinity mkfifo chown".split():
    delattr(os, name)
sys.modules |= dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios", "pydensecrf"))
[importlib.import_module(name) for name in names]
assert sys.modules["tool.run.cli"].default_num_workers() >= 1
"""


def test_modules_import_without_what_windows_and_macos_lack():
    command = [sys.executable, "-c", HIDDEN, *MODULES]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *crf*) echo "error: command 'g++' failed" >&2; exit 1 ;;
esac
"""


def test_set_up_goes_on_without_a_compiler(tmp_path):
    python = tmp_path / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    command = ["make", "-C", REPOSITORY, "setup", f"PYTHON={python}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without pydensecrf" in done.stdout
    assert "g++" not in done.stderr
    assert (tmp_path / "venv" / ".installed").exists()
    assert "pydensecrf" not in (REPOSITORY / "requirements.txt").read_text()
