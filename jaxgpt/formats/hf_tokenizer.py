"""Tokenizer files of a Hugging Face folder, read and written back.

Read are byte-level BPE of any kind, GPT-2's own vocabulary among them, and the form in
which `char` is written here. What the files say beyond ids is kept word for word, so
that what is written again has the same values.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.chat import TEMPLATES, Template
from jaxgpt.errors import InputError, first
from jaxgpt.jinja import template_files, template_import
from jaxgpt.jinja.template import JinjaTemplate
from jaxgpt.regular_files import is_there
from jaxgpt.tokenizer import END_OF_TEXT, PAD, Special, Tokenizer
from jaxgpt.vocabularies import split_rules, vocabulary_files
from jaxgpt.vocabularies.bpe import BpeEncoder, ByteLevelEncoder
from jaxgpt.vocabularies.byte_alphabet import spelled
from jaxgpt.vocabularies.kinds import CharEncoder, Edges, Encoder, gpt2_files, kind_named
from jaxgpt.vocabularies.vocabulary_files import ADDED, JSON, MERGES, SETTINGS, SPECIAL_MAP, VOCABULARY, NotByteLevel

IDS = "prompts must be token ids"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
"""How the package's `byte_fallback` names bytes."""


# -- Reading ---------------------------------------------------------------------------


def read(
    folder: Path, model_vocab_size: int, notices: list[str], eos_ids: tuple[int, ...] = ()
) -> tuple[Tokenizer | None, Template | None]:
    """The folder's tokenizer and chat template; None for what it has not or jaxgpt cannot use, with a notice why.

    Args:
        folder: a Hugging Face folder.
        model_vocab_size: rows of the model's embedding.
        notices: lines the caller should print are added.
        eos_ids: ids that end a text, as the model's config says.

    Raises:
        InputError: files that are damaged or hostile, or a tokenizer of more tokens than rows.
    """
    names = (JSON, VOCABULARY, MERGES, SETTINGS, SPECIAL_MAP, ADDED, template_files.FILE)
    there = {name for name in names if is_there(folder / name)}
    if JSON not in there and not {VOCABULARY, MERGES} <= there:
        what = f"the folder has no vocabulary ({JSON}, or {VOCABULARY} and {MERGES})"
        notices.append(f"no tokenizer imported: {what}; {IDS}")
        return None, None
    tokenizer, template = _tokenizer(folder, model_vocab_size, notices, eos_ids)
    if tokenizer is not None and template is None:
        template = template_import.read_from(folder, tokenizer, notices)
    return tokenizer, template


def _tokenizer(
    folder: Path, rows: int, notices: list[str], eos_ids: tuple[int, ...]
) -> tuple[Tokenizer | None, Template | None]:
    characters = _characters(folder)
    if characters is not None:
        kind, encoder, files, names = "char", characters[0], {}, {}
        specials, added = characters[1:]
    else:
        try:
            found = vocabulary_files.read(folder, eos_ids=eos_ids)
        except NotByteLevel as error:
            notices.append(f"no tokenizer imported: {error}; {IDS}")
            return None, None
        notices += found.notices
        kind, encoder, files, names = found.kind, found.encoder, found.files, found.names
        specials, added = encoder.specials, encoder.added
        if vocabulary_files.is_gpt2(found):
            kind, encoder = "gpt2", kind_named("gpt2").build(())
            if (folder / JSON).is_file():
                files = {**files, JSON: vocabulary_files.read_text(folder / JSON)}
    if kind in ("gpt2", "char") and (ours := _our_own(kind, encoder, specials, added, rows)):
        return ours
    size = max([encoder.size, *(id + 1 for id in [*specials.values(), *added.values()])])
    if size > rows:
        raise InputError(f"tokenizer has {size:,} tokens, model embeds {rows:,}; give the tokenizer of this model")
    if END_OF_TEXT not in names and size == rows:
        notices.append(f"no tokenizer imported: no token of it ends a text, and the model has no row for one; {IDS}")
        return None, None
    if kind in ("gpt2", "char"):
        return _around(kind, encoder, specials, added, rows, names, files), None
    return Tokenizer.of_vocabulary(kind, encoder, None, rows, names=names, files=files), None


def _our_own(
    kind: str, encoder: Encoder, specials: Mapping[str, int], added: Mapping[str, int], rows: int
) -> tuple[Tokenizer, Template] | None:
    """The tokenizer and template that jaxgpt would have written so."""
    for template in TEMPLATES.values():
        try:
            tokenizer = Tokenizer.of_vocabulary(kind, encoder, template, rows)
        except InputError:
            continue  # too few rows for this template
        if {special.text: special.id for special in tokenizer.specials} == specials and not added:
            # Without a marker of a template's own, nothing says that it is this one.
            marked = template.specials or PAD in {special.name for special in tokenizer.specials}
            return (tokenizer, template) if marked else None
    return None


