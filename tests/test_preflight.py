"""What is told before the first step holds in the run that follows; what does not fit is refused with what does."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt import checkpoint, cli, device_memory, golden_prompts, preflight, run_log, train, transformer
from jaxgpt.array_files import in_bytes
from jaxgpt.chat import CHATML
from jaxgpt.checkpoint import Contents
from jaxgpt.data.batches import empty_batch
from jaxgpt.data.encode import encode
from jaxgpt.data.instructions import MICRO
from jaxgpt.data.shards import TokenShards
from jaxgpt.errors import InputError
from jaxgpt.gates import random_batch
from jaxgpt.mesh import ALONE
from jaxgpt.presets import PRESETS
from jaxgpt.settings import PretrainSettings, TrainSettings
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.train_step import initial_state, stacked, train_step
from jaxgpt.training_loop import Loop

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(
    PRESETS["llama-tiny"], vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
)
STEP = TrainSettings(steps=2, batch_size=12, accumulate=2, sequence_length=64)
MODEL = ["--preset", "llama-tiny", "--hidden-size", 32, "--num-hidden-layers", 1, "--num-attention-heads", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n" * 8 for i in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in MICRO))
    tokenizer = Tokenizer.create("char", template=CHATML, corpus=["".join(map(chr, range(32, 127))) + "\n"])
    encode(folder / "text.jsonl", folder / "shards", tokenizer, template=CHATML, val_fraction=0.2)
    return folder


def words(data: Path, *more: object) -> list[str]:
    short = ["--steps", 3, "--batch-size", 8, "--sequence-length", 64, "--warmup-steps", 1]
    return [str(word) for word in ("pretrain", "--data", data / "shards", *MODEL, *short, *more)]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


# -- Memory ----------------------------------------------------------------------------


def test_the_step_that_was_looked_at_is_not_compiled_again():
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    state = initial_state(transformer.init(CONFIG, 0), STEP)
    batches = stacked([random_batch(CONFIG, 12, 64)] * 2)
    compiled.clear()
    preflight.step_bytes(CONFIG, STEP, "float32", state)
    before = len(compiled)
    assert before >= 1
    for _ in range(2):
        state, _ = train_step(CONFIG, STEP, "float32", state, batches, layout=ALONE)
    assert len(compiled) == before


@pytest.mark.parametrize(
    ("backend", "room", "fits", "asked"),
    [
        ("cpu", 160, "--batch-size 6 --accumulate 4", [6]),
        ("cpu", 159, "--batch-size 4 --accumulate 6", [6, 4]),
        ("cpu", 110, "--batch-size 1 --accumulate 24", [6, 4, 3, 2, 1]),
        ("cpu", 109, None, [4, 3, 2, 1]),
        ("gpu", 109, "--batch-size 4 --accumulate 6 --remat", [4, 3, 2, 1, 12, 6, 4]),
        ("gpu", 50, None, [2, 12, 3, 1]),
    ],
)
def test_the_largest_micro_batch_that_fits_is_named_and_makes_the_same_step(backend, room, fits, asked, monkeypatch):
    """A step of n rows takes 100 + 10 n bytes, with remat 60 + 10 n: what cannot fit is not compiled."""
    seen: list[int] = []

    def bytes_of(_, settings: TrainSettings, *__: object) -> int:
        assert settings.batch_size * settings.accumulate == 24
        seen.append(settings.batch_size)
        return (60 if settings.remat else 100) + 10 * settings.batch_size

    monkeypatch.setattr(preflight, "step_bytes", bytes_of)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    chosen = preflight.smaller_step(CONFIG, STEP, "float32", None, 220, room)
    assert (chosen and preflight.flags(chosen), seen) == (fits, asked)


def test_a_compiler_that_runs_out_of_memory_is_a_step_that_does_not_fit(monkeypatch):
    class Lowered:
        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.")

    class Step:
        def lower(self, *_: object, **__: object) -> Lowered:
            return Lowered()

    state = initial_state(transformer.init(CONFIG, 0), STEP)
    monkeypatch.setattr(preflight, "train_step", Step())
    assert preflight.step_bytes(CONFIG, STEP, "float32", state) is None


RUN = """
import sys
from jaxgpt import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, env=os.environ)


