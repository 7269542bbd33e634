"""Mutates valid files of every format that is read, and sees that each is read or refused in one line.

A defect is any exception but InputError, a message of more than one line, a crash, more
than `--seconds` for one file, or memory past twice the file and 500 MiB. Every mutation
is known by its number: `--only N` repeats one. Prints one JSON line last.

    python scripts/fuzz_formats.py                        # 10,000 mutations of each format
    python scripts/fuzz_formats.py --format pt --count 200 --seed 7
"""

import argparse
import json
import multiprocessing
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 250
"""Mutations that one process tries before the next takes over."""
MEMORY = 500 << 20


@dataclass(frozen=True)
class Format:
    """A kind of file: how to write a valid folder, which file of it is mutated, and what reads it."""

    write: Callable[[Path], str]
    """Fills the folder; the name of the file that is mutated."""
    read: Callable[[Path], Any]
    """Reads the folder, all values included."""


# -- Valid files -----------------------------------------------------------------------


def tiny_hf(folder: Path) -> None:
    """A Hugging Face folder of a tiny Llama-type model."""
    from jaxgpt import weights
    from jaxgpt.config import LLAMA_STYLE, ModelConfig, to_hf
    from jaxgpt.formats import safetensors_file

    config = ModelConfig(
        **LLAMA_STYLE,
        vocab_size=11,
        hidden_size=6,
        intermediate_size=5,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=8,
    )
    draw = np.random.default_rng(0)
    tensors = {p.hf: draw.standard_normal(p.hf_shape, np.float32) for p in weights.parameters(config)}
    safetensors_file.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(to_hf(config, "float32"), indent=1))


def safetensors(folder: Path) -> str:
    tiny_hf(folder)
    return "model.safetensors"


def config_json(folder: Path) -> str:
    tiny_hf(folder)
    return "config.json"


def index_json(folder: Path) -> str:
    from jaxgpt.formats import safetensors_file

    tiny_hf(folder)
    header, _ = safetensors_file.read_header(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(header, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors.index.json"


def pt(folder: Path) -> str:
    """nanoGPT's ckpt.pt; torch writes it, nothing of torch reads it."""
    import torch

    width, tensors = 6, {}
    shapes = {"ln_1": (6,), "attn.c_attn": (18, 6), "attn.c_proj": (6, 6), "ln_2": (6,), "mlp.c_fc": (24, 6)}
    for name, shape in {**shapes, "mlp.c_proj": (6, 24)}.items():
        tensors[f"_orig_mod.transformer.h.0.{name}.weight"] = torch.randn(shape)
    for name, shape in {"wte": (11, width), "wpe": (8, width), "ln_f": (width,)}.items():
        tensors[f"_orig_mod.transformer.{name}.weight"] = torch.randn(shape)
    torch.save({"model": tensors, "model_args": {"n_head": 3}, "iter_num": 3}, folder / "ckpt.pt")
    return "ckpt.pt"


def bpe(folder: Path, pair: bool) -> None:
    """A byte-level BPE with a special and an added token, trained on a few words."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{L}\p{N}]+|\s?\p{L}+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the quick brown fox", "jumps over the lazy dogs"] * 20, trainer)
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    made.add_tokens([AddedToken("<tool_call>", special=False)])
    made.save(str(folder / "tokenizer.json"))
    if pair:
        made.model.save(str(folder))
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def tokenizer(folder: Path) -> str:
    bpe(folder, pair=False)
    return "tokenizer.json"


def vocab(folder: Path) -> str:
    bpe(folder, pair=True)
    return "vocab.json"


def merges(folder: Path) -> str:
    bpe(folder, pair=True)
    return "merges.txt"


def tokenizer_config(folder: Path) -> str:
    bpe(folder, pair=False)
    turns = "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}<|endoftext|>{% endfor %}"
    added = {"302": {"content": "<|endoftext|>", "special": True}}
    settings = {"eos_token": "<|endoftext|>", "chat_template": turns, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return "tokenizer_config.json"


def tokenizer_read(folder: Path) -> None:
    from jaxgpt.formats import hf_tokenizer

    found, _ = hf_tokenizer.read(folder, 320, [])
    if found is not None:
        found.decode(found.encode("the dogs <|endoftext|>\n 12", specials=True))


def gguf(folder: Path) -> str:
    """llama.cpp's writer; the header alone is read here."""
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "model.gguf"


def gguf_read(folder: Path) -> None:
    from jaxgpt.formats import gguf_header

    gguf_header.read(folder / "model.gguf")


def import_read(folder: Path) -> None:
    from jaxgpt.formats import importing

    found = importing.read(folder, {})
    for array in found.params.values():
        array.tobytes()


FORMATS: dict[str, Format] = {
    "safetensors": Format(safetensors, import_read),
    "config": Format(config_json, import_read),
    "index": Format(index_json, import_read),
    "pt": Format(pt, import_read),
    "tokenizer": Format(tokenizer, tokenizer_read),
    "vocab": Format(vocab, tokenizer_read),
    "merges": Format(merges, tokenizer_read),
    "tokenizer_config": Format(tokenizer_config, tokenizer_read),
    "gguf": Format(gguf, gguf_read),
}


# -- Mutations -------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 7, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1, 10**30)
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, False, 0.5, -0.0, 1e308, "", "a", "../x", "/etc/passwd", "\ud800", "\0", "x" * 10_000,
    [], {}, [[]], [0] * 1000, {"a": {}},
)  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The file with one to three things changed: bytes, a stretch of them, a number, or a value of its JSON."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        content = draw.choice((flip, cut, repeat, insert, number, json_value, json_value, token))(content, draw)
    return content


def somewhere(content: bytes, draw: random.Random) -> int:
    """Most of what can go wrong stands near the beginning or the end."""
    near = min(len(content), 600)
    return draw.choice(
        (draw.randrange(len(content) + 1), draw.randrange(near + 1), len(content) - draw.randrange(near + 1))
    )


def flip(content: bytes, draw: random.Random) -> bytes:
    at = min(somewhere(content, draw), max(len(content) - 1, 0))
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :] if content else content


