"""llama.cpp computes, from every exported file, what jaxgpt computes: probabilities, tokens, text, turns."""

import dataclasses
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import jinja_families
import llama_cpp
import ml_dtypes
import numpy as np
import pytest
import small_vocabularies as small
from conftest import CONFIGS, LLAMA, random_params, rounding

from jaxgpt import chat, model, weights
from jaxgpt.chat import TEMPLATES, Message
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.formats import gguf_export, gguf_tokenizer, hf_tokenizer
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies import split_rules
from jaxgpt.weights import GGUFTensor

pytestmark = pytest.mark.slow

DTYPES = ("float32", "float16", "bfloat16", "q8_0")
WIDE: dict[str, ModelConfig] = {
    "llama-of-blocks": dataclasses.replace(LLAMA, hidden_size=96, head_dim=16, intermediate_size=160),
    "gpt2-of-blocks": dataclasses.replace(CONFIGS["gpt2"], hidden_size=96, head_dim=24, intermediate_size=160),
    "llama-odd": dataclasses.replace(LLAMA, hidden_size=40, qkv_bias=True, mlp_bias=True),
    "qwen2-llama3": dataclasses.replace(CONFIGS["llama3-scaling"], qkv_bias=True),
    "gpt2-unbiased": dataclasses.replace(CONFIGS["gpt2"], qkv_bias=False, attention_output_bias=False, mlp_bias=False),
}
"""Rows of whole blocks of Q8_0; points of the config space that Hugging Face has no name for."""
ALL = CONFIGS | WIDE
forward = jax.jit(model.forward, static_argnums=0)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def a_checkpoint(config: ModelConfig, **changes: Any) -> Checkpoint:
    params = {name: np.asarray(array) for name, array in random_params(config).items()}
    values: dict[str, Any] = {
        "path": Path(), "step": 0, "config": config, "stage": "base", "compute_dtype": "float32",
        "eos_token_ids": [], "tokenizer": None, "template": None, "provenance": {}, "params": params,
    }  # fmt: skip
    return Checkpoint(**{**values, **changes})


# -- The model -------------------------------------------------------------------------


def stored(x: Any, dtype: str) -> np.ndarray:
    """Values as ggml's matrix products see them on both sides; the last axis is the one that is summed over."""
    x = np.asarray(x, np.float32)
    if dtype == "q8_0" and x.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    narrow: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    return x.astype(narrow.get(dtype, np.float16)).astype(np.float32)


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    return jax.pure_callback(partial(stored, dtype=dtype), jax.ShapeDtypeStruct(x.shape, jnp.float32), x)


def as_llama_cpp_rounds(config: ModelConfig, params: dict[str, jax.Array], ids: Sequence[int], dtype: str) -> Any:
    """Log-probabilities with both sides of every matrix product rounded, and GELU as ggml's table of float16."""

    def weight(name: str, array: jax.Array) -> np.ndarray:
        values = np.asarray(array)
        if name.endswith(".kernel"):
            return stored(values.T, dtype).T
        return values if values.ndim == 1 or name == "embed.positions.weight" else stored(values, dtype)

    def projection(config: ModelConfig, p: Any, x: jax.Array) -> jax.Array:
        return rounded(x, dtype) @ p["kernel"] + p.get("bias", 0.0)

    def head(config: ModelConfig, p: Any, x: jax.Array) -> jax.Array:
        return rounded(x, dtype) @ p["weight"].T

    def gelu(config: ModelConfig, p: Any, x: jax.Array) -> jax.Array:
        return rounded(jax.nn.gelu(rounded(x, "float16"), approximate=True), "float16")

    replace: dict[str, Any] = {"projection": projection, "head": head}
    if config.norm == "layernorm":
        replace["activation"] = gelu
    run = jax.jit(lambda params, batch: model.forward(config, params, batch, replace=replace).logits[0])
    logits = run({name: weight(name, array) for name, array in params.items()}, jnp.asarray([ids]))
    return np.asarray(jax.nn.log_softmax(logits))


