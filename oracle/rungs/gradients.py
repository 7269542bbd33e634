"""Rung gradients: of the mean loss of one step, for every parameter, in the order of backpropagation.

GPT-2's key bias adds the same number to all scores of a query, which softmax takes
away again: its gradient is zero in truth, and must be zero to within the rounding of
the layer's other gradients.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from oracle import echo, lesson, memory, noise, training_noise, training_probe, training_reference
from oracle.compare import Judge
from oracle.comparison import Comparison
from oracle.lesson import Lesson
from oracle.results import Finding, RungResult
from oracle.training_noise import Unit
from oracle.training_reference import Arrays
from torchref import Decoder, training

NAME = "gradients"
LARGEST = "largest relative L2 error of a gradient"
DOUBTFUL = 2.5
"""Multiples of the noise from which a large model's noise is drawn again: later than a small one's, since each draw is
a backward pass."""
ZERO = 1e-9
"""A true gradient below this share of its layer's scale is zero by the model's mathematics."""


def run(comparison: Comparison) -> RungResult:
    """One finding per parameter, from the head back to the embedding."""
    asked = lesson.whole(comparison)
    _, ours = asked.gradients(lesson.gradient_batches(asked))
    judge = comparison.judge(NAME)
    large = training_probe.is_large(asked.candidate.config)
    compare = _streamed if large else _at_once
    named = set(ours)
    compared = list(compare(comparison, asked, ours, judge))
    found = {finding.tap: finding for finding, _ in compared}
    extra = [Finding(name, _leaf(name), ok=False, problem=LACKS.format("reference")) for name in named - found.keys()]
    findings = [*found.values(), *extra]
    zero = sum(is_zero for _, is_zero in compared)
    largest = max((finding.error for finding, is_zero in compared if not is_zero), default=0.0)
    summary = f"{len(findings)} gradients, largest relative L2 error {largest:.1e}"
    summary += f"; {zero} are zero in truth and zero to rounding" if zero else ""
    summary += "; a large model: one micro-batch, no accumulation (that is left to the optimizer)" if large else ""
    return RungResult(NAME, findings, summary, figures={LARGEST: largest})


LACKS = "the {} has no gradient of it"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


Compared = Iterator[tuple[Finding, bool]]
"""Each finding, and whether the true gradient is zero."""


def _at_once(comparison: Comparison, asked: Lesson, ours: Arrays, judge: Judge) -> Compared:
    given = comparison.reference, asked.corpus, asked.settings
    (_, truth), (_, peer) = lesson.gradients(*given)
    echoes = lesson.echoed_gradients(*given)
    layers: dict[str, Arrays] = {}
    for name in reversed(truth):
        layers.setdefault(_layer(name), {})[name] = truth[name]
    for layer in layers.values():
        yield from _layer_findings(layer, ours, [peer, *echoes], judge)


def _streamed(comparison: Comparison, asked: Lesson, ours: Arrays, judge: Judge) -> Compared:
    """Truth layer by layer, so that its gradients are never held together; `ours` and the peer's go as they are."""
    (batch,) = lesson.gradient_batches(asked)
    memory.release()  # what the candidate's backward pass used
    decoder, peer = comparison.reference.peer.decoder, Arrays()
    by_layer(decoder, batch, peer.update)
    ready: dict[str, tuple[Finding, bool]] = {}

    def compare(draws: Sequence[Arrays], layer: Arrays) -> None:
        backwards = {name: layer[name] for name in reversed(layer)}
        ready.update((item[0].tap, item) for item in _layer_findings(backwards, ours, draws, judge))

    def compare_and_drop(layer: Arrays) -> None:
        compare([peer], layer)
        for name in layer:
            peer.pop(name)
            if not echo.leave_a_doubt([ready[name][0]], DOUBTFUL):
                ours.pop(name, None)
        memory.release()

    by_layer(comparison.reference.truth.decoder, batch, compare_and_drop)
    if doubtful := ours.keys() & ready:
        draws = [_kept(decoder, batch, doubtful)]
        draws += [_kept(moved, batch, doubtful) for moved in echo.echoes(decoder, echo.ALL)]
        by_layer(comparison.reference.truth.decoder, batch, partial(compare, draws))
    yield from sorted(ready.values(), key=lambda item: _from_the_head(item[0]))


def _kept(decoder: Decoder, batch: training.Batch, names: Collection[str]) -> Arrays:
    """Gradients of some parameters."""
    kept = Arrays()
    by_layer(decoder, batch, lambda layer: kept.update((name, layer[name]) for name in layer.keys() & names))
    return kept


def _from_the_head(finding: Finding) -> tuple[int, int]:
    """What lies outside the layers came with the first of them, but for the embedding it belongs in front."""
    if finding.layer is not None:
        return 1, -finding.layer
    return (2, 0) if finding.tap.startswith("embed") else (0, 0)


def by_layer(decoder: Decoder, batch: training.Batch, take: Any) -> None:
    """Hands `take` the gradients of one layer after the other, last layer first; everything else with layer 0."""
    names = [name for name, _ in decoder.named_parameters()]
    missing = Counter(_group(name) for name in names)
    waiting: dict[str, dict[str, Any]] = {}

    def done(name: str, gradient: Any) -> None:
        group = _group(name)
        waiting.setdefault(group, {})[name] = gradient
        missing[group] -= 1
        if not missing[group]:
            found = waiting.pop(group)
            take(training_reference.named({name: found[name] for name in names if name in found}))

    training.gradients_one_by_one(decoder, batch, done)


def _group(name: str) -> str:
    match = re.search(r"\.(\d+)\.", name)
    return match.group(1) if match else "0"


def _layer(name: str) -> str:
    """Parameters whose gradients are rounded at one scale: those of a layer, or one outside the layers alone."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name


def _layer_findings(truth: Arrays, ours: Mapping[str, np.ndarray], peers: Sequence[Arrays], judge: Judge) -> Compared:
    scales: dict[str, float] = {}
    for name, gradient in truth.items():
        scales[_layer(name)] = max(scales.get(_layer(name), 0.0), training_noise.rms(gradient))
    for name, gradient in truth.items():
        if name not in peers[0]:
            continue  # drawn again without it
        if name not in ours:
            yield Finding(name, _leaf(name), ok=False, problem=LACKS.format("candidate")), False
            continue
        scale = scales[_layer(name)]
        is_zero = training_noise.rms(gradient) < ZERO * scale
        unit = Unit(noise.EPSILON[judge.dtype], scale if is_zero else 0.0, noise.EPSILON["float32"] * scale)
        peer, *echoes = (draw[name] for draw in peers)
        measured = training_noise.measure(ours[name], gradient, peer, unit, echoes)
        yield judge.of(name, _leaf(name), measured), is_zero
