"""A chat template as the Jinja text that llama.cpp renders."""

from collections.abc import Sequence

from jaxgpt.chat import Marker, Piece, Template, Turn, TurnTemplate
from jaxgpt.jinja.template import JinjaTemplate
from jaxgpt.tokenizer import END_OF_TEXT
from jaxgpt.vocabularies.kinds import END_OF_TEXT as END_OF_TEXT_STRING


def jinja(template: Template) -> str:
    """An imported template's own source; one made of turns as Jinja that writes what `chat.render` encodes."""
    if isinstance(template, JinjaTemplate):
        return template.source
    assert isinstance(template, TurnTemplate), "there are two kinds of template"
    return _of_turns(template)


def _of_turns(template: TurnTemplate) -> str:
    texts = {END_OF_TEXT: END_OF_TEXT_STRING, **template.specials}
    lines = ["{%- for message in messages -%}"]
    for number, (role, turn) in enumerate(template.turns.items()):
        lines.append(f"{{%- {'elif' if number else 'if'} message['role'] == {_quoted(role)} -%}}")
        lines.append(_turn(turn, texts))
    lines += [
        "{%- else -%}",
        "{{- raise_exception('unknown role: ' + message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        f"{{{{- {_text(template.turns[template.trained_role].prefix, texts)} -}}}}",
        "{%- endif -%}",
    ]
    return "\n".join(lines)


def _turn(turn: Turn, texts: dict[str, str]) -> str:
    return f"{{{{- {_text(turn.prefix, texts)} + message['content'] + {_text(turn.suffix, texts)} -}}}}"


def _text(pieces: Sequence[Piece], texts: dict[str, str]) -> str:
    return _quoted("".join(texts[piece.name] if isinstance(piece, Marker) else piece for piece in pieces))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
