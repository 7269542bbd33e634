"""Settings that make no sense get one line and exit code 2 from every verb, and nothing is written."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from conftest import LLAMA, random_params

from jaxgpt import checkpoint, cli, loss, train
from jaxgpt.chat import CHATML
from jaxgpt.checkpoint import Contents
from jaxgpt.data.encode import encode
from jaxgpt.settings import SFTSettings, TrainSettings
from jaxgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PRETRAIN = "pretrain --data data --out out --steps 2 --sequence-length 32 --batch-size 2"
SFT = "sft --model base --data chats.jsonl --out out --steps 2 --sequence-length 64 --batch-size 2"
ENCODE = "data encode text.jsonl --out out --tokenizer char"
INSPECT = "data inspect chats.jsonl --tokenizer char"
GENERATE = "generate base hello --max-new-tokens 2"
CHAT = "chat base hello --raw --max-new-tokens 2"
BENCH = "bench base --iterations 1 --max-tokens 4"

HOSTILE: dict[str, dict[str, str]] = {
    PRETRAIN: {
        "--steps 0": "steps must be at least 1, got 0",
        "--steps -5": "steps must be at least 1, got -5",
        "--steps 1e3": "--steps must be an integer, got '1e3'",
        "--steps 99999999999999999999": "corpus ended at step",
        "--batch-size 0": "batch_size must be at least 1, got 0",
        "--batch-size 2.5": "--batch-size must be an integer, got '2.5'",
        "--batch-size 100000000": "batch_size 100,000,000 is larger than the data, which is",
        "--accumulate 0": "accumulate must be at least 1, got 0",
        "--accumulate 99999999999": "corpus ended at step 0 of 2; pass --epochs to repeat",
        "--sequence-length 0": "sequence_length must be at least 1, got 0",
        "--sequence-length 99999999": "sequence_length 99999999 exceeds the model's context of 256",
        "--epochs -1": "epochs must be at least 1, got -1",
        "--learning-rate 0": "learning_rate must be positive, and one that float32 holds, got 0.0",
        "--learning-rate nan": "learning_rate must be positive, and one that float32 holds, got nan",
        "--learning-rate 1e300": "learning_rate must be positive, and one that float32 holds, got 1e+300",
        "--clip-norm 1e-300": "clip_norm must be positive, and one that float32 holds, got 1e-300",
        "--weight-decay 1e300": "weight_decay must be ≥ 0, and one that float32 holds, got 1e+300",
        "--beta1 1": "beta1 must be in [0, 1), got 1.0",
        "--warmup-steps -1": "warmup_steps must be ≥ 0, got -1",
        "--warmup-steps 51": "warmup_steps 51 is more than the run's 2 steps; lower it",
        "--decay-fraction nan": "decay_fraction must be in [0, 1], got nan",
        "--patience 3 --eval-every 0": "patience counts validations, and eval_every 0 makes none",
        "--seed -1": "seed must be in 0–4294967295, got -1",
        "--keep 0": "keep must be at least 1, got 0",
        "--max-position-embeddings 0": "max_position_embeddings must be a positive integer below 2^31, got 0",
        "--max-position-embeddings 16": "sequence_length 32 exceeds the model's context of 16",
        "--hidden-size -8": "hidden_size must be a positive integer below 2^31, got -8",
        "--num-attention-heads 3": "hidden_size 128 is not a multiple of num_attention_heads 3",
        "--num-key-value-heads 3": "num_attention_heads (4) must be a multiple of num_key_value_heads (3)",
        "--head-dim 7 --preset llama-tiny": "head_dim must be even for RoPE, got 7",
        "--dropout 1": "embd_pdrop must be in [0, 1), got 1.0",
        "--num-hidden-layers 1000000": "needs at least",
        "--init-from base --preset gpt2": "the model's shape and dropout are those of --init-from; drop --preset",
        "--init-from base --dropout 0.1": "the model's shape and dropout are those of --init-from; drop --dropout",
        "--out data": "--out data is the data's own folder; give another",
        "--out chats.jsonl": "--out chats.jsonl is a file; give a folder",
        "--data base": "base holds no index.json",
        "--device gpu": "--device gpu requested, JAX sees only CPU",
        "--compute-dtype int8": "--compute-dtype must be one of",
        "--dry-run --batch-size 0": "batch_size must be at least 1, got 0",
        "--dry-run --resume": "--resume goes on with the settings the run was started with",
    },
    SFT: {
        "--batch-size 500": "batch_size 500 is larger than the data, which is",
        "--no-pack --batch-size 13": "batch_size 13 is larger than the data, which is 12 rows of 64 tokens",
        "--sequence-length 4": "nothing to train on in chats.jsonl",
        "--sequence-length 9999": "sequence_length 9999 exceeds the model's context of 128",
        "--epochs 1 --steps 5000": "corpus ended at step",
        "--data data": "data is not a file",
        "--validation nowhere": "nowhere is not a file",
        "--model base --out base": "base already holds a run",
    },
    ENCODE: {
        "--val-fraction 1": "0 <= val_fraction < 1, got",
        "--val-fraction -0.1": "0 <= val_fraction < 1, got",
        "--val-fraction nan": "0 <= val_fraction < 1, got",
        "--shard-tokens 0": "expected shard_tokens >= 1",
        "--workers -4": "workers must be at least 1, got -4",
        "--model base": "--model brings its own tokenizer and template, got --tokenizer too",
        "--tokenizer-kind hex": "--tokenizer-kind hex is for files, got --tokenizer char",
        "--out text.jsonl": "text.jsonl",
    },
    INSPECT: {
        "--episodes -1": "episodes must be ≥ 0, got -1",
        "--sequence-length 0": "sequence_length must be at least 1, got 0",
    },
    GENERATE: {
        "--max-new-tokens 0": "max_new_tokens must be at least 1, got 0",
        "--max-new-tokens 99999999": "prompt is 5 tokens; limit 128 including 99,999,999 to generate",
        "--temperature nan": "temperature must be in 0–1,000,000, got nan",
        "--temperature inf": "temperature must be in 0–1,000,000, got inf",
        "--temperature 1e39": "temperature must be in 0–1,000,000, got 1e+39",
        "--top-k -1": "top_k must be ≥ 0, got -1",
        "--top-p nan": "top_p must be in (0, 1], got nan",
        "--seed 99999999999": "seed must be in 0–4294967295",
        "--stop ''": "a stop text is empty",
    },
    CHAT: {
        "--max-new-tokens -1": "max_new_tokens must be at least 1, got -1",
        "--num-samples 0": "num_samples must be at least 1, got 0",
        "--greedy --temperature 1": "--greedy and --temperature 1 contradict",
    },
    BENCH: {
        "--iterations -2": "iterations must be at least 1, got -2",
        "--max-tokens 1": "max_tokens must be at least 2, got 1",
        "--max-tokens 99999999999": "max_tokens 99,999,999,999 fills the context of 128",
        "--floor nan": "floor must be ≥ 0 tokens/s, got nan",
        "--floor -1": "floor must be ≥ 0 tokens/s, got -1.0",
    },
}
CASES = [(verb, flags, message) for verb, rows in HOSTILE.items() for flags, message in rows.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, chats and a checkpoint with which each verb would work."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [f"def f{i}(x):\n    return x * {i}\n" * 4 for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(12)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.create("char", template=CHATML, corpus=["".join(map(chr, range(32, 127))) + "\n"])
    encode(folder / "text.jsonl", folder / "data", tokenizer, template=CHATML, val_fraction=0.2)
    config = dataclasses.replace(LLAMA, vocab_size=tokenizer.model_vocab_size, max_position_embeddings=128)
    ids = list(tokenizer.stop_ids)
    contents = Contents(config, random_params(config), "base", "float32", ids, tokenizer, CHATML, {})
    checkpoint.save(folder / "base", 1, contents).result()
    return folder


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused means before any time was spent: no model computes, no step is compiled."""

    def ran(*_: object, **__: object) -> None:
        raise AssertionError("a model was run before the settings were refused")

    for place in ("generate.prefill", "generate.decode", "loss._batch_sum", "preflight.train_step"):
        monkeypatch.setattr(f"jaxgpt.{place}", ran)
    assert loss._batch_sum is ran


