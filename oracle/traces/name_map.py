"""Map files: which tap of one trace is which of the other, where the names differ.

One rule a line, the first that matches counts, `#` begins a comment:

    embed = model.embed_tokens
    blocks.*.attn = model.layers.*.self_attn     # `*` stands for a part without dots, `**` for any
    /block_(\\d+)\\.(q|k|v)/ = h.\\1.attn.\\2_proj   # a regular expression, with its groups
    blocks.*.heads = layers.*.heads : B N T H -> B T N H    # how to lay out B's axes as A's
    dropout.* = -                                # A's tap has no counterpart, and need not have one
    - = model.layers.*.drop                      # nor has this one of B's

A JSON file holds the same as an object, `{"embed": "model.embed_tokens"}`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.errors import InputError
from oracle.traces import layout
from oracle.traces.layout import Pattern

NONE = "-"
_KINDS = "a file of lines `name in A = name in B`, or of JSON"
_GROUP = re.compile(r"\\(\d+)")


@dataclass(frozen=True)
class Rule:
    """One line."""

    text: str
    """As it was written, for messages."""
    match: re.Pattern[str]
    """Whole names: of A's taps, or of B's where there is no counterpart in A."""
    template: str | None
    """B's name with the groups of the match as `\\1`; None where there is no counterpart."""
    layout: Pattern | None = None
    in_b: bool = False
    """It is B's taps that have no counterpart."""

    def counterpart(self, name: str) -> str | None:
        """B's name for a name that matches."""
        found = self.match.fullmatch(name)
        if found is None or self.template is None:
            return None
        return _GROUP.sub(lambda number: found[int(number[1])] or "", self.template)


def load(path: Path) -> list[Rule]:
    """The rules of a file.

    Raises:
        InputError: unreadable, or a line that is no rule.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"the map {path} cannot be read: {error.strerror}; give {_KINDS}") from None
    except ValueError:
        raise InputError(f"the map {path} is no text in UTF-8; give {_KINDS}") from None
    pairs = _json_pairs(path, text) if text.lstrip().startswith("{") else _line_pairs(path, text)
    rules: list[Rule] = []
    for where, left, right in pairs:
        try:
            rules.append(_rule(left, right))
        except (InputError, re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{path.name} {where}: {_shortened(str(error))}") from None
    return rules


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def _json_pairs(path: Path, text: str) -> list[tuple[str, str, str]]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is no JSON: {str(error).splitlines()[0]}; correct it") from None
    if not all(isinstance(value, str) for value in table.values()):
        raise InputError(f'{path.name}: a JSON map is an object of texts, {{"name in A": "name in B"}}')
    return [(f"at {_shortened(key)!r}", key, value) for key, value in table.items()]


def _line_pairs(path: Path, text: str) -> list[tuple[str, str, str]]:
    pairs: list[tuple[str, str, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        rule = re.sub(r"(^|\s)#.*", "", line).strip()
        if not rule:
            continue
        left, equals, right = rule.partition(" = ")
        if not equals or not left.strip() or not right.strip():
            raise InputError(
                f"{path.name} line {number}: {_shortened(rule)!r} is no rule; write `name in A = name in B`"
            )
        pairs.append((f"line {number}", left.strip(), right.strip()))
    return pairs


def _rule(left: str, right: str) -> Rule:
    text = f"{left} = {right}"
    name, colon, axes = right.partition(" : ")
    pattern = layout.parse(axes) if colon else None
    if left == NONE:
        return Rule(text, _match(name.strip()), None, in_b=True)
    if name.strip() == NONE:
        return Rule(text, _match(left), None)
    rule = Rule(text, _match(left), _template(left, name.strip()), pattern)
    if rule.template is not None and rule.match.groups < _highest_group(rule.template):
        raise InputError(f"`{_shortened(text)}` names more parts on the right than the left side has")
    return rule


def _match(name: str) -> re.Pattern[str]:
    if _is_expression(name):
        return re.compile(name[1:-1])
    parts = re.split(r"(\*\*|\*)", name)
    return re.compile("".join({"*": r"([^.]+)", "**": r"(.+)"}.get(part) or re.escape(part) for part in parts))


def _is_expression(name: str) -> bool:
    return len(name) > 2 and name.startswith("/") and name.endswith("/")


def _template(left: str, right: str) -> str:
    if _is_expression(left):
        return right
    parts = re.split(r"\*\*|\*", right)
    return "".join(part + (f"\\{i}" if i < len(parts) else "") for i, part in enumerate(parts, start=1))


def _highest_group(template: str) -> int:
    return max((int(number) for number in _GROUP.findall(template)), default=0)


def refuse_idle(rules: Sequence[Rule], a: Sequence[str], b: Sequence[str]) -> None:
    """A rule that matches nothing, or only what B does not have, is a mistake in the map.

    Args:
        rules: of the map.
        a: names of A's taps.
        b: names of B's taps, and of those that B could not record.

    Raises:
        InputError: naming the first such rule.
    """
    present = set(b)
    for rule in rules:
        side, names = ("B", b) if rule.in_b else ("A", a)
        if not any(rule.match.fullmatch(name) for name in names):
            raise InputError(f"the map's rule `{_shortened(rule.text)}` matches no tap of {side}; correct or remove it")
        targets = [] if rule.in_b else [other for name in a if (other := rule.counterpart(name)) is not None]
        if targets and not present.intersection(targets):
            missing = f"`{_shortened(rule.text)}` leads to {_shortened(targets[0])}"
            raise InputError(f"the map's rule {missing}, which B does not have; correct or remove it")
