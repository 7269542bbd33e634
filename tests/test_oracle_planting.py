"""A fault of the catalogue in a user's model: the right row, refusals in one line, and a report that says so."""

from pathlib import Path
from typing import cast

import pytest

from jaxgpt.errors import InputError
from jaxgpt.formats import hf
from oracle import exposure, ladder, models, subject
from oracle.__main__ import main
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.faults.catalogue import CATALOGUE
from oracle.faults.planting import known, planter
from oracle.reference import Reference
from oracle.reports import page, terminal
from oracle.results import Cause, Finding, Report
from oracle.rungs import statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(models.MODELS["llama"], tmp_path_factory.mktemp("planting") / "hf", "float32", 7)


@pytest.fixture(scope="module")
def true(folder: Path) -> Candidate:
    return models.candidate(folder, "float32")


def test_a_class_changes_the_model(true: Candidate):
    planted = planter("cache offset")(true)
    assert planted.step is not true.step
    assert planted.stored is true.stored


def test_of_a_class_the_first_row_that_the_model_has_is_planted(true: Candidate):
    # The first row of this class takes square projections, which this model has not.
    changed = [
        name for name, array in planter("kernel transposed")(true).stored.items() if array is not true.stored[name]
    ]
    assert changed == ["layers.1.mlp.up.kernel"]


def test_an_unknown_class_names_those_near_it():
    with pytest.raises(
        InputError, match=r"no class 'cache offst'; near it: cache offset; `python -m oracle faults --list`"
    ):
        planter("cache offst")


def test_names_are_known_whatever_their_case_and_blanks():
    assert known("  Cache  OFFSET ") == "cache offset"
    assert known("ROPE interleaved") == "RoPE interleaved"


def test_nonsense_has_no_name_near_it():
    with pytest.raises(InputError, match=r"no class 'qqqqqq'; `python -m oracle faults --list` names them all$"):
        known("qqqqqq")


def test_names_with_commas_are_quoted():
    with pytest.raises(InputError, match='near it: "query, key and value swapped"; '):
        known("query, key and value swoped")


def test_one_fault_is_planted_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(tmp_path), "--plant", "one NaN", "--plant", "cache offset"]) == 2
    assert "--plant was given 2 times; one fault is planted at a time: give it once" in capsys.readouterr().err


def test_the_list_names_every_class_by_rung_with_what_it_does(capsys: pytest.CaptureFixture[str]):
    assert main(["faults", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.partition(":")[0] for line in lines if line and not line.startswith(" ")]
    assert heads == [rung for rung in ladder.LADDER if rung in heads]
    assert {fault.rung for fault in CATALOGUE} == set(heads)
    rows = [line for line in lines if line.startswith("  ")]
    assert len(rows) == len({(fault.rung, fault.name) for fault in CATALOGUE})
    assert "  cache offset: " in "\n".join(rows)


# -- What a run could have shown --------------------------------------------------------


def without_source(candidate: Candidate, folder: Path) -> Report:
    comparison = Comparison(candidate, cast(Reference, None), folder, None, ladder.uncalibrated())
    return ladder.climb(comparison, rungs=("bits", "statistics"))


def test_what_is_found_against_the_export_is_no_hidden_class(folder: Path, true: Candidate):
    assert "kernel transposed" in without_source(true, folder).hidden
    for name in ("kernel transposed", "head wrongly tied", "one NaN"):
        report = without_source(planter(name)(true), folder)
        assert report.verdict == "fail"
        assert name in report.exposed, name


def test_statistics_alone_shows_what_can_never_be_right(folder: Path, true: Candidate):
    for name in exposure.NEVER_RIGHT:
        planted = planter(name)(true)
        comparison = Comparison(planted, cast(Reference, None), None, None, ladder.uncalibrated())
        assert statistics.run(comparison).verdict == "fail", name
    assert set(without_source(true, folder).exposed) >= exposure.NEVER_RIGHT


def test_the_class_that_a_cause_names_is_exposed(true: Candidate, folder: Path):
    found = Finding("layers.0.attn.q", "kernel", ok=False, where="export")
    named = Cause("the kernel is transposed", "bits", found.tap, "", "", found, found, proved=True)
    report = Report([], [], {"kernel transposed": exposure.NO_SOURCE, "one NaN": exposure.NO_SOURCE}, causes=[named])
    assert exposure.with_causes(report).exposed == ["kernel transposed"]
    assert [*exposure.with_causes(report).hidden] == ["one NaN"]


def test_reaches_of_the_inputs_are_no_classes(true: Candidate, folder: Path):
    comparison = Comparison(true, cast(Reference, None), folder, folder, ladder.uncalibrated())
    exposed, hidden = exposure.classes(comparison, tuple(ladder.LADDER))
    assert {*exposed, *hidden} == {fault.name for fault in CATALOGUE}
    assert exposure.beyond(comparison, ["bits"]) == {}
    place = f"positions beyond {true.config.max_position_embeddings}"
    assert exposure.beyond(comparison, ["operators"]) == {place: "the model's context ends there"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("position table shifted", "it exists only where positions are rows of a table"),
        ("roles swapped", "it has no tokenizer"),
    ],
)
def test_what_the_model_cannot_have_is_refused(true: Candidate, name: str, why: str):
    with pytest.raises(InputError, match=f"{name} cannot be planted in this model: {why}; choose another class"):
        planter(name)(true)


@pytest.mark.parametrize(
    ("name", "why"),
    [("mask of everything", "it has no tokenizer"), ("position table shifted", "it exists only where positions are")],
)
def test_what_the_model_cannot_have_is_refused_before_the_export(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    why: str,
):
    def written(*_: object) -> None:
        raise AssertionError("the checkpoint was exported")

    subject.import_folder(folder, tmp_path / "run")
    monkeypatch.setattr(hf, "write", written)
    assert main(["compare", str(tmp_path / "run"), "--plant", name]) == 2
    assert capsys.readouterr().err.startswith(f"oracle: --plant: {name} cannot be planted in this model: {why}")


def test_a_report_says_that_a_fault_was_planted():
    report = Report([], [], {}, {"planted": "cache offset"})
    assert next(terminal.lines(report)).startswith(
        "A fault was planted: cache offset. Nothing here is said of the model"
    )
    assert "planted: cache offset" in page.render(report)
