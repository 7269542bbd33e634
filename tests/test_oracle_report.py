"""Reports in all their shapes, as page and as text, and what a report from elsewhere must not be able to do."""

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from oracle.__main__ import main
from oracle.reports import heat_map, json_report, page, terminal
from oracle.results import UNKNOWN, Cause, Finding, Report, Residual, RungResult, Token

INLINE = {"code", "strong", "span", "b", "i", "small", "title"}


class Read(HTMLParser):
    """A page as a reader has it: its words, tags and attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.silent = tag in ("script", "style")
        if tag not in INLINE:
            self.words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.silent = False

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def cause(**changes: Any) -> Cause:
    before = Finding("layers.0.attn.q", "projection", False, 0.5, 900.0, 70.0, (1.5, 6.0))
    after = dataclasses.replace(before, ok=True, error=1e-7, aggregate=1.0, worst=0.9)
    known = Cause(
        "q and k swapped", "operators", before.tap, "with q and k swapped", "swap", before, after, proved=True
    )
    return dataclasses.replace(known, **changes)


def report_of(*causes: Cause, repaired: Report | None = None, tokens: tuple[Token, ...] = ()) -> Report:
    rung = RungResult("operators", [causes[0].before] if causes else [], "1 op", seconds=1.25, tokens=tokens)
    return Report([rung], ["RoPE theta"], {"label shift": "no rung"}, {"dtype": "float32"}, causes, repaired)


def both_forms(report: Report) -> tuple[str, str]:
    return "\n".join(terminal.lines(report)), Read(page.render(report)).text


def written(report: Report, folder: Path) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(report.to_dict(), allow_nan=False))
    return path


# -- What is said of causes, cells and tokens -------------------------------------------


def test_a_place_in_another_dtype_is_named_with_it():
    for text in both_forms(report_of(cause(seen_in="float32"))):
        assert "at layers.0.attn.q in float32" in text
        assert "in float32 it begins in the rung operators" in text


def test_a_cause_survives_being_written_and_read(tmp_path: Path):
    report = report_of(cause(seen_in="float32", also_at=["layers.1.attn.q"]))
    assert json_report.read(written(report, tmp_path)).to_dict() == report.to_dict()


def test_causes_that_cannot_be_told_apart_are_named_together():
    for text in both_forms(report_of(cause(tied=["rows permuted", "heads reversed"]))):
        assert "rows permuted; heads reversed" in text
        assert "which of them it is, this run cannot tell" in text


def test_a_name_that_is_not_proved_says_so():
    for text in both_forms(report_of(cause(proved=False))):
        assert "not proved" in text
        assert "the whole model still differs here" in text


def test_an_unknown_cause_comes_with_what_it_looks_like_what_came_near_and_where_to_look():
    looks = Residual((2, 3), {"row": [1.0, 0.0], "dimension": [0.1, 0.2, 0.3]}, 1.0, 0.5, ["only in row 0 of 2"])
    unknown = cause(name=UNKNOWN, proved=False, advice="", residual=looks, runners_up=["scale missing"])
    for text in both_forms(report_of(unknown)):
        assert "No known repair undoes it." in text
        assert "only in row 0 of 2" in text
        assert "Nearest to undoing it: scale missing." in text
        assert "jaxgpt/ops.py" in text
    assert "row 2 × dimension 3" in both_forms(report_of(unknown))[1]


def test_a_second_cause_and_what_became_of_the_repaired_model_follow():
    behind = cause(name="norm epsilon", tap="final_norm")
    for text in both_forms(report_of(cause(), behind, repaired=report_of())):
        first, second, end = (
            text.lower().index(w) for w in ("q and k swapped", "norm epsilon", "with these 2 repairs")
        )
        assert first < second < end
        assert "Cause 2, behind it" in text
        assert "PASS" in text[end:]


def test_a_cell_tells_tap_error_both_ratios_their_limits_and_the_problem():
    found = Finding("layers.3.attn.q", "projection", False, 0.25, 120.0, 4.0, (1.5, 6.0), "step 2", "something else")
    cell = heat_map.Cell()
    cell.add(dataclasses.replace(found, ok=True, aggregate=1.0, problem="", where="prefill"))
    cell.add(found)
    text = heat_map.describe(cell)
    for words in (
        "layers.3.attn.q · projection",
        "error 0.25",
        "whole tensor: 120 × noise (limit 1.5)",
        "worst position: 4 × noise (limit 6)",
        "something else",
        "the worst of 2 comparisons, 1 beyond the limit",
        "first at: step 2",
    ):
        assert words in text
    assert "80 times its limit" in heat_map.describe(_one(dataclasses.replace(found, problem="")))


def _one(found: Finding) -> heat_map.Cell:
    cell = heat_map.Cell()
    cell.add(found)
    return cell


@pytest.mark.parametrize(
    ("rung", "tap", "op", "shown"),
    [
        ("bits", "layers.1.attn.q", "kernel", "layers.1.attn.q.kernel, a parameter"),
        ("gradients", "layers.1.attn.q.kernel", "kernel", "layers.1.attn.q.kernel, a parameter, in the rung gradients"),
        ("decode", "rope.angles", "angles", "rope.angles, op angles, in the rung decode"),
        ("operators", "layers.1.attn.q", "projection", "layers.1.attn.q, op projection (its inputs are clean)"),
        ("operators", "", "", "the rung operators"),
    ],
)
def test_a_place_is_called_by_the_whole_name_of_its_tap_or_parameter(rung: str, tap: str, op: str, shown: str):
    result = RungResult(rung, [Finding(tap, op, ok=False, problem="it differs")], "")
    text, seen = both_forms(Report([result], [], {}))
    assert text.startswith(f"FAIL. First divergence: {shown}. It differs.")
    assert shown.partition(",")[0] in seen
    if tap:
        row = heat_map.arrange(result).inside
        assert list(row) == ([] if tap == "rope.angles" else ["attn.q.kernel" if op == "kernel" else "attn.q"])


def test_a_broken_comparison_is_worse_than_any_that_holds():
    cell = heat_map.Cell()
    cell.add(Finding("mask", "attention_mask", ok=False, problem="the patterns differ"))
    cell.add(Finding("mask", "attention_mask", ok=True, aggregate=3.0, threshold=(3.0, 3.0)))
    assert cell.worst is not None
    assert cell.worst.problem == "the patterns differ"


def test_tokens_are_shown_with_their_margins_against_the_noise_wrong_ones_first():
    exact = [Token(0, step, 5, 5, 1.0 + step, 0.0, 0.25) for step in range(30)]
    chosen = (*exact, Token(1, 7, 8, 9, 0.125, 0.125, 0.25), Token(2, 3, 1, 2, 4.0, 4.0, 0.25))
    html = page.render(report_of(tokens=chosen))
    rows = [Read(row).text for row in re.findall(r"<tr><td class=\"figure\">.*?</tr>", html)]
    assert len(rows) == 32
    assert rows[0] == "2 3 1 2 4 4 0.25 16 wrong"
    assert rows[1] == "1 7 8 9 0.12 0.12 0.25 0.5 tie"
    assert "30 exact, 1 tie, 1 wrong" in Read(html).text
    assert Read(html[: html.index("<summary>")]).text.count("exact") == 7, "the rest is folded"


# -- In words ----------------------------------------------------------------------------


def test_a_parameter_is_said_to_differ_from_a_file():
    for where, said in (("reference", "against the reference's file"), ("export", "against its own export")):
        found = Finding("layers.1.attn.q", "kernel", ok=False, where=where, problem="it differs")
        text, seen = both_forms(Report([RungResult("bits", [found, found], "")], [], {}))
        assert f"a parameter, {said}. It differs." in text
        assert f"Also beyond noise in this rung: layers.1.attn.q.kernel {said}." in text
        assert said in seen


def test_the_ratio_that_is_told_is_the_one_beyond_its_limit_and_the_chart_draws_the_same():
    before = Finding("final_norm", "norm", False, 0.5, 0.8, 1.2, (0.75, 1.7))
    told = cause(before=before, after=dataclasses.replace(before, ok=True, error=1e-7, aggregate=0.1, worst=1.6))
    document = json.loads(json.dumps(report_of(told).to_dict()))
    for report in (report_of(told), json_report.parse(document)):
        text, seen = both_forms(report)
        for form in (text, seen):
            assert "0.8 times the noise (whole tensor; limit 0.75)" in form
            assert "from 0.8 to 0.1 times the noise" in form
        assert "Multiples of the noise (whole tensor); shaded: within the limit of 0.75" in seen


def test_a_failed_comparison_says_what_to_do_next_and_a_diagnosed_one_does_not():
    found = Finding("", "", ok=False, problem="it stops")
    text, seen = both_forms(Report([RungResult("loss", [found], "")], [], {}))
    last = "`python -m oracle bisect` with the same arguments looks for the cause."
    assert text.splitlines()[-1].endswith(last)
    assert "python -m oracle bisect with the same arguments looks for it." in seen
    assert "bisect" not in both_forms(report_of(cause()))[0]


def test_what_either_climb_could_have_shown_is_not_hidden():
    reached = "the rung {} was not reached".format
    first = {"Adam's betas": reached("optimizer"), "cache offset": reached("decode"), "kernel transposed": "no file"}
    behind = {"cache offset": "exists only elsewhere", "kernel transposed": reached("bits"), "RoPE theta": "no"}
    after = Report([RungResult("forward", [], "")], ["Adam's betas"], behind, beyond={"positions beyond 512": "short"})
    report = dataclasses.replace(report_of(cause(), repaired=after), hidden=first)
    assert report.exposed_classes == ["RoPE theta", "Adam's betas"]
    assert report.hidden_classes == {"cache offset": "exists only elsewhere", "kernel transposed": "no file"}
    text, seen = both_forms(report)
    assert "Could have shown 2 of 4 known kinds of fault" in text
    assert "Would have shown 2 of 4 known kinds" in seen
    assert report.to_dict()["hidden_classes"] == report.hidden_classes
    for form in (text, seen):
        assert "Nothing is said of positions beyond 512: short." in form


def test_what_is_hidden_is_told_a_reason_a_line():
    hidden = {"a, b": "no file", "c": "no file", "d": "no file", "e": "no file", "f": "exists only where it is"}
    text = "\n".join(terminal.lines(Report([RungResult("bits", [], "")], [], hidden)))
    assert '\n     4  no file: "a, b", c, d (+1 more)\n     1  they exist only in other models: f' in text


def test_why_nothing_is_decided_is_told_once_and_as_a_sentence():
    report = Report([RungResult("environment", [], "the noise is old", inconclusive="the noise is old")], [], {})
    text = "\n".join(terminal.lines(report))
    assert text.startswith("INCONCLUSIVE. The noise is old.\n")
    assert text.lower().count("the noise is old") == 1


def test_changes_of_two_parts_read_as_sentences_and_one_rung_agrees():
    moved = cause(change="with the targets one place later, those at the edge moved by one token")
    after = Report([RungResult("decode", [], "")], [], {})
    text, seen = both_forms(report_of(moved, repaired=after))
    assert "moved by one token: the error falls from" in text
    assert "PASS. The rung decode agrees." in seen
    stop = cause(name="micro-batches summed, not averaged")
    assert "part at layers.0.attn.q. Micro-batches summed" in both_forms(report_of(stop))[1]


@pytest.mark.parametrize(
    ("rung", "also", "layers"),
    [
        ("operators", ["layers.1.attn.q", "layers.2.attn.q"], "Layers: all 3."),
        ("operators", ["layers.2.attn.q"], "Layers: 0, 2 of 0 to 2."),
        ("bits", ["layers.2.attn.q"], "Layers: 0, 2 of 0 to 2, but of their parameters attn.q alone."),
        ("bits", ["layers.2.attn.q", "layers.2.attn.k"], "Layers: 0, 2 of 0 to 2."),
        ("operators", ["layers.1.attn.q (rung decode)"], "Layers: only 0 of 0 to 2."),
        ("forward", ["layers.1.attn.q"], ""),
    ],
)
def test_the_layers_of_a_cause_are_told_where_each_place_is_wrong_by_itself(rung: str, also: list[str], layers: str):
    found = cause(rung=rung, tap="layers.0.attn.q", also_at=also)
    report = dataclasses.replace(report_of(found), environment={"config": {"num_hidden_layers": 3}})
    text, seen = both_forms(report)
    assert (layers in text) if layers else ("Layers:" not in text)
    assert layers.removeprefix("Layers: ").capitalize() in seen
    assert ("Seen again at: layers.1.attn.q (rung decode)." in text) is ("(rung" in also[0])


def test_the_page_says_which_models_were_compared():
    sides = {"checkpoint": "runs/a", "reference": "its own export", "dtype": "float32"}
    report = dataclasses.replace(report_of(cause()), environment=sides)
    assert "Oracle report · runs/a against its own export · float32" in both_forms(report)[1]


def test_both_numbers_of_a_comparison_of_numbers_are_told(tmp_path: Path):
    found = Finding("loss.mean", "mean_loss", False, 0.5, 9.0, 9.0, (4.0, 4.0), values=(1.5, 3.0))
    report = Report([RungResult("loss", [found], "")], [], {})
    text, seen = both_forms(report)
    assert "1.5, the reference has 3. Error 0.5, 9 times the noise" in text
    assert "1.5, the reference has 3. Error 0.5" in seen
    assert json_report.read(written(report, tmp_path)).rungs[0].first == found


def test_tokens_that_are_all_wrong_are_said_to_be():
    chosen = tuple(Token(0, step, 1, 2, 4.0, 4.0, 0.25) for step in range(3))
    assert "The 3 that were hardest to make are kept here: all wrong." in both_forms(report_of(tokens=chosen))[1]


# -- What is no report ---------------------------------------------------------------


def test_without_options_the_verb_prints_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(written(report_of(), tmp_path))]) == 0
    assert capsys.readouterr().out.startswith("PASS. ")


def test_the_verb_writes_every_form_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = str(written(report_of(cause()), tmp_path))
    html, junit, summary = (tmp_path / name for name in ("page.html", "junit.xml", "summary.md"))
    assert main(["report", source, "--html", str(html), "--junit", str(junit), "--summary", str(summary)]) == 0
    assert capsys.readouterr().out == ""
    assert "FAIL" in Read(html.read_text(encoding="utf-8")).text
    assert 'failures="1"' in junit.read_text()
    assert summary.read_text().startswith("### Oracle: FAIL")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, long = str(written(report_of(), tmp_path)), "n" * 300
    assert main(["report", source, "--html", str(tmp_path / long)]) == 2
    assert "File name too long; name another" in capsys.readouterr().err


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=1), "is a report of version '1'; this oracle reads version 5"),
        (lambda d: d.pop("version"), "the document has no 'version'"),
        (lambda d: d.pop("rungs"), "the document has no 'rungs'"),
        (lambda d: d.update(rungs=[], verdict="pass"), "has no rungs, so nothing was compared"),
        (lambda d: d.update(verdict="pass"), "states the verdict 'pass', but its rungs say 'fail'"),
        (lambda d: d["rungs"][0]["findings"][0].update(error="much"), "rungs[0].findings[0].error must be a number"),
        (lambda d: d["rungs"][0]["findings"][0].update(error=10**400), "must be a number of double precision"),
        (lambda d: d["rungs"][0]["findings"][0].update(ok="yes"), "findings[0].ok must be true or false, got 'yes'"),
        (lambda d: d["rungs"][0]["findings"][0].update(threshold=[1]), "threshold must be two numbers, got [1]"),
        (lambda d: d["causes"][0].update(also_at={}), "causes[0].also_at must be a list, got {}"),
        (lambda d: d["causes"][0].update(name=["\n\x1b[31m"]), "causes[0].name must be a string"),
        (lambda d: d.update(environment=7), "environment must be an object, got 7"),
    ],
)
def test_what_is_no_report_of_this_version_is_one_line(
    change: Change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    document = json.loads(json.dumps(report_of(cause()).to_dict()))
    change(document)
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert main(["report", str(tmp_path / "report.json"), "--html", str(tmp_path / "page.html")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "\x1b" not in printed.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"[]", b"null", b"1" * 5000])
def test_what_is_no_json_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "report.json").write_bytes(content)
    assert main(["report", str(tmp_path / "report.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_that_has_nowhere_to_go_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["report", "no.json", "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
    assert main(["report", "no.json", "--html", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


# -- Nothing in a report runs ----------------------------------------------------------

HOSTILE = '</title></script><script>window.hacked=1</script>"\' onmouseover="window.hacked=1'


def hostile_report() -> dict[str, Any]:
    """Every text of a report is an attack on a page or a terminal."""
    residual = Residual((2,), {HOSTILE: [1.0, 2.0]}, 1.0, 0.5, [HOSTILE])
    found = Finding(f"layers.0.{HOSTILE}", HOSTILE, False, 1.0, 9.0, 9.0, (1.0, 1.0), HOSTILE, HOSTILE)
    texts = {"name": HOSTILE, "change": HOSTILE, "advice": HOSTILE}
    also = {"also_at": [HOSTILE] * 9, "tied": [HOSTILE], "runners_up": [HOSTILE]}
    report = Report(
        [
            RungResult(HOSTILE, [], HOSTILE),
            RungResult("forward", [found], HOSTILE, tokens=[Token(0, 0, 1, 1, 1, 0, 1)]),
        ],
        [HOSTILE],
        {HOSTILE: HOSTILE},
        {"jax": HOSTILE, "dtype": HOSTILE, HOSTILE: [HOSTILE], "config": {HOSTILE: {HOSTILE: HOSTILE}}},
        [cause(before=found, tap=found.tap, rung="forward", residual=residual, **texts, **also)],
    )
    return json.loads(json.dumps(report.to_dict()))


def test_hostile_names_stay_words():
    html = page.render(json_report.parse(hostile_report()))
    read = Read(html)
    assert read.tags.count("script") == 1
    assert read.tags.count("title") == 1 + read.tags.count("rect") - read.values("class").count("band")
    assert not [key for key, _ in read.attributes if key.startswith("on") or key in ("src", "href", "style")]
    assert read.text.count("window.hacked=1") > 20, "they are shown"
    assert any(HOSTILE in value for value in read.values("title"))


def test_control_characters_of_a_report_reach_neither_terminal_nor_page():
    document = hostile_report()
    nasty = "a\x1b[31m\u202e\ud800\r\n\x00"
    document["causes"][0]["advice"] = document["environment"]["jax"] = nasty
    document["rungs"][1]["findings"][0]["tap"] = nasty
    report = json_report.parse(document)
    text, html = "\n".join(terminal.lines(report)), page.render(report)
    for form in (text, html):
        assert not set("\x1b\u202e\ud800\r\x00") & set(form)
        assert r"a\x1b[31m\u202e\ud800\r\n\x00" in form


# -- Large reports ---------------------------------------------------------------------


def large_report() -> Report:
    """24 layers of 25 taps, compared in every rung, and over 100 decode steps: more than 60,000 findings."""
    taps = [f"layers.{layer}.attn.a_tap_{tap}" for layer in range(24) for tap in range(25)]

    def findings(where: str) -> list[Finding]:
        return [Finding(tap, "projection", False, 0.123, 1e5, 2e5, (1.2345, 5.678), where) for tap in taps]

    decoded = [found for step in range(100) for found in findings(f"step {step}")]
    tokens = [Token(i % 32, i // 32, 12345, 54321, 0.1, 0.1, 0.001) for i in range(8000)]
    rungs = [RungResult(name, findings(""), "600 taps") for name in ("bits", "operators", "forward", "gradients")]
    return Report([*rungs, RungResult("decode", decoded, "100 steps", tokens=tokens)], [], {}, {})


def test_a_page_of_sixty_thousand_findings_stays_small():
    report = large_report()
    assert sum(len(rung.findings) for rung in report.rungs) > 60_000
    html = page.render(report)
    assert len(html.encode()) < 3_000_000
    assert Read(html).values("class").count("b6") > 2400


def test_very_deep_models_and_very_many_taps_are_grouped_and_cut_where_nothing_is_broken():
    found = [Finding(f"layers.{i}.out", "add", i != 777, 0.1, 5.0, 5.0, (1.0, 1.0)) for i in range(1000)]
    found += [Finding(f"head.{i}", "add", i != 900, 0.1, 5.0, 5.0, (1.0, 1.0)) for i in range(1000)]
    rung = RungResult("forward", found, "")
    html = heat_map.render(rung, "", "")
    assert Read(html).text.count("head.900") == 1
    assert "head.999" not in Read(html).text
    assert "and 841 more" in Read(html).text
    grid = heat_map.arrange(rung)
    assert grid.group == 8
    assert [column for column, cell in grid.inside["out"].items() if cell.broken] == [777 // 8]


# -- Colours ---------------------------------------------------------------------------


def palettes() -> list[dict[str, str]]:
    """The variables of the light and of the dark scheme."""
    blocks = re.findall(r":root \{(.*?)\}", page.STYLE, re.DOTALL)
    light = dict(re.findall(r"--(\w+): (#\w{6})", blocks[0]))
    return [light, light | dict(re.findall(r"--(\w+): (#\w{6})", blocks[1]))]


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_scale_reads_in_grey_and_all_words_have_contrast():
    light, dark = palettes()
    steps = ["w1", "w2", "w3", *(f"b{i}" for i in range(1, 8))]
    for palette, towards in ((light, -1), (dark, 1)):
        brightness = [towards * luminance(palette[step]) for step in steps]
        assert brightness == sorted(brightness), "each step further from the paper than the one before"
        for word in ("ink", "quiet", "accent"):
            assert contrast(palette[word], palette["paper"]) >= 4.5, word
    for palette, on_light in ((light, "1234"), (dark, "4567")):
        for step in "1234567":
            word = palette["dark" if step in on_light else "light"]
            assert contrast(word, palette[f"b{step}"]) >= 4.5, f"step {step}"
