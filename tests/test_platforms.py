"""What other systems lack is not needed: a C++ compiler, and what Windows and macOS do not have."""

import subprocess
import sys

from helpers import REPOSITORY
from test_rooms import MODULES

# Names that some platform lacks; the modules' own packages have been imported before.
HIDDEN = """
import importlib, os, signal, sys
modules = sys.argv[1:]
for name in modules:
    importlib.import_module(name)
for name in modules:
    sys.modules.pop(name, None)
for owner, words in (
    (signal, "SIGHUP SIGKILL SIGPIPE SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGQUIT alarm pause"),
    (os, "fork getuid geteuid getpgid killpg setsid sched_getaffinity mkfifo chown getloadavg"),
):
    for name in words.split():
        delattr(owner, name)
sys.modules |= dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios", "pydensecrf"))
for name in modules:
    importlib.import_module(name)
from tool.run import cli
assert cli.default_num_workers() >= 1
"""


def test_modules_import_without_what_windows_and_macos_lack():
    modules = [name for name in MODULES if not name.endswith("__main__")]
    command = [sys.executable, "-c", HIDDEN, *modules]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *crf*) echo "error: command 'g++' failed" >&2; exit 1 ;;
    *) cat "$6" >> "$(dirname "$0")/installed" ;;
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
    assert "pydensecrf" not in (tmp_path / "venv" / "bin" / "installed").read_text()
    assert "pydensecrf" not in (REPOSITORY / "requirements.txt").read_text()
