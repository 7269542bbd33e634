"""Rung decode: a ragged prefill, cached steps on forced ids, then free greedy tokens.

The candidate pads on the right and counts; the reference pads on the left and masks.
Every tap of every step is compared on the real tokens, so a wrong position or a
stale slot shows in the first tap that reads it. Greedy tokens may differ from the
truth's choice only where the truth's own margin is inside the measured noise of the
logits: such a step is counted as a tie, and later steps are judged on the ids the
candidate chose.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.taps import Op, Wiring, ops
from oracle import noise
from oracle.candidate import Candidate, Unrunnable, right_padded
from oracle.compare import Judge, Window
from oracle.echo import ALL, ECHOES, HOPELESS, echo, silent
from oracle.probe import DecodeProbe, Forced
from oracle.reference import Model, Reference, to_numpy
from oracle.results import Finding, RungResult, Token

NAME = "decode"
GREEDY, EXACT, TIES = "greedy tokens", "exact", "certified ties"
SHOWN = 200
"""Greedy choices that a report keeps."""


def run(candidate: Candidate, reference: Reference, probe: DecodeProbe, judge: Judge) -> RungResult:
    """One finding per tap and step in execution order, then one per prompt's greedy tokens."""
    findings = [f for forced in probe.forced for f in forced_findings(candidate, reference, forced, judge)]
    greedy, tokens, summary, figures = _greedy(candidate, reference, probe, judge)
    steps = sum(len(forced.ids) for forced in probe.forced)
    edge = ", to the context's edge" if probe.reaches_edge else ""
    summary = f"{steps} forced steps{edge}; {summary}"
    return RungResult(NAME, [*findings, *greedy], summary, tokens=tokens, figures=figures)


# -- Forced steps ----------------------------------------------------------------------


def forced_findings(candidate: Candidate, reference: Reference, forced: Forced, judge: Judge) -> list[Finding]:
    """One finding per tap and step. The cache begins with the prompt's bucket and grows as generation's does."""
    lengths = np.array([len(prompt) for prompt in forced.prompts], np.int32)
    cache = candidate.empty_cache(len(lengths), int(lengths.max()))
    sides = Sides(candidate, judge, lengths, reference.truth, reference.peer)
    findings: list[Finding] = []
    ids, counts = right_padded(forced.prompts), lengths
    for step in range(len(forced.ids) + 1):
        cache = candidate.grown_cache(cache, int(lengths.max()) + step)
        taps, cache = candidate.advance(ids, counts, cache)
        findings += sides.compare(taps, step, forced)
        if step < len(forced.ids):
            ids, counts = forced.ids[step][:, None], np.ones_like(lengths)
    return findings


class Sides:
    """Advances truth and peer beside the candidate."""

    def __init__(self, candidate: Candidate, judge: Judge, lengths: np.ndarray, truth: Model, peer: Model):
        self.judge = judge
        self.ops = ops(candidate.config, Wiring(cached=True))
        self.lengths = lengths
        self.models = [(truth, silent), (peer, silent), *((peer, echo(number)) for number in range(ECHOES))]
        self.pasts: list[Any] = [None] * len(self.models)
        self.units: dict[str, noise.Unit] = defaultdict(noise.Unit)

    def compare(self, taps: dict[str, Any], step: int, forced: Forced) -> list[Finding]:
        """All taps of one forward on the real tokens."""
        where = ", ".join(filter(None, (forced.label, f"step {step}" if step else "prefill")))
        ours, theirs = self.windows(step)
        sides = self.advance(step, forced)
        findings: list[Finding] = []
        allowed: list[np.ndarray] | None = None
        for op in self.ops:
            if any(op.tap not in side for side in sides):
                findings.append(self.judge.missing(op, "reference", where))
                continue
            array = np.asarray(taps[op.tap])
            truth, peer, *echoes = [theirs.rows(op.tap, side[op.tap]) for side in sides]
            if op.function == "attention_mask":
                allowed = truth
                findings += self._padding(op, ours.padding_is_hidden(array), where)
            finding = self.judge.finding(
                op,
                ours.rows(op.tap, array),
                truth,
                peer,
                allowed=allowed if op.function == "mask" else None,
                where=where,
                unit=self.units[op.tap],
                echoes=echoes,
            )
            findings.append(finding)
        unknown = sides[0].keys() - {op.tap for op in self.ops}
        return findings + [self.judge.missing(Op(tap, "", ()), "candidate", where) for tap in sorted(unknown)]

    def _padding(self, op: Op, hidden: bool, where: str) -> list[Finding]:
        problem = "a token may attend to padding or to a slot that was never written"
        return [] if hidden else [Finding(op.tap, op.function, ok=False, where=where, problem=problem)]

    def windows(self, step: int) -> tuple[Window, Window]:
        """Where the real tokens of a step are in the candidate's arrays, and in the references'."""
        width = int(self.lengths.max())
        ends = self.lengths + step
        pads = width - self.lengths
        sources = [slice(0, end) for end in ends], [slice(pad, width + step) for pad in pads]
        if step:
            one = [slice(0, 1)] * len(ends)
            return Window(one, sources[0]), Window(one, sources[1])
        return Window(sources[0], sources[0]), Window(sources[1], sources[1])

    def advance(self, step: int, forced: Forced) -> list[dict[str, np.ndarray]]:
        """All taps of truth, peer and echoes in the next step."""
        width = int(self.lengths.max())
        pads = width - self.lengths
        if step:
            ids, positions = forced.ids[step - 1][:, None], (self.lengths + step - 1)[:, None]
            real = np.ones_like(ids, bool)
        else:
            real = np.arange(width)[None] >= pads[:, None]
            rows = zip(pads, forced.prompts, strict=True)
            ids = np.array([[*[0] * int(pad), *prompt] for pad, prompt in rows])
            positions = np.maximum(np.arange(width)[None] - pads[:, None], 0)
        sides: list[dict[str, np.ndarray]] = []
        for index, (side, on_tap) in enumerate(self.models):
            taps, self.pasts[index] = side.advance(ids, positions, real, self.pasts[index], on_tap)
            sides.append({tap: to_numpy(value) for tap, value in taps.items()})
        return sides


