"""`python -m oracle`: exit codes, messages and the JSON report."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from jaxgpt import golden_prompts, manifest
from jaxgpt.step_folder import GOLDEN
from oracle import ladder, models, noise, subject
from oracle.__main__ import main
from oracle.noise import Calibration
from oracle.rungs import golden

CONFIG = models.MODELS["llama"] | {"num_hidden_layers": 1, "max_position_embeddings": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder and the checkpoint imported from it."""
    place = tmp_path_factory.mktemp("cli")
    source = models.write(CONFIG, place / "hf", "float32", seed=77)
    subject.import_folder(source, place / "checkpoint")
    assert golden_prompts.add(place / "checkpoint") is None
    return source, place / "checkpoint"


def only(patch: pytest.MonkeyPatch, *rungs: str) -> None:
    """Climb these alone; the whole ladder is climbed in test_oracle_ladder.py."""
    patch.setattr(ladder, "LADDER", {name: ladder.LADDER[name] for name in rungs})


def test_a_true_checkpoint_passes_with_its_source_and_writes_the_report(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    only(monkeypatch, "environment", "ids", "bits", "statistics")
    source, checkpoint = folders
    report = tmp_path / "report.json"
    code = main(["compare", str(checkpoint), "--reference", str(source), "--json", str(report)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.startswith("PASS. No difference beyond measured noise in environment, ids, bits, statistics")
    document = json.loads(report.read_text())
    assert document["verdict"] == "pass"
    assert document["first_divergence"] is None
    assert "bf16 bits read as fp16" in document["exposed_classes"]


def test_a_checkpoint_alone_is_compared_with_its_own_export(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    only(monkeypatch, "bits", "forward", golden.NAME)
    assert main(["compare", str(folders[1])]) == 0
    printed = capsys.readouterr().out
    assert "against the export only (no --reference)" in printed
    answered = re.search(
        r"^  golden +pass .* (\d+) prompts: (\d+) of (\d+) greedy ids are the reference's", printed, re.M
    )
    assert answered, printed
    assert int(answered[2]) == int(answered[3]) == 12 * int(answered[1])
    assert "no --reference folder to compare the weights with" in printed


def otherwise(values: dict[str, Any]) -> None:
    """Another id where the model was sure of its own."""
    row = values["prompts"][0]
    step = int(np.argmax(row["margins"]))
    row["greedy"][step] = (row["greedy"][step] + 1) % 100


def moved(values: dict[str, Any]) -> None:
    """One number of one fingerprint, by a thousandth."""
    values["prompts"][1]["places"][1]["sketch"][7] += 1e-3


def of_another_model(values: dict[str, Any]) -> None:
    values["vocab_size"] += 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            otherwise,
            r"logits \(after 12 ids of no text\), in the rung golden. Greedy token \d+ is \d+, the reference's",
        ),
        (moved, r"logits \(after 5 ids of no text, 6 greedy ids on\), in the rung golden. Error .* times the noise"),
        (of_another_model, r"logits, in the rung golden. golden.json is of a model with [\d,]+ ids, this one has"),
    ],
)
def test_golden_prompts_that_the_reference_answers_otherwise_fail(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Any,
    said: str,
):
    only(monkeypatch, golden.NAME)
    run = Path(shutil.copytree(folders[1], tmp_path / "run"))
    (step,) = (path for path in run.iterdir() if path.is_dir())
    values = json.loads((step / GOLDEN).read_text("utf-8"))
    change(values)
    (step / GOLDEN).write_text(json.dumps(values), "utf-8")
    manifest.seal(step)
    assert main(["compare", str(run), "--json", str(tmp_path / "report.json")]) == 1
    printed = capsys.readouterr().out
    assert re.match(rf"FAIL. First divergence: {said}", printed), printed
    (rung,) = json.loads((tmp_path / "report.json").read_text("utf-8"))["rungs"]
    assert (rung["name"], rung["verdict"]) == ("golden", "fail")
    if change is moved:
        assert main(["bisect", str(run)]) == 1
        assert "Cause: unknown, at logits" in capsys.readouterr().out
        assert main(["compare", str(run), "--dtype", "bfloat16"]) == 0
        said = "not compared: they were answered in float32, the comparison is in bfloat16"
        assert said in capsys.readouterr().out


def test_a_checkpoint_of_other_weights_fails_and_names_the_first_parameter(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = models.write(CONFIG, tmp_path / "hf", "float32", seed=77)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert main(["compare", str(folders[1]), "--reference", str(other)]) == 1
    printed = capsys.readouterr().out
    first = "FAIL. First divergence: layers.0.mlp.up.kernel, a parameter, against the reference's file. 1 of 2,184"
    assert printed.startswith(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "the following arguments are required"),
        (["compare", "no/such/folder"], "no/such/folder"),
        (["compare", "{checkpoint}", "--reference", "no/such/hf"], "no/such/hf has no config.json"),
        (["compare", "{checkpoint}", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["compare", "{checkpoint}", "--json", "no/such/folder/report.json"], "does not exist; create it first"),
        (["verify"], "invalid choice: 'verify'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folders: tuple[Path, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([argument.format(checkpoint=folders[1]) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("oracle: ")
    assert message in printed.err


def test_a_missing_calibration_is_inconclusive(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(noise, "stored_calibration", lambda: Calibration(4.0, {}, {}))
    assert main(["compare", str(folders[1])]) == 3
    assert capsys.readouterr().out.startswith("INCONCLUSIVE. The calibration has no clean runs of")


def test_an_unexpected_exception_is_exit_code_4_with_the_traceback_on_request(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(subject, "compare", broken)
    assert main(["compare", str(folders[1])]) == 4
    assert capsys.readouterr().err == "oracle: broke with RuntimeError: a bug (--debug shows where)\n"
    assert main(["--debug", "compare", str(folders[1])]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_without_torch_the_message_says_what_to_install():
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from oracle.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(main(['compare', 'x']))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "oracle: the oracle needs torch: pip install '.[oracle]'\n"


def test_a_report_with_infinite_errors_is_still_json(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    only(monkeypatch, "bits", "operators")
    source, checkpoint = folders
    candidate = subject.candidate(checkpoint, "float32")
    broken = {**candidate.stored, "layers.0.mlp.up.kernel": np.full((42, 52), np.nan, np.float32)}

    def plant(true: Any) -> Any:
        return type(true)(true.config, broken, true.dtype)

    report = subject.compare(checkpoint, source, "float32", noise.stored_calibration(), plant=plant, everything=True)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert '"inf"' in text
    assert report.verdict == "fail"


def test_a_negative_seed_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(tmp_path), "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "oracle: --seed must be ≥ 0, got -1\n"