def cut(content: bytes, draw: random.Random) -> bytes:
    at, length = somewhere(content, draw), draw.choice((1, 2, 8, 100, len(content)))
    return content[:at] + content[at + length :]


def repeat(content: bytes, draw: random.Random) -> bytes:
    at, length = somewhere(content, draw), draw.choice((1, 4, 40, 400))
    return content[:at] + content[at : at + length] * draw.choice((2, 3, 50)) + content[at + length :]


def insert(content: bytes, draw: random.Random) -> bytes:
    at = somewhere(content, draw)
    return content[:at] + draw.choice((b"\0", b'"', b"{", b"[" * 3000, b"\xff\xfe", draw.randbytes(9))) + content[at:]


def number(content: bytes, draw: random.Random) -> bytes:
    """A little-endian integer in place of bytes."""
    width = draw.choice((1, 2, 4, 8))
    at = min(somewhere(content, draw), max(len(content) - width, 0))
    value = draw.choice(NUMBERS) % (1 << (8 * width))
    return content[:at] + struct.pack("<Q", value)[:width] + content[at + width :]


def token(content: bytes, draw: random.Random) -> bytes:
    """A number spelled in text becomes another."""
    found = list(re.finditer(rb"-?\d+", content[:20_000]))
    if not found:
        return content
    match = draw.choice(found)
    return content[: match.start()] + str(draw.choice(NUMBERS)).encode() + content[match.end() :]


def json_value(content: bytes, draw: random.Random) -> bytes:
    """Of a JSON document, or of the header of a safetensors file, one value is replaced, doubled or left out."""
    is_header = content[8:9] == b"{" and content[:1] != b"{"
    length = int.from_bytes(content[:8], "little") if is_header else 0
    text, rest = (content[8 : 8 + length], content[8 + length :]) if is_header else (content, b"")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return flip(content, draw)
    places = list(containers(document))
    if not places:
        return flip(content, draw)
    inside = draw.choice(places)
    key = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    how = draw.randrange(4)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[draw.choice(("x", "", "dtype", str(key) + " "))] = inside[key]
    else:
        inside[key] = draw.choice(VALUES)
    changed = json.dumps(document).encode()
    return len(changed).to_bytes(8, "little") + changed + rest if is_header else changed


