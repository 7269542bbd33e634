"""The answer as one page for a browser: no network, no other file, read in a minute.

A report is not trusted: its text becomes HTML only through `markup`, and the page's
content security policy lets nothing run or load but its own style and script.
"""

import base64
import hashlib
from pathlib import Path

from oracle.reports import answer, evidence, wording
from oracle.reports.markup import Markup, tag
from oracle.results import Report

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def render(report: Report) -> str:
    """The whole document."""
    head = [
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", _title(report)),
        tag("style", Markup(STYLE)),
    ]
    main = tag("main", answer.render(report), *evidence.sections(report))
    body = tag("body", main, tag("script", Markup(SCRIPT)))
    return "<!doctype html>\n" + tag("html", tag("head", *head), "\n", body, lang="en") + "\n"


def _policy() -> str:
    """Only this style and this script, known by their hashes; nothing is loaded, from nowhere."""
    hashes = (f"'sha256-{_digest(text)}'" for text in (STYLE, SCRIPT))
    style, script = hashes
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _title(report: Report) -> str:
    rung = report.broken
    at = f" · {wording.place(rung.name, rung.first)}" if rung and rung.first and report.verdict == "fail" else ""
    return f"{report.verdict.upper()}{at} · oracle report"
