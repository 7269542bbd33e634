import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import CONFIGS, random_params
from safetensors.numpy import save_file

from jaxgpt import weights
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.taps import Op
from oracle import folder, residual, streaming
from oracle.candidate import Candidate
from oracle.compare import Judge, Window, axes
from oracle.noise import Calibration
from oracle.results import Finding
from oracle.rungs import bits, loss
from torchref import training

# -- Names and layouts, written a second time ------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_two_name_tables_agree_on_every_parameter(name: str):
    config = CONFIGS[name]
    params = {key: np.asarray(value) for key, value in random_params(config).items()}
    again = folder.parameters(weights.to_hf(config, params))
    assert again.keys() == params.keys()
    assert all(np.array_equal(again[key], params[key]) for key in params)


def test_a_tensor_that_no_rule_knows_is_left_over_under_its_own_name():
    extra = {"model.layers.0.self_attn.sinks.weight": np.ones(3, np.float32)}
    assert folder.parameters(extra).keys() == extra.keys()


def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match="outside the model directory"):
        folder.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 100_000, "[]", "{}", *(f'{{"weight_map": {m}}}' for m in ("[]", "{}", '{"a": 5}', '{"a": ".."}'))],
)
def test_an_index_that_is_none_is_bad_input(tmp_path: Path, text: str):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json (is no index|has an empty|names \.\.,)"):
        folder.read(tmp_path)


def test_the_one_file_is_read_whatever_an_index_beside_it_says(tmp_path: Path):
    for value, name in enumerate(("other", "model")):
        save_file({"model.norm.weight": np.full(3, value, np.float32)}, tmp_path / f"{name}.safetensors")
    index = '{"weight_map": {"model.norm.weight": "other.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert folder.read(tmp_path)["model.norm.weight"].tolist() == [1.0, 1.0, 1.0]


def test_hub_buffers_and_bare_gpt2_names_are_understood(tmp_path: Path):
    tensors = {"h.0.attn.bias": np.ones((1, 1, 2, 2), np.float32), "h.0.ln_1.weight": np.ones(3, np.float32)}
    save_file(tensors | {"h.0.attn.c_attn.weight": np.zeros((3, 9), np.float32)}, tmp_path / "model.safetensors")
    found = folder.parameters(folder.read(tmp_path))
    assert found.keys() == {"layers.0.attn_norm.weight"} | {f"layers.0.attn.{part}.kernel" for part in "qkv"}


# -- Bits ------------------------------------------------------------------------------

VALUES = np.array([[1.0, -0.0, 1e-30], [3.14159, -2.5, 7.0]], np.float32)


def test_a_wider_dtype_may_hold_the_file_exactly():
    narrow = VALUES.astype(jnp.bfloat16)
    assert bits.difference(narrow.astype(np.float32), narrow) == ""
    assert bits.difference(VALUES, narrow).startswith("2 of 6 elements differ, first at [0, 2]")


def test_a_narrower_dtype_is_a_loss_even_where_the_values_are_equal():
    ones = np.ones((2, 3), np.float32)
    assert bits.difference(ones.astype(jnp.bfloat16), ones) == "stored as bfloat16, the file has float32"


@pytest.mark.parametrize("change", [np.float32(-0.0), np.nextafter(np.float32(1), np.float32(2))])
def test_one_bit_is_a_difference(change: np.float32):
    ours = np.array([1.0, 0.0], np.float32)
    theirs = ours.copy()
    theirs[0 if change else 1] = change
    assert bits.difference(ours, theirs).startswith("1 of 2 elements differ")


def test_shape_and_nan_are_differences():
    assert bits.difference(VALUES.T, VALUES) == "shape [3, 2], the file has [2, 3]"
    broken = np.full((2, 3), np.nan, np.float32)
    assert bits.difference(broken, broken) == "has NaN or infinite values"


def test_equally_wide_dtypes_are_compared_by_value():
    assert bits.difference(np.ones(2, jnp.bfloat16), np.ones(2, np.float16)) == ""
    assert bits.difference(np.ones(2, jnp.bfloat16), np.full(2, 1.001, np.float16)).startswith("2 of 2")


def findings(config: ModelConfig, ours: dict[str, np.ndarray], file: dict[str, np.ndarray]) -> dict[str, str]:
    found = bits.compare(Candidate(config, ours, "float32"), file, "reference")
    return {f"{finding.tap}.{finding.op}": finding.problem for finding in found if not finding.ok}


