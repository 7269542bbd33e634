"""Checkpoints: what is saved comes back bit for bit, and nothing damaged, foreign or hostile loads."""

import dataclasses
import errno
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIGS, random_params

from jaxgpt import checkpoint, manifest
from jaxgpt.chat import TEMPLATES
from jaxgpt.checkpoint import CheckpointError, Contents
from jaxgpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=["hello world"])
CONFIG = dataclasses.replace(
    CONFIGS["llama"],
    vocab_size=TOKENIZER.model_vocab_size,
    hidden_size=6,
    intermediate_size=8,
    head_dim=2,
    num_hidden_layers=1,
)
TRAIN: dict[str, Any] = {
    "moments.0.mu": jnp.arange(6.0).reshape(2, 3),
    "step": jnp.int32(7),
    "rng": np.array([1, 2**32 - 1], np.uint32),
    "large": np.array([2**40 + 3], np.int64),
}


@pytest.fixture(autouse=True, scope="module")
def _no_fsync():
    # Order and completeness of what is forced to disk have tests of their own.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def contents(**changes: Any) -> Contents:
    values: dict[str, Any] = {
        "config": CONFIG, "params": random_params(CONFIG), "stage": "sft", "compute_dtype": "bfloat16",
        "eos_token_ids": [3, 5], "tokenizer": TOKENIZER, "template": TEMPLATES["chatml"],
        "provenance": {"parent": "base"}, "train": TRAIN, "train_json": {"position": {"epoch": 1}, "text": "naïve 🙂"},
    }  # fmt: skip
    return Contents(**{**values, **changes})


