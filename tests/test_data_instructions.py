import re

import pytest

from jaxgpt.data.instructions import MICRO, generate
from jaxgpt.errors import InputError

ROWS = generate(3000, seed=1)


def pairs(rows: object) -> list[tuple[str, str]]:
    return [(row[0]["content"], row[1]["content"]) for row in rows]  # type: ignore[attr-defined]


def test_the_same_seed_gives_the_same_conversations():
    assert generate(50, seed=3) == generate(50, seed=3)
    assert generate(50, seed=3) != generate(50, seed=4)
    assert generate(50, seed=3)[:10] == generate(10, seed=3)
    with pytest.raises(InputError, match="must be at least 0, got -1"):
        generate(-1, seed=0)


def test_conversations_are_one_user_and_one_assistant_turn_in_ascii():
    for row in [*ROWS, *MICRO]:
        assert [message["role"] for message in row] == ["user", "assistant"]
        assert all(message["content"].isascii() and message["content"].strip() for message in row)


def solve(prompt: str) -> str:
    """The answer, worked out independently of the generator."""
    if sum_ := re.fullmatch(r"What is (\d+)([+-])(\d+)", prompt):
        a, sign, b = sum_.groups()
        return str(int(a) + int(b) * (1 if sign == "+" else -1))
    task, text = (part.strip() for part in re.split(r":|(?<=^Say) ", prompt, maxsplit=1))
    words = text.split()
    return {
        "Say": text,
        "Repeat": text,
        "Upper case": text.upper(),
        "Quote": f'"{text}"',
        "List": "\n".join(f"- {word}" for word in words),
    }[task]


def test_every_answer_is_right():
    for prompt, answer in pairs([*ROWS, *MICRO]):
        assert answer == solve(prompt), prompt


def test_all_tasks_occur_and_none_dominates():
    counts: dict[str, int] = {}
    for prompt, _ in pairs(ROWS):
        task = re.split(r"[ :]", prompt)[0] + re.sub(r"[^+-]", "", prompt)
        counts[task] = counts.get(task, 0) + 1
    assert counts.keys() == {"Say", "Repeat", "What+", "What-", "Upper", "Quote", "List"}
    assert min(counts.values()) > 300


def test_the_micro_set_is_16_different_prompts_with_the_named_ones():
    prompts = dict(pairs(MICRO))
    assert len(MICRO) == len(prompts) == 16
    assert prompts["Say OK."] == "OK."
    assert prompts["Repeat: Here"] == "Here"
    assert prompts["What is 5+7"] == "12"
