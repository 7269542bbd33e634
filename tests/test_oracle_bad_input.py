"""What the oracle cannot compare is one line and exit code 2; what broke is never blamed on the model."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from jaxgpt import checkpoint, weights
from jaxgpt import model as product
from jaxgpt.checkpoint import Checkpoint, Contents
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.formats import hf
from oracle import ladder, memory, models, noise, preconditions, subject, text_reference
from oracle.__main__ import main
from oracle.candidate import Candidate
from oracle.comparison import Comparison
from oracle.noise import Calibration
from oracle.reference import Model, Reference
from oracle.results import Report, RungResult
from oracle.verbs import arguments

CONFIG = models.MODELS["llama"] | {"num_hidden_layers": 1, "max_position_embeddings": 24}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a model's folder, and `run`, the checkpoint imported from it."""
    place = tmp_path_factory.mktemp("bad")
    subject.import_folder(models.write(CONFIG, place / "hf", "float32", seed=5), place / "run")
    return place


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a comparison says to standard error, with exit code 2."""

    def run(*given: object, verb: str = "compare", code: int = 2) -> str:
        assert main([verb, *map(str, given)]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("oracle: ")
        assert printed.err.count("\n") == 1, printed.err
        return printed.err.removeprefix("oracle: ").rstrip("\n")

    return run


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch):
    """Nothing heavy may begin."""

    def heavy(*_: object, **__: object) -> None:
        raise AssertionError("arrays were read")

    monkeypatch.setattr(checkpoint, "load", heavy)
    monkeypatch.setattr(Reference, "load", heavy)


# -- Another model ---------------------------------------------------------------------


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("verb", ["compare", "bisect"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (models.MODELS["gpt2"], "is a gpt2 model, the checkpoint a llama model; give --reference the folder that the"),
        (CONFIG | {"vocab_size": 50257}, "has vocab_size 50,257, the checkpoint 131; give --reference the folder that"),
        (CONFIG | {"hidden_size": 48}, "has hidden_size 48, the checkpoint 42; give --reference the folder"),
        (CONFIG | {"num_hidden_layers": 3}, "has num_hidden_layers 3, the checkpoint 1; give --reference the folder"),
        (CONFIG | {"intermediate_size": "wide"}, "has intermediate_size 'wide', the checkpoint 52; give --reference"),
        (
            CONFIG | {"model_type": "mamba"},
            "is a model of type 'mamba'; the oracle knows gpt2, llama, mistral, qwen2, qwen3",
        ),
    ],
)
def test_a_reference_of_another_model_is_refused_before_anything_is_read(
    place: Path, said: Callable[..., str], tmp_path: Path, verb: str, config: dict[str, Any], message: str
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = said(place / "run", "--reference", tmp_path, verb=verb)
    assert told.startswith(f"{tmp_path} {message}")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            "{} has no config.json; --reference takes a Hugging Face model folder; "
            "without it the checkpoint's own export is compared",
        ),
        ("{", "{}/config.json is not readable JSON; restore it"),
        ("[]", "{}/config.json is not a JSON object; restore it"),
        ("[" * 100_000, "{}/config.json is not readable JSON; restore it"),
        (
            '{"model_type": ["llama"]}',
            "{} is a model of type ['llama']; the oracle knows gpt2, llama, mistral, qwen2, qwen3",
        ),
    ],
)
def test_a_folder_without_a_readable_config_is_refused(
    place: Path, said: Callable[..., str], tmp_path: Path, text: str | None, message: str
):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert said(place / "run", "--reference", tmp_path) == message.format(tmp_path)


def test_tensors_of_other_shapes_than_their_config_says_are_refused(
    place: Path, said: Callable[..., str], tmp_path: Path
):
    shutil.copytree(place / "hf", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    told = said(place / "run", "--reference", tmp_path)
    assert told.endswith("have other shapes: model.layers.0.mlp.up_proj.weight (file [42, 52], model [52, 42])")


def test_a_fault_of_the_config_translation_is_no_bad_input(place: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-6, "model_type": "qwen2"}))
    preconditions.check(place / "run", tmp_path, "float32")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_the_folder_is_refused_and_not_waited_for(
    place: Path, said: Callable[..., str], tmp_path: Path, name: str
):
    folder = tmp_path / "hf"
    shutil.copytree(place / "hf", folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    wanted = f"{folder / name} is a pipe or device, not a file; give a folder of model files"
    assert said(place / "run", "--reference", folder) == wanted
    if name != "tokenizer.json":
        told = said("--reference", folder, "--out", tmp_path / "x.trace", verb="record")
        assert f"{folder / name} is a folder, pipe or device, not a file" in told


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "config.json",
            {"eos_token_id": "a"},
            "config.json: eos_token_id is 'a'; expected an integer or a list of them",
        ),
        ("generation_config.json", {"eos_token_id": [[]]}, "generation_config.json: eos_token_id is [[]]; expected an"),
        ("config.json", {"max_position_embeddings": 0}, "max_position_embeddings is 0; expected 1 or more"),
        ("config.json", {"max_position_embeddings": "9"}, "max_position_embeddings is '9'; expected 1 or more"),
    ],
)
def test_values_that_no_model_has_are_quoted_as_they_are(
    place: Path, said: Callable[..., str], tmp_path: Path, name: str, changes: dict[str, Any], message: str
):
    shutil.copytree(place / "hf", tmp_path, dirs_exist_ok=True)
    file = tmp_path / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))
    assert message in said(place / "run", "--reference", tmp_path)


def test_what_may_not_be_read_is_bad_input(place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "run/manifest.json")

    monkeypatch.setattr(checkpoint, "describe", denied)
    wanted = "run/manifest.json: permission denied; give a path that this user may read and write"
    assert said(place / "run") == wanted


@pytest.mark.usefixtures("light")
def test_two_results_in_one_file_are_refused_before_the_work(place: Path, said: Callable[..., str], tmp_path: Path):
    out = tmp_path / "out"
    assert said(place / "run", "--html", out, "--json", out) == f"--html: {out} is the file of --json too; name another"
    assert not out.exists()


# -- Another kind of folder ------------------------------------------------------------


@pytest.mark.usefixtures("light")
def test_a_folder_of_the_other_kind_is_told_by_name(place: Path, said: Callable[..., str]):
    wanted = f"is a Hugging Face folder, no checkpoint; `jaxgpt import {place / 'hf'} DIR` makes one of it"
    assert said(place / "hf") == f"{place / 'hf'} {wanted}"
    assert said(place) == f"{place} holds no checkpoint itself; give one of its folders: run"


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("verb", ["compare", "bisect", "record"])
@pytest.mark.parametrize("what", ["run", "run/step-00000000"])
def test_a_checkpoint_as_reference_is_told_how_to_become_a_folder(
    place: Path, said: Callable[..., str], tmp_path: Path, verb: str, what: str
):
    given = ["--out", tmp_path / "t"] if verb == "record" else [place / "run"]
    remedy = f"`jaxgpt export {place / what} DIR --format hf` makes one of it"
    wanted = f"{place / what} is a jaxgpt checkpoint; --reference takes a Hugging Face model folder: {remedy}"
    assert said(*given, "--reference", place / what, verb=verb) == wanted


@pytest.mark.usefixtures("light")
def test_a_reference_with_fewer_learned_positions_is_refused(said: Callable[..., str], tmp_path: Path):
    config = models.MODELS["gpt2"] | {"n_layer": 1, "n_positions": 24}
    subject.import_folder(models.write(config, tmp_path / "hf", "float32"), tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_positions": 20}))
    told = said(tmp_path / "run", "--reference", tmp_path)
    assert told.startswith(f"{tmp_path} has 20 learned positions, the checkpoint 24; give --reference the folder that")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", ["vocab_size", "max_position_embeddings"])
def test_a_model_too_small_to_compare_is_refused(place: Path, said: Callable[..., str], tmp_path: Path, name: str):
    subject.import_folder(models.write(CONFIG | {name: 1}, tmp_path / "hf", "float32", seed=5), tmp_path / "run")
    told = said(tmp_path / "run", "--reference", place / "hf")
    assert told.startswith(f"the checkpoint has {name} 1: too small to compare, which takes 2 ")


@pytest.mark.usefixtures("light")
def test_what_a_terminal_would_obey_is_written_out(place: Path, said: Callable[..., str]):
    assert said(place / "x\x1b[31m\ny").endswith(
        "/x\\x1b[31m\\ny is no folder; give a run folder, with steps such as step-00000120"
    )
    assert said("a" * 5000).endswith("aaa/manifest.json: File name too long; give a shorter path")
    assert said(place / "run", "--html", "a" * 5000).endswith("cannot be a file: File name too long; name another")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"factor": factor}, f"its factor is {shown}, expected a number from 1 to 100")
            for factor, shown in (
                (float("nan"), "nan"),
                (0, "0"),
                (-4.0, "-4.0"),
                (1e308, "1e+308"),
                ("4", "'4'"),
                ([4], "[4]"),
                (True, "True"),
                (None, "None"),
            )
        ),
        ({"factor": 10**400}, "0000000000, expected a number from 1 to 100"),
        ({"version": True}, "its version is True, expected 2"),
        ({"version": [2]}, "its version is [2], expected 2"),
        ({"environment": []}, "its environment is no table"),
        ({"maxima": 5}, "its maxima are 5, expected [aggregate, worst] by rung, dtype and op"),
        ({"maxima": {"forward": 5}}, "its maxima hold no two ratios at forward, expected"),
        *(
            ({"maxima": {"forward": {"float32": {"norm": pair}}}}, f"{shown} at forward float32 norm, expected")
            for pair, shown in (
                ([1.0], "[1.0]"),
                ([1.0, "2"], "[1.0, '2']"),
                ([1.0, -2.0], "[1.0, -2.0]"),
                ([1.0, float("inf")], "[1.0, inf]"),
                ([1.0, float("nan")], "[1.0, nan]"),
            )
        ),
    ],
)
def test_values_that_no_calibration_has_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    file = tmp_path / "c.json"
    file.write_text(json.dumps(json.loads(noise.CALIBRATION.read_text()) | change))
    with pytest.raises(InputError) as error:
        noise.load(file)
    assert str(error.value).startswith(f"{file} is not a calibration: its ")
    assert message in str(error.value)


def test_a_calibration_nested_too_deeply_is_refused(tmp_path: Path):
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not a calibration; `python -m oracle calibrate"):
        noise.load(tmp_path / "c.json")


def test_an_environment_nested_too_deeply_is_no_report(said: Callable[..., str], tmp_path: Path):
    deep: dict[str, Any] = {}
    for _ in range(600):
        deep = {"a": deep}
    report = Report([RungResult("bits", [], "")], [], {}).to_dict()
    (tmp_path / "r.json").write_text(json.dumps({**report, "environment": deep}))
    told = said(tmp_path / "r.json", verb="report")
    assert told.startswith(f"{tmp_path / 'r.json'}: values nested too deeply; give a file that")


# -- Damage ----------------------------------------------------------------------------


def test_a_checkpoint_that_fails_its_manifest_is_refused(place: Path, said: Callable[..., str], tmp_path: Path):
    shutil.copytree(place / "run", tmp_path / "run")
    array = max((tmp_path / "run").rglob("*/params/*/c/*/*"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[7] ^= 1
    array.write_bytes(content)
    told = said(tmp_path / "run", "--reference", place / "hf")
    assert re.fullmatch(r"checkpoint step 0: params/\S+ fails SHA-256; restore it or load an older step", told)


def broken_checkpoint(place: Path, out: Path, value: float) -> Checkpoint:
    loaded = checkpoint.load(place / "run")
    params = {name: np.array(array) for name, array in loaded.params.items()}
    params["layers.0.mlp.up.kernel"][2, 3] = value
    contents = Contents(loaded.config, params, "base", "float32", [], None, None, {})
    checkpoint.save(out, 0, contents).result()
    return checkpoint.load(out)


@pytest.mark.exhaustive
def test_weights_that_are_nan_are_the_models_fault(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken_checkpoint(place, tmp_path, np.nan)
    for reference in ([], ["--reference", str(place / "hf")]):
        assert main(["bisect", str(tmp_path), *reference]) == 1
        printed = capsys.readouterr().out
        assert printed.startswith("FAIL. First divergence: layers.0.mlp.up.kernel, ")
        assert "NaN or infinite values" in printed.splitlines()[0]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_reference_with_nan_is_bad_input(place: Path, said: Callable[..., str], tmp_path: Path, value: float):
    shutil.copytree(place / "hf", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, :2] = value
    save_file(tensors, tmp_path / "model.safetensors")
    told = said(place / "run", "--reference", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert told == f"{tmp_path}: 2 values of {name} are NaN or infinite; a reference must be whole"


def test_a_tap_that_the_forward_lacks_is_the_models_fault(place: Path):
    def forward(*given: Any, **named: Any) -> product.Output:
        made = product.forward(*given, **named)
        taps = {tap: value for tap, value in made.taps.items() if tap != "layers.0.attn.q_rope"}
        return made._replace(taps=taps)

    def plant(true: Candidate) -> Candidate:
        return dataclasses.replace(true, forward_pass=forward)

    report = subject.compare(place / "run", place / "hf", "float32", ladder.uncalibrated(), plant=plant, diagnose=True)
    first = report.first_divergence()
    assert report.verdict == "fail"
    assert first is not None
    assert first["problem"] == "the forward has no tap layers.0.attn.q_rope"


# -- Torch -----------------------------------------------------------------------------


def test_a_torch_that_cannot_be_imported_is_told_apart_from_none(tmp_path: Path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "oracle", "compare", "x"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    problem = "torch is installed but cannot be imported: libcudart.so.13: cannot open shared object file"
    assert run.stderr == f"oracle: {problem}; install it anew\n"


def test_without_torch_the_message_is_the_command_of_the_readme(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    told = said("x")
    command = re.search(r"pip install \S+$", told)
    assert command is not None
    assert command[0] in (Path(__file__).parent.parent / "README.md").read_text()


# -- Room ------------------------------------------------------------------------------


@pytest.mark.usefixtures("light")
def test_a_model_too_large_for_memory_is_refused_before_it_is_loaded(
    place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "available", lambda: 300_000_000)
    told = said(place / "run", "--reference", place / "hf", "--dtype", "bfloat16")
    assert re.fullmatch(
        r"comparing 27,090 parameters in bfloat16 needs about 1\.\d GB of memory, 300\.0 MB are free; "
        r"close other programs, or compare on a larger machine",
        told,
    )


def test_the_memory_that_is_asked_for_is_that_of_measured_runs():
    gpt2: dict[str, Any] = {
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "num_hidden_layers": 12,
    }
    base = ModelConfig(**gpt2, vocab_size=50257, hidden_size=768, intermediate_size=3072, max_position_embeddings=1024)
    middle = dataclasses.replace(
        base, vocab_size=16384, hidden_size=512, intermediate_size=2048, max_position_embeddings=512,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    # Peaks of `compare --all` on two cores, in GiB: GPT-2 124M (4.2 to 4.8), and one of 12 layers of width 512.
    for config, peak in ((base, 4.8), (middle, 2.47)):
        count = sum(math.prod(parameter.shape) for parameter in weights.parameters(config))
        parameters = {"all": {"shape": (count,), "dtype": "float32"}}
        for dtype in ("float32", "bfloat16"):
            assert peak < preconditions.needed(config, parameters, dtype) / 2**30 < 1.3 * peak
    # Of a large model gradients are more than activations: both models', the truth, and two gradients in float32.
    large = {"all": {"shape": (7_000_000_000,), "dtype": "bfloat16"}}
    assert preconditions.needed(base, large, "bfloat16") > (2 + 2 + 8 + 4 + 8) * 7_000_000_000
    assert preconditions.needed(base, {"all": large["all"] | {"dtype": "float32"}}, "float32") > 24 * 7_000_000_000


def test_what_is_free_is_the_smaller_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert memory.available() is None or memory.available() > 0  # type: ignore[operator]
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for name, text in (("memory.max", "5000"), ("memory.current", "3000"), ("memory.stat", "x 1\ninactive_file 500")):
        (tmp_path / name).write_text(text)
    assert memory.available() == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() != 2500


def test_a_full_disk_is_told_with_what_to_do(place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = said(place / "run")
    assert told.startswith("the export needs 108.4 KB in ")
    assert told.endswith(", 1.0 KB are free; make room there, or set TMPDIR to a folder with more")


def test_a_disk_that_fills_during_the_export_is_told_with_what_to_do(
    place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.safetensors_file, "write", full)
    told = said(place / "run")
    assert re.fullmatch(r"\S+/export was not written: No space left on device; make room there, or set TMPDIR .*", told)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert said(place / "run").startswith("no temporary folder can be made: No space left on device; make room")


# -- The oracle's own faults -----------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError, RuntimeError])
def test_an_exception_of_the_reference_is_exit_code_4(
    place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
):
    def broken(*_: object, **__: object) -> None:
        raise error("a bug of the reference")

    monkeypatch.setattr(Model, "_forward", broken)
    told = said(place / "run", code=4)
    assert told == f"broke with {error.__name__}: a bug of the reference (--debug shows where)"


def test_a_panic_of_a_library_is_no_exit_code_1(place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):
        """As Rust code raises it: no `Exception`."""

    def panics(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(subject, "compare", panics)
    assert said(place / "run", code=4) == "broke with PanicException: index out of bounds (--debug shows where)"


@pytest.mark.parametrize("rung", ["operators", "forward"])
def test_an_exception_inside_a_rung_is_not_the_models_fault(
    place: Path, monkeypatch: pytest.MonkeyPatch, rung: str, tmp_path: Path
):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug of the oracle")

    candidate, reference = subject.candidate(place / "run", "float32"), Reference.load(place / "hf", "float32")
    comparison = Comparison(candidate, reference, None, place / "hf", Calibration(1.0, {}, {}))
    monkeypatch.setattr(type(comparison.judge(rung)), "finding", broken)
    with pytest.raises(ValueError, match="a bug of the oracle"):
        ladder.climb(comparison, rungs=(rung,))


def test_unreadable_tokenizer_files_of_the_reference_are_bad_input(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    class PanicException(BaseException):
        pass

    def panics(*_: object) -> None:
        raise PanicException("regex is too large")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(text_reference, "_of_tokenizer_json", panics)
    with pytest.raises(InputError, match="cannot be read: regex is too large; restore them"):
        text_reference.of_folder(tmp_path, "the reference")


# -- Interrupts ------------------------------------------------------------------------


def test_an_interrupt_is_exit_code_130_and_leaves_nothing(
    place: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def interrupt(name: str) -> None:
        if name == "bits":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(arguments, "progress", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert said(place / "run", code=130) == "interrupted"
    assert list(tmp_path.iterdir()) == []
