"""The fault catalogue: its table, what a sample of it does to the oracle, and the bookkeeping of the matrix."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxgpt.errors import InputError
from oracle import clean, ladder, noise, probe, training_probe
from oracle.__main__ import main
from oracle.comparison import Comparison
from oracle.faults import CATALOGUE, FAULTS, HELD_OUT, figures, matrix, mutants, trial
from oracle.faults.catalogue import KINDS, named
from oracle.faults.mutants import Mutant
from oracle.faults.training import Rules, optimized
from oracle.noise import stored_calibration
from oracle.results import Cause, Finding, Report, RungResult
from oracle.rungs import optimizer
from oracle.verbs import faults as verb

pytestmark = pytest.mark.slow

DESIGNED = (
    *("kernel transposed", "qkv packing order", "query, key and value swapped", "GQA repeat against tile"),
    *("layers in lexicographic order", "bf16 bits read as fp16", "tensor left at its random init"),
    *("head untied and random", "head wrongly tied", "bias dropped", "padded vocabulary rows live"),
    *("weights of another revision", "head with the wrong sign or scale"),
    *("RoPE interleaved", "RoPE theta", "RoPE scaling ignored", "norm epsilon", "norm in bfloat16"),
    *("LayerNorm for RMSNorm", "(1 + w) handling", "GELU erf or tanh", "gate and up swapped"),
    *("attention scale missing", "softmax in low precision", "causal mask off by one", "post-norm for pre-norm"),
    *("position ids off by one", "block contributes nothing"),
    *("cache offset", "cache position not advanced", "stale cache slot", "left-pad positions"),
    *("batch pad mask ignored", "cache dtype too low"),
    *("special ids shifted", "BOS doubled", "prefix-matching special", "wrong pre-tokenizer regex"),
    *("hex or byte-level vocabulary", "label shift missing", "label shift doubled", "loss mask off by one"),
    *("padding trained", "accumulation normalised per micro-batch", "decay on norms and biases", "coupled decay"),
    *("learning-rate schedule off by one", "dropout left on"),
)
"""The classes that the catalogue must have at least."""


# -- The table -------------------------------------------------------------------------


def test_every_designed_class_is_in_the_catalogue():
    assert set(DESIGNED) - set(figures.classes()) == set()


def test_rows_are_told_apart():
    ids = [fault.id for fault in (*CATALOGUE, *HELD_OUT)]
    assert [id for id, count in Counter(ids).items() if count > 1] == []
    assert not {fault.name for fault in HELD_OUT} & {fault.name for fault in CATALOGUE}


def test_the_matrix_is_large_enough():
    planted = mutants.catalogue()
    assert len({mutant.faults[0].name for mutant in planted}) >= figures.LEAST_CLASSES
    assert len(planted) >= figures.LEAST_MUTANTS
    assert len(HELD_OUT) >= 20 + 24


def test_every_row_is_planted_somewhere_or_equivalent_with_a_reason():
    planted = {mutant.faults[0].id for mutant in (*mutants.catalogue(), *mutants.held_out())}
    equal = {equivalent.fault.id for equivalent in mutants.equivalents()}
    assert {fault.id for fault in (*CATALOGUE, *HELD_OUT)} - planted - equal == set()
    assert all(len(equivalent.reason) > 20 for equivalent in mutants.equivalents())


def test_every_class_of_the_model_is_planted_in_both_dtypes_and_every_family_it_exists_in():
    places: dict[str, set[tuple[str, str]]] = {}
    for mutant in mutants.catalogue():
        family = next(name for name, variants in mutants.FAMILIES.items() if _is_of(mutant.model, name, variants))
        places.setdefault(mutant.faults[0].id, set()).add((family, mutant.dtype))
    assert len(places["norm epsilon"]) == len(places["kernel transposed"]) == 4
    assert {family for family, _ in places["RoPE interleaved"]} == {"Llama"}
    assert {family for family, _ in places["position table shifted"]} == {"GPT-2"}


def _is_of(model: str, family: str, variants: Any) -> bool:
    tables = (mutants.SPECIAL, mutants.WITH_TEXT)
    return model in variants or any(model in table[family] for table in tables)


def test_expected_places_are_on_the_ladder_or_in_training():
    rungs = {*ladder.LADDER, "loss", "gradients", "optimizer"}
    assert {rung for mutant in mutants.catalogue() for rung, _ in mutant.expected} <= rungs
    assert set(KINDS) == {"weights", "ops", "wiring", "decoding", "training", "text"}


def test_a_mutant_is_made_again_from_its_key():
    for mutant in (mutants.catalogue()[3], mutants.held_out()[5], mutants.pairs(1, 0)[0][0]):
        assert mutants.of(mutant.key) == mutant


def test_pairs_leave_each_other_alone():
    pairs, skipped = mutants.pairs(20, 3)
    assert len({pair.id for pair in pairs}) == 20
    assert all(pair.expected[0] != pair.expected[1] for pair in pairs)
    assert all(reason for _, reason in skipped)
    both = Mutant((named("cache offset"), named("cache rows mixed")), "llama", "float32", "pairs")
    assert mutants.masking(both) == "both change step"
    twice = Mutant((named("norm epsilon"), named("LayerNorm for RMSNorm")), "llama", "float32", "pairs")
    assert "same place" in mutants.masking(twice)


# -- The oracle ------------------------------------------------------------------------

SAMPLE = (
    *("qkv packing order (by head)", "weights of another revision", "one bit flipped", "layer skipped (config)"),
    *("LayerNorm for RMSNorm (the other way round)", "heads merged without transposing", "mask value too small"),
    *("softmax over the wrong axis (heads)", "values summed over queries", "residual added twice"),
    *("parallel branches", "layers share parameters"),
)
"""One of each kind, in one model, so that they share their compilations."""


def located(fault: str, model: str = "gpt2", dtype: str = "float32") -> tuple[Mutant, dict[str, Any]]:
    mutant = Mutant((named(fault),), model, dtype)
    rungs = ("bits", "operators", "forward", "decode")
    found = ladder.climb(trial.compared(mutant, noise.stored_calibration()), rungs=rungs)
    return mutant, trial.judged(mutant, found)


@pytest.mark.parametrize("fault", SAMPLE)
def test_a_sample_of_the_catalogue_is_located_exactly(fault: str):
    mutant, record = located(fault)
    assert record["found"] == list(mutant.expected[0])
    assert record["detected"]
    assert record["exact"]
    assert record["within_one"]


NOBODYS = (
    *("one shard loaded twice", "remainder of tiles dropped", "segments in one bit", "online softmax not rescaled"),
    *("merged in row 0 only", "residual not renewed"),
)
"""Of the faults that nobody repairs, in the same model."""


@pytest.mark.parametrize("fault", NOBODYS)
def test_faults_that_nobody_repairs_are_located_exactly(fault: str):
    mutant = mutants.of(("held out", (fault,), "gpt2", "float32"))
    report = ladder.climb(trial.compared(mutant, noise.stored_calibration()), rungs=("bits", "operators", "forward"))
    assert trial.judged(mutant, report)["found"] == list(mutant.expected[0])


# Every twelfth: each costs two compilations of the decode loop. The first is planted in test_oracle_ladder.py as well.
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault.id, marks=[] if number % 12 == 6 else pytest.mark.exhaustive)
        for number, fault in enumerate(KINDS["decoding"])
    ],
)
def test_decoding_faults_are_located_exactly(fault: str, monkeypatch: pytest.MonkeyPatch):
    before = probe.decoding

    def decoding(*arguments: Any) -> probe.DecodeProbe:
        """Greedy tokens come after the steps in which each is found: a few, of the same shapes."""
        made = before(*arguments)
        return dataclasses.replace(made, prompts=made.forced[0].prompts, new_tokens=[2] * 3)

    monkeypatch.setattr(probe, "decoding", decoding)
    model = next(m.model for m in mutants.catalogue() if m.faults[0].id == fault and m.dtype == "float32")
    mutant, record = located(fault, model)
    assert record["found"] == list(mutant.expected[0])


def test_equivalent_mutants_change_no_bit_of_the_logits():
    true = trial.subject("gpt2", "float32").candidate
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 120
    given = tokens, np.broadcast_to(np.arange(12), (2, 12)), np.ones_like(tokens)
    right = np.asarray(true.forward(*given)["logits"])
    for id in ("mask value too small (-10,000)", "RoPE theta (no RoPE)"):
        fault = named(id)
        assert fault.equivalent(true.config, "float32"), id
        np.testing.assert_array_equal(np.asarray(fault.plant(true).forward(*given)["logits"]), right, err_msg=id)
    changed = named("mask value too small").plant(true).forward(*given)["logits"]
    assert not np.array_equal(np.asarray(changed), right)


@pytest.mark.exhaustive
def test_the_optimizer_written_out_without_a_mistake_is_the_products():
    true = trial.subject("gpt2", "float32")
    candidate = optimized(Rules())(true.candidate)
    limits = noise.stored_calibration()
    with jax.default_matmul_precision("highest"):
        for chosen in (candidate, true.candidate):
            result = optimizer.run(Comparison(chosen, true.reference, None, true.folder, limits, mutants.SEED))
            # They add in another order, so that each has its own rounding.
            assert [finding for finding in result.findings if not finding.ok or finding.noise > 3] == []
    assert training_probe.SETTINGS.weight_decay > 0


# -- Bookkeeping -----------------------------------------------------------------------

NORM = Mutant((named("norm epsilon"),), "gpt2", "float32")


def said(
    name: str,
    tap: str = "layers.0.attn_norm",
    *,
    proved: bool = True,
    tied: tuple[str, ...] = (),
    near: tuple[str, ...] = (),
) -> Report:
    finding = Finding(tap, "norm", ok=False, error=1.0)
    cause = Cause(name, "operators", tap, "", "", finding, finding, proved, tied=tied, runners_up=near)
    return Report([RungResult("operators", [finding], "")], [], {}, causes=[cause])


def test_a_right_answer_counts_in_every_column():
    record = trial.judged(NORM, said(NORM.faults[0].cause))
    columns = ("detected", "exact", "within_one", "named", "named_first", "named_in_three", "proved", "both_found")
    assert all(record[column] for column in columns)


def test_a_neighbour_is_within_one_op_and_not_exact():
    record = trial.judged(NORM, said(NORM.faults[0].cause, "layers.0.attn.q"))
    assert (record["exact"], record["within_one"]) == (False, True)
    far = trial.judged(NORM, said(NORM.faults[0].cause, "layers.0.attn.out"))
    assert (far["exact"], far["within_one"]) == (False, False)


def test_unknown_is_no_name_and_a_runner_up_counts_among_three():
    cause = NORM.faults[0].cause
    record = trial.judged(NORM, said("unknown", near=("a", cause)))
    columns = ("named", "named_first", "named_in_three", "proved")
    assert [record[column] for column in columns] == [False, False, True, False]
    assert not trial.judged(NORM, said("unknown", near=("a", "b", cause)))["named_in_three"]


def test_a_wrong_name_is_named_and_not_right():
    record = trial.judged(NORM, said("something else"))
    assert (record["named"], record["named_first"], record["proved"]) == (True, False, True)


def test_nothing_found_counts_nowhere():
    record = trial.judged(NORM, Report([RungResult("operators", [], "")], [], {}))
    assert not any(record[column] for column in ("detected", "exact", "within_one", "named", "both_found"))


def test_of_two_faults_both_must_be_found():
    pair = Mutant((named("norm epsilon"), named("attention scale missing")), "gpt2", "float32", "pairs")
    one = said(pair.faults[0].cause)
    assert not trial.judged(pair, one)["both_found"]
    second = said("unknown", "layers.0.attn.scores").causes
    assert trial.judged(pair, dataclasses.replace(one, causes=[*one.causes, *second]))["both_found"]


def test_a_crash_of_the_oracle_is_recorded_and_not_detected(monkeypatch: pytest.MonkeyPatch):
    def broken(mutant: Mutant) -> Report:
        raise ZeroDivisionError("no reason")

    monkeypatch.setattr(trial, "bisected", broken)
    record = trial.tried(NORM.key)
    assert record["crash"] == "ZeroDivisionError: no reason"
    assert not record["detected"]


def fake(mutant: Mutant) -> dict[str, Any]:
    return trial.judged(mutant, said(mutant.faults[0].cause)) | {"seconds": 0.0}


def alarm(run: clean.Run, verdict: str) -> dict[str, Any]:
    place = (
        {"rung": "operators", "tap": "mask", "noise": [1.0]}
        if verdict != "pass"
        else {"rung": "", "tap": "", "noise": []}
    )
    header = {"id": matrix.clean_id(run), "table": "clean", "model": run.model, "dtype": run.dtype}
    return header | {"verdict": verdict, "seconds": 0.0, **place}


@pytest.fixture
def small() -> matrix.Plan:
    return matrix.plan(sample=3, pairs=1, runs=2, seed=1, only="")


def test_what_is_measured_is_not_measured_again(small: matrix.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def answers(groups: Any, work: Any, processes: int) -> Any:
        for task in (task for group in groups for task in group):
            asked.append(task)
            yield alarm(task, "pass") if isinstance(task, clean.Run) else fake(mutants.of(task))

    monkeypatch.setattr(matrix.workers, "answers", answers)
    first = matrix.measure(small, tmp_path, 2, lambda _: None)
    assert len(first) == len(asked) == len(small.planted) + 2
    kept = (tmp_path / matrix.RESULTS).read_text().splitlines()
    (tmp_path / matrix.RESULTS).write_text("\n".join([*kept[:-1], kept[-1][:20]]) + "\n")
    asked.clear()
    again = matrix.measure(small, tmp_path, 2, lambda _: None)
    assert len(asked) == 1, "only the line that was cut short is measured again"
    assert again == first


def test_names_accepted_later_count_without_measuring_again(monkeypatch: pytest.MonkeyPatch):
    record = trial.judged(NORM, said("eps differs"))
    assert not record["named_first"]
    later = dataclasses.replace(NORM.faults[0], names=frozenset({"eps differs"}))
    monkeypatch.setattr(trial, "of", lambda _: dataclasses.replace(NORM, faults=(later,)))
    assert trial.named(record)["named_first"]


def test_figures_stand_beside_their_targets():
    known = [fake(mutant) for mutant in mutants.catalogue()]
    known[0] |= {"detected": False, "exact": False}
    true = [alarm(run, "pass") for run in matrix.clean_runs(3, 0)]
    by_name = {figure.name: figure for figure in figures.figures([*known, *true])}
    missed = by_name[f"detected in {known[0]['dtype']}"]
    assert 0.99 < missed.value < 1
    assert by_name["false alarms"].ok
    assert not by_name["clean runs"].ok, "three clean runs are too few"
    assert not by_name["unknown faults located"].ok, "nothing counted reaches nothing"
    assert not {f.name: f for f in figures.figures([alarm(matrix.clean_runs(1, 0)[0], "fail")])}["false alarms"].ok


def test_the_page_lists_what_went_wrong_and_what_changes_nothing():
    wrong = trial.judged(NORM, said("something else", "layers.0.attn.out")) | {"seconds": 0.0}
    page = figures.markdown([wrong], [("a + b", "both change step")], {"jax": "1"}, "2000-01-01")
    assert "operators: `layers.0.attn.out`" in page
    assert "something else" in page
    assert "exp(-10,000) is zero" in page
    assert "both change step" in page
    json.dumps(figures.to_dict([wrong], [], {}, ""), allow_nan=False)


def test_clean_runs_have_seeds_that_no_calibration_has():
    runs = matrix.clean_runs(200, 0)
    calibrated = {run.seed for run in clean.full_plan()}
    assert min(run.seed for run in runs) >= matrix.FIRST_SEED > max(calibrated)
    assert len({run.seed for run in runs}) == 200
    assert {run.dtype for run in runs} == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such class"], "--only: the catalogue has no class 'no such class'"),
        (["--sample", "0"], "--sample must be ≥ 1, got 0"),
        (["--clean", "-1"], "--clean must be ≥ 0, got -1"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["faults", "--out", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_a_missed_target_is_exit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(matrix, "measure", lambda *_: [fake(NORM)])
    assert main(["faults", "--out", str(tmp_path), "--only", "norm epsilon", "--clean", "0"]) == 1
    assert "| mutants of the catalogue | 1 | ≥ 120 | **no** |" in capsys.readouterr().out
    assert (tmp_path / "faults.md").is_file()
    assert json.loads((tmp_path / "faults.json").read_text())["records"][0]["exact"]


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path: Path):
    (tmp_path / "file").write_text("")
    parsed = {"out": tmp_path / "file" / "x", "sample": None, "pairs": 0, "clean": 0, "seed": 0, "workers": 1}
    with pytest.raises(InputError, match="--out: cannot make the folder"):
        verb._check(type("Arguments", (), parsed)())  # pyright: ignore


def test_the_short_list_has_one_of_each_kind():
    assert {fault.rung for fault in FAULTS} == {"bits", "operators", "decode"}
    assert stored_calibration().factor > 1
