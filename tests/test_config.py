"""A config.json is this model exactly, or refused in one line; nothing in it is ignored without a reason."""

import dataclasses
from collections.abc import Callable
from typing import Any

import conftest
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import ModelConfig, RopeScaling, from_hf, hf_model_type, hf_model_types, to_hf
from jaxgpt.errors import InputError
from jaxgpt.hf_keys import HARMLESS, REQUIRED_VALUES
from jaxgpt.presets import PRESETS

FILES = {name: to_hf(conftest.CONFIGS[name], "float32") for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3")}
GPT2, LLAMA, MISTRAL, QWEN2, QWEN3 = FILES.values()
OLD = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
"""As transformers 4 writes it."""


def refusal(hf: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        from_hf(hf)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(hf: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in hf.items() if key not in keys}


# -- What may be in a file -------------------------------------------------------------

ADVERSARIAL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**400, -(10**400), 2**31, 2**63, float("nan"), float("inf"), -float("inf"), 1e-320, 0.5]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["silu", "gelu", "linear", "llama3", "yarn", "default", "full_attention", *FILES]),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", 1, None, {}]), max_size=2),
)
ROPE = st.dictionaries(
    st.sampled_from(["rope_theta", "rope_type", "type", "partial_rotary_factor", "x"])
    | st.sampled_from([field.name for field in dataclasses.fields(RopeScaling)]),
    ADVERSARIAL,
    max_size=6,
)
ANY = ADVERSARIAL | ROPE
WINDOW = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
KEYS = sorted({*GPT2, *LLAMA, *QWEN2, *HARMLESS, *REQUIRED_VALUES, *WINDOW, "head_dim", "n_inner", "rope_theta"})


def config_or_message(read: Callable[[dict[str, Any]], ModelConfig], values: dict[str, Any]) -> ModelConfig | str:
    try:
        return read(values)
    except InputError as error:
        return str(error)


@settings(deadline=None)
@given(st.sampled_from(sorted(FILES)), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), ANY, max_size=4))
def test_whatever_a_config_json_says_is_a_config_or_one_line(model_type: str, changes: dict[str, Any]):
    outcome = config_or_message(from_hf, {**FILES[model_type], **changes})
    if isinstance(outcome, str):
        assert outcome.isprintable()
        assert len(outcome) < 600
    else:
        said = changes.get("model_type", model_type)
        assert said in hf_model_types(outcome)
        assert from_hf(to_hf(outcome, "float32", said)) == outcome


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(ModelConfig)]), ANY, min_size=1, max_size=3))
def test_whatever_a_checkpoint_says_is_a_config_or_one_line(changes: dict[str, Any]):
    outcome = config_or_message(ModelConfig.from_dict, {**conftest.CONFIGS["llama3-scaling"].to_dict(), **changes})
    if isinstance(outcome, str):
        assert outcome.isprintable()
    else:
        assert ModelConfig.from_dict(outcome.to_dict()) == outcome


def test_from_dict_is_the_inverse_of_to_dict(config: ModelConfig):
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flux": 1, "flax": 2}, "model config has unknown keys flax, flux; this version knows 25 fields"),
        (
            {"rope_scaling": {"rope_type": "linear", "beta": 1}},
            "rope_scaling has unknown keys beta; this version knows",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": 3}, "rope_scaling must be null or an object with rope_type, got 3"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
            "rope_scaling.factor must be a positive number, got nan",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor must be >= 1, got 0.5"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}},
            "rope_scaling.high_freq_factor must exceed low_freq_factor, got 4.0 and 4.0",
        ),
        ({"num_key_value_heads": 4}, "num_attention_heads (6) must be a multiple of num_key_value_heads (4)"),
        ({"head_dim": 13}, "head_dim must be even for RoPE, got 13"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer below 2^31, got -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer below 2^31, got True"),
        ({"vocab_size": 2**31}, "vocab_size must be a positive integer below 2^31, got 2147483648"),
        ({"attn_pdrop": 1.0}, "attn_pdrop must be in [0, 1), got 1.0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"qkv_bias": "yes"}, "qkv_bias must be true or false, got 'yes'"),
        ({"hidden_act": ["silu"]}, "hidden_act must be one of gelu_new, gelu, silu; got ['silu']"),
    ],
)
def test_a_checkpoints_config_is_refused_with_the_reason(changes: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        ModelConfig.from_dict({**conftest.LLAMA.to_dict(), **changes})
    assert message in str(caught.value)


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="model config lacks head_dim"):
        ModelConfig.from_dict(without(conftest.LLAMA.to_dict(), "head_dim"))


# -- Hugging Face ----------------------------------------------------------------------

TYPES = {name: name.split("-")[0].replace("llama3", "llama") for name in conftest.CONFIGS}
"""A Mistral without a window would be a Llama."""


