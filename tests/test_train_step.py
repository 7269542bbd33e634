import dataclasses
import itertools

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import model
from jaxgpt.chat import Rendered
from jaxgpt.data.batches import Batch, EpisodeBatches, empty_batch
from jaxgpt.loss import evaluate, masked_sum, token_losses
from jaxgpt.mesh import ALONE
from jaxgpt.optimizer import optimizer, schedule
from jaxgpt.settings import TrainSettings
from jaxgpt.train_step import initial_state, stacked, train_step
from jaxgpt.train_step import mean_gradients as eager_gradients

GPT2 = dataclasses.replace(conftest.GPT2, num_hidden_layers=1)
LLAMA = dataclasses.replace(conftest.LLAMA, num_hidden_layers=1)
SETTINGS = TrainSettings(steps=20, warmup_steps=4, learning_rate=1e-2)
RELATIVE = 1e-5
"""The promise of the issue: relative, in float32."""


mean_gradients = jax.jit(eager_gradients, static_argnums=(0, 1, 2))
loss_sum = jax.jit(masked_sum, static_argnums=0, static_argnames="dtype")


def batch_with_unequal_masks(config, rows: int, time: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    batch = empty_batch(rows, time)
    batch["ids"][:] = rng.integers(0, config.vocab_size, (rows, time))
    batch["targets"][:] = rng.integers(0, config.vocab_size, (rows, time))
    batch["positions"][:] = np.arange(time)
    batch["segments"][:] = 1
    for row in range(rows):
        batch["mask"][row, : 1 + (row * 5 + seed) % time] = 1.0
    return batch


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(**{name: array[start:stop] for name, array in batch.items()})


def relative(a, b) -> float:
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def test_eight_micro_batches_of_one_equal_one_batch_of_eight_with_unequal_masks():
    config = LLAMA
    state = initial_state(conftest.random_params(config), SETTINGS)
    batch = batch_with_unequal_masks(config, 8, 12, seed=3)
    assert len(set(batch["mask"].sum(axis=1))) > 4
    whole = mean_gradients(config, SETTINGS, "float32", state, stacked([batch]))
    parts = mean_gradients(config, SETTINGS, "float32", state, stacked([rows_of(batch, i, i + 1) for i in range(8)]))
    assert relative(parts[0], whole[0]) < RELATIVE
    assert relative(parts[1], whole[1]) < RELATIVE
    # A mean of micro-batch means is another number: the check can fail.
    means = [loss_sum(config, state.params, ALONE.rows(rows_of(batch, i, i + 1)), dtype="float32") for i in range(8)]
    biased = np.mean([m / rows_of(batch, i, i + 1)["mask"].sum() for i, m in enumerate(means)])
    assert relative(jnp.float32(biased), whole[0]) > 100 * RELATIVE


def episodes(config) -> list[Rendered]:
    rng = np.random.default_rng(5)
    made = []
    for length in (5, 9, 7, 12, 4, 6):
        ids = rng.integers(0, config.vocab_size, length).tolist()
        made.append(Rendered(ids, [0] * (length // 2) + [1] * (length - length // 2)))
    return made


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_packed_loss_and_gradient_equal_unpacked(config):
    params = conftest.random_params(config)
    state = initial_state(params, SETTINGS)
    packed = EpisodeBatches(episodes(config), 2, 24, seed=0, packed=True)
    unpacked = EpisodeBatches(episodes(config), 6, 24, seed=0, packed=False)
    a, b = packed.next(), unpacked.next()
    assert a["segments"].max() > 1, "nothing was packed"
    assert a["mask"].sum() == b["mask"].sum()
    one = mean_gradients(config, SETTINGS, "float32", state, stacked([a]))
    other = mean_gradients(config, SETTINGS, "float32", state, stacked([b]))
    assert relative(one[0], other[0]) < RELATIVE
    assert relative(one[1], other[1]) < RELATIVE
    leaking = Batch(**{**a, "segments": (a["segments"] > 0).astype(np.int32)})
    assert relative(mean_gradients(config, SETTINGS, "float32", state, stacked([leaking]))[0], one[0]) > 1e-3


def test_loss_equals_optax_and_ignores_an_infinite_loss_at_a_masked_place():
    config = GPT2
    params = conftest.random_params(config)
    batch = batch_with_unequal_masks(config, 3, 8, seed=1)
    logits = jax.jit(lambda params, ids: model.forward(config, params, ids).logits)(params, jnp.asarray(batch["ids"]))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    assert jnp.array_equal(jnp.round(token_losses(logits, jnp.asarray(batch["targets"])), 4), jnp.round(expected, 4))
    masked = batch["mask"] == 0
    batch["targets"][masked] = config.vocab_size  # no such token: its loss is NaN
    assert not np.isfinite(token_losses(logits, jnp.asarray(batch["targets"]))).all()
    assert np.isfinite(float(loss_sum(config, params, ALONE.rows(batch), dtype="float32")))


def test_remat_gives_the_same_gradient():
    config = LLAMA
    state = initial_state(conftest.random_params(config), SETTINGS)
    batch = stacked([batch_with_unequal_masks(config, 2, 10, seed=2)])
    plain = mean_gradients(config, SETTINGS, "float32", state, batch)
    remat = mean_gradients(config, dataclasses.replace(SETTINGS, remat=True), "float32", state, batch)
    assert relative(remat[1], plain[1]) < RELATIVE


def test_an_update_that_is_not_finite_is_not_applied():
    config = GPT2
    state = initial_state(conftest.random_params(config), SETTINGS)
    good = stacked([batch_with_unequal_masks(config, 2, 8, seed=0)])
    state, _ = train_step(config, SETTINGS, "float32", state, good)
    before = jax.tree.map(np.asarray, state)
    poison = batch_with_unequal_masks(config, 2, 8, seed=0)
    poison["ids"][:] = config.vocab_size  # an id outside the embedding reads NaN
    bad = stacked([poison])
    state, report = train_step(config, SETTINGS, "float32", state, bad)
    assert not bool(report.applied)
    for name, array in state.params.items():
        assert np.array_equal(array, before.params[name]), name
    for new, old in zip(jax.tree.leaves(state.moments), jax.tree.leaves(before.moments), strict=True):
        assert np.array_equal(new, old)
    assert int(state.step) == int(before.step) + 1


def test_norms_and_biases_do_not_decay_and_matrices_do():
    config = GPT2
    settings = dataclasses.replace(SETTINGS, weight_decay=0.5, schedule="constant", warmup_steps=0)
    params = conftest.random_params(config)
    transform = optimizer(settings)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda params: transform.update(zeros, transform.init(params), params))(params)
    for name, update in updates.items():
        moved = bool(jnp.any(update != 0))
        assert moved == (params[name].ndim == 2), name


def test_the_schedule_warms_up_peaks_and_ends_at_the_final_rate():
    for kind in ("cosine", "wsd"):
        settings = dataclasses.replace(SETTINGS, schedule=kind, steps=100, warmup_steps=10)
        rates = np.array([float(schedule(settings)(jnp.int32(step))) for step in range(100)])
        assert 0 < rates[0] < rates[5] < rates[10]
        assert rates.max() == pytest.approx(settings.learning_rate)
        assert rates[-1] == pytest.approx(settings.learning_rate * settings.final_learning_rate)
        assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    wsd = dataclasses.replace(SETTINGS, schedule="wsd", steps=100, warmup_steps=10, decay_fraction=0.2)
    assert float(schedule(wsd)(jnp.int32(75))) == pytest.approx(wsd.learning_rate)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    config = dataclasses.replace(GPT2, resid_pdrop=0.5)
    params = conftest.random_params(config)
    batch = batch_with_unequal_masks(config, 2, 8, seed=0)
    arrays = ALONE.rows(batch)
    once, again = (float(loss_sum(config, params, arrays, dtype="float32", rng=jax.random.key(i))) for i in (0, 1))
    assert once != again
    without = dataclasses.replace(config, resid_pdrop=0.0)
    assert evaluate(config, params, [batch], "float32") == evaluate(without, params, [batch], "float32")


def test_bfloat16_computes_with_float32_master_weights_and_learns():
    config = LLAMA
    state = initial_state(conftest.random_params(config), SETTINGS)
    batch = stacked([batch_with_unequal_masks(config, 2, 8, seed=0)])
    losses = []
    for _ in range(6):
        state, report = train_step(config, SETTINGS, "bfloat16", state, batch)
        losses.append(float(report.loss))
    assert {str(array.dtype) for array in state.params.values()} == {"float32"}
    assert losses[-1] < losses[0]
    rounded = np.asarray(jax.tree.leaves(state.params)[0])
    assert not np.array_equal(rounded, rounded.astype(jnp.bfloat16).astype(np.float32)), "updates below bf16 are kept"
