"""The measured matrix as tables: figures beside their targets, every class, what was called what."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oracle.faults import mutants
from oracle.faults.catalogue import CATALOGUE
from oracle.faults.trial import Record

LEAST_MUTANTS, LEAST_CLASSES, LEAST_CLEAN, LEAST_PAIRS = 120, 40, 1000, 50


@dataclass(frozen=True)
class Figure:
    """One number and what it must reach."""

    name: str
    value: float
    """A share, or a count."""
    of: int
    """How many were counted."""
    target: float
    at_most: bool = False
    is_share: bool = True

    @property
    def ok(self) -> bool:
        """The target is reached. Nothing counted reaches nothing."""
        if self.is_share and not self.of:
            return False
        return self.value <= self.target if self.at_most else self.value >= self.target

    def row(self) -> str:
        """A line of the table."""
        sign = "≤" if self.at_most else "≥"
        value, target = (f"{100 * v:.1f} %" if self.is_share else _number(v) for v in (self.value, self.target))
        of = f" of {self.of:,}" if self.is_share else ""
        return f"| {self.name} | {value}{of} | {sign} {target} | {'yes' if self.ok else '**no**'} |"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        target = {"target": self.target, "at_most": self.at_most}
        return {"name": self.name, "value": self.value, "of": self.of, **target, "ok": self.ok}


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.2g}"


Condition = Callable[[Record], bool]


def _share(name: str, records: Sequence[Record], counts: Condition, target: float, *, at_most: bool = False) -> Figure:
    value = sum(map(counts, records)) / len(records) if records else 0.0
    return Figure(name, value, len(records), target, at_most)


def figures(records: Sequence[Record]) -> list[Figure]:
    """Every figure of the page's table of targets that mutants and clean runs decide."""
    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(record["table"], []).append(record)
    known, pairs, unknown, true = (tables.get(name, []) for name in ("catalogue", "pairs", "held out", "clean"))
    found = [record for record in known if record["detected"]]
    named = [record for record in known if record["named"]]
    alarms = sum(record["verdict"] != "pass" for record in true)
    classes = len({name for record in known for name in record["classes"]})
    return [
        Figure("mutants of the catalogue", len(known), len(known), LEAST_MUTANTS, is_share=False),
        Figure("classes", classes, classes, LEAST_CLASSES, is_share=False),
        _share("detected in float32", _in(known, "float32"), lambda r: r["detected"], 0.99),
        _share("detected in bfloat16", _in(known, "bfloat16"), lambda r: r["detected"], 0.95),
        _share("first op exact, of those detected", found, lambda r: r["exact"], 0.95),
        _share("within one op, of those detected", found, lambda r: r["within_one"], 1.0),
        _share("cause named first, of those detected", found, lambda r: r["named_first"], 0.90),
        _share("cause in the first three, of those detected", found, lambda r: r["named_in_three"], 0.98),
        _share("proved by repair, of those named", named, lambda r: r["proved"], 0.90),
        _share("double faults, both found", pairs, lambda r: r["both_found"], 1.0),
        Figure("double faults", len(pairs), len(pairs), LEAST_PAIRS, is_share=False),
        _share("unknown faults located", unknown, lambda r: r["exact"], 0.95),
        _share(
            "unknown faults confidently wrong",
            unknown,
            lambda r: r["named"] and not r["named_first"],
            0.05,
            at_most=True,
        ),
        Figure("clean runs", len(true), len(true), LEAST_CLEAN, is_share=False),
        Figure("false alarms", alarms, len(true), 0, at_most=True, is_share=False),
    ]


def _in(records: Sequence[Record], dtype: str) -> list[Record]:
    return [record for record in records if record["dtype"] == dtype]


# -- Markdown --------------------------------------------------------------------------


