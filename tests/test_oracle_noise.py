import json
from collections.abc import Callable

import numpy as np
import pytest

from oracle import clean, noise, training_noise
from oracle.noise import Calibration, Ratios, kl_ratios, ratios
from oracle.results import Inconclusive

EPSILON = noise.EPSILON["float32"]


def three(seed: int = 0, shape: tuple[int, ...] = (4, 50)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidate and peer with independent errors of the same size."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(shape)
    candidate, peer = (truth + 1e-6 * rng.standard_normal(shape) for _ in range(2))
    return candidate, truth, peer


def test_equal_errors_have_ratios_near_one():
    measured = ratios([three()], EPSILON)
    assert 0.7 < measured.aggregate < 1.4
    assert 0.3 < measured.worst < 3
    assert measured.error == pytest.approx(1e-6, rel=0.3)


def test_one_wrong_element_is_seen_at_the_worst_position_though_the_aggregate_hardly_moves():
    candidate, truth, peer = three(shape=(4, 100_000))
    candidate[2, 77] += 1e-4
    measured = ratios([(candidate, truth, peer)], EPSILON)
    assert measured.aggregate < 1.2
    assert measured.worst > 15


def test_a_small_bias_everywhere_is_seen_in_the_aggregate_though_the_peer_has_a_worse_position():
    candidate, truth, peer = three(shape=(4, 10_000))
    candidate += 1e-5
    peer[0, 0] += 1e-4
    measured = ratios([(candidate, truth, peer)], EPSILON)
    assert measured.worst < 1
    assert measured.aggregate > 5


def test_a_small_row_is_measured_at_its_own_scale():
    candidate, truth, peer = three()
    for array in (candidate, truth, peer):
        array[0] *= 1e-3
    candidate[0] = truth[0] * 1.01
    assert ratios([(candidate, truth, peer)], EPSILON).worst > 1000


def test_an_exact_peer_leaves_one_ulp_of_room():
    truth = np.random.default_rng(0).standard_normal((3, 40))
    rounded = truth.astype(np.float32)
    assert ratios([(rounded, truth, truth)], EPSILON).worst <= 0.5
    assert ratios([(truth * (1 + 1e-5), truth, truth)], EPSILON).aggregate > 50


@pytest.mark.parametrize("side", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_a_problem_on_any_side(side: int, value: float):
    arrays = three()
    arrays[side][1, 2] = value
    measured = ratios([arrays], EPSILON)
    assert measured.problem.endswith("has NaN or infinite values")
    assert measured.aggregate == float("inf")


def test_pieces_and_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch):
    candidate, truth, peer = three(shape=(6, 50))
    whole = ratios([(candidate, truth, peer)], EPSILON)
    monkeypatch.setattr(noise, "CHUNK", 100)
    halves = [(candidate[part], truth[part], peer[part]) for part in (slice(0, 3), slice(3, 6))]
    parts = ratios(halves, EPSILON)
    assert parts.aggregate == pytest.approx(whole.aggregate)
    assert parts.worst == pytest.approx(whole.worst)


def test_kl_is_zero_for_shifted_logits_and_its_ratio_grows_with_the_error():
    candidate, truth, peer = three()
    _, shifted = kl_ratios([(truth + 3.0, truth, peer)], EPSILON)
    assert shifted < 1e-15
    near, _ = kl_ratios([(candidate, truth, peer)], EPSILON)
    far, largest = kl_ratios([(truth + 100 * (candidate - truth), truth, peer)], EPSILON)
    assert near.worst < 5
    assert far.worst == pytest.approx(100 * near.worst, rel=0.05)
    assert far.error == largest


def test_a_limit_is_the_factor_times_the_largest_clean_ratio():
    calibration = Calibration(4.0, {"forward": {"float32": {"norm": [1.5, 2.0], "embed": [0.0, 0.0]}}}, {})
    assert calibration.threshold("forward", "float32", "norm") == (6.0, 8.0)
    assert calibration.threshold("forward", "float32", "embed") == (0.0, 0.0)


def test_what_was_never_calibrated_is_inconclusive():
    with pytest.raises(Inconclusive, match="no clean runs of norm in bfloat16"):
        Calibration(4.0, {}, {}).threshold("forward", "bfloat16", "norm")


def test_the_stored_limits_say_where_they_come_from():
    stored = json.loads(noise.CALIBRATION.read_text())
    assert stored["version"] == noise.VERSION
    assert {"jax", "torch", "numpy", "backend"} <= stored["environment"].keys()
    assert stored["runs"]
    assert set(clean.RUNGS) <= stored["maxima"].keys()


def drawn(sizes: list[float]) -> Callable[[float], Ratios]:
    """How many times the noise an error of some size is, where draws of the noise have these sizes."""
    truth = np.full(64, 10.0)
    peer, *echoes = (truth + size for size in sizes)
    return lambda error: training_noise.measure(truth + error, truth, peer, training_noise.Unit(1e-7), echoes)


def test_an_error_within_the_scatter_of_many_draws_is_one_more_of_them():
    # Those of a clean gradient: layers.8.attn.v.bias of a deep bfloat16 model with outliers, off by 16.4.
    sizes = [0.456, 0.405, 0.041, 2.30, 1.19, 1.85, 0.331, 0.173]
    found = drawn(sizes)(16.4)
    assert 0.5 < found.aggregate < 4
    assert found.aggregate == pytest.approx(found.worst)
    assert drawn(sizes)(160.0).aggregate > 6
    assert drawn(sizes[:7])(16.4).aggregate == pytest.approx(16.4 / 2.30)


def test_draws_that_hardly_scatter_widen_nothing():
    sizes = [1.0, 0.7, 1.3, 0.9, 1.6, 0.8, 1.1, 1.2]
    assert drawn(sizes)(8.0).aggregate == pytest.approx(8.0 / 1.6)