@pytest.mark.parametrize("name", conftest.CONFIGS)
def test_the_model_type_is_decided_by_the_fields(name: str):
    config = conftest.CONFIGS[name]
    assert hf_model_type(config) == TYPES[name]
    assert from_hf(to_hf(config, "bfloat16")) == config
    assert to_hf(config, "bfloat16")["dtype"] == to_hf(config, "bfloat16")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_exported(name: str):
    assert from_hf(to_hf(PRESETS[name], "float32")) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"position_embedding": "rope", "head_dim": 10}),
        ("gpt2", {"mlp_bias": False}),
        ("gpt2", {"head_dim": 8}),
        ("gpt2", {"num_key_value_heads": 2}),
        ("gpt2", {"norm": "rmsnorm"}),
        ("llama", {"gated_mlp": False}),
        ("llama", {"attention_output_bias": True}),
        # Stock transformers refuses a Llama's width that 6 heads do not divide.
        ("llama", {"hidden_size": 44, "mlp_bias": True}),
        ("qwen2", {"mlp_bias": True}),
        ("gpt2", {"qk_norm": True}),
        ("gpt2", {"sliding_window": 5}),
        ("llama-biased-tied", {"sliding_window": 5}),
        ("qwen2", {"qk_norm": True}),
        ("qwen3", {"mlp_bias": True}),
    ],
)
def test_an_architecture_of_no_hugging_face_type_is_refused_with_its_fields(name: str, changes: dict[str, Any]):
    config = dataclasses.replace(conftest.CONFIGS[name], **changes)
    for translate in (hf_model_type, lambda config: to_hf(config, "float32")):
        with pytest.raises(InputError, match="no Hugging Face model type") as caught:
            translate(config)
        for field, value in changes.items():
            assert f"{field}={value}" in str(caught.value) or field in ("head_dim", "num_key_value_heads")


def test_a_qwen2_with_heads_of_another_width_than_its_share_keeps_them():
    config = dataclasses.replace(conftest.CONFIGS["qwen2"], head_dim=10)
    assert to_hf(config, "float32")["head_dim"] == 10
    assert from_hf(to_hf(config, "float32")) == config


