"""A vocabulary in files of other programs: which kind it is, what it adds, and what its special tokens are for.

The kind is told by content alone: `tokenizer.json` wins over `vocab.json` and
`merges.txt`; a vocabulary with 200 or more of the 256 names `00`…`ff` is `hex`, one
with 200 or more of the 256 characters of the byte alphabet byte-level BPE (Qwen's has
36 of the names, GPT-2's 136), anything else is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxgpt.errors import InputError, first
from jaxgpt.regular_files import is_there
from jaxgpt.special_tokens import END, END_OF_TEXT, PAD
from jaxgpt.vocabularies import bpe, split_rules, tokenizer_probe
from jaxgpt.vocabularies.bpe import BpeEncoder, ByteLevelEncoder, HexEncoder, HfEncoder
from jaxgpt.vocabularies.class_settings import ClassSettings
from jaxgpt.vocabularies.kinds import kind_named

JSON, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
Kind = Literal["hf", "bpe", "hex"]
MAX_BYTES = 64 << 20
"""Largest file read: four times the largest vocabularies there are (256,000 tokens)."""
ENOUGH = 200
"""So many of 256 names make a vocabulary one of that spelling."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")
"""Strings that end a document in known vocabularies, where an `eos_token` may end a turn instead."""
CHATML = {"start": "<|im_start|>", END: "<|im_end|>"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Found:
    """A vocabulary and what its folder says of it."""

    kind: Kind
    encoder: ByteLevelEncoder
    names: dict[str, str]
    """What code calls its special tokens, name to string, where their role is known."""
    files: dict[str, str]
    """The small files beside the vocabulary, name to text."""
    notices: list[str] = field(default_factory=list[str])
    """Lines the caller should print."""


class NotByteLevel(InputError):
    """A tokenizer that works, but not byte by byte (sentencepiece, WordPiece)."""


def read(path: str | Path, *, kind: Kind | None = None, eos_ids: tuple[int, ...] = ()) -> Found:
    """The vocabulary of a folder, or of one `tokenizer.json`.

    Args:
        path: the folder or file; other files of the folder say what special tokens are for.
        kind: read it as this, whatever it looks like; by default as what it is.
        eos_ids: ids that end a text, as the model's config says.

    Raises:
        NotByteLevel: a tokenizer of another sort.
        InputError: a file that is missing, damaged, too large or hostile; ids that collide
            or that the package would count otherwise.
    """
    path = Path(path)
    folder, json_file = (path.parent, path) if path.is_file() else (path, path / JSON)
    beside = _Beside(folder) if json_file.name == JSON else _Beside(None)
    notices: list[str] = []
    content = _object(json_file, read_text(json_file)) if is_there(json_file) else {}
    data, kind = _data(folder, json_file, content, beside, kind, notices)
    asked = ClassSettings(beside.settings, beside.config, beside.named("bos_token"))
    if kind == "hf":
        data["tokenizer.json"] = asked.over_json(data["tokenizer.json"], notices)
    own = {str(note.get("content")): note for note in _list(content, "added_tokens")}
    noted = _noted(beside, own, _vocabulary(content, data), notices)
    # tokenizer.json has its own: the package adds them.
    data["added"] = [note for text, note in noted.items() if kind != "hf" or text not in own]
    encoder = {"hf": HfEncoder, "bpe": BpeEncoder, "hex": HexEncoder}[kind](data)
    _refuse_moved(encoder, {text: note["id"] for text, note in noted.items()})
    if kind == "bpe" and not content:
        encoder = asked.over_two_files(encoder)
        kind = "hf" if isinstance(encoder, HfEncoder) else kind
    if kind == "hf":
        _refuse_lost_bytes(encoder)
    _refuse_reachable(encoder)
    notices += encoder.not_honoured()
    if encoder.bos_ids:
        bos = _bos(encoder)
        file = JSON if content else SETTINGS
        notices.append(f"{file} puts {bos} before a text: so do prompts of raw text; in a chat the template does")
    if kind == "hf" or not content:
        notices += asked.ignored(encoder, _decider(kind, bool(content)))
    return Found(kind, encoder, _names(encoder, beside, eos_ids), beside.texts, notices)


def _decider(kind: Kind, in_json: bool) -> str:
    """Why what a folder's settings say before a text is not put there."""
    if in_json:
        return f"{JSON} decides, in transformers too"
    return "kind hex has no such step" if kind == "hex" else "no bos_token is in the vocabulary"


def is_gpt2(found: Found) -> bool:
    """Whether it is GPT-2's own vocabulary and no more, which is encoded five times as fast by tiktoken."""
    encoder = found.encoder
    if encoder.edges or encoder.bos_ids or encoder.pre_tokenizer != "gpt-2" or encoder.size < 50257:
        return False
    if encoder.normalise(" e\u0301a") != " e\u0301a":
        return False
    own = kind_named("gpt2").build(())
    if any(own.specials.get(text, id) != id or (id < 50257 and text not in own.specials)
           for text, id in {**encoder.specials, **encoder.added}.items()):  # fmt: skip
        return False
    return encoder.token_bytes()[:50257] == own.token_bytes() and encoder.merges == own.merges


def _bos(encoder: ByteLevelEncoder) -> str:
    """What is put before every text, in words; raises InputError for what is no token."""
    tokens = encoder.token_bytes()
    wrong = [id for id in encoder.bos_ids if id >= len(tokens) or not tokens[id]]
    if wrong:
        raise InputError(f"{JSON} puts id {wrong[0]} before a text, which is no token of it")
    return " ".join(tokens[id].decode(errors="replace") for id in encoder.bos_ids)


class _Beside:
    """The files beside a vocabulary."""

    def __init__(self, folder: Path | None) -> None:
        self.texts: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        for name in (SETTINGS, SPECIAL_MAP, ADDED):
            if folder is not None and is_there(folder / name):
                self.texts[name] = read_text(folder / name)
        if folder is not None and is_there(folder / "config.json"):
            self.config = _object(folder / "config.json", read_text(folder / "config.json"))
        self.settings, self.map, self.added = (
            _object(Path(name), self.texts.get(name, "{}")) for name in (SETTINGS, SPECIAL_MAP, ADDED)
        )

    def named(self, role: str) -> str | None:
        """The string of `eos_token` and the like."""
        for source in (self.settings, self.map):
            value = source.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                return text
        return None

    @property
    def specials(self) -> list[str]:
        """Every string named as special."""
        found = [text for role in NAMED if (text := self.named(role))]
        for source in (self.settings, self.map):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                listed = source.get(key) or []
                for value in (
                    listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
                ):
                    text = value.get("content") if isinstance(value, dict) else value
                    found += [text] if isinstance(text, str) and text else []
        return list(dict.fromkeys(found))


def read_text(path: Path) -> str:
    """A file of UTF-8 text of at most MAX_BYTES; raises InputError for any other."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing or no file; give a folder with {JSON}, or {VOCABULARY} and {MERGES}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes; a vocabulary has at most {MAX_BYTES:,}")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}); give the tokenizer's own file") from None


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        # An escape of half a character, which no file of text could hold again, is a ValueError too.
        raise InputError(f"{path} is not readable JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


# -- Which kind ------------------------------------------------------------------------


def _data(
    folder: Path, json_file: Path, content: dict[str, Any], beside: _Beside, kind: Kind | None, notices: list[str]
) -> tuple[dict[str, Any], Kind]:
    """What the kind is made of, but for the added tokens; `content` is that of tokenizer.json, if there is one."""
    if not content:
        ids, merges = read_text(folder / VOCABULARY), read_text(folder / MERGES)
        kind = kind or _spelling(bpe.read_vocabulary(ids), VOCABULARY)
        if kind == "hf":
            raise InputError(f"{folder} has no {JSON}; leave out the kind to read {VOCABULARY} and {MERGES}")
        return {"vocab.json": ids, "merges.txt": merges, "rule": _rule(beside, notices, {})}, kind
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise InputError(f"{json_file} has no model with a vocabulary; give the tokenizer.json of a byte-level BPE")
    if kind is None and _is_hex(model):
        kind = "hex"
    if kind is None or kind == "hf":
        _refuse_other_sorts(json_file, content, model)
        problem = tokenizer_probe.bounded(json_file)
        if problem:
            raise InputError(f"{json_file} is refused: {problem}")
        return {"tokenizer.json": read_text(json_file)}, "hf"
    return {**_extracted(json_file, model), "rule": _rule(beside, notices, content)}, kind


def _is_hex(model: Mapping[str, Any]) -> bool:
    return isinstance(model["vocab"], dict) and bpe.names_of(model["vocab"])[0] >= ENOUGH


def _spelling(ids: Mapping[str, int], file: str) -> Kind:
    hexes, characters = bpe.names_of(ids)
    if hexes >= ENOUGH:
        return "hex"
    if characters >= ENOUGH:
        return "bpe"
    raise InputError(
        f"{file} is neither byte-level BPE (it has {characters} of 256 byte tokens) nor hex ({hexes} of `00`…`ff`); "
        f"at least {ENOUGH} are expected"
    )


def _extracted(path: Path, model: Mapping[str, Any]) -> dict[str, str]:
    """A tokenizer.json's vocabulary as the two files."""
    pairs = model.get("merges")
    if not isinstance(model["vocab"], dict) or not isinstance(pairs, list):
        raise InputError(f"{path} has no vocabulary and merges of a BPE")
    lines = [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in pairs]
    return {"vocab.json": json.dumps(model["vocab"], ensure_ascii=False), "merges.txt": "\n".join(lines) + "\n"}


def _vocabulary(content: Mapping[str, Any], data: Mapping[str, Any]) -> Mapping[str, int]:
    """Ids by token, as the file spells them."""
    return content["model"]["vocab"] if content else bpe.read_vocabulary(data["vocab.json"])


def _rule(beside: _Beside, notices: list[str], content: Mapping[str, Any]) -> str:
    """The key of `split_rules.RULES`, from what the folder says."""
    if named := split_rules.rule_named(content.get("pre_tokenizer")):
        return named
    for key, value in (
        (f"{SETTINGS}: tokenizer_class", beside.settings.get("tokenizer_class")),
        ("config.json: model_type", beside.config.get("model_type")),
    ):
        if isinstance(value, str) and (rule := split_rules.rule_of(value)):
            notices.append(f"text is cut into words by the rule {rule}, as {key} {value} says")
            return rule
    notices.append("text is cut into words by the rule gpt-2: no tokenizer_class or model_type says which")
    return "gpt-2"


def _refuse_other_sorts(path: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    steps = split_rules.flat(content.get("pre_tokenizer"))
    decoder = content.get("decoder")
    decoders = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    odd = [
        what
        for what, found in {
            f"a {model.get('type', 'BPE')} model": model.get("type", "BPE") != "BPE",
            "byte_fallback": bool(model.get("byte_fallback")),
            "continuing_subword_prefix": bool(model.get("continuing_subword_prefix")),
            "end_of_word_suffix": bool(model.get("end_of_word_suffix")),
            "dropout": bool(model.get("dropout")),
            "no ByteLevel pre-tokenizer": not steps or steps[-1].get("type") != "ByteLevel",
            "a decoder that is not ByteLevel": any(
                not isinstance(d, dict) or d.get("type") != "ByteLevel" for d in decoders
            ),
        }.items()
        if found
    ]
    if odd:
        raise NotByteLevel(f"{path} is no byte-level BPE ({first(odd)}), and jaxgpt decodes byte by byte")


# -- Added tokens ----------------------------------------------------------------------


def _noted(
    beside: _Beside, own: Mapping[str, Mapping[str, Any]], vocabulary: Mapping[str, int], notices: list[str]
) -> dict[str, dict[str, Any]]:
    """Every token noted besides the merges, with its flags and id, in the order of ids; tokenizer.json's come first."""
    specials = set(beside.specials)
    found = {text: dict(note) for text, note in own.items()}
    for id, note in _decoder(beside.settings).items():
        found.setdefault(note["content"], {**note, "id": id})
    for text, id in beside.added.items():
        found.setdefault(text, {"content": text, "id": id, "special": text in specials})
    # GPT-2's and Qwen2's classes know their end without being told.
    unsaid = [ENDS[0]] if ENDS[0] in vocabulary else []
    for text in [*beside.specials, *unsaid]:
        if text in vocabulary:
            found.setdefault(text, {"content": text, "id": vocabulary[text], "special": True})
        elif text not in found:
            notices.append(f"{SETTINGS} names {text}, which the vocabulary lacks; ignored")
    for text, note in found.items():
        if type(note.get("id")) is not int:
            raise InputError(f"added token {text[:40]} has id {str(note.get('id'))[:20]!r}; expected an integer")
    return dict(sorted(found.items(), key=lambda entry: entry[1]["id"]))


def _decoder(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    noted = settings.get("added_tokens_decoder") or {}
    try:
        found = {int(id): dict(note) for id, note in noted.items()}
        if all(isinstance(note["content"], str) for note in found.values()):
            return found
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{SETTINGS} does not note its added tokens as transformers does")


def _list(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = content.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InputError(f"{JSON}: {key} is not a list of objects")
    return found


def _refuse_moved(encoder: ByteLevelEncoder, declared: Mapping[str, int]) -> None:
    """The package numbers added tokens itself: what a file says otherwise would be wrong without a word."""
    tokens = encoder.token_bytes()
    for text, id in declared.items():
        given = encoder.specials.get(text, encoder.added.get(text))
        if given != id:
            taken = tokens[id].decode(errors="replace") if 0 <= id < len(tokens) else ""
            why = f"already {taken!r}" if taken else f"but tokenizers counts it {given}: ids before it are missing"
            raise InputError(f"{text} has id {id}, {why}")


def _refuse_lost_bytes(encoder: ByteLevelEncoder) -> None:
    if encoder.missing_bytes and not encoder.unknown_ids:
        raise InputError(
            f"{JSON} lacks {encoder.missing_bytes} of the 256 byte tokens and has no unk_token: text would be lost; "
            "train it with the whole byte alphabet"
        )


def _refuse_reachable(encoder: ByteLevelEncoder) -> None:
    """What people type must not become a special token, whatever a vocabulary's merges make of it."""
    ids = set(encoder.specials.values()) - set(encoder.unknown_ids)
    for text in encoder.specials:
        if ids.intersection(encoder.encode_ordinary(text)):
            raise InputError(f"ordinary text {text} would become the special token of that string; refused")


# -- Roles -----------------------------------------------------------------------------


def _names(encoder: ByteLevelEncoder, beside: _Beside, eos_ids: tuple[int, ...]) -> dict[str, str]:
    """What the special tokens are for: end of text, end of turn, pad."""
    of_id = {id: text for text, id in encoder.specials.items()}
    eos = beside.named("eos_token")
    ends = [text for text in (eos, *map(of_id.get, eos_ids)) if text in encoder.specials]
    names: dict[str, str] = {}
    if all(text in encoder.specials for text in CHATML.values()):
        names |= CHATML
    known = [text for text in (*ENDS, *ends) if text in encoder.specials and text not in names.values()]
    chosen = next((text for text in known if text in ends), None) or next(iter(known), None)
    if chosen is None and ends and ends[0] is not None:
        # Its only end is a turn's: it ends documents too.
        names = {name: text for name, text in names.items() if text != ends[0]}
        chosen = ends[0]
    if chosen is not None:
        names[END_OF_TEXT] = chosen
    turn_end = next((text for text in ends if text is not None and text != chosen), None)
    if turn_end is not None:
        names.setdefault(END, turn_end)
    pad = beside.named("pad_token")
    if pad in encoder.specials and pad not in names.values():
        names[PAD] = str(pad)
    return names
