"""`jaxgpt tokenizer repair`: what is put right, what is refused, and that a kill at any moment loses nothing."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_vocabularies as small
from conftest import LLAMA

from jaxgpt import checkpoint, cli, manifest, step_folder, tokenizer_repair, weights
from jaxgpt.chat import CHATML, TAGS, Template
from jaxgpt.checkpoint import Contents
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.run_lock import RunLock
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies import vocabulary_files

DOMAIN = ("<MUL_2_3_6>", "<div_6_3>")
TEXT = "2<MUL_2_3_6>6 <div_6_3>"
Change = Callable[[dict[str, Any]], object]


def saved(
    folder: Path, tokenizer: Tokenizer, template: Template | None = CHATML, steps: tuple[int, ...] = (3,)
) -> Path:
    config: ModelConfig = dataclasses.replace(
        LLAMA, vocab_size=tokenizer.model_vocab_size, num_hidden_layers=1, tie_word_embeddings=True
    )
    params = {p.name: np.ones(p.shape, np.float32) for p in weights.parameters(config)}
    for step in steps:
        contents = Contents(config, params, "sft", "float32", list(tokenizer.stop_ids), tokenizer, template, {})
        checkpoint.save(folder, step, contents, keep=9).result()
    return folder


def made() -> Tokenizer:
    return Tokenizer.create("char", template=CHATML, corpus=["".join(map(chr, range(32, 127)))])


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        return saved(tmp_path_factory.mktemp("good") / "run", made(), steps=(3, 6))


@pytest.fixture
def run(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def edit(path: Path, change: Change) -> Path:
    """A step whose tokenizer's state was saved otherwise."""
    file = path / step_folder.TOKENIZER
    state = json.loads(file.read_text("utf-8"))
    change(state)
    file.write_text(json.dumps(state), "utf-8")
    manifest.seal(path)
    return path