@pytest.mark.parametrize(("verb", "flags", "message"), CASES, ids=[f"{v.split()[0]} {f}" for v, f, _ in CASES])
def test_a_hostile_setting_is_refused_in_one_line(
    folder: Path,
    nothing_runs: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    flags: str,
    message: str,
):
    monkeypatch.chdir(folder)
    before = sorted(path for path in folder.rglob("*"))
    code = cli.main(shlex.split(f"{verb} {flags}"))
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1), printed.err
    assert printed.err.startswith("jaxgpt: ")
    assert message in printed.err
    assert sorted(path for path in folder.rglob("*")) == before


def test_a_batch_that_nobody_asked_for_is_as_large_as_the_data_also_when_resumed(folder):
    """Sixteen rows by default, and a lesson of twelve is no mistake."""
    asked = TrainSettings(steps=300, sequence_length=64, epochs=300)
    settings = SFTSettings(model=str(folder / "base"), data=str(folder / "chats.jsonl"), pack=False, train=asked)
    run = train._fine_tuning(settings)
    assert (run.settings.batch_size, run.batches.batch_size) == (12, 12)
    assert run.batches.total_batches == asked.steps, "no row is served twice in an epoch"
    assert "batches have 12 rows, all that the data is, not 16" in run.notices
    assert run.origin["settings"]["train"] == {**dataclasses.asdict(asked), "batch_size": 12}
