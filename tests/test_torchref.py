"""torchref against stock transformers: the reference must itself be right.

Truth is float64. transformers computes norms, RoPE and softmax in float32 whatever
the model's dtype; `widened` lets its own formulas run in float64, so that truth is
compared with truth. In float32 and bfloat16 the yardstick is transformers' own
distance from that truth.
"""

import copy
import importlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import often
import pytest
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import TypeCheckError, install_import_hook

import torchref
from torchref import ops

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LLAMA = {
    "vocab_size": 131,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
GPT2 = {"vocab_size": 131, "n_embd": 36, "n_inner": 52, "n_layer": 3, "n_head": 4, "n_positions": 640}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BIASED = {"attention_bias": True, "mlp_bias": True}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
YARN_TOLD = {**YARN, "beta_fast": 16, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
QWEN2 = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"hidden_size": 48}
CASES: dict[str, transformers.PreTrainedConfig] = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2-untied-erf": transformers.GPT2Config(**GPT2, tie_word_embeddings=False, activation_function="gelu"),
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama-biased-tied": transformers.LlamaConfig(**LLAMA, **BIASED, tie_word_embeddings=True),
    "llama3-scaling": transformers.LlamaConfig(**(LLAMA | {"rope_parameters": LLAMA3})),
    "llama-linear-scaling": transformers.LlamaConfig(
        **(LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}})
    ),
    "qwen2": transformers.Qwen2Config(**QWEN2, layer_types=["full_attention"] * 3),
    "qwen2-tied": transformers.Qwen2Config(**QWEN2, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(**QWEN2, use_sliding_window=True, sliding_window=13, max_window_layers=0),
    "mistral": transformers.MistralConfig(**LLAMA, sliding_window=7),
    "qwen3": transformers.Qwen3Config(**(LLAMA | {"hidden_size": 44, "num_hidden_layers": 2})),
    "qwen3-biased-tied-yarn": transformers.Qwen3Config(
        **(LLAMA | {"rope_parameters": YARN}), attention_bias=True, tie_word_embeddings=True
    ),
    "llama-yarn-told": transformers.LlamaConfig(**(LLAMA | {"rope_parameters": YARN_TOLD})),
}
"""Adversarial: all dimensions differ, 1 < K < N, Llama's H is not D / N."""


@dataclass(frozen=True)
class Pair:
    """The same random weights in transformers and, through a saved folder, in torchref."""

    stock: transformers.PreTrainedModel
    folder: Path

    def ours(self, dtype: torch.dtype | None = None) -> torchref.Decoder:
        return torchref.load(self.folder, dtype)

    def in_dtype(self, dtype: torch.dtype) -> transformers.PreTrainedModel:
        return copy.deepcopy(self.stock).to(dtype)


