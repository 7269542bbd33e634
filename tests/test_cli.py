"""The command line as a user and as a program meets it."""

import io
import json
import os
import signal
import subprocess
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jaxgpt import cli
from jaxgpt.errors import InputError
from jaxgpt.verbs.output import Output, printable

HEAVY = {"numpy", "jaxtyping", "jax", "flax", "orbax", "rich", "prompt_toolkit", "tiktoken", "tensorboardX"}


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr of a command that ends with exit code 2 and no output."""
    code = run(*words)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("jaxgpt: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("jaxgpt: ").rstrip("\n")


# -- Starting --------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["data"], ["sft", "--help"], ["chta"], ["sft", "--stesp", "1"]])
def test_help_and_refusals_import_nothing_heavy(words: list[str]):
    code = f"import sys; from jaxgpt import cli; cli.main({words!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stderr.splitlines()[-1].split()
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()
    assert [name for name in loaded if name.startswith("jaxgpt.verbs")] == []


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"  {verb.name}" in printed
        assert f" {verb.summary}\n" in printed
    assert "jaxgpt chat assistant" in printed
    assert run() == 0
    assert capsys.readouterr().out == printed


def test_every_verb_has_help_and_a_function(capsys: pytest.CaptureFixture[str]):
    from importlib import import_module

    for verb in cli.VERBS:
        assert run(*verb.name.split(), "--help") == 0
        assert capsys.readouterr().out.startswith(f"usage: jaxgpt {verb.name} ")
        module, _, function = verb.run.partition(":")
        assert callable(getattr(import_module(f"jaxgpt.verbs.{module}"), function))


def test_help_after_two_dashes_is_text(capsys: pytest.CaptureFixture[str]):
    assert "no checkpoint" in refusal(capsys, "generate", "tests", "--", "--help")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]):
    import jaxgpt

    assert run("--version") == 0
    assert capsys.readouterr().out == f"jaxgpt {jaxgpt.__version__}\n"


# -- Ending ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chta", "x"], "unknown verb 'chta'; the nearest is chat; see `jaxgpt --help`"),
        (["data", "encdoe"], "unknown verb 'data encdoe'; the nearest is data encode; see `jaxgpt --help`"),
        (["--json", "chat"], "the verb comes first, got --json"),
        (["chat"], "DIRECTORY is missing (checkpoint folder)"),
        (["chat", "d", "--raw", "--chat"], "--raw and --chat exclude each other; drop one"),
        (["chat", "d", "--raw", "--system", "x"], "--system needs the chat template"),
        (["chat", "d", "hi", "--greedy", "--temperature", "1"], "--greedy and --temperature 1 contradict; drop one"),
        (["chat", "d", "hi", "--num-samples", "2"], "add --temperature 0.8"),
        (["chat", "d", "--num-samples", "2", "--temperature", "1"], "--num-samples needs a message"),
        (["chat", "d", "--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["chat", "d", "--min-p", "-0.1"], "min_p must be in [0, 1], got -0.1"),
        (["chat", "d", "--repetition-penalty", "0"], "repetition_penalty must be in 0.01–100, 1 for none, got 0.0"),
        (["chat", "d", "--repetition-penalty", "nan"], "got nan"),
        (["chat", "d", "--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size must be ≥ 0, got -1"),
        (["chat", "d", "--logprobs"], "--logprobs are printed as JSON only; add --json"),
        (["generate", "d"], "expected prompts, --messages FILE or --ids, got none of them"),
        (["generate", "d", "x", "--ids", "1"], "got several of them"),
        (["generate", "d", "--ids", "1,x"], "--ids must be integers, got '1,x'; write --ids 464,2068"),
        (["generate", "d", "x", "--temperature", "-1"], "temperature must be in 0–1,000,000, got -1.0"),
        (["generate", "nowhere", "x"], "nowhere is no folder"),
        (["generate", "d", "--messages", "nowhere.json"], "nowhere.json is not a file"),
        (["pretrain"], "--out is missing"),
        (["pretrain", "--out", "x"], "--data is missing"),
        (["pretrain", "--out", "x", "--resume", "--steps", "5"], "got --steps too; drop it"),
        (["sft", "--out", "x", "--data", "y"], "--model is missing"),
        (["sft", "--out", "x", "--model", "y"], "--data is missing"),
        (["sft", "--device", "tpu"], "--device must be one of auto, cpu, gpu; got 'tpu'"),
        (["data", "encode", "stdlib"], "--out is missing; give the folder"),
        (["data", "encode", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["data", "encode", "stdlib", "--out", "x", "--workers", "0"], "workers must be at least 1, got 0"),
        (["data", "inspect", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["inspect", "nowhere"], "nowhere is no folder"),
        (["bench", "d", "--iterations", "0"], "iterations must be at least 1, got 0"),
        (["import", "nowhere", "x"], "nowhere does not exist; give a Hugging Face folder or a .pt file"),
        (["export", "nowhere", "x"], "nowhere is no folder"),
        (["export", "d", "x", "--format", "onnx"], "--format must be one of hf, gguf; got 'onnx'"),
        (["export", "d", "x", "--dtype", "q8_0"], "--dtype q8_0 needs --format gguf"),
        (["export", "nowhere", "x", "--format", "gguf"], "nowhere is no folder"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_what_a_user_typed_cannot_break_the_line(capsys: pytest.CaptureFixture[str]):
    assert refusal(capsys, "generate", "a\nb\x1b[2J", "x").startswith(str(Path.cwd() / "a\\nb\\x1b[2J"))


def replaced(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
    def broken(settings: object, output: Output) -> int:
        raise raised

    monkeypatch.setattr("jaxgpt.verbs.look.inspect", broken)


def test_ctrl_c_ends_quietly_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    replaced(monkeypatch, KeyboardInterrupt())
    assert run("inspect", "x") == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_every_verb_as_ctrl_c_does(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxgpt.verbs.look.inspect", lambda *_: signal.raise_signal(number) or 0)
    assert run("inspect", "x") == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("after", [ImportError("half"), None])
def test_a_command_whose_interrupt_was_swallowed_is_not_done(
    after: Exception | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def swallowing(settings: object, output: Output) -> int:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        if after:
            raise after
        return 0

    monkeypatch.setattr("jaxgpt.verbs.look.inspect", swallowing)
    assert run("inspect", "x") == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_shows_its_traceback_and_where_to_report_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    replaced(monkeypatch, ZeroDivisionError("here"))
    assert run("inspect", "x") == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "ZeroDivisionError: here" in printed
    assert "this is a bug in jaxgpt" in printed.splitlines()[-1]


def test_debug_shows_where_input_was_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    replaced(monkeypatch, InputError("no"))
    assert run("inspect", "x", "--debug") == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1] == "jaxgpt: no"


def test_a_file_that_may_not_be_used_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    replaced(monkeypatch, PermissionError(13, "Permission denied", "/x/y"))
    assert refusal(capsys, "inspect", "x") == "/x/y: Permission denied; check that it exists and may be used"


def test_a_reader_that_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "jaxgpt.cli", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


JAXGPT = f"{sys.executable} -m jaxgpt.cli"
FULL = "jaxgpt: writing failed: No space left on device; check the disk, and where standard output and error go\n"
CLOSED = "jaxgpt: standard {} is closed; send it to a file, or to /dev/null\n"
JSON = """-c 'import sys; from jaxgpt import cli; from jaxgpt.verbs import look
look.inspect = lambda settings, output: output.result({}) or 0; sys.exit(cli.main(["inspect", "x", "--json"]))'"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{JAXGPT} --help >/dev/full", FULL),
        (f"{sys.executable} {JSON} >/dev/full", FULL),
        (f"{JAXGPT} chta 2>/dev/full", ""),
        (f"{JAXGPT} --help >&-", CLOSED.format("output")),
        (f"{JAXGPT} --help 2>&-", CLOSED.format("error")),
        (
            f"mkdir $'caf\\xe9'; cd caf*; {JAXGPT} inspect x 2>&1 | sed 's:/.*/::'; exit ${{PIPESTATUS[0]}}",
            "jaxgpt: the working directory 'caf\\udce9' is not UTF-8; change to another\n",
        ),
        (f"rmdir $PWD; {JAXGPT} inspect x", "jaxgpt: the working directory is gone; change to another\n"),
    ],
)
def test_streams_and_a_folder_that_cannot_be_used_get_one_line(
    command: str, said: str, unbuffered: str, tmp_path: Path
):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (2, said)


