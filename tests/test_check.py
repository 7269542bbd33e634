import dataclasses
import itertools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import chat, checkpoint, generate, model, ops, sampling
from jaxgpt import check as check_module
from jaxgpt.chat import CHATML
from jaxgpt.check import CheckLine, check, check_model
from jaxgpt.checks import parity, tokens, training
from jaxgpt.checks.greedy import cache_dtype_test, greedy_is_greedy_test
from jaxgpt.checks.parity import Measured, forward_parity_test, kv_cache_parity_steps_test
from jaxgpt.checks.tokens import special_token_id_stability_test, stop_token_test, tokenizer_self_test
from jaxgpt.checks.training import loss_mask_test, memorize, single_batch_memorize_test
from jaxgpt.data.batches import EpisodeRows
from jaxgpt.lm import LM
from jaxgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TOKENIZER = Tokenizer.create("char", template=CHATML, corpus=["Say OK. Repeat: What is 5+7 Upper case: moon List"])
CONFIGS = {"gpt2": conftest.GPT2, "llama": conftest.LLAMA}
fresh = itertools.count(1)


def tiny(family: str = "gpt2", *, dtype: str = "float32", seen: bool = True, **changes) -> LM:
    """A one-layer model of random weights; `seen=False`: one that no function was compiled for."""
    changes |= {"vocab_size": TOKENIZER.model_vocab_size, "num_hidden_layers": 1}
    if not seen:
        # A field that changes no output, but is part of what compiled functions are kept under.
        changes["initializer_range"] = 0.02 + next(fresh) / 1024
    config = dataclasses.replace(CONFIGS[family], **changes)
    return LM(
        SimpleNamespace(
            config=config,
            tokenizer=TOKENIZER,
            template=CHATML,
            stage="base",
            compute_dtype=dtype,
            params=conftest.random_params(config),
            eos_token_ids=(),
        )
    )


@pytest.fixture(scope="module")
def taught() -> LM:
    """A model that learned its special tokens from conversations."""
    lm, loss, _ = memorize(tiny(), [chat.render(m, TOKENIZER, CHATML) for m in training.MEMORIZED])
    assert loss < training.LEARNED
    lm.stage = "sft"
    return lm


def failed(line: CheckLine, *words: str) -> CheckLine:
    assert line.status == "FAIL", line
    for word in words:
        assert word in line.detail, line
    return line