def save(directory: Path, step: int, keep: int = 9, score: float | None = None, **changes: Any) -> Path:
    return checkpoint.save(directory, step, contents(**changes), keep=keep, score=score).result()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder with step 120, never changed."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    save(directory, 120)
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def refused(directory: Path, **asked: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(directory, **asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_bits(left: Any, right: Any) -> bool:
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


# -- There and back ----------------------------------------------------------------------


def test_a_loaded_checkpoint_is_what_was_saved(saved: Path):
    found, wanted = checkpoint.load(saved, train=True), contents()
    for name in ("config", "stage", "compute_dtype", "eos_token_ids", "template", "train_json"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert (found.step, found.path) == (120, saved / "step-00000120")
    assert found.provenance["parent"] == "base"
    assert found.provenance["versions"]["jax"] == jax.__version__
    assert found.tokenizer is not None
    assert found.tokenizer.state() == TOKENIZER.state()
    assert found.params.keys() == wanted.params.keys()
    assert all(same_bits(array, wanted.params[name]) for name, array in found.params.items())
    assert found.train is not None
    assert found.train.keys() == TRAIN.keys()
    assert all(same_bits(array, TRAIN[name]) for name, array in found.train.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_come_back_bit_for_bit_with_nan_and_subnormals(tmp_path: Path, dtype: str):
    params = {name: np.asarray(array).astype(jnp.dtype(dtype)) for name, array in random_params(CONFIG).items()}
    every = np.arange(65536, dtype=np.uint16).view(jnp.dtype(dtype))
    size = params["embed.tokens.weight"].size
    params["embed.tokens.weight"] = np.resize(every[::21], size).reshape(params["embed.tokens.weight"].shape)
    save(tmp_path, 1, params=params, train=None)
    found = checkpoint.load(tmp_path)
    assert all(same_bits(array, params[name]) for name, array in found.params.items())


def test_inference_reads_nothing_of_the_training_state(run: Path):
    for path in (run / "step-00000120/train").rglob("*"):
        if path.is_file():
            path.chmod(0o000)
            path.write_bytes(bytes(path.stat().st_size)) if os.geteuid() == 0 else None
    found = checkpoint.load(run)
    assert found.train is None
    assert found.train_json is None
    assert same_bits(found.params["head.weight"], contents().params["head.weight"])


def test_a_step_folder_alone_is_a_checkpoint(run: Path, tmp_path: Path):
    (run / "step-00000120").rename(tmp_path / "elsewhere")
    found = checkpoint.load(tmp_path / "elsewhere")
    assert found.step == 120
    assert checkpoint.describe(tmp_path / "elsewhere")["steps"] == [120]


def test_a_model_without_tokenizer_and_template_is_a_checkpoint(tmp_path: Path):
    save(tmp_path, 1, tokenizer=None, template=None, train=None, train_json=None)
    found = checkpoint.load(tmp_path, train=True)
    assert (found.tokenizer, found.template, found.train, found.train_json) == (None, None, None, None)


def test_arrays_may_change_as_soon_as_save_returns(tmp_path: Path):
    donated = {name: jnp.array(array) for name, array in random_params(CONFIG).items()}
    numpy = np.arange(4096.0)
    expected = {name: np.array(array) for name, array in donated.items()}
    train_json = {"position": 1}
    pending = checkpoint.save(tmp_path, 1, contents(params=donated, train={"n": numpy}, train_json=train_json))
    numpy += 1
    train_json["position"] = 2
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda a: a * 0, p), donate_argnums=0)(donated))
    pending.result()
    found = checkpoint.load(tmp_path, train=True)
    assert all(same_bits(array, expected[name]) for name, array in found.params.items())
    assert found.train is not None
    assert same_bits(found.train["n"], np.arange(4096.0))
    assert found.train_json == {"position": 1}


def test_cast_converts_parameters_and_nothing_else(saved: Path):
    found = checkpoint.load(saved, train=True, cast="bfloat16")
    expected = np.asarray(contents().params["head.weight"]).astype(jnp.bfloat16)
    assert same_bits(found.params["head.weight"], expected)
    assert found.train is not None
    assert same_bits(found.train["moments.0.mu"], TRAIN["moments.0.mu"])


def test_describe_has_the_usual_keys_and_reads_no_array(run: Path):
    for path in (run / "step-00000120/params").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    found = checkpoint.describe(run)
    assert {key: found[key] for key in CONFIG.to_dict()} == CONFIG.to_dict()
    assert (found["stage"], found["step"], found["steps"], found["resumable"]) == ("sft", 120, [120], True)
    assert found["parameters"]["embed.tokens.weight"] == {"shape": [CONFIG.vocab_size, 6], "dtype": "float32"}
    assert found["parameter_count"] == sum(array.size for array in contents().params.values())
    assert found["tokenizer"]["specials"]["start"]["text"] == "<|im_start|>"
    assert found["template"] == "chatml"
    json.dumps(found, allow_nan=False)


def test_importing_the_module_loads_neither_jax_nor_orbax_and_saving_prints_nothing(saved: Path, tmp_path: Path):
    code = (
        "import sys; from jaxgpt import checkpoint\n"
        "assert not {'jax', 'orbax'} & sys.modules.keys()\n"
        "import dataclasses, pathlib\n"
        f"found = checkpoint.load({str(saved)!r}, train=True)\n"
        "values = {field.name: getattr(found, field.name) for field in dataclasses.fields(checkpoint.Contents)}\n"
        f"checkpoint.save(pathlib.Path({str(tmp_path)!r}), 1, checkpoint.Contents(**values)).result()\n"
        f"checkpoint.load({str(tmp_path)!r}, train=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- Damage ------------------------------------------------------------------------------


def all_files() -> list[str]:
    """Names in a step folder, without saving one: those of arrays follow from their names."""
    chunk = {0: "c", 1: "c/0", 2: "c/0/0"}
    trees: dict[str, Any] = {"params": random_params(CONFIG), "train": TRAIN}
    arrays = [f"{tree}/{name}/{file}" for tree, content in trees.items() for name, array in content.items()
              for file in ("zarr.json", chunk[array.ndim])]  # fmt: skip
    documents = ["model.json", "tokenizer_state.json", "template.json", "train.json", "manifest.json"]
    return [*documents, "_CHECKPOINT_METADATA", "orbax.checkpoint", "params/_METADATA", "train/_METADATA", *arrays]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 4
    else:
        data = bytearray(b"x")
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1] or b"x"),
    "zeroed": lambda path: path.write_bytes(bytes(max(1, path.stat().st_size))),
    "deleted": lambda path: path.unlink(),
}


