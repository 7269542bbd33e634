"""The documented commands, and the worked example: one network in torch and Flax, each recorded by itself."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from oracle.__main__ import _parser, main
from oracle.traces import name_map

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an example as a script, in this process: to import torch or JAX takes longer than what it does."""

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def commands() -> list[str]:
    pages = [ROOT / "docs/traces.md", EXAMPLES / "README.md"]
    return [
        line for page in pages for line in re.findall(r"^\$ python -m oracle (.*)$", page.read_text(), re.MULTILINE)
    ]


@pytest.mark.parametrize("line", commands())
def test_every_documented_command_is_understood(line: str):
    assert _parser().parse_args(shlex.split(line)).verb in ("record", "diff")


def test_the_documented_map_is_understood(tmp_path: Path):
    (block,) = re.findall(r"```text\n(.*?)```", (ROOT / "docs/traces.md").read_text(), re.DOTALL)
    (tmp_path / "names.map").write_text(block)
    assert len(name_map.load(tmp_path / "names.map")) == 6


@pytest.mark.slow
def test_the_examples_agree_and_their_bug_is_found_where_it_begins(tmp_path: Path, script: Callable[..., None]):
    weights, torch, flax, bug, truth, report = (
        str(tmp_path / name) for name in ("w.safetensors", "torch", "flax", "bug", "truth", "report.json")
    )
    script("torch_trace.py", "--weights", weights, "--out", torch)
    script("torch_trace.py", "--weights", weights, "--out", truth, "--float64")
    script("flax_trace.py", "--weights", weights, "--out", flax)
    script("flax_trace.py", "--weights", weights, "--out", bug, "--bug")
    names = ["--map", str(EXAMPLES / "mixer.map")]
    assert main(["diff", torch, flax, *names]) == 0
    assert main(["diff", torch, flax, *names, "--truth", truth]) == 0
    assert main(["diff", torch, bug, *names, "--truth", truth, "--json", report]) == 1
    document = json.loads(Path(report).read_text())
    assert document["first_divergence"]["tap"] == "layers.0.channel_mlp.fc2"
    assert document["first_divergence"]["where"] == "blocks.0.channels.down of B"
