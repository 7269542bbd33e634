"""Rung loss: what a batch holds, the loss of every token, and the mean that is trained on.

Batches must be equal wherever they mean something: ids, positions at tokens, targets
where they are trained. The losses are then those of the reference's batches, so that
a wrong batch blames the batch alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from oracle import lesson, noise, training_noise
from oracle.compare import Judge
from oracle.comparison import Comparison
from oracle.lesson import Lesson
from oracle.results import Finding, RungResult
from oracle.training_noise import Unit
from oracle.training_reference import Arrays
from torchref import training

NAME = "loss"
BATCH = "batch."
"""Prefix of the taps of batches."""
TOKENS = "loss.tokens"
MEAN = "loss.mean"

ARRAYS = ("ids", "targets", "mask", "positions", "segments")


def run(comparison: Comparison) -> RungResult:
    """The five arrays of the batches, per-token losses of each micro-batch, the mean loss."""
    asked = lesson.whole(comparison)
    batches = lesson.micro_batches(asked)
    findings = batch_findings(asked, batches)
    judge, step = comparison.judge(NAME), lesson.gradient_batches(asked)
    theirs = lesson.losses_of(comparison)
    versions = [(asked.token_losses(batch), *losses) for batch, losses in zip(step, theirs, strict=True)]
    for number, (losses, batch) in enumerate(zip(versions, step, strict=True), start=1):
        findings.append(_token_finding(judge, losses, batch, f"micro-batch {number} of {len(step)}"))
    findings.append(_mean_finding(judge, asked, versions, step))
    return RungResult(NAME, findings, _summary(findings, batches, step))


def _summary(findings: Sequence[Finding], batches: Sequence[training.Batch], step: Sequence[training.Batch]) -> str:
    trained = ", ".join(str(batch.trained) for batch in batches)
    error = max(finding.error for finding in findings if not finding.tap.startswith(BATCH))
    text = f"{len(batches)} micro-batches with {trained} trained tokens; largest relative error of a loss {error:.1e}"
    left_out = "; a large model: only the last micro-batch's losses" if len(step) < len(batches) else ""
    broken = sum(not finding.ok for finding in findings)
    return (f"{broken} of {len(findings)} comparisons differ; " if broken else "") + text + left_out


# -- Batches ---------------------------------------------------------------------------


def batch_findings(asked: Lesson, batches: Sequence[training.Batch]) -> list[Finding]:
    """One finding for each array of a batch, over all micro-batches."""
    ours: Sequence[Any] = asked.own_batches()
    theirs = [lesson.as_product(batch) for batch in batches]
    if len(ours) != len(theirs):
        problem = f"{len(ours)} micro-batches, the reference makes {len(theirs)}"
        return [Finding(BATCH + name, name, ok=False, problem=problem) for name in ARRAYS]
    return [_batch_finding(name, ours, theirs) for name in ARRAYS]


def _batch_finding(name: str, ours: Sequence[Arrays], theirs: Sequence[Arrays]) -> Finding:
    problems = [_difference(name, a, b) for a, b in zip(ours, theirs, strict=True)]
    number = next((number for number, problem in enumerate(problems) if problem), None)
    if number is None:
        return Finding(BATCH + name, name, ok=True)
    where = f"micro-batch {number + 1} of {len(ours)}"
    return Finding(BATCH + name, name, ok=False, error=1.0, where=where, problem=problems[number])


def _difference(name: str, ours: Arrays, theirs: Arrays) -> str:
    if name not in ours:
        return "the candidate's batch has no such array"
    mine, true = np.asarray(ours[name]), theirs[name]
    if mine.shape != true.shape:
        return f"shape {list(mine.shape)}, the reference has {list(true.shape)}"
    # The mask and the segments say what means something; padding and untrained targets mean nothing.
    matters = {"ids": theirs["segments"] > 0, "positions": theirs["segments"] > 0, "targets": theirs["mask"] > 0}
    wrong = (mine != true) & matters.get(name, np.ones(true.shape, bool))
    if not wrong.any():
        return ""
    row, place = (int(index) for index in np.argwhere(wrong)[0])
    first = f"{mine[row, place]:g}, the reference has {true[row, place]:g}"
    return f"{int(wrong.sum()):,} of {wrong.size:,} entries differ, first in row {row} at place {place}: {first}"


# -- Losses ----------------------------------------------------------------------------


def _trained(losses: np.ndarray, batch: training.Batch) -> np.ndarray:
    return losses[batch.mask.numpy() > 0].astype(np.float64)


Versions = Sequence[np.ndarray]
"""Candidate's, truth's, peer's and any echoes' losses of a micro-batch (B, T)."""


def _token_finding(judge: Judge, losses: Versions, batch: training.Batch, where: str) -> Finding:
    ours, truth, *_ = losses
    if ours.shape != truth.shape:
        problem = f"shape {list(ours.shape)}, the reference has {list(truth.shape)}"
        return Finding(TOKENS, "token_losses", ok=False, where=where, problem=problem)
    ours, truth, peer, *further = (_trained(version, batch) for version in losses)
    measured = training_noise.measure(ours, truth, peer, Unit(noise.EPSILON[judge.dtype]), further)
    return judge.of(TOKENS, "token_losses", measured, where)


def _mean_finding(
    judge: Judge, asked: Lesson, losses: Sequence[Versions], batches: Sequence[training.Batch]
) -> Finding:
    """Of the micro-batches of one step; a mean may be right by luck, so the noise is that of one token at least."""
    loss, _ = asked.gradients(batches)
    _, truths, *draws = zip(*losses, strict=True)
    truth, peer = (np.array([_mean(values, batches)]) for values in (truths, draws[0]))
    errors = [
        _trained(b, batch) - _trained(a, batch)
        for draw in draws
        for a, b, batch in zip(truths, draw, batches, strict=True)
    ]
    unit = Unit(noise.EPSILON["float32"], noise=training_noise.rms(np.concatenate(errors)))
    measured = training_noise.measure(np.array([loss]), truth, peer, unit)
    found = judge.of(MEAN, "mean_loss", measured, f"{len(batches)} micro-batches in one step")
    return replace(found, values=(loss, float(truth[0])))


def _mean(losses: Sequence[np.ndarray], batches: Sequence[training.Batch]) -> float:
    """Summed, then divided once."""
    total = sum(float(_trained(values, batch).sum()) for values, batch in zip(losses, batches, strict=True))
    return total / max(1, sum(batch.trained for batch in batches))
