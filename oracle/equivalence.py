"""Both families in fp32 and bf16 against the reference, and faults that must be found.

Each random Hugging Face folder is written without the product, imported by it, and
the checkpoint compared with the folder. Then the same comparison is shown to fail:
known faults are planted, and each must be found where it begins.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxgpt.errors import InputError
from oracle import models, noise, subject
from oracle.faults import FAULTS, Fault
from oracle.reference import DTYPES
from oracle.reports import terminal
from oracle.results import Report

FAULT_DTYPES = {"gpt2": ("float32",), "llama-square-biased-tied-linear": ("float32", "bfloat16")}
"""Faults are planted in one model of each family; both have a square projection."""


@dataclass(frozen=True)
class Line:
    """One comparison and whether it answered as it must."""

    name: str
    report: Report
    ok: bool
    text: str


def show(out: Path) -> int:
    """Run everything, print a line each, write the reports; 0 if all answered as they must, else 1.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot make the folder {out}: {error.strerror}") from error
    passed = failed = 0
    for line in _lines():
        path = out / f"{line.name.replace(' ', '-')}.json"
        path.write_text(json.dumps(line.report.to_dict(), indent=1, allow_nan=False) + "\n")
        passed, failed = passed + line.ok, failed + (not line.ok)
        print(line.text, flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def _lines() -> Iterator[Line]:
    calibration = noise.stored_calibration()
    with TemporaryDirectory() as place:
        for name, config in models.MODELS.items():
            for dtype in DTYPES:
                folder, checkpoint = Path(place, name, dtype, "hf"), Path(place, name, dtype, "jaxgpt")
                models.write(config, folder, dtype)
                subject.import_folder(folder, checkpoint)
                yield _clean(name, dtype, folder, checkpoint, calibration)
                if dtype in FAULT_DTYPES.get(name, ()):
                    model_config = subject.candidate(checkpoint, dtype).config
                    for fault in (fault for fault in FAULTS if fault.applies(model_config)):
                        yield _planted(fault, name, dtype, folder, checkpoint, calibration)


def _clean(name: str, dtype: str, folder: Path, checkpoint: Path, calibration: noise.Calibration) -> Line:
    start = time.perf_counter()
    answer = subject.compare(checkpoint, folder, dtype, calibration)
    ok = answer.verdict == "pass"
    text = f"{'PASS' if ok else 'FAIL'}  {name:<32} {dtype:<9} {time.perf_counter() - start:5.1f} s  {_detail(answer)}"
    return Line(f"{name} {dtype}", answer, ok, text)


def _detail(answer: Report) -> str:
    if answer.verdict != "pass":
        return terminal.verdict(answer)
    kl = next(finding.error for rung in answer.rungs for finding in rung.findings if finding.op == "kl")
    return f"KL {kl:.0e}; {answer.rungs[-1].summary}"


def _planted(
    fault: Fault, name: str, dtype: str, folder: Path, checkpoint: Path, calibration: noise.Calibration
) -> Line:
    start = time.perf_counter()
    config = subject.candidate(checkpoint, dtype).config
    answer = subject.compare(checkpoint, folder, dtype, calibration, plant=fault.plant)
    first = answer.first_divergence()
    found = (first["rung"], first["tap"]) if first else None
    ok = found == (fault.rung, fault.tap(config))
    where = f"found in {found[0]} at {found[1]}" if found else f"NOT found: {answer.verdict}"
    expected = "" if ok else f", expected in {fault.rung} at {fault.tap(config)}"
    seconds = time.perf_counter() - start
    text = f"{'PASS' if ok else 'FAIL'}  planted: {fault.name:<27} in {name.split('-')[0]} {dtype} {seconds:5.1f} s"
    return Line(f"planted {fault.name} {name} {dtype}", answer, ok, f"{text}  {where}{expected}")
