import dataclasses
import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from bare_runs import bare

from jaxgpt import checkpoint, cli, gates, manifest, run_log, train, training_loop, transformer
from jaxgpt.chat import CHATML
from jaxgpt.data.encode import encode
from jaxgpt.data.instructions import MICRO, generate
from jaxgpt.data.shards import TokenShards, sealed
from jaxgpt.errors import InputError
from jaxgpt.run_lock import RunLock
from jaxgpt.settings import ModelSettings, PretrainSettings, SFTSettings, TrainSettings
from jaxgpt.step_folder import steps
from jaxgpt.tokenizer import Tokenizer

MODEL = ModelSettings(preset="llama-tiny", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, dropout=0.1)
TRAIN = TrainSettings(
    steps=8, batch_size=2, accumulate=2, sequence_length=64, warmup_steps=2, save_every=3, eval_every=4, eval_batches=2
)
PATIENT = {"eval_every": 1, "patience": 2, "warmup_steps": 4}
"""Steps are compiled for their settings: tests that can share them."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n" * 4 for i in range(60)]
    texts += [" ".join(messages[0]["content"] for messages in generate(8, seed)) for seed in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    alphabet = "".join(map(chr, range(32, 127))) + "\n"
    tokenizer = Tokenizer.create("char", template=CHATML, corpus=[*texts, alphabet])
    encode(folder / "text.jsonl", folder / "shards", tokenizer, template=CHATML, val_fraction=0.2)
    return folder / "shards"


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps."""
    out = tmp_path_factory.mktemp("runs") / "base"
    result = train.pretrain(settings(data, out))
    assert (result.step, result.stop_reason) == (8, "steps")
    return out