def log_probabilities(config: ModelConfig, params: Any, ids: Sequence[int]) -> Any:
    """(T, V) of one sequence."""
    return np.asarray(jax.nn.log_softmax(forward(config, params, jnp.asarray([ids])).logits[0]))


def a_prompt(config: ModelConfig) -> list[int]:
    return np.random.default_rng(1).integers(0, config.vocab_size, 8).tolist()


def a_question(path: Path, config: ModelConfig) -> tuple[Path, list[llama_cpp.Request]]:
    # A sliding window is the whole context of the file.
    tokens = min(config.sliding_window or 96, 20) - 8
    return path, [llama_cpp.completion(a_prompt(config), tokens, config.vocab_size)]


def differences(config: ModelConfig, params: Any, answer: Any, dtype: str) -> tuple[float, float, int]:
    """How far llama.cpp's log-probabilities are from ours, how far they may be, and how many tokens are certain.

    What llama.cpp rounds is rounded here too, and what that moves is the size of what
    rounding does to this very model and prompt; llama.cpp's own, another draw of the
    same, may be as far again on the other side.
    """
    prompt, tokens = a_prompt(config), answer["tokens"]
    steps = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
    ours = log_probabilities(config, params, prompt + tokens)[steps]
    noise = 0.0
    if dtype != "float32" or config.norm == "layernorm":
        noise = float(np.abs(as_llama_cpp_rounds(config, params, prompt + tokens, dtype)[steps] - ours).max())
    limit = 2 * noise + rounding(ours)
    theirs = np.asarray(llama_cpp.log_probabilities(answer, config.vocab_size))
    second, best = np.sort(ours)[:, -2:].T
    certain = best - second > 2 * limit
    assert np.array_equal(ours.argmax(-1)[certain], np.asarray(tokens)[certain]), "another token, by a clear margin"
    return float(np.abs(theirs - ours).max()), limit, int(certain.sum())


FIRST = (
    *(("gpt2", "float32"), ("llama-of-blocks", "q8_0"), ("llama-biased-tied", "float32")),
    *(("llama3-scaling", "float32"), ("qwen2", "bfloat16"), ("qwen3-yarn", "float32")),
)
REST = tuple((name, dtype) for name in ALL for dtype in DTYPES if (name, dtype) not in FIRST)


@pytest.mark.parametrize("rows", [FIRST, pytest.param(REST, marks=pytest.mark.exhaustive)], ids=["some", "all others"])
def test_llama_cpp_computes_every_model_in_every_dtype(tmp_path: Path, rows: Any):
    questions: list[Any] = []
    for name, dtype in rows:
        path = tmp_path / f"{name}-{dtype}.gguf"
        gguf_export.write(a_checkpoint(ALL[name]), path, dtype=dtype)
        questions.append(a_question(path, ALL[name]))
    tokens = certain = 0
    for (name, dtype), [answer] in zip(rows, llama_cpp.ask_all(questions), strict=True):
        found, limit, sure = differences(ALL[name], random_params(ALL[name]), answer, dtype)
        assert found <= limit, f"{name} in {dtype}: log-probabilities {found:.1e} apart, rounding explains {limit:.1e}"
        tokens, certain = tokens + len(answer["tokens"]), certain + sure
    assert certain > 0.75 * tokens, "greedy tokens were compared where the margin allows it, which is nearly everywhere"


def _unpaired(tensor: GGUFTensor) -> GGUFTensor:
    return dataclasses.replace(tensor, paired_heads=0)


def _without_kv_pairs(tensor: GGUFTensor) -> GGUFTensor:
    return _unpaired(tensor) if tensor.name.endswith("attn_k.weight") else tensor


def _without_bias_pairs(tensor: GGUFTensor) -> GGUFTensor:
    return _unpaired(tensor) if tensor.name.endswith(".bias") else tensor


