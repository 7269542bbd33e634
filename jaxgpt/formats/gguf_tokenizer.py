"""A tokenizer as GGUF metadata, so that llama.cpp gives every text the ids that jaxgpt gives it.

Byte-level BPE is llama.cpp's `gpt2` kind; a vocabulary of bytes is one without merges.
`char` is its `llama` kind (SentencePiece without merges): characters it knows are one
token, all others fall back to their bytes, as here.
"""

from collections.abc import Sequence

from jaxgpt.chat import Template
from jaxgpt.errors import first
from jaxgpt.formats import gguf_other_ids, gguf_template
from jaxgpt.formats.gguf_metadata import Metadata
from jaxgpt.jinja.template import JinjaTemplate
from jaxgpt.tokenizer import END_OF_TEXT, Tokenizer
from jaxgpt.vocabularies.byte_alphabet import spelled

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""llama.cpp's types of token (`llama_token_type`)."""
DEAD_MERGE = "<|none|> <|none|>"
"""llama.cpp refuses a vocabulary without merges; this one joins what no text is cut into."""
_SPACES = (b" ", "\u2581".encode())
"""A space, and what llama.cpp spells it with in its `llama` kind: only tokens found before that stay two."""
_IDS = "prompts must be token ids"


def metadata(
    tokenizer: Tokenizer | None, template: Template | None, rows: int, eos_token_ids: Sequence[int]
) -> tuple[Metadata, list[str]]:
    """Keys and values below `tokenizer`, one token for every row of the embedding; and lines to print."""
    if tokenizer is None:
        return _ids_only(rows, eos_token_ids), [f"no tokenizer written: the checkpoint has none; {_IDS}"]
    kind = _kind(tokenizer)
    if kind is None:
        notice = f"no tokenizer written: llama.cpp has no rule that cuts words as this one's does; {_IDS}"
        return _ids_only(rows, [*tokenizer.stop_ids, *eos_token_ids]), [notice]
    tokens, types, notices = _tokens(tokenizer, rows, kind)
    notices += gguf_other_ids.notices(tokenizer)
    found: Metadata = {"ggml.model": kind, "ggml.tokens": tokens, "ggml.token_type": types}
    if kind == "gpt2":
        merges = [f"{spelled(left)} {spelled(right)}" for left, right in tokenizer.merges]
        # Without merges no two bytes are joined, wherever the words are cut.
        found |= {"ggml.pre": tokenizer.pre_tokenizer or "gpt-2", "ggml.merges": merges or [DEAD_MERGE]}
    else:
        found |= {"ggml.pre": "default", "ggml.scores": [0.0] * rows, "ggml.add_space_prefix": False}
    found |= _roles(tokenizer, template, eos_token_ids, notices)
    if template is not None:
        found["chat_template"] = gguf_template.jinja(template)
    return {f"tokenizer.{key}": value for key, value in found.items()}, notices


def _kind(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's kind of tokenizer that does the same; None for none."""
    if tokenizer.kind == "char":
        return "llama"
    if tokenizer.merges:
        return "gpt2" if tokenizer.pre_tokenizer else None
    literal = {*tokenizer.special_ids, *tokenizer.added.values()}
    base = (tokenizer.token_bytes(id) for id in range(tokenizer.base_vocab_size) if id not in literal)
    return "gpt2" if all(len(token) <= 1 for token in base) else None


def _tokens(tokenizer: Tokenizer, rows: int, kind: str) -> tuple[list[str], list[int], list[str]]:
    """Text and type of every row: llama.cpp aborts on two that are spelled the same."""
    literal = {special.id: (special.text, CONTROL) for special in tokenizer.specials}
    literal |= {id: (text, USER_DEFINED) for text, id in tokenizer.added.items()}
    tokens: list[str] = []
    types: list[int] = []
    ids: dict[str, int] = {}
    repeated: list[str] = []
    for id in range(rows):
        text, type_ = literal.get(id) or _token(tokenizer, id, kind)
        if text in ids and type_ != UNUSED:
            repeated.append(f"{id} as {ids[text]}: {text}")
        while not text or text in ids:
            text, type_ = f"<|pad_{id}|>" if not text else f"{text}<|pad_{id}|>", UNUSED
        ids[text] = id
        tokens.append(text)
        types.append(type_)
    unused = "llama.cpp never gives and never prints ids that repeat the text of another"
    return tokens, types, [f"{unused} ({first(repeated)})"] if repeated else []


def _token(tokenizer: Tokenizer, id: int, kind: str) -> tuple[str, int]:
    token = tokenizer.token_bytes(id)
    if not token:
        return "", UNUSED
    if kind == "gpt2":
        return spelled(token), NORMAL
    if token in _SPACES and tokenizer.encode(token.decode()) == [id]:
        return token.decode(), USER_DEFINED
    # The 256 bytes of kind char come before its characters.
    if id >= 256 and token != b"\0":
        return token.decode(), NORMAL
    # llama.cpp ends a token's text at a zero: a corpus that has this character has it as the byte.
    return (f"<0x{token[0]:02X}>", BYTE) if token != b"\0" or tokenizer.encode("\0") == [id] else ("", UNUSED)


def _roles(
    tokenizer: Tokenizer, template: Template | None, eos_token_ids: Sequence[int], notices: list[str]
) -> Metadata:
    """Ids with a meaning. What is put before a text is what `Tokenizer.bos_ids` says."""
    by_text = {special.text: special.id for special in tokenizer.specials}
    # An imported template writes the tokens that its variables name, and llama.cpp fills these in from the ids.
    said = template.variables if isinstance(template, JinjaTemplate) else {}
    end = tokenizer.special(END_OF_TEXT).id
    eos = by_text.get(said.get("eos_token", ""), end)
    bos = tokenizer.bos_ids[0] if len(tokenizer.bos_ids) == 1 else by_text.get(said.get("bos_token", ""), eos)
    if len(tokenizer.bos_ids) > 1:
        notices.append(f"llama.cpp puts one token before a text, not {len(tokenizer.bos_ids)}: it will put none")
    found: Metadata = {"ggml.add_bos_token": len(tokenizer.bos_ids) == 1, "ggml.add_eos_token": False}
    found |= {"ggml.bos_token_id": bos, "ggml.eos_token_id": eos}
    if tokenizer.pad_id != end:
        found["ggml.padding_token_id"] = tokenizer.pad_id
    replied = [] if template is None else [tokenizer.special(template.end).id]
    others = list(dict.fromkeys(id for id in (*replied, *tokenizer.stop_ids, *eos_token_ids) if id != eos))
    # End of turn and end of message: llama.cpp ends a reply at any of the three.
    found |= dict(zip(("ggml.eot_token_id", "ggml.eom_token_id"), others, strict=False))
    if others[2:]:
        left = first([str(id) for id in others[2:]])
        notices.append(f"texts end with token {left} too, which GGUF has no place for; llama.cpp may go on there")
    return found


def _ids_only(rows: int, eos_token_ids: Sequence[int]) -> Metadata:
    """A vocabulary in which no token is text: llama.cpp then takes and gives ids."""
    found: Metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [f"<|pad_{id}|>" for id in range(rows)],
        "token_type": [UNUSED] * rows,
        "merges": [DEAD_MERGE],
        "add_bos_token": False,
    }
    if eos_token_ids:
        found |= {"bos_token_id": eos_token_ids[0], "eos_token_id": eos_token_ids[0]}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}