def markdown(
    records: Sequence[Record], skipped: Sequence[tuple[str, str]], environment: Mapping[str, Any], date: str
) -> str:
    """The whole page."""
    what = ", ".join(f"{name} {value}" for name, value in environment.items())
    tables = {name: [r for r in records if r["table"] == name] for name in ("catalogue", "pairs", "held out")}
    parts = [
        f"Measured on {date}; {what}.",
        _table("figure", "measured", "target", "reached", rows=(figure.row() for figure in figures(records))),
        "Each class, over families, variants and dtypes. What was said is the name of the first cause.",
        _table(
            *("class", "mutants", "detected", "exact", "within one", "named first", "in three", "proved", "said"),
            rows=_class_rows(tables["catalogue"]),
        ),
        "Not as they should be:",
        _table("mutant", "model", "dtype", "expected", "found", "said", rows=_shortfalls(tables["catalogue"])),
        "Faults that no list has, and no repair:",
        _table("fault", "model", "dtype", "expected", "found", "said", rows=map(_mutant_row, tables["held out"])),
        _given_names(tables["held out"]),
        "Two faults at once:",
        _table("faults", "model", "dtype", "expected", "both found", "said", rows=map(_pair_row, tables["pairs"])),
        _table("pair left out", "because", rows=(f"| {id} | {reason} |" for id, reason in skipped)),
        "Mutants that change nothing, and so are not planted:",
        _table("mutant", "models", "dtypes", "reason", rows=_equivalent_rows()),
        "Clean runs that alarmed:",
        _table("run", "rung", "tap", "noise", rows=_alarms(records)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _given_names(unknown: Sequence[Record]) -> str:
    given = [record for record in unknown if record["named"]]
    true = sum(record["named_first"] for record in given)
    what = "for what is true of them (`oracle/faults/names.py` says what is)"
    return f"Of {len(unknown)} such mutants {len(given)} were given a name, {true} of them {what}." if unknown else ""


def _table(*columns: str, rows: Any) -> str:
    lines = list(rows)
    if not lines:
        return f"(no {columns[0]})"
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *lines])


def _class_rows(records: Sequence[Record]) -> Iterator[str]:
    by_class: dict[str, list[Record]] = {}
    for record in records:
        by_class.setdefault(record["classes"][0], []).append(record)
    keys = ("detected", "exact", "within_one", "named_first", "named_in_three", "proved")
    for name, group in by_class.items():
        counts = " | ".join(str(sum(record[key] for record in group)) for key in keys)
        said = Counter(_first_name(record) for record in group)
        words = "; ".join(f"{word} ({count})" if len(said) > 1 else word for word, count in said.most_common())
        yield f"| {name} | {len(group)} | {counts} | {words} |"


def _first_name(record: Record) -> str:
    if record.get("crash"):
        return f"crash: {record['crash']}"
    return record["causes"][0]["name"] if record["causes"] else "nothing"


def _place(place: Sequence[str] | None) -> str:
    return f"{place[0]}: `{place[1]}`" if place else "nothing"


def _mutant_row(record: Record) -> str:
    expected, found = _place(record["expected"][0]), _place(record["found"])
    return (
        f"| {record['faults'][0]} | {record['model']} | {record['dtype']} | {expected} | {found} | {_words(record)} |"
    )


def _words(record: Record) -> str:
    if record.get("crash") or not record["causes"]:
        return _first_name(record)
    cause = record["causes"][0]
    near = ", ".join([*cause["tied"], *cause["runners_up"]])
    return f"{cause['name']}{'' if cause['proved'] else ', not proved'}" + (f" (or: {near})" if near else "")


def _shortfalls(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if not (record["exact"] and record["named_first"] and record["proved"]):
            yield _mutant_row(record)


def _pair_row(record: Record) -> str:
    expected = ", ".join(map(_place, record["expected"]))
    said = "; ".join(f"{cause['name']} at `{cause['tap']}`" for cause in record["causes"]) or _first_name(record)
    both = "yes" if record["both_found"] else "**no**"
    return f"| {' + '.join(record['faults'])} | {record['model']} | {record['dtype']} | {expected} | {both} | {said} |"


def _equivalent_rows() -> Iterator[str]:
    reasons: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for equal in mutants.equivalents():
        names, dtypes = reasons.setdefault((equal.fault.id, equal.reason), ({}, {}))
        names[equal.model] = dtypes[equal.dtype] = None
    for (id, reason), (names, dtypes) in reasons.items():
        yield f"| {id} | {', '.join(names)} | {', '.join(dtypes)} | {reason} |"


def _alarms(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["table"] == "clean" and record["verdict"] != "pass":
            numbers = ", ".join(f"{value:.3g}" for value in record["noise"])
            yield f"| {record['id']} | {record['rung']} | `{record['tap']}` | {numbers} |"


def classes() -> list[str]:
    """Every class of the catalogue, once."""
    return list(dict.fromkeys(fault.name for fault in CATALOGUE))


def to_dict(
    records: Sequence[Record], skipped: Sequence[tuple[str, str]], environment: Mapping[str, Any], date: str
) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "date": date,
        "environment": dict(environment),
        "figures": [figure.to_dict() for figure in figures(records)],
        "records": list(records),
        "skipped_pairs": [{"pair": id, "reason": reason} for id, reason in skipped],
        "equivalent": [
            {"fault": e.fault.id, "model": e.model, "dtype": e.dtype, "reason": e.reason} for e in mutants.equivalents()
        ],
    }
