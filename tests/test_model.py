import dataclasses
from functools import partial
from typing import Any

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import often
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from jaxgpt import cache, model, taps, transformer, weights
from jaxgpt.config import ModelConfig, RopeScaling
from jaxgpt.taps import Wiring


def some(*often_run: str) -> pytest.MarkDecorator:
    """The configs whose path through what is tested differs from each other's."""
    return pytest.mark.parametrize("config", often.exhaustive_but(often_run, conftest.CONFIGS), indirect=True)


# Half as much to compile as with every tap too.
@partial(jax.jit, static_argnums=0, static_argnames=("remat", "fused_attention"))
def logits(config: ModelConfig, params: model.Params, ids: jax.Array, **settings: Any) -> jax.Array:
    return model.forward(config, params, ids, **settings).logits


@partial(jax.jit, static_argnums=0)
def logits_cached(config: ModelConfig, *given: Any) -> tuple[jax.Array, cache.KVCache]:
    output, kv = model.forward_cached(config, *given)
    return output.logits, kv


def logits_of(config: ModelConfig, **changes: object) -> np.ndarray:
    changed = dataclasses.replace(config, **changes)
    return np.asarray(logits(changed, conftest.random_params(changed), conftest.random_ids(config, 2, 40)))


GPT2, LLAMA = (dataclasses.replace(config, num_hidden_layers=1) for config in (conftest.GPT2, conftest.LLAMA))

# One perturbation a field: what the config says must show in the output.
PERTURBATIONS: dict[str, tuple[ModelConfig, object]] = {
    "vocab_size": (GPT2, 140),
    "hidden_size": (LLAMA, 60),
    "intermediate_size": (LLAMA, 60),
    "num_hidden_layers": (LLAMA, 2),
    "num_attention_heads": (LLAMA, 8),
    "num_key_value_heads": (LLAMA, 3),
    "head_dim": (LLAMA, 12),
    "position_embedding": (GPT2, None),
    "norm": (LLAMA, "layernorm"),
    "rms_norm_eps": (LLAMA, 1e-2),
    "hidden_act": (GPT2, "gelu"),
    "gated_mlp": (LLAMA, False),
    "qkv_bias": (LLAMA, True),
    "attention_output_bias": (LLAMA, True),
    "mlp_bias": (LLAMA, True),
    "qk_norm": (LLAMA, True),
    "sliding_window": (LLAMA, 39),
    "tie_word_embeddings": (LLAMA, True),
    "rope_theta": (LLAMA, 500.0),
    "rope_scaling": (LLAMA, RopeScaling("linear", 2.0)),
}
ELSEWHERE = {
    "max_position_embeddings": "test_the_context_limit_is_the_size_of_the_position_table",
    "embd_pdrop": "test_each_dropout_rate_moves_the_training_output_only",
    "attn_pdrop": "test_each_dropout_rate_moves_the_training_output_only",
    "resid_pdrop": "test_each_dropout_rate_moves_the_training_output_only",
    "initializer_range": "test_fresh_weights_have_the_scale_the_config_says",
}


def test_every_config_field_has_a_test_that_perturbs_it():
    assert {field.name for field in dataclasses.fields(ModelConfig)} == PERTURBATIONS.keys() | ELSEWHERE.keys()
    assert all(name in globals() for name in ELSEWHERE.values())


@pytest.mark.parametrize("field", PERTURBATIONS)
def test_every_config_field_moves_the_output(field: str):
    config, value = PERTURBATIONS[field]
    if field == "position_embedding":
        config, value = dataclasses.replace(config, head_dim=10), "rope"
    before, after = logits_of(config), logits_of(config, **{field: value})
    assert before.shape != after.shape or np.abs(before - after).max() > 1e-3


def test_llama3_scaling_fields_each_move_the_angles():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    config = dataclasses.replace(LLAMA, rope_theta=500.0, rope_scaling=scaling)
    changes = {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0, "original_max_position_embeddings": 64}
    for field, value in changes.items():
        other = dataclasses.replace(config, rope_scaling=dataclasses.replace(scaling, **{field: value}))
        assert np.abs(logits_of(config) - logits_of(other)).max() > 1e-4, field


