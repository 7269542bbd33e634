"""What a CI system gets: JUnit XML, a Markdown summary, exit codes, and the workflow that asks for them."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from oracle import agreement, equivalence, output_file
from oracle.__main__ import main
from oracle.reports import junit, summary
from oracle.reports.outcome import Outcome
from oracle.results import Cause, Finding, Report, RungResult
from oracle.rungs import decode, forward

RUNGS = ("environment", "bits", "operators", "forward", "decode")
CLEAN = Finding("layers.0.attn_norm", "norm", ok=True, aggregate=0.5, worst=0.6, threshold=(2.0, 3.0))
BROKEN = Finding("layers.1.attn.q_rope", "rope", False, 0.41, 9000.0, 12000.0, (2.0, 3.0))
PASSED = Report([RungResult(name, [CLEAN], "all agree", seconds=1.5) for name in RUNGS], ["RoPE interleaved"], {})
FAILED = Report(
    [RungResult("bits", [], "equal", seconds=0.25), RungResult("operators", [CLEAN, BROKEN], "1 broken", seconds=2.0)],
    [],
    {},
    causes=[
        Cause(
            "RoPE pairs interleaved",
            "operators",
            BROKEN.tap,
            "with half-split pairs",
            "rotate halves",
            before=BROKEN,
            after=replace(BROKEN, ok=True, error=1e-7, aggregate=1.1, worst=1.2),
            proved=True,
        )
    ],
)
UNDECIDED = Report([RungResult("environment", [], "stale", inconclusive="the noise was calibrated elsewhere")], [], {})


def outcome(report: Report, name: str = "llama float32", **given: object) -> Outcome:
    return Outcome(name, report, 3.5, rungs=RUNGS, **given)  # pyright: ignore[reportArgumentType]


def parsed(*outcomes: Outcome) -> ElementTree.Element:
    return ElementTree.fromstring(junit.render(outcomes).encode())


# -- JUnit -----------------------------------------------------------------------------


def test_junit_has_the_structure_that_pytest_writes(tmp_path: Path):
    """The same elements and attributes, so that whatever reads pytest's file reads this one."""
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\ndef test_a():\n print('x')\ndef test_b():\n assert 0\ndef test_c():\n pytest.skip('no')\n"
        "@pytest.fixture\ndef f():\n assert 0\ndef test_d(f): pass\n"
    )
    file = tmp_path / "theirs.xml"
    pytest.main(
        ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "junit_logging=all", f"--junitxml={file}", str(test)]
    )
    theirs, ours = ElementTree.parse(file).getroot(), parsed(outcome(PASSED), outcome(FAILED), outcome(UNDECIDED))
    assert ours.tag == theirs.tag == "testsuites"
    for tag in ("testsuite", "testcase", "failure", "error", "skipped", "system-out"):
        known = set().union(*(element.attrib for element in theirs.iter(tag)))
        used = set().union(*(element.attrib for element in ours.iter(tag)))
        assert list(ours.iter(tag)), f"no {tag}"
        assert used <= known, f"{tag} has attributes that pytest's has not"
    assert {"name", "tests", "failures", "errors", "skipped", "time"} <= next(ours.iter("testsuite")).attrib.keys()


def test_each_rung_is_a_case_and_the_counts_are_those_of_the_cases():
    root = parsed(outcome(PASSED, "a"), outcome(FAILED, "b"), outcome(UNDECIDED, "c"))
    for suite, counts in zip(root, [(0, 0, 0), (1, 0, 3), (0, 1, 4)], strict=True):
        cases = suite.findall("testcase")
        assert int(suite.attrib["tests"]) == len(cases) == 5
        assert tuple(int(suite.attrib[key]) for key in ("failures", "errors", "skipped")) == counts
        found = tuple(len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "error", "skipped"))
        assert found == counts
    assert {case.attrib["classname"] for case in root[1]} == {"oracle.b"}
    assert [case.attrib["name"] for case in root[0]] == list(RUNGS)
    assert root[1].attrib["time"] == "2.250"


def test_a_failure_says_where_it_begins_and_why_and_the_text_report_is_its_output():
    (suite,) = parsed(outcome(FAILED))
    (case,) = (case for case in suite if case.find("failure") is not None)
    assert case.attrib["name"] == "operators"
    failure, output = case.find("failure"), case.findtext("system-out")
    assert failure is not None
    assert failure.attrib["message"].startswith("FAIL. First divergence: layers.1.attn.q_rope, op rope")
    assert "Cause: RoPE pairs interleaved, at layers.1.attn.q_rope (proved)." in failure.attrib["message"]
    assert output is not None
    assert "with half-split pairs the error falls" in output.lower()
    skipped = [case.attrib["name"] for case in suite if case.find("skipped") is not None]
    assert skipped == ["environment", "forward", "decode"]


