"""A run spread over eight devices makes the updates of one device, and its checkpoints fit any number."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import jax
import pytest

from jaxgpt import mesh, weights
from jaxgpt.errors import InputError
from jaxgpt.parallel_settings import MeshSettings, ProcessSettings

HERE = Path(__file__).parent
NOISE = 5e-6
"""Relative, of float32 sums in another order; the largest that was measured is 2.1e-6."""


SHARES = {"(1, 8, 1)": 1 / 8, "(8, 1, 1)": 1.0, "(2, 2, 2)": 1 / 4, "(4, 1, 2)": 1 / 2, "(1, 4, 2)": 1 / 8}
"""Of a matrix, and of its moments, that one device has, by mesh."""


def on_eight_devices(folder: Path, *models: str) -> dict[str, Any]:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, HERE / "mesh_child.py", folder, *models]
    ran = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def check_runs(runs: dict[str, Any]) -> None:
    for title, run in runs.items():
        for what in ("losses", "norms", "held_out"):
            assert run[what] < NOISE, f"{title}: {what} differ by {run[what]}"
        share = SHARES[title.split(": ")[1]]
        assert run["kernel"] == share, title
        assert run["moments"] == [share, share], title
        assert run["stays"], f"{title}: the step leaves its state elsewhere"
        assert run["programs"] == 1, title


@pytest.mark.slow
def test_a_mesh_trains_as_one_device_does_and_its_checkpoint_is_the_same_bits_on_any_number(tmp_path: Path):
    found = on_eight_devices(tmp_path, "gpt2 with dropout")
    assert len(found["compared"]) == 1
    check_runs(found["compared"])
    # Saved from 8 devices, loaded onto 4, saved again, and so on; each writes its own part.
    assert found["crossed"] == {str(n): {"same": True, "files": n} for n in (8, 4, 2, 1)}
    # Two tables and the six matrices of a layer cross the wire as bfloat16. (XLA's CPU has no collective of
    # that type and widens them again, but from what was rounded: it gathers no parameter as it lies.)
    assert len(found["gathered"]) == 8
    assert all(name.startswith("convert") for name in found["gathered"]), found["gathered"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_rows_alone_or_weights_alone_split_eight_ways_odd_sizes_and_remat(tmp_path: Path):
    found = on_eight_devices(tmp_path, "gpt2 in eighths", "llama of odd sizes", "qwen2, tied, with remat")
    assert len(found["compared"]) == 4
    check_runs(found["compared"])


# -- What is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "batch", "message"),
    [
        (MeshSettings(4), 6, "batch_size 6 cannot be split evenly over 4 devices .* multiple of 4"),
        (MeshSettings(None, 3), 8, "batch_size 8 cannot be split evenly over 6 devices"),
        (MeshSettings(16), 16, "data_parallel 16 × fsdp 1 × tensor_parallel 1 needs 16 devices, JAX sees 8"),
        (MeshSettings(None, 16), 16, "needs 16 devices, JAX sees 8"),
        (MeshSettings(1, 1, 4), 8, "tensor_parallel 4 does not divide .* 6 heads and 2 key/value heads; .* 1, 2"),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_can(
    asked: MeshSettings, batch: int, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(InputError, match=message):
        mesh.layout(asked, conftest.LLAMA, batch, [])


@pytest.mark.parametrize(("rows", "most"), [(16, 8), (12, 6), (7, 7), (1, 1)])
def test_as_many_devices_share_the_rows_as_divide_them_and_fewer_are_told_of(rows: int, most: int):
    notices: list[str] = []
    assert mesh._data_devices(8, 1, rows, notices) == most
    told = f"{most} of 8 devices share the rows: batches of {rows} cannot be split over more"
    assert notices == ([] if most == 8 else [told])


def test_one_device_is_no_mesh():
    assert mesh.layout(MeshSettings(), conftest.LLAMA, 7, []) is mesh.ALONE
    assert mesh.ALONE.parameters(conftest.LLAMA) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_processes": 2}, "go together, with --distributed"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}, "go together, with --distributed"),
        (
            {"coordinator_address": "a", "num_processes": 2, "process_id": 0, "distributed": True},
            "must be HOST:PORT, got 'a'",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2, "distributed": True},
            "process_id must be in 0–1, got 2",
        ),
        (
            {"coordinator_address": "a:٣٤٥٦", "num_processes": 2, "process_id": 0, "distributed": True},
            "must be HOST:PORT, got 'a:٣٤٥٦'",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 2**31, "process_id": 0, "distributed": True},
            "num_processes must be in 1–100,000, got 2147483648",
        ),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout must be in 1–86,400, got 0"),
        ({"heartbeat_timeout": 2**31}, "heartbeat_timeout must be in 1–86,400, got 2147483648"),
    ],
)
def test_processes_that_cannot_be_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        ProcessSettings(**values)


@pytest.mark.parametrize("name", ["data_parallel", "fsdp", "tensor_parallel"])
def test_a_mesh_of_less_than_nothing_is_refused(name: str):
    with pytest.raises(InputError, match=f"{name} must be"):
        MeshSettings(**{name: 0})


def test_what_columns_split_rows_sum_over():
    """Every matrix is split over both axes; the two of a branch on opposite sides."""
    for name, config in conftest.CONFIGS.items():
        split = {p.name: mesh._split(p.name, len(p.shape)) for p in weights.parameters(config)}
        for parameter, axes in split.items():
            if parameter.endswith("kernel"):
                last = parameter.endswith(("attn.out.kernel", "mlp.down.kernel"))
                assert axes == (("tensor", "fsdp") if last else ("fsdp", "tensor")), f"{name}: {parameter}"
            elif parameter.endswith(("attn.out.bias", "mlp.down.bias")) or "norm" in parameter:
                assert not any(axes), f"{name}: {parameter}"