@pytest.fixture(autouse=True)
def _other_runs_are_bare(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare(monkeypatch)


def settings(data: Path, out: Path, **changes: object) -> PretrainSettings:
    chosen = dataclasses.replace(TRAIN, **changes)
    return PretrainSettings(data=str(data), out=str(out), model=MODEL, train=chosen)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGTERM that arrives while `step` runs."""
    plain = training_loop.Loop._step

    def interrupted(self: training_loop.Loop, number: int, pace: object) -> None:
        plain(self, number, pace)
        if number + 1 == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training_loop.Loop, "_step", interrupted)


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in run_log.read(out) if record["event"] == "train"]


def test_resume_after_a_stop_in_the_middle_is_bit_for_bit(data, base, tmp_path, monkeypatch):
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train.pretrain(settings(data, out)).stop_reason == "signal"
    assert steps(out)[-1] == 5
    result = train.pretrain(PretrainSettings(out=str(out), resume=True))
    assert (result.step, result.stop_reason) == (8, "steps")
    whole, resumed = (checkpoint.load(folder, train=True) for folder in (base, out))
    for name, array in whole.params.items():
        assert np.array_equal(array, resumed.params[name]), name
    for name, array in whole.train.items():
        assert np.array_equal(array, resumed.train[name]), name
    assert whole.train_json["position"] == resumed.train_json["position"]
    assert losses(out) == losses(base), "each step once, with the same loss"


def with_other(split: str, folder: Path) -> None:
    """The dataset with other tokens in a split, as whole as before."""
    index = json.loads((folder / "index.json").read_text())
    shard = folder / f"{split}-00000.bin"
    shard.write_bytes(shard.read_bytes()[2:] + shard.read_bytes()[:2])
    index["splits"][split]["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(sealed(index)))


def refused_to_resume(command: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert cli.main([command, "--out", str(out), "--resume"]) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "nothing was written"
    return capsys.readouterr().err


def of_before_held_out_data_were_noted(step: Path) -> None:
    saved = json.loads((step / "train.json").read_text())
    del saved["origin"]["held_out"]
    (step / "train.json").write_text(json.dumps(saved))
    manifest.seal(step)


@pytest.mark.parametrize(("split", "what"), [("train", "dataset"), ("val", "held-out")])
def test_resume_refuses_other_data(data, tmp_path, monkeypatch, capsys, split, what):
    out, copied = tmp_path / "run", tmp_path / "data"
    shutil.copytree(data, copied)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train.pretrain(settings(copied, out))
    with_other(split, copied)
    told = refused_to_resume("pretrain", out, capsys)
    assert re.fullmatch(rf"jaxgpt: {what} fingerprint differs from checkpoint \([^\n]+ tokens\)[^\n]*\n", told), told
    of_before_held_out_data_were_noted(out / "step-00000003")
    assert cli.main(["pretrain", "--out", str(out), "--resume"]) == (0 if split == "val" else 2)


def test_resume_of_sft_refuses_another_validation_file(base, tmp_path, monkeypatch, capsys):
    rows = [json.dumps({"messages": messages}) + "\n" for messages in MICRO]
    chats, validation, out = tmp_path / "chats.jsonl", tmp_path / "validation.jsonl", tmp_path / "sft"
    chats.write_text("".join(rows))
    validation.write_text("".join(rows[:6]))
    chosen = dataclasses.replace(TRAIN, steps=3, epochs=10, accept_loss=True)
    given = {"model": str(base), "data": str(chats), "validation": str(validation), "out": str(out)}
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train.sft(SFTSettings(**given, train=chosen))
    validation.write_text("".join(rows[:5]))
    told = refused_to_resume("sft", out, capsys)
    expected = "held-out fingerprint differs from checkpoint (5 vs 6 rows); resume with the same data"
    assert told == f"jaxgpt: {expected}\n"
    validation.write_text("".join(rows[:6]))
    assert cli.main(["sft", "--out", str(out), "--resume"]) == 0


def test_a_new_run_never_overwrites_an_old_one(data, base):
    with pytest.raises(InputError, match="already holds a run; pass --resume"):
        train.pretrain(settings(data, base))


def test_a_run_whose_steps_lost_their_manifests_is_neither_gone_on_with_nor_trained_over(data, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "step-00000300").mkdir(parents=True)
    (out / "log.jsonl").write_text("{}\n")
    for words in (["--data", str(data)], ["--resume"]):
        assert cli.main(["pretrain", "--out", str(out), *words]) == 2
        assert capsys.readouterr().err == (
            f"jaxgpt: {out} holds no step to go on from, but step-00000300 without manifest.json: damaged; restore or "
            "move away what is left of a run, or give another --out\n"
        )
    assert (out / "log.jsonl").read_text() == "{}\n"


def test_an_exhausted_corpus_is_refused_before_the_first_step(data, tmp_path):
    with pytest.raises(InputError, match=r"corpus ended at step \d+ of 5000; pass --epochs to repeat"):
        train.pretrain(settings(data, tmp_path / "out", steps=5000))
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_asked_for_and_missing_is_an_error(data, tmp_path):
    with pytest.raises(InputError, match="--device gpu requested, JAX sees only CPU; install jaxgpt"):
        train.pretrain(settings(data, tmp_path / "out", device="gpu"))
    assert not (tmp_path / "out").exists()


def test_a_sequence_longer_than_the_context_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="sequence_length 512 exceeds the model's context of 256"):
        train.pretrain(settings(data, tmp_path / "out", sequence_length=512))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "sample_prompt is 0 tokens, expected 1–255; give another"),
        ("x" * 256, "sample_prompt is 256 tokens, expected 1–255; give another"),
        ("\udcff", r"input is not valid Unicode at character 0 \(U\+DCFF\)"),
    ],
)
def test_a_sample_prompt_that_cannot_be_continued_is_refused_before_the_run(data, tmp_path, prompt, message):
    with pytest.raises(InputError, match=message):
        train.pretrain(settings(data, tmp_path / "out", sample_every=2, sample_prompt=prompt))
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_memory_here_holds_is_refused(data, tmp_path):
    huge = dataclasses.replace(settings(data, tmp_path / "out"), model=ModelSettings(num_hidden_layers=10**9))
    with pytest.raises(InputError, match=r"training [\d,]+ parameters needs at least [\d.]+ TB"):
        train.pretrain(huge)
    assert not (tmp_path / "out").exists()


def test_a_seed_is_32_bits():
    with pytest.raises(InputError, match="seed must be in 0–4294967295, got 4294967296"):
        TrainSettings(seed=2**32)


def test_a_model_without_heads_is_refused():
    with pytest.raises(InputError, match="num_attention_heads must be a positive integer below 2"):
        train.model_config(ModelSettings(num_attention_heads=0), 320)


def test_three_updates_in_a_row_that_are_not_finite_stop_the_run_with_the_batch_saved(
    data, tmp_path, monkeypatch, capsys
):
    plain = training_loop.train_step

    def poisoned(config, settings, dtype, state, batches, layout):
        if int(state.step) >= 4:
            batches = {**batches, "ids": batches["ids"] + config.vocab_size}
        return plain(config, settings, dtype, state, batches, layout=layout)

    monkeypatch.setattr(training_loop, "train_step", poisoned)
    out = tmp_path / "out"
    last = r"loss NaN at step 7; update skipped \(3 of 3\); batch saved as .*00000007.npz"
    with pytest.raises(InputError, match=last):
        train.pretrain(settings(data, out))
    told = [line for line in capsys.readouterr().err.splitlines() if "NaN" in line]
    assert told == [f"loss NaN at step {n + 4}; update skipped ({n} of 3); batch saved" for n in (1, 2, 3)]
    assert steps(out) == [3, 6], "what was saved before stands"
    assert np.load(out / "bad-batch-00000007.npz")["ids"].shape == (2, 2, 64)
    assert [record["step"] for record in run_log.read(out) if record["event"] == "skipped"] == [5, 6, 7]


def test_the_first_loss_of_a_fresh_model_must_be_near_ln_vocab(data, tmp_path, monkeypatch):
    config = train.model_config(MODEL, 448)
    params = transformer.init(config, 0)
    assert abs(gates.check_fresh(config, params, "float32") - gates.uniform(config)) <= 0.3
    louder = {name: 30 * array for name, array in params.items()}
    with pytest.raises(InputError, match="a fresh model scores"):
        gates.check_fresh(config, louder, "float32")
    expected = gates.uniform(config)
    for loss in (expected + 0.31, expected - 1.01, float("nan")):
        with pytest.raises(InputError, match=r"first loss is .*, expected between"):
            gates.check_first_batch(config, loss)
    gates.check_first_batch(config, expected - 0.9)


def test_a_loaded_model_worse_than_a_guess_points_to_the_oracle(data, base, tmp_path):
    config = checkpoint.load(base).config
    bound = gates.uniform(config)
    with pytest.raises(InputError, match=r"worse than a uniform guess .*python -m oracle compare"):
        gates.check_loaded(config, bound + 0.01, accept=True)
    with pytest.raises(InputError, match="--accept-loss"):
        gates.check_loaded(config, 0.9 * bound, accept=False)
    gates.check_loaded(config, 0.9 * bound, accept=True)


def test_early_stopping_says_so_and_never_fires_in_warm_up(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_loop, "evaluate", lambda *_: 3.0)
    result = train.pretrain(settings(data, tmp_path / "out", **PATIENT))
    assert (result.stop_reason, result.step) == ("patience", 6)
    assert "stopping early: no better validation loss in 2 validations" in capsys.readouterr().err


def test_a_validation_that_is_not_finite_is_never_the_best_and_does_not_keep_the_run_from_saving(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_loop, "evaluate", lambda *_: float("nan"))
    result = train.pretrain(settings(data, tmp_path / "out", **PATIENT))
    assert (result.validation_loss, result.best_validation_loss) == (None, None)
    assert steps(tmp_path / "out") == [3, 6]


def test_the_log_has_what_doctor_needs_and_the_loss_is_drawn(base):
    records = run_log.read(base)
    start = records[0]
    for key in ("device", "backend", "parameters", "planned_tokens_per_parameter", "epochs_planned", "versions"):
        assert key in start
    step = next(record for record in records if record["event"] == "train")
    for key in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "epoch", "tokens"):
        assert key in step
    assert records[-1]["event"] == "end"
    assert records[-1]["reason"] == "steps"
    assert (base / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((base / "tensorboard").iterdir())


def test_sft_starts_from_a_checkpoint_and_changes_the_stage_not_the_tokenizer(base, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in MICRO))
    chosen = dataclasses.replace(TRAIN, steps=2, epochs=10, accept_loss=True)
    train.sft(SFTSettings(model=str(base), data=str(chats), out=str(tmp_path / "sft"), train=chosen))
    tuned, source = checkpoint.load(tmp_path / "sft"), checkpoint.load(base)
    assert (source.stage, tuned.stage) == ("base", "sft")
    assert tuned.tokenizer.state() == source.tokenizer.state()
    assert tuned.template == CHATML
    assert tuned.provenance["parent"] == str(base)
    assert not np.array_equal(tuned.params["layers.0.attn.q.kernel"], source.params["layers.0.attn.q.kernel"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_sixteen_episodes_are_learned_by_heart_and_answered_greedily(data, tmp_path):
    import jaxgpt

    base, chats = tmp_path / "base", tmp_path / "chats.jsonl"
    model = ModelSettings(preset="llama-tiny", hidden_size=64, num_hidden_layers=2)
    fast = TrainSettings(steps=20, batch_size=4, sequence_length=64, learning_rate=3e-3, warmup_steps=4, eval_every=0)
    train.pretrain(PretrainSettings(data=str(data), out=str(base), model=model, train=fast))
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in MICRO))
    longer = dataclasses.replace(fast, steps=300, epochs=500, accept_loss=True, save_every=0, warmup_steps=20)
    train.sft(SFTSettings(model=str(base), data=str(chats), out=str(tmp_path / "sft"), train=longer))
    lm = jaxgpt.load(str(tmp_path / "sft"))
    replies = lm.generate([messages[:-1] for messages in MICRO], max_new_tokens=48)
    assert [reply.text for reply in replies] == [messages[-1]["content"] for messages in MICRO]
    assert {reply.stop_reason for reply in replies} == {"stop_token"}


def test_model_overrides_keep_the_shape_consistent():
    config = train.model_config(ModelSettings(preset="gpt2", hidden_size=96, num_attention_heads=6), 64)
    assert (config.head_dim, config.intermediate_size, config.num_key_value_heads) == (16, 384, 6)
    with pytest.raises(InputError, match="hidden_size 100 is not a multiple of num_attention_heads 12"):
        train.model_config(ModelSettings(preset="gpt2", hidden_size=100), 64)


def test_the_device_in_use_is_said(data, base, capsys, tmp_path):
    train.pretrain(settings(data, tmp_path / "out"))
    assert f"float32 on {jax.devices()[0].device_kind}" in capsys.readouterr().err


def test_shards_carry_tokenizer_and_template(data):
    assert TokenShards(data).tokenizer().special("end").text == "<|im_end|>"
    assert TokenShards(data).template() == CHATML


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_goes_on(data, tmp_path):
    out = tmp_path / "out"
    with RunLock(out) as lock:
        lock.acquire()
        with pytest.raises(InputError, match=r"writing into .*out; wait for it, or choose another folder"):
            train.pretrain(settings(data, out))
        assert not list(out.iterdir())
    assert train.pretrain(settings(data, out)).step == 8


def test_a_flipped_bit_in_a_shard_stops_the_run_and_names_the_file(data, tmp_path):
    copied = tmp_path / "data"
    copied.mkdir()
    for file in data.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    shard = copied / "train-00000.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(InputError, match=r"train-00000.bin fails SHA-256; encode the text into a new folder"):
        train.pretrain(settings(copied, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
