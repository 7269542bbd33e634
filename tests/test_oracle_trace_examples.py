"""The worked example: the same network in torch and Flax, each recorded in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oracle.__main__ import main

EXAMPLES = Path(__file__).parent.parent / "examples"


def script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, EXAMPLES / name, *arguments], check=True, capture_output=True)


@pytest.mark.slow
def test_the_examples_agree_and_their_bug_is_found_where_it_begins(tmp_path: Path):
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