def _paired(tensor: GGUFTensor) -> GGUFTensor:
    heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2], 0)
    return dataclasses.replace(tensor, paired_heads=heads)


def _reversed_parts(tensor: GGUFTensor) -> GGUFTensor:
    return dataclasses.replace(tensor, parts=tensor.parts[::-1])


class Transposed(GGUFTensor):
    """A square matrix as we store it."""

    def of(self, params: Any) -> np.ndarray:
        return super().of(params).T


def _transposed(tensor: GGUFTensor) -> GGUFTensor:
    square = tensor.name.endswith("attn_output.weight") and tensor.shape[0] == tensor.shape[1]
    return Transposed(tensor.name, tensor.shape, tensor.parts, tensor.paired_heads) if square else tensor


FAULTS: dict[str, tuple[str, Any]] = {
    "rows not in pairs": ("llama", _unpaired),
    "rows of k not in pairs": ("llama", _without_kv_pairs),
    "biases not in pairs": ("llama-biased-tied", _without_bias_pairs),
    "rows in pairs for qwen2": ("qwen2", _paired),
    "q, k and v in another order": ("gpt2", _reversed_parts),
    "a square matrix not transposed": ("llama-square", _transposed),
    "the same for gpt2": ("gpt2", _transposed),
}


def test_llama_cpp_sees_every_wrong_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = weights.gguf_tensors
    questions: list[Any] = []
    for number, (name, fault) in enumerate(FAULTS.values()):
        monkeypatch.setattr(weights, "gguf_tensors", lambda config, fault=fault: tuple(map(fault, right(config))))
        path = tmp_path / f"{number}.gguf"
        gguf_export.write(a_checkpoint(ALL[name]), path)
        questions.append(a_question(path, ALL[name]))
    for (what, (name, _)), [answer] in zip(FAULTS.items(), llama_cpp.ask_all(questions), strict=True):
        try:
            found, limit, _ = differences(ALL[name], random_params(ALL[name]), answer, "float32")
        except AssertionError:  # another token, by a clear margin
            continue
        assert found > 100 * limit, what


def test_a_head_that_is_not_tied_is_read(tmp_path: Path):
    untied, path = ALL["llama"], tmp_path / "m.gguf"
    gguf_export.write(a_checkpoint(dataclasses.replace(untied, tie_word_embeddings=True)), path)
    [answer] = llama_cpp.ask(path, *a_question(path, untied)[1])
    with pytest.raises(AssertionError, match="another token"):
        differences(untied, random_params(untied), answer, "float32")


# -- Text ------------------------------------------------------------------------------

TEXTS = (
    *("Hello world", " don't  stop\n\n\t", "naïve 日本語 🙂", "1234 == x[5]", "", "  a  b   ", "I'LL we're"),
    *("def f(n):\n\treturn n  # ok\r\n", "<|im_end|>hi<|endoftext|>", "a\x00b\x7f\u200b", "٣ x² ₪€é", "   ", "\n"),
    *("e\u0301 \ufeff", "\xa0\xa0x \u3000\u3000y", "<0x41>", "<|pad_3|>", "👩‍👩‍👧‍👦 🏳️‍🌈", "Ġword"),
)
CORPUS = "".join(map(chr, range(32, 127))) + "\n\té日本€🙂"
MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say 'x\\n' {{ 1 }}"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "And é?"},
]


def a_talker(kind: str, template: str) -> Checkpoint:
    tokenizer = Tokenizer.create(kind, template=TEMPLATES[template], corpus=[CORPUS])
    return with_tokenizer(tokenizer, template=TEMPLATES[template])


