"""One trial: a mutant, or a true model, before the oracle; what it said, as a record of JSON values."""

import shutil
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from jaxgpt import chat, checkpoint, weights
from jaxgpt.checkpoint import Contents
from jaxgpt.formats import hf
from jaxgpt.taps import Wiring, names
from jaxgpt.tokenizer import Tokenizer
from oracle import clean, diagnosis, finer, ladder, models, noise
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.faults.mutants import CONFIGS, SEED, WITH_TEXT, Key, Mutant, config_of, of
from oracle.faults.tables.text import is_bpe
from oracle.noise import Calibration
from oracle.reference import Reference
from oracle.results import CONFIG_FIELD, UNKNOWN, Cause, Report
from oracle.rungs import optimizer
from oracle.text import Text

Record = dict[str, Any]
NAMES = 3
"""A cause in the first three of what is said counts as named."""


@dataclass(frozen=True)
class Subject:
    """A true model and what it is compared with."""

    candidate: Candidate
    reference: Reference
    folder: Path


@lru_cache(maxsize=2)
def subject(model: str, dtype: str) -> Subject:
    """The model in a dtype; its folder lives as long as it does."""
    place = Path(mkdtemp())
    folder = models.write(CONFIGS[model], place / "hf", dtype, SEED)
    candidate = models.candidate(folder, dtype)
    if any(model in family for family in WITH_TEXT.values()):
        candidate = _with_text(candidate, folder, place / "jaxgpt")
    made = Subject(candidate, Reference.load(folder, dtype), folder)
    weakref.finalize(made, shutil.rmtree, place, ignore_errors=True)
    return made


CORPUS = "The quick brown fox jumps over the lazy dog. 0123456789\n"


def _with_text(candidate: Candidate, folder: Path, directory: Path) -> Candidate:
    """The model with a text side as it comes out of a checkpoint; the folder gets the tokenizer's files."""
    template = chat.CHATML if is_bpe(candidate.config) else chat.TAGS
    kind, rows = "gpt2" if is_bpe(candidate.config) else "char", candidate.config.vocab_size
    tokenizer = Tokenizer.create(kind, template=template, corpus=[CORPUS], model_vocab_size=rows)
    params = {name: np.asarray(array) for name, array in candidate.stored.items()}
    stops = list(tokenizer.stop_ids)
    contents = Contents(candidate.config, params, "sft", candidate.dtype, stops, tokenizer, template, {})
    checkpoint.save(directory, 0, contents).result()
    loaded = checkpoint.load(directory)
    shutil.rmtree(folder)
    hf.write(loaded, folder)
    return replace(candidate, text=Text.of(loaded), real_ids=tokenizer.vocab_size)


def compared(mutant: Mutant, calibration: Calibration) -> Comparison:
    """A mutant beside the true model's folder. A text side's folder is the product's export as well."""
    true = subject(mutant.model, mutant.dtype)
    candidate = true.candidate
    for fault in mutant.faults:
        candidate = fault.plant(candidate)
    export = true.folder if candidate.text else None
    return Comparison(candidate, true.reference, export, true.folder, calibration, SEED)


def bisected(mutant: Mutant) -> Report:
    """The oracle's answer to a mutant.

    The ladder is climbed to where the mutant shows; causes are then proved there and
    by the rung behind.
    """
    comparison = compared(mutant, noise.stored_calibration())
    found = ladder.climb(comparison)
    if found.verdict == "pass":
        return found
    return diagnosis.bisect(comparison, rungs=_rungs(found.rungs[-1].name, mutant))


def _rungs(broken: str, mutant: Mutant) -> list[str]:
    """Up to the rung behind all that were broken or expected to be; of two faults one may show in the optimizer only,
    in float32."""
    ladder_ = list(ladder.LADDER)
    wanted = {broken, *(rung for rung, _ in mutant.expected)}
    wanted |= {optimizer.NAME} if len(mutant.faults) > 1 and finer.hides(mutant.dtype) else set()
    last = max(number for number, name in enumerate(ladder_) if name in wanted)
    return ladder_[: last + 2]


def tried(key: Key) -> Record:
    """The record of a mutant; a crash of the oracle is one, too."""
    mutant, start = of(key), time.perf_counter()
    try:
        record = judged(mutant, bisected(mutant))
    except Exception as error:
        record = named(_header(mutant) | _NOTHING) | {"crash": f"{type(error).__name__}: {error}".splitlines()[0]}
    return record | {"seconds": round(time.perf_counter() - start, 2)}


_NOTHING: Record = {
    "verdict": "crash",
    "found": None,
    "detected": False,
    "exact": False,
    "within_one": False,
    "causes": [],
}


def _header(mutant: Mutant) -> Record:
    return {
        "id": mutant.id,
        "table": mutant.table,
        "classes": [fault.name for fault in mutant.faults],
        "faults": [fault.id for fault in mutant.faults],
        "model": mutant.model,
        "dtype": mutant.dtype,
        "expected": [list(place) for place in mutant.expected],
    }


