"""What bfloat16's rounding hides is looked for in float32, and found where it begins."""

from dataclasses import replace

import pytest

from oracle import diagnosis
from oracle.faults import mutants, trial
from oracle.results import Cause, Finding

BEFORE = Finding("layers.0.mlp.gate", "projection", ok=False)
CAUSE = Cause(
    name="norm bypassed",
    rung="forward",
    tap="layers.0.mlp.gate",
    change="with a norm",
    advice="look",
    before=BEFORE,
    after=BEFORE,
    proved=True,
)


def test_what_rounding_hid_of_a_cause_is_no_second_cause():
    finer = replace(CAUSE, tap="layers.1.mlp.gate", seen_in="float32")
    assert diagnosis.joined([CAUSE], finer) == [replace(CAUSE, also_at=["layers.1.mlp.gate"])]


@pytest.mark.parametrize(
    "changes",
    [
        {"tap": "layers.1.mlp.gate"},
        {"rung": "decode", "change": "with another norm"},
        {"seen_in": "float32", "proved": False},
        {"seen_in": "float32", "advice": "look elsewhere"},
        {"seen_in": "float32", "name": "unknown"},
    ],
)
def test_another_cause_is_kept_apart(changes: dict[str, object]):
    other = replace(CAUSE, **changes)
    assert diagnosis.joined([CAUSE], other) == [CAUSE, other]


LLAMA = "llama-square-biased-tied-linear"
"""The model of its family in which the catalogue plants this fault."""


@pytest.mark.exhaustive
def test_a_loss_fault_below_bfloat16_is_found_in_the_loss():
    (mutant,) = (
        m
        for m in mutants.catalogue()
        if m.faults[0].id == "auxiliary loss" and (m.model, m.dtype) == (LLAMA, "bfloat16")
    )
    report = trial.bisected(mutant)
    assert report.broken is not None
    assert report.broken.name == "optimizer"
    assert [(c.name, c.rung, c.tap, c.seen_in, c.proved) for c in report.causes] == [
        ("z-loss added", "loss", "loss.tokens", "float32", True)
    ]
    assert report.repaired is not None
    assert report.repaired.verdict == "pass"
    record = trial.judged(mutant, report)
    assert record["exact"]
    assert record["named_first"]
