"""Compares jaxgpt's tokenizers with tokenizers, tiktoken and transformers on generated strings, id by id.

Code, runs of white space, every script of Unicode, emoji sequences, control characters,
and special tokens that somebody typed. Of real vocabularies only GPT-2's needs no
network: the others are byte-level BPEs trained here on the standard library's source,
with the rules of Qwen2 and Llama 3 written down again; `--tokenizer` adds any folder.
Prints one JSON line last; exit 1 where anything differs.

    python scripts/tokenizer_agreement.py                    # 100,000 strings
    python scripts/tokenizer_agreement.py --count 2000 --seed 3 --tokenizer Qwen2-0.5B
"""

import argparse
import json
import random
import sys
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from jaxgpt.formats import hf_tokenizer
from jaxgpt.tokenizer import Tokenizer

BATCH = 500
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DOMAIN = ("<tool_call>", "<MUL_2_3_6>")
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Ids = list[int]
Encode = Callable[[list[str]], list[Ids]]


# -- Strings ---------------------------------------------------------------------------


def strings(count: int, seed: int) -> Iterator[str]:
    """Generated strings, a kind after the other."""
    rng = random.Random(seed)
    kinds = (_code, _white_space, _script, _emoji, _controls, _typed, _numbers, _mixed)
    for number in range(count):
        yield kinds[number % len(kinds)](rng)


_LIBRARY = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
_SOURCES: dict[Path, str] = {}
_SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
_BLOCKS = [
    block
    for block in range(0, 0x110000, 128)
    if not 0xD800 <= block < 0xE000 and any(unicodedata.category(chr(c)) != "Cn" for c in range(block, block + 128))
]
"""Of 128 code points each, with at least one that is assigned."""


def _code(rng: random.Random) -> str:
    path = rng.choice(_LIBRARY)
    text = _SOURCES.setdefault(path, path.read_text("utf-8", errors="replace"))
    begin = rng.randrange(max(1, len(text) - 400))
    return text[begin : begin + rng.randrange(400)]


def _white_space(rng: random.Random) -> str:
    runs = (rng.choice(_SPACES) * rng.choice((1, 2, 3, 8, 50)) for _ in range(rng.randrange(1, 8)))
    return "".join(run + rng.choice(("", "x", "é", "!", "7", "中")) for run in runs)


def _script(rng: random.Random) -> str:
    block = rng.choice(_BLOCKS)
    letters = "".join(chr(rng.randrange(block, block + 128)) for _ in range(rng.randrange(1, 40)))
    return rng.choice(("", " ")).join(letters)


def _emoji(rng: random.Random) -> str:
    def one() -> str:
        face = chr(rng.randrange(0x1F300, 0x1FB00))
        tone = chr(rng.randrange(0x1F3FB, 0x1F400))
        flag = chr(rng.randrange(0x1F1E6, 0x1F200)) + chr(rng.randrange(0x1F1E6, 0x1F200))
        forms = (
            face,
            face + tone,
            "\u200d".join((face + tone, "\u2764\ufe0f", face)),
            flag,
            "7\ufe0f\u20e3",
            "🏴\U000e0067",
        )
        return rng.choice(forms)

    return rng.choice(("", " ", "\n")).join(one() for _ in range(rng.randrange(1, 12)))


def _controls(rng: random.Random) -> str:
    odd = [
        *map(chr, range(0x20)),
        "\x7f",
        "\x80",
        "\x9f",
        "\u200b",
        "\u200e",
        "\u202e",
        "\ufeff",
        "\ufffd",
        "\ufffe",
        "\U0010ffff",
    ]
    return "".join(rng.choice((*odd, "a", "1", " ")) for _ in range(rng.randrange(1, 40)))


def _typed(rng: random.Random) -> str:
    parts = (
        *SPECIALS,
        *DOMAIN,
        "<|im_",
        "end|>",
        "<|",
        "|>",
        "<|endoftext",
        "user\n",
        " hi",
        "\n",
        "<",
        ">",
        "<s>",
        "[INST]",
    )
    return "".join(rng.choice(parts) for _ in range(rng.randrange(1, 10)))


def _numbers(rng: random.Random) -> str:
    digits = ("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३", "Ⅷ½²㊿", "0123456789.,-+e_x")
    return rng.choice(("", " ")).join(rng.choice(rng.choice(digits)) for _ in range(rng.randrange(1, 30)))