@pytest.mark.exhaustive
def test_the_estimate_holds_in_the_run_that_follows(data, tmp_path):
    """In a process of its own: the peak is the process's. Some 600 MB of it are the step's."""
    large = ["--batch-size", "128", "--sequence-length", "256", "--hidden-size", "64", "--eval-batches", "1"]
    done = ran(*words(data, "--out", tmp_path / "out", *large, "--epochs", 99, "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["memory_peak"] > 500e6
    assert 0.8 < result["memory_estimate"] / result["memory_peak"] < 1.25
    end = run_log.read(tmp_path / "out")[-1]
    assert end["memory_peak"] == result["memory_peak"]


# -- The report ------------------------------------------------------------------------


def test_a_dry_run_says_it_all_and_writes_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = listing(data)
    assert cli.main(words(data, "--out", "out", "--dry-run", "--json")) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (listing(data), list(tmp_path.iterdir())) == (before, [])
    assert found["fits"] is True
    assert found["smaller"] is None
    assert found["planned_tokens"] == 3 * 8 * 64
    assert found["tokens_per_parameter"] == pytest.approx(3 * 8 * 64 / found["parameters"])
    assert abs(found["first_loss"] - found["uniform_loss"]) < 0.3
    assert 0 < found["seconds_per_step"] < found["seconds_to_finish"]
    for name in ("memory", "data", "first batch", "first loss", "time to finish"):
        assert re.search(rf"^{name}  ", printed.err, re.MULTILINE), name
    # Without --out, too, and for people on stdout.
    assert cli.main(words(data, "--dry-run")) == 0
    headline = capsys.readouterr().out.splitlines()[0]
    starved = re.fullmatch(
        rf"{found['parameters']:,} parameters, float32 on cpu, ([\d.]+) tokens a parameter "
        r"\(fewer than the 20 that use compute best\)",
        headline,
    )
    assert starved, headline
    assert f"{found['first_loss']:.4f} nats a token; ln(vocab) is {found['uniform_loss']:.4f}" in printed.err
    assert float(starved[1]) == pytest.approx(found["tokens_per_parameter"], rel=0.05)
    assert list(tmp_path.iterdir()) == []


def test_the_first_loss_told_is_that_of_the_first_step(data, tmp_path, capsys, monkeypatch):
    # What a run does after its last step has tests of its own.
    monkeypatch.setattr(golden_prompts, "add", lambda _: None)
    monkeypatch.setattr(run_log, "picture", lambda _: None)
    peaks = iter([1, 3 * 10**12])
    monkeypatch.setattr(device_memory, "peak", lambda: next(peaks))
    assert cli.main(words(data, "--out", tmp_path / "out", "--loss-unit", "bits", "--log-every", 1)) == 0
    told, first = (next(r for r in run_log.read(tmp_path / "out") if r["event"] == e) for e in ("preflight", "train"))
    assert told["first_loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert told["trained_places"] == first["tokens"]
    ended, printed = capsys.readouterr()
    # Losses are printed in bits, as asked for; the log keeps nats.
    bits, guess, log = first["loss"] / math.log(2), told["uniform_loss"] / math.log(2), run_log.read(tmp_path / "out")
    assert f"first loss      {bits:.4f} bits a token; log2(vocab) is {guess:.4f} bits" in printed
    assert f"step 1/3  loss {bits:.4f} bits  " in printed
    last, held_out = ([r["loss"] / math.log(2) for r in log if r["event"] == e][-1] for e in ("train", "eval"))
    assert f"step 3: validation loss {held_out:.4f} bits\n" in printed
    assert f"step 3: loss {last:.4f} bits, validation loss {held_out:.4f} bits; saved in " in ended
    assert re.search(r"s to finish, [\d.]+ s a step", printed)
    # What was used is held against the estimate, here a planted peak.
    assert f"memory: 3.0 TB at the peak, {in_bytes(told['memory'])} had been expected" in printed
    assert run_log.read(tmp_path / "out")[-1]["memory_peak"] == 3 * 10**12
    # What is left of a run is told before it goes on.
    assert cli.main(["pretrain", "--out", str(tmp_path / "out"), "--resume", "--dry-run"]) == 0
    assert "nats a token" in capsys.readouterr().out
    # How losses are told is no matter of the run that is gone on with.
    chosen, _ = train._resumed(PretrainSettings(out=str(tmp_path / "out"), resume=True), "pretrain")
    assert (chosen.train.steps, chosen.train.loss_unit) == (3, "nats")


@pytest.mark.parametrize(
    ("peak", "found", "said"),
    [(99, None, False), (1000, 1000, False), (1250, 1250, False), (1251, 1251, True), (799, 799, True)],
)
def test_an_estimate_that_was_wrong_by_more_than_a_quarter_is_said(peak, found, said, monkeypatch):
    lines: list[str] = []
    loop = SimpleNamespace(preflight=SimpleNamespace(memory=1000), log=SimpleNamespace(say=lines.append))
    monkeypatch.setattr(device_memory, "peak", lambda: peak)
    assert Loop._peak(loop, before=100) == found
    assert bool(lines) == said


def test_what_does_not_fit_is_refused_before_anything_is_written_and_what_fits_is_named(
    data, tmp_path, capsys, monkeypatch
):
    flags = words(data, "--out", tmp_path / "out")
    measured, taken = preflight.step_bytes, {}

    def remembered(config, settings, dtype, state, layout):
        taken[settings.batch_size] = measured(config, settings, dtype, state, layout)
        return taken[settings.batch_size]

    monkeypatch.setattr(preflight, "step_bytes", remembered)
    monkeypatch.setattr(device_memory, "free", lambda: taken[8] - 1)
    monkeypatch.setattr(device_memory, "used", lambda: 10**9)
    assert cli.main(flags) == 2
    refused = capsys.readouterr()
    assert (refused.out, refused.err.count("\n")) == ("", 1)
    assert "can be had on cpu; --batch-size 4 --accumulate 2 fits, and makes the same update" in refused.err
    assert not (tmp_path / "out").exists()
    assert cli.main([*flags, "--dry-run", "--json"]) == 2
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["fits"], found["smaller"], found["first_loss"]) == (False, "--batch-size 4 --accumulate 2", None)
    assert told.err.splitlines()[-1] == refused.err.rstrip()
    assert not (tmp_path / "out").exists()
    # What was named is taken.
    assert cli.main([*flags, "--batch-size", "4", "--accumulate", "2", "--dry-run"]) == 0


def test_weights_that_no_memory_holds_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(device_memory, "total", lambda: 20 * 124_475_904)
    preflight.check_size(PRESETS["gpt2"])
    monkeypatch.setattr(device_memory, "total", lambda: 20 * 124_475_904 - 1)
    with pytest.raises(InputError, match=r"training 124,475,904 parameters needs at least 2.5 GB \(20 bytes each\)"):
        preflight.check_size(PRESETS["gpt2"])


def test_the_mask_of_the_first_batch_is_drawn_for_sft(data, tmp_path, capsys):
    tokenizer = TokenShards(data / "shards").tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.model_vocab_size)
    ids = list(tokenizer.stop_ids)
    contents = Contents(config, transformer.init(config, 0), "base", "float32", ids, tokenizer, CHATML, {})
    checkpoint.save(tmp_path / "base", 1, contents).result()
    sft = ["sft", "--model", tmp_path / "base", "--data", data / "chats.jsonl", "--sequence-length", 64, "--dry-run"]
    assert cli.main([str(word) for word in (*sft, "--batch-size", 2, "--steps", 2, "--accept-loss")]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  # trains"))
    drawn = [line[16:] for line in lines[at : at + 2]]
    (trained,) = re.findall(r"first batch +(\d+) of", lines[at - 1])
    assert sum(row.count("#") for row in drawn) == int(trained) > 0
    assert all(set(row) == {"#", "."} for row in drawn)


def test_a_column_of_the_drawing_is_several_places():
    batch = empty_batch(5, 128)
    batch["segments"][:, :100] = 1
    batch["mask"][0, 0:4] = batch["mask"][0, 7] = 1
    rows = preflight.drawn(batch)
    assert rows[0] == "##.+" + "." * 46
    assert rows[1:] == ["." * 50] * 3
    assert preflight.drawn(random_batch(CONFIG, 1, 8)) == ["#" * 8]
    assert np.array_equal(batch["mask"][1], np.zeros(128))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273_600, "3 days 4 h")],
)
def test_times_are_two_units(seconds, text):
    assert preflight.duration(seconds) == text