def with_tokenizer(tokenizer: Tokenizer, **changes: Any) -> Checkpoint:
    config = dataclasses.replace(
        CONFIGS["gpt2"], vocab_size=tokenizer.model_vocab_size, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    return a_checkpoint(config, tokenizer=tokenizer, eos_token_ids=list(tokenizer.stop_ids), **changes)


def text_requests(tokenizer: Tokenizer, texts: Sequence[str]) -> list[llama_cpp.Request]:
    asked: list[llama_cpp.Request] = []
    for text in texts:
        body = {"content": tokenizer.normalise(text), "add_special": True}
        asked += [("/tokenize", body | {"parse_special": specials}) for specials in (False, True)]
        asked.append(("/detokenize", {"tokens": tokenizer.encode(text)}))
    return asked


def compare_texts(tokenizer: Tokenizer, texts: Sequence[str], answers: Sequence[Any]) -> None:
    bos = list(tokenizer.bos_ids)
    for number, text in enumerate(texts):
        ordinary, special, back = answers[3 * number : 3 * number + 3]
        assert ordinary["tokens"] == bos + tokenizer.encode(text), text
        assert special["tokens"] == bos + tokenizer.encode(text, specials=True), text
        assert back["content"] == tokenizer.decode(tokenizer.encode(text)), text


def test_llama_cpp_tokenises_and_templates_as_jaxgpt_does(tmp_path: Path):
    rows = [("gpt2", "chatml"), *(("char", template) for template in TEMPLATES)]
    questions: list[Any] = []
    for kind, template in rows:
        path, source = tmp_path / f"{kind}-{template}.gguf", a_talker(kind, template)
        assert gguf_export.write(source, path) == []
        assert source.tokenizer is not None
        more = [("/apply-template", {"messages": MESSAGES}), ("/props", None)]
        questions.append((path, [*text_requests(source.tokenizer, TEXTS), *more]))
    for (kind, template), [*texts, turns, props] in zip(rows, llama_cpp.ask_all(questions), strict=True):
        tokenizer = a_talker(kind, template).tokenizer
        assert tokenizer is not None
        compare_texts(tokenizer, TEXTS, texts)
        ids = chat.render(MESSAGES, tokenizer, TEMPLATES[template], generation_prompt=True).ids
        assert turns["prompt"] == tokenizer.decode(ids)
        assert props["eos_token"] == "<|endoftext|>"


FORMS = [
    *(("tokenizer.json", rule) for rule in split_rules.RULES),
    *(("hex", "qwen2"), ("vocab.json", "llama-bpe"), ("with bos", "llama-bpe")),
]


def an_imported_tokenizer(folder: Path, form: str, rule: str) -> Tokenizer:
    classes = {"qwen2": "Qwen2Tokenizer", "llama-bpe": "LlamaTokenizer"}
    if form in ("hex", "vocab.json"):
        small.as_two_files(folder, rule, classes[rule], in_hex=form == "hex")
    else:
        small.as_json(folder, rule)
    if form == "with bos":
        content = json.loads((folder / "tokenizer.json").read_text())
        bos = "<|endoftext|>"
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [700], "tokens": [bos]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, _ = hf_tokenizer.read(folder, 768, [])
    assert tokenizer is not None
    return tokenizer


def test_llama_cpp_tokenises_imported_vocabularies_alike(tmp_path: Path):
    texts = [*TEXTS, small.PYTHON, small.TYPED, *random_texts(100)]
    tokenizers = [an_imported_tokenizer(tmp_path / f"{form} {rule}", form, rule) for form, rule in FORMS]
    compare_files(tmp_path, tokenizers, texts)
    assert tokenizers[-1].bos_ids == (700,)


POOLS = (
    *("abcXYZ ", "  \n\t\r", "0123456789", "'sStTrReElLdDmMvV", "éèüßñÅ", "日本語文章", "한국어", "العربية", "हिन्दी"),
    *(
        "🙂👩\u200d👧🏳️\u200d🌈",
        "\x00\x01\x1b\x7f\x85",
        "\u00a0\u2003\u3000\u2028\u200b\ufeff",
        "²½Ⅷ٣४",
        "e\u0301a\u0308\u0323",
    ),
    *("!?.,;:()[]{}<>|#@$%^&*-_=+/\\\"'`~", "ſKİıΣςǅ", "\u1680\u180e\u202f", "\U0001d7d8\U00010400\U0001f1e9"),
)


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randrange(1, 30))) for _ in range(count)]


