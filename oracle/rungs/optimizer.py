"""Rung optimizer: 20 steps with accumulation, warm-up, decay of the rate, weight decay and clipping.

Adam divides by the root of the second moment, so an element whose gradient is zero to
within rounding moves by a whole learning rate in a direction that rounding decides.
Errors are therefore weighed, element by element, with the smallest number that the
truth has divided that element by so far: what is compared is, up to the learning rate,
the error in the units of the gradient. Compute is float32 in every dtype: master
weights and moments are float32 always, and bfloat16's rounding of the gradients, which
the rung before measures, would be amplified in the same way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxgpt.train_step import StepReport
from oracle import echo, lesson, noise, training_noise, training_probe
from oracle.compare import Judge
from oracle.comparison import Comparison
from oracle.lesson import COMPARED, ByStep, Course
from oracle.noise import Ratios
from oracle.results import Finding, RungResult
from oracle.training_noise import Unit
from oracle.training_reference import Arrays, State

NAME = "optimizer"
UPDATE = "error of all updates, of the global ‖Δθ‖"
LEARNING_RATE = "learning_rate"
EPSILON = noise.EPSILON["float32"]
LEAST = 1e-5
"""Noise of an update relative to itself, at least: a hundredth of what the least of faults changes. One element
that rounding moves the other way reaches all others through the next forward, and need not do so in the peer."""

Answers = Sequence[tuple[Arrays, StepReport]]


def run(comparison: Comparison) -> RungResult:
    """The learning rate of each step, and after some of them every parameter."""
    asked = lesson.part(comparison)
    large = training_probe.is_large(comparison.candidate.config)
    course = lesson.course_of(comparison)
    steps = enumerate(asked.steps(lesson.groups(asked), course.clip_norm, asked.settings.steps), 1)
    answers = [(params if number in COMPARED else Arrays(), report) for number, (params, report) in steps]
    judge = comparison.judge(NAME)
    findings = _findings(judge, course, answers, course.draws)
    if echo.leave_a_doubt(findings):
        findings = _findings(judge, course, answers, [*course.draws, *course.further])
    zero = [name for name, divisor in course.truth[0].divisors.items() if training_noise.rms(divisor) < 1.01e-8]
    error = _error(course, answers, zero)
    summary = _summary(course, findings, error, len(zero), large=large)
    return RungResult(NAME, findings, summary, figures={UPDATE: error})


def _findings(judge: Judge, course: Course, answers: Answers, draws: Sequence[ByStep]) -> list[Finding]:
    findings: list[Finding] = []
    for number in range(1, len(course.truth) + 1):
        findings.append(_rate_finding(judge, course, answers, number))
        if number in COMPARED:
            findings += _Step(course, answers, number).findings(judge, draws)
    return findings


def _rate_finding(judge: Judge, course: Course, answers: Answers, number: int) -> Finding:
    truth = np.array([course.truth[number - 1].report.learning_rate])
    ours = np.array([float(answers[number - 1][1].learning_rate)])
    # Relative to the highest: at the end of a decay to zero nothing is left to be relative to.
    highest = max(state.report.learning_rate for state in course.truth)
    measured = training_noise.measure(ours, truth, truth.astype(np.float32), Unit(EPSILON, highest, EPSILON * highest))
    found = judge.of(LEARNING_RATE, LEARNING_RATE, measured, f"step {number}")
    return replace(found, values=(float(ours[0]), float(truth[0])))


@dataclass(frozen=True)
class _Step:
    course: Course
    answers: Answers
    number: int

    @property
    def truth(self) -> State:
        return self.course.truth[self.number - 1]

    @property
    def update(self) -> float:
        """‖Δθ‖ of the truth, over all parameters."""
        truth = self.truth.parameters
        return _norm({name: truth[name] - start for name, start in self.course.start.items()})

    def findings(self, judge: Judge, draws: Sequence[ByStep]) -> Iterator[Finding]:
        """One per parameter, in the order of the model."""
        truth, peers = self.truth.parameters, [draw[self.number] for draw in draws]
        ours, update = self.answers[self.number - 1][0], self.update
        for name, true in truth.items():
            leaf, where = name.rpartition(".")[2], f"step {self.number}"
            if name not in ours:
                yield Finding(name, leaf, ok=False, where=where, problem="the candidate has no such parameter")
                continue
            yield judge.of(
                name, leaf, self._measured(name, ours[name], true, [peer[name] for peer in peers], update), where
            )

    def _measured(
        self, name: str, ours: np.ndarray, truth: np.ndarray, peers: Sequence[np.ndarray], update: float
    ) -> Ratios:
        if ours.shape != truth.shape:
            return training_noise.measure(ours, truth, peers[0], Unit(EPSILON))
        weight, start = self.truth.divisors[name], self.course.start[name]
        mine, true, own, *echoes = (weight * (values.astype(np.float64) - start) for values in (ours, truth, *peers))
        # A step rounds each parameter at its own scale, which an update of a few of its ulps shows.
        rounding = EPSILON * np.abs(weight * truth)
        least = max(training_noise.rms(rounding), LEAST * training_noise.rms(true))
        unit = Unit(EPSILON, noise=least, peak=float(rounding.max()))
        measured = training_noise.measure(mine, true, own, unit, echoes)
        error = float(np.linalg.norm(ours.astype(np.float64) - truth)) / update
        return Ratios(error, measured.aggregate, measured.worst, measured.problem)


def _norm(arrays: Arrays) -> float:
    return float(sum(float(np.square(array).sum()) for array in arrays.values()) ** 0.5)


def _error(course: Course, answers: Answers, zero: Sequence[str]) -> float:
    """After the last step, of all parameters but those whose gradient is zero in truth."""
    truth, ours = course.truth[-1].parameters, answers[-1][0]
    same = [name for name in truth if name not in zero and name in ours and ours[name].shape == truth[name].shape]
    wrong = {name: ours[name].astype(np.float64) - truth[name] for name in same}
    return _norm(wrong) / _Step(course, answers, len(course.truth)).update


def _summary(course: Course, findings: Sequence[Finding], error: float, zero: int, *, large: bool) -> str:
    rate = max(finding.error for finding in findings if finding.tap == LEARNING_RATE)
    text = f"{len(course.truth)} steps, {course.clipped} of them clipped: "
    text += f"error {error:.1e} of the global ‖Δθ‖, rates {rate:.1e}"
    text += f" (without {zero} parameters whose gradient is zero in truth)" if zero else ""
    return text + ("; a large model: its first layer and first ids only, with moments of their own" if large else "")
