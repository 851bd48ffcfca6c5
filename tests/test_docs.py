"""README and docs: length, links, and the commands and flags that they name."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _commands():
    """(program, its arguments) of every complete command; a block with cd is another project's."""
    for language, block in (fence for page in PAGES for fence in FENCE.findall(page.read_text())):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if language == "sh" else []
            if words[:1] == ["python3"] and "..." not in words and not block.startswith("cd "):
                program, *arguments = [word for word in words[1:] if word != "-m"]
                yield program.removesuffix(".py"), arguments


def _parser(program):
    is_package = (ROOT / program.replace(".", "/")).is_dir()
    return importlib.import_module(program + ".__main__" * is_package).get_args_parser()


def _flags(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            yield from (flag for command in action.choices.values() for flag in _flags(command))


def _anchors(page):
    titles = re.findall(r"^#+ (.*)", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve_and_flags_in_the_text_exist(page):
    text = FENCE.sub("", page.read_text())
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in _anchors(target), anchor
    known = {flag for program, _ in _commands() for flag in _flags(_parser(program))}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*", text)) <= known


@pytest.mark.parametrize(("program", "arguments"), list(_commands()))
def test_commands_are_accepted(program, arguments):
    _parser(program).parse_args(arguments)
