"""Gates fire on planted causes, in whole runs; those of an exhausted corpus, a batch of NaN and text that the
vocabulary lacks are in test_train.py and test_data_encode.py."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
from bare_runs import bare

from jaxgpt import checkpoint, gates, manifest, run_log, step_folder, train
from jaxgpt.chat import CHATML
from jaxgpt.checks.golden import golden_prompts_test
from jaxgpt.data.batches import Batch, WindowRows
from jaxgpt.data.encode import encode
from jaxgpt.data.shards import sealed
from jaxgpt.errors import InputError
from jaxgpt.lm import LM
from jaxgpt.presets import PRESETS
from jaxgpt.settings import ModelSettings, PretrainSettings, SFTSettings, TrainSettings
from jaxgpt.step_folder import GOLDEN
from jaxgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

MODEL = ModelSettings(preset="llama-tiny", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
TRAIN = TrainSettings(
    steps=120,
    batch_size=4,
    sequence_length=32,
    learning_rate=1e-2,
    warmup_steps=4,
    epochs=4,
    save_every=60,
    eval_every=0,
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 ().:+*=\n"


def encoded(folder: Path, alphabet: str) -> Path:
    texts = [f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n" * 4 for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.create("char", template=CHATML, corpus=[alphabet])
    encode(folder / "text.jsonl", folder / "shards", tokenizer, template=CHATML, val_fraction=0.2, accept=True)
    return folder / "shards"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoded(tmp_path_factory.mktemp("data"), ALPHABET)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its corpus; nobody changes it."""
    out = tmp_path_factory.mktemp("runs") / "base"
    result = train.pretrain(settings(data, out))
    assert result.validation_loss < 3.0
    return out


def settings(data: Path, out: Path, init_from: str = "", **changes: object) -> PretrainSettings:
    chosen = dataclasses.replace(TRAIN, **changes)
    model = ModelSettings() if init_from else MODEL
    return PretrainSettings(data=str(data), out=str(out), init_from=init_from, model=model, train=chosen)


def refused(chosen: PretrainSettings) -> str:
    with pytest.raises(InputError) as refusal:
        train.pretrain(chosen)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_finished_run_carries_golden_prompts_in_its_last_step_only(base: Path):
    assert step_folder.steps(base) == [60, 120]
    assert not (base / "step-00000060" / GOLDEN).exists()
    last = base / "step-00000120"
    line = golden_prompts_test(LM(checkpoint.load(last)), last)
    assert (line.status, "bit for bit" in line.detail) == ("PASS", True), line


def test_a_shard_of_text_that_its_vocabulary_lacks_is_refused_before_anything_is_written(tmp_path: Path):
    other = encoded(tmp_path, "abcdefgh ")
    text = refused(settings(other, tmp_path / "out"))
    assert re.search(
        r"train-00000.bin: .* of 6,000 tokens are unknown, .*; pass --accept-loss to go on anyway", text
    ), text
    assert not (tmp_path / "out").exists()


def test_fresh_weights_of_an_absurd_scale_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bare(monkeypatch)
    absurd = dataclasses.replace(PRESETS["llama-tiny"], initializer_range=1.0)
    monkeypatch.setitem(PRESETS, "llama-tiny", absurd)
    text = refused(settings(data, tmp_path / "out"))
    assert re.match(r"a fresh model scores [\d.]+ on random ids, expected 5.768 ± 0.3 .*check initializer_range", text)
    assert not (tmp_path / "out").exists()


def test_targets_that_are_the_ids_themselves_are_refused_at_the_first_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tied embedding knows them before it has learned anything."""
    bare(monkeypatch)
    fill = WindowRows.fill

    def unshifted(self: WindowRows, row: Any, batch: Batch, b: int) -> None:
        fill(self, row, batch, b)
        batch["targets"][b] = batch["ids"][b]

    monkeypatch.setattr(WindowRows, "fill", unshifted)
    wide = dataclasses.replace(settings(data, tmp_path / "out"), model=dataclasses.replace(MODEL, hidden_size=64))
    text = refused(wide)
    assert re.match(r"first loss is 4.\d+, expected between 4.768 and 6.068 .*check the targets", text)
    assert step_folder.steps(tmp_path / "out") == []


def test_a_corpus_of_another_vocabulary_is_refused(base: Path, tmp_path: Path):
    other = encoded(tmp_path, ALPHABET[::-1] + "A")
    text = refused(settings(other, tmp_path / "out", init_from=str(base)))
    assert "the data have different tokenizers; encode the data with the checkpoint's" in text
    assert not (tmp_path / "out").exists()


def test_ids_of_another_vocabulary_do_not_pass_under_the_name_of_the_models(base: Path, tmp_path: Path):
    other = encoded(tmp_path, ALPHABET + "ABCDEFGHIJKLMN")
    index = json.loads((other / "index.json").read_text("utf-8"))
    index["tokenizer"] = checkpoint.load(base).tokenizer.state()
    (other / "index.json").write_text(json.dumps(sealed(index)), "utf-8")
    text = refused(settings(other, tmp_path / "out", init_from=str(base)))
    found = re.match(
        r"the loaded model scores ([\d.]+) before any update, (worse than a uniform guess|above 4.845)", text
    )
    assert found, text
    assert float(found[1]) > 0.84 * math.log(320)
    assert not (tmp_path / "out").exists()


def planted(base: Path, folder: Path, params: dict[str, np.ndarray], *, proved: bool = True) -> Path:
    """The run's last step with other weights, hashed as any is, and with its golden prompts if `proved`."""
    found, golden = checkpoint.load(base, train=True), base / "step-00000120" / GOLDEN
    fields = [field.name for field in dataclasses.fields(checkpoint.Contents) if field.name in vars(found)]
    values = {name: getattr(found, name) for name in fields} | {"params": params}
    checkpoint.save(folder, 120, checkpoint.Contents(**values)).result()
    if proved:
        shutil.copy(golden, folder / "step-00000120")
        manifest.seal(folder / "step-00000120")
    return folder / "step-00000120"


