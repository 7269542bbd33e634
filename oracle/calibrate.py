"""Where the limits come from: clean runs, of which the largest ratios are stored.

A limit is the factor times the largest ratio that any clean run of that op, dtype and
rung reached; an op that was always exact (a reshape, a lookup) must stay exact. Every
run is written to a file beside the calibration as it ends, so that a calibration that
was interrupted goes on where it stopped.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxgpt
import oracle
import torchref
from oracle import clean, limits, noise, output_file, workers
from oracle.rungs import environment

FACTOR = 4.0
"""From the largest clean ratio to the limit: `limits.headroom` says what it leaves."""
QUICK_FACTOR = 8.0
"""The same for a quick plan, which has seen less."""


def calibrate(out: Path = noise.CALIBRATION, *, quick: bool = False) -> Iterator[str]:
    """Carry out a plan, or what is left of it, and write the file; yields a line per run.

    Raises:
        NotClean: a run found a difference that needs no limit to be one (in another process: WorkerFailed).
    """
    runs = clean.quick_plan() if quick else clean.full_plan()
    header = {"environment": setting(), "code": fingerprint()}
    beside = out.with_suffix(".runs.jsonl")
    done = _resume(beside, header)
    wanted = {run.name for run in runs}
    yield f"{len(runs)} clean runs, {len(done.keys() & wanted)} of them in {beside.name}"
    left = [run for run in runs if run.name not in done]
    number = len(runs) - len(left)
    with beside.open("a") as file:
        for record in workers.answers(clean.groups(left), clean.measured):
            done[record["run"]] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            number += 1
            yield f"{number}/{len(runs)}  {record['run']:<60} {record['seconds']:6.1f} s  {record['largest']}"
    records = [done[run.name] for run in runs]
    document = limits.document(records, QUICK_FACTOR if quick else FACTOR)
    write(out, {**document, "plan": "quick" if quick else "full", "environment": header["environment"]})
    yield from limits.lines(document)


def write(out: Path, document: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    output_file.write_text(out, json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")


# -- Resuming --------------------------------------------------------------------------


def _resume(path: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Records of an earlier calibration by the same code in the same environment; otherwise a fresh file."""
    lines = path.read_text().splitlines() if path.exists() else []
    # A line that was being written when the power failed is no record.
    values = [value for line in lines if (value := _json(line)) is not None]
    kept = values[1:] if values and values[0] == json.loads(json.dumps(header)) else []
    path.write_text("".join(json.dumps(value) + "\n" for value in (header, *kept)))
    return {record["run"]: record for record in kept}


def _json(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


ASIDE = ("faults", "repairs", "reports", "traces", "verbs")
"""Packages of the oracle that no clean run enters."""


def fingerprint() -> str:
    """Of the code whose noise is measured."""
    digest = hashlib.sha256()
    for package in (jaxgpt, torchref, oracle):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if package is not oracle or name.parts[0] not in ASIDE:
                digest.update(str(name).encode() + path.read_bytes())
    return digest.hexdigest()


def setting() -> dict[str, Any]:
    """Versions and machine, for the file."""
    return {**environment.versions(), "machine": platform.machine(), **_cpu()}


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {"cpu": platform.processor()}
    pairs = [line.partition(":") for line in info.read_text().splitlines()]
    values = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    wide = ("avx", "fma", "amx", "asimd", "sve")
    features = sorted(flag for flag in values.get("flags", values.get("Features", "")).split() if flag.startswith(wide))
    return {"cpu": values.get("model name", platform.processor()), "cpu_features": features}
