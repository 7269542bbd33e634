"""Safetensors files, shard indexes, links and config.json of a Hugging Face folder that lie."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from jaxgpt.formats import hf, hf_weights


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / hf.WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / hf.WEIGHTS, {"format": "pt"})


def index(folder: Path, weight_map: Any) -> None:
    (folder / hf.WEIGHTS).rename(folder / "a.safetensors")
    (folder / hf_weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def header_of(folder: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite the header of the weights file, as anyone can."""
    path = folder / hf.WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    text = json.dumps(change(content) or content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def lie_about_size(folder: Path) -> None:
    huge = {"dtype": "F32", "shape": [2**41], "data_offsets": [0, 2**43]}
    (folder / hf.WEIGHTS).write_bytes(b"")
    text = json.dumps({"transformer.wte.weight": huge}).encode()
    (folder / hf.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(1000))


def header(text: bytes, data: bytes = b"") -> Callable[[Path], object]:
    """A weights file of any header."""
    return lambda f: (f / hf.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def only(**entry: Any) -> Callable[[Path], object]:
    """A weights file of one tensor and 16 bytes."""
    described = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **entry}
    return header(json.dumps({FIRST: described}).encode(), bytes(16))


def linked(name: str) -> Callable[[Path], object]:
    """A file of the folder is moved out of it and linked: what is read would be right."""

    def move(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"outside-{name}")
        (folder / name).symlink_to(folder.parent / f"outside-{name}")

    return move


def shard_outside(name: str) -> Callable[[Path], object]:
    """The index names a shard beside the folder, which is there and whole."""

    def move(folder: Path) -> None:
        names = list(safetensors.torch.load_file(folder / hf.WEIGHTS))
        (folder / hf.WEIGHTS).rename(folder.parent / "outside.safetensors")
        given = name.format(parent=folder.parent)
        (folder / hf_weights.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, given)}))

    return move


def linked_shard(folder: Path) -> None:
    shard_outside("a.safetensors")(folder)
    (folder / "a.safetensors").symlink_to("../outside.safetensors")


def templates_outside(folder: Path) -> None:
    (folder.parent / "outside").mkdir()
    (folder / "additional_chat_templates").symlink_to(folder.parent / "outside")


