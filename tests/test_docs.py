"""The commands the documentation shows exist, with the flags it shows."""

import re
import shlex
from pathlib import Path

import pytest

from jaxgpt import cli, options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    found: list[str] = []
    for page in PAGES:
        for block in re.findall(r"```(?:console|sh)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in block.splitlines()]
            found += [line for line in lines if line.startswith("jaxgpt ")]
    return found


def test_the_readme_shows_every_verb():
    shown = {verb.name for verb in cli.VERBS for line in commands() if line.startswith(f"jaxgpt {verb.name} ")}
    assert shown >= {verb.name for verb in cli.VERBS} - {"bench"}


@pytest.mark.parametrize("line", commands())
def test_every_documented_command_is_understood(line: str):
    verb, rest = cli._verb(shlex.split(line)[1:])
    options.parse(verb.settings, rest, f"jaxgpt {verb.name}")


def test_links_in_the_documentation_lead_somewhere():
    for page in [*PAGES, ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_named_in_the_documentation_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text("utf-8"))) <= targets, page.name