def test_a_parameter_that_one_side_lacks_is_a_failure_on_either_side():
    config = CONFIGS["llama"]
    params = {name: np.asarray(array) for name, array in random_params(config).items()}
    without = {name: array for name, array in params.items() if name != "head.weight"}
    assert findings(config, params, params) == {}
    assert findings(config, without, params) == {"head.weight": "the candidate lacks it"}
    assert findings(config, params, without) == {"head.weight": "the reference lacks it"}
    assert findings(config, params, params | {"q_norm.weight": VALUES}) == {
        "q_norm.weight": "only the reference has it"
    }
    assert findings(config, params | {"x.weight": VALUES}, params) == {"x.weight": "the reference lacks it"}


def test_a_tied_head_in_the_file_must_be_the_embedding():
    config = CONFIGS["gpt2"]
    params = {name: np.asarray(array) for name, array in random_params(config).items()}
    embedding = params["embed.tokens.weight"]
    assert findings(config, params, params | {"head.weight": embedding}) == {}
    assert "head.weight" in findings(config, params, params | {"head.weight": -embedding})


# -- Windows of padded batches ---------------------------------------------------------


def test_rows_of_left_and_right_padded_batches_line_up():
    right = np.array([[1, 2, 0], [3, 4, 5]], np.float32)[..., None]
    left = np.array([[0, 1, 2], [3, 4, 5]], np.float32)[..., None]
    ours = Window([slice(0, 2), slice(0, 3)], [slice(0, 2), slice(0, 3)])
    theirs = Window([slice(1, 3), slice(0, 3)], [slice(1, 3), slice(0, 3)])
    for a, b in zip(ours.rows("final_norm", right), theirs.rows("final_norm", left), strict=True):
        assert np.array_equal(a, b)


def test_time_and_source_are_found_in_every_kind_of_tap():
    window = Window([slice(0, 2)], [slice(0, 3)])
    shapes = {
        "layers.0.attn.scores": ((1, 4, 5, 7), (4, 2, 3)),
        "mask": ((1, 1, 5, 7), (1, 2, 3)),
        "layers.0.attn.keys": ((1, 2, 7, 6), (2, 3, 6)),
        "layers.0.attn.q_rope": ((1, 4, 5, 6), (4, 2, 6)),
        "layers.0.attn.merged": ((1, 5, 24), (2, 24)),
        "logits": ((1, 5, 11), (2, 11)),
        "rope.angles": ((1, 5, 3), (2, 3)),
    }
    for tap, (whole, row) in shapes.items():
        assert window.rows(tap, np.zeros(whole))[0].shape == row, axes(tap)


def test_attending_to_padding_is_seen():
    window = Window([slice(0, 2)], [slice(0, 2)])
    mask = np.zeros((1, 1, 3, 4), bool)
    mask[0, 0, :2, :2] = True
    mask[0, 0, 2] = True  # a padded query may do as it likes
    assert window.padding_is_hidden(mask)
    mask[0, 0, 1, 3] = True
    assert not window.padding_is_hidden(mask)


# -- One finding -----------------------------------------------------------------------

JUDGE = Judge("forward", "float32", Calibration(4.0, {"forward": {"float32": {"mask": [1.0, 1.0], "f": [1, 1]}}}, {}))


def test_a_shape_is_never_truncated_to_fit():
    one, two = np.ones((1, 2)), np.ones((2, 2))
    finding = JUDGE.finding(Op("t", "f", ()), [one], [two], [two])
    assert not finding.ok
    assert finding.problem == "shape [1, 2], the reference has [2, 2]"


def test_masked_scores_agree_in_pattern_and_where_allowed_in_value():
    op, allowed = Op("layers.0.attn.masked", "mask", ()), np.array([[True, False]])
    truth = np.array([[0.5, -np.inf]])
    assert JUDGE.finding(op, [np.array([[0.5, -3e38]])], [truth], [truth], allowed=[allowed]).ok
    leaking = JUDGE.finding(op, [np.array([[0.5, 0.1]])], [truth], [truth], allowed=[allowed])
    assert leaking.problem == "the candidate masks 1 scores otherwise than its mask says"
    assert not JUDGE.finding(op, [np.array([[0.6, -3e38]])], [truth], [truth], allowed=[allowed]).ok


def test_booleans_must_be_equal():
    true, false = np.array([True, True]), np.array([True, False])
    assert JUDGE.finding(Op("mask", "attention_mask", ()), [true], [true], [true]).ok
    assert JUDGE.finding(Op("mask", "attention_mask", ()), [false], [true], [true]).problem == "1 of 2 entries differ"


# -- Streaming -------------------------------------------------------------------------