FIRST = "transformer.wte.weight"
NORM0, NORM1 = "transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read (No such file or directory)"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "model type": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="mamba")),
        "model_type 'mamba'; jaxgpt reads gpt2, llama, mistral, qwen2, qwen3",
    ),
    "a billion layers": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(n_layer=10**9)),
        "config.json has num_hidden_layers=1,000,000,000, model.safetensors has 28 tensors",
    ),
    "no weights": (
        lambda f: (f / hf.WEIGHTS).unlink(),
        "has no weights: none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, ",
    ),
    "missing tensors": (
        lambda f: edit_tensors(f, lambda t: [t.pop(n) for n in list(t) if ".h.1." in n and "bias" in n] and None),
        "model.safetensors lacks 6 of 28 tensors (first: transformer.h.1.ln_1.bias, transformer.h.1.attn.c_attn.bias",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(3))),
        "model.safetensors has 1 tensors the model does not (first: extra)",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({FIRST: torch.ones(130, 36)})),
        "has 1 misshapen tensors (transformer.wte.weight is [130, 36], model [131, 36])",
    ),
    "another tied head": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(131, 36)})),
        "lm_head.weight differs from transformer.wte.weight, but config.json ties them",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({FIRST: torch.ones(131, 36, dtype=torch.int8)})),
        "tensor transformer.wte.weight is int8; jaxgpt reads float32, bfloat16, float16",
    ),
    "path escape": (
        lambda f: index(f, {FIRST: "../x.safetensors"}),
        "index names ../x.safetensors, outside the model directory; refused",
    ),
    "absolute path": (
        lambda f: index(f, {FIRST: "/etc/passwd"}),
        "index names /etc/passwd, outside the model directory; refused",
    ),
    "a name no file has": (
        lambda f: index(f, {FIRST: "a\0b"}),
        "index names 'a\\x00b', outside the model directory; refused",
    ),
    "index with a name that no file can have": (
        lambda folder: index(folder, {"transformer.wte.weight": "x" * 10_000}),
        " cannot be read: File name too long",
    ),
    "a pipe": (
        lambda f: ((f / hf.WEIGHTS).unlink(), os.mkfifo(f / hf.WEIGHTS)),
        "model.safetensors is a folder, pipe or device, not a file; give",
    ),
    "a number of 5,000 digits": (
        lambda f: (f / hf.WEIGHTS).write_bytes((5000).to_bytes(8, "little") + b"9" * 5000),
        "model.safetensors is no safetensors file: its header is not JSON",
    ),
    "index without map": (lambda f: index(f, 3), "has no weight_map from tensors to files"),
    "index of other tensors": (lambda f: index(f, {"x": "a.safetensors"}), "and a.safetensors disagree on 29 tensors"),
    "shard missing": (
        lambda f: index(f, {FIRST: "b.safetensors"}),
        "b.safetensors cannot be read: No such file or directory",
    ),
    "size bomb": (lie_about_size, "header declares 8 TiB, file is 1 KB; refused"),
    "header longer than the file": (
        lambda f: (f / hf.WEIGHTS).write_bytes((2**43).to_bytes(8, "little") + bytes(1016)),
        "header declares 8 TiB, file is 1.02 KB; refused",
    ),
    "empty": (lambda f: (f / hf.WEIGHTS).write_bytes(b""), "file is 0 bytes; refused"),
    "truncated": (
        lambda f: (f / hf.WEIGHTS).write_bytes((f / hf.WEIGHTS).read_bytes()[:-1]),
        "; refused",
    ),
    "bytes at the end": (
        lambda f: (f / hf.WEIGHTS).write_bytes((f / hf.WEIGHTS).read_bytes() + b"x"),
        "; refused",
    ),
    "header no JSON": (
        lambda f: (f / hf.WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"{" * 8),
        "model.safetensors is no safetensors file: its header is not JSON",
    ),
    "pickle": (
        lambda f: (f / hf.WEIGHTS).write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00" + bytes(100)),
        "header declares",
    ),
    "shape and bytes disagree": (
        lambda f: header_of(f, lambda h: h[FIRST].update(shape=[131, 35])),
        "does not fill its bytes",
    ),
    "overlapping tensors": (
        lambda f: header_of(f, lambda h: h[NORM0].update(data_offsets=h[NORM1]["data_offsets"])),
        "does not begin where the one before ends; refused",
    ),
    "negative shape": (lambda f: header_of(f, lambda h: h[FIRST].update(shape=[-131, -36])), "does not fill its bytes"),
    "unknown dtype": (
        lambda f: header_of(f, lambda h: h[FIRST].update(dtype="F33")),
        "tensor transformer.wte.weight is not described as safetensors does; refused",
    ),
    "250,000 sizes": (only(shape=[2**40] * 250_000), "does not fill its bytes"),
    "a size of 4,000 digits": (only(shape=[10**4000]), "does not fill its bytes"),
    "nothing by 2^62": (only(shape=[0, 2**62], data_offsets=[0, 0]), "does not fill its bytes"),
    "a shape that is text": (only(shape="4"), "does not fill its bytes"),
    "a shape that is a number": (only(shape=4), "is not described as safetensors does"),
    "offsets that are halves": (only(data_offsets=[0, 16.0]), "does not fill its bytes"),
    "offsets before the data": (only(data_offsets=[-16, 0]), "does not fill its bytes"),
    "three offsets": (only(data_offsets=[0, 8, 16]), "is not described as safetensors does"),
    "offsets turned round": (only(data_offsets=[16, 0]), "does not fill its bytes"),
    "a gap before the first": (only(data_offsets=[16, 32]), "does not begin where the one before ends"),
    "no dtype": (only(dtype=None), "is not described as safetensors does"),
    "a dtype that is a list": (only(dtype=["F32"]), "is not described as safetensors does"),
    "an entry that is text": (header(b'{"a": "F32"}'), "tensor a is not described as safetensors does"),
    "a key of an entry twice": (
        header(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}', bytes(4)),
        "safetensors header has 'dtype' twice",
    ),
    "a tensor named twice": (
        lambda f: (f / hf.WEIGHTS).write_bytes(
            (f / hf.WEIGHTS).read_bytes().replace(b'"transformer.wpe.weight"', b'"transformer.wte.weight"', 1)
        ),
        "safetensors header has 'transformer.wte.weight' twice; keep one of them",
    ),
    "a name of a megabyte": (
        header(b'{"' + b"n" * 2**20 + b'": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)),
        "does not fill its bytes",
    ),
    "a header of brackets": (header(b"[" * 1_000_000), "its header is not JSON"),
    "a header that is a list": (header(b"[]"), "its header is not a JSON object"),
    "a header of 3 MB of tensors": (
        header(b"{" + b",".join(b'"%d":{}' % n for n in range(280_000)) + b"}"),
        "is not described as safetensors does",
    ),
    "a header of 10 MB": (header(b"{" + b" " * (10 << 20) + b"}"), "header declares 10.5 MB"),
    "no tensors": (header(b"{}"), "has num_hidden_layers=2, model.safetensors has 0 tensors"),
    "a link to the weights": (linked(hf.WEIGHTS), "outside-model.safetensors, outside the model directory; put the"),
    "a link to the config": (linked("config.json"), "config.json is a link to "),
    "a link to /etc/passwd": (
        lambda f: (f / "tokenizer.json").symlink_to("/etc/passwd"),
        "tokenizer.json is a link to /etc/passwd, outside the model directory",
    ),
    "a link to itself": (
        lambda f: ((f / hf.WEIGHTS).unlink(), (f / hf.WEIGHTS).symlink_to(hf.WEIGHTS)),
        "model.safetensors is a link to itself",
    ),
    "a folder of templates outside": (templates_outside, "additional_chat_templates is a link to "),
    "a shard that is a link": (linked_shard, "a.safetensors is a link to "),
    "a shard beside the folder": (shard_outside("../outside.safetensors"), "index names ../outside.safetensors, out"),
    "a shard by its whole path": (shard_outside("{parent}/outside.safetensors"), "outside the model directory"),
    "a shard by backslashes": (shard_outside("..\\outside.safetensors"), "outside the model directory"),
    "a shard on two lines": (shard_outside("../outside.safetensors\n"), "outside.safetensors\\n', outside the model"),
    "a shard that colours the terminal": (shard_outside("\x1b[31m"), "index names '\\x1b[31m', outside the model dir"),
    "a tensor that colours the terminal": (
        header(b'{"\\u001b[31m\\n": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
        "tensor '\\x1b[31m\\n' is not described as safetensors does",
    ),
    "a shard in a folder": (shard_outside("a/../../outside.safetensors"), "outside the model directory"),
    "a shard that is the folder": (shard_outside("."), "index names ., outside the model directory"),
    "a shard without a name": (shard_outside(""), "outside the model directory"),
    "an index of numbers": (lambda f: index(f, {FIRST: 3}), "has no weight_map from tensors to files"),
    "an index of 9 MB": (lambda f: index(f, {"x": "y" * (9 << 20)}), "of such a file at most 4,194,304 are read"),
    "an index that is cut": (
        lambda f: (index(f, {}), (f / hf_weights.INDEX).write_text('{"weight_map": {"a": "b')),
        "is not readable JSON",
    ),
    "an index with a tensor twice": (
        lambda f: (index(f, {}), (f / hf_weights.INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')),
        "model.safetensors.index.json has 'a' twice; keep one of them",
    ),
    "an index without tensors": (lambda f: index(f, {}), "has 0 tensors"),
    "eos a string": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(eos_token_id="</s>")),
        "eos_token_id must be an integer or a list of them, got '</s>'",
    ),
}


# -- config.json -----------------------------------------------------------------------


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda f: (f / "config.json").write_bytes(content)


def told(**changes: Any) -> Callable[[Path], object]:
    return lambda f: edit_json(f / "config.json", lambda c: c.update(changes))


def lacking(key: str) -> Callable[[Path], object]:
    return lambda f: edit_json(f / "config.json", lambda c: c.pop(key) is None or c)


POSITIVE = "must be a positive integer below 2^31"
CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (raw(b""), "config.json is not readable JSON"),
    "not text": (raw(b"\xff\xfe{}"), "config.json is not readable JSON"),
    "brackets": (raw(b'{"a":' * 100_000), "config.json is not readable JSON"),
    "nested lists": (raw(b'{"model_type": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "config.json "),
    "a number of 5,000 digits": (raw(b'{"vocab_size": ' + b"9" * 5000 + b"}"), "config.json is not readable JSON"),
    "9 MB": (raw(b'{"model_type": "' + b"x" * (9 << 20) + b'"}'), "of such a file at most 4,194,304 are read"),
    "a type of a megabyte": (raw(b'{"model_type": "' + b"x" * (1 << 20) + b'"}'), "config.json has model_type 'xxx"),
    "3 MB of empty lists": (raw(b'{"a": [' + b"[]," * 1_000_000 + b"0]}"), "config.json has model_type None"),
    "a key twice": (raw(b'{"model_type": "gpt2", "model_type": "llama"}'), "config.json has 'model_type' twice"),
    "no type": (lacking("model_type"), "config.json has model_type None"),
    "a type that is a list": (told(model_type=["llama"]), "config.json has model_type ['llama']"),
    "no width": (lacking("hidden_size"), "config.json lacks hidden_size"),
    "no heads": (lacking("num_attention_heads"), "config.json lacks num_attention_heads"),
    "no vocabulary": (lacking("vocab_size"), "config.json lacks vocab_size"),
    "an unknown key": (told(flux_capacitor=1.21), "config.json has keys jaxgpt does not know: flux_capacitor"),
    "a quantised model": (told(quantization_config={"bits": 4}), "jaxgpt does not know: quantization_config"),
    "1,000 unknown keys": (told(**{f"k{n}": n for n in range(1000)}), "(+997 more)"),
    "a negative width": (told(hidden_size=-48), POSITIVE),
    "a width of 2^63": (told(hidden_size=2**63), POSITIVE),
    "a width that is text": (told(hidden_size="48"), POSITIVE),
    "no layers": (told(num_hidden_layers=0), POSITIVE),
    "a billion layers": (told(num_hidden_layers=10**9), "has num_hidden_layers=1,000,000,000, model.safetensors has"),
    "layers that are true": (told(num_hidden_layers=True), POSITIVE),
    "zero heads": (told(num_attention_heads=0), POSITIVE),
    "heads that do not divide": (told(num_attention_heads=5), "which is not a multiple of num_attention_heads=5"),
    "groups that do not divide": (told(num_key_value_heads=5), "num_key_value_heads"),
    "a vocabulary of 2^31": (told(vocab_size=2**31), POSITIVE),
    "half a vocabulary": (told(vocab_size=65.5), POSITIVE),
    "a null vocabulary": (told(vocab_size=None), POSITIVE),
    "an MLP of a list": (told(intermediate_size=[96]), POSITIVE),
    "a head of one number": (told(head_dim=1), "head_dim"),
    "an epsilon of zero": (told(rms_norm_eps=0), "rms_norm_eps must be a positive number, got 0"),
    "an epsilon that is NaN": (told(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number, got nan"),
    "an epsilon that is infinite": (told(rms_norm_eps=float("inf")), "rms_norm_eps must be a positive number, got inf"),
    "an epsilon that is text": (told(rms_norm_eps="1e-6"), "rms_norm_eps must be a positive number, got '1e-6'"),
    "a spread that is NaN": (told(initializer_range=float("nan")), "initializer_range"),
    "dropout of two": (told(attention_dropout=2), "must be in [0, 1), got 2"),
    "a context of zero": (told(max_position_embeddings=0), POSITIVE),
    "a negative context": (told(max_position_embeddings=-1), POSITIVE),
    "another activation": (told(hidden_act="relu"), "hidden_act must be one of"),
    "an activation that is a dict": (told(hidden_act={"a": 1}), "hidden_act must be one of"),
    "tied by a word": (told(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false, got 'yes'"),
    "a bias of 2": (told(attention_bias=2), "attention_bias must be true or false, got 2"),
    "another kind of layers": (told(layer_types=["mamba", "mamba"]), "has layer_types other than full_attention"),
    "rope of no kind": (
        told(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "spiral",
    ),
    "rope of a list": (told(rope_parameters=[1]), "rope"),
    "rope that shrinks to nothing": (
        told(rope_parameters={"rope_type": "linear", "factor": 0, "rope_theta": 1e4}),
        "factor",
    ),
    "rope that is NaN": (told(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}), "rope_theta"),
    "a negative theta": (told(rope_parameters={"rope_type": "default", "rope_theta": -1}), "rope_theta"),
    "a theta of 10^400": (told(rope_parameters={"rope_type": "default", "rope_theta": 10**400}), "rope_theta"),
    "an end that is a dict": (told(eos_token_id={"a": 1}), "eos_token_id must be an integer or a list of them"),
    "ends in lists": (told(eos_token_id=[[1]]), "eos_token_id must be an integer or a list of them"),
}  # fmt: skip
"""Of a Llama-type folder."""