def test_the_list_of_damaged_files_is_complete(saved: Path):
    assert set(all_files()) == set(manifest.files(saved / "step-00000120"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_refused_and_the_file_named(run: Path, damage: str):
    step = run / "step-00000120"
    for name in all_files():
        before = (step / name).read_bytes()
        DAMAGE[damage](step / name)
        message = refused(run, train=True)
        assert message.startswith(f"checkpoint step 120: {name} "), message
        assert message.endswith("; restore it or load an older step")
        (step / name).write_bytes(before)
    checkpoint.load(run, train=True)


def test_arrays_swapped_with_each_other_are_refused(run: Path):
    step = run / "step-00000120/params"
    (step / "layers.0.attn_norm.weight").rename(step / "x")
    (step / "layers.0.mlp_norm.weight").rename(step / "layers.0.attn_norm.weight")
    (step / "x").rename(step / "layers.0.mlp_norm.weight")
    assert refused(run).startswith("checkpoint step 120: params/layers.0.attn_norm.weight/c/0 fails SHA-256")


def test_a_foreign_file_is_refused(run: Path):
    (run / "step-00000120/params/extra").write_text("x")
    assert "params/extra not in manifest.json" in refused(run)


def test_what_is_no_checkpoint_says_what_was_expected(tmp_path: Path):
    assert refused(tmp_path).endswith(" holds no checkpoint; give a run folder, with steps such as step-00000120")
    assert refused(tmp_path / "none").startswith(f"{tmp_path / 'none'} is no folder; give a run folder")


def test_the_root_folder_is_no_checkpoint_either():
    assert refused(Path("/")).startswith("/ holds no checkpoint")


def test_an_error_of_the_system_without_a_file_is_told_alone(run: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(checkpoint.array_files, "mapped", full)
    assert refused(run, mapped=True) == "checkpoint step 120: Too many open files"


def test_a_step_that_is_not_there_is_named_with_those_that_are(saved: Path):
    assert refused(saved, step=5) == f"{saved} has no step 5; it has 120"


# -- Folders that agree with their manifest but not with themselves ------------------------


def reseal(run: Path) -> Path:
    manifest.seal(run / "step-00000120")
    return run


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


EMBED = "params/embed.tokens.weight/zarr.json"
NORM = "params/final_norm.weight"


def rename_key(tree: Any, key: str) -> None:
    """In Orbax's list, `final_norm.weight` becomes `key`."""
    entry = tree["tree_metadata"].pop("('final_norm.weight',)")
    entry["key_metadata"][0]["key"] = key
    tree["tree_metadata"][str((key,))] = entry


CONTRADICTIONS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "rows": (
        "model.json",
        lambda m: m["config"].update(intermediate_size=9),
        "params.layers.0.mlp.gate.kernel: file [6,8], model [6,9]; params.layers.0.mlp.up.kernel: file [6,8], "
        "model [6,9]; params.layers.0.mlp.down.kernel: file [8,6], model [9,6]",
    ),
    "tied": (
        "model.json",
        lambda m: m["config"].update(tie_word_embeddings=True),
        "params.head.weight: not in the model",
    ),
    "biases": (
        "model.json",
        lambda m: m["config"].update(qkv_bias=True),
        "params.layers.0.attn.q.bias: missing; params.layers.0.attn.k.bias: missing; params.layers.0.attn.v.bias",
    ),
    "a billion layers": (
        "model.json",
        lambda m: m["config"].update(num_hidden_layers=10**9),
        "model has 1,000,000,000 layers, file has 12 arrays",
    ),
    "vocabulary": (
        "tokenizer_state.json",
        lambda s: s.update(model_vocab_size=384),
        "tokenizer is for a model of 384 rows, the model embeds 320",
    ),
    "special ids": (
        "tokenizer_state.json",
        lambda s: s["special_token_ids"].update({"<|im_end|>": 3}),
        "ids by string and ids by name differ; saved strings",
    ),
    "dtype": (
        "model.json",
        lambda m: m["parameters"]["head.weight"].update(dtype="bfloat16"),
        "params.head.weight is float32, requested bfloat16; `jaxgpt export --dtype bfloat16` casts it",
    ),
    "format": ("model.json", lambda m: m.update(format_version=9), "has format version 9; this jaxgpt reads version 1"),
    "unknown config key": ("model.json", lambda m: m["config"].update(x=1), "model config has unknown keys x"),
    "stage": ("model.json", lambda m: m.update(stage="dpo"), "stage 'dpo'"),
    "no config": ("model.json", lambda m: m.pop("config") and None, "model.json is not what jaxgpt wrote"),
    "config a list": ("model.json", lambda m: m.update(config=[]), "model.json is not what jaxgpt wrote"),
    "a list": ("model.json", lambda _: [1], "model.json is not a JSON object"),
    "another step": ("model.json", lambda m: m.update(step=110), "model.json is of step 110, not of step-00000120"),
    "no stop token of the model": (
        "model.json",
        lambda m: m["generation"].update(eos_token_ids=[3, 320]),
        "model.json ends texts with token 320, expected ids 0–319",
    ),
    "a stop token that is text": (
        "model.json",
        lambda m: m["generation"].update(eos_token_ids=["a"]),
        "model.json ends texts with token 'a', expected ids 0–319",
    ),
    "a shape of texts": (
        "model.json",
        lambda m: m["parameters"]["head.weight"].update(shape=["a"]),
        "model.json gives head.weight the shape ['a'], expected positive integers",
    ),
    "a template of another tokenizer": (
        "template.json",
        lambda t: t["specials"].update(start="<|nope|>"),
        "template chatml needs start to be '<|nope|>', the tokenizer has '<|im_start|>'; restore the files",
    ),
    "template": ("template.json", lambda t: t.update(x=1), "chat template has unknown key x"),
    "huge shape": (
        EMBED,
        lambda z: z.update(shape=[2**40, 6]),
        "params/embed.tokens.weight/zarr.json declares 26.4 TB, its files hold 7.7 KB; refused",
    ),
    "negative shape": (EMBED, lambda z: z.update(shape=[-1, 6]), "does not declare an array that jaxgpt writes"),
    "huge chunk": (
        EMBED,
        lambda z: z["chunk_grid"]["configuration"].update(chunk_shape=[2**60, 2**60]),
        "declares chunks larger than the array; refused",
    ),
    "huge inner chunk": (
        EMBED,
        lambda z: z["codecs"][0]["configuration"].update(chunk_shape=[2**60, 2**60]),
        "declares codecs that jaxgpt does not write; refused",
    ),
    "compression bomb": (
        EMBED,
        lambda z: z.update(codecs=[{"name": "gzip", "configuration": {"level": 9}}]),
        "declares codecs that jaxgpt does not write; refused",
    ),
    "unknown dtype": (EMBED, lambda z: z.update(data_type="r999999999"), "does not declare an array"),
    "storage transformers": (EMBED, lambda z: z.update(storage_transformers=[1]), "does not declare an array"),
    "absolute path": (
        "params/_METADATA",
        lambda t: rename_key(t, "/etc/passwd"),
        "params/_METADATA names /etc/passwd, which is no array of this folder; refused",
    ),
    "parent path": ("params/_METADATA", lambda t: rename_key(t, "../train/step"), "names ../train/step, which is no"),
    "another store": ("params/_METADATA", lambda t: t.update(use_ocdbt=True), "another storage than jaxgpt writes"),
    "nested": (
        "params/_METADATA",
        lambda t: t["tree_metadata"]["('head.weight',)"]["key_metadata"].append({"key": "/etc", "key_type": 2}),
        "does not declare one flat dictionary; refused",
    ),
    "a name given twice": (
        "params/_METADATA",
        lambda t: t["tree_metadata"].update({"('/etc',)": t["tree_metadata"]["('head.weight',)"]}),
        "which is no array of this folder; refused",
    ),
    "hostile training state": (
        "train/_METADATA",
        lambda t: t["tree_metadata"]["('step',)"]["key_metadata"][0].update(key="/etc"),
        "train/_METADATA names /etc, which is no array of this folder; refused",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_folder_that_contradicts_itself_is_refused_before_orbax_reads(
    run: Path, case: str, monkeypatch: pytest.MonkeyPatch
):
    name, change, message = CONTRADICTIONS[case]
    edit(run / "step-00000120" / name, change)
    real = checkpoint._read_arrays

    def only_params_of_a_sound_folder(path: Path, tree: str, headers: Any) -> Any:
        assert name.startswith("train/"), "Orbax was called"
        assert tree == "params"
        return real(path, tree, headers)

    monkeypatch.setattr(checkpoint, "_read_arrays", only_params_of_a_sound_folder)
    assert message in refused(reseal(run), train=True)


def test_files_that_no_array_declares_are_refused_even_if_listed(run: Path):
    (run / "step-00000120/params/manifest.ocdbt").write_bytes(b"points anywhere")
    assert "params/manifest.ocdbt belongs to no array of the checkpoint; refused" in refused(reseal(run))


@pytest.mark.parametrize(
    "declared",
    [
        {"chunk_key_encoding": {"name": "v2"}},
        {"fill_value": {"a": 1}},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "middle"}}]},
    ],
)
def test_what_orbax_cannot_read_is_one_line_too(run: Path, declared: dict[str, Any]):
    edit(run / f"step-00000120/{NORM}/zarr.json", lambda z: z.update(declared))
    message = refused(reseal(run))
    assert message.startswith("checkpoint step 120: params cannot be read (")
    assert message.endswith("); restore it")


