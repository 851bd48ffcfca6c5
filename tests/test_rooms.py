"""The rooms of DESIGN.md: which module may import which, and how long a source file may be."""

import ast
import graphlib
import subprocess
import sys

import pytest
from helpers import REPOSITORY

SOURCES = [*REPOSITORY.glob("*.py")] + [
    path for room in ("network", "tool", "voc12") for path in (REPOSITORY / room).rglob("*.py")
]
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCES)
}
PROGRAMS = [name for name in MODULES if name.startswith(("train_", "infer_"))]
METHOD = ("transforms", "cam", "crf", "lattice", "affinity", "random_walk", "metrics", "labels")
METHOD = [f"tool.{name}" for name in (*METHOD, "segmentation")]
# The modules that each room may import besides its own. A module is in the first room that fits.
ROOMS = {
    **dict.fromkeys(METHOD, METHOD),
    **{name: ["voc12", "network", "tool"] for name in PROGRAMS},
    "network": ["tool.affinity"],
    "voc12": ["tool"],
    "tool.bench": ["voc12", "network", "tool", *PROGRAMS],
    "tool": [],
}


def _imported(name, in_functions=True):
    """The modules of this repository that a module imports."""
    found, nodes = set(), [ast.parse(MODULES[name].read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else node.module for part in parts}
        elif in_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found & MODULES.keys()


def _is_in(name, rooms):
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("name", MODULES)
def test_source_file_imports_what_its_room_may_and_has_at_most_400_lines(name):
    room = next(room for room in ROOMS if _is_in(name, [room]))
    assert [other for other in _imported(name) if not _is_in(other, [room, *ROOMS[room]])] == []
    number_of_lines = MODULES[name].read_text().count("\n")
    assert number_of_lines <= 400


def test_imports_have_no_circle():
    graph = {name: _imported(name, in_functions=False) for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # its error names the circle


def test_network_loads_no_reader_of_files():
    command = [sys.executable, "-c", "import sys, network.vgg16_cls; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    readers = ["tool.maps", "tool.weights", "tool.run", "voc12", "PIL", "safetensors"]
    assert [name for name in loaded.stdout.split() if _is_in(name, readers)] == []