@pytest.mark.parametrize("key", sorted({*HARMLESS} - {"model_type", *REQUIRED_VALUES}))
def test_a_harmless_key_changes_nothing(key: str):
    for hf in FILES.values():
        assert from_hf({**hf, key: "anything"}) == from_hf(hf)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("gpt2", "rope_theta"),
        ("gpt2", "num_key_value_heads"),
        ("gpt2", "hidden_size"),
        ("gpt2", "quantization_config"),
        ("llama", "n_embd"),
        ("llama", "qkv_bias"),
        ("llama", "gated_mlp"),
        ("llama", "norm"),
        ("llama", "attn_pdrop"),
        ("llama", "qk_norm"),
        ("qwen2", "logit_scale"),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(model_type: str, key: str):
    message = refusal({**FILES[model_type], key: 2})
    assert message == f"config.json has keys jaxgpt does not know: {key}; remove them if they change nothing"


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            {"model_type": "mamba"},
            "config.json has model_type 'mamba'; jaxgpt reads gpt2, llama, mistral, qwen2, qwen3",
        ),
        ({}, "config.json has model_type None; jaxgpt reads gpt2, llama, mistral, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "config.json has model_type ['llama']; jaxgpt reads"),
        (without(LLAMA, "vocab_size", "hidden_size"), "config.json lacks vocab_size, hidden_size"),
        (without(GPT2, "n_positions"), "config.json lacks n_positions"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=False; jaxgpt supports True only"),
        (LLAMA | {"use_sliding_window": True}, "has use_sliding_window=True, which llama does not read"),
        (MISTRAL | {"use_sliding_window": True}, "has use_sliding_window=True, which mistral does not read"),
        (LLAMA | {"layer_types": ["sliding_attention"]}, "a sliding window in some layers only"),
        (QWEN3 | {"layer_types": ["sliding_attention"] * 2}, "a sliding window in some layers only"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, "check layer_types, max_window_layers and"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": [FULL, SLIDING]}, "a sliding window in some layers only"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers must be an integer from 0"),
        (QWEN2 | {"use_sliding_window": 1}, "config.json: use_sliding_window must be true or false, got 1"),
        (MISTRAL | {"layer_types": [FULL] * 2}, "a sliding window in some layers only"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window must be a positive integer below 2^31, got 0"),
        (LLAMA | {"layer_types": 3}, "layer_types other than full_attention"),
        (LLAMA | {"layer_types": ["chunked_attention"]}, "layer_types other than full_attention and sliding_attention"),
        (QWEN2 | {"attention_bias": True}, "which qwen2 does not read"),
        (QWEN3 | {"mlp_bias": True}, "config.json of a qwen3 model has mlp_bias, which qwen3 does not read"),
        (MISTRAL | {"attention_bias": True}, "of a mistral model has attention_bias, which mistral does not read"),
        (LLAMA | {"attention_bias": 1}, "config.json: attention_bias must be true or false, got 1"),
        (LLAMA | {"tie_word_embeddings": "no"}, "config.json: tie_word_embeddings must be true or false, got 'no'"),
        (LLAMA | {"num_attention_heads": 0}, "config.json: num_attention_heads must be a positive integer"),
        (LLAMA | {"hidden_size": "42"}, "config.json: hidden_size must be a positive integer below 2^31, got '42'"),
        (LLAMA | {"head_dim": 0}, "head_dim must be a positive integer below 2^31, got 0"),
        (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer below 2^31, got 0"),
        (GPT2 | {"n_inner": 0}, "intermediate_size must be a positive integer below 2^31, got 0"),
        (GPT2 | {"n_embd": 35}, "n_embd=35, which is not a multiple of n_head=4"),
        (LLAMA | {"hidden_act": "relu"}, "hidden_act must be one of gelu_new, gelu, silu; got 'relu'"),
        (LLAMA | {"rms_norm_eps": None}, "rms_norm_eps must be a positive number, got None"),
        (LLAMA | {"x" * 90: 1, "a\nb": 1}, "'a\\nb'"),
    ],
)
def test_bad_values_are_refused_with_the_key_and_the_value(hf: dict[str, Any], message: str):
    assert message in refusal(hf)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type of rope_scaling must be one of default, linear, llama3, yarn; got"),
        ({"type": "dynamic", "factor": 4.0}, "rope_type of rope_scaling must be one of default, linear, llama3, yarn;"),
        ({"rope_type": "yarn"}, "rope type 'yarn' without factor"),
        ({"rope_type": "yarn", "factor": 4.0, "finetuned": True}, "rope type 'yarn' with finetuned, which it does not"),
        (
            {"rope_type": "yarn", "factor": 4.0, "truncate": None},
            "rope_scaling.truncate must be true or false, got None",
        ),
        ({"rope_type": "yarn", "factor": 4.0, "beta_slow": 32}, "beta_fast must exceed beta_slow, got 32.0 and 32"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1}, "rope_theta must exceed 1 for yarn scaling, got 1"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0}, "rope_scaling.mscale must be a positive number, got 0"),
        ({"factor": 2.0}, "rope type 'default' with factor, which it does not read"),
        ({"rope_type": "linear"}, "rope type 'linear' without factor"),
        (
            {"rope_type": "llama3", "factor": 8.0},
            "rope type 'llama3' without high_freq_factor, low_freq_factor, original",
        ),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "rope type 'linear' with beta_fast"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor must be a positive number, got '2'"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "jaxgpt rotates whole heads only"),
        (7, "config.json has rope_scaling=7; expected an object with rope_type"),
    ],
)
def test_a_rope_that_is_not_built_here_is_refused(rope: Any, message: str):
    assert message in refusal({**OLD, "rope_scaling": rope})
    assert message.replace("rope_scaling m", "rope_parameters m").replace(
        "rope_scaling=", "rope_parameters="
    ) in refusal({**OLD, "rope_parameters": rope})


def test_partial_rotation_is_refused_wherever_it_is_written():
    assert "partial_rotary_factor=0.5" in refusal({**LLAMA, "partial_rotary_factor": 0.5})