def test_an_array_of_missing_bytes_is_refused(run: Path):
    (run / f"step-00000120/{NORM}/c/0").unlink()
    assert f"{NORM}/zarr.json declares 24 bytes, its files hold 0 bytes; refused" in refused(reseal(run))


def test_cast_accepts_what_the_dtype_rule_refuses(run: Path):
    edit(run / "step-00000120/model.json", CONTRADICTIONS["dtype"][1])
    assert str(checkpoint.load(reseal(run), cast="bfloat16").params["head.weight"].dtype) == "bfloat16"


# -- Falling back --------------------------------------------------------------------------


def test_resume_falls_back_to_the_newest_verified_step_and_says_so(tmp_path: Path):
    for step in (100, 1100, 1200):
        save(tmp_path, step)
    flip(tmp_path / "step-00001200/train/step/c")
    plain = refused(tmp_path, train=True)
    assert plain.startswith("checkpoint step 1200: train/step/c fails SHA-256; ")
    found = checkpoint.load(tmp_path, train=True, fallback=True)
    assert found.step == 1100
    assert found.notices == ["checkpoint step 1200: train/step/c fails SHA-256; using verified step 1100"]
    # The damaged step no longer counts as the newest, but nothing of it is lost.
    assert checkpoint.steps(tmp_path) == [100, 1100]
    assert (tmp_path / "step-00001200.damaged/train/step/c").exists()
    save(tmp_path, 1200, keep=1)
    assert checkpoint.steps(tmp_path) == [1200]