def containers(value: Any) -> Iterator[Any]:
    """Every non-empty list and object in a JSON value."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


# -- Trying them -----------------------------------------------------------------------


Outcome = tuple[int, str, float]
"""Number of the mutation, how it ended, and seconds."""


def attempt(kind: str, content: bytes, valid: Path, name: str, place: Path) -> str:
    """`read`, `refused`, or what is wrong with how it ended."""
    from jaxgpt.errors import InputError

    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(valid, place)
    (place / name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        FORMATS[kind].read(place)
        outcome = "read"
    except InputError as error:
        outcome = "refused" if "\n" not in str(error) else f"more than one line: {str(error)!r}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return outcome if grown <= 2 * len(content) + MEMORY else f"took {grown >> 20} MiB"


def work(kind: str, numbers: list[int], seed: int, valid: Path, name: str, results: Connection) -> None:
    """Try the mutations one after another; each outcome is sent as soon as it is known."""
    # A bomb must not take the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    content = (valid / name).read_bytes()
    with tempfile.TemporaryDirectory() as place:
        results.send((-1, attempt(kind, content, valid, name, Path(place) / "whole"), 0.0))
        for i in numbers:
            started = time.perf_counter()
            changed = mutated(content, random.Random(f"{kind} {seed} {i}"))
            outcome = attempt(kind, changed, valid, name, Path(place) / "changed")
            results.send((i, outcome, time.perf_counter() - started))


def outcomes(kind: str, numbers: list[int], seed: int, seconds: float) -> Iterator[Outcome]:
    """Of every mutation; the process that tries them is replaced when one kills or holds it."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        valid = Path(folder)
        name = FORMATS[kind].write(valid)
        waiting = list(numbers)
        while waiting:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(kind, waiting[:BATCH], seed, valid, name, send), daemon=True)
            process.start()
            send.close()
            yield from received(receive, waiting, seconds)
            process.kill()
            process.join()


def received(results: Connection, waiting: list[int], seconds: float) -> Iterator[Outcome]:
    """What one process answers, taken off `waiting`; the mutation that it does not survive is a defect."""
    try:
        if not results.poll(120):  # it imports first
            raise RuntimeError("the reader does not start")
        _, whole, _ = results.recv()
        assert whole == "read", f"the valid file itself: {whole}"
        for _ in range(min(BATCH, len(waiting))):
            if not results.poll(seconds):
                yield waiting.pop(0), f"more than {seconds:.0f} s", seconds
                return
            yield results.recv()
            waiting.pop(0)
    except EOFError:
        yield waiting.pop(0), "the process died", 0.0


def fuzz(kind: str, numbers: list[int], seed: int, seconds: float) -> dict[str, Any]:
    """Counts of how the mutations ended, what is wrong with each defect, and the slowest in seconds."""
    counts, defects, slowest = Counter[str](), list[str](), 0.0
    for i, outcome, took in outcomes(kind, numbers, seed, seconds):
        slowest = max(slowest, took)
        if outcome in ("read", "refused"):
            counts[outcome] += 1
        else:
            defects.append(f"--format {kind} --seed {seed} --only {i}: {outcome}")
    found = {"mutations": len(numbers), "read": counts["read"], "refused": counts["refused"]}
    return {**found, "slowest_seconds": round(slowest, 3), "defects": defects}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this one; may be repeated")
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="the mutation of this number; may be repeated")
    parser.add_argument("--seconds", type=float, default=5.0, help="longest that one file may take")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{'format':<18}{'mutations':>10}{'read':>8}{'refused':>9}{'defects':>9}{'slowest s':>11}")
    for kind in given.format or FORMATS:
        found[kind] = entry = fuzz(kind, given.only or list(range(given.count)), given.seed, given.seconds)
        defects, numbers = entry["defects"], [entry[key] for key in ("mutations", "read", "refused")]
        print(
            f"{kind:<18}{numbers[0]:>10,}{numbers[1]:>8,}{numbers[2]:>9,}{len(defects):>9,}{entry['slowest_seconds']:>11}"
        )
        for defect in defects[:20]:
            print(f"  {defect}", file=sys.stderr)
    print(json.dumps({"seed": given.seed, "formats": found}))
    return 1 if any(entry["defects"] for entry in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
