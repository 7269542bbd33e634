"""Golden prompts: what they hold, that `check` asks again, and that each planted change is found by them."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxgpt import check as check_module
from jaxgpt import checkpoint, cli, golden_prompts, manifest, step_folder
from jaxgpt.chat import CHATML
from jaxgpt.checks.golden import golden_prompts_test
from jaxgpt.checks.report import CheckLine
from jaxgpt.errors import InputError
from jaxgpt.formats import hf, importing, safetensors_file
from jaxgpt.lm import LM
from jaxgpt.step_folder import GOLDEN
from jaxgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TOKENIZER = Tokenizer.create("char", template=CHATML, corpus=["Once upon a time: def f(x) user assistant Hi"])
CONFIG = dataclasses.replace(conftest.LLAMA, vocab_size=TOKENIZER.model_vocab_size, num_hidden_layers=1)


def contents(**changes: Any) -> checkpoint.Contents:
    values: dict[str, Any] = {
        "config": CONFIG,
        "params": {name: np.asarray(array) for name, array in conftest.random_params(CONFIG).items()},
        "stage": "sft",
        "compute_dtype": "float32",
        "eos_token_ids": list(TOKENIZER.stop_ids),
        "tokenizer": TOKENIZER,
        "template": CHATML,
        "provenance": {},
    }
    return checkpoint.Contents(**values | changes)


@pytest.fixture(scope="module")
def proved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step folder with golden prompts; nobody changes it."""
    run = tmp_path_factory.mktemp("golden") / "run"
    checkpoint.save(run, 3, contents()).result()
    assert golden_prompts.add(run) is None
    return step_folder.latest(run)


@pytest.fixture
def step(proved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(proved, tmp_path / "step-00000003"))


def judged(step: Path) -> tuple[str, str]:
    line = golden_prompts_test(LM(checkpoint.load(step)), step)
    return line.status, line.detail


