"""Importing a chat template: what is found out about it by rendering short conversations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxgpt.chat import Message
from jaxgpt.errors import InputError, first
from jaxgpt.jinja import process, template_files
from jaxgpt.jinja.layout import Segment, cut, joined, missing, sentinel, text_after, with_sentinels
from jaxgpt.jinja.process import Failure, Rendering
from jaxgpt.jinja.template import DEFAULT, JinjaTemplate, Trim, trimmed
from jaxgpt.jinja.template_files import FoundTemplate
from jaxgpt.tokenizer import Tokenizer

Layout = list[Segment]

QUESTION, EXCHANGE, NEXT, TWO = "question", "exchange", "next question", "two exchanges"
CONVERSATIONS: dict[str, tuple[str, ...]] = {
    QUESTION: ("user",),
    EXCHANGE: ("user", "assistant"),
    NEXT: ("user", "assistant", "user"),
    TWO: ("user", "assistant", "user", "assistant"),
    "system": ("system", "user"),
    "developer": ("developer", "user"),
    "tool": ("user", "assistant", "tool"),
}
"""Roles of what is rendered; the last three tell whether a role is known at all."""
ROLES = ("system", "developer", "user", "assistant", "tool")

LEFT, RIGHT = " \n\t ", "\t \n "
ODD = {
    "quotes, angle brackets and line breaks": "say \"a\" & 'b' <c>\n\n- d",
    "capital letters": "ABC def GHI",
    "no text": "",
    "much text": "words " * 2000 + "end",
    "braces": '{"name": "{{ f }}", "n": 1}',
    "`</think>`": "<think>\nthis\n</think>\n\nthat",
}
SPOKEN = ("Hello, who are you?", "A model.", "How old?", "Two.")


def read_from(folder: str | Path, tokenizer: Tokenizer, notices: list[str]) -> JinjaTemplate | None:
    """The chat template of a Hugging Face folder, None where there is none that renders a question.

    Args:
        folder: see `template_files.find`.
        tokenizer: the folder's, with its special tokens.
        notices: lines the caller should print are added.

    Raises:
        InputError: unreadable files; a template that is no Jinja, does not finish in a second, needs too much
            memory or reaches for what is forbidden.
    """
    found = template_files.find(Path(folder))
    return None if found is None else examined(found, tokenizer, notices)


def examined(found: FoundTemplate, tokenizer: Tokenizer, notices: list[str]) -> JinjaTemplate | None:
    """See `read_from`."""
    if DEFAULT not in found.sources:
        notices.append(f"no chat template imported: none is named {DEFAULT}, but {first(sorted(found.sources))}")
        return None
    layouts, failures = _layouts(found)
    if QUESTION not in layouts:
        cause = failures.get(QUESTION, "it leaves out what is said")
        notices.append(f"no chat template imported: it does not render a question: {cause}")
        return None
    end, closing = _ending(layouts, tokenizer)
    texts = [segment for layout in layouts.values() for segment in layout if isinstance(segment, str)]
    written = {special.name: special.text for special in tokenizer.specials if any(special.text in t for t in texts)}
    template = JinjaTemplate(
        sources=found.sources,
        placed=found.placed,
        variables=found.variables,
        specials=written,
        known_roles=tuple(role for role in ROLES if role in _known(layouts)),
        end_name=end,
        closing_text=closing,
        trims=_trims(found, layouts),
        gap=_gap(layouts),
        warning=_imitation(layouts, written),
    )
    notices += _notices(template, layouts, tokenizer)
    return template


def _known(layouts: Mapping[str, Layout]) -> set[str]:
    shown = {EXCHANGE: "assistant", "system": "system", "developer": "developer", "tool": "tool"}
    return {"user", *(role for name, role in shown.items() if name in layouts)}


def _layouts(found: FoundTemplate) -> tuple[dict[str, Layout], dict[str, str]]:
    """Those conversations that render with all they say, and why others do not."""
    layouts: dict[str, Layout] = {}
    failures: dict[str, str] = {}
    for name, answer in _answers(found, {name: with_sentinels(_of(roles)) for name, roles in CONVERSATIONS.items()}):
        if isinstance(answer, Failure):
            failures[name] = str(answer)
        elif not missing(cut(answer), len(CONVERSATIONS[name])):
            layouts[name] = cut(answer)
    return layouts, failures


def _of(roles: Sequence[str]) -> list[Message]:
    return [Message(role=role, content="") for role in roles]


def _answers(found: FoundTemplate, asked: Mapping[str, list[Message]]) -> list[tuple[str, str | Failure]]:
    """Texts by name; the prompt of a reply is added where the assistant did not speak last."""
    renderings = [Rendering(messages, messages[-1]["role"] != "assistant") for messages in asked.values()]
    answers = process.render(found.sources[DEFAULT], found.variables, renderings)
    for answer in answers:
        if isinstance(answer, Failure) and answer.harmful:
            raise InputError(f"{answer}; repair or remove it")
    return list(zip(asked, answers, strict=True))


def _ending(layouts: Mapping[str, Layout], tokenizer: Tokenizer) -> tuple[str, str]:
    """Name of the special token after a reply, "" for none, and the text from there to any next turn."""
    if EXCHANGE not in layouts:
        return "", ""
    last = text_after(layouts[EXCHANGE], 1)
    inner = text_after(layouts[NEXT], 1) if NEXT in layouts else last
    ends = [s for s in tokenizer.specials if last.startswith(s.text) and inner.startswith(s.text)]
    end = max(ends, key=lambda special: len(special.text), default=None)
    closing = last if inner.startswith(last) else end.text if end else ""
    return (end.name if end else ""), closing


# -- What it does to contents ----------------------------------------------------------


def _trims(found: FoundTemplate, layouts: Mapping[str, Layout]) -> dict[str, Trim]:
    """Roles whose contents lose the white space at their ends, wherever they stand."""
    padded = {
        name: [Message(role=role, content=LEFT + sentinel(i) + RIGHT) for i, role in enumerate(CONVERSATIONS[name])]
        for name in layouts
    }
    seen: dict[str, set[Trim | None]] = {}
    for name, answer in _answers(found, padded):
        text = answer if isinstance(answer, str) else ""
        trims: list[Trim | None] = [_trim(text, i) for i in range(len(padded[name]))]
        said = [trimmed(message["content"], trim) for message, trim in zip(padded[name], trims, strict=True)]
        if text == joined(layouts[name], said):
            for role, trim in zip(CONVERSATIONS[name], trims, strict=True):
                seen.setdefault(role, set()).add(trim)
    return {role: trim for role, trims in seen.items() if len(trims) == 1 for trim in trims if trim is not None}


def _trim(text: str, index: int) -> Trim | None:
    """Which of the paddings around a content are gone."""
    left, right = LEFT + sentinel(index) in text, sentinel(index) + RIGHT in text
    if left and right:
        return None
    return "left" if right else "right" if left else "both"


def _changed(template: JinjaTemplate, layouts: Mapping[str, Layout]) -> list[str]:
    """Kinds of content that do not come out as they went in."""
    name = EXCHANGE if EXCHANGE in layouts else QUESTION
    marked = with_sentinels(_of(CONVERSATIONS[name]))
    cases = [(what, i) for what in ODD for i in range(len(marked))]
    told = [[*marked[:i], _with(marked[i], ODD[what]), *marked[i + 1 :]] for what, i in cases]
    renderings = [Rendering(messages, name == QUESTION) for messages in told]
    answers = process.render(template.source, template.variables, renderings)
    expected = [joined(layouts[name], [template.said(message) for message in messages]) for messages in told]
    return [
        f"{what} of the {marked[i]['role']}"
        for (what, i), answer, text in zip(cases, answers, expected, strict=True)
        if answer != text
    ]


def _with(message: Message, content: str) -> Message:
    return Message(role=message["role"], content=content)


# -- What is said of it ----------------------------------------------------------------


def _imitation(layouts: Mapping[str, Layout], specials: Mapping[str, str]) -> str:
    """A warning where no special token opens the reply, so that typed text can do it too."""
    layout = layouts.get(EXCHANGE, [])
    opening = text_after(layout, 0) if layout else ""
    if not layout or any(text in opening for text in specials.values()):
        return ""
    return (
        f"the chat template opens a reply with ordinary text ({opening[:40]!r}): "
        "a message that contains it can imitate a turn"
    )


def _notices(template: JinjaTemplate, layouts: Mapping[str, Layout], tokenizer: Tokenizer) -> list[str]:
    notices = [template.warning] if template.warning else []
    if template.trims:
        notices.append(
            f"the chat template trims white space around what {_listed(template.trims)} says; so is done here"
        )
    changed = _changed(template, layouts)
    if changed:
        notices.append(
            f"the chat template changes contents ({first(changed)}): chat keeps them as written, sft refuses them"
        )
    if "strftime_now" in template.source:
        notices.append("the chat template can write today's date: an sft run resumed another day has other tokens")
    return notices + _training_notices(template, layouts, tokenizer)


def _listed(roles: Mapping[str, Trim]) -> str:
    return ", ".join(role if trim == "both" else f"{role} ({trim})" for role, trim in roles.items())


def _training_notices(template: JinjaTemplate, layouts: Mapping[str, Layout], tokenizer: Tokenizer) -> list[str]:
    if EXCHANGE not in layouts:
        return ["the chat template renders no replies: it can be asked once, and not be trained"]
    messages = [Message(role=role, content=text) for role, text in zip(CONVERSATIONS[TWO], SPOKEN, strict=True)]
    notices: list[str] = []
    for told in (messages[:2], messages) if TWO in layouts else (messages[:2],):
        rendered = template.rendered(told, tokenizer, generation_prompt=False)
        if rendered.unproved:
            return [f"sft will refuse this chat template: {rendered.unproved}"]
        whole = tokenizer.encode(tokenizer.decode(rendered.ids), specials=True)
        if whole != rendered.ids:
            notices = ["the chat template's text runs into contents: their first and last tokens are split off from it"]
    if template.gap:
        notices.append(f"the chat template writes {template.gap[:40]!r} before a reply: after sft the prompt does too")
    return notices


def _gap(layouts: Mapping[str, Layout]) -> str:
    """What stands between the generation prompt and a reply."""
    if EXCHANGE not in layouts:
        return ""
    layout, asked = layouts[EXCHANGE], joined(layouts[QUESTION], [sentinel(0)])
    before = joined(layout[: layout.index(1)], [sentinel(0)])
    return before.removeprefix(asked) if before.startswith(asked) else ""
