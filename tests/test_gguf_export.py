"""A GGUF file holds the checkpoint's values under llama.cpp's names, whole or not at all."""

import dataclasses
import errno
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import small_vocabularies as small
from conftest import CONFIGS, LLAMA, random_params

from jaxgpt import checkpoint, cli, manifest, weights
from jaxgpt.chat import TEMPLATES
from jaxgpt.checkpoint import Checkpoint, Contents
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError
from jaxgpt.formats import gguf_export, gguf_header, gguf_metadata, gguf_tokenizer, gguf_writer, hf_tokenizer
from jaxgpt.ops import rope_frequencies
from jaxgpt.settings import ExportSettings
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.vocabularies.bpe import HfEncoder

BLOCKS = dataclasses.replace(LLAMA, hidden_size=96, head_dim=16, intermediate_size=52)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def a_checkpoint(config: ModelConfig, dtype: str = "float32", **changes: Any) -> Checkpoint:
    params = {name: np.asarray(a).astype(jnp.dtype(dtype)) for name, a in random_params(config).items()}
    values: dict[str, Any] = {
        "path": Path(), "step": 0, "config": config, "stage": "base", "compute_dtype": dtype, "eos_token_ids": [7],
        "tokenizer": None, "template": None, "provenance": {}, "params": params,
    }  # fmt: skip
    return Checkpoint(**{**values, **changes})


