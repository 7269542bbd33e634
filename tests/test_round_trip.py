"""What came from Hugging Face and was trained here answers alike in transformers and llama.cpp."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import round_trip
from round_trip import Answer, Answers

from jaxgpt import cli


def in_process(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    status = cli.main(list(map(str, words)))
    said = capfd.readouterr()
    assert status == 0, said.err
    return said.out


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_model_that_goes_in_and_out_answers_with_the_same_tokens_everywhere(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    # What JAX takes to start, five times over, is not what is tested.
    monkeypatch.setattr(round_trip, "jaxgpt", partial(in_process, capfd))
    monkeypatch.setattr(sys, "argv", ["round_trip.py", "--json"])
    status = round_trip.main()
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert (status, found["same"]) == (0, True), said.err
    rows = found["conversations"]
    assert [set(row["differences"].values()) for row in rows] == [{""}] * 4
    # With margins as wide as these no tie was asked for; and something was learned.
    assert found["least_margin"] > 1000 * max(found["log_odds_apart"].values())
    assert sum(row["text"] == row["taught"] for row in rows) >= 2


OURS = Answer([1, 2], [5, 6, 7], "abc")
MARGINS = np.asarray([1.0, 1e-6, 1.0])


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        (OURS, ""),
        (Answer([1, 3], [5, 6, 7], "abc"), "prompt [1, 2] is [1, 3]"),
        (Answer([1, 2], [5, 6, 7], "abd"), "text 'abc' is 'abd'"),
        (Answer([1, 2], [5, 9, 9], "xyz"), "tie"),
        (Answer([1, 2], [5, 6, 9], "xyz"), "answer [5, 6, 7] is [5, 6, 9], margin 1"),
        (Answer([1, 2], [5, 6], "ab"), "answer [5, 6, 7] is [5, 6], margin 1"),
        (Answer([1, 2], [5, 6, 7, 8], "abcd"), "answer [5, 6, 7] is [5, 6, 7, 8], margin 1"),
    ],
)
def test_answers_differ_unless_the_margin_is_a_certified_tie(theirs: Answer, verdict: str):
    assert round_trip.difference(OURS, MARGINS, Answers("other", [theirs], away=1e-6), 0) == verdict


def test_the_distance_is_of_log_odds_over_what_both_programs_tell():
    ours = np.log([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    theirs = np.log([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]])
    assert round_trip.distance(ours, theirs, 1) == 0.0
    assert round_trip.distance(ours, theirs, 2) == pytest.approx(np.log(16 / 7))
    told = [{0: np.log(0.05), 2: np.log(0.02)}, {1: np.log(0.7), 0: np.log(0.1)}]
    assert round_trip.distance(ours, told, 1) == pytest.approx(0.0)
    assert round_trip.distance(ours, told, 2) == pytest.approx(np.log(8 / 7))
    assert round_trip.distance(ours, [{}, {}], 2) == 0.0


def test_probabilities_that_llama_cpp_does_not_tell_are_left_out():
    """Inside of a character of several tokens it tells none, and none of the token that ends the answer."""

    def step(id: int) -> dict[str, object]:
        return {"id": id, "top_logprobs": [{"id": id, "logprob": -0.5}]}

    answer = {"tokens": [7, 8, 9, 2], "completion_probabilities": [step(7), step(9)]}
    assert round_trip.told_by_llama_cpp(answer) == [{7: -0.5}, {}, {9: -0.5}, {}]
    answer = {"tokens": [8, 9, 9], "completion_probabilities": [step(9)]}
    assert round_trip.told_by_llama_cpp(answer) == [{}, {}, {9: -0.5}]