def judged(mutant: Mutant, report: Report) -> Record:
    """What the oracle said of a mutant, beside what it should have said."""
    first = report.first_divergence()
    found = (first["rung"], first["tap"]) if first else None
    if report.causes and report.causes[0].seen_in:
        found = report.causes[0].rung, report.causes[0].tap
    said = {
        "verdict": report.verdict,
        "found": list(found) if found else None,
        "detected": report.verdict == "fail",
        # Of two faults either may be found first.
        "exact": found in mutant.expected or _is_planted_field(mutant, found),
        "within_one": found is not None and (distance(mutant, found) <= 1 or _is_planted_field(mutant, found)),
        "causes": [_cause(cause) for cause in report.causes],
    }
    return named(_header(mutant) | said)


def _is_planted_field(mutant: Mutant, found: tuple[str, str] | None) -> bool:
    """A config field that the fault itself changed: that is where it begins, whatever op computes with it."""
    if found is None or not found[1].startswith(CONFIG_FIELD):
        return False
    true = subject(mutant.model, mutant.dtype).candidate
    planted = true
    for fault in mutant.faults:
        planted = fault.plant(planted)
    field = found[1].removeprefix(CONFIG_FIELD)
    return getattr(planted.config, field) != getattr(true.config, field)


def _cause(cause: Cause) -> Record:
    said = {"name": cause.name, "rung": cause.rung, "tap": cause.tap, "proved": cause.proved}
    return said | {"tied": list(cause.tied), "runners_up": list(cause.runners_up), "also_at": list(cause.also_at)}


def named(record: Record) -> Record:
    """The record with its causes judged by the names that the table accepts today."""
    mutant = of(key_of(record))
    accepted = [fault.accepted for fault in mutant.faults]
    causes: list[Record] = record["causes"]
    said = _said(causes[0]) if causes else []
    return record | {
        "named": bool(said) and said[0] != UNKNOWN,
        "named_first": bool(said) and said[0] in accepted[0],
        "named_in_three": any(name in accepted[0] for name in said[:NAMES]),
        "proved": bool(said) and said[0] != UNKNOWN and causes[0]["proved"],
        "both_found": all(
            _is_found(place, names, causes) for place, names in zip(mutant.expected, accepted, strict=True)
        ),
    }


def key_of(record: Record) -> Key:
    """The mutant's key."""
    return record["table"], tuple(record["faults"]), record["model"], record["dtype"]


def _said(cause: Record) -> list[str]:
    """Names in the order in which they are put forward."""
    return [cause["name"], *cause["tied"], *cause["runners_up"]]


def _is_found(place: tuple[str, str], accepted: frozenset[str], causes: Sequence[Record]) -> bool:
    """By its name, or where it is unknown by its place."""
    rung, tap = place
    return any(
        {cause["name"], *cause["tied"]} & accepted
        or (cause["rung"] == rung and tap in (cause["tap"], *cause["also_at"]))
        for cause in causes
    )


def distance(mutant: Mutant, found: tuple[str, str]) -> float:
    """How many ops (or modules of parameters) lie between an expected first tap and the found one."""
    return min(_distance(_order(mutant), place, found) for place in mutant.expected)


def _distance(order: dict[str, list[str]], expected: tuple[str, str], found: tuple[str, str]) -> float:
    (rung, tap), (found_rung, found_tap) = expected, found
    if tap == found_tap:
        return 0.0 if rung == found_rung else 1.0
    if rung == found_rung == optimizer.NAME:
        # One op updates all parameters; whose gradient is small enough to show it first is chance.
        return 1.0
    if rung != found_rung or tap not in order[rung] or found_tap not in order[rung]:
        return float("inf")
    return abs(order[rung].index(tap) - order[rung].index(found_tap))


def _order(mutant: Mutant) -> dict[str, list[str]]:
    config = config_of(mutant.model)
    modules = list(dict.fromkeys(p.name.rpartition(".")[0] for p in weights.parameters(config)))
    uncached, cached = list(names(config)), list(names(config, Wiring(cached=True)))
    by_rung = dict.fromkeys(ladder.LADDER, modules)
    return by_rung | {"operators": uncached, "forward": uncached, "decode": cached}


# -- True models -----------------------------------------------------------------------


def untouched(run: clean.Run) -> Record:
    """A true model before the whole ladder: anything but a pass is a false alarm."""
    start = time.perf_counter()
    report = clean.carry_out(run, noise.stored_calibration(), tuple(ladder.LADDER))
    broken = next((rung for rung in report.rungs if rung.verdict != "pass"), None)
    first = broken.first if broken else None
    return {
        "id": f"clean | {run.name}",
        "table": "clean",
        "model": run.model,
        "dtype": run.dtype,
        "verdict": report.verdict,
        "rung": broken.name if broken else "",
        "tap": first.tap if first else "",
        "noise": [first.aggregate, first.worst, *first.threshold] if first else [],
        "seconds": round(time.perf_counter() - start, 2),
    }