def tensors_of(path: Path) -> dict[str, Any]:
    """As the gguf package reads them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


# -- Values ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama-biased-tied", "qwen2", "qwen3"])
def test_every_value_comes_back_bit_for_bit(tmp_path: Path, name: str, dtype: str):
    source, path = a_checkpoint(CONFIGS[name], dtype), tmp_path / "m.gguf"
    gguf_export.write(source, path)
    found = tensors_of(path)
    seen = 0
    for tensor in weights.gguf_tensors(source.config):
        expected, theirs = tensor.of(source.params), found.pop(tensor.name)
        assert tuple(theirs.shape[::-1]) == expected.shape
        wide = theirs.tensor_type == gguf.GGMLQuantizationType.F32
        assert wide == (dtype == "float32" or expected.ndim == 1 or tensor.name == "position_embd.weight")
        bits = expected.astype(np.float32) if wide else np.ascontiguousarray(expected)
        assert theirs.data.tobytes() == bits.tobytes(), tensor.name
        seen += expected.size
    assert found == {}
    assert seen == sum(array.size for array in source.params.values())


def test_every_parameter_is_in_the_file_once_and_nothing_else(config: ModelConfig):
    parts = [part.name for tensor in weights.gguf_tensors(config) for part in tensor.parts]
    assert sorted(parts) == sorted(part.name for part in weights.parameters(config))


def test_every_name_is_one_that_the_gguf_package_gives_the_architecture(config: ModelConfig):
    architecture = weights.gguf_architecture(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = {gguf.TENSOR_NAMES[kind].format(bid=layer) for kind in gguf.MODEL_TENSORS[number] for layer in range(2)}
    assert {tensor.name.rsplit(".", 1)[0] for tensor in weights.gguf_tensors(config)} <= known


def test_a_dtype_may_be_asked_for_and_rounds_as_the_package_does(tmp_path: Path):
    source = a_checkpoint(BLOCKS)
    for dtype, kind in (("float16", "F16"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")):
        path = tmp_path / f"{dtype}.gguf"
        gguf_export.write(source, path, dtype=typing.cast(Any, dtype))
        found, values = tensors_of(path)["blk.0.ffn_gate.weight"], source.params["layers.0.mlp.gate.kernel"].T
        expected = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])
        assert found.tensor_type.name == kind
        assert found.data.tobytes() == expected.tobytes()
        assert tensors_of(path)["output_norm.weight"].tensor_type.name == "F32"
        assert field(path, "general.file_type") == {"F16": 1, "BF16": 32, "Q8_0": 7}[kind]


def test_rows_that_are_no_whole_blocks_stay_float16_and_are_said(tmp_path: Path):
    notices = gguf_export.write(a_checkpoint(BLOCKS), tmp_path / "m.gguf", dtype="q8_0")
    names = "blk.0.ffn_down.weight, blk.1.ffn_down.weight"
    assert f"2 matrices stay float16: Q8_0 needs rows of a multiple of 32 ({names})" in notices
    assert tensors_of(tmp_path / "m.gguf")["blk.0.ffn_down.weight"].tensor_type.name == "F16"


def test_parameters_of_mixed_dtypes_each_keep_their_own(tmp_path: Path):
    source, path = a_checkpoint(CONFIGS["gpt2"], "bfloat16"), tmp_path / "m.gguf"
    for name in ("layers.0.attn.q.kernel", "layers.1.mlp.up.kernel"):
        source.params[name] = source.params[name].astype(np.float32)
    gguf_export.write(source, path)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(path).items()}
    # Packed with k and v in bfloat16: float32 holds all three exactly.
    assert types["blk.0.attn_qkv.weight"] == types["blk.1.ffn_up.weight"] == "F32"
    assert types["blk.1.attn_qkv.weight"] == "BF16"


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (1e9, "q8_0"), (float("nan"), "q8_0")])
def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path, value: float, dtype: Any):
    source = a_checkpoint(BLOCKS)
    source.params["head.weight"][3, 5] = value
    with pytest.raises(
        InputError, match=r"^output.weight has values that .* cannot hold; export with another --dtype$"
    ):
        gguf_export.write(source, tmp_path / "m.gguf", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_missing_biases_of_gpt2_are_zeros(tmp_path: Path):
    unbiased = dataclasses.replace(CONFIGS["gpt2"], qkv_bias=False, attention_output_bias=False, mlp_bias=False)
    gguf_export.write(a_checkpoint(unbiased), tmp_path / "none.gguf")
    gguf_export.write(a_checkpoint(CONFIGS["gpt2"]), tmp_path / "biased.gguf")
    none, biased = tensors_of(tmp_path / "none.gguf"), tensors_of(tmp_path / "biased.gguf")
    assert {n: tuple(t.shape) for n, t in none.items()} == {n: tuple(t.shape) for n, t in biased.items()}
    assert not none["blk.1.attn_qkv.bias"].data.any()


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path: Path):
    config = CONFIGS["llama3-scaling"]
    gguf_export.write(a_checkpoint(config, "bfloat16"), tmp_path / "m.gguf")
    factors = tensors_of(tmp_path / "m.gguf")["rope_freqs.weight"].data
    plain = [config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    assert np.allclose(plain / factors.astype(np.float64), rope_frequencies(config), rtol=1e-7)
    assert factors.dtype == np.float32
    assert factors.min() == 1.0
    assert factors.max() == 8.0


# -- Metadata --------------------------------------------------------------------------


def test_metadata_says_the_shape_in_llama_cpps_keys(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    gguf_export.write(a_checkpoint(CONFIGS["qwen3-yarn"]), path)
    expected = {
        "general.architecture": "qwen3", "general.name": "tiny", "qwen3.context_length": 96,
        "qwen3.embedding_length": 42, "qwen3.block_count": 2, "qwen3.feed_forward_length": 52,
        "qwen3.attention.head_count": 6, "qwen3.attention.head_count_kv": 2, "qwen3.vocab_size": 131,
        "qwen3.attention.key_length": 14, "qwen3.attention.value_length": 14, "qwen3.rope.dimension_count": 14,
        "qwen3.rope.freq_base": 500.0, "qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 24, "qwen3.rope.scaling.attn_factor": 1.0,
    }  # fmt: skip
    assert {key: field(path, key) for key in expected} == expected
    assert field(path, "qwen3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)


def test_lists_are_packed_as_the_package_packs_them():
    quick, plain = gguf_writer.Writer(None, "llama"), gguf.GGUFWriter(None, "llama")
    for values in (["a", "é🙂", ""], [1, -5, 7], [0.0, 1.5], ["x", 1], [True, False]):
        for typed in (True, False):
            try:
                expected = plain._pack_val(values, gguf.GGUFValueType.ARRAY, typed)
            except ValueError:
                continue
            assert quick._pack_val(values, gguf.GGUFValueType.ARRAY, typed) == expected


UNWRITTEN = {"embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range"}
"""Fields of training, which GGUF has no place for."""
OTHER = {
    "position_embedding": "learned", "norm": "layernorm", "hidden_act": "gelu", "gated_mlp": False, "qkv_bias": True,
    "attention_output_bias": True, "mlp_bias": True, "qk_norm": True, "sliding_window": 9, "rope_theta": 7.0,
    "tie_word_embeddings": True, "rms_norm_eps": 0.1, "rope_scaling": CONFIGS["llama-linear-scaling"].rope_scaling,
    "num_key_value_heads": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({f.name for f in dataclasses.fields(ModelConfig)} - UNWRITTEN))
def test_no_field_of_the_config_is_forgotten(name: str):
    value = OTHER.get(name, 2 * getattr(LLAMA, name) if name not in OTHER else None)
    changed = dataclasses.replace(LLAMA, **{name: value})

    def written(config: ModelConfig) -> Any:
        tensors = [(t.name, t.shape, t.paired_heads) for t in weights.gguf_tensors(config)]
        return gguf_metadata.metadata(config, "m"), tensors

    try:
        assert written(changed) != written(LLAMA)
    except InputError as error:
        assert str(error).startswith("llama.cpp has no architecture")  # noqa: PT017


def test_what_llama_cpp_cannot_compute_is_refused_and_what_it_computes_otherwise_is_said(tmp_path: Path):
    for change in ({"hidden_act": "gelu"}, {"qk_norm": True, "qkv_bias": True}, {"norm": "layernorm"}):
        source = a_checkpoint(dataclasses.replace(LLAMA, **change))
        with pytest.raises(InputError, match=r"^llama.cpp has no architecture"):
            gguf_export.write(source, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
    erf = gguf_export.write(a_checkpoint(CONFIGS["gpt2-erf-untied"]), tmp_path / "erf.gguf")
    assert erf[0].startswith("llama.cpp computes GELU by its tanh approximation")
    window = gguf_export.write(a_checkpoint(CONFIGS["mistral"]), tmp_path / "window.gguf")
    assert window[0] == "llama.cpp has no sliding window here: context_length is the window, 11, not 96"
    assert field(tmp_path / "window.gguf", "llama.context_length") == 11


# -- Tokenizer -------------------------------------------------------------------------


def test_every_row_has_a_token_of_its_own():
    tokenizer = Tokenizer.create("gpt2", template=TEMPLATES["chatml"], model_vocab_size=50400)
    found, notices = gguf_tokenizer.metadata(tokenizer, TEMPLATES["chatml"], 50400, [50256, 50258])
    tokens: Any = found["tokenizer.ggml.tokens"]
    types: Any = found["tokenizer.ggml.token_type"]
    assert notices == []
    assert len(tokens) == len(types) == len(set(tokens)) == 50400
    assert tokens[50255:50262] == [
        *(" gazed".replace(" ", "Ġ"), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"),
        *("<|pad_50260|>", "<|pad_50261|>"),
    ]
    assert types[50255:50262] == [1, 3, 3, 3, 3, 5, 5]
    assert found["tokenizer.ggml.eos_token_id"] == 50256
    assert found["tokenizer.ggml.eot_token_id"] == 50258
    assert found["tokenizer.ggml.padding_token_id"] == 50259
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"]  # type: ignore[index]


def test_a_space_and_its_spelling_in_llama_cpp_stay_two_tokens():
    for corpus, space, sign in (("ab \u2581", 256, 259), ("ab\u2581", 32, 258), ("ab ", 256, None), ("ab", 32, None)):
        tokenizer = Tokenizer.create("char", template=TEMPLATES["plain"], corpus=[corpus])
        found, notices = gguf_tokenizer.metadata(tokenizer, None, tokenizer.model_vocab_size, [])
        tokens: Any = found["tokenizer.ggml.tokens"]
        types: Any = found["tokenizer.ggml.token_type"]
        assert tokens[97] == "<0x61>"
        assert [(id, tokens[id]) for id, kind in enumerate(types) if kind == gguf_tokenizer.USER_DEFINED] == sorted(
            (id, text) for id, text in ((space, " "), (sign, "\u2581")) if id is not None
        )
        assert len(set(tokens)) == len(tokens) == tokenizer.model_vocab_size
        assert notices == []


def test_an_added_token_spelled_as_a_byte_is_said():
    state = Tokenizer.create("char", template=TEMPLATES["plain"], corpus=["a"]).with_added(["<0x4>"]).state()
    state["added_token_ids"] = {"<0x41>": 259}
    tokenizer = Tokenizer.from_state(state, state["model_vocab_size"])
    _, notices = gguf_tokenizer.metadata(tokenizer, None, tokenizer.model_vocab_size, [])
    assert notices == ["llama.cpp never gives and never prints ids that repeat the text of another (259 as 65: <0x41>)"]


def test_a_reply_ends_at_three_ids_and_more_are_said():
    tokenizer = Tokenizer.create("char", template=TEMPLATES["chatml"])
    end_of_text, end = tokenizer.stop_ids
    found, notices = gguf_tokenizer.metadata(tokenizer, TEMPLATES["chatml"], 320, [end, 5, end_of_text])
    ids = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items() if key.endswith("_id")}
    pad = tokenizer.special("pad").id
    assert ids == {
        "bos_token_id": end_of_text, "eos_token_id": end_of_text, "eot_token_id": end, "eom_token_id": 5,
        "padding_token_id": pad,
    }  # fmt: skip
    assert notices == []
    _, notices = gguf_tokenizer.metadata(tokenizer, TEMPLATES["chatml"], 320, [end, 5, 6])
    assert notices == ["texts end with token 6 too, which GGUF has no place for; llama.cpp may go on there"]


def test_a_zero_that_the_corpus_has_is_the_byte():
    tokenizer = Tokenizer.create("char", template=TEMPLATES["plain"], corpus=["\0a"])
    found, notices = gguf_tokenizer.metadata(tokenizer, None, tokenizer.model_vocab_size, [])
    tokens: Any = found["tokenizer.ggml.tokens"]
    assert (tokens[0], tokens[256], notices) == ("<|pad_0|>", "<0x00>", [])


def test_a_tokenizer_that_llama_cpp_has_no_rule_for_becomes_ids(tmp_path: Path):
    content = json.loads((small.as_json(tmp_path, "gpt-2", add_prefix_space=True) / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, _ = hf_tokenizer.read(tmp_path, 768, [])
    assert tokenizer is not None
    found, notices = gguf_tokenizer.metadata(tokenizer, None, 768, [])
    assert notices == [
        "no tokenizer written: llama.cpp has no rule that cuts words as this one's does; prompts must be token ids"
    ]
    assert found["tokenizer.ggml.tokens"] == [f"<|pad_{id}|>" for id in range(768)]


def test_what_llama_cpp_does_otherwise_with_text_is_said(tmp_path: Path):
    content = json.loads((small.as_json(tmp_path, "qwen2") / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, _ = hf_tokenizer.read(tmp_path, 768, [])
    _, notices = gguf_tokenizer.metadata(tokenizer, None, 768, [])
    assert notices == [
        "llama.cpp does not normalise text as this tokenizer does: give it text in NFC",
        "a word that is a token: this tokenizer takes it whole, llama.cpp merges it (ignore_merges)",
    ]


NORMALIZERS: dict[str, Any] = {
    "give it text in NFKC": {"type": "NFKC"},
    "(Lowercase): 'Hello' gets other ids": {"type": "Lowercase"},
    "(Replace): 'a b' gets other ids": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
    "(Replace): 'aqqb' gets other ids": {"type": "Replace", "pattern": {"String": "qq"}, "content": "_"},
    "(Replace): some texts may get other ids": {"type": "Replace", "pattern": {"Regex": "q+"}, "content": "_"},
    "(Strip): ' a' gets other ids": {"type": "Strip", "strip_left": True, "strip_right": True},
    "(Prepend): 'Hello' gets other ids": {"type": "Prepend", "prepend": "x"},
    "(NFD, StripAccents): 'e\\u0301' gets other ids": {
        "type": "Sequence",
        "normalizers": [{"type": "Sequence", "normalizers": [{"type": "NFD"}]}, {"type": "StripAccents"}],
    },
    "": {"type": "Sequence", "normalizers": []},
}


def test_a_normalizer_that_llama_cpp_lacks_is_said_with_a_text_that_shows_it():
    content = json.loads(small.library("gpt-2").to_str())
    for said, normalizer in NORMALIZERS.items():
        data = {"tokenizer.json": json.dumps({**content, "normalizer": normalizer}), "added": []}
        tokenizer = Tokenizer.of_vocabulary("hf", HfEncoder.restore(data), None)
        _, notices = gguf_tokenizer.metadata(tokenizer, None, 768, [])
        assert len(notices) == bool(said), normalizer
        assert all(notice.endswith(said) for notice in notices), notices


OVERLAPS: dict[tuple[str, ...], str] = {
    ("<ab>", "b>cdefgh"): "(<ab>, b>cdefgh in <ab>cdefgh)",
    ("<abcdef>", "f>g"): "",
    ("abca", "bc"): "",
    ("aba",): "",
    ("endof",): "(<|endoftext|>, endof in <|endoftext|>)",
    ("x<|", "|>y"): "(<|endoftext|>, |>y in <|endoftext|>y)",
}


def test_tokens_that_overlap_are_said_where_llama_cpp_takes_another():
    base = Tokenizer.create("char", template=TEMPLATES["plain"], corpus=["ab"])
    for texts, said in OVERLAPS.items():
        _, notices = gguf_tokenizer.metadata(base.with_added(texts), None, 320, [])
        both = f"where tokens overlap {said} llama.cpp may take another one than this tokenizer"
        assert notices == ([both] if said else []), texts


# -- Whole or not at all ---------------------------------------------------------------


def saved(folder: Path, config: ModelConfig = LLAMA) -> Path:
    tokenizer = Tokenizer.create("char", template=TEMPLATES["tags"], corpus=["abc"])
    config = dataclasses.replace(config, vocab_size=tokenizer.model_vocab_size)
    params = {name: np.asarray(array) for name, array in random_params(config).items()}
    contents = Contents(config, params, "sft", "float32", tokenizer.stop_ids, tokenizer, TEMPLATES["tags"], {})
    checkpoint.save(folder, 3, contents).result()
    return folder


def test_the_command_writes_a_file_and_inspect_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made, path = saved(tmp_path / "run"), tmp_path / "new" / "m.gguf"
    assert cli.main(["export", str(made), str(path), "--format", "gguf", "--dtype", "q8_0", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["written"] == str(path)
    assert first["notices"][0].startswith("16 matrices stay float16")
    assert cli.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["general.architecture"] == "llama"
    assert found["metadata"]["tokenizer.chat_template"].startswith("{%- for message in messages -%}")
    assert found["metadata"]["tokenizer.ggml.tokens"]["length"] == 320
    assert found["parameters"]["blk.1.attn_q.weight"] == {"shape": [84, 42], "dtype": "F16", "bytes": 7056}
    assert cli.main(["inspect", str(path), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "blk.1.attn_q.weight       84×42   F16\n" in shown
    assert "320 values: '<0x00>' '<0x01>'" in shown


def test_an_existing_file_is_refused_before_anything_is_read(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"m.gguf exists; choose another name$"):
        gguf_export.export_gguf(tmp_path / "nowhere", path)
    assert path.read_text() == "mine"


def test_the_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^GGUF needs the package gguf; run `pip install 'jaxgpt\[gguf\]'`$"):
        gguf_export.export_gguf(tmp_path / "nowhere", tmp_path / "m.gguf")


FAILURES: dict[str, tuple[BaseException, type[BaseException], str]] = {
    "a full disk": (OSError(errno.ENOSPC, "No space left"), InputError, r"m.gguf was not written: disk full \(need 1"),
    "a broken disk": (OSError(errno.EIO, "Input/output error"), InputError, r"not written: Input/output error$"),
    "a limit": (
        OSError("9 requested and 4 written"),
        InputError,
        r"fell short \(9 requested and 4 written\); look for",
    ),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str):
    error, seen, message = FAILURES[failure]
    whole, written = gguf.GGUFWriter.write_tensor_data, 0

    def failing(writer: Any, tensor: Any) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise error
        whole(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    with pytest.raises(seen, match=message):
        gguf_export.write(a_checkpoint(LLAMA), tmp_path / "m.gguf")
    assert written == 6
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"m.gguf was not written: disk full \(need 1\d\d\.\d KB, 1.0 KB free\)$"):
        gguf_export.write(a_checkpoint(LLAMA), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def damage(path: Path) -> None:
        if path.is_file():
            entry = next(e for e in gguf_header.read(path).tensors if e.name == "blk.1.ffn_up.weight")
            with path.open("r+b") as file:
                file.seek(entry.start + 11)
                file.write(b"\xee")

    monkeypatch.setattr(manifest, "sync", damage)
    with pytest.raises(InputError, match=r"read back differs from what was written \(blk.1.ffn_up.weight\)"):
        gguf_export.write(a_checkpoint(LLAMA), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_progress_tells_bytes_until_all_are_written(tmp_path: Path):
    told: list[tuple[int, int]] = []
    gguf_export.write(a_checkpoint(LLAMA), tmp_path / "m.gguf", progress=lambda *now: told.append(now))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1] == sum(e.size for e in gguf_header.read(tmp_path / "m.gguf").tensors)


def test_the_command_offers_the_dtypes_that_can_be_written():
    assert typing.get_args(gguf_export.Dtype) == typing.get_args(typing.get_type_hints(ExportSettings)["dtype"])


def test_values_come_from_the_files_of_the_checkpoint_without_being_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = a_checkpoint(CONFIGS["qwen2"], "bfloat16")
    contents = Contents(source.config, source.params, "base", "bfloat16", [7], None, None, {})
    checkpoint.save(tmp_path / "run", 0, contents).result()
    gguf_export.write(checkpoint.load(tmp_path / "run"), tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(tmp_path / "loaded.gguf")
    monkeypatch.setattr(checkpoint, "_read_arrays", None)
    gguf_export.export_gguf(tmp_path / "run", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "loaded.gguf").read_bytes()


def test_a_parameter_in_pieces_is_put_together_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = a_checkpoint(CONFIGS["qwen2"])
    checkpoint.save(
        tmp_path / "run", 0, Contents(source.config, source.params, "base", "float32", [], None, None, {})
    ).result()
    monkeypatch.setattr("jaxgpt.array_files.mapped", lambda folder, header: None)
    found = checkpoint.load(tmp_path / "run", mapped=True)
    assert all(np.array_equal(found.params[name], array) for name, array in source.params.items())