def fill(taps: dict[str, torch.Tensor]) -> None:
    for number in range(5):
        taps[f"t{number}"] = torch.tensor(number)


def test_taps_arrive_in_order_and_can_be_taken_out_of_order():
    assert [int(value) for _, value in streaming.stream(fill)] == [0, 1, 2, 3, 4]
    reader = streaming.Reader(streaming.stream(fill))
    third = reader.take("t3")
    assert third is not None
    assert int(third) == 3
    assert reader.take("missing") is None
    assert reader.rest() == ["t0", "t1", "t2", "t4"]


def test_an_exception_of_the_forward_reaches_the_reader():
    def broken(taps: dict[str, torch.Tensor]) -> None:
        taps["a"] = torch.tensor(1)
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        list(streaming.stream(broken))


def test_an_abandoned_stream_ends_its_thread():
    before = threading.active_count()
    items = streaming.stream(fill)
    next(items)
    items.close()
    assert threading.active_count() == before


def test_a_candidate_keeps_its_parameters_when_a_fault_is_planted():
    candidate = Candidate(CONFIGS["gpt2"], {"a": np.ones(2)}, "float32")
    assert not candidate.is_altered
    assert dataclasses.replace(candidate, replace={"norm": max}).is_altered


def test_the_summary_of_a_failing_loss_says_first_how_many_differ():
    batches = [cast(training.Batch, SimpleNamespace(trained=7))] * 2
    right = Finding(loss.TOKENS, "token_losses", ok=True, error=1e-8)
    wrong = Finding(loss.MEAN, "mean_loss", ok=False, error=0.5)
    summarised = loss._summary  # pyright: ignore[reportPrivateUsage]
    assert summarised([right, wrong], batches, batches).startswith("1 of 2 comparisons differ; 2 micro-batches with ")
    assert summarised([right, right], batches, batches).startswith("2 micro-batches with ")


# -- What a difference looks like ------------------------------------------------------


def truth(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape)


def looks(candidate: np.ndarray, true: np.ndarray) -> list[str]:
    """All sentences but that with the numbers that are furthest apart."""
    found = residual.describe("layers.0.out", candidate, true)
    assert found is not None
    return [text for text in found.sentences if not text.startswith("most at ")]


def test_the_two_numbers_that_are_furthest_apart_are_told():
    true = truth(2, 5, 7)
    wrong = true.copy()
    wrong[0, 1, 2] += 0.1
    wrong[1, 4, 6] = 8.5
    found = residual.describe("layers.0.out", wrong, true)
    assert found is not None
    expected = f"most at row 1, position 4, dimension 6: 8.5, the reference has {true[1, 4, 6]:.6g}"
    assert found.sentences[-1] == expected


def test_a_multiple_of_the_truth_is_wrong_everywhere_however_small_some_of_it_is():
    true = truth(2, 5, 7)
    true[..., 2:] *= 1e-3
    assert looks(0.25 * true, true) == ["the candidate is 0.25 times the truth"]


def test_only_is_said_where_everything_else_is_right_and_mostly_where_it_is_nearly():
    true = truth(2, 8, 6)
    for others, word in ((0.0, "only"), (1e-3, "only"), (0.03, "mostly"), (0.9, "")):
        wrong = true * (1 + others)
        wrong[:, 3] = true[:, 3] * -1.0 if others < 0.5 else wrong[:, 3]
        said = [text for text in looks(wrong, true) if " in " in text]
        assert said == ([f"{word} in position 3 of 8"] if word else []), others


def test_small_values_that_are_wrong_are_not_left_out_of_only():
    true = truth(2, 8, 6)
    true[:, 5] *= 1e-4
    wrong = true.copy()
    wrong[:, [3, 5]] *= -1.0
    assert "only in positions 3 and 5 of 8" in looks(wrong, true)


def test_errors_where_the_truth_is_zero_have_a_place_as_well():
    true = np.zeros((2, 8, 6))
    wrong = true.copy()
    wrong[:, 3] = 1.0
    assert "only in position 3 of 8" in looks(wrong, true)
    assert "only in position 3 of 8" in looks(wrong + truth(2, 8, 1), true + truth(2, 8, 1))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_no_numbers_are_counted_and_placed_without_a_warning(value: float):
    true = truth(2, 8, 6)
    wrong = true.copy()
    wrong[1, 3, 2] = true[0, 6, 0] = value
    said = looks(wrong, true)
    assert "2 of 96 values are NaN or infinite" in said
    assert "only in positions 3 and 6 of 8" in said