YARN = RopeScaling("yarn", 8.0, original_max_position_embeddings=32)
YARN_CHANGES: dict[str, float] = {
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "attention_factor": 1.5,
    "truncate": False,
}


@pytest.mark.parametrize("field", YARN_CHANGES)
def test_yarn_scaling_fields_each_move_the_output(field: str):
    config = dataclasses.replace(LLAMA, rope_theta=500.0, rope_scaling=YARN)
    other = dataclasses.replace(YARN, **{field: YARN_CHANGES[field]})
    moved = logits_of(dataclasses.replace(config, rope_scaling=other))
    assert np.abs(logits_of(config) - moved).max() > 1e-4


def test_yarn_magnitude_is_that_of_factor_unless_both_mscales_or_the_factor_itself_are_told():
    of_factor = 0.1 * np.log(8.0) + 1
    assert YARN.magnitude == pytest.approx(of_factor)
    assert dataclasses.replace(YARN, mscale=2.0).magnitude == pytest.approx(of_factor)
    both = dataclasses.replace(YARN, mscale=2.0, mscale_all_dim=0.5)
    assert both.magnitude == pytest.approx((0.2 * np.log(8.0) + 1) / (0.05 * np.log(8.0) + 1))
    assert dataclasses.replace(both, attention_factor=0.7).magnitude == 0.7
    assert RopeScaling("linear", 8.0).magnitude == 1


def test_a_window_hides_what_is_before_it_and_nothing_else():
    config = dataclasses.replace(conftest.LLAMA, sliding_window=3)
    params, ids = conftest.random_params(config), conftest.random_ids(config, 1, 7)
    mask = np.asarray(jax.jit(lambda: model.forward(config, params, ids).taps["mask"])())[0, 0]
    assert mask.tolist() == [[query - 3 < key <= query for key in range(7)] for query in range(7)]


def test_the_context_limit_is_the_size_of_the_position_table():
    shapes = {
        p.name: p.shape for p in weights.parameters(dataclasses.replace(conftest.GPT2, max_position_embeddings=7))
    }
    assert shapes["embed.positions.weight"] == (7, conftest.GPT2.hidden_size)