def _mixed(rng: random.Random) -> str:
    marks = "".join(chr(rng.randrange(0x300, 0x370)) for _ in range(rng.randrange(3)))
    parts = [make(rng)[:20] for make in (_code, _white_space, _script, _emoji, _controls, _numbers)]
    rng.shuffle(parts)
    return ("e" + marks + rng.choice(("'s", "'LL", "'ve ", "\u212b", "ﬁ", "\u1100\u1161"))).join(parts)


# -- Tokenizers ------------------------------------------------------------------------


@dataclass
class Case:
    """One of jaxgpt's tokenizers and what it must agree with."""

    name: str
    ours: Tokenizer
    ordinary: dict[str, Encode]
    """By peer: all text is ordinary."""
    parsed: dict[str, Encode]
    """By peer: special tokens in text are special."""
    decode: Callable[[list[Ids]], list[str]]
    differences: list[str] = field(default_factory=list[str])


def trained(pattern: str | None, *, nfc: bool = False, ignore_merges: bool = False) -> Any:
    """A byte-level BPE of 3,000 tokens; without a pattern it cuts as GPT-2 does."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        made.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator([path.read_text("utf-8", errors="replace") for path in _LIBRARY[:20]], trainer)
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    made.add_tokens([AddedToken(text, normalized=False) for text in DOMAIN])
    return made


def in_tiktoken(made: Any, pattern: str, nfc: bool) -> Encode:
    """The vocabulary in tiktoken, which ranks tokens by id; domain tokens are its only special ones."""
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    ranks = {bytes(byte_of[c] for c in token): id for token, id in made.get_vocab(with_added_tokens=False).items()}
    domain = {text: made.token_to_id(text) for text in DOMAIN if made.token_to_id(text) is not None}
    encoding = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=ranks, special_tokens=domain)

    # Python's tables of Unicode are newer than the package's: U+1DFA is a mark there and is sorted.
    normalize = normalizers.NFC().normalize_str

    def encode(texts: list[str]) -> list[Ids]:
        ready = [normalize(text) if nfc else text for text in texts]
        return [encoding.encode(text, allowed_special=set(domain), disallowed_special=()) for text in ready]

    return encode


def _byte_characters() -> dict[int, str]:
    """GPT-2's alphabet, as the tokenizers package spells each byte."""
    spelled: dict[int, str] = {}
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in range(0x800):
        text = chr(code)
        spelled |= dict(zip(text.encode(), cut.pre_tokenize_str(text)[0][0], strict=True))
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(spelled.values()))
    # Bytes that begin longer characters, or are in no UTF-8: the rest of the alphabet, in order.
    return spelled | dict(zip(sorted(set(range(256)) - spelled.keys()), missing, strict=True))