def test_the_rope_keys_of_transformers_5_win_and_no_theta_is_10000():
    theta = {"rope_theta": 500.0}
    assert from_hf({**OLD, **theta}).rope_theta == 500.0
    assert from_hf({**OLD, **theta, "rope_parameters": {"rope_theta": 9.0}}).rope_theta == 9.0
    assert from_hf(without(OLD, "rope_theta", "rope_scaling")).rope_theta == 10000.0
    new = {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf({**OLD, **old}).rope_scaling == RopeScaling("linear", 2.0)
    assert from_hf({**OLD, **old, **new}).rope_scaling == RopeScaling("linear", 3.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


def test_yarn_is_read_from_the_keys_of_transformers_4_and_5_and_missing_ones_are_its_defaults():
    plain = RopeScaling("yarn", 4.0, original_max_position_embeddings=24)
    assert from_hf({**OLD, "rope_scaling": {**without(YARN, "rope_type"), "type": "yarn"}}).rope_scaling == plain
    new = from_hf({**without(OLD, "rope_theta"), "rope_parameters": {**YARN, "rope_theta": 500.0}})
    assert (new.rope_scaling, new.rope_theta) == (plain, 500.0)
    nulls = dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
    assert from_hf({**OLD, "rope_scaling": {**YARN, **nulls}}).rope_scaling == plain
    short = from_hf({**OLD, "rope_scaling": without(YARN, "original_max_position_embeddings")}).rope_scaling
    assert short == RopeScaling("yarn", 4.0, original_max_position_embeddings=96), "the model's own context"
    told = {"attention_factor": 0.9, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3}
    every = from_hf({**OLD, "rope_scaling": {**YARN, **told, "truncate": False}})
    assert every.rope_scaling == RopeScaling.from_dict({**YARN, **told, "truncate": False})
    assert to_hf(every, "float32")["rope_scaling"] == {**YARN, **told, "truncate": False}
    assert to_hf(new, "float32")["rope_parameters"] == {**YARN, "rope_theta": 500.0}, "what is the default is not said"


def test_a_window_is_read_as_transformers_reads_it_of_each_type():
    switched = QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
    assert from_hf(switched).sliding_window == 7
    assert from_hf(switched | {"layer_types": [SLIDING] * 2}).sliding_window == 7
    assert from_hf(switched | {"max_window_layers": 2}).sliding_window is None, "no layer is left for it"
    assert from_hf(switched | {"layer_types": [FULL] * 2}).sliding_window is None, "layer_types are what counts"
    assert from_hf(switched | {"sliding_window": None}).sliding_window is None
    assert from_hf(QWEN2 | {"sliding_window": 7}).sliding_window is None
    assert from_hf(without(switched, "sliding_window")).sliding_window == 4096
    assert from_hf(without(MISTRAL, "sliding_window")).sliding_window == 4096
    assert from_hf(MISTRAL | {"layer_types": [SLIDING] * 2}).sliding_window == 11
    assert from_hf(LLAMA | {"sliding_window": 7}).sliding_window is None, "a Llama has none"


def test_a_mistral_without_a_window_is_a_llama_and_may_be_written_as_either():
    config = from_hf(MISTRAL | {"sliding_window": None})
    assert hf_model_types(config) == ("llama", "mistral")
    assert to_hf(config, "float32")["model_type"] == "llama"
    as_mistral = to_hf(config, "float32", "mistral")
    assert (as_mistral["model_type"], as_mistral["sliding_window"]) == ("mistral", None)
    assert from_hf(as_mistral) == config
    with pytest.raises(InputError, match="this model is no qwen3: its values are those of a llama"):
        to_hf(config, "float32", "qwen3")


def test_missing_keys_take_transformers_defaults_of_the_type():
    wider = {**LLAMA, "hidden_size": 48}
    llama = from_hf(without(wider, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"))
    assert (llama.num_key_value_heads, llama.head_dim, llama.rms_norm_eps) == (6, 8, 1e-6)
    assert not llama.tie_word_embeddings
    qwen2 = {**QWEN2, "hidden_size": 64 * 14, "num_attention_heads": 64}
    assert from_hf(without(qwen2, "num_key_value_heads")).num_key_value_heads == 32
    assert from_hf({**qwen2, "num_key_value_heads": None}).num_key_value_heads == 64
    mistral = from_hf(without(MISTRAL | {"num_attention_heads": 16}, "num_key_value_heads", "max_position_embeddings"))
    assert (mistral.num_key_value_heads, mistral.max_position_embeddings) == (8, 131072)
    qwen3 = {**without(QWEN3, "num_key_value_heads", "head_dim", "max_position_embeddings"), "num_attention_heads": 64}
    of_qwen3 = from_hf(qwen3)
    assert (of_qwen3.num_key_value_heads, of_qwen3.head_dim, of_qwen3.max_position_embeddings) == (32, 128, 32768)
    assert (of_qwen3.qk_norm, of_qwen3.qkv_bias, of_qwen3.attention_output_bias) == (True, False, False)
    biased = from_hf({**qwen3, "attention_bias": True})
    assert (biased.qkv_bias, biased.attention_output_bias) == (True, True)
    gpt2 = from_hf(without(GPT2, "n_inner", "activation_function", "tie_word_embeddings", "layer_norm_epsilon"))
    assert (gpt2.intermediate_size, gpt2.hidden_act, gpt2.tie_word_embeddings) == (4 * 36, "gelu_new", True)
    assert gpt2.rms_norm_eps == 1e-5
    assert from_hf(without(GPT2, "attn_pdrop")).attn_pdrop == 0.1


@pytest.mark.parametrize(
    ("theirs", "ours"), [("gelu_pytorch_tanh", "gelu_new"), ("gelu_fast", "gelu_new"), ("swish", "silu")]
)
def test_other_spellings_of_an_activation_are_the_same_function(theirs: str, ours: str):
    assert from_hf({**GPT2, "activation_function": theirs}).hidden_act == ours