def changed(step: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file and hash everything anew, as whoever does it on purpose would."""
    values = json.loads((step / name).read_text("utf-8"))
    change(values)
    (step / name).write_text(json.dumps(values), "utf-8")
    manifest.seal(step)


def elsewhere(step: Path) -> None:
    """As if the golden prompts came from another machine, where sums round otherwise."""

    def move(values: dict[str, Any]) -> None:
        values["made_on"]["processor"] = "Another Processor"
        for row in values["prompts"]:
            row["sha256"] = "0" * 64

    changed(step, GOLDEN, move)


# -- What they hold --------------------------------------------------------------------


def test_they_say_what_was_asked_and_are_the_argmax_of_the_models_logits(proved: Path):
    golden, lm = golden_prompts.read(proved), LM(checkpoint.load(proved))
    assert golden is not None
    assert [row.prompt for row in golden.prompts] == [
        "Once upon a", [{"role": "user", "content": "Hi"}], "Zürich 日本", None,
    ]  # fmt: skip
    assert golden.made_on == golden_prompts.surroundings()
    for row in golden.prompts:
        assert row.prompt is None or lm.encode(row.prompt) == row.ids
        assert row.text == TOKENIZER.decode(row.greedy)
        whole = lm.logits([row.ids + row.greedy])[0, len(row.ids) - 1 :]
        assert whole[:-1, : lm.real_ids].argmax(axis=-1).tolist() == row.greedy
        ordered = np.sort(whole[:-1, : lm.real_ids], axis=-1)
        assert np.allclose(row.margins, ordered[:, -1] - ordered[:, -2], atol=conftest.rounding(whole))
        assert [place.step for place in row.places] == [0, 8, 16]
        for place in row.places:
            assert np.allclose(place.sketch, golden_prompts.sketch(whole[place.step]), atol=conftest.rounding(whole))
            assert np.allclose(place.top_logits, whole[place.step][place.top_ids], atol=conftest.rounding(whole))
            assert place.top_logits == sorted(place.top_logits, reverse=True)


def test_a_sketch_tells_how_far_two_sets_of_logits_are_apart():
    rng = np.random.default_rng(0)
    for V in (131, 50_304):
        a, b = rng.standard_normal((2, 20, V), np.float32)
        told = np.sqrt(np.square(golden_prompts.sketch(a) - golden_prompts.sketch(b)).mean(axis=-1))
        real = np.sqrt(np.square(a.astype(np.float64) - b).mean(axis=-1))
        assert np.abs(told / real - 1).max() < 0.5, "within 4 of the 0.125 by which 32 projections scatter"
        assert abs((told / real).mean() - 1) < 0.1


def test_the_signs_of_a_sketch_are_those_that_its_documentation_says():
    x = (131 + 0x9E3779B9 * 6) % 2**32
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 15)) * multiplier % 2**32
    sign = 1.0 if (x ^ (x >> 15)) >> 16 & 1 else -1.0
    one = np.zeros(200, np.float32)
    one[131] = 1.0
    assert golden_prompts.sketch(one)[5] == sign / np.sqrt(200)


@pytest.mark.parametrize("context", [4, 24])
def test_a_model_without_a_tokenizer_or_with_a_short_context_has_them_too(context: int):
    config = dataclasses.replace(CONFIG, max_position_embeddings=context)
    tokenizer = TOKENIZER if context == 24 else None
    values = {"config": config, "params": conftest.random_params(config), "tokenizer": tokenizer}
    golden = golden_prompts.made(LM(SimpleNamespace(**vars(contents()) | values | {"template": None})))
    assert golden.prompts
    for row in golden.prompts:
        assert len(row.ids) + len(row.greedy) <= context
        assert len(row.greedy) == min(16, context // 2)
        assert row.prompt is None or len(row.ids) <= context - len(row.greedy)


def test_a_model_that_answers_nothing_is_saved_without_them_and_that_is_said(tmp_path: Path):
    broken = {name: np.full_like(np.asarray(array), np.nan) for name, array in contents().params.items()}
    checkpoint.save(tmp_path / "run", 0, contents(params=broken)).result()
    assert golden_prompts.add(tmp_path / "run") == "no golden prompts: the model's logits are not finite"
    assert judged(step_folder.latest(tmp_path / "run"))[0] == "SKIP"


# -- Asked again -----------------------------------------------------------------------


def test_another_process_gives_the_same_bits(step: Path):
    script = (
        "import sys; from pathlib import Path; from jaxgpt import checkpoint; from jaxgpt.lm import LM;"
        "from jaxgpt.checks.golden import golden_prompts_test as test;"
        "print(test(LM(checkpoint.load(sys.argv[1])), Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(step)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "PASS golden_prompts_test: 4 prompts, 64 greedy ids and their logits are those of this"
    )
    assert "bit for bit" in done.stdout


def test_other_rounding_is_no_difference_elsewhere_and_one_here(step: Path):
    def one_bit(values: dict[str, Any]) -> None:
        values["prompts"][2]["sha256"] = "0" * 64

    changed(step, GOLDEN, one_bit)
    status, detail = judged(step)
    assert (status, "no more than rounding, but nothing that rounds has changed" in detail) == ("FAIL", True), detail
    elsewhere(step)
    status, detail = judged(step)
    assert (status, "Another Processor with jax" in detail) == ("PASS", True), detail
    assert "× the measured noise of" in detail


def test_an_id_that_rounding_decides_is_a_tie_and_one_that_it_does_not_is_a_failure(step: Path):
    elsewhere(step)

    def otherwise(values: dict[str, Any]) -> None:
        row = values["prompts"][0]
        row["greedy"][15] = (row["greedy"][15] + 1) % 100
        row["places"] = row["places"][:2]
        row["margins"][15] = 1e-9

    changed(step, GOLDEN, otherwise)
    status, detail = judged(step)
    assert (status, "greedy id 16 is" in detail) == ("TIE", True), detail
    changed(step, GOLDEN, lambda values: values["prompts"][0]["margins"].__setitem__(15, 0.5))
    status, detail = judged(step)
    assert (status, "0.5 ahead, more than the measured noise" in detail) == ("FAIL", True), detail


def reweighted(step: Path, change: Callable[[dict[str, np.ndarray]], None], **others: Any) -> Path:
    """The step with other weights, saved and hashed as any is, and with the golden prompts of the old ones."""
    params = {name: np.array(array) for name, array in contents().params.items()}
    change(params)
    run = step.parent / "planted"
    checkpoint.save(run, 3, contents(params=params, **others)).result()
    shutil.copy(step / GOLDEN, run / "step-00000003")
    manifest.seal(run / "step-00000003")
    return run / "step-00000003"


def one_weight(params: dict[str, np.ndarray]) -> None:
    """One that scales a term of every logit: a weight deep inside may round away everywhere, on some processors."""
    params["final_norm.weight"][3] = np.nextafter(params["final_norm.weight"][3], np.float32(9))


def negated_weight(params: dict[str, np.ndarray]) -> None:
    params["layers.0.mlp.down.kernel"][3, 5] *= -1


def shuffled_rows(params: dict[str, np.ndarray]) -> None:
    params["layers.0.attn.q.kernel"] = np.random.default_rng(0).permutation(params["layers.0.attn.q.kernel"])


@pytest.mark.parametrize("plant", [negated_weight, shuffled_rows])
@pytest.mark.parametrize("moved", [False, True])
def test_changed_weights_that_were_hashed_again_are_found_on_any_machine(step: Path, plant: Any, moved: bool):
    if moved:
        elsewhere(step)
    status, detail = judged(reweighted(step, plant))
    assert status == "FAIL", detail
    assert "the measured noise of" in detail
    assert "(allowed 4): weights, settings or code are not those that made it" in detail


def test_one_weight_moved_by_its_last_bit_is_found_where_the_prompts_were_made(step: Path):
    status, detail = judged(reweighted(step, one_weight))
    assert (status, "no more than rounding, but" in detail) == ("FAIL", True), detail


def test_a_changed_rope_theta_is_found(step: Path):
    changed(step, "model.json", lambda values: values["config"].update(rope_theta=20_000.0))
    status, detail = judged(step)
    assert (status, "× the measured noise" in detail) == ("FAIL", True), detail


def test_another_tokenizer_is_found_before_anything_is_computed(step: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(golden_prompts, "ask", lambda *_: pytest.fail("asked"))
    other = Tokenizer.create("char", template=CHATML, corpus=["abcdefghijklmnopqrstuvwxyz O:()"])
    rows = {"model_vocab_size": TOKENIZER.model_vocab_size}
    other = Tokenizer.from_state(other.state() | rows, TOKENIZER.model_vocab_size)
    status, detail = judged(reweighted(step, lambda params: None, tokenizer=other))
    assert status == "FAIL"
    assert detail.startswith("the tokenizer makes of 'Once upon a' the ids ["), detail
    status, detail = judged(reweighted(step, lambda params: None, tokenizer=None, template=None))
    assert (status, "is text, and the checkpoint has no tokenizer" in detail) == ("FAIL", True), detail


def test_weights_that_give_nan_are_found(step: Path):
    status, detail = judged(reweighted(step, lambda params: params["final_norm.weight"].fill(np.nan)))
    assert (status, "logits are not finite, and were" in detail) == ("FAIL", True), detail


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("made_on"),
        lambda values: values["prompts"][0]["ids"].append(-1),
        lambda values: values["prompts"][0].update(greedy=[]),
        lambda values: values["prompts"][1]["places"][0].update(sketch=["x"] * 32),
        lambda values: values.update(prompts=[]),
        lambda values: values.update(prompts=7),
        lambda values: values.update(vocab_size=None),
        lambda values: values.update(version=2),
    ],
)
def test_a_file_that_jaxgpt_did_not_write_is_refused(step: Path, change: Any):
    changed(step, GOLDEN, change)
    with pytest.raises(InputError, match=r"golden.json (is not what jaxgpt writes|has version 2)"):
        golden_prompts.read(step)


def test_the_command_asks_them_again(step: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """With the other checks, which have tests of their own, left out."""
    others = [name for name in vars(check_module) if name.endswith("_test") and name != "golden_prompts_test"]
    assert len(others) == 9
    for name in others:
        monkeypatch.setattr(check_module, name, lambda lm, name=name, **_: CheckLine(name, "PASS", ""))
    assert cli.main(["check", str(step)]) == 0
    told = capsys.readouterr().out
    assert "PASS golden_prompts_test: 4 prompts, 64 greedy ids and their logits are those of this machine, bit" in told
    assert cli.main(["check", str(reweighted(step, shuffled_rows))]) == 1
    assert "FAIL golden_prompts_test: the logits after " in capsys.readouterr().out

    def otherwise(values: dict[str, Any]) -> None:
        row = values["prompts"][0]
        row.update(sha256="0" * 64, greedy=[*row["greedy"][:-1], (row["greedy"][-1] + 1) % 100])
        row["places"] = row["places"][:2]

    changed(step, GOLDEN, otherwise)
    assert cli.main(["check", str(step), "--json"]) == 1
    printed = capsys.readouterr()
    assert "golden_prompts_test" in json.loads(printed.out)["cause"]
    assert "FAIL golden_prompts_test: after 'Once upon a' greedy id 16 is " in printed.err


# -- Where they come from and where they go --------------------------------------------


def test_they_are_listed_in_the_manifest_and_a_step_without_them_is_whole_too(step: Path):
    assert GOLDEN in manifest.read(step)
    (step / GOLDEN).write_text((step / GOLDEN).read_text("utf-8").replace("1", "2", 1), "utf-8")
    with pytest.raises(InputError, match=r"golden.json fails SHA-256"):
        checkpoint.load(step)
    (step / GOLDEN).unlink()
    manifest.seal(step)
    assert judged(step) == (
        "SKIP",
        "the checkpoint carries none: a step from the middle of a run, or of an older jaxgpt",
    )


def test_adding_them_changes_no_other_file_and_a_failure_leaves_the_step(proved: Path, tmp_path: Path, monkeypatch):
    step = Path(shutil.copytree(proved, tmp_path / "step-00000003"))
    before = manifest.read(step)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        assert golden_prompts.add(step) == "golden prompts were not written: No space left on device"
    assert manifest.verify(step)
    assert manifest.read(step) == before
    assert golden_prompts.add(step) is None
    assert manifest.read(step) == before, "the same bits again"


def test_an_import_has_them_and_an_export_takes_them_along_unless_it_is_cast(proved: Path, tmp_path: Path):
    exported, back = tmp_path / "hf", tmp_path / "back"
    hf.export_hf(proved, exported)
    assert (exported / GOLDEN).read_bytes() == (proved / GOLDEN).read_bytes()
    assert importing.import_model(exported, back, golden=False) is not None
    assert not (step_folder.latest(back) / GOLDEN).exists()
    shutil.rmtree(back)
    importing.import_model(exported, back)
    assert judged(step_folder.latest(back))[0] == "PASS"
    cast = tmp_path / "bf16"
    hf.export_hf(proved, cast, cast="bfloat16")
    values = json.loads((cast / GOLDEN).read_text("utf-8"))
    assert values["compute_dtype"] == "bfloat16"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a model that computes as it is stored; nobody changes it."""
    folder = tmp_path_factory.mktemp("exported")
    params = {name: array.astype(jnp.dtype(request.param)) for name, array in contents().params.items()}
    checkpoint.save(folder / "run", 3, contents(params=params, compute_dtype=request.param)).result()
    assert golden_prompts.add(folder / "run") is None
    hf.export_hf(folder / "run", folder / "hf")
    return folder / "hf"


def permuted(folder: Path) -> None:
    """The columns of one product, and a weights file that says nothing of it."""
    tensors = {name: np.array(tensor) for name, tensor in hf.read(folder).tensors.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors_file.write(folder / hf.WEIGHTS, tensors | {name: tensors[name][:, ::-1].copy()})


def test_an_import_asks_an_export_whether_it_still_is_what_was_exported(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    changed, out = Path(shutil.copytree(exported, tmp_path / "changed")), tmp_path / "out"
    notices = importing.import_model(exported, tmp_path / "same", verify=True)
    assert [n for n in notices if "golden" in n] == []
    permuted(changed)
    assert cli.main(["import", str(changed), str(out), "--verify"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"jaxgpt: {changed} is no longer what was exported: the logits after ")
    assert said.endswith("; if the change is meant, delete its golden.json\n")
    assert not out.exists()
    (changed / GOLDEN).write_text("{}")
    with pytest.raises(InputError, match=r"is no longer what was exported: golden.json has version None; "):
        importing.import_model(changed, out)
    assert not out.exists()
    (changed / GOLDEN).unlink()
    importing.import_model(changed, out, verify=True)


def test_where_an_export_is_not_asked_that_is_said(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    golden = exported / GOLDEN
    dtype = json.loads(golden.read_text())["compute_dtype"]

    def told(name: str, **asked: Any) -> list[str]:
        return [n for n in importing.import_model(exported, tmp_path / name, **asked) if str(golden) in n]

    another = f"{golden} was not asked: another dtype or setting makes another model"
    assert told("cast", cast="float16") == [another]
    assert told("set", overrides={"rope_theta": 5e5}) == [another]
    assert told("unasked", golden=False) == [f"{golden} was not asked: no prompts were asked"]
    with monkeypatch.context() as patch:
        patch.setattr(importing, "ASKED_UP_TO", 1000)
        assert told("large") == [f"{golden} was not asked: no prompts were asked"]
    with monkeypatch.context() as patch:
        read = golden_prompts.read
        patch.setattr(golden_prompts, "read", lambda f: dataclasses.replace(read(f), compute_dtype="float16"))
        assert told("computed") == [f"{golden} was not asked: made computing in float16, imported as {dtype}"]


def test_an_export_of_a_step_without_them_asks_the_model_or_says_why_not(
    step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "bare").mkdir()
    bare = Path(shutil.copytree(step, tmp_path / "bare" / step.name))
    (bare / GOLDEN).unlink()
    manifest.seal(bare)
    assert cli.main(["export", str(bare), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / GOLDEN).read_bytes() == (step / GOLDEN).read_bytes()
    silent = reweighted(step, lambda params: params["final_norm.weight"].fill(np.nan))
    (silent / GOLDEN).unlink()
    manifest.seal(silent)
    capsys.readouterr()
    assert cli.main(["export", str(silent), str(tmp_path / "nan")]) == 0
    assert "no golden prompts: the model's logits are not finite" in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "nan" / GOLDEN).exists()


def test_an_export_as_gguf_says_that_it_leaves_them_out(step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    left_out = "golden.json is left out: a GGUF file has no place for it; an export as hf carries it"
    assert cli.main(["export", str(step), str(tmp_path / "a.gguf"), "--format", "gguf"]) == 0
    assert left_out in capsys.readouterr().err.splitlines()
    (step / GOLDEN).unlink()
    manifest.seal(step)
    assert cli.main(["export", str(step), str(tmp_path / "b.gguf"), "--format", "gguf"]) == 0
    assert "golden" not in capsys.readouterr().err


def test_an_import_of_large_weights_leaves_them_out_and_says_how_to_add_them(proved: Path, tmp_path: Path, monkeypatch):
    hf.export_hf(proved, tmp_path / "hf")
    monkeypatch.setattr(importing, "ASKED_UP_TO", 1000)
    notices = importing.import_model(tmp_path / "hf", tmp_path / "large")
    assert re.fullmatch(r"no golden prompts: asking .* KB of weights takes more memory .*add.* does it", notices[-1])
    assert notices[-2].endswith("golden.json was not asked: no prompts were asked")
    assert not (step_folder.latest(tmp_path / "large") / GOLDEN).exists()
    assert importing.import_model(tmp_path / "hf", tmp_path / "asked", golden=True) == notices[:-2]
    assert judged(step_folder.latest(tmp_path / "asked"))[0] == "PASS"


def test_transformers_gives_the_golden_ids_and_logits_of_an_export(proved: Path, tmp_path: Path):
    hf.export_hf(proved, tmp_path / "hf")
    golden = golden_prompts.read(tmp_path / "hf")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for row in golden.prompts:
        with torch.no_grad():
            whole = stock(torch.tensor([row.ids + row.greedy])).logits[0, len(row.ids) - 1 :].numpy()
        assert whole[:-1, : TOKENIZER.vocab_size].argmax(axis=-1).tolist() == row.greedy
        for place in row.places:
            assert np.allclose(place.sketch, golden_prompts.sketch(whole[place.step]), atol=conftest.rounding(whole))
