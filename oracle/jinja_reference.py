"""An imported chat template a second time: its own output for the real contents, cut where they stand.

The product finds contents by rendering sentinels. Here the conversation itself is
rendered, each content is looked for in the text, and what is between them is the
template's. Rendering is the confined process's in both: the program is not at issue,
what is made of its output is.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jaxgpt.chat import Message
from jaxgpt.jinja import process
from jaxgpt.jinja.process import Failure, Rendering
from jaxgpt.jinja.template import DEFAULT
from oracle.text_reference import longest_match


def is_program(template: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint's `template.json` holds a program rather than turns."""
    return template is not None and template.get("kind") == "jinja"


def rendered(
    template: Mapping[str, Any],
    specials: Mapping[str, int],
    encode: Callable[[str], list[int]],
    messages: Sequence[Message],
) -> tuple[list[int], list[int]] | None:
    """Ids and mask of a conversation; None where the output does not show which of it are contents.

    That is so where the template refuses the conversation, rewrites a content beyond
    its ends, or has a content's words elsewhere.

    Args:
        template: the checkpoint's `template.json`.
        specials: string to id.
        encode: ids of ordinary text.
        messages: with contents that are words of their own.
    """
    [text] = process.render(template["sources"][DEFAULT], template["variables"], [Rendering(messages)])
    if isinstance(text, Failure):
        return None
    spans = [_span(text, message["content"]) for message in messages]
    found = sorted((span, message["role"]) for span, message in zip(spans, messages, strict=True) if span)
    if len(found) < len(messages) or any(a[0][1] > b[0][0] for a, b in pairwise(found)):
        return None
    ids: list[int] = []
    mask: list[int] = []
    place = replied = 0
    for (begin, end), role in [*found, ((len(text), len(text)), "")]:
        own, content = longest_match(text[place:begin], specials, encode), encode(text[begin:end])
        trained = role == template["trained_role"]
        # The token after a reply ends it, and is trained with it.
        mask += [replied] * len(own[:1]) + [0] * len(own[1:]) + [int(trained)] * len(content)
        ids += own + content
        place, replied = end, int(trained)
    return ids, mask


def _span(text: str, content: str) -> tuple[int, int] | None:
    """Where the content stands, or what is left of it without the white space at its ends; None if not just once."""
    for said in (content, content.rstrip(), content.lstrip(), content.strip()):
        if said and text.count(said) == 1:
            begin = text.index(said)
            return begin, begin + len(said)
    return None
