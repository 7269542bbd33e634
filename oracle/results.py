"""What a comparison says: one finding per tensor, one result per rung, one report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "inconclusive"]

VERSION = 5
"""Of the JSON report's schema."""


class Inconclusive(Exception):
    """The comparison cannot be decided; the message is one line and says why."""


def layer_of(tap: str) -> int | None:
    """The number of a tap's layer, None outside the layers."""
    parts = tap.split(".")
    return int(parts[1]) if parts[0] == "layers" and parts[1:2] and parts[1].isdecimal() else None


@dataclass(frozen=True)
class Finding:
    """One comparison of one tensor."""

    tap: str
    """Tap, or module of a parameter, e.g. `layers.0.attn.q_rope`."""
    op: str
    """The op's function, e.g. `rope`; for parameters the leaf, e.g. `kernel`."""
    ok: bool
    error: float = 0.0
    """Relative error against the truth: ‖candidate − truth‖ / ‖truth‖."""
    aggregate: float = 0.0
    """Whole tensor: ‖candidate − truth‖ / ‖peer − truth‖, in multiples of the noise."""
    worst: float = 0.0
    """The same at the worst position, relative to its row."""
    threshold: tuple[float, float] = (0.0, 0.0)
    """Limits of `aggregate` and `worst`."""
    where: str = ""
    """Probe, step or index, as far as it matters."""
    problem: str = ""
    """What is wrong in words, when it is not a matter of size."""
    values: tuple[float, float] | None = None
    """Of a single number: the candidate's and the truth's."""

    @property
    def layer(self) -> int | None:
        """The layer's number, None outside the layers."""
        return layer_of(self.tap)

    @property
    def noise(self) -> float:
        """The larger of the two ratios: how many times the noise."""
        return max(self.ratios)

    @property
    def ratios(self) -> tuple[float, float]:
        """`aggregate` and `worst`."""
        return self.aggregate, self.worst

    @property
    def measure(self) -> int:
        """Which of the two ratios is told, the one furthest beyond its limit: 0 or 1."""
        over = [ratio / (limit or 1.0) for ratio, limit in zip(self.ratios, self.threshold, strict=True)]
        return int(over[1] > over[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that JSON lacks becomes its name."""
        return {
            "tap": self.tap,
            "layer": self.layer,
            "op": self.op,
            "ok": self.ok,
            "error": _number(self.error),
            "aggregate": _number(self.aggregate),
            "worst": _number(self.worst),
            "threshold": [_number(limit) for limit in self.threshold],
            "where": self.where,
            "problem": self.problem,
            "values": None if self.values is None else [_number(value) for value in self.values],
        }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Token:
    """One greedy choice, judged by the truth's logits given what the candidate wrote before."""

    prompt: int
    step: int
    chosen: int
    expected: int
    """The truth's most likely id."""
    margin: float
    """How far the truth's second choice lies below its first: what rounding would have to turn round."""
    deficit: float
    """How far the truth puts the chosen id below its own choice; 0 where they are the same."""
    noise: float
    """A deficit up to here is within what rounding may turn round."""

    @property
    def outcome(self) -> Literal["exact", "tie", "wrong"]:
        """A tie is a difference inside the noise."""
        return "exact" if self.deficit == 0 else "tie" if self.deficit <= self.noise else "wrong"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        numbers = {"margin": self.margin, "deficit": self.deficit, "noise": self.noise}
        return asdict(self) | {"outcome": self.outcome} | {name: _number(value) for name, value in numbers.items()}


@dataclass(frozen=True)
class Residual:
    """What a difference looks like: where in the tensor it is, and what kind of number it is."""

    shape: tuple[int, ...]
    profiles: Mapping[str, Sequence[float]]
    """For each axis, by name, the root mean square of the error at each index (or bin of indices)."""
    scale: float
    """The factor a that makes a · truth come nearest to the candidate."""
    correlation: float
    """Pearson's, between candidate and truth."""
    sentences: Sequence[str]
    """The same in words, e.g. `only in head 3`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        numbers = {"scale": _number(self.scale), "correlation": _number(self.correlation)}
        profiles = {axis: [_number(value) for value in values] for axis, values in self.profiles.items()}
        return {"shape": list(self.shape), "profiles": profiles, **numbers, "sentences": list(self.sentences)}


NOT_REACHED = "was not reached"
"""How the reason of a class ends whose rung was not climbed."""
CONFIG_FIELD = "config."
"""How the place of a finding begins that is about a field of the config; the field's name follows."""
UNKNOWN = "unknown"
"""The name of a cause that no repair undoes."""


@dataclass(frozen=True)
class Cause:
    """Why a difference exists: the change that undoes it, or `unknown` with what it looks like."""

    name: str
    rung: str
    tap: str
    """Where the difference began."""
    change: str
    """What was changed to undo it, e.g. `with half-split pairs`."""
    advice: str
    """What to change in which file."""
    before: Finding
    after: Finding
    """The same comparison with the change; for an unknown cause the same as `before`."""
    proved: bool
    """With the change this place agrees, and so does the rung behind it."""
    also_at: Sequence[str] = ()
    """Other taps or parameters at which the same change undoes a difference."""
    tied: Sequence[str] = ()
    """Other causes whose repair undoes it as well: which of them it is cannot be told."""
    runners_up: Sequence[str] = ()
    """The names that came nearest to undoing it, best first, where none did."""
    residual: Residual | None = None
    seen_in: str = ""
    """The dtype in which it shows here, where the candidate's own hides it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "rung": self.rung,
            "tap": self.tap,
            "op": self.before.op,
            "change": self.change,
            "advice": self.advice,
            "error_before": _number(self.before.error),
            "error_after": _number(self.after.error),
            "ratios_before": [_number(ratio) for ratio in self.before.ratios],
            "ratios_after": [_number(ratio) for ratio in self.after.ratios],
            "problem_before": self.before.problem,
            "where": self.before.where,
            "threshold": [_number(limit) for limit in self.before.threshold],
            "proved": self.proved,
            "also_at": list(self.also_at),
            "tied": list(self.tied),
            "runners_up": list(self.runners_up),
            "residual": self.residual.to_dict() if self.residual else None,
            "seen_in": self.seen_in,
        }


@dataclass(frozen=True)
class RungResult:
    """One rung of the ladder; `findings` are in execution order."""

    name: str
    findings: Sequence[Finding]
    summary: str
    """What was compared and how well it agreed, in one line."""
    inconclusive: str = ""
    """Why the rung can decide nothing; empty if it can."""
    seconds: float = 0.0
    tokens: Sequence[Token] = ()
    """Greedy choices, where the rung made some."""
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    """Numbers of the summary, by name."""

    @property
    def verdict(self) -> Verdict:
        """`inconclusive` wins: a comparison that is not sound proves no fault either."""
        if self.inconclusive:
            return "inconclusive"
        return "pass" if self.first is None else "fail"

    @property
    def first(self) -> Finding | None:
        """Where the difference begins."""
        return next((finding for finding in self.findings if not finding.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "summary": self.summary,
            "inconclusive": self.inconclusive,
            "seconds": round(self.seconds, 3),
            "checked": len(self.findings),
            "failed": sum(not finding.ok for finding in self.findings),
            "findings": [finding.to_dict() for finding in self.findings],
            "tokens": [token.to_dict() for token in self.tokens],
            "figures": {name: _number(value) for name, value in self.figures.items()},
        }


@dataclass(frozen=True)
class Report:
    """The whole answer."""

    rungs: Sequence[RungResult]
    exposed: Sequence[str]
    """Fault classes that this run's weights, inputs and rungs could have shown."""
    hidden: dict[str, str]
    """Fault classes that it could not have shown, each with the reason."""
    environment: dict[str, Any] = field(default_factory=dict)
    causes: Sequence[Cause] = ()
    """In the order they were found: each behind the repair of those before it."""
    repaired: "Report | None" = None
    """The comparison of the candidate with all those repairs, from the first broken rung on."""
    beyond: Mapping[str, str] = field(default_factory=dict[str, str])
    """Places in a sequence of which nothing is said, each with the reason."""

    @property
    def exposed_classes(self) -> list[str]:
        """What either climb could have shown, that of the candidate as it is or that with the repairs."""
        return [*self.exposed, *(name for name in self.hidden if self.repaired and name in self.repaired.exposed)]

    @property
    def hidden_classes(self) -> dict[str, str]:
        """What neither climb could have shown."""
        after = self.repaired.hidden if self.repaired else {}
        neither = {name: reason for name, reason in self.hidden.items() if not self.repaired or name in after}
        return {n: after.get(n, own) if own.endswith(NOT_REACHED) else own for n, own in neither.items()}

    @property
    def unreached(self) -> dict[str, str]:
        """`beyond` of both climbs."""
        return {**self.beyond, **(self.repaired.beyond if self.repaired else {})}

    @property
    def verdict(self) -> Verdict:
        """The first rung that did not pass decides."""
        verdicts: list[Verdict] = [rung.verdict for rung in self.rungs if rung.verdict != "pass"]
        return verdicts[0] if verdicts else "pass"

    @property
    def broken(self) -> RungResult | None:
        """The first rung that failed."""
        return next((rung for rung in self.rungs if rung.verdict == "fail"), None)

    def first_divergence(self) -> dict[str, Any] | None:
        """`{"rung", "tap", "layer", "op", …}` of the first difference in causal order."""
        rung = self.broken
        if rung is None or rung.first is None:
            return None
        found = rung.first
        place = {"rung": rung.name, "tap": found.tap, "layer": found.layer, "op": found.op}
        return place | {"where": found.where, "problem": found.problem}

    def to_dict(self) -> dict[str, Any]:
        """The JSON report."""
        return {
            "version": VERSION,
            "verdict": self.verdict,
            "rungs": [rung.to_dict() for rung in self.rungs],
            "first_divergence": self.first_divergence(),
            "causes": [cause.to_dict() for cause in self.causes],
            "repaired": self.repaired.to_dict() if self.repaired else None,
            "exposed_classes": self.exposed_classes,
            "hidden_classes": self.hidden_classes,
            "beyond": self.unreached,
            "environment": self.environment,
        }
