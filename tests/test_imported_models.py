"""`check`, `bench`, `chat` and `sft` take every imported model with no flag but where things lie."""

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja_families
import numpy as np
import often
import pytest
import small_vocabularies as small
import torch
from conftest import CONFIGS, random_params

from jaxgpt import chat, cli, lm, loading, weights
from jaxgpt.chat import TEMPLATES, Message
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.formats import hf, hf_tokenizer
from jaxgpt.tokenizer import Tokenizer

ROWS = 768
"""Of the embedding: the 705 tokens of the small vocabularies, and some that are none."""
MESSAGES: list[Message] = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]


def json_(rule: str, template: str | None = None) -> Callable[[Path], object]:
    return lambda folder: small.as_json(folder, rule, **({} if template is None else {"chat_template": template}))


def files(class_: str, rule: str, *, in_hex: bool) -> Callable[[Path], object]:
    return lambda folder: small.as_two_files(folder, rule, class_, in_hex=in_hex)


@dataclass(frozen=True)
class Case:
    """A family, and a tokenizer in one of its forms."""

    config: str
    tokenizer: Callable[[Path], object]
    kind: str
    jinja: bool = False
    dtype: str = "float32"


CASES = {
    "gpt2": Case("gpt2", json_("gpt-2"), "hf"),
    "llama with biases and its own head_dim": Case(
        "llama-biased-tied", json_("llama-bpe", jinja_families.QWEN2), "hf", True, "bfloat16"
    ),
    "llama3 scaling": Case("llama3-scaling", files("LlamaTokenizer", "llama-bpe", in_hex=False), "bpe"),
    "qwen2": Case("qwen2", files("Qwen2Tokenizer", "qwen2", in_hex=True), "hex", dtype="float16"),
    "qwen2, tied": Case("qwen2-tied", json_("qwen2", jinja_families.QWEN2), "hf", True),
    "qwen3 with yarn": Case("qwen3-yarn", json_("qwen2", jinja_families.CHATML), "hf", True, "bfloat16"),
    "mistral with a window": Case("mistral", json_("gpt-2"), "hf"),
}


OFTEN = ("qwen3 with yarn",)
"""With a chat template and without, a tokenizer.json and hexadecimal keys, both 16-bit dtypes."""


def sensible(config: ModelConfig, likely: list[int]) -> dict[str, Any]:
    """Random weights that know which tokens are likely: `sft` refuses a model that is worse than a guess."""
    params = {name: np.array(array) for name, array in random_params(config).items()}
    for name, array in params.items():
        if name.endswith("kernel") or name.startswith(("embed", "head")):
            array *= 0.1
    # A direction that all states have, and that the head looks for in the likely tokens.
    direction = np.resize(np.float32([0.3, -0.3]), config.hidden_size)
    params["embed.tokens.weight"] += direction
    params["embed.tokens.weight" if config.tie_word_embeddings else "head.weight"][likely] += direction
    return params


def hf_folder(case: Case, folder: Path) -> Path:
    config = dataclasses.replace(
        CONFIGS[case.config], vocab_size=ROWS, num_hidden_layers=1, max_position_embeddings=256
    )
    files = folder.with_name("tokenizer")
    case.tokenizer(files)
    tokenizer, template = hf_tokenizer.read(files, ROWS, [])
    assert tokenizer is not None
    likely = chat.render(MESSAGES, tokenizer, template or TEMPLATES["plain"]).ids
    params = {name: array.astype(jnp.dtype(case.dtype)) for name, array in sensible(config, likely).items()}
    source = Checkpoint(
        path=folder, step=0, config=config, stage="base", compute_dtype=case.dtype, eos_token_ids=[], tokenizer=None,
        template=None, provenance={}, params=params,
    )  # fmt: skip
    hf.write(source, folder)
    for path in files.glob("*"):
        path.rename(folder / path.name)
    return folder


def ran(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a verb wrote to stdout; it must not fail."""
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert code == 0, f"jaxgpt {words[0]} ended with {code}: {said.out}{said.err}"
    return said.out


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1), said.err
    return said.err


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def use(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> lm.LM:
    """Import, then every verb; the imported model."""
    # Whether random weights of this width learn a batch by heart says nothing of the import.
    monkeypatch.setattr("jaxgpt.check.MEMORIZE_UNDER", 0)
    model, data = tmp_path / "model", tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    ran(capsys, "import", source, model, "--verify")
    assert ran(capsys, "check", model).endswith("\nPASS\n")
    assert json.loads(ran(capsys, "bench", model, "--iterations", 1))["max_tokens"] >= 2
    loaded = loading.load(str(model))
    sft = ("sft", "--model", model, "--data", data, "--out", tmp_path / "tuned", "--steps", 1, "--batch-size", 1)
    if loaded.tokenizer is None:
        assert "has no tokenizer" in refusal(capsys, "chat", model)
        assert "has no tokenizer" in refusal(capsys, *sft)
        return loaded
    type_in(monkeypatch, "one?\n")
    said = ran(capsys, "chat", model)
    assert said
    ran(capsys, *sft)
    type_in(monkeypatch, "one?\n")
    ran(capsys, "chat", tmp_path / "tuned")
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("name", often.exhaustive_but(OFTEN, CASES))
def test_every_verb_takes_an_imported_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    loaded = use(hf_folder(case, tmp_path / "hf"), tmp_path, capsys, monkeypatch)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.kind == case.kind
    assert (loaded.template is not None) == case.jinja
    assert loaded.compute_dtype == case.dtype


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(50304, id="GPT-2's vocabulary"),
        pytest.param(65, id="a vocabulary of its own"),
    ],
)
def test_every_verb_takes_a_training_scripts_file(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As nanoGPT's quick start trains it: a context of 64, no biases, no tokenizer in the file."""
    config = dataclasses.replace(
        CONFIGS["gpt2"], vocab_size=rows, max_position_embeddings=64, num_hidden_layers=1, hidden_act="gelu",
        qkv_bias=False, attention_output_bias=False, mlp_bias=False,
    )  # fmt: skip
    likely = chat.render(MESSAGES, Tokenizer.create("gpt2", template=TEMPLATES["plain"]), TEMPLATES["plain"]).ids
    state: dict[str, torch.Tensor] = {}
    biased = dataclasses.replace(config, qkv_bias=True, attention_output_bias=True, mlp_bias=True)
    for key, array in weights.to_hf(biased, sensible(biased, likely if rows > 65 else [])).items():
        if not key.endswith("bias"):
            matrix = array.ndim == 2 and ".h." in key
            state[key] = torch.from_numpy(np.ascontiguousarray(array.T if matrix else array))
    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 36, "block_size": 64, "bias": False, "vocab_size": rows}
    torch.save({"model": state, "model_args": sizes}, tmp_path / "ckpt.pt")
    loaded = use(tmp_path / "ckpt.pt", tmp_path, capsys, monkeypatch)
    assert (loaded.tokenizer is None) == (rows == 65)
    assert loaded.config.max_position_embeddings == 64