def test_what_was_not_decided_is_an_error_never_a_pass():
    (suite,) = parsed(outcome(UNDECIDED))
    error = suite.find("testcase/error")
    assert error is not None
    assert error.attrib["message"].startswith("INCONCLUSIVE. The noise was calibrated elsewhere")


def test_a_planted_fault_that_is_found_passes_and_one_that_is_not_fails():
    root = parsed(outcome(FAILED, planted=True), outcome(PASSED, planted=True, wrong="not found: pass"))
    assert [suite.attrib["failures"] for suite in root] == ["0", "1"]
    failure = root[1].find("testcase/failure")
    assert failure is not None
    assert failure.attrib["message"] == "not found: pass"


def test_a_fault_that_a_user_planted_is_named_wherever_a_failure_is():
    report = replace(FAILED, environment={"planted": "RoPE interleaved"})
    (suite,) = parsed(outcome(report, "llama"))
    failure = suite.find("testcase/failure")
    assert suite.attrib["name"] == "llama (planted: RoPE interleaved)"
    assert failure is not None
    assert failure.attrib["message"].endswith("(planted: RoPE interleaved)")
    row = next(line for line in summary.render([outcome(report, "llama")]).splitlines() if line.startswith("| ❌"))
    assert row.startswith("| ❌ | llama (planted: RoPE interleaved) |")


HOSTILE = '\x00\x1b[31m <b>&amp;</b> ]]> \ud800 \ufffe \x85 \U0001f600 "quoted"\n| pipe `code`'


def test_any_text_gives_valid_xml():
    hostile = Report([RungResult("bits", [replace(BROKEN, tap=HOSTILE, problem=HOSTILE)], HOSTILE)], [HOSTILE], {})
    text = junit.render([outcome(hostile, HOSTILE)])
    root = ElementTree.fromstring(text.encode())  # a lone surrogate would not encode
    (failure,) = root.iter("failure")
    assert failure.text is not None
    assert "\\x00\\x1b[31m <b>&amp;</b> ]]> \\ud800 \\ufffe" in failure.text
    assert "\U0001f600" in failure.text


# -- Markdown --------------------------------------------------------------------------


def test_the_summary_has_verdict_table_and_the_failures_in_full():
    text = summary.render([outcome(PASSED, "good"), outcome(FAILED, "bad"), outcome(FAILED, "fault", planted=True)])
    lines = text.splitlines()
    assert lines[0] == "### Oracle: 1 of 3 comparisons answered wrongly"
    assert "2 models compared, 1 planted faults looked for." in lines
    rows = [line for line in lines if line.startswith(("| ✅", "| ❌"))]
    assert [row.split(" | ")[:2] for row in rows] == [["| ❌", "bad"], ["| ✅", "good"], ["| ✅", "fault"]]
    assert "Cause: RoPE pairs interleaved" in rows[0]
    assert "<details><summary>bad</summary>" in lines
    assert text.count("<details>") == 1


def test_one_comparison_is_told_by_its_verdict():
    assert summary.render([outcome(UNDECIDED)]).startswith("### Oracle: INCONCLUSIVE\n")
    assert summary.render([outcome(PASSED)]).startswith("### Oracle: PASS\n")


def test_hostile_text_stays_in_its_cell_and_is_no_markup():
    hostile = Report([RungResult("bits", [replace(BROKEN, tap="x", problem=HOSTILE)], HOSTILE)], [], {})
    text = summary.render([outcome(hostile, "a|b\n<img src=x>")])
    (row,) = (line for line in text.splitlines() if line.startswith("| ❌"))
    assert row.replace("\\|", "").count("|") == 5
    assert "<img" not in text
    assert "<b>" not in text
    assert "\\`code\\`" in row


def test_a_summary_is_never_larger_than_github_shows():
    many = [RungResult("operators", [replace(BROKEN, problem="ü" * 5000)], "x" * 5000)]
    outcomes = [outcome(Report(many, [], {}), f"model {number}") for number in range(300)]
    text = summary.render(outcomes)
    assert len(text.encode()) <= 1 << 20
    assert text.startswith("### Oracle: 300 of 300 comparisons answered wrongly")
    assert "model 0" in text
    tiny = summary.render(outcomes, limit=20_000)
    assert len(tiny.encode()) <= 20_000
    assert "more" in tiny


def test_a_summary_is_appended(tmp_path: Path):
    file = tmp_path / "summary.md"
    output_file.append(file, "one\n")
    output_file.append(file, "two\n")
    assert file.read_text() == "one\ntwo\n"