# -- Clean models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param("gpt2", "float32", marks=pytest.mark.exhaustive),
        ("llama", "bfloat16"),
        pytest.param("llama", "float32", marks=pytest.mark.exhaustive),
        pytest.param("gpt2", "bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_a_clean_model_passes_every_check(family: str, dtype: str):
    lines: list[CheckLine] = []
    report = check_model(tiny(family, dtype=dtype), memorize=False, report=lines.append)
    assert report.passed, report.failures
    assert tuple(lines) == report.lines
    assert [line.status for line in lines] == ["PASS"] * 8 + ["SKIP"] * 2
    assert "edge at 96" in lines[3].detail


def test_a_trained_model_answers_what_it_memorised_and_keeps_its_special_ids(taught: LM):
    line = single_batch_memorize_test(taught)
    assert line.status == "PASS", line
    assert "8/8 answered greedily" in line.detail
    line = special_token_id_stability_test(taught)
    assert line.status == "PASS", line
    assert "taught" in line.detail


def test_a_model_without_a_tokenizer_skips_what_needs_one_and_still_memorises():
    lm = tiny("llama")
    lm.tokenizer = lm.template = None
    for test in (tokenizer_self_test, special_token_id_stability_test, loss_mask_test):
        assert test(lm).status == "SKIP"
    line = single_batch_memorize_test(lm)
    assert line.status == "PASS", line
    assert "4/4" in line.detail


# -- The cache ---------------------------------------------------------------------------


def plant_off_by_one(monkeypatch: pytest.MonkeyPatch, when) -> None:
    """Positions and slots one too far in the forwards of T tokens for which `when(T)`."""
    original = model.cached_inputs

    def shifted(config, ids, counts, cache):
        values = original(config, ids, counts, cache)
        if when(ids.shape[1]):
            values |= {name: values[name] + 1 for name in ("positions", "slots")}
        return values

    monkeypatch.setattr(model, "cached_inputs", shifted)


def test_a_cache_position_off_by_one_is_found_in_the_cache_update(monkeypatch: pytest.MonkeyPatch):
    plant_off_by_one(monkeypatch, lambda T: T == 1)
    lm = tiny(seen=False)
    line = failed(forward_parity_test(lm), "cached decode at step 14", "the cache update is wrong", "|Δ| max", "mean")
    assert "the measured noise of" in line.detail
    line = failed(kv_cache_parity_steps_test(lm), "cached generation at step 1", "the cache update is wrong")
    assert line.detail.count("'") >= 2, "both ids come with their strings"


@pytest.mark.exhaustive  # as the position above, by the same comparison
def test_a_cache_that_stores_one_slot_too_far_is_found(monkeypatch: pytest.MonkeyPatch):
    store = ops.store

    def shifted(config, p, new, buffer, slots):
        return store(config, p, new, buffer, slots + (new.shape[2] == 1))

    monkeypatch.setitem(ops.FUNCTIONS, "store", shifted)
    failed(forward_parity_test(tiny("llama", seen=False)), "cached decode", "the cache update is wrong")


def test_a_prefill_off_by_one_is_found_in_the_prefill(monkeypatch: pytest.MonkeyPatch):
    plant_off_by_one(monkeypatch, lambda T: T > 1)
    lm = tiny(seen=False)
    failed(forward_parity_test(lm), "cached prefill at step 0", "prefill is wrong")
    failed(kv_cache_parity_steps_test(lm), "cached generation at step 0", "prefill is wrong")


@pytest.mark.parametrize("computed", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_a_cache_that_is_wrong_only_at_the_edge_of_the_context_is_found(computed, monkeypatch: pytest.MonkeyPatch):
    original = model.cached_inputs

    def short(config, ids, counts, cache):
        values = original(config, ids, counts, cache)
        limit = config.max_position_embeddings
        if ids.shape[1] == 1:
            values["positions"] = jnp.minimum(values["positions"], limit - 2)
        return values

    if not computed:
        monkeypatch.setattr(parity, "AFFORDABLE_SCORES", 0)
        line = kv_cache_parity_steps_test(tiny())
        assert line.status == "PASS", line
        assert "after a random cache" in line.detail
    monkeypatch.setattr(model, "cached_inputs", short)
    failed(kv_cache_parity_steps_test(tiny(seen=False)), "context's edge at step 16", "wrong at the context's edge")


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
def test_a_cache_of_a_lower_dtype_than_the_weights_is_found():
    lm = tiny()
    lm.generator.dtype = jnp.bfloat16
    failed(cache_dtype_test(lm), "the cache is bfloat16, compute is float32")


def test_parity_finds_a_cache_that_rounds(monkeypatch: pytest.MonkeyPatch):
    store = ops.store

    def rounding(config, p, new, buffer, slots):
        return store(config, p, new.astype(jnp.bfloat16).astype(new.dtype), buffer, slots)

    monkeypatch.setitem(ops.FUNCTIONS, "store", rounding)
    failed(kv_cache_parity_steps_test(tiny(seen=False)), "cached generation at step 0", "prefill is wrong")


def test_a_different_id_within_the_noise_is_a_tie_and_beyond_it_a_failure():
    lm = tiny()
    reference = np.zeros((1, 2, lm.config.vocab_size), np.float32)
    reference[0, :, 65] = 1.0
    reference[0, 1, 66] = 1.0 - 1e-6
    other = reference.copy()
    other[0, 1, 66] = 1.0 + 1e-6
    path = Measured("cached generation", other, reference, noise=1e-6)
    line = parity._verdict("test", lm, [path], ["wrong"])
    assert line.status == "TIE"
    assert "step 1, row 0: 66" in line.detail
    assert "evaluation 65" in line.detail
    exact = dataclasses.replace(path, noise=1e-9)
    failed(parity._verdict("test", lm, [exact], ["the cache update is wrong"]), "the cache update is wrong")
    broken = dataclasses.replace(path, logits=np.full_like(other, np.nan))
    failed(parity._verdict("test", lm, [broken], ["wrong"]), "step 0")


# -- Greedy ------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, sample: Callable[..., jax.Array]) -> None:
    """Draw ids otherwise, in programs that are traced from now on."""
    draw = generate.draw.__wrapped__
    monkeypatch.setattr(sampling, "sample", sample)
    # JAX keeps what it traced by function: another one.
    monkeypatch.setattr(generate, "draw", jax.jit(lambda *given: draw(*given)))


@pytest.mark.exhaustive  # as the draw below, by the same comparison
def test_a_penalty_at_temperature_0_is_found(monkeypatch: pytest.MonkeyPatch):
    original = sampling.sample
    prompts, _ = parity.short_prompts(tiny())
    seen = sorted({0, 1, *itertools.chain(*prompts)})

    def penalised(logits, sampleable, knobs, positions):
        had = logits[:, jnp.array(seen)]
        lower = jnp.where(had > 0, had / 1.3, had * 1.3)
        return original(logits.at[:, jnp.array(seen)].set(lower), sampleable, knobs, positions)

    plant(monkeypatch, penalised)
    failed(greedy_is_greedy_test(tiny(seen=False)), "temperature 0 is not greedy")


def test_a_penalty_that_only_repeated_ids_meet_is_found(monkeypatch: pytest.MonkeyPatch):
    original = sampling.sample

    def penalised(logits, sampleable, knobs, positions):
        # Only the id that the forced prompt repeats, and only where it is a hair ahead.
        close = jnp.abs(logits[:, 1] - logits[:, 2]) < 0.01
        return original(logits.at[:, 1].add(jnp.where(close, -0.1, 0.0)), sampleable, knobs, positions)

    plant(monkeypatch, penalised)
    failed(greedy_is_greedy_test(tiny(seen=False)), "temperature 0 is not greedy", "repetition penalty")


def test_a_draw_at_temperature_0_is_found(monkeypatch: pytest.MonkeyPatch):
    original = sampling.sample

    def never_greedy(logits, sampleable, knobs, positions):
        return original(logits, sampleable, knobs._replace(temperature=jnp.maximum(knobs.temperature, 0.7)), positions)

    plant(monkeypatch, never_greedy)
    failed(greedy_is_greedy_test(tiny(seen=False)), "temperature 0 is not greedy")


def test_a_padded_row_that_is_sampled_is_found_and_one_that_would_win_is_reported():
    lm = tiny()
    assert lm.real_ids < lm.config.vocab_size
    line = greedy_is_greedy_test(lm)
    assert line.status == "PASS", line
    assert "a padded row would have won" in line.detail
    everything = jnp.ones_like(lm.generator.vocabulary.sampleable)
    lm.generator.vocabulary = lm.generator.vocabulary._replace(sampleable=everything)
    failed(greedy_is_greedy_test(lm))


# -- Special tokens ----------------------------------------------------------------------


def permuted(names: dict[str, str], *, both: bool) -> Tokenizer:
    """The state with ids exchanged: in the map by string only, or in both maps."""
    state = json.loads(json.dumps(TOKENIZER.state()))
    for key in ("special_token_ids", "special_name_ids")[: 1 + both]:
        ids = state[key]
        a, b = names.values() if key == "special_token_ids" else names.keys()
        ids[a], ids[b] = ids[b], ids[a]
    return Tokenizer.from_state(state, TOKENIZER.model_vocab_size)


MARKERS = {"start": "<|im_start|>", "end": "<|im_end|>"}


def test_special_ids_that_contradict_the_template_are_found():
    lm = tiny()
    lm.tokenizer = permuted(MARKERS, both=False)
    failed(special_token_id_stability_test(lm), "special ids are permuted", "template chatml means <|im_start|>")
    failed(stop_token_test(lm, lm.tokenizer.stop_ids), "ends a turn with <|im_end|>")


def test_consistently_permuted_special_ids_are_found_by_what_the_model_was_taught(taught: LM):
    lm = LM(
        SimpleNamespace(
            config=taught.config,
            tokenizer=permuted(MARKERS, both=True),
            template=CHATML,
            stage="sft",
            compute_dtype="float32",
            params=taught.params,
            eos_token_ids=(),
        )
    )
    line = failed(special_token_id_stability_test(lm), "special ids are permuted", "<|im_start|>", "<|im_end|>")
    assert "exchanged, the loss of 8 short conversations falls" in line.detail


def test_a_model_that_was_taught_nothing_is_not_said_to_have_permuted_ids():
    lm = tiny(tie_word_embeddings=False)
    lm.stage = "sft"
    # Logits that depend on no input: all 0, but -10 for the end token.
    lm.params |= {"final_norm.weight": jnp.zeros(36), "final_norm.bias": jnp.zeros(36).at[0].set(1.0)}
    end = TOKENIZER.special("end").id
    lm.params["head.weight"] = jnp.zeros_like(lm.params["head.weight"]).at[end, 0].set(-10.0)
    line = special_token_id_stability_test(lm)
    assert line.status == "PASS", line


def test_user_text_that_becomes_a_control_token_is_found(monkeypatch: pytest.MonkeyPatch):
    lm = tiny()
    assert tokenizer_self_test(lm).status == "PASS"
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, *, specials=False: encode(self, text, specials=True))
    failed(tokenizer_self_test(lm), "gives the control token", "<|endoftext|>")


def test_a_special_token_that_is_not_one_id_is_found(monkeypatch: pytest.MonkeyPatch):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, *, specials=False: encode(self, text))
    failed(tokenizer_self_test(tiny()), "<|endoftext|> encodes to", "expected its one id")