# -- Greedy tokens ---------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What became of one prompt's greedy tokens."""

    tokens: Sequence[Token]
    wrong: str
    padded_rows: int
    """Steps at which a padded row of the vocabulary had the largest logit."""


def _greedy(
    candidate: Candidate, reference: Reference, probe: DecodeProbe, judge: Judge
) -> tuple[list[Finding], list[Token], str, dict[str, float]]:
    try:
        generated = candidate.greedy(probe.prompts, probe.new_tokens)
    except Unrunnable as error:
        return [Finding("logits", "greedy", ok=False, where="greedy", problem=str(error))], [], "no greedy tokens", {}
    choices = [
        judged(candidate, reference, judge, row, list(prompt), new)
        for row, (prompt, new) in enumerate(zip(probe.prompts, generated, strict=True))
    ]
    findings = [
        Finding("logits", "greedy", ok=not c.wrong, where=f"greedy, prompt {row}", problem=c.wrong)
        for row, c in enumerate(choices)
    ]
    tokens = [token for c in choices for token in c.tokens]
    outcomes = Counter(token.outcome for token in tokens)
    figures: dict[str, float] = {GREEDY: len(tokens), EXACT: outcomes["exact"], TIES: outcomes["tie"]}
    summary = f"{outcomes['exact']:,} of {len(tokens):,} greedy tokens exact, {outcomes['tie']:,} certified ties"
    won = sum(c.padded_rows for c in choices)
    return (
        findings,
        _closest(tokens),
        summary + (f"; a padded vocabulary row would have won {won} times" if won else ""),
        figures,
    )


def _closest(tokens: list[Token]) -> list[Token]:
    """The choices that were hardest to make, in their order; wrong ones first of all."""
    hardest = sorted(
        tokens, key=lambda token: (token.outcome != "wrong", token.margin / max(token.noise, sys.float_info.min))
    )[:SHOWN]
    return sorted(hardest, key=lambda token: (token.prompt, token.step))


def judged(
    candidate: Candidate, reference: Reference, judge: Judge, row: int, prompt: list[int], new: list[int]
) -> Choices:
    """Truth's logits, given what the candidate wrote so far, judge each of its choices.

    The noise is drawn again where it may decide: attention that is nearly tied may turn over at one position of one
    draw in several.
    """
    ids = np.array([[*prompt, *new[:-1]]])
    last = slice(len(prompt) - 1, None)
    truth = reference.truth.logits(ids)[0, last]
    real = truth[:, : candidate.real_ids]
    second, best = np.partition(real, -2, axis=-1)[:, -2:].T
    deficits = best - real[np.arange(len(new)), new]
    expected = real.argmax(-1)

    def weighed(numbers: Iterable[int]) -> list[Token]:
        draws = [draw[0, last] for draw in reference.logit_draws(ids, numbers)]
        # Either logit of a pair may be off by the noise limit.
        limit = 2 * judge.calibration.threshold(NAME, judge.dtype, "head")[1]
        tolerance = limit * _rounding(truth, draws, noise.EPSILON[judge.dtype])
        sizes = zip(best - second, deficits, tolerance, strict=True)
        return [
            Token(row, step, id, int(expected[step]), *map(float, size))
            for step, (id, size) in enumerate(zip(new, sizes, strict=True))
        ]

    tokens = weighed(range(ECHOES))
    if any(token.noise < token.deficit < HOPELESS * token.noise for token in tokens):
        tokens = weighed(ALL)
    padded = int((truth.argmax(-1) >= real.shape[-1]).sum())
    return Choices(tokens, next((_wrong(token) for token in tokens if token.outcome == "wrong"), ""), padded)


def _rounding(truth: np.ndarray, draws: Sequence[np.ndarray], epsilon: float) -> np.ndarray:
    """(T,): how far the worst logit of each position is off in any draw.

    All draws may be lucky at one position, so none has less than the mean, nor than one ulp.
    """
    errors = np.max([np.abs(draw - truth).max(-1) for draw in draws], axis=0)
    return np.maximum(np.maximum(errors, errors.mean()), epsilon * np.abs(truth).max(-1))


def _wrong(token: Token) -> str:
    return (
        f"greedy token {token.step} is {token.chosen}, the reference's is {token.expected}; "
        f"its deficit of {token.deficit:.2g} is outside the noise of {token.noise:.2g}"
    )