def test_a_setting_of_the_environment_that_jax_refuses_gets_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxgpt.cli", "generate", tmp_path, "x"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "abc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith('jaxgpt: JAX cannot be imported: Invalid value "abc" for JAX flag jax_num_cpu_dev')
    assert "JAX_NUM_CPU_DEVICES" in done.stderr.partition("; correct or unset ")[2]
    assert done.stderr.count("\n") == 1


# -- Output ----------------------------------------------------------------------------

NOISE = """
import os, sys
from jaxgpt.settings import OutputSettings
from jaxgpt.verbs.output import Output
with Output.opened(OutputSettings(json=True), ()) as output:
    print("python noise")
    os.write(1, b"native noise\\n")
    output.say("for people")
    output.result({"a": float("nan"), "b": [1.5, "ü"]})
print("after")
"""


def test_with_json_stdout_carries_json_only():
    done = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True)
    assert done.stdout == '{"a": null, "b": [1.5, "ü"]}\nafter\n'
    assert sorted(done.stderr.splitlines()) == ["for people", "native noise", "python noise"]


def test_generated_text_cannot_steer_a_terminal():
    assert printable("a\x1b[2Jb\r\x07\x9b\n\tü") == "a^[[2Jb^M^G\\x9b\n\tü"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_text_is_made_printable_for_terminals_only(monkeypatch: pytest.MonkeyPatch):
    from jaxgpt.settings import OutputSettings

    for stream, expected in ((Terminal(), "^[x\n"), (io.StringIO(), "\x1bx\n")):
        Output(OutputSettings(), (), stream).say("\x1bx")
        assert stream.getvalue() == expected