# -- Stop tokens -------------------------------------------------------------------------


def test_a_hard_coded_stop_id_is_found():
    lm = tiny()
    assert stop_token_test(lm).status == "PASS"
    lm.stop_ids = (42,)
    line = failed(stop_token_test(lm), "the loaded model stops at 42", "<|im_end|>", "hard-coded or moved")
    assert "<|endoftext|>" in line.detail
    lm = tiny()
    failed(stop_token_test(lm, eos_token_ids=(65,)), "stop id 65", "is no special token", "hard-coded or moved")


def test_a_decode_loop_that_does_not_stop_is_found(monkeypatch: pytest.MonkeyPatch):
    lm = tiny()
    vocabulary = lm.generator.vocabulary
    lm.generator.vocabulary = vocabulary._replace(stops=jnp.zeros_like(vocabulary.stops))
    failed(stop_token_test(lm), "the decode loop stops at nothing")
    # The ids are right, but the loop heeds none of them.
    monkeypatch.setattr(tokens, "_stop_id_problems", lambda lm, wanted: ())
    failed(stop_token_test(lm), "generation goes on")


# -- Training ----------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, -1])
def test_a_loss_mask_shifted_by_one_is_found(shift: int, monkeypatch: pytest.MonkeyPatch):
    lm = tiny()
    assert loss_mask_test(lm).status == "PASS"
    fill = EpisodeRows.fill

    def shifted(self, row, batch, b):
        fill(self, row, batch, b)
        n = int((batch["segments"][b] > 0).sum())
        batch["mask"][b, :n] = np.roll(batch["mask"][b, :n], shift)
        following = np.append(batch["ids"][b, 1:], 0)
        batch["targets"][b] = np.where(batch["mask"][b] > 0, following, 0)

    monkeypatch.setattr(EpisodeRows, "fill", shifted)
    line = failed(loss_mask_test(lm), f"the loss mask is shifted by {shift:+d} against the targets")
    assert "expected" in line.detail


