"""Two traces side by side: who is whose partner, what counts as a difference, where it begins."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxgpt.errors import InputError
from oracle.__main__ import main
from oracle.traces import Trace, align, diff, layout, name_map, save, text
from oracle.traces.difference import Difference
from oracle.traces.recorder import MATMULS

RNG = np.random.default_rng(5)


def stack(taps: int = 6, shape: tuple[int, ...] = (2, 5, 8), dtype: str = "float32") -> dict[str, np.ndarray]:
    return {f"layers.{i}.out": RNG.standard_normal(shape).astype(dtype) for i in range(taps)}


def rounded(taps: Mapping[str, np.ndarray], units: float, seed: int = 0) -> dict[str, np.ndarray]:
    """The same taps with noise of so many units in the last place of float32."""
    rng = np.random.default_rng(seed)
    scale = units * 2.0**-23
    return {name: (tap * (1 + scale * rng.standard_normal(tap.shape))).astype(tap.dtype) for name, tap in taps.items()}


def changed(taps: Mapping[str, np.ndarray], name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return {**taps, name: array}


def compared(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> Difference:
    return diff(Trace(a), Trace(b))


def said(difference: Difference) -> str:
    return "\n".join(text.lines(difference))


# -- What is a difference ----------------------------------------------------------------


def test_rounding_passes_and_the_answer_says_what_it_was_measured_by():
    taps = stack()
    difference = compared(taps, rounded(taps, 2))
    assert difference.report.verdict == "pass", said(difference)
    assert "Measured by: units in the last place at the tensor's scale, assumed, not measured" in said(difference)


def test_the_first_divergence_is_the_first_in_order_and_not_the_largest():
    taps = stack()
    wrong = changed(taps, "layers.2.out", taps["layers.2.out"] * (1 + 1e-4))
    wrong = changed(wrong, "layers.4.out", -taps["layers.4.out"])
    difference = compared(taps, wrong)
    first = difference.report.first_divergence()
    assert first is not None
    assert (first["tap"], first["layer"]) == ("layers.2.out", 2)
    assert text.verdict(difference).startswith("FAIL. First divergence: layers.2.out (the 2 compared before it agree).")
    assert ">> layers.2.out" in said(difference)
    assert " ! layers.4.out" in said(difference)


def test_order_is_that_of_a_whatever_the_order_of_b():
    taps = stack()
    wrong = {name: -tap for name, tap in reversed(taps.items())}
    first = compared(taps, wrong).first
    assert first is not None
    assert first.tap == "layers.0.out"


def test_what_a_difference_looks_like_is_said():
    taps = stack()
    wrong = taps["layers.1.out"].copy()
    wrong[:, 3] *= 2
    assert "What it looks like: only in position 3 of 5" in said(compared(taps, changed(taps, "layers.1.out", wrong)))


def test_a_tap_called_like_a_model_s_own_but_of_other_axes_is_described():
    taps = {"x.attn.weights": RNG.standard_normal((3, 4)), "attn.bias": RNG.standard_normal((3, 4, 5))}
    difference = compared(taps, {name: tap * 1.5 for name, tap in taps.items()})
    assert "the candidate is 1.5 times the truth" in said(difference)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_value_that_is_not_finite_is_a_difference(side: str, bad: float, dtype: type):
    taps = {name: tap.astype(dtype) for name, tap in stack().items()}
    spoilt = taps["layers.1.out"].copy()
    spoilt[0, 0, :3] = bad
    other = changed(taps, "layers.1.out", spoilt)
    first = (compared(other, taps) if side == "A" else compared(taps, other)).first
    assert first is not None
    assert first.tap == "layers.1.out"
    assert first.problem == f"3 of 80 entries are NaN or infinite in {side}"


def test_nan_on_both_sides_is_not_agreement():
    taps = {"a": np.array([1.0, np.nan])}
    assert compared(taps, taps).report.verdict == "fail"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_masked_scores_may_be_hidden_by_different_numbers_but_not_at_different_places(dtype: str):
    scores = RNG.standard_normal((2, 4, 4)).astype(dtype)
    hidden = np.triu(np.ones((4, 4), bool), 1)
    ours = np.where(hidden, -np.inf, scores).astype(dtype)
    theirs = np.where(hidden, np.finfo(dtype).min, scores).astype(dtype)
    assert compared({"s": ours}, {"s": theirs}).report.verdict == "pass"
    theirs[0, 0, 0] = -np.inf
    first = compared({"s": ours}, {"s": theirs}).first
    assert first is not None
    assert first.problem == "1 of 32 entries are masked in one of A and B only"


def test_shapes_are_never_broadcast():
    first = compared({"x": np.ones((2, 3))}, {"x": np.ones((2, 1))}).first
    assert first is not None
    assert first.problem == "shape [2, 1] in B, [2, 3] in A"


def test_integers_and_booleans_must_be_equal():
    ids = np.arange(6)
    first = compared({"ids": ids}, {"ids": np.where(ids == 4, 9, ids)}).first
    assert first is not None
    assert first.problem == "1 of 6 entries differ"
    assert compared({"ids": ids}, {"ids": ids.astype(np.int32)}).report.verdict == "pass"
    assert compared({"x": ids}, {"x": ids.astype(np.float32)}).report.verdict == "fail"


def test_single_numbers_and_empty_arrays_are_compared():
    taps = {"loss": np.array(2.5, np.float32), "none": np.zeros((0, 4), np.float32)}
    assert compared(taps, taps).report.verdict == "pass"
    assert compared(taps, changed(taps, "loss", np.array(2.6, np.float32))).report.verdict == "fail"


def test_behind_a_bfloat16_tap_noise_is_that_of_bfloat16_and_before_it_is_not():
    taps = stack(4)
    narrow = taps["layers.1.out"].astype(ml_dtypes.bfloat16)
    a = changed(taps, "layers.1.out", narrow)
    coarse = {name: (tap * (1 + 2e-3)).astype(tap.dtype) for name, tap in a.items()}
    findings = compared(a, {**coarse, "layers.1.out": narrow}).pairs
    assert [finding.ok for finding in findings] == [False, True, True, True]


def test_rows_that_are_small_by_cancellation_are_measured_at_the_tensor_s_scale():
    tap = RNG.standard_normal((4, 8)).astype(np.float32)
    tap[2] *= 1e-4
    other = tap.copy()
    other[2, 0] += 2.0**-21
    assert compared({"x": tap}, {"x": other}).report.verdict == "pass"


def test_a_difference_in_dtype_is_told():
    taps = stack()
    narrow = {name: tap.astype(ml_dtypes.bfloat16) for name, tap in taps.items()}
    assert "from layers.0.out on, B holds bfloat16 where A holds float32" in said(compared(taps, narrow))


# -- Measured noise ----------------------------------------------------------------------


def test_a_float64_truth_finds_what_units_in_the_last_place_let_pass():
    truth = {name: tap.astype(np.float64) for name, tap in stack(shape=(4, 16, 32)).items()}
    a = rounded({name: tap.astype(np.float32) for name, tap in truth.items()}, 0.25, seed=1)
    b = rounded(a, 0.25, seed=2)
    b["layers.3.out"] = (a["layers.3.out"] * (1 + 1.5e-6)).astype(np.float32)
    assert compared(a, b).report.verdict == "pass"
    measured = diff(Trace(a), Trace(b), truth=Trace(truth))
    assert measured.first is not None
    assert measured.first.tap == "layers.3.out"
    assert "distance from the float64 truth in multiples of A's own" in said(measured)


def test_a_truth_judges_a_narrow_candidate_by_its_own_rounding():
    truth = stack(dtype="float64")
    a = {name: tap.astype(np.float32) for name, tap in truth.items()}
    b = {name: tap.astype(ml_dtypes.bfloat16) for name, tap in truth.items()}
    assert diff(Trace(a), Trace(b), truth=Trace(truth)).report.verdict == "pass"
    wrong = changed(b, "layers.1.out", (truth["layers.1.out"] * 1.2).astype(ml_dtypes.bfloat16))
    assert diff(Trace(a), Trace(wrong), truth=Trace(truth)).report.verdict == "fail"


def test_a_truth_no_finer_than_what_it_judges_is_refused():
    taps = stack()
    with pytest.raises(InputError, match=r"--truth holds layers\.0\.out in float32, A in float32"):
        diff(Trace(taps), Trace(taps), truth=Trace(taps))


def test_a_truth_that_lacks_a_tap_is_a_failure():
    taps = stack()
    truth = {name: tap.astype(np.float64) for name, tap in list(taps.items())[:-1]}
    first = diff(Trace(taps), Trace(taps), truth=Trace(truth)).first
    assert first is not None
    assert first.problem == "the truth has no such tap, so there is nothing to measure it by"


def test_a_repetition_widens_the_noise_but_never_sharpens_it():
    taps = stack()
    b = rounded(taps, 200, seed=1)
    assert diff(Trace(taps), Trace(b)).report.verdict == "fail"
    assert diff(Trace(taps), Trace(b), repetition=Trace(rounded(taps, 200, seed=2))).report.verdict == "pass"
    assert diff(Trace(taps), Trace(rounded(taps, 12)), repetition=Trace(taps)).report.verdict == "pass"


# -- Soundness ---------------------------------------------------------------------------


def test_other_inputs_are_inconclusive():
    taps = stack()
    a, b = (Trace(taps, {"ids": np.array([1, 2, last])}) for last in (3, 4))
    difference = diff(a, b)
    assert difference.report.verdict == "inconclusive"
    assert text.verdict(difference) == (
        "INCONCLUSIVE. The input ids of A differs from ids of B; record both on the same inputs."
    )


def test_inputs_may_be_called_and_laid_out_otherwise():
    taps, image = stack(), RNG.standard_normal((2, 3, 6, 6)).astype(np.float32)
    a, b = Trace(taps, {"0": image}), Trace(taps, {"images": image.transpose(0, 2, 3, 1)})
    assert diff(a, b).report.verdict == "pass"
    assert diff(a, Trace(taps, {"images": image.transpose(0, 2, 3, 1) + 1})).report.verdict == "inconclusive"


def test_inputs_nobody_recorded_are_told():
    assert "Note: the inputs were not recorded on both sides" in said(compared(stack(), stack()))


def test_reduced_precision_is_inconclusive_unless_noise_is_measured():
    taps = stack()
    reduced = Trace(taps, environment={MATMULS: "reduced"})
    difference = diff(reduced, Trace(taps))
    assert "A was recorded with float32 matrix products at reduced precision" in difference.report.rungs[0].inconclusive
    assert diff(reduced, Trace(taps), repetition=Trace(rounded(taps, 100))).report.verdict == "pass"


# -- Partners ----------------------------------------------------------------------------


def test_a_tap_without_a_partner_is_a_failure_on_either_side():
    taps = stack()
    fewer = {name: tap for name, tap in taps.items() if name != "layers.3.out"}
    lacking = diff(Trace(taps), Trace(fewer, left_out={"layers.3.out": "never called"}))
    assert lacking.report.verdict == "fail"
    assert text.verdict(lacking) == "FAIL. All 5 pairs agree, but these taps have no partner: layers.3.out."
    assert "layers.3.out: B has no such tap (never called while recording)" in said(lacking)
    assert "layers.3.out: A has no such tap" in said(compared(fewer, taps))


def test_a_divergence_behind_taps_without_a_partner_says_so():
    taps = stack()
    other = {("h" if name == "layers.1.out" else name): tap for name, tap in taps.items()}
    other["layers.2.out"] = -other["layers.2.out"]
    verdict = text.verdict(compared(taps, other))
    assert "layers.2.out (the 1 compared before it agree, 1 before it have no partner)" in verdict


def rules(tmp_path: Path, content: str) -> list[name_map.Rule]:
    (tmp_path / "names.map").write_text(content)
    return name_map.load(tmp_path / "names.map")


MAP = """
# globs, groups, layouts, and what has no partner
embed = model.embed    # a comment
blocks.*.attn = model.layers.*.self_attn
/blocks\\.(\\d+)\\.(q|k)/ = model.layers.\\1.\\2_proj : B T (N H) -> B N T H
drop** = -
- = model.layers.*.rotary
"""


def test_a_map_names_partners_by_glob_expression_and_layout(tmp_path: Path):
    q = RNG.standard_normal((2, 3, 5, 4))
    a = {"embed": np.ones(2), "drop.a.b": np.ones(1), "blocks.3.attn": np.full(2, 3.0), "blocks.3.q": q}
    b = {
        "model.embed": np.ones(2),
        "model.layers.3.rotary": np.ones(1),
        "model.layers.3.self_attn": np.full(2, 3.0),
        "model.layers.3.q_proj": q.transpose(0, 2, 1, 3).reshape(2, 5, 12),
    }
    difference = diff(Trace(a), Trace(b), rules(tmp_path, MAP))
    assert difference.report.verdict == "pass", said(difference)
    assert len(difference.pairs) == 3
    assert "Note: 2 taps have no partner because the map says so." in said(difference)
    b["model.layers.3.q_proj"] = q.reshape(2, 5, 12)
    first = diff(Trace(a), Trace(b), rules(tmp_path, MAP)).first
    assert first is not None
    assert (first.tap, first.where) == ("blocks.3.q", "model.layers.3.q_proj of B")


def test_a_json_map_says_the_same(tmp_path: Path):
    table = rules(tmp_path, json.dumps({"a.*": "b.*", "c": "-"}))
    alignment = align.align(["a.1", "c"], ["b.1"], table)
    assert [(pair.a, pair.b) for pair in alignment.pairs] == [("a.1", "b.1")]
    assert alignment.waived == ["c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a -> b", "line 1: 'a -> b' is no rule; write `name in A = name in B`"),
        ("\n\n/(/ = b", "line 3: "),
        ("a = b : B T", "line 1: 'B T' is no layout"),
        ("a = b : B T -> B T N", "must have the same axes on both sides, each once"),
        ("a.* = b.*.*", "names more parts on the right than the left side has"),
        ("{", "is no JSON"),
        ('{"a": 3}', "a JSON map is an object of texts"),
        ("layers.9.* = x", "the map's rule `layers.9.* = x` matches no tap of A; correct or remove it"),
        ("layers.1.out = x", "the map's rule `layers.1.out = x` leads to x, which B does not have; correct or"),
        ("x" * 100_000, "… is no rule; write"),
        ("- = nothing", "the map's rule `- = nothing` matches no tap of B"),
        ("** = layers.0.out", "of A are both mapped to layers.0.out of B; correct the map"),
    ],
)
def test_a_map_with_a_mistake_is_one_line(tmp_path: Path, content: str, message: str):
    taps = Trace(stack())
    with pytest.raises(InputError) as error:
        diff(taps, taps, rules(tmp_path, content))
    assert message in str(error.value).replace("xxx' is", "… is")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_partner_that_b_lacks_is_named(tmp_path: Path):
    taps = stack()
    b = {name if name == "layers.1.out" else name.replace("layers", "blocks"): tap for name, tap in taps.items()}
    difference = diff(Trace(taps), Trace(b), rules(tmp_path, "layers.** = blocks.**"))
    assert "layers.1.out: B has no blocks.1.out" in said(difference)


# -- Layouts and suggestions -------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "before", "after"),
    [
        ("B T N H -> B N T H", (2, 5, 3, 4), (2, 3, 5, 4)),
        ("B T (N H) -> B N T H", (2, 5, 12), (2, 3, 5, 4)),
        ("B N T H -> (B T) (N H)", (2, 3, 5, 4), (10, 12)),
        ("a -> a", (0,), (0,)),
    ],
)
def test_a_layout_moves_every_element_where_its_origin_says(pattern: str, before: tuple[int, ...], after: tuple[int]):
    fitted = layout.parse(pattern).fit(before, after)
    assert fitted is not None
    array = np.arange(int(np.prod(before))).reshape(before)
    moved = fitted.apply(array)
    assert moved.shape == after
    assert np.array_equal(moved.reshape(-1), array.reshape(-1)[fitted.origin(np.arange(array.size))])
    assert str(layout.parse(pattern)) == pattern


def test_split_heads_come_before_time_as_written():
    merged = np.arange(24).reshape(1, 2, 12)
    fitted = layout.parse("B T (N H) -> B N T H").fit((1, 2, 12), (1, 3, 2, 4))
    assert fitted is not None
    assert np.array_equal(fitted.apply(merged), merged.reshape(1, 2, 3, 4).swapaxes(1, 2))


@pytest.mark.parametrize("shapes", [((2, 12), (2, 3, 5)), ((2, 3), (2, 3)), ((2, 13), (2, 3, 4))])
def test_a_layout_that_the_sizes_do_not_allow_fits_nothing(shapes: tuple[tuple[int, ...], tuple[int, ...]]):
    assert layout.parse("a (b c) -> a b c").fit(*shapes) is None


def test_suggestions_see_through_names_layouts_and_noise_and_are_not_used():
    q, v = RNG.standard_normal((2, 2, 3, 5, 4)), RNG.standard_normal((2, 2, 5, 12))
    a = {f"h.{i}.{name}": tap for i in range(2) for name, tap in (("q", q[i]), ("v", v[i]))}
    b = {}
    for i in range(2):
        b[f"layers.{i}.query"] = q[i].transpose(0, 2, 1, 3).reshape(2, 5, 12) + 0.05 * RNG.standard_normal((2, 5, 12))
        b[f"layers.{i}.value"] = v[i]
    difference = compared(a, b)
    lines = [line for line, _ in align.generalised(difference.suggestions)]
    assert lines == ["h.*.q = layers.*.query : a c (b d) -> a b c d", "h.*.v = layers.*.value"]
    assert difference.report.verdict == "inconclusive"
    assert "No tap of A has a partner in B; say with --map which is which" in text.verdict(difference)
    assert "  h.*.v = layers.*.value" in said(difference)


def test_equal_values_are_suggested_in_order():
    same = RNG.standard_normal((2, 6))
    a = {"x.norm": same * 2, "x.drop": same, "x.drop2": same}
    b = {"y.scaled": same * 2, "y.d": same, "y.e": same}
    found = [(s.a, s.b) for s in align.suggest(a, b, list(a), list(b))]
    assert found == [("x.norm", "y.scaled"), ("x.drop", "y.d"), ("x.drop2", "y.e")]


def test_of_equal_values_the_one_called_alike_is_suggested():
    same = RNG.standard_normal((2, 6))
    b = {"y.act": same, "y.drop": same, "y.out": same}
    assert [s.b for s in align.suggest({"x.drop": same}, b, ["x.drop"], list(b))] == ["y.drop"]


def test_unmistakable_partners_are_suggested_out_of_order_and_unrelated_taps_are_not():
    q, k, other = (RNG.standard_normal((3, 7)) for _ in range(3))
    a, b = {"q": q, "k": k, "z": other}, {"kk": k, "qq": q, "unrelated": RNG.standard_normal((3, 7))}
    assert {(s.a, s.b) for s in align.suggest(a, b, list(a), list(b))} == {("q", "qq"), ("k", "kk")}


# -- The command -------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    taps = stack()
    environment = {"torch": "2"}
    save(Trace(taps, {"x": np.ones(3)}, environment), tmp_path / "a.trace")
    save(Trace(changed(taps, "layers.2.out", -taps["layers.2.out"]), {"x": np.ones(3)}), tmp_path / "b.trace")
    return tmp_path / "a.trace", tmp_path / "b.trace"


def test_the_exit_code_and_the_report_say_the_same(files: tuple[Path, Path], tmp_path: Path):
    report = tmp_path / "report.json"
    assert main(["diff", str(files[0]), str(files[0])]) == 0
    assert main(["diff", str(files[0]), str(files[1]), "--json", str(report)]) == 1
    document = json.loads(report.read_text())
    assert document["verdict"] == "fail"
    assert document["first_divergence"]["tap"] == "layers.2.out"
    assert document["causes"][0]["name"] == "unknown"
    assert document["causes"][0]["residual"]["scale"] == pytest.approx(-1)
    assert document["environment"]["A"] == {"torch": "2"}
    assert document["traces"]["pairs"][0] == ["layers.0.out", "layers.0.out", ""]
    assert main(["report", str(report), "--html", str(tmp_path / "report.html")]) == 0
    assert "layers.2.out" in (tmp_path / "report.html").read_text()


def test_an_inconclusive_comparison_exits_with_3(files: tuple[Path, Path], tmp_path: Path):
    save(Trace(stack(), {"x": np.zeros(3)}), tmp_path / "c.trace")
    assert main(["diff", str(files[0]), str(tmp_path / "c.trace")]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "{a}"], "the following arguments are required: B"),
        (["diff", "{a}", "nothing"], "nothing is no file; give a trace"),
        (["diff", "{a}", "{b}", "--map", "nothing"], "the map nothing cannot be read: No such file or directory; give"),
        (["diff", "{a}", "a" * 5000], "File name too long; give a shorter path"),
        (["diff", "{a}", "x\x1b[31m\ny"], "oracle: x\\x1b[31m\\ny is no file"),
        (["diff", "{a}", "{b}", "--truth", "{a}", "--noise", "{a}"], "not allowed with argument"),
        (["diff", "{a}", "{b}", "--dtype", "bfloat16"], "--dtype is for a checkpoint"),
        (["diff", "{a}", "{folder}"], "A has no input ids, so"),
        (["diff", "{a}", "{b}", "--json", "no/such/r.json"], "the folder no/such does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    files: tuple[Path, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    places = {"a": files[0], "b": files[1], "folder": files[0].parent}
    assert main([argument.format(**places) for argument in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("oracle: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_comparing_needs_neither_jax_nor_torch_and_starts_at_once(files: tuple[Path, Path]):
    code = (
        "import sys, time\n"
        "started = time.process_time()\n"
        "blocked = ('jax', 'jaxlib', 'flax', 'torch')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"  # importing any of them raises
        "from oracle.__main__ import main\n"
        f"code = main(['diff', {str(files[0])!r}, {str(files[1])!r}])\n"
        "assert time.process_time() - started < 1, time.process_time() - started\n"
        "sys.exit(code)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.startswith("FAIL. First divergence: layers.2.out")
