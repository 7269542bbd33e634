"""Which faults are planted where: every class in both families and dtypes, over the variants of each family."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import weights
from jaxgpt.config import ModelConfig, from_hf
from oracle import models
from oracle.candidate import Candidate
from oracle.faults.catalogue import CATALOGUE
from oracle.faults.fault import BOTH, TEXT, Fault
from oracle.faults.held_out import HELD_OUT

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
SEED = 20_001
"""Of weights and inputs; calibrations stay below 10,000."""
CONTEXT = 40
"""Positions of the models that faults are planted in: short, for speed."""


def _shortened(name: str, context: int = CONTEXT, **changes: Any) -> models.Config:
    """A model of `oracle.models` with two layers and a short context."""
    config = models.MODELS[name]
    is_gpt2 = config["model_type"] == "gpt2"
    sizes = {"n_layer": 2, "n_positions": context} if is_gpt2 else {"num_hidden_layers": 2}
    return {**config, **sizes, **({} if is_gpt2 else {"max_position_embeddings": context}), **changes}


FAMILIES: dict[str, dict[str, models.Config]] = {
    "GPT-2": {name: _shortened(name) for name in ("gpt2", "gpt2-erf-untied")},
    "Llama": {
        name: _shortened(name) for name in ("llama", "llama-square-biased-tied-linear", "llama3-scaling", "qwen2-tied")
    },
}
"""Variants by family: a class is planted in the next one that it applies to."""
SPECIAL: dict[str, dict[str, models.Config]] = {
    "GPT-2": {
        "gpt2-11-layers": _shortened("gpt2", 24, n_layer=11, n_embd=12, n_inner=14, n_head=2),
        "gpt2-two-buckets": _shortened("gpt2", 72),
    },
    "Llama": {
        "llama-11-layers": _shortened("llama", 24, num_hidden_layers=11, hidden_size=12, intermediate_size=14),
        "llama-two-buckets": _shortened("llama", 72),
        **{name: _shortened(name) for name in ("qwen3", "mistral-window", "qwen3-yarn-biased")},
    },
}
"""For classes that exist in none of the others."""
WITH_TEXT: dict[str, dict[str, models.Config]] = {
    "GPT-2": {"gpt2-chat": _shortened("gpt2", 16, vocab_size=50_304, n_layer=1, n_embd=8, n_inner=12, n_head=2)},
    "Llama": {"llama-characters": _shortened("llama", 16, vocab_size=320, num_hidden_layers=1, hidden_size=12)},
}
"""With a tokenizer and a template: GPT-2's vocabulary and ChatML; characters and paired tags."""
CONFIGS: dict[str, models.Config] = {
    name: config
    for tables in (FAMILIES, SPECIAL, WITH_TEXT)
    for family in tables.values()
    for name, config in family.items()
}


def config_of(model: str) -> ModelConfig:
    """The model's config as the product reads it."""
    return from_hf(CONFIGS[model])


@dataclass(frozen=True)
class Mutant:
    """One or two faults in one model and dtype."""

    faults: tuple[Fault, ...]
    model: str
    dtype: str
    table: str = "catalogue"
    """`catalogue`, `held out` or `pairs`."""

    @property
    def id(self) -> str:
        """Unique among all that are planted."""
        names = " + ".join(fault.id for fault in self.faults)
        return f"{self.table} | {names} | {self.model} | {self.dtype} | seed {SEED}"

    @property
    def expected(self) -> list[tuple[str, str]]:
        """Rung and first tap of each fault."""
        config = config_of(self.model)
        return [(fault.rung, fault.tap(config)) for fault in self.faults]

    @property
    def key(self) -> "Key":
        """What another process needs to make the same mutant: functions do not travel."""
        return self.table, tuple(fault.id for fault in self.faults), self.model, self.dtype


Key = tuple[str, tuple[str, ...], str, str]
"""Table, faults, model, dtype."""


def of(key: Key) -> Mutant:
    """The mutant of a key."""
    table, ids, model, dtype = key
    known = {fault.id: fault for fault in (HELD_OUT if table == "held out" else CATALOGUE)}
    return Mutant(tuple(known[id] for id in ids), model, dtype, table)


@dataclass(frozen=True)
class Equivalent:
    """A mutant that changes nothing."""

    fault: Fault
    model: str
    dtype: str
    reason: str


