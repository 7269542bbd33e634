"""Small instruction tasks with exact answers: say, repeat, arithmetic, format. ASCII only."""

import random
from collections.abc import Callable

from jaxgpt.chat import Message
from jaxgpt.errors import InputError

_VOCABULARY = (
    "apple bird blue book bread bridge chair cloud corn cup door drum east fire fish flag "
    "frog glass gold grass green hand hat hill horse house ink iron jam key king lake lamp "
    "leaf line lion map milk moon mouse nest night north oak one paper pear pen plum rain "
    "red ring river road rock rose salt sand sea ship silk sky snow song star stone sun "
    "table tea tiger tree two wall water west wind wolf wood yard"
)
_WORDS = _VOCABULARY.split()


def generate(n: int, seed: int) -> list[list[Message]]:
    """`n` one-turn conversations, the same for the same seed; prompts may repeat.

    Raises:
        InputError: `n` is negative.
    """
    if n < 0:
        raise InputError(f"the number of instructions must be at least 0, got {n}")
    draw = random.Random(seed)
    return [_episode(*draw.choice(_TASKS)(draw)) for _ in range(n)]


def _episode(prompt: str, answer: str) -> list[Message]:
    return [Message(role="user", content=prompt), Message(role="assistant", content=answer)]


def _say(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(_WORDS) + draw.choice((".", "!", ""))
    word = draw.choice((word, word.capitalize()))
    return f"Say {word}", word


def _repeat(draw: random.Random) -> tuple[str, str]:
    words = " ".join(draw.sample(_WORDS, draw.randint(1, 3)))
    return f"Repeat: {words}", words


def _add(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(0, 20), draw.randint(0, 20)
    return f"What is {a}+{b}", str(a + b)


def _subtract(draw: random.Random) -> tuple[str, str]:
    a, b = sorted((draw.randint(0, 20), draw.randint(0, 20)))
    return f"What is {b}-{a}", str(b - a)


def _upper(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(_WORDS)
    return f"Upper case: {word}", word.upper()


def _quote(draw: random.Random) -> tuple[str, str]:
    word = draw.choice(_WORDS)
    return f"Quote: {word}", f'"{word}"'


def _list(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(_WORDS, draw.randint(2, 3))
    return f"List: {' '.join(words)}", "\n".join(f"- {word}" for word in words)


_TASKS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _say,
    _repeat,
    _add,
    _subtract,
    _upper,
    _quote,
    _list,
)

MICRO: tuple[list[Message], ...] = tuple(
    _episode(prompt, answer)
    for prompt, answer in (
        ("Say OK.", "OK."),
        ("Say Yes.", "Yes."),
        ("Say hello!", "hello!"),
        ("Repeat: Here", "Here"),
        ("Repeat: red fish", "red fish"),
        ("Repeat: one two", "one two"),
        ("What is 5+7", "12"),
        ("What is 3+4", "7"),
        ("What is 9+9", "18"),
        ("What is 8-3", "5"),
        ("What is 20-6", "14"),
        ("Upper case: moon", "MOON"),
        ("Upper case: key", "KEY"),
        ("Quote: star", '"star"'),
        ("List: sun sea", "- sun\n- sea"),
        ("List: tea milk", "- tea\n- milk"),
    )
)
"""The micro-memorisation set: a model trained on it must answer all 16 greedily."""