@pytest.mark.parametrize("field", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_rate_moves_the_training_output_only(field: str):
    config = dataclasses.replace(LLAMA, **{field: 0.5})
    params, ids = conftest.random_params(config), conftest.random_ids(config, 2, 8)
    plain = logits(LLAMA, params, ids)
    assert jnp.array_equal(logits(config, params, ids), plain), "off without an rng"
    one, two = (logits(config, params, ids, rng=jax.random.key(seed)) for seed in (0, 1))
    assert not jnp.array_equal(one, plain)
    assert not jnp.array_equal(one, two)


def test_fresh_weights_have_the_scale_the_config_says():
    config = dataclasses.replace(LLAMA, hidden_size=60, initializer_range=0.05)
    params = transformer.init(config, seed=1)
    assert np.std(params["embed.tokens.weight"]) == pytest.approx(0.05, rel=0.05)
    assert np.std(params["layers.0.attn.q.kernel"]) == pytest.approx(0.05, rel=0.05)
    shrunk = 0.05 / np.sqrt(2 * config.num_hidden_layers)
    assert np.std(params["layers.0.mlp.down.kernel"]) == pytest.approx(shrunk, rel=0.05)
    assert np.all(np.asarray(params["final_norm.weight"]) == 1)
    assert not np.array_equal(params["embed.tokens.weight"], transformer.init(config, seed=2)["embed.tokens.weight"])


def test_the_module_defines_exactly_the_parameters_of_the_name_table(config: ModelConfig):
    made = jax.eval_shape(lambda: transformer.Transformer(config, nnx.Rngs(0)).params())
    assert {name: array.shape for name, array in made.items()} == {p.name: p.shape for p in weights.parameters(config)}


@some("gpt2", "qwen3-yarn")
def test_the_module_computes_what_the_flat_parameters_do(config: ModelConfig):
    module = transformer.Transformer(config, nnx.Rngs(0))
    ids = conftest.random_ids(config, 1, 5)
    called = nnx.jit(lambda module, ids: module(ids))(module, ids)
    assert jnp.array_equal(called, logits(config, module.params(), ids))


@some("gpt2", "llama", "qwen3-yarn")
def test_turned_kernels_compute_the_same(config: ModelConfig):
    params, ids = conftest.random_params(config), conftest.random_ids(config, 3, 7)
    turned = model.turned(params)
    kernels = {name for name in params if name.endswith(".kernel")}
    assert {name for name in params if name not in turned} == kernels
    for name in kernels:
        assert jnp.array_equal(turned[name.removesuffix("kernel") + "weight"], params[name].T)
    expected = logits(config, params, ids)
    assert jnp.abs(logits(config, turned, ids) - expected).max() <= conftest.rounding(np.asarray(expected))


def test_taps_come_in_the_order_of_the_table_and_none_is_missing(config: ModelConfig):
    def run(params: model.Params, ids: jax.Array) -> jax.Array:
        output = model.forward(config, params, ids)
        assert tuple(output.taps) == taps.names(config)
        assert output.taps["logits"] is output.logits
        return output.logits

    # Only traced: what comes out of a traced function would be in the order of the alphabet.
    assert jax.eval_shape(run, conftest.random_params(config), conftest.random_ids(config, 1, 5)).ndim == 3


@some("gpt2", "llama-biased-tied", "qwen3-yarn")
def test_any_single_op_runs_alone_on_the_taps_it_reads(config: ModelConfig):
    params, ids = conftest.random_params(config), conftest.random_ids(config, 2, 6)
    values = model.run(config, params, taps.ops(config), model.uncached_inputs(ids))
    for op in taps.ops(config):
        alone = model.run_op(config, params, op, [values[name] for name in op.inputs])
        assert jnp.array_equal(alone, values[op.tap]), op.tap


def test_an_op_can_be_replaced_and_a_tap_fed_from_there_on_only():
    config, tap = LLAMA, "layers.0.attn.q_rope"
    params, ids = conftest.random_params(config), conftest.random_ids(config, 1, 6)
    plain = model.forward(config, params, ids).taps
    replaced = model.forward(config, params, ids, replace={tap: lambda config, p, x, angles: 2 * x}).taps
    fed = model.forward(config, params, ids, feed={tap: 2 * plain["layers.0.attn.q_heads"]}).taps
    at = list(plain).index(tap)
    for number, name in enumerate(plain):
        assert jnp.array_equal(replaced[name], fed[name]), name
        if number < at:
            assert jnp.array_equal(plain[name], replaced[name]), name
    assert not jnp.array_equal(plain["logits"], replaced["logits"])


def test_unused_taps_cost_no_memory_under_jit():
    config = conftest.LLAMA
    params, ids = conftest.random_params(config), conftest.random_ids(config, 4, 64)

    def temporary_bytes(keep: bool) -> int:
        def run(params, ids):
            output = model.forward(config, params, ids)
            return output if keep else output.logits

        return jax.jit(run).lower(params, ids).compile().memory_analysis().output_size_in_bytes

    assert temporary_bytes(keep=False) == 4 * 64 * config.vocab_size * 4
    assert temporary_bytes(keep=True) > 10 * temporary_bytes(keep=False)


def test_shapes_are_checked_at_run_time():
    config = conftest.LLAMA
    with pytest.raises(TypeCheckError, match="ids"):
        model.forward(config, conftest.random_params(config), conftest.random_ids(config, 1, 5)[0])


def test_an_id_outside_the_vocabulary_is_nan_and_not_another_token():
    config = conftest.GPT2
    params = conftest.random_params(config)
    for bad in (config.vocab_size, -1):
        assert jnp.isnan(logits(config, params, jnp.array([[bad]]))).all()


def test_segments_keep_documents_apart():
    config = conftest.LLAMA
    params, ids = conftest.random_params(config), conftest.random_ids(config, 1, 9)
    segments = jnp.array([[1] * 4 + [2] * 5])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = logits(config, params, ids, positions=positions, segments=segments)[0, 4:]
    alone = logits(config, params, ids[:, 4:])[0]
    assert np.abs(packed - alone).max() < conftest.rounding(alone)
    leaking = logits(config, params, ids, positions=positions)[0, 4:]
    assert np.abs(leaking - alone).max() > 100 * conftest.rounding(alone)


# -- Cache -----------------------------------------------------------------------------


@pytest.mark.slow
@some("gpt2", "mistral", "qwen3-yarn")
def test_cached_logits_equal_uncached_at_every_step_up_to_the_edge_of_the_context(config: ModelConfig):
    params, limit = conftest.random_params(config), config.max_position_embeddings
    ids = conftest.random_ids(config, 2, limit)
    full = np.asarray(logits(config, params, ids))
    lengths = np.array([60, 43])  # ragged: each row continues at its own slot
    found, kv = logits_cached(
        config, params, ids[:, :60], jnp.asarray(lengths), cache.empty(config, 2, 128, jnp.float32)
    )
    tolerance = conftest.rounding(full)
    for row in range(2):
        n = lengths[row]
        assert np.abs(found[row, :n] - full[row, :n]).max() < tolerance
    while lengths.max() < limit:
        here = jnp.asarray([[ids[row, lengths[row]]] for row in range(2)])
        found, kv = logits_cached(config, params, here, jnp.ones(2, jnp.int32), kv)
        for row in range(2):
            assert np.abs(found[row, 0] - full[row, lengths[row]]).max() < tolerance, lengths
        lengths += 1
    assert np.array_equal(kv.lengths, lengths)


def test_padding_of_a_ragged_batch_is_never_stored():
    config = conftest.LLAMA
    params, ids = conftest.random_params(config), conftest.random_ids(config, 2, 8)
    _, kv = logits_cached(config, params, ids, jnp.array([3, 8]), cache.empty(config, 2, 64, jnp.float32))
    assert not np.asarray(kv.keys[0][0, :, 3:]).any()
    assert np.asarray(kv.keys[0][1, :, :8]).any(axis=(0, 2)).all()


def test_a_cache_position_off_by_one_is_seen():
    config = conftest.LLAMA
    params, ids = conftest.random_params(config), conftest.random_ids(config, 1, 9)
    full = np.asarray(logits(config, params, ids)[0, 8])
    _, kv = logits_cached(config, params, ids[:, :8], jnp.array([8]), cache.empty(config, 1, 64, jnp.float32))
    shifted = kv._replace(lengths=kv.lengths + 1)
    right, _ = logits_cached(config, params, ids[:, 8:], jnp.array([1]), kv)
    wrong, _ = logits_cached(config, params, ids[:, 8:], jnp.array([1]), shifted)
    assert np.abs(right[0, 0] - full).max() < conftest.rounding(full)
    assert np.abs(wrong[0, 0] - full).max() > 100 * conftest.rounding(full)


@some("gpt2", "mistral")
def test_remat_and_fused_attention_do_not_change_the_model(config: ModelConfig):
    params, ids = conftest.random_params(config), conftest.random_ids(config, 1, 6)
    plain = logits(config, params, ids)
    for variant in ({"remat": True}, {"fused_attention": True}):
        assert np.abs(logits(config, params, ids, **variant) - plain).max() < conftest.rounding(plain)
    inside = {f"layers.0.{tap}" for tap in taps.INTERNAL_TO_FUSED_ATTENTION}
    assert set(taps.names(config)) - set(taps.names(config, Wiring(fused_attention=True))) >= inside