def stock_model(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Random weights of realistic scale in which nothing is zero, one or symmetric."""
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                scale = 0.8 if "wpe" in name else 0.3 if "wte" in name or "embed" in name else 0.15
                parameter.copy_(scale * noise)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    stock = stock_model(CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    stock.save_pretrained(folder)
    return Pair(stock, folder)


decoding = pytest.mark.parametrize(
    "pair",
    often.exhaustive_but(("gpt2", "llama-biased-tied", "mistral", "qwen3-biased-tied-yarn"), CASES),
    indirect=True,
)
"""What a cache or rounding can break beyond float64 logits, which are compared in every case: positions, a window,
norms of heads."""


def random_ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 131, (batch, time), generator=torch.Generator().manual_seed(seed))


@contextmanager
def widened() -> Iterator[None]:
    """Where transformers asks for float32, it gets float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def float64_stock(pair: Pair) -> transformers.PreTrainedModel:
    model = pair.in_dtype(torch.float64)
    if hasattr(model, "model"):
        with widened():
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies were float32
    return model


def assert_equal_in_float64(ours: torch.Tensor, stock: torch.Tensor) -> None:
    """Equal to 256 float64 ulps at the tensor's scale: three layers of reordered sums."""
    assert ours.dtype == stock.dtype == torch.float64
    error = (ours - stock).abs().max().item()
    assert error <= 256 * torch.finfo(torch.float64).eps * stock.abs().max().item()


def rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


def assert_within_noise(ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor) -> None:
    """Overall and at its worst, our distance from the truth is at most twice transformers'."""
    error, noise = (ours.double() - truth).abs(), (stock.double() - truth).abs()
    assert 0 < rms(noise) < 0.1 * rms(truth), "the yardstick itself is no measurement"
    assert rms(error) <= 2 * rms(noise)
    assert error.max() <= 2 * noise.max()


# -- Forward ---------------------------------------------------------------------------


def test_float64_logits_are_those_of_transformers(pair: Pair) -> None:
    ids = random_ids(2, 21)
    with widened(), torch.no_grad():
        expected = float64_stock(pair)(ids).logits
    with torch.no_grad():
        assert_equal_in_float64(pair.ours(torch.float64)(ids), expected)


def test_float64_logits_are_those_of_transformers_past_512_positions(pair: Pair) -> None:
    ids = random_ids(1, 560)
    with widened(), torch.no_grad():
        expected = float64_stock(pair)(ids).logits
    with torch.no_grad():
        assert_equal_in_float64(pair.ours(torch.float64)(ids), expected)


@decoding
@pytest.mark.parametrize(
    ("dtype", "time"),
    [
        (torch.float32, 560),
        (torch.bfloat16, 21),
        pytest.param(torch.float32, 21, marks=pytest.mark.exhaustive),
        pytest.param(torch.bfloat16, 560, marks=pytest.mark.exhaustive),
    ],
)
def test_logits_are_as_close_to_the_truth_as_those_of_transformers(pair: Pair, dtype: torch.dtype, time: int) -> None:
    ids = random_ids(2, time)
    with torch.no_grad():
        ours = pair.ours(dtype)
        truth = copy.deepcopy(ours).double()(ids)
        logits = ours(ids)
        assert logits.dtype == torch.float32
        assert_within_noise(logits, pair.in_dtype(dtype)(ids).logits, truth)


def test_float64_gradients_are_those_of_transformers(pair: Pair) -> None:
    ids = random_ids(2, 21)
    stock, ours = float64_stock(pair), pair.ours(torch.float64)
    with widened():
        loss = F.cross_entropy(stock(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(stock.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    scale = max(parameter.grad.abs().max().item() for parameter in expected.values())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name].grad).abs().max().item()
        assert error <= 256 * torch.finfo(torch.float64).eps * scale, name


def interleaved(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


FAULTS = {
    "rope-interleaved": ("llama", "rope", lambda x, a, s: interleaved(x, a)),
    "kv-heads-tiled": ("llama", "_repeat_kv", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1)),
    "norm-eps": ("llama", "rms_norm", lambda x, w, eps, f=ops.rms_norm: f(x, w, 1e-4)),
    "layer-norm-eps": ("gpt2", "layer_norm", lambda x, w, b, eps, f=ops.layer_norm: f(x, w, b, 1e-4)),
    "gelu-erf": ("gpt2", "activation", lambda x, kind: F.gelu(x)),
    "mask-off-by-one": ("gpt2", "attention_mask", lambda s, k, a, b: s[:, None, :, None] + 1 >= k),
    "head-norm-skipped": ("qwen3", "rms_norm", lambda x, w, eps, f=ops.rms_norm: x if x.ndim == 4 else f(x, w, eps)),
    "window-off-by-one": (
        "mistral",
        "attention_mask",
        lambda *x, window, f=ops.attention_mask: f(*x, window=window + 1),
    ),
    "yarn-without-its-stretch": ("llama-yarn-told", "rope", lambda x, a, s, f=ops.rope: f(x, a)),
    "rotated-the-other-way": ("qwen2", "rope", lambda x, a, s, f=ops.rope: f(x, -a, s)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_outside_the_noise(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, name, wrong = FAULTS[fault]
    stock = stock_model(CASES[case])
    stock.save_pretrained(tmp_path)
    ids = random_ids(2, 21)
    ours = torchref.load(tmp_path)
    with torch.no_grad():
        truth = copy.deepcopy(ours).double()(ids)
        expected = stock(ids).logits
        assert_within_noise(ours(ids), expected, truth)
        monkeypatch.setattr(ops, name, wrong)
        with pytest.raises(AssertionError):
            assert_within_noise(ours(ids), expected, truth)


@pytest.mark.parametrize("case", ["llama3-scaling", "llama-linear-scaling", "llama-yarn-told"])
def test_rope_scaling_changes_the_logits(case: str) -> None:
    raw = CASES[case].to_dict()
    torch.manual_seed(0)
    scaled = torchref.build(raw)
    plain = torchref.build(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    plain.load_state_dict(scaled.state_dict())
    ids = random_ids(1, 40)
    assert not torch.allclose(scaled(ids), plain(ids), rtol=1e-3)


# -- Decoding --------------------------------------------------------------------------


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    time = max(lengths)
    mask = torch.tensor([[0] * (time - n) + [1] * n for n in lengths])
    return random_ids(len(lengths), time) * mask, mask


def generated(model: transformers.PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=steps, pad_token_id=0, eos_token_id=None)
    return model.generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]


@decoding
def test_64_cached_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    ids = random_ids(2, 9)
    expected = generated(pair.stock, ids, torch.ones_like(ids), 64)
    assert torch.equal(torchref.greedy(pair.ours(), ids, 64), expected)
    assert len(expected.unique()) > 4, "a loop over few tokens would prove little"


@decoding
def test_greedy_tokens_of_a_ragged_left_padded_batch_are_those_of_transformers(pair: Pair) -> None:
    ids, mask = left_padded((9, 4, 1))
    expected = generated(pair.stock, ids, mask, 24)
    assert torch.equal(torchref.greedy(pair.ours(), ids, 24, attention_mask=mask), expected)
    assert torch.equal(torchref.greedy(pair.ours(), ids, 24, attention_mask=mask, cache=False), expected)


def test_left_padding_does_not_change_float64_logits(pair: Pair) -> None:
    ours = pair.ours(torch.float64)
    ids, mask = left_padded((9, 4))
    with torch.no_grad():
        logits = ours(ids, attention_mask=mask)
        alone = ours(ids[1:, 5:])
    assert logits.isfinite().all()
    assert_equal_in_float64(logits[1:, 5:], alone)


def test_cached_logits_are_those_of_the_whole_sequence(pair: Pair) -> None:
    ours = pair.ours(torch.float64)
    ids, mask = left_padded((9, 4))
    forced = random_ids(2, 12, seed=1)
    cached = torchref.cached_logits(ours, ids, forced, attention_mask=mask)
    with torch.no_grad():
        whole = ours(torch.cat((ids, forced), dim=1), attention_mask=torch.cat((mask, torch.ones_like(forced)), dim=1))
    assert_equal_in_float64(cached, whole[:, 8:-1])


def test_greedy_chooses_among_real_ids_only(pair: Pair) -> None:
    ids = random_ids(2, 9)
    free = torchref.greedy(pair.ours(), ids, 12)
    limit = int(free.max())
    tokens = torchref.greedy(pair.ours(), ids, 12, real_ids=limit)
    assert int(tokens.max()) < limit


def test_documents_packed_in_one_row_do_not_see_each_other(pair: Pair) -> None:
    ours = pair.ours(torch.float64)
    ids = random_ids(1, 12)
    segments = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    positions = torch.tensor([[*range(5), *range(4), *range(3)]])
    with torch.no_grad():
        packed = ours(ids, segments=segments, positions=positions)
        assert_equal_in_float64(packed[:, :5], ours(ids[:, :5]))
        assert_equal_in_float64(packed[:, 5:9], ours(ids[:, 5:9]))


# -- Taps ------------------------------------------------------------------------------


def vocabulary(pair: Pair):
    """The program under test's config and its table of ops: the vocabulary both sides share."""
    from jaxgpt import config, taps

    return config.from_hf(json.loads((pair.folder / "config.json").read_text())), taps


def recorded(model: torchref.Decoder, cached: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """Taps of a forward, and the inputs that its ops start from."""
    ids, seen = random_ids(2, 7), random_ids(2, 5, seed=1)
    past = model.empty_cache(2) if cached else None
    inputs: dict[str, torch.Tensor | None] = {"ids": ids}
    start = 0
    if past is not None:
        model(seen, past=past)
        start = 5
        for i, (keys, values) in enumerate(zip(past.keys, past.values, strict=True)):
            inputs[f"cache.{i}.keys"] = F.pad(keys, (0, 0, 0, 7))
            inputs[f"cache.{i}.values"] = F.pad(values, (0, 0, 0, 7))
    slots = torch.arange(start, start + 7).expand(2, 7)
    inputs |= {"positions": slots, "slots": slots, "key_slots": torch.arange(start + 7)}
    inputs |= {"segments": None, "key_segments": None}
    taps: dict[str, torch.Tensor] = {}
    model(ids, past=past, taps=taps)
    return taps, inputs


@pytest.mark.parametrize("cached", [False, True])
def test_tap_names_and_order_are_the_shared_vocabulary(pair: Pair, cached: bool) -> None:
    config, vocab = vocabulary(pair)
    taps, _ = recorded(pair.ours(), cached)
    assert tuple(taps) == vocab.names(config, vocab.Wiring(cached=cached))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_op_run_alone_on_recorded_inputs_gives_its_tap(pair: Pair, dtype: torch.dtype, cached: bool) -> None:
    config, vocab = vocabulary(pair)
    model = pair.ours(dtype)
    with torch.no_grad():
        taps, inputs = recorded(model, cached)
        for op in vocab.ops(config, vocab.Wiring(cached=cached)):
            given = [{**inputs, **taps}[name] for name in op.inputs]
            assert torch.equal(model.run_op(op.tap, given), taps[op.tap]), op.tap


def test_tap_shapes_and_dtypes_are_those_of_the_table(pair: Pair) -> None:
    config, _ = vocabulary(pair)
    taps, _ = recorded(pair.ours(torch.bfloat16), cached=True)
    B, T, S, D, F_ = 2, 7, 12, config.hidden_size, config.intermediate_size
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes = {
        "embed.tokens": (B, T, D),
        "rope.angles": (B, T, H // 2),
        "mask": (B, 1, T, S),
        "layers.1.attn.q": (B, T, N * H),
        "layers.1.attn.k": (B, T, K * H),
        "layers.1.attn.q_heads": (B, N, T, H),
        "layers.1.attn.k_rope": (B, K, T, H),
        "layers.1.attn.keys": (B, K, S, H),
        "layers.1.attn.scores": (B, N, T, S),
        "layers.1.attn.context": (B, N, T, H),
        "layers.1.attn.merged": (B, T, N * H),
        "layers.1.mlp.act": (B, T, F_),
        "layers.1.mlp_residual": (B, T, D),
        "logits": (B, T, 131),
    }
    assert {name: tuple(taps[name].shape) for name in shapes if name in taps} == {
        name: shape for name, shape in shapes.items() if name in taps
    }
    wide = ("scores", "masked", "angles", "logits")
    for name, tap in taps.items():
        expected = torch.bool if name == "mask" else torch.float32 if name.endswith(wide) else torch.bfloat16
        assert tap.dtype == expected, name


def test_annotated_shapes_hold_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchref"]:
        monkeypatch.delitem(sys.modules, name)
    shaped = ["torchref.ops", "torchref.decoder", "torchref.gpt2", "torchref.llama", "torchref.generate"]
    with install_import_hook(shaped, "beartype.beartype"):
        checked = importlib.import_module("torchref")
    ids, mask = left_padded((5, 3))
    for case in ("gpt2", "llama"):
        checked.greedy(checked.build(CASES[case].to_dict()), ids, 3, attention_mask=mask)
    with pytest.raises(TypeCheckError):
        checked.ops.rope(torch.zeros(1, 2, 3, 4), torch.zeros(1, 7, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_scores_are_exactly_the_smallest_float32(pair: Pair, dtype: torch.dtype) -> None:
    taps, _ = recorded(pair.ours(dtype), cached=False)
    hidden = taps["layers.0.attn.masked"].masked_select(~taps["mask"])
    assert (hidden == torch.finfo(torch.float32).min).all()
    assert len(hidden) == 2 * CASES_HEADS[type(pair.stock).__name__] * 21  # 7 * 6 / 2 pairs above the diagonal


CASES_HEADS = {
    "GPT2LMHeadModel": 4,
    "LlamaForCausalLM": 6,
    "Qwen2ForCausalLM": 6,
    "MistralForCausalLM": 6,
    "Qwen3ForCausalLM": 6,
}


def test_a_bfloat16_model_rounds_scores_and_logits_to_float32_and_the_rest_once(pair: Pair) -> None:
    config, vocab = vocabulary(pair)
    model = pair.ours(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        taps, inputs = recorded(model, cached=False)
        for op in vocab.ops(config):
            # In each of these, one rounding stands between the exact value and the tap.
            if not op.tap.endswith(("norm", "_rope", "scores", "weights", "logits")):
                continue
            given = [{**inputs, **taps}[name] for name in op.inputs]
            truth = exact.run_op(op.tap, [x.double() if x.is_floating_point() else x for x in given])
            error = (taps[op.tap].double() - truth).abs()
            if op.tap.endswith(("scores", "logits")):
                assert error.max() <= 16 * torch.finfo(torch.float32).eps * truth.abs().max(), op.tap
            else:
                unit = torch.finfo(torch.bfloat16).eps / 2
                slack = 16 * torch.finfo(torch.float32).eps * truth.abs().max()
                assert (error <= unit * truth.abs() + slack).all(), op.tap


# -- Folders ---------------------------------------------------------------------------


def test_a_folder_of_transformers_4_gives_the_same_model(pair: Pair, tmp_path: Path) -> None:
    raw = json.loads((pair.folder / "config.json").read_text())
    raw["torch_dtype"] = raw.pop("dtype")
    rope = raw.pop("rope_parameters", None)
    if rope:
        raw["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        raw["rope_scaling"] = None if rope["type"] == "default" else rope
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(pair.folder / "model.safetensors")
    ids = random_ids(1, 9)
    assert torch.equal(torchref.load(tmp_path)(ids), pair.ours()(ids))


def test_dtype_is_that_of_the_file_and_tied_heads_share_one_parameter(pair: Pair, tmp_path: Path) -> None:
    pair.in_dtype(torch.bfloat16).save_pretrained(tmp_path)
    model = torchref.load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    names = {name for name, _ in model.double().named_parameters()}
    assert ("lm_head.weight" in names) != pair.stock.config.tie_word_embeddings


def test_a_sharded_folder_gives_the_same_model(pair: Pair, tmp_path: Path) -> None:
    pair.stock.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = random_ids(1, 9)
    assert torch.equal(torchref.load(tmp_path)(ids), pair.ours()(ids))


def test_a_fresh_model_scores_near_the_uniform_loss() -> None:
    torch.manual_seed(0)
    for case in ("gpt2", "llama"):
        logits = torchref.build(CASES[case].to_dict())(random_ids(4, 40))
        loss = F.cross_entropy(logits.flatten(0, 1), random_ids(4, 40, seed=1).flatten())
        assert abs(loss.item() - math.log(131)) < 0.3


# -- Arguments -------------------------------------------------------------------------


def test_unusable_arguments_are_refused() -> None:
    model = torchref.build(CASES["gpt2"].to_dict())
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="token ids reach from 131 to 131; the vocabulary has 131"):
        model(torch.full((1, 1), 131))
    with pytest.raises(ValueError, match="position 640 is past the last of 640 learned positions"):
        model(ids, positions=ids * 0 + 640)
    with pytest.raises(ValueError, match="segments exclude attention_mask and past"):
        model(ids, segments=ids, attention_mask=ids)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 3\], ids \[1, 4\]"):
        model(ids, attention_mask=ids[:, :3])
    with pytest.raises(ValueError, match="pad prompts on the left"):
        torchref.greedy(model, ids, 1, attention_mask=torch.tensor([[1, 1, 1, 0]]))