# -- The commands ----------------------------------------------------------------------


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """`equivalence` with these outcomes instead of its own."""
    outcomes: list[Outcome] = [outcome(PASSED, "good 1.5x"), outcome(FAILED, "planted: fault", planted=True)]
    monkeypatch.setattr(equivalence.workers, "answers", lambda *_: iter(outcomes))
    return outcomes


def test_equivalence_writes_every_report_and_appends_to_githubs_summary(
    answered: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "step.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    answered.append(outcome(FAILED, "bad"))
    out, xml = tmp_path / "out", tmp_path / "copy.xml"
    assert main(["equivalence", "--out", str(out), "--junit", str(xml)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 1 failed"
    assert page.read_text().startswith("before\n### Oracle: 1 of 3 comparisons answered wrongly")
    assert xml.read_text() == (out / "junit.xml").read_text()
    assert (out / "summary.md").read_text().startswith("### Oracle")
    assert len(list(out.glob("*.json"))) == 3
    assert [file.stem for file in out.glob("*.html")] == ["bad"], "a page for what failed, and only for that"
    assert json.loads((out / "bad.json").read_text())["verdict"] == "fail"


@pytest.mark.parametrize(("reports", "code"), [([PASSED], 0), ([PASSED, UNDECIDED], 3), ([UNDECIDED, FAILED], 1)])
def test_the_exit_code_is_that_of_the_worst_answer(reports: list[Report], code: int):
    assert equivalence.exit_code([outcome(report) for report in reports]) == code


def agreeing(dtype: str, **figures: float) -> Outcome:
    named = {forward.MAX_KL: figures.get("kl", 1e-10), decode.GREEDY: 9000, decode.EXACT: 8999}
    rung = RungResult("forward", [CLEAN], "all agree", figures={**named, decode.TIES: figures.get("ties", 1)})
    return outcome(Report([rung], [], {}, {"dtype": dtype}))


def test_models_that_pass_must_also_agree_closely():
    near = [agreeing("float32"), agreeing("bfloat16", kl=1.0)]
    assert [figure.ok for figure in agreement.figures(near)] == [True] * 5
    assert equivalence.exit_code(near) == 0
    assert equivalence.exit_code([*near, agreeing("float32", kl=1e-7)]) == 1
    assert equivalence.exit_code([*near, agreeing("bfloat16", ties=0)]) == 1


def test_equivalence_covers_every_model_and_dtype_and_kind_of_place():
    tasks = [task for group in equivalence.tasks(None) for task in group]
    true = {(task.model, task.dtype) for task in tasks if not task.mutant}
    assert true == {(model, dtype) for model in equivalence.models.MODELS for dtype in ("float32", "bfloat16")}
    assert len({task.name for task in tasks}) == len(tasks), "each has a file of its own"
    planted = [task for task in tasks if task.mutant]
    assert len(planted) == equivalence.PLANTED
    assert len({equivalence.mutant_of(task).expected[0][0] for task in planted}) >= 3, "at several rungs"


def test_a_planted_fault_found_elsewhere_is_a_wrong_answer():
    task = next(task for group in equivalence.tasks(None) for task in group if task.mutant)
    mutant = equivalence.mutant_of(task)
    assert equivalence.misplaced(mutant, PASSED).startswith("not found: pass, expected in ")
    elsewhere = Report([RungResult("decode", [replace(BROKEN, tap="nowhere")], "")], [], {})
    assert equivalence.misplaced(mutant, elsewhere).startswith("found in decode at nowhere, expected in ")


@pytest.mark.parametrize("option", ["--junit", "--summary"])
def test_a_report_without_a_folder_is_refused_before_anything_runs(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["equivalence", "--out", str(tmp_path), option, "no/such/folder/file"]) == 2
    assert capsys.readouterr().err == f"oracle: {option}: the folder no/such/folder does not exist; create it first\n"


# -- The workflow ----------------------------------------------------------------------

WORKFLOW = Path(__file__).parent.parent / ".github/workflows/ci.yml"


def test_the_workflow_uploads_the_report_of_a_failed_equivalence():
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["equivalence"]
    commands = [step.get("run") for step in job["steps"]]
    upload = job["steps"][-1]
    assert "make equivalence" in commands
    assert upload["uses"].startswith("actions/upload-artifact@")
    assert upload["if"] == "always()"
    assert upload["with"]["path"] == "build/equivalence"


def test_the_examples_for_other_projects_are_valid_yaml_and_name_real_options():
    text = (Path(__file__).parent.parent / "docs/ci.md").read_text()
    examples = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    assert len(examples) >= 2
    assert all(isinstance(yaml.safe_load(example), dict) for example in examples)
    for option in ("--junit", "--summary", "--calibration", "--json", "--html"):
        assert option in text