def test_a_newest_step_without_its_manifest_is_not_passed_over_in_silence(tmp_path: Path):
    for step in (100, 200):
        save(tmp_path, step)
    lost = tmp_path / "step-00000200/manifest.json"
    lost.unlink()
    missing = f"checkpoint step 200: manifest.json is missing in {lost.parent}; this is not a finished checkpoint"
    assert refused(tmp_path) == f"{missing}; restore it or load an older step"
    with pytest.raises(CheckpointError, match=r"step 200: manifest\.json is missing"):
        checkpoint.describe(tmp_path)
    assert checkpoint.load(tmp_path, step=100).step == 100
    found = checkpoint.load(tmp_path, train=True, fallback=True)
    assert (found.step, found.notices) == (100, [f"{missing}; using verified step 100"])


def test_no_verified_step_left_is_an_error_that_names_every_file(tmp_path: Path):
    for step in (1, 2):
        save(tmp_path, step)
        flip(tmp_path / f"step-0000000{step}/model.json")
    assert refused(tmp_path, train=True, fallback=True) == (
        "checkpoint step 2: model.json fails SHA-256; checkpoint step 1: model.json fails SHA-256; "
        "no verified step is left"
    )
    assert checkpoint.steps(tmp_path) == [1, 2]


# -- Keeping -------------------------------------------------------------------------------