def test_a_shuffled_embedding_without_golden_prompts_is_refused_before_any_update(
    base: Path, data: Path, tmp_path: Path
):
    params = dict(checkpoint.load(base).params)
    params["embed.tokens.weight"] = np.random.default_rng(0).permutation(params["embed.tokens.weight"])
    step = planted(base, tmp_path / "planted", params, proved=False)
    text = refused(settings(data, tmp_path / "out", init_from=str(step.parent)))
    assert "before any update, worse than a uniform guess" in text, text


def shuffled(base: Path) -> dict[str, np.ndarray]:
    """The run's weights with the rows of each matrix of its one layer in another order."""
    params = dict(checkpoint.load(base).params)
    for name in [name for name in params if name.startswith("layers.0.") and name.endswith(".kernel")]:
        params[name] = np.random.default_rng(0).permutation(params[name])
    return params


def test_a_shuffled_layer_is_refused_wherever_training_starts_from_it(base: Path, data: Path, tmp_path: Path):
    step = planted(base, tmp_path / "planted", shuffled(base))
    text = refused(settings(data, tmp_path / "out", init_from=str(step)))
    found = re.fullmatch(
        r".*/step-00000120 does not answer as its golden.json says: the logits after .* are .* × the measured noise of "
        r".*, from those of this machine \(allowed 4\): weights, settings or code are not those that made it; restore "
        r"the checkpoint; `jaxgpt check` and `python -m oracle compare` tell more, --accept-loss trains it nonetheless",
        text,
    )
    assert found, text
    assert not (tmp_path / "out").exists()
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "f(1)", "completion": "2"}) + "\n", "utf-8")
    one = dataclasses.replace(TRAIN, batch_size=1, epochs=200)
    tuned = SFTSettings(model=str(step), data=str(chats), out=str(tmp_path / "out"), train=one)
    with pytest.raises(InputError, match=r"does not answer as its golden.json says: the logits after"):
        train.sft(tuned)
    assert not (tmp_path / "out").exists()
    before = sorted(step.parent.rglob("*"))
    with pytest.raises(InputError, match=r"does not answer as its golden.json says: the logits after"):
        train.pretrain(PretrainSettings(out=str(step.parent), resume=True))
    assert sorted(step.parent.rglob("*")) == before


def test_a_shuffled_layer_is_trained_only_where_that_was_asked_for(base: Path, data: Path, tmp_path: Path):
    step = planted(base, tmp_path / "planted", shuffled(base))
    assert gates.check_answers(checkpoint.load(step), accept=True) == []
    golden = json.loads((step / GOLDEN).read_text("utf-8"))
    (step / GOLDEN).write_text(json.dumps(golden | {"prompts": []}), "utf-8")
    manifest.seal(step)
    with pytest.raises(InputError, match=r"golden.json is not what jaxgpt writes; restore it"):
        gates.check_answers(checkpoint.load(step), accept=False)


@pytest.mark.parametrize("rate", [pytest.param(1.0, marks=pytest.mark.exhaustive), 100.0])
def test_a_learning_rate_that_diverges_stops_the_run_and_what_was_saved_stands(data: Path, tmp_path: Path, rate: float):
    text = refused(settings(data, tmp_path / "out", learning_rate=rate, warmup_steps=2, save_every=2))
    assert "3 steps in a row above" in text, text
    assert f"the run diverges; lower --learning-rate (it was {rate:g})" in text
    losses = [record["loss"] for record in run_log.read(tmp_path / "out") if record["event"] == "train"]
    assert len(losses) < 30, "long before the 120 steps asked for"
    assert step_folder.steps(tmp_path / "out")


def test_divergence_is_three_losses_in_a_row_that_no_learning_run_has():
    config = dataclasses.replace(conftest.GPT2, vocab_size=1000)
    guess = math.log(1000)
    healthy = gates.Divergence(config, 1e-3)
    for step, loss in enumerate([guess, 9.0, 2.1 * guess, 50.0, 4.0, 50.0, 50.0, 1.9 * guess, 50.0, 50.0], 1):
        healthy.watch(step, loss)
    surprised = gates.Divergence(config, 1e-3)
    for step, loss in enumerate([3 * guess, 5.9 * guess, 5.9 * guess, 5.9 * guess], 1):
        surprised.watch(step, loss)
    with pytest.raises(InputError, match=r"loss 50 at step 11, 3 steps in a row above 13.82 .*lower --learning-rate"):
        healthy.watch(11, 50.0)
