"""The answer as Markdown, for the summary page of a CI job."""

import html
from collections.abc import Iterator, Sequence

from oracle.reports import terminal
from oracle.reports.junit import clean
from oracle.reports.outcome import Outcome

LIMIT = 1 << 20
"""Bytes that GitHub shows of one step; a larger summary is not shown at all."""
DETAILS = 20
"""Comparisons that are told in full."""
LINE = 2000
"""Characters of one cell or line of detail."""


def render(outcomes: Sequence[Outcome], limit: int = LIMIT) -> str:
    """Verdict, a table of the comparisons, those that answered wrongly in full; at most `limit` bytes."""
    details = DETAILS
    while details:
        text = _render(outcomes, len(outcomes), details)
        if len(text.encode()) <= limit:
            return text
        details //= 2
    rows = len(outcomes)
    while len((text := _render(outcomes, rows, 0)).encode()) > limit and rows:
        rows //= 2
    return text


def _render(outcomes: Sequence[Outcome], rows: int, details: int) -> str:
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    # What answered wrongly comes first, so that no limit hides it.
    ordered = [*wrong, *(outcome for outcome in outcomes if outcome.ok)]
    return "\n".join([*_head(outcomes, wrong), *_table(ordered, rows), *_details(wrong, details)]) + "\n"


def _head(outcomes: Sequence[Outcome], wrong: Sequence[Outcome]) -> Iterator[str]:
    if len(outcomes) == 1:
        yield f"### Oracle: {outcomes[0].report.verdict.upper()}"
    else:
        verdict = (
            f"{len(wrong)} of {len(outcomes)} comparisons answered wrongly" if wrong else "all answered as they must"
        )
        yield f"### Oracle: {verdict}"
        planted = sum(outcome.planted for outcome in outcomes)
        yield ""
        yield f"{len(outcomes) - planted} models compared, {planted} planted faults looked for."
    yield ""


def _table(outcomes: Sequence[Outcome], rows: int) -> Iterator[str]:
    yield "| | comparison | answer | seconds |"
    yield "| --- | --- | --- | ---: |"
    for outcome in outcomes[:rows]:
        sign = "✅" if outcome.ok else "❌"
        yield f"| {sign} | {_cell(outcome.title)} | {_cell(outcome.message)} | {outcome.seconds:.1f} |"
    if len(outcomes) > rows:
        yield f"| | +{len(outcomes) - rows} more | | |"


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    shown = " ".join(clean(text[:LINE]).split())
    return "".join(f"\\{char}" if char in "\\|`*_[]~" else char for char in html.escape(shown, quote=False))


def _details(wrong: Sequence[Outcome], count: int) -> Iterator[str]:
    for outcome in wrong[:count]:
        lines = [clean(line[:LINE]) for line in terminal.lines(outcome.report)]
        yield ""
        yield f"<details><summary>{html.escape(' '.join(clean(outcome.title).split()))}</summary>"
        yield ""
        yield f"<pre>{html.escape(chr(10).join(lines))}</pre>"
        yield "</details>"
    if len(wrong) > count and count:
        yield ""
        yield f"+{len(wrong) - count} more in the reports."