def compare_files(folder: Path, tokenizers: Sequence[Tokenizer], texts: Sequence[str]) -> None:
    questions: list[Any] = []
    for number, tokenizer in enumerate(tokenizers):
        path = folder / f"{number}.gguf"
        gguf_export.write(with_tokenizer(tokenizer), path)
        questions.append((path, text_requests(tokenizer, texts)))
    for tokenizer, answers in zip(tokenizers, llama_cpp.ask_all(questions), strict=True):
        compare_texts(tokenizer, texts, answers)


def test_llama_cpp_tokenises_generated_texts_alike(tmp_path: Path):
    tokenizers = [
        Tokenizer.create("gpt2", template=TEMPLATES["plain"]),
        Tokenizer.create("char", template=TEMPLATES["plain"], corpus=["".join(POOLS)[:150]]),
    ]
    compare_files(tmp_path, tokenizers, random_texts(250))


def test_a_space_and_its_spelling_in_llama_cpp_are_told_apart(tmp_path: Path):
    texts = ["a b", "a\u2581b", " \u2581 ", "\u2581", "  a", "\u2581\u2581 b", "x \u2581y\n <0x20>"]
    tokenizers = [
        Tokenizer.create("char", template=TEMPLATES["chatml"], corpus=[corpus])
        for corpus in ("abc", "abc ", "abc\u2581", "abc \u2581")
    ]
    compare_files(tmp_path, tokenizers, texts)


def test_where_no_overlap_is_said_llama_cpp_finds_the_same_added_tokens(tmp_path: Path):
    rng, base = random.Random(1), Tokenizer.create("char", template=TEMPLATES["plain"], corpus=["abc"])
    texts = ["".join(rng.choices("abc ", k=30)) for _ in range(20)]
    tokenizers: list[Tokenizer] = []
    while len(tokenizers) < 8:
        sets = {"".join(rng.choices("abc", k=rng.randrange(2, 7))) for _ in range(3)}
        tokenizer = base.with_added(sorted(sets))
        if gguf_tokenizer.metadata(tokenizer, None, tokenizer.model_vocab_size, [])[1] == []:
            tokenizers.append(tokenizer)
    compare_files(tmp_path, tokenizers, texts)


CHATS = {"qwen2": jinja_families.QWEN2, "llama3": jinja_families.LLAMA3, "zephyr": jinja_families.ZEPHYR}


def test_imported_templates_render_alike_in_llama_cpp(tmp_path: Path):
    questions: list[Any] = []
    expected: list[str] = []
    for name, source in CHATS.items():
        folder = small.as_json(tmp_path / name, "qwen2", chat_template=source, bos_token="<|im_start|>")
        notices: list[str] = []
        tokenizer, template = hf_tokenizer.read(folder, 768, notices)
        assert tokenizer is not None, notices
        assert template is not None, notices
        path = tmp_path / f"{name}.gguf"
        gguf_export.write(with_tokenizer(tokenizer, template=template), path)
        questions.append((path, [("/apply-template", {"messages": MESSAGES})]))
        ids = chat.render(MESSAGES, tokenizer, template, generation_prompt=True).ids
        expected.append(tokenizer.decode(ids))
    assert [turns["prompt"] for [turns] in llama_cpp.ask_all(questions)] == expected


def test_a_model_without_a_tokenizer_still_takes_and_gives_ids(tmp_path: Path):
    path, config = tmp_path / "m.gguf", CONFIGS["qwen2"]
    notices = gguf_export.write(a_checkpoint(config), path)
    assert notices == ["no tokenizer written: the checkpoint has none; prompts must be token ids"]
    [answer] = llama_cpp.ask(path, *a_question(path, config)[1])
    assert len(answer["tokens"]) == 12