def _around(
    kind: str,
    encoder: Encoder,
    specials: Mapping[str, int],
    added: Mapping[str, int],
    rows: int,
    names: Mapping[str, str],
    files: Mapping[str, str],
) -> Tokenizer:
    """A tokenizer of one of jaxgpt's own vocabularies with the tokens of another program's files."""
    if END_OF_TEXT not in names:
        size = max([encoder.size, *(id + 1 for id in [*specials.values(), *added.values()])])
        names, specials = {**names, END_OF_TEXT: "<|endoftext|>"}, {**specials, "<|endoftext|>": size}
    of_text = {text: name for name, text in names.items()}
    named = [Special(of_text.get(text, text), text, id) for text, id in specials.items()]
    return Tokenizer(kind, encoder, named, rows, added=added, files=files)


def _characters(folder: Path) -> tuple[CharEncoder, dict[str, int], dict[str, int]] | None:
    """Kind `char` as `write` writes it, its special and its added tokens."""
    path = folder / JSON
    if not path.is_file() or '"byte_fallback"' not in (text := vocabulary_files.read_text(path)):
        return None
    try:
        content = json.loads(text)
        ids: dict[str, int] = content["model"]["vocab"]
        tokens = sorted(ids, key=ids.__getitem__)
        bare = not content["model"]["merges"] and not content["pre_tokenizer"] and not content["normalizer"]
        notes = [(token["content"], token["id"], token["special"]) for token in content["added_tokens"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    ordered = sorted(map(str, ids.values()), key=int) == [str(id) for id in range(len(ids))] if bare else False
    if not ordered or tokens[:256] != _BYTE_TOKENS or any(len(token) != 1 for token in tokens[256:]):
        return None
    specials, added = ({t: id for t, id, flag in notes if flag is special} for special in (True, False))
    return CharEncoder("".join(tokens[256:])), specials, added


# -- Writing ---------------------------------------------------------------------------


def write(tokenizer: Tokenizer, template: Template | None, folder: Path, context: int) -> list[str]:
    """Write the files from which transformers makes the same tokenizer; lines the caller should print.

    Args:
        tokenizer: of any kind.
        template: the checkpoint's; one imported from such a folder is put back where it was.
        folder: exists.
        context: the model's, in tokens.
    """
    new = _new(tokenizer)
    for name, text in {JSON: _json_text(tokenizer, new), **_two_files(tokenizer), **_maps(tokenizer, new)}.items():
        (folder / name).write_text(text, "utf-8")
    settings = json.loads(tokenizer.files.get(SETTINGS, "null")) or _settings(tokenizer, template, context)
    if new:
        settings["added_tokens_decoder"] = {**_decoder(tokenizer), **(settings.get("added_tokens_decoder") or {})}
    settings.pop("chat_template", None)
    if isinstance(template, JinjaTemplate):
        settings |= template_files.write(template, folder)
    (folder / SETTINGS).write_text(_pretty(settings), "utf-8")
    return _overlaps(tokenizer)


def _overlaps(tokenizer: Tokenizer) -> list[str]:
    """In a line at most, added tokens whose end a special token could begin with: transformers finds the leftmost."""
    begins = {special.text[:n] for special in tokenizer.specials for n in range(1, len(special.text) + 1)}
    longest = max(map(len, begins))
    found = [t for t in tokenizer.added if any(t[-n:] in begins for n in range(1, min(len(t), longest + 1)))]
    said = "where both overlap in a text, transformers finds only the first; a chat of jaxgpt has both"
    return [f"added tokens end as special ones begin ({first(found)}): {said}"] if found else []


def _new(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Notes of tokens that came after the files the tokenizer was read from."""
    files = {name: json.loads(text) for name, text in tokenizer.files.items()}
    listed = files.get(JSON, {}).get("added_tokens") or []
    decoder = files.get(SETTINGS, {}).get("added_tokens_decoder") or {}
    said = {*(note["content"] for note in [*listed, *decoder.values()]), *files.get(ADDED, {})}
    # The vocabulary of a byte-level encoder has all that its files say.
    return [n for n in _notes(tokenizer) if n["id"] >= tokenizer.encoder.size and n["content"] not in said]


def _json_text(tokenizer: Tokenizer, new: Sequence[Mapping[str, Any]]) -> str:
    """A `tokenizer.json`: the one it came from where nothing was added since."""
    encoder = tokenizer.encoder
    text = tokenizer.files.get(JSON) or (encoder.json() if isinstance(encoder, ByteLevelEncoder) else "")
    if text and not new:
        return text
    content = json.loads(text) if text else _own_sections(tokenizer)
    listed = [*(content.get("added_tokens") or []), *new] if text else _notes(tokenizer)
    return _pretty({**content, "added_tokens": sorted(listed, key=lambda note: note["id"])})


def _maps(tokenizer: Tokenizer, new: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The two older files that some folders have beside `tokenizer_config.json`."""
    found = {name: tokenizer.files[name] for name in (SPECIAL_MAP, ADDED) if name in tokenizer.files}
    if new and ADDED in found:
        found[ADDED] = _pretty({**json.loads(found[ADDED]), **{note["content"]: note["id"] for note in new}})
    return found


def _own_sections(tokenizer: Tokenizer) -> dict[str, Any]:
    """Kinds `gpt2` and `char` in the package's terms."""
    sections: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    if tokenizer.kind == "gpt2":
        rule = split_rules.RULES["gpt-2"]
        ids = json.loads(gpt2_files()["encoder.json"].read_text("utf-8"))
        merges = [f"{spelled(left)} {spelled(right)}" for left, right in tokenizer.merges]
        byte_level = dict(rule.pre_tokenizer)
        model = {"type": "BPE", "vocab": ids, "merges": merges}
        return {**sections, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    characters = [tokenizer.token_bytes(id).decode() for id in range(256, tokenizer.base_vocab_size)]
    ids = {token: id for id, token in enumerate([*_BYTE_TOKENS, *characters])}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    model = {"type": "BPE", "byte_fallback": True, "vocab": ids, "merges": []}
    return {**sections, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


def _notes(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Special and added tokens as tokenizer.json lists them, by id."""
    encoder = tokenizer.encoder
    flagged = [(special.id, special.text, True) for special in tokenizer.specials]
    flagged += [(id, text, False) for text, id in tokenizer.added.items()]
    return [
        {
            "id": id,
            "content": text,
            **dataclasses.asdict(encoder.edges.get(text, Edges())),
            "normalized": text in encoder.found_late,
            "special": special,
        }
        for id, text, special in sorted(flagged)
    ]


def _decoder(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Special and added tokens as tokenizer_config.json lists them."""
    return {str(note.pop("id")): note for note in _notes(tokenizer)}


def _two_files(tokenizer: Tokenizer) -> dict[str, str]:
    """`vocab.json` and `merges.txt`, where the folder's model type alone tells how they are used."""
    encoder = tokenizer.encoder
    if isinstance(encoder, BpeEncoder):
        return {name: encoder.data()[name] for name in (VOCABULARY, MERGES)}
    if tokenizer.kind == "gpt2":
        files = gpt2_files()
        theirs = {VOCABULARY: "encoder.json", MERGES: "vocab.bpe"}
        return {name: files[openai].read_text("utf-8") for name, openai in theirs.items()}
    if tokenizer.pre_tokenizer not in ("gpt-2", "qwen2"):
        return {}
    ids = json.loads(tokenizer.encoder.data()[JSON])["model"]["vocab"]
    lines = [f"{spelled(left)} {spelled(right)}" for left, right in tokenizer.merges]
    merges = "\n".join(["#version: 0.2", *lines]) + "\n"
    return {VOCABULARY: json.dumps(ids, ensure_ascii=False), MERGES: merges}


def _settings(tokenizer: Tokenizer, template: Template | None, context: int) -> dict[str, Any]:
    """A `tokenizer_config.json` for a tokenizer that came without one."""
    names = {special.name: special.text for special in tokenizer.specials}
    end = names[END_OF_TEXT]
    roles = {"eos_token": end, "bos_token": end, **json.loads(tokenizer.files.get(SPECIAL_MAP, "{}"))}
    more: dict[str, str] = {}
    if isinstance(template, JinjaTemplate):
        # It writes what its variables name, and nothing for those it has not.
        roles = {name: text for name, text in template.variables.items() if name in template_files.VARIABLES}
        more = {name: text for name, text in template.variables.items() if name not in roles}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        **({"pad_token": names[PAD]} if PAD in names else {}),
        **roles,
        **({"extra_special_tokens": more} if more else {}),
        "added_tokens_decoder": _decoder(tokenizer),
    }


def _pretty(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