# -- Verbs that hand over --------------------------------------------------------------


def test_training_verbs_pass_their_settings_and_print_the_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from jaxgpt import train
    from jaxgpt.training_loop import TrainResult

    got: list[Any] = []

    def fake(settings: Any) -> TrainResult:
        got.append(settings)
        validated_at = 7 if got[0].out == "steps" else 4
        return TrainResult("runs/x", 7, float("nan"), 1.5, validated_at, 1.5, got[0].out or "steps", 100, 2.0)

    monkeypatch.setattr(train, "pretrain", fake)
    monkeypatch.setattr(train, "sft", fake)
    assert run("pretrain", "--data", "d", "--out", "steps", "--preset", "gpt2", "--steps", 7, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["loss"], result["validation_loss"], result["validated_at"]) == (7, None, 1.5, 7)
    assert (got[0].data, got[0].model.preset, got[0].train.steps) == ("d", "gpt2", 7)
    got.clear()
    assert run("sft", "--model", "m", "--data", "d", "--out", "signal", "--no-pack") == 130
    assert not got[0].pack
    assert "step 7: validation loss 1.5000 (of step 4); saved in runs/x" in capsys.readouterr().out


def test_check_prints_each_line_and_fails_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    import jaxgpt
    from jaxgpt.checks.report import CheckLine, CheckReport

    lines = (CheckLine("a", "PASS", "fine"), CheckLine("b", "FAIL", "step 3"))
    asked: list[Any] = []

    def check(directory: str, *, report: Any, **also: Any) -> CheckReport:
        asked.append((directory, also))
        for line in lines:
            report(line)
        return CheckReport(lines)

    fake: Any = types.ModuleType("jaxgpt.check")
    fake.check = check
    monkeypatch.setitem(sys.modules, "jaxgpt.check", fake)
    monkeypatch.setattr(jaxgpt, "check", fake, raising=False)
    assert run("check", "dir", "--all", "--no-memorize") == 1
    assert capsys.readouterr().out == "PASS a: fine\nFAIL b: step 3\nFAIL: b\n"
    assert asked == [("dir", {"all": True, "memorize": False, "device": "auto"})]
    assert run("check", "dir", "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert "FAIL b: step 3" in captured.err


def test_a_tokenizer_beside_a_checkpoint_that_has_one_is_refused(tmp_path, capsys):
    words = ["data", "encode", "stdlib", "--out", str(tmp_path / "o"), "--model", "m", "--tokenizer", "gpt2"]
    assert cli.main(words) == 2
    assert "--model brings its own tokenizer and template, got --tokenizer too" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
