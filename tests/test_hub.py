"""The hub: what is downloaded is whole and what was announced, what is uploaded comes back, every failure is one line.

The hub is `hub_server`, on this machine; huggingface_hub speaks to it as to the real one.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub
import numpy as np
import pytest
from conftest import CONFIGS, random_params
from hub_server import TOKEN, Hub
from huggingface_hub import constants

from jaxgpt import checkpoint, cli, manifest
from jaxgpt.chat import TEMPLATES
from jaxgpt.errors import InputError
from jaxgpt.formats import hf
from jaxgpt.hub import download, remote, upload
from jaxgpt.run_lock import RunLock
from jaxgpt.tokenizer import Tokenizer

# The package sends the bytes of an upload in a way that its HTTP client calls old.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = np.random.default_rng(0).bytes(1_500_000)
HF = {
    "config.json": b'{"model_type": "gpt2"}',
    "tokenizer.json": b"{}" * 400,
    "model.safetensors": WEIGHTS,
    "README.md": b"# A model\n",
    ".gitattributes": b"* text\n",
    "pytorch_model.bin": b"pickle" * 100,
    "modeling_x.py": b"import os\n",
    "onnx/model.onnx": b"onnx" * 100,
}
TAKEN = {"config.json", "tokenizer.json", "model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server.Running() as running:
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def there(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub without models or faults, and a user with a token."""
    for field in dataclasses.fields(Hub):
        if field.name != "url":
            new = field.default_factory() if field.default is dataclasses.MISSING else field.default  # pyright: ignore
            setattr(server, field.name, new)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The package waits seconds between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("huggingface_hub.file_download.time", types.SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return server


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10, 20 and 30 with training state; 20 is the best."""
    folder = tmp_path_factory.mktemp("hub") / "assistant"
    tokenizer = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=["hello world"])
    config = dataclasses.replace(CONFIGS["gpt2"], vocab_size=tokenizer.model_vocab_size, num_hidden_layers=1)
    contents = checkpoint.Contents(
        config=config,
        params=random_params(config),
        stage="sft",
        compute_dtype="float32",
        eos_token_ids=[3],
        tokenizer=tokenizer,
        template=TEMPLATES["chatml"],
        provenance={},
        train={"step": np.array([7], np.int32)},
        train_json={"position": 1},
    )
    checkpoint.save(folder, 10, contents, keep=9, score=2.0).result()
    for step, score in ((20, 1.0), (30, 1.5)):
        # The same arrays: what a step holds besides its number and score is not asked for here.
        shutil.copytree(folder / "step-00000010", folder / f"step-{step:08d}")
        model = json.loads((folder / f"step-{step:08d}/model.json").read_text())
        (folder / f"step-{step:08d}/model.json").write_text(json.dumps(model | {"step": step, "score": score}))
        manifest.seal(folder / f"step-{step:08d}")
    (folder / "log.jsonl").write_text("{}\n")
    return folder


def run(*words: object) -> int:
    return cli.main(["hub", *map(str, words)])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that ends with exit code 2; the token is nowhere in it."""
    capsys.readouterr()
    code = run(*words)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    assert captured.err.startswith("jaxgpt: ")
    assert captured.err.count("\n") == 1, captured.err
    assert TOKEN not in captured.err
    return captured.err.removeprefix("jaxgpt: ").rstrip("\n")


def contents_of(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in manifest.files(folder).items()}


def put(there: Hub, name: str, folder: Path, **flags: bool) -> str:
    return there.add(name, {**contents_of(folder), ".gitattributes": b"* text\n"}, **flags)


# -- Downloading -----------------------------------------------------------------------


def test_a_hugging_face_model_comes_without_pickles_and_code(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    commit = there.add("owner/model", HF)
    assert run("download", "owner/model", "--out", tmp_path / "m") == 0
    found = contents_of(tmp_path / "m")
    record = json.loads(found.pop("hub.json"))
    assert found == {name: HF[name] for name in TAKEN}
    assert (record["name"], record["commit"], set(record["files"])) == ("owner/model", commit, TAKEN)
    printed = capsys.readouterr()
    assert f"jaxgpt import {tmp_path / 'm'} {tmp_path / 'm'}-checkpoint\n" in printed.out
    assert "not downloaded: modeling_x.py, onnx/model.onnx, pytorch_model.bin\n" in printed.err
    assert os.listdir(tmp_path) == ["m"]


def test_a_checkpoint_comes_with_its_newest_step_and_loads(
    there: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    put(there, "owner/assistant", run_folder)
    assert run("download", "owner/assistant", "--out", tmp_path / "a", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["written"], answer["import"]) == ("checkpoint", str(tmp_path / "a"), None)
    assert answer["fetched"] == answer["bytes"] > 0
    assert checkpoint.steps(tmp_path / "a") == [30]
    found = checkpoint.load(tmp_path / "a", train=True)
    assert (found.step, found.train_json) == (30, {"position": 1})
    assert run("download", "owner/assistant", "--out", tmp_path / "all", "--steps", "all") == 0
    assert checkpoint.steps(tmp_path / "all") == [10, 20, 30]


def test_pickles_come_when_asked_for_and_code_never(there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there.add("owner/model", HF)
    assert run("download", "owner/model", "--out", tmp_path / "m", "--include", "*.bin") == 0
    assert (tmp_path / "m/pytorch_model.bin").read_bytes() == HF["pytorch_model.bin"]
    assert run("download", "owner/model", "--out", tmp_path / "all", "--include", "*") == 0
    assert contents_of(tmp_path / "all").keys() - {"hub.json"} == HF.keys() - {"modeling_x.py"}
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "c", "--include", "*.py")
    assert said == "--include *.py: modeling_x.py is code, which is never downloaded; read it on the hub"
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "c", "--include", "*.gguf")
    assert said.startswith("--include *.gguf: no file of owner/model matches; it has README.md, config.json, ")
    there.add("owner/old", {"config.json": b"{}", "pytorch_model.bin": b"p"})
    said = refusal(capsys, "download", "owner/old", "--out", tmp_path / "c")
    assert "has no model.safetensors, but config.json, pytorch_model.bin; other weights, pickles among them" in said
    there.add("owner/data", {"train.csv": b"1,2"})
    assert "holds neither a checkpoint of jaxgpt" in refusal(capsys, "download", "owner/data", "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_revision_is_fetched_as_asked(there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = there.add("owner/model", {**HF, "config.json": b'{"old": 1}'})
    there.add("owner/model", HF)
    there.add("owner/model", {**HF, "config.json": b'{"branch": 1}'}, branch="feature/x")
    for revision, config in ((old, b'{"old": 1}'), ("feature/x", b'{"branch": 1}'), ("main", HF["config.json"])):
        out = tmp_path / revision.replace("/", "-")
        assert run("download", "owner/model", "--out", out, "--revision", revision) == 0
        assert (out / "config.json").read_bytes() == config
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "x", "--revision", "v9")
    assert said.startswith("owner/model has no revision 'v9'; give a branch, a tag or a commit of http://127.0.0.1:")


def test_several_models_come_into_one_folder_each(there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("owner/a", "owner/b", "other/b"):
        there.add(name, {**HF, "README.md": name.encode()})
    assert run("download", "owner/a", "other/b", "--out", tmp_path / "two") == 0
    assert (tmp_path / "two/b/README.md").read_bytes() == b"other/b"
    assert run("download", "owner", "--all", "--out", tmp_path / "group") == 0
    assert sorted(os.listdir(tmp_path / "group")) == ["a", "b"]
    said = refusal(capsys, "download", "owner/b", "other/b", "--out", tmp_path / "x")
    assert f"owner/b, other/b would all be written to {tmp_path / 'x/b'}; download them one by one" in said


def test_list_says_what_would_come_and_fetches_nothing(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    there.add("owner/model", HF)
    assert run("download", "owner/model", "--list") == 0
    assert "1.5 MB  model.safetensors\n" in capsys.readouterr().out
    assert run("download", "owner/model", "--list", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == {name: len(HF[name]) for name in HF if name in TAKEN}
    assert there.fetched() == []
    assert os.listdir(tmp_path) == []


def test_a_group_is_listed_over_all_pages(there: Hub, capsys: pytest.CaptureFixture[str]):
    for i in range(8):
        there.add(f"owner/m{i}", HF, private=i == 3, gated=i == 4)
    assert run("list", "owner", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in answer["models"]] == [f"owner/m{i}" for i in range(8)]
    assert answer["models"][3] == {"name": "owner/m3", "private": True, "gated": False, "modified": "2026-01-02"}
    assert run("list", "owner") == 0
    assert "owner/m4                                  2026-01-02  gated\n" in capsys.readouterr().out
    assert "nobody has no models at http://127.0.0.1" in refusal(capsys, "list", "nobody")
    assert "'a/b' is no group" in refusal(capsys, "list", "a/b")


# -- Whole or not at all ---------------------------------------------------------------


def selection(name: str = "owner/model") -> download.Selection:
    return download.select(remote.snapshot(name))


def test_started_again_only_the_rest_is_fetched(there: Hub, tmp_path: Path):
    there.add("owner/model", HF)
    there.status_of_files = 503
    with pytest.raises(InputError, match="answered 503 for owner/model; start again later, what has arrived is kept"):
        download.download(selection(), tmp_path / "m")
    there.status_of_files = 0
    # Every try of the package is cut off, and the first of them has the most.
    there.cut = [700_000, *[0] * 30]
    with pytest.raises(InputError, match="the hub could not be reached"):
        download.download(selection(), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    there.cut = []
    (part,) = (tmp_path / ".m.partial").glob("model.safetensors.*.part")
    arrived = part.stat().st_size
    there.served = 0
    there.requests.clear()
    done = download.download(selection(), tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == WEIGHTS
    assert arrived > 0
    assert done.fetched == there.served <= sum(len(HF[name]) for name in TAKEN) - arrived
    assert f"bytes={arrived}-" in [request.range for request in there.requests]


def test_a_connection_that_is_cut_is_taken_up_again(there: Hub, tmp_path: Path):
    there.add("owner/model", HF)
    there.cut = [600_000, 5_000, 3]
    download.download(selection(), tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == WEIGHTS


def test_a_server_without_ranges_sends_the_whole_file_again(there: Hub, tmp_path: Path):
    there.add("owner/model", HF)
    there.cut = [600_000, *[0] * 30]
    with pytest.raises(InputError, match="could not be reached"):
        download.download(selection(), tmp_path / "m")
    there.cut, there.ignore_range = [], True
    download.download(selection(), tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == WEIGHTS


def test_the_same_again_fetches_nothing_and_another_is_refused(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    there.add("owner/model", HF)
    run("download", "owner/model", "--out", tmp_path / "m")
    there.requests.clear()
    assert run("download", "owner/model", "--out", tmp_path / "m") == 0
    assert there.fetched() == []
    assert "all here already" in capsys.readouterr().out
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m", "--include", "*.bin")
    assert "holds other files of owner/model" in said
    (tmp_path / "m/model.safetensors").write_bytes(b"short")
    assert "holds other files" in refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    new = there.add("owner/model", {**HF, "README.md": b"new"})
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    assert f"not owner/model at {new[:12]}; move it away, or give another --out" in said
    (tmp_path / "mine").mkdir()
    assert run("download", "owner/model", "--out", tmp_path / "mine") == 0, "an empty folder may be filled"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "full")
    assert said == f"{tmp_path / 'full'} exists and is no download of owner/model; give another --out"


def test_a_model_that_changed_between_two_tries_is_not_mixed(there: Hub, tmp_path: Path):
    there.add("owner/model", {**HF, "vocab.json": b"{}"})
    there.cut = [600_000, *[0] * 30]
    with pytest.raises(InputError, match="could not be reached"):
        download.download(selection(), tmp_path / "m")
    there.cut = []
    changed = {**HF, "model.safetensors": WEIGHTS[::-1], "tokenizer.json": b"[]" * 400}
    there.add("owner/model", changed)
    download.download(selection(), tmp_path / "m")
    found = contents_of(tmp_path / "m")
    found.pop("hub.json")
    assert found == {name: changed[name] for name in TAKEN}


@pytest.mark.parametrize("what", ["flipped", "short", "long", "endless"])
def test_other_bytes_than_announced_never_count(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
):
    there.add("owner/model", HF)
    there.tamper = {
        "flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        "short": lambda content: content[:-1],
        "long": lambda content: content + b"x",
        "endless": lambda content: content * 3,
    }[what]
    there.unmeasured = what == "endless"
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    expected = {
        "flipped": "arrived with other bytes than http://127.0.0.1",
        "short": "sent another number of bytes than it announced for a file of owner/model; start again",
    }
    assert expected.get(what, "more bytes than the ") in said
    assert not (tmp_path / "m").exists()
    there.tamper, there.unmeasured = Hub().tamper, False
    download.download(selection(), tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("damage", ["bytes", "missing", "manifest", "outside", "version"])
def test_a_step_that_does_not_match_its_manifest_is_not_kept(
    there: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
):
    files = contents_of(run_folder)
    step = "step-00000030"
    listed = manifest.read(run_folder / step)
    match damage:
        case "bytes":
            files[f"{step}/template.json"] = files[f"{step}/template.json"].replace(b"chatml", b"chatmL")
            expected = "step-00000030: template.json fails SHA-256"
        case "missing":
            del files[f"{step}/template.json"]
            expected = f"template.json missing, of {len(listed)} files in manifest.json"
        case "manifest":
            files[f"{step}/manifest.json"] = files[f"{step}/manifest.json"].replace(b"1", b"2", 1)
            expected = "manifest.json"
        case "outside":
            files[f"{step}/manifest.json"] = manifest.spelled({**listed, "../x": listed["model.json"]}).encode()
            expected = "manifest.json names ../x, outside the checkpoint folder"
        case _:
            files[f"{step}/model.json"] = b"{}"
            listed["model.json"] = {"size": 2, "sha256": hub_server.hashlib.sha256(b"{}").hexdigest()}
            files[f"{step}/manifest.json"] = manifest.spelled(listed).encode()
            expected = "model.json has format version None"
    there.add("owner/assistant", files)
    said = refusal(capsys, "download", "owner/assistant", "--out", tmp_path / "a")
    assert said.startswith("owner/assistant is damaged at http://127.0.0.1:")
    assert expected in said
    assert said.endswith("; nothing was kept, tell its owner")
    assert os.listdir(tmp_path) == []


def test_files_beside_a_steps_manifest_are_left_on_the_hub(there: Hub, run_folder: Path, tmp_path: Path):
    there.add("owner/assistant", {**contents_of(run_folder), "step-00000030/setup.py": b"import os"})
    done = download.download(selection("owner/assistant"), tmp_path / "a")
    assert checkpoint.load(done.path).step == 30
    assert not (tmp_path / "a/step-00000030/setup.py").exists()


def test_a_download_that_is_killed_goes_on_where_it_stopped(there: Hub, tmp_path: Path):
    there.add("owner/model", HF)
    there.delay = 0.03
    command = [sys.executable, "-m", "jaxgpt", "hub", "download", "owner/model", "--out", str(tmp_path / "m"), "--json"]
    env = {**os.environ, "HF_ENDPOINT": there.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    killed = subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    # Two blocks of 256 KiB are on disk when the server has sent this much.
    while there.served < 700_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    there.delay = 0.0
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert (tmp_path / "m/model.safetensors").read_bytes() == WEIGHTS
    assert 0 < answer["fetched"] <= answer["bytes"] - 262_144
    assert "not downloaded: " in done.stderr
    assert TOKEN not in done.stderr


# -- Failures in one line --------------------------------------------------------------


def test_offline_says_what_was_tried(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for words in (["download", "owner/model", "--out", tmp_path / "m"], ["list", "owner"]):
        said = refusal(capsys, *words)
        assert said.startswith("the hub could not be reached: asking http://127.0.0.1:9 for owner")
        assert "failed with ConnectError" in said
        assert said.endswith("check the network, the proxy and HF_ENDPOINT, then start again")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    assert said.startswith("HF_HUB_OFFLINE is set, so http://127.0.0.1:9 was not asked for owner/model; unset it")
    assert os.listdir(tmp_path) == []


def test_private_gated_and_misspelled_models_are_told_apart(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    there.add("owner/private", HF, private=True)
    there.add("owner/gated", HF, gated=True)
    said = refusal(capsys, "download", "owner/modle", "--out", tmp_path / "m")
    assert f"there is no model owner/modle at {there.url} with the token given (404); check the spelling" in said
    monkeypatch.setenv("HF_TOKEN", "")
    said = refusal(capsys, "download", "owner/private", "--out", tmp_path / "m")
    assert "there is no model owner/private" in said
    assert "without a token (401)" in said
    assert said.endswith("for a private one HF_TOKEN")
    said = refusal(capsys, "download", "owner/gated", "--out", tmp_path / "m")
    assert said == (
        f"owner/gated is gated without a token: accept its terms at {there.url}/owner/gated, "
        "then set HF_TOKEN to your token"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refusal(capsys, "download", "owner/private", "--out", tmp_path / "m")
    assert "refused the token for owner/private (401); set HF_TOKEN to a valid one" in said
    assert "hf_wrong" not in said
    there.status_of_files = 403
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = refusal(capsys, "download", "owner/private", "--out", tmp_path / "m")
    assert "does not allow this for owner/private with the token given (403)" in said
    assert run("list", "owner") == 0
    assert not (tmp_path / "m").exists()


def test_the_token_goes_to_the_hub_and_not_to_where_its_files_are(there: Hub, tmp_path: Path):
    there.add("owner/model", HF)
    with hub_server.Running() as cdn:
        cdn.lfs = there.lfs
        there.cdn = cdn.url.replace("127.0.0.1", "localhost")
        download.download(selection(), tmp_path / "m")
        huggingface_hub.close_session()
    assert {request.token for request in there.requests} == {TOKEN}
    assert [request.token for request in cdn.requests] == [None, None, None][: len(cdn.requests)]
    assert cdn.served >= len(WEIGHTS)


def test_a_hub_that_says_nothing_is_not_waited_for(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    there.add("owner/model", HF)
    there.stall = 0.3
    monkeypatch.setattr(remote, "ANSWER_TIMEOUT", 0.1)
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    assert "the hub could not be reached: " in said
    assert "failed with ReadTimeout" in said


def test_two_downloads_into_one_folder_do_not_meet(there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there.add("owner/model", HF)
    with RunLock(tmp_path / ".m.partial") as lock:
        lock.acquire()
        said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    assert said.startswith("another run is writing into ")
    assert there.fetched() == []


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "https://huggingface.co/gpt2", "a/..", "owner/mo del", "-x/y"])
def test_what_is_no_models_name_is_not_asked_for(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    said = refusal(capsys, "download", "--out", tmp_path / "m", "--", name)
    assert said == f"{name!r} is no model's name; expected OWNER/MODEL, such as openai-community/gpt2"
    assert there.requests == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\..\\x", "C:x", "a//x", "x\n", "./config.json"])
def test_a_name_that_leaves_the_folder_is_refused(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
):
    there.add("owner/model", {**HF, path: b"x"})
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m", "--include", "*")
    assert said == f"owner/model at {there.url} lists the file {path!r}, which leads outside the folder; refused"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [{"size": -1}, {"size": "x"}, {"oid": "../../x"}, {"path": 7}, {"lfs": {"oid": "x", "size": 1, "pointerSize": 1}}],
)
def test_a_list_that_makes_no_sense_is_refused(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
):
    there.add("owner/model", HF)
    there.listed = {"config.json": changes}
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    assert said.startswith(f"{there.url} did not answer for owner/model as a hub does (")


@pytest.mark.parametrize("answer", [b"<html>captive portal</html>", b"[]", b"{}", b'{"id": 1}', b"null", b"\xff"])
def test_a_server_that_is_no_hub_is_named(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: bytes
):
    there.add("owner/model", HF)
    there.answer = answer
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    assert said.startswith(f"{there.url} did not answer for owner/model as a hub does (")
    assert said.endswith("check HF_ENDPOINT")


@pytest.mark.parametrize(("status", "expected"), [(429, "too many requests"), (500, "answered 500 for owner/model")])
def test_a_hub_in_trouble_is_said(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, expected: str
):
    there.status = status
    assert expected in refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")


def test_a_full_disk_is_said_before_and_while_it_fills(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    there.add("owner/model", HF)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
        said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
        assert f"disk full: owner/model needs 1.5 MB more in {tmp_path}, 1.0 MB are free" in said
    assert there.fetched() == []
    with monkeypatch.context() as patch:
        patch.setattr(download._Announced, "write", _no_space)
        said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
        assert said == "the disk is full; what has arrived of owner/model is kept, so free some space and start again"
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_synced", _no_space)
        assert refusal(capsys, "download", "owner/model", "--out", tmp_path / "m").startswith("the disk is full")
    there.requests.clear()
    assert run("download", "owner/model", "--out", tmp_path / "m") == 0
    assert there.fetched() == []


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refusal(capsys, "list", "owner")
    assert said == "huggingface_hub is not installed; `pip install 'jaxgpt[hub]'` brings it"


def test_a_token_that_no_header_can_carry_is_not_shown(
    there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_with\nnewline")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "hf_with\nnewline")
    said = refusal(capsys, "download", "owner/model", "--out", tmp_path / "m")
    assert "hf_with" not in said
    assert "newline" not in said


# -- Uploading -------------------------------------------------------------------------


def test_the_newest_step_goes_up_without_training_state_and_comes_back(
    there: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("upload", run_folder, "owner/assistant") == 0
    printed = capsys.readouterr()
    assert f"{run_folder} is at {there.url}/owner/assistant, commit " in printed.out
    assert "not uploaded: step-00000010, step-00000020, step-00000030/train\n" in printed.err
    names = there.files("owner/assistant").keys() - {".gitattributes"}
    assert {name.split("/")[0] for name in names} == {"step-00000030"}
    assert not [name for name in names if "/train" in name]
    assert there.repos["owner/assistant"].private
    assert run("download", "owner/assistant", "--out", tmp_path / "back") == 0
    sent, back = checkpoint.load(run_folder), checkpoint.load(tmp_path / "back", train=True)
    assert back.params.keys() == sent.params.keys()
    assert all(np.array_equal(back.params[name], array) for name, array in sent.params.items())
    assert (back.step, back.train, back.train_json) == (30, None, None)
    assert back.tokenizer is not None


def test_the_best_or_every_step_and_training_state_go_up_when_asked(there: Hub, run_folder: Path):
    upload.upload(upload.plan(run_folder, steps="best"), "owner/best")
    assert "step-00000020/manifest.json" in there.files("owner/best")
    everything = upload.plan(run_folder, steps="all", train=True)
    upload.upload(everything, "owner/all", public=True)
    assert not there.repos["owner/all"].private
    sent = {name: content for name, content in contents_of(run_folder).items() if name != "log.jsonl"}
    assert {n: c for n, c in there.files("owner/all").items() if n != ".gitattributes"} == sent
    assert upload.plan(run_folder / "step-00000020").files.keys() == upload.plan(run_folder, steps="best").files.keys()


def test_large_files_are_not_sent_twice_and_no_part_of_a_step_shows(there: Hub, run_folder: Path):
    plan = upload.plan(run_folder)
    there.status_of_commits = 500
    with pytest.raises(InputError, match="answered 500 for owner/assistant; start again later"):
        upload.upload(plan, "owner/assistant")
    assert [request for request in there.requests if request.method == "PUT"]
    assert there.files("owner/assistant").keys() == {".gitattributes"}
    there.status_of_commits = 0
    there.requests.clear()
    again = upload.upload(plan, "owner/assistant")
    assert [request for request in there.requests if request.method == "PUT"] == []
    assert there.repos["owner/assistant"].branches["main"] == again.commit


def test_a_hugging_face_folder_and_gguf_files_go_up_without_pickles(there: Hub, tmp_path: Path):
    for name, content in {**HF, "model.gguf": b"GGUF"}.items():
        (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(content)
    done = upload.upload(upload.plan(tmp_path / "hf"), "owner/hf", revision="draft", message="First")
    assert there.files("owner/hf", "draft").keys() == {*TAKEN, "model.gguf", ".gitattributes"}
    assert there.files("owner/hf").keys() == {".gitattributes"}
    assert done.plan.left_out == ["modeling_x.py", "onnx/model.onnx", "pytorch_model.bin"]


def test_an_exported_model_goes_up_comes_back_and_imports(there: Hub, run_folder: Path, tmp_path: Path):
    hf.export_hf(run_folder, tmp_path / "exported")
    assert run("upload", tmp_path / "exported", "owner/exported") == 0
    assert run("download", "owner/exported", "--out", tmp_path / "back") == 0
    assert cli.main(["import", str(tmp_path / "back"), str(tmp_path / "imported"), "--verify"]) == 0
    sent, back = checkpoint.load(run_folder), checkpoint.load(tmp_path / "imported")
    assert back.params.keys() == sent.params.keys()
    assert all(np.array_equal(back.params[name], array) for name, array in sent.params.items())


def test_all_folders_of_a_folder_go_up_and_list_sends_nothing(
    there: Hub, run_folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("upload", run_folder.parent, "owner", "--all", "--list") == 0
    printed = capsys.readouterr().out
    assert "would go to owner/assistant: " in printed
    assert "  step-00000030/model.json\n" in printed
    assert there.requests == []
    assert run("upload", run_folder.parent, "owner", "--all", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["name"], answer["kind"]) == ("owner/assistant", "checkpoint")
    assert answer["commit"] == there.repos["owner/assistant"].branches["main"]


def test_what_cannot_go_up_is_said_before_anything_is_sent(
    there: Hub, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert "names no owner; give OWNER/assistant" in refusal(capsys, "upload", run_folder, "assistant")
    said = refusal(capsys, "upload", tmp_path, "owner/x")
    assert said.endswith("holds no model: no step such as step-00000120, no config.json and no .gguf file")
    assert "is no folder" in refusal(capsys, "upload", tmp_path / "none", "owner/x")
    assert "has no folder with a model in it" in refusal(capsys, "upload", tmp_path, "owner", "--all")
    shutil.copytree(run_folder / "step-00000030", tmp_path / "run/step-00000030")
    (tmp_path / "run/step-00000030/template.json").write_text("{}")
    said = refusal(capsys, "upload", tmp_path / "run", "owner/x")
    assert said.startswith("checkpoint step 30: template.json has 2 bytes, its manifest says ")
    monkeypatch.setenv("HF_TOKEN", "")
    said = refusal(capsys, "upload", run_folder, "owner/x")
    assert said == "uploading needs a token that may write to owner/x: set HF_TOKEN"
    assert there.requests == []


def test_a_hub_that_refuses_or_drops_what_was_sent_is_said(
    there: Hub, run_folder: Path, capsys: pytest.CaptureFixture[str]
):
    said = refusal(capsys, "upload", run_folder, "not-mine/x")
    assert "does not allow this for not-mine/x with the token given (403)" in said
    there.ignored = "template.json"
    said = refusal(capsys, "upload", run_folder, "owner/x")
    assert said.startswith("owner/x lacks step-00000030/template.json after the upload, perhaps for its .gitignore")
