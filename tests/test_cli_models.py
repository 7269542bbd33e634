"""Verbs that need a checkpoint, through the command line, on a tiny one."""

import dataclasses
import io
import json
import os
import shutil
import signal
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LLAMA, random_params

import jaxgpt
from jaxgpt import checkpoint, cli, golden_prompts, manifest
from jaxgpt.chat import CHATML
from jaxgpt.chat_session import ChatSession
from jaxgpt.checkpoint import Contents
from jaxgpt.generate import Conversation
from jaxgpt.lm import LM, Piece
from jaxgpt.settings import GenerationSettings
from jaxgpt.tokenizer import Tokenizer

ASCII = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same random model as `base` and as `sft`."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.create("char", template=CHATML, corpus=[ASCII])
    config = dataclasses.replace(
        LLAMA, vocab_size=tokenizer.model_vocab_size, num_hidden_layers=1, max_position_embeddings=128
    )
    params = random_params(config)
    for stage in ("base", "sft"):
        contents = Contents(
            config, params, stage, "float32", list(tokenizer.stop_ids), tokenizer, CHATML, {"made": "up"}
        )
        checkpoint.save(folder / stage, 3, contents).result()
    return folder


@pytest.fixture(scope="session")
def lm(models: Path) -> LM:
    return jaxgpt.load(str(models / "sft"))


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code = run(*words)
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    return captured.err.removeprefix("jaxgpt: ").rstrip("\n")


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# -- generate --------------------------------------------------------------------------


def test_generate_prints_the_completion_and_nothing_else(models: Path, lm: LM, capsys: pytest.CaptureFixture[str]):
    assert run("generate", models / "base", "def ", "--max-new-tokens", 12) == 0
    assert capsys.readouterr() == (lm.generate("def ", max_new_tokens=12)[0].text + "\n", "")