def case(name: str, folder: Path, tiktokens: Encode | None = None) -> Case:
    """The tokenizer of a folder, and its peers."""
    notices: list[str] = []
    ours, _ = hf_tokenizer.read(folder, 1 << 20, notices)
    if ours is None:
        sys.exit(f"{folder}: {' '.join(notices)}")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    stock = transformers.AutoTokenizer.from_pretrained(folder)
    ordinary: dict[str, Encode] = {
        "tokenizers": lambda texts: [e.ids for e in library.encode_batch(texts, add_special_tokens=False)],
        "transformers": lambda texts: stock(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        "jaxgpt, many at once": lambda texts: [ids.tolist() for ids in ours.encode_batch(texts)],
    }
    if tiktokens is not None:
        ordinary["tiktoken"] = tiktokens
    parsed: dict[str, Encode] = {"transformers": lambda texts: stock(texts, add_special_tokens=False)["input_ids"]}
    return Case(name, ours, ordinary, parsed, lambda ids: library.decode_batch(ids, skip_special_tokens=False))


def cases(root: Path, extra: list[Path]) -> Iterator[Case]:
    """Trained vocabularies as hf, bpe and hex; GPT-2's own; and what was asked for."""
    peers = {
        "gpt-2 rule": (None, GPT2, False, "GPT2Tokenizer"),
        "qwen2 rule": (QWEN2, QWEN2, True, "Qwen2Tokenizer"),
        "llama-bpe rule": (LLAMA3, LLAMA3, False, "PreTrainedTokenizerFast"),
    }
    for name, (pattern, for_tiktoken, nfc, class_) in peers.items():
        made = trained(pattern, nfc=nfc, ignore_merges=name == "llama-bpe rule")
        folder = root / name
        folder.mkdir()
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": class_, "eos_token": SPECIALS[0]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found = case(f"hf, {name}", folder, in_tiktoken(made, for_tiktoken, nfc))
        yield found
        if class_ != "PreTrainedTokenizerFast":
            yield from _as_files(folder, made, name, found)
    gpt2 = root / "gpt2"
    gpt2.mkdir()
    from jaxgpt.chat import PLAIN

    hf_tokenizer.write(Tokenizer.create("gpt2", template=PLAIN, model_vocab_size=50257), None, gpt2, 1024)
    encoding = tiktoken.Encoding("r50k", **_r50k())
    yield case("gpt2", gpt2, lambda texts: encoding.encode_ordinary_batch(texts, num_threads=1))
    yield from (case(str(folder), folder) for folder in extra)


def _r50k() -> dict[str, Any]:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    from jaxgpt.vocabularies.kinds import gpt2_files

    files = gpt2_files()
    ranks = data_gym_to_mergeable_bpe_ranks(str(files["vocab.bpe"]), str(files["encoder.json"]))
    return {"pat_str": GPT2, "mergeable_ranks": ranks, "special_tokens": {}}


def _as_files(folder: Path, made: Any, name: str, like: Case) -> Iterator[Case]:
    """The same vocabulary as vocab.json and merges.txt, spelled both ways, with the same peers."""
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    model = json.loads(made.to_str())["model"]
    notes = {
        str(id): {"content": token.content, "special": token.special}
        for id, token in made.get_added_tokens_decoder().items()
    }
    settings = {**json.loads((folder / "tokenizer_config.json").read_text()), "added_tokens_decoder": notes}
    spellings: dict[str, Callable[[str], str]] = {
        "bpe": str,
        "hex": lambda token: bytes(map(byte_of.__getitem__, token)).hex(),
    }
    for kind, spell in spellings.items():
        other = folder.with_name(f"{folder.name} {kind}")
        other.mkdir()
        (other / "vocab.json").write_text(json.dumps({spell(token): id for token, id in model["vocab"].items()}))
        lines = [" ".join(map(spell, pair)) for pair in model["merges"]]
        (other / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", "utf-8")
        (other / "tokenizer_config.json").write_text(json.dumps(settings))
        ours, _ = hf_tokenizer.read(other, 1 << 20, [])
        assert ours is not None
        assert ours.kind == kind
        yield Case(f"{kind}, {name}", ours, like.ordinary, like.parsed, like.decode)


# -- Comparison ------------------------------------------------------------------------


def compare(one: Case, texts: list[str]) -> None:
    """Note every string whose ids or text differ."""
    ids = [one.ours.encode(text) for text in texts]
    for peer, encode in one.ordinary.items():
        _differ(one, peer, texts, ids, encode(texts))
    parsed = [one.ours.encode(text, specials=True) for text in texts]
    for peer, encode in one.parsed.items():
        _differ(one, f"{peer}, special tokens parsed", texts, parsed, encode(texts))
    for text, mine, theirs in zip(texts, map(one.ours.decode, ids), one.decode(ids), strict=True):
        if not mine == theirs == one.ours.normalise(text):
            one.differences.append(f"{one.name}, decoded: {text!r} is {mine!r}, in tokenizers {theirs!r}")


def _differ(one: Case, peer: str, texts: list[str], mine: list[Ids], theirs: list[Ids]) -> None:
    for text, a, b in zip(texts, mine, theirs, strict=True):
        if a != list(b):
            one.differences.append(f"{one.name}, {peer}: {text!r} is {a}, there {b}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="strings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, action="append", default=[], help="a folder with tokenizer.json")
    options = parser.parse_args()
    begin = time.time()
    texts = list(strings(options.count, options.seed))
    with tempfile.TemporaryDirectory() as folder:
        found = list(cases(Path(folder), options.tokenizer))
        for one in found:
            for start in range(0, len(texts), BATCH):
                compare(one, texts[start : start + BATCH])
            print(f"{one.name}: {len(one.differences)} differences in {len(texts):,} strings", file=sys.stderr)
            print(*one.differences[:3], sep="\n", end="\n" if one.differences else "", file=sys.stderr)
    result = {
        "strings": len(texts),
        "seed": options.seed,
        "peers": ["tokenizers", "tiktoken", "transformers"],
        "differences": {one.name: len(one.differences) for one in found},
        "seconds": round(time.time() - begin, 1),
    }
    print(json.dumps(result))
    return int(any(one.differences for one in found))


if __name__ == "__main__":
    sys.exit(main())