def with_specials(*texts: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        for id, text in enumerate(texts, start=made().vocab_size):
            state["special_tokens"].append(text)
            state["special_token_ids"][text] = state["special_name_ids"][text] = id

    return change


def repaired(path: Path, *flags: str) -> int:
    return cli.main(["tokenizer", "repair", str(path), *flags])


def weights_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and times of everything but the documents."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("params/**/*") if path.is_file()}
    return {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in found.items()}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokenizer_of(path: Path) -> Tokenizer:
    found = checkpoint.load(path).tokenizer
    assert found is not None
    return found


# -- Domain tokens ---------------------------------------------------------------------


def test_domain_tokens_that_were_special_are_printed_again_in_every_step(run: Path, capsys: pytest.CaptureFixture[str]):
    for step in (3, 6):
        edit(run / f"step-{step:08d}", with_specials(*DOMAIN))
    before, arrays = tokenizer_of(run), weights_of(run)
    ids = before.encode(TEXT, specials=True)
    assert before.decode(ids, skip_specials=True) == "26 "
    assert repaired(run) == 0
    first, second = before.vocab_size - 2, before.vocab_size - 1
    assert capsys.readouterr() == (
        "step-00000003, step-00000006\n"
        "   id               before             after\n"
        f"  {first}  <MUL_2_3_6>  special: vanishes  added: printed\n"
        f"  {second}  <div_6_3>    special: vanishes  added: printed\n"
        "\nrepaired 2 of 2 steps; no weight was touched\n",
        "",
    )
    assert weights_of(run) == arrays
    assert sorted(os.listdir(run)) == ["step-00000003", "step-00000006"]
    for step in (3, 6):
        after = tokenizer_of(run / f"step-{step:08d}")
        assert after.encode(TEXT) == ids
        assert after.decode(ids, skip_specials=True) == TEXT
        assert [special.id for special in after.specials] == [special.id for special in made().specials]
    files = everything(run)
    assert repaired(run) == 0
    assert capsys.readouterr().out == f"nothing to repair in {run}\n"
    assert everything(run) == files


CONTROL = ("<|user|>", "<s>", "</s>", "[PAD]", "<mask>", "<extra_id_0>", "<|reserved_special_token_1|>", "<｜User｜>")


@pytest.mark.parametrize("text", CONTROL)
def test_what_controls_a_model_stays_special(run: Path, text: str, capsys: pytest.CaptureFixture[str]):
    path = edit(run / "step-00000006", with_specials(text))
    assert repaired(path) == 0
    assert capsys.readouterr().out.startswith("nothing to repair")
    assert text not in tokenizer_of(path).added


def test_a_control_token_can_be_named_as_content_but_not_one_that_is_used(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    path = edit(run / "step-00000006", with_specials("<mul>", "<|user|>"))
    files = everything(path)
    needed = "must stay special: it ends"
    for text, why in (("<|im_end|>", needed), ("<|user|>", needed), ("<x>", "is no token of it; leave it out")):
        assert repaired(path, "--token", text) == 2
        assert capsys.readouterr().err == f"jaxgpt: checkpoint step 6: {text!r} {why}" + (
            " texts, fills batches or marks turns\n" if "ends" in why else "\n"
        )
    assert everything(path) == files
    assert repaired(path, "--token", "<mul>") == 0
    assert tokenizer_of(path).added == {"<mul>": made().vocab_size}


def test_a_token_that_ends_texts_stays_special(run: Path):
    path = run / "step-00000006"
    model = json.loads((path / step_folder.MODEL).read_text())
    model["generation"]["eos_token_ids"].append(made().vocab_size)
    (path / step_folder.MODEL).write_text(json.dumps(model))
    edit(path, with_specials("STOP", "<MUL_2_3_6>"))
    (_, repair) = tokenizer_repair.plan(run)
    assert [change.what for change in repair.changes] == ["<MUL_2_3_6>"]


def test_tokens_of_a_templates_own_name_stay(tmp_path: Path):
    tags = dataclasses.replace(TAGS, specials={**TAGS.specials, "user": "U>"})
    path = saved(tmp_path / "run", Tokenizer.create("char", template=tags, corpus=["ab"]), tags)
    assert [repair.changes for repair in tokenizer_repair.plan(path)] == [()]


@pytest.mark.parametrize("files", ["json", "two"])
def test_special_tokens_of_a_base_vocabulary_become_content_only_by_name(
    files: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = small.as_json(tmp_path / "in", "qwen2") if files == "json" else None
    source = source or small.as_two_files(tmp_path / "in", "qwen2", "Qwen2Tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            content = json.loads((source / name).read_text())
            notes = content.get("added_tokens", []) + list(content.get("added_tokens_decoder", {}).values())
            for note in notes:
                note["special"] = note["special"] or note["content"] == "<MUL_2_3_6>"
            (source / name).write_text(json.dumps(content))
    found = vocabulary_files.read(source)
    tokenizer = Tokenizer.of_vocabulary(found.kind, found.encoder, None, names=found.names, files=found.files)
    assert "<MUL_2_3_6>" in tokenizer.encoder.specials
    path = saved(tmp_path / "run", tokenizer, None)
    assert repaired(path) == 0
    assert "look like content (<MUL_2_3_6>)" in capsys.readouterr().err
    assert repaired(path, "--token", "<MUL_2_3_6>") == 0
    after = tokenizer_of(path)
    ids = tokenizer.encode("a<MUL_2_3_6>b", specials=True)
    assert after.encode("a<MUL_2_3_6>b") == ids
    assert after.decode(ids, skip_specials=True) == "a<MUL_2_3_6>b"
    assert repaired(path, "--token", "<MUL_2_3_6>") == 0


# -- Older states ----------------------------------------------------------------------


def without(*keys: str, **values: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in keys:
            del state[key]
        state.update(values)

    return change


OLD = ("added_token_ids", "files")
NAMED = {"end_of_text": "<|endoftext|>", "start": "<|im_start|>", "end": "<|im_end|>", "pad": "<|pad|>"}
CERTAIN: dict[str, Change] = {
    "version 1": without(*OLD, version=1),
    "no version": without(*OLD, "version"),
    "no ids by string": without(*OLD, "special_token_ids", version=1),
    "no names": without("special_name_ids"),
    "no list": without("special_tokens"),
    "names in the list": without("special_token_ids", special_tokens=list(NAMED)),
    "an object of names": without("special_token_ids", special_tokens=NAMED),
    "no sizes": without("base_vocab_size", "model_vocab_size"),
}
GUESSED: dict[str, Change] = {
    "only strings": without(*OLD, "special_token_ids", "special_name_ids", version=1),
    "only names": without(*OLD, "special_token_ids", "special_name_ids", special_tokens=list(NAMED), version=1),
    "names to strings": without("special_token_ids", "special_name_ids", special_tokens=NAMED),
}


@pytest.mark.parametrize("old", CERTAIN)
def test_what_an_older_state_lacks_is_derived(run: Path, old: str, capsys: pytest.CaptureFixture[str]):
    path = edit(run / "step-00000006", CERTAIN[old])
    arrays = weights_of(run)
    assert repaired(run, "--json") == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["repaired"]
    assert [step["path"] for step in line["steps"]] == [str(path)]
    assert line["steps"][0]["changes"]
    assert not any(change["guessed"] for change in line["steps"][0]["changes"])
    assert json.loads((path / step_folder.TOKENIZER).read_text()) == made().state()
    assert (tokenizer_of(run).state(), weights_of(run)) == (made().state(), arrays)
    assert repaired(run) == 0
    assert capsys.readouterr().out == f"nothing to repair in {run}\n"


@pytest.mark.parametrize("old", GUESSED)
def test_guessed_ids_are_shown_and_taken_over_only_when_adopted(
    run: Path, old: str, capsys: pytest.CaptureFixture[str]
):
    path = edit(run / "step-00000006", GUESSED[old])
    files = everything(run)
    assert repaired(run) == 2
    shown = capsys.readouterr()
    for name, id in made().state()["special_name_ids"].items():
        assert f"{id} {NAMED[name]} no id special, named {name} (guessed)" in " ".join(shown.out.split())
    assert shown.err == (
        "jaxgpt: 4 ids of step-00000006 are only guessed, from the order of the list; compare them with what the "
        "model was trained with, then add --adopt\n"
    )
    assert everything(run) == files
    assert repaired(run, "--adopt") == 0
    assert json.loads((path / step_folder.TOKENIZER).read_text()) == made().state()


def test_a_base_vocabularys_own_ids_are_never_guessed(tmp_path: Path):
    tokenizer = Tokenizer.create("gpt2", template=CHATML)
    run = saved(tmp_path / "run", tokenizer)
    edit(run / "step-00000003", GUESSED["only strings"])
    (repair,) = tokenizer_repair.plan(run)
    assert repair.state == tokenizer.state()
    assert [change.what for change in repair.changes if change.guessed] == ["<|im_start|>", "<|im_end|>", "<|pad|>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("special_token_ids", "special_name_ids", special_tokens=["<|pad|>", *list(NAMED.values())[:3]]),
            "the model ends texts with token 351, which would be <|pad|> if the ids followed the order of the list",
        ),
        (without("special_tokens", "special_token_ids"), "the tokenizer's state does not say its special tokens' str"),
        (without("special_token_ids", special_tokens=["<|a|>"]), "has 1 special tokens and ids of 4 names; restore it"),
        (without("special_token_ids", "special_name_ids", special_tokens=["a", "a"]), "lists a special token twice"),
        (without("special_token_ids", special_name_ids={"end": "7"}), "ids of special tokens must be integers; rest"),
        (without(version=3), "tokenizer state has version 3; this jaxgpt reads 1 to 2"),
        (without("kind"), "tokenizer kind None is unknown; choose one of"),
        (
            without("special_token_ids", model_vocab_size=64),
            "tokenizer is for a model of 64 rows, the model embeds 384",
        ),
        (without(version=1, extra=1), "tokenizer state has unknown key extra"),
    ],
)
def test_what_cannot_be_repaired_is_refused(
    run: Path, change: Change, message: str, capsys: pytest.CaptureFixture[str]
):
    edit(run / "step-00000003", with_specials(*DOMAIN))  # which could be, and is left alone
    edit(run / "step-00000006", change)
    files = everything(run)
    assert repaired(run, "--adopt") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("jaxgpt: checkpoint step 6: ")
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert everything(run) == files


def test_damage_and_other_folders_are_refused(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "step-00000006" / "model.json").write_text("{}")
    assert repaired(run) == 2
    assert "checkpoint step 6: model.json has 2 bytes, its manifest says" in capsys.readouterr().err
    (run.parent / "empty").mkdir()
    assert repaired(run.parent / "empty") == 2
    assert "empty holds no checkpoint; give a run folder" in capsys.readouterr().err
    with RunLock(run):
        assert repaired(run) == 2
    assert "another run is writing into" in capsys.readouterr().err


def test_damaged_weights_stay_known_as_damaged(run: Path):
    path = edit(run / "step-00000006", with_specials(*DOMAIN))
    array = max((path / "params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    array.write_bytes(array.read_bytes()[:-1] + b"x")
    assert repaired(path) == 0
    with pytest.raises(InputError, match="fails SHA-256"):
        manifest.verify(path)


# -- Power may go ----------------------------------------------------------------------

TOUCHING = ("link", "unlink", "rename", "fsync", "mkdir", "rmdir", "open")


class Killed(BaseException):
    """Nothing after it is done."""


def killed_after(calls: int, path: Path) -> int:
    """Repair until so many system calls were made; how many there were."""
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise Killed
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in TOUCHING:
            patch.setattr(os, name, dying(getattr(os, name)))
        with suppress(Killed):
            tokenizer_repair.apply([repair for repair in tokenizer_repair.plan(path) if repair.changes])
    return count


@pytest.mark.parametrize("alone", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_and_a_second_run_finishes(run: Path, alone: bool):
    origin = edit(run / "step-00000006", with_specials(*DOMAIN))
    if alone:
        origin = origin.rename(run / "mine")
    shutil.rmtree(run / "step-00000003")
    # Two files stand for all the arrays: each is a dozen moments more.
    shutil.rmtree(origin / "params")
    (origin / "params" / "a").mkdir(parents=True)
    for name in ("a/b", "c"):
        (origin / "params" / name).write_text(name)
    manifest.seal(origin)
    arrays, states = weights_of(run), set[bytes]()
    shutil.copytree(run, run.with_name("spare"), copy_function=shutil.copy2)
    calls = killed_after(10**6, origin)
    assert calls > 20
    for number in range(calls):
        shutil.rmtree(run)
        shutil.copytree(run.with_name("spare"), run)
        killed_after(number, origin)
        found = origin if alone else run
        if alone and not origin.exists():
            with pytest.raises(InputError, match="was being rewritten when the process died; `jaxgpt tokenizer repair"):
                checkpoint.load(origin)
        else:
            (path,) = step_folder.candidates(found, None)
            manifest.verify(path)
            states.add((path / step_folder.TOKENIZER).read_bytes())
        assert repaired(found) == 0
        assert weights_of(run) == arrays
        manifest.verify(origin)
        assert [repair.changes for repair in tokenizer_repair.plan(found)] == [()]
        new = (origin / step_folder.TOKENIZER).read_bytes()
    assert states == {(run.with_name("spare") / origin.name / step_folder.TOKENIZER).read_bytes(), new}