def catalogue() -> list[Mutant]:
    """Every row of the catalogue in both families and dtypes, where it exists and changes something."""
    return list(_planted(CATALOGUE, "catalogue"))


def held_out() -> list[Mutant]:
    """Every fault that nobody knows, likewise."""
    return list(_planted(HELD_OUT, "held out"))


def _planted(faults: Sequence[Fault], table: str) -> Iterator[Mutant]:
    for number, fault in enumerate(faults):
        for family in FAMILIES:
            for shift, dtype in enumerate(BOTH):
                models_ = [model for model in _where(fault, family, dtype) if not _reason(fault, model, dtype)]
                if models_:
                    yield Mutant((fault,), models_[(number + shift) % len(models_)], dtype, table)


def _where(fault: Fault, family: str, dtype: str) -> list[str]:
    if dtype not in fault.dtypes:
        return []
    tables = (WITH_TEXT,) if fault.needs == TEXT else (FAMILIES, SPECIAL)
    for variants in (table[family] for table in tables):
        found = [name for name in variants if fault.applies(config_of(name))]
        if found:
            return found
    return []


def _reason(fault: Fault, model: str, dtype: str) -> str:
    return fault.equivalent(config_of(model), dtype)


def equivalents() -> list[Equivalent]:
    """Every row in every variant and dtype in which it changes nothing, with the reason."""
    return [
        Equivalent(fault, model, dtype, reason)
        for fault in CATALOGUE
        for dtype in BOTH
        for family in FAMILIES
        for model in _where(fault, family, dtype)
        if (reason := _reason(fault, model, dtype))
    ]


def sampled(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """So many of them, in their order."""
    chosen = set(random.Random(seed).sample(range(len(mutants)), min(count, len(mutants))))
    return [mutant for index, mutant in enumerate(mutants) if index in chosen]


# -- Two faults at once ----------------------------------------------------------------


def pairs(count: int, seed: int) -> tuple[list[Mutant], list[tuple[str, str]]]:
    """Random pairs of mutants of one model and dtype that leave each other alone.

    And the pairs that were drawn and left out, with the reason.
    """
    rng = random.Random(seed)
    by_place: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in catalogue():
        if mutant.faults[0].needs:
            continue  # nothing of a text side can hide a fault of the model, and the other way round
        by_place.setdefault((mutant.model, mutant.dtype), []).append(mutant)
    places = [place for place, mutants in by_place.items() if len(mutants) > 1]
    chosen: dict[str, Mutant] = {}
    skipped: dict[str, str] = {}
    while len(chosen) < count:
        model, dtype = rng.choice(places)
        one, other = rng.sample(by_place[model, dtype], 2)
        first, second = sorted((one, other), key=lambda mutant: CATALOGUE.index(mutant.faults[0]))
        pair = Mutant((*first.faults, *second.faults), model, dtype, "pairs")
        reason = masking(pair)
        if reason:
            skipped[pair.id] = reason
        else:
            chosen[pair.id] = pair
    return list(chosen.values()), list(skipped.items())


WHOLE = ("config", "forward_pass", "step", "real_ids")
"""Fields of a candidate that two faults cannot both have."""


def masking(pair: Mutant) -> str:
    """Why one of two faults hides or undoes the other; empty if they leave each other alone."""
    if pair.expected[0] == pair.expected[1]:
        return "both begin at the same place"
    one, other = (_touched(fault, pair) for fault in pair.faults)
    shared = sorted(one & other)
    return f"both change {shared[0]}" if shared else ""


def _touched(fault: Fault, pair: Mutant) -> set[str]:
    """What a fault changes in a candidate, by planting it in one of random parameters."""
    true = _stand_in(pair.model, pair.dtype)
    planted = fault.plant(true)
    names = {name for name in WHOLE if getattr(planted, name) != getattr(true, name)}
    names |= {
        f"parameter {n}" for n in {*true.stored, *planted.stored} if true.stored.get(n) is not planted.stored.get(n)
    }
    names |= {f"op {key}" for key in planted.replace if planted.replace[key] is not true.replace.get(key)}
    names |= {part for part in ("training",) if getattr(planted, part) != getattr(true, part)}
    return names


@cache
def _stand_in(model: str, dtype: str) -> Candidate:
    rng = np.random.default_rng(0)
    shapes = {parameter.name: parameter.shape for parameter in weights.parameters(config_of(model))}
    stored = {name: rng.normal(size=shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    return Candidate(config_of(model), stored, dtype)