def test_the_last_n_and_the_best_are_kept(tmp_path: Path):
    for step, score in enumerate([3.0, 1.0, float("nan"), 2.0, 1.5, None], start=1):
        save(tmp_path, step, keep=2, score=score)
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000005", "step-00000006"}


def test_the_step_just_saved_is_kept_whatever_lies_beside_it(tmp_path: Path):
    save(tmp_path, 500)
    save(tmp_path, 100, keep=1)
    assert checkpoint.steps(tmp_path) == [100, 500]


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path):
    save(tmp_path, 1)
    save(tmp_path, 1, stage="base")
    assert checkpoint.load(tmp_path).stage == "base"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# -- Saving that fails ---------------------------------------------------------------------


def failed(directory: Path, step: int = 1200, **changes: Any) -> str:
    pending = checkpoint.save(directory, step, contents(**changes))
    with pytest.raises(CheckpointError) as caught:
        pending.result()
    assert "\n" not in str(caught.value)
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    return str(caught.value)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1100)
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(checkpoint, "_begin_arrays", lambda *_: pytest.fail("wrote"))
    large = {"n": np.zeros(350_000)}
    message = failed(tmp_path, train=large)
    assert message.startswith("step 1200 was not saved: disk full (need 3.")
    assert message.endswith(" MB, 200.0 KB free); last good step 1100")
    assert checkpoint.steps(tmp_path) == [1100]


def test_a_disk_too_small_for_the_steps_of_a_run_is_said_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = contents(train={"n": np.zeros(350_000)})
    leftover = tmp_path / ".step-00000001.partial"
    leftover.mkdir()

    def refused(free: int, **asked: int) -> str:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.prepare(tmp_path, step, **asked)
        return str(caught.value)

    usage = shutil.disk_usage(tmp_path)
    assert refused(3_100_000, saves=1, keep=2).startswith(f"{tmp_path} needs room for a checkpoint of 3.")
    assert not leftover.exists()
    message = refused(9_300_000, saves=5, keep=2)
    assert message.startswith(f"{tmp_path} needs room for 3 checkpoints of 3.")
    assert message.endswith(" MB, 9.3 MB free; make room, keep fewer (--keep), or give another --out")
    assert refused(5_900_000, saves=2, keep=9).startswith(f"{tmp_path} needs room for 2 checkpoints of ")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6_500_000))
    checkpoint.prepare(tmp_path, step, saves=5, keep=1)
    # What lies there makes room when the next step counts.
    save(tmp_path, 1)
    save(tmp_path, 2)
    checkpoint.prepare(tmp_path, step, saves=5, keep=2)