def test_shifted_targets_are_found(monkeypatch: pytest.MonkeyPatch):
    fill = EpisodeRows.fill

    def shifted(self, row, batch, b):
        fill(self, row, batch, b)
        batch["targets"][b] = np.where(batch["mask"][b] > 0, batch["ids"][b], 0)

    monkeypatch.setattr(EpisodeRows, "fill", shifted)
    failed(loss_mask_test(tiny()), "the targets are shifted", "the next token is")


def test_a_loss_mask_that_is_rendered_wrongly_is_found(monkeypatch: pytest.MonkeyPatch):
    render = chat.render

    def without_end(messages, tokenizer, template, **kwargs):
        rendered = render(messages, tokenizer, template, **kwargs)
        end = tokenizer.special(template.end).id
        mask = [on * (id != end) for id, on in zip(rendered.ids, rendered.mask, strict=True)]
        return chat.Rendered(rendered.ids, mask)

    monkeypatch.setattr(chat, "render", without_end)
    failed(loss_mask_test(tiny()), "the last trained token is", "expected <|im_end|>", "wrong as rendered")


def test_training_that_does_not_come_out_of_generation_is_found(taught: LM, monkeypatch: pytest.MonkeyPatch):
    deaf = LM.__new__(LM)
    deaf.__dict__.update(taught.__dict__)
    deaf.generator = parity.endless(taught, 1, 1).generator
    monkeypatch.setattr(training, "memorize", lambda lm, episodes: (deaf, 0.01, 100))
    deaf.stop_ids = ()
    failed(single_batch_memorize_test(taught), "/8 answered greedily", "'Say OK.' gave", "does not come out")


