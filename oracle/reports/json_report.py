"""The JSON report read back, so that it can be shown without the models, JAX or torch.

A report may come from anywhere: every value is checked, and characters that a
terminal or a page would obey rather than show are written out.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jaxgpt.errors import InputError
from oracle.results import VERSION, Cause, Finding, Report, Residual, RungResult, Token

T = TypeVar("T")

REMEDY = "give a file that `python -m oracle compare … --json FILE` wrote"
ROOT = "the document"


def read(path: Path) -> Report:
    """The report in a file.

    Raises:
        InputError: no file, no JSON, another version, or not a report.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({_printable(str(error))}); {REMEDY}") from error
    return parse(document, str(path))


def parse(document: Any, name: str = "report") -> Report:
    """The report in a decoded JSON value; `name` begins messages.

    Raises:
        InputError: another version, or not a report.
    """
    root = _Value(document, name, ROOT)
    version = root.key("version").raw
    if version != VERSION:
        message = f"version {str(version)[:20]!r}; this oracle reads version {VERSION}"
        raise InputError(f"{name}: is a report of {message}: run the comparison again")
    return _report(root, with_repaired=True)


@dataclass(frozen=True)
class _Value:
    """One value of the document, and where it is."""

    raw: Any
    file: str
    place: str

    def refuse(self, wanted: str) -> NoReturn:
        got = _printable(repr(self.raw)[:40])
        raise InputError(f"{self.file}: {self.place} must be {wanted}, got {got}; {REMEDY}")

    def key(self, key: str) -> "_Value":
        inner = self.members()
        if key not in inner:
            raise InputError(f"{self.file}: {self.place} has no {key!r}; {REMEDY}")
        return inner[key]

    def members(self) -> dict[str, "_Value"]:
        if not isinstance(self.raw, dict):
            self.refuse("an object")
        at = f"{self.place}." if self.place != ROOT else ""
        return {key: _Value(value, self.file, at + _printable(key)[:40]) for key, value in self.raw.items()}

    def each(self, make: Callable[["_Value"], T]) -> list[T]:
        if not isinstance(self.raw, list):
            self.refuse("a list")
        return [make(_Value(item, self.file, f"{self.place}[{index}]")) for index, item in enumerate(self.raw)]

    def text(self) -> str:
        return _printable(self.raw) if isinstance(self.raw, str) else self.refuse("a string")

    def flag(self) -> bool:
        return self.raw if isinstance(self.raw, bool) else self.refuse("true or false")

    def integer(self) -> int:
        return self.raw if isinstance(self.raw, int) and not isinstance(self.raw, bool) else self.refuse("an integer")

    def number(self) -> float:
        if self.raw in ("inf", "-inf", "nan") or (isinstance(self.raw, int | float) and not isinstance(self.raw, bool)):
            try:
                return float(self.raw)
            except OverflowError:
                self.refuse("a number of double precision")
        return self.refuse("a number")

    def pair(self) -> tuple[float, float]:
        values = self.each(_Value.number)
        return (values[0], values[1]) if len(values) == 2 else self.refuse("two numbers")


def _printable(text: str) -> str:
    """Control characters, direction marks and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _plain(value: Any) -> Any:
    """Any JSON value with its texts printable."""
    if isinstance(value, dict):
        return {_printable(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return _printable(value) if isinstance(value, str) else value


# -- The parts of a report, see `results` ----------------------------------------------


def _report(value: _Value, *, with_repaired: bool) -> Report:
    repaired = value.key("repaired")
    report = Report(
        rungs=value.key("rungs").each(_rung),
        exposed=value.key("exposed_classes").each(_Value.text),
        hidden={_printable(key): reason.text() for key, reason in value.key("hidden_classes").members().items()},
        beyond={_printable(key): reason.text() for key, reason in value.key("beyond").members().items()},
        environment={_printable(key): _plain(v.raw) for key, v in value.key("environment").members().items()},
        causes=value.key("causes").each(_cause),
        repaired=_report(repaired, with_repaired=False) if with_repaired and repaired.raw is not None else None,
    )
    if not report.rungs:
        raise InputError(f"{value.file}: has no rungs, so nothing was compared; {REMEDY}")
    stated = value.key("verdict").text()
    if stated != report.verdict:
        message = f"states the verdict {stated[:20]!r}, but its rungs say {report.verdict!r}"
        raise InputError(f"{value.file}: contradicts itself: {message}; {REMEDY}")
    return report


def _rung(value: _Value) -> RungResult:
    return RungResult(
        name=value.key("name").text(),
        findings=value.key("findings").each(_finding),
        summary=value.key("summary").text(),
        inconclusive=value.key("inconclusive").text(),
        seconds=value.key("seconds").number(),
        tokens=value.key("tokens").each(_token),
        figures={_printable(name): number.number() for name, number in value.key("figures").members().items()},
    )


def _finding(value: _Value) -> Finding:
    members = value.members()
    keys = ("tap", "op", "ok", "error", "aggregate", "worst", "threshold", "where", "problem")
    tap, op, ok, error, aggregate, worst, threshold, where, problem = (members.get(k) or value.key(k) for k in keys)
    values = value.key("values")
    return Finding(
        tap.text(),
        op.text(),
        ok.flag(),
        error.number(),
        aggregate.number(),
        worst.number(),
        threshold.pair(),
        where.text(),
        problem.text(),
        None if values.raw is None else values.pair(),
    )


def _token(value: _Value) -> Token:
    whole = [value.key(key).integer() for key in ("prompt", "step", "chosen", "expected")]
    return Token(*whole, *(value.key(key).number() for key in ("margin", "deficit", "noise")))


def _cause(value: _Value) -> Cause:
    rung, tap = value.key("rung").text(), value.key("tap").text()
    residual = value.key("residual")
    ratios = {name: value.key(f"ratios_{name}").pair() for name in ("before", "after")}
    before, after = (
        Finding(
            tap=tap,
            op=value.key("op").text(),
            ok=name == "after",
            error=value.key(f"error_{name}").number(),
            aggregate=ratios[name][0],
            worst=ratios[name][1],
            threshold=value.key("threshold").pair(),
            where=value.key("where").text(),
            problem=value.key("problem_before").text() if name == "before" else "",
        )
        for name in ("before", "after")
    )
    texts = {key: value.key(key).each(_Value.text) for key in ("also_at", "tied", "runners_up")}
    return Cause(
        name=value.key("name").text(),
        rung=rung,
        tap=tap,
        change=value.key("change").text(),
        advice=value.key("advice").text(),
        before=before,
        after=after,
        proved=value.key("proved").flag(),
        seen_in=value.key("seen_in").text(),
        residual=None if residual.raw is None else _residual(residual),
        **texts,
    )


def _residual(value: _Value) -> Residual:
    profiles: Mapping[str, _Value] = value.key("profiles").members()
    return Residual(
        shape=tuple(value.key("shape").each(_Value.integer)),
        profiles={_printable(axis): values.each(_Value.number) for axis, values in profiles.items()},
        scale=value.key("scale").number(),
        correlation=value.key("correlation").number(),
        sentences=value.key("sentences").each(_Value.text),
    )