@pytest.mark.parametrize("where", ["manifest.seal", "os.rename", "Path.write_text"])
def test_a_disk_that_fills_up_while_saving_loses_only_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1100)
    with monkeypatch.context() as patch:
        if where == "manifest.seal":
            patch.setattr(manifest, "seal", full)
        elif where == "os.rename":
            patch.setattr(os, "rename", full)
        else:
            patch.setattr(Path, "write_text", full)
        message = failed(tmp_path)
    assert message.startswith("step 1200 was not saved: disk full (need ")
    assert message.endswith("; last good step 1100")
    assert checkpoint.load(tmp_path).step == 1100
    save(tmp_path, 1200)
    assert checkpoint.load(tmp_path).step == 1200


def test_an_error_of_orbax_surfaces_at_the_save_it_belongs_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failing:
        def result(self) -> None:
            raise ValueError("OUT_OF_RANGE: write failed\nNo space left on device [os_error_code='28']")

    monkeypatch.setattr(checkpoint, "_begin_arrays", lambda *_: Failing())
    assert failed(tmp_path, 7).startswith("step 7 was not saved: disk full (need ")
    assert failed(tmp_path, 7).endswith("; no step was saved before")


def test_what_orbax_still_writes_of_a_failed_save_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class StillWriting:
        def result(self) -> None:
            rest = tmp_path / ".step-00000007.partial.orbax-checkpoint-tmp/params/a"
            rest.mkdir(parents=True)
            threading.Timer(0.05, rest.mkdir, kwargs={"parents": True, "exist_ok": True}).start()
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(checkpoint, "_begin_arrays", lambda *_: StillWriting())
    assert failed(tmp_path, 7).startswith("step 7 was not saved: [Errno 27] File too large; ")


def refuse_thread(patch: pytest.MonkeyPatch, which: Callable[[threading.Thread, int], bool]) -> None:
    """The threads that `which` picks, by their number too, cannot be started."""
    start, numbers = threading.Thread.start, itertools.count(1)

    def limited(self: threading.Thread) -> None:
        if which(self, next(numbers)):
            raise RuntimeError("can't start new thread")
        start(self)

    patch.setattr(threading.Thread, "start", limited)


@pytest.mark.parametrize("number", [3, 5, 9])
def test_a_save_that_could_not_begin_leaves_no_thread_that_the_exit_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    save(tmp_path, 1)
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        refuse_thread(patch, lambda _, n: n == number)
        assert failed(tmp_path) == "step 1200 was not saved: can't start new thread; last good step 1"
    gc.collect()
    deadline = time.monotonic() + 20
    while left := [t for t in {*threading.enumerate()} - before if not t.daemon]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_where_no_thread_is_left_to_finish_a_save_the_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    refuse_thread(monkeypatch, lambda thread, _: thread.name == "save step 3")
    assert save(tmp_path, 3).name == "step-00000003"


def test_a_file_in_the_place_of_a_leftover_folder_is_removed(tmp_path: Path):
    for name in (".step-00000006.partial", ".step-00000006.replaced"):
        (tmp_path / name).write_text("")
    assert save(tmp_path, 6).name == "step-00000006"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_a_run_folder_that_is_gone_is_said_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Gone:
        def result(self) -> None:
            shutil.rmtree(tmp_path / "run")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_begin_arrays", lambda *_: Gone())
    saving = checkpoint.save(tmp_path / "run", 7, contents())
    assert saving.ended(within=10)
    with pytest.raises(CheckpointError, match=r"disk full \(need .*, unknown free\); no step was saved before"):
        saving.result()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "dpo"}, "stage 'dpo' or compute dtype 'bfloat16' is unknown"),
        ({"config": dataclasses.replace(CONFIG, vocab_size=384)}, "tokenizer has 320 tokens, model embeds 384"),
        ({"params": {}}, "model has 1 layers, array has 0 arrays"),
        ({"params": random_params(dataclasses.replace(CONFIG, head_dim=4))}, "array [6,24], model [6,12]"),
        ({"train": {"../x": np.ones(1)}}, "training state '../x' of shape [1] cannot be saved"),
        ({"train": {"x": np.ones((0, 2))}}, "training state 'x' of shape [0, 2] cannot be saved"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path / "run", 1, contents(**changes))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
