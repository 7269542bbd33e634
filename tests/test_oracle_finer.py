"""What bfloat16's rounding hides is looked for in float32, and found where it begins."""

import pytest

from oracle.faults import mutants, trial


@pytest.mark.slow
def test_a_loss_fault_below_bfloat16_is_found_in_the_loss():
    (mutant,) = (
        m
        for m in mutants.catalogue()
        if m.faults[0].id == "auxiliary loss" and (m.model, m.dtype) == ("llama", "bfloat16")
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
