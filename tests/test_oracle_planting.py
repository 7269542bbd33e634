"""A fault of the catalogue in a user's model: the right row, refusals in one line, and a report that says so."""

from pathlib import Path

import pytest

from jaxgpt.errors import InputError
from oracle import models
from oracle.candidate import Candidate
from oracle.faults.planting import planter
from oracle.reports import page, terminal
from oracle.results import Report


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    folder: Path = models.write(models.MODELS["llama"], tmp_path_factory.mktemp("planting") / "hf", "float32", 7)
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
    with pytest.raises(InputError, match=r"no class 'cache offst'; near it: cache offset, "):
        planter("cache offst")


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


def test_a_report_says_that_a_fault_was_planted():
    report = Report([], [], {}, {"planted": "cache offset"})
    assert next(terminal.lines(report)).startswith(
        "A fault was planted: cache offset. Nothing here is said of the model"
    )
    assert "planted: cache offset" in page.render(report)