def test_training_that_does_not_learn_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "memorize", lambda lm, episodes: (lm, 3.2, 300))
    failed(single_batch_memorize_test(tiny()), "loss 3.200 after 300 steps", "does not learn")


# -- The run -----------------------------------------------------------------------------


def test_the_run_stops_at_the_first_failure_unless_told_to_go_on():
    lm = tiny()
    lm.tokenizer = permuted(MARKERS, both=False)
    lm.stop_ids = (42,)
    quick = (tokenizer_self_test, special_token_id_stability_test, loss_mask_test, stop_token_test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_module, "_tests", lambda *given: quick)
        first = check_model(lm, report=lambda line: None)
        everything = check_model(lm, all=True, report=lambda line: None)
    assert [line.status for line in first.lines] == ["PASS", "FAIL"]
    assert len(everything.lines) == 4
    assert everything.lines[-1].status == "FAIL"
    assert first.exit_code == everything.exit_code == 1
    assert "permuted" in first.to_dict()["cause"]


def test_a_model_that_gives_nan_fails_and_says_so():
    lm = tiny()
    lm.params = {name: array * jnp.nan for name, array in lm.params.items()}
    lm.generator.params = lm.params
    report = check_model(lm, all=True, memorize=False, report=lambda line: None)
    assert not report.passed
    assert any("NaN" in line.detail for line in report.failures), report.failures


def test_memorisation_runs_by_itself_only_for_small_models(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_module, "single_batch_memorize_test", lambda lm: CheckLine("ran", "PASS", ""))
    lm = tiny()
    assert check_module._memorize(lm, None).name == "ran"
    monkeypatch.setattr(check_module, "MEMORIZE_UNDER", 1000)
    assert check_module._memorize(lm, True).name == "ran"
    skipped = check_module._memorize(lm, None)
    assert skipped.status == "SKIP"
    assert "--memorize" in skipped.detail
    assert check_module._memorize(lm, False).status == "SKIP"


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lm = tiny()
    contents = checkpoint.Contents(
        config=lm.config,
        params=lm.params,
        stage="base",
        compute_dtype="float32",
        eos_token_ids=list(TOKENIZER.stop_ids),
        tokenizer=TOKENIZER,
        template=CHATML,
        provenance={},
    )
    checkpoint.save(tmp_path / "run", 1, contents).result()
    quick = (tokenizer_self_test, special_token_id_stability_test, loss_mask_test, stop_token_test)
    monkeypatch.setattr(check_module, "_tests", lambda *given: quick)
    return tmp_path / "run"


def test_check_reads_a_checkpoint_and_prints_what_it_is(saved: Path, capsys: pytest.CaptureFixture[str]):
    report = check(str(saved), device="cpu")
    assert report.exit_code == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(line) for line in report.lines]
    facts = {line.name: line.detail for line in report.lines if line.status == "INFO"}
    assert facts["model dtype"] == facts["compute dtype"] == "float32"
    assert facts["tokenizer"] == "char"
    assert facts["base_vocab_size"] == str(TOKENIZER.base_vocab_size)
    assert "<|im_end|>" in facts["stop tokens"]


def test_the_script_is_the_check(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    script = str(Path(__file__).parent.parent / "scripts" / "debug_inference_parity.py")
    monkeypatch.setattr(sys, "argv", [script, str(saved), "--all", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    monkeypatch.setattr(sys, "argv", [script, str(saved / "nothing")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("jaxgpt: ")