def test_generate_prints_a_json_object_for_each_prompt(models: Path, lm: LM, capsys: pytest.CaptureFixture[str]):
    sampling = {"max_new_tokens": 8, "temperature": 1.5, "seed": 3, "top_k": 40}
    flags = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("generate", models / "base", "one", "three", *flags, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = lm.generate(["one", "three"], **sampling)
    assert [line["prompt"] for line in lines] == ["one", "three"]
    assert [(line["ids"], line["text"], line["stop_reason"]) for line in lines] == [
        (done.ids, done.text, done.stop_reason) for done in expected
    ]


def test_logprobs_of_each_token_are_in_the_json_if_asked_for(models: Path, lm: LM, capsys: pytest.CaptureFixture[str]):
    penalised = {"temperature": 1, "top_k": 1, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_p": 0.1}
    flags = [word for name, value in penalised.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("generate", models / "base", "one", *flags, "--max-new-tokens", 8, "--json", "--logprobs") == 0
    (done,) = lm.generate("one", max_new_tokens=8, logprobs=True, **penalised)
    line = json.loads(capsys.readouterr().out)
    assert line["ids"] == done.ids
    assert line["logprobs"] == done.logprobs
    assert done.logprobs is not None
    assert len(done.logprobs) == len(done.ids)
    logits = lm.logits([[*done.prompt_ids, *done.ids]])[0, len(done.prompt_ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert np.abs(expected[np.arange(len(done.ids)), done.ids] - done.logprobs).max() < 1e-4
    assert run("chat", models / "sft", "Hi", "--max-new-tokens", 8, "--json", "--logprobs") == 0
    line = json.loads(capsys.readouterr().out)
    assert len(line["logprobs"]) == len(line["ids"])
    assert run("chat", models / "sft", "Hi", "--max-new-tokens", 8, "--json", "--min-p", 0.5) == 0
    captured = capsys.readouterr()
    assert "logprobs" not in json.loads(captured.out)
    assert "temperature 0 is greedy and ignores min_p; a temperature above 0 uses them" in captured.err


def test_generate_answers_conversations_from_files(
    models: Path, lm: LM, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    expected = [done.text for done in lm.generate([user("Hi"), user("Ho")], max_new_tokens=8)]
    as_list, as_rows = tmp_path / "one.json", tmp_path / "two.jsonl"
    as_list.write_text(json.dumps(user("Hi"), indent=2))
    as_rows.write_text("".join(json.dumps({"messages": user(text)}) + "\n" for text in ("Hi", "Ho")))
    assert run("generate", models / "sft", "--messages", as_list, "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    assert run("generate", models / "sft", "--messages", as_rows, "--max-new-tokens", 8, "--json") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no messages"),
        ("[3]", "has no messages"),
        ("", "is empty"),
        ("{}", "expected `messages`, or `prompt` and `completion`"),
        ("{", "is not JSON"),
        ('[{"role": "cook", "content": "x"}]', "message 1 has role 'cook'; template chatml knows"),
        ('[{"role": "user"}]', "message 1 lacks content"),
        ('{"prompt": "a", "completion": "b"}', "conversation 1 ends with the assistant"),
    ],
)
def test_generate_refuses_files_that_hold_no_question(
    models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
):
    file = tmp_path / "x.json"
    file.write_text(content)
    assert message in refusal(capsys, "generate", models / "sft", "--messages", file)


def test_generate_refuses_what_outgrows_the_context(models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    message = refusal(capsys, "generate", models / "base", "x" * 100, "--max-new-tokens", 64)
    assert message == "prompt is 100 tokens; limit 128 including 64 to generate"
    # The tokens that nobody asked for are as many as there is room for.
    assert run("generate", models / "base", "x" * 100, "y", "--json") == 0
    assert all(len(json.loads(line)["ids"]) <= 28 for line in capsys.readouterr().out.splitlines())
    (tmp_path / "long.toml").write_text("[generation]\nmax_new_tokens = 64\n")
    message = refusal(capsys, "generate", models / "base", "x" * 100, "--config", tmp_path / "long.toml")
    assert message == "prompt is 100 tokens; limit 128 including 64 to generate"
    message = refusal(capsys, "generate", models / "base", "x" * 128)
    assert message == "prompt is 128 tokens; limit 128 including 1 to generate"
    assert refusal(capsys, "generate", models / "base", "--ids", "5,9999") == "token 9999 outside vocabulary 0–383"
    assert "'a\\ud800' is not UTF-8" in refusal(capsys, "generate", models / "base", "a\ud800")


def test_debug_names_the_stop_tokens(models: Path, capsys: pytest.CaptureFixture[str]):
    assert run("generate", models / "sft", "x", "--max-new-tokens", 2, "--debug") == 0
    printed = capsys.readouterr().err
    assert "<|im_end|>" in printed
    assert "<|endoftext|>" in printed
    assert printed.count("stop tokens") == 1


# -- chat ------------------------------------------------------------------------------


def test_the_stage_decides_between_chat_and_raw(models: Path, lm: LM, capsys: pytest.CaptureFixture[str]):
    chat = lm.generate([user("Hi")], max_new_tokens=8)[0].text + "\n"
    raw = lm.generate("Hi", max_new_tokens=8)[0].text + "\n"
    assert chat != raw
    for words, expected in (
        (["sft", "Hi"], chat),
        (["base", "Hi"], raw),
        (["sft", "Hi", "--raw"], raw),
        (["base", "Hi", "--chat"], chat),
    ):
        stage, *rest = words
        assert run("chat", models / stage, *rest, "--max-new-tokens", 8, "--greedy") == 0
        assert capsys.readouterr().out == expected, words


def test_a_system_message_opens_the_conversation(models: Path, lm: LM, capsys: pytest.CaptureFixture[str]):
    messages: Any = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    expected = lm.generate([messages], max_new_tokens=8)[0].text + "\n"
    assert run("chat", models / "sft", "Hi", "--system", "Be brief.", "--max-new-tokens", 8) == 0
    assert capsys.readouterr().out == expected
    assert "is a base model; add --chat" in refusal(capsys, "chat", models / "base", "Hi", "--system", "Be brief.")


def test_samples_are_those_of_consecutive_seeds(models: Path, lm: LM, capsys: pytest.CaptureFixture[str]):
    words = ["--num-samples", 3, "--temperature", 1.0, "--seed", 5, "--max-new-tokens", 8, "--json"]
    assert run("chat", models / "sft", "Hi", *words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [lm.generate([user("Hi")], max_new_tokens=8, temperature=1.0, seed=s)[0].text for s in (5, 6, 7)]
    assert [line["text"] for line in lines] == expected
    assert [line["seed"] for line in lines] == [5, 6, 7]
    assert len(set(expected)) == 3


def joined(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_remembers(
    models: Path, lm: LM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    typed(monkeypatch, "Hi", "", "Again", "/quit", "never read")
    assert run("chat", models / "sft", "--max-new-tokens", 6, "--json") == 0
    replies = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    session = ChatSession(lm, settings=GenerationSettings(max_new_tokens=6))
    assert replies == [joined(session.send("Hi")), joined(session.send("Again"))]
    assert replies[1] != joined(ChatSession(lm, settings=session.settings).send("Again"))


def test_commands_change_save_and_load_a_conversation(
    models: Path, lm: LM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "talk.json"
    lines = ["Hi", "/regen", "/set temperature 1.5", "/regen", f"/save {file}", "/system Sir.", f"/load {file}", "/set"]
    typed(monkeypatch, *lines, f"/save {file}")
    assert run("chat", models / "sft", "--max-new-tokens", 6, "--seed", 4) == 0
    captured = capsys.readouterr()
    saved = json.loads(file.read_text())["messages"]
    greedy = lm.generate([user("Hi")], max_new_tokens=6)[0].text
    sampled = lm.generate([user("Hi")], max_new_tokens=6, temperature=1.5, seed=6)[0].text
    assert captured.out == f"{greedy}\n{greedy}\n{sampled}\n"
    assert saved == [*user("Hi"), {"role": "assistant", "content": sampled}]
    for expected in ("the reply will be the same", "temperature=1.5", "seed=6", "(new conversation)", "(2 messages, "):
        assert expected in captured.err, expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/regne", "unknown command /regne; the nearest is /regen; a space before it makes it a message"),
        ("/regen", "there is no reply to generate again; send a message first"),
        ("/set warmth 3", "unknown setting warmth; the nearest is "),
        ("/set temperature", "/set temperature needs a value (0 is greedy"),
        ("/set temperature hot", "--temperature must be a number, got 'hot'"),
        ("/set top-p 7", "top_p must be in (0, 1], got 7.0"),
        ("/set repetition-penalty 0", "repetition_penalty must be in 0.01–100"),
        ("/set no-repeat-ngram-size 3", "temperature 0 is greedy and ignores no_repeat_ngram_size"),
        ("/save", "/save needs a file name"),
        ("/save x", "nothing was said yet"),
        ("/load nowhere.json", "nowhere.json is not a file"),
        ("x" * 200, "limit 128"),
    ],
)
def test_a_mistake_in_a_conversation_gets_a_line_and_the_conversation_goes_on(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, message: str
):
    typed(monkeypatch, line, "/help")
    assert run("chat", models / "sft") == 0
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[0]
    assert "/regen the last reply again" in captured.err
    assert captured.out == ""


def test_a_line_that_is_not_utf8_gets_a_line_and_the_conversation_goes_on(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n/help\n"), "utf-8"))
    assert run("chat", models / "sft") == 0
    lines = capsys.readouterr().err.splitlines()
    assert "not valid Unicode at character 0 (U+DCFF)" in lines[0]
    assert "/regen the last reply again" in "\n".join(lines)


def test_at_a_terminal_it_edits_lines_and_says_what_is_left(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    keyboard, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(os.dup(terminal), "r") as lines, os.fdopen(os.dup(terminal), "w") as screen:
        monkeypatch.setattr("sys.stdin", lines)
        monkeypatch.setattr("sys.stdout", screen)
        os.write(keyboard, b"i\x01H\r/quit\r")  # Ctrl-A goes back to the beginning
        assert run("chat", models / "sft", "--max-new-tokens", 2) == 0
        screen.flush()
    shown = os.read(keyboard, 100_000).decode()
    os.close(terminal)
    os.close(keyboard)
    assert "tokens lef" in shown, "the last letter of the last column is moved into place"
    assert "+Hi\n" in next(tmp_path.rglob("chat_history")).read_text()


def test_saving_does_not_overwrite_a_file_of_the_user(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "mine.txt"
    file.write_text("precious")
    typed(monkeypatch, "Hi", f"/save {file}")
    assert run("chat", models / "sft", "--max-new-tokens", 2) == 0
    assert "exists; choose another name" in capsys.readouterr().err
    assert file.read_text() == "precious"


def test_a_home_folder_that_nobody_has_ends_no_conversation(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    typed(monkeypatch, "Hi", "/save ~nobody-here/x", "/load ~nobody-here/x")
    assert run("chat", models / "sft", "--max-new-tokens", 2) == 0
    assert capsys.readouterr().err.count("~nobody-here/x: that user has no home folder here") == 2


def test_chat_without_standard_input_is_refused(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", None)
    assert run("chat", models / "sft") == 2
    assert capsys.readouterr().err.startswith("jaxgpt: standard input is closed; give it lines to answer, or --mess")


def test_ctrl_c_stops_one_reply_and_keeps_the_conversation(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    original = Conversation.chunks
    turns: list[int] = []

    def interrupted(self: Conversation, *args: Any) -> Iterator[Any]:
        turns.append(0)
        for chunk in original(self, *args):
            if len(turns) == 1:
                signal.raise_signal(signal.SIGINT)
            turns[-1] += 1
            yield chunk

    monkeypatch.setattr(Conversation, "chunks", interrupted)
    file = tmp_path / "talk.json"
    typed(monkeypatch, "Hi", "Go on", f"/save {file}")
    assert run("chat", models / "sft", "--max-new-tokens", 12) == 0
    assert "(stopped)" in capsys.readouterr().err
    assert turns[0] == 1 < turns[1]
    roles = [message["role"] for message in json.loads(file.read_text())["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_context_that_fills_up_is_announced_before_it_fails(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    typed(monkeypatch, *["a" * 20] * 4)
    assert run("chat", models / "sft", "--max-new-tokens", 16) == 0
    lines = capsys.readouterr().err.splitlines()
    announced = next(i for i, line in enumerate(lines) if "tokens are left in this conversation" in line)
    failed = next(i for i, line in enumerate(lines) if "limit 128; start over" in line)
    assert announced < failed


# -- inspect, bench, import, export ----------------------------------------------------


def test_inspect_prints_the_usual_keys_and_every_tensor_as_json(
    models: Path, lm: LM, capsys: pytest.CaptureFixture[str]
):
    run("inspect", models / "base", "--json")
    found = json.loads(capsys.readouterr().out)
    config = lm.config
    for key in (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
        *("vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
    ):
        assert found[key] == getattr(config, key)
    assert found["stage"] == "base"
    assert found["parameters"].keys() == lm.params.keys()
    kernel = found["parameters"]["layers.0.mlp.up.kernel"]
    array = np.asarray(lm.params["layers.0.mlp.up.kernel"])
    assert kernel["shape"] == list(array.shape)
    assert kernel["dtype"] == "float32"
    assert kernel["std"] == pytest.approx(array.std(), rel=1e-5)
    assert kernel["first"] == [float(value) for value in array.flat[:4]]


def test_inspect_names_tensors_that_cannot_be_right(models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    loaded = checkpoint.load(models / "base")
    params = {**loaded.params, "final_norm.weight": loaded.params["final_norm.weight"] * 1e6}
    contents = Contents(loaded.config, params, "base", "float32", [], loaded.tokenizer, None, {})
    checkpoint.save(tmp_path / "odd", 0, contents).result()
    assert run("inspect", tmp_path / "odd", "--tensors") == 1
    lines = capsys.readouterr().out.splitlines()
    (alarm,) = [i for i, line in enumerate(lines) if "ALARM" in line and "norm weights" in line]
    assert lines[alarm - 1].startswith("final_norm.weight")


COPY = "copy_bandwidth_gb_per_second"


def test_bench_ends_with_json_and_fails_below_the_floor(models: Path, capsys: pytest.CaptureFixture[str]):
    assert run("bench", models / "base", "--iterations", 2, "--max-tokens", 8) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["passed"] is True
    assert result["compile_count_after_warm_up"] == 0
    # Of two runs the median is the mean: reading the prompt is part of each.
    reading = result["prompt_tokens"] / result["prefill_tokens_per_second"]
    assert reading - 1e-5 <= result["time_to_first_token_seconds"] < reading + 5
    # Nothing else in this process decodes without stop tokens.
    assert 0 < result["compile_count"] < 50
    assert min(result[f"{what}_tokens_per_second"] for what in ("decode", "prefill")) > 0
    read, rate, copied = (result[n] for n in ("bytes_read_per_token", "decode_tokens_per_second", COPY))
    assert result["memory_bandwidth_gb_per_second"] == pytest.approx(read * rate / 1e9, rel=0.01, abs=0.001)
    assert result["memory_bandwidth_use"] == pytest.approx(read * rate / 1e9 / copied, rel=0.01, abs=0.001)
    assert min(result[name] for name in ("decode_mfu", "prefill_mfu", "peak_memory_bytes")) > 0
    assert result["peak_flops_are"] == "a float32 product measured here"
    assert run("bench", models / "base", "--iterations", 1, "--max-tokens", 8, "--floor", 1e12, "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is False
    assert said.err.endswith(" tokens/s are below the floor of 1e+12\n")
    assert "fills the context of 128" in refusal(capsys, "bench", models / "base", "--max-tokens", 128)


def test_export_and_import_give_the_weights_back(models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run("export", models / "base", tmp_path / "hf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == str(tmp_path / "hf")
    assert run("import", tmp_path / "hf", tmp_path / "again") == 0
    assert capsys.readouterr().err == ""
    before, after = checkpoint.load(models / "base").params, checkpoint.load(tmp_path / "again").params
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert run("import", tmp_path / "hf", tmp_path / "half", "--dtype", "bfloat16") == 0
    assert {str(a.dtype) for a in checkpoint.load(tmp_path / "half").params.values()} == {"bfloat16"}
    capsys.readouterr()
    run("inspect", tmp_path / "hf", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "hf"
    assert found["parameters"].keys() == before.keys()


def test_a_dtype_that_is_not_the_noted_one_is_refused_and_what_the_message_says_mends_it(
    models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(golden_prompts, "answered", lambda source: (None, None))
    monkeypatch.setattr(golden_prompts, "add", lambda directory: None)
    step = Path(shutil.copytree(models / "base" / "step-00000003", tmp_path / "step-00000003"))
    described = json.loads((step / "model.json").read_text("utf-8"))
    described["parameters"]["head.weight"]["dtype"] = "bfloat16"
    (step / "model.json").write_text(json.dumps(described), "utf-8")
    manifest.seal(step)
    said = refusal(capsys, "generate", step, "x")
    assert said.endswith(
        "params.head.weight is float32, requested bfloat16; `jaxgpt export --dtype bfloat16` casts it, "
        "`jaxgpt import` makes a checkpoint of that"
    )
    assert run("export", step, tmp_path / "hf", "--dtype", "bfloat16") == 0
    assert run("import", tmp_path / "hf", tmp_path / "mended") == 0
    assert {str(a.dtype) for a in checkpoint.load(tmp_path / "mended").params.values()} == {"bfloat16"}


def test_a_model_without_a_tokenizer_takes_and_gives_ids(
    models: Path, lm: LM, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    loaded = checkpoint.load(models / "base")
    contents = Contents(loaded.config, loaded.params, "base", "float32", [], None, None, {})
    checkpoint.save(tmp_path / "bare", 0, contents).result()
    assert run("generate", tmp_path / "bare", "--ids", "300,301 302", "--max-new-tokens", 4) == 0
    expected = jaxgpt.load(str(tmp_path / "bare")).generate([300, 301, 302], max_new_tokens=4)[0].ids
    assert capsys.readouterr().out == ",".join(map(str, expected)) + "\n"
    assert "has no tokenizer" in refusal(capsys, "chat", tmp_path / "bare", "Hi")


# -- data ------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"This is text number {number}, and it is not long.\n" * 20)
    return folder


def test_data_encode_prints_statistics_and_keeps_the_template(
    texts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    from jaxgpt.data.shards import TokenShards

    words = ["--tokenizer", "char", "--template", "tags", "--val-fraction", 0.2]
    assert run("data", "encode", texts, "--out", tmp_path / "data", *words) == 0
    printed = capsys.readouterr().out
    for word in ("tokens", "30 documents", "distinct ids", "entropy", "unknown 0.00%", "train ", "val "):
        assert word in printed
    shards = TokenShards(tmp_path / "data")
    template = shards.template()
    assert template is not None
    assert template.name == "tags"
    assert shards.tokenizer().kind == "char"
    assert run("data", "encode", texts, "--out", tmp_path / "data", *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["statistics"]["unknown"] == 0.0


@pytest.mark.parametrize("flag", ["--model", "--tokenizer"])
def test_data_encode_with_a_checkpoints_tokenizer(flag: str, models: Path, lm: LM, texts: Path, tmp_path: Path):
    from jaxgpt.data.shards import TokenShards

    assert run("data", "encode", texts, "--out", tmp_path / "data", flag, models / "base") == 0
    assert lm.tokenizer is not None
    assert TokenShards(tmp_path / "data").tokenizer().state() == lm.tokenizer.state()


@pytest.mark.parametrize("more", [("--template", "tags"), ("--tokenizer-kind", "bpe")])
def test_a_checkpoint_named_as_tokenizer_brings_all_of_its_own(
    more: tuple[str, str], models: Path, capsys: pytest.CaptureFixture[str], texts: Path, tmp_path: Path
):
    path = models / "base"
    said = refusal(capsys, "data", "encode", texts, "--out", tmp_path / "data", "--tokenizer", path, *more)
    brings = "a checkpoint, brings its own tokenizer and template"
    assert said == f"--tokenizer {path}, {brings}, got {more[0]} too; drop one"


@pytest.mark.parametrize("flag", ["--model", "--tokenizer"])
def test_data_inspect_marks_what_trains(flag: str, models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "Say it", "completion": "OK"}\n')
    assert run("data", "inspect", file, flag, models / "base") == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out
    first, last, everything = captured.out.splitlines()[2:]
    assert len(first.split("  ")[-1].split(" ")) >= 10
    assert first.split()[:2] == ["first", "<|im_start|>"]
    assert last.endswith("['O'] ['K'] [<|im_end|>] '\\n'")
    assert everything.count("[<") == 1
    assert "1 episodes" in captured.err
    assert run("data", "inspect", file, "--model", models / "base", "--json") == 0
    episode = json.loads(capsys.readouterr().out)
    assert sum(episode["mask"]) == 3
    assert len(episode["ids"]) == len(episode["mask"]) == len(episode["tokens"])


def test_data_inspect_colours_tokens_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    assert run("data", "inspect", file, "--tokenizer", "char") == 0
    assert "\x1b[1;32m'b'\x1b[0m \x1b[1;32m<|im_end|>\x1b[0m" in screen.getvalue()
    assert "\x1b[2m'a'\x1b[0m" in screen.getvalue()
