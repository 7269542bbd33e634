import json
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.chat import TEMPLATES, Message, Rendered, render
from jaxgpt.data.batches import EpisodeBatches
from jaxgpt.data.episodes import Episodes, check_mask, describe_episode, read_episodes, trained_runs
from jaxgpt.data.instructions import MICRO, generate
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import Tokenizer

CHAT = [*MICRO, *generate(60, seed=0)]
CORPUS = [message["content"] for row in CHAT for message in row]


@pytest.fixture(params=sorted(TEMPLATES))
def template(request: pytest.FixtureRequest) -> Any:
    return TEMPLATES[request.param]


@pytest.fixture
def tokenizer(template: Any) -> Tokenizer:
    return Tokenizer.create("char", template=template, corpus=CORPUS)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def turns(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


def test_every_row_becomes_an_episode_that_trains_the_answer_and_its_end(
    tmp_path: Path, tokenizer: Tokenizer, template: Any
):
    path = write(tmp_path / "x.jsonl", [{"messages": row, "id": i} for i, row in enumerate(CHAT)])
    episodes = read_episodes(path, tokenizer, template, 256)
    assert (len(episodes.episodes), episodes.rows, episodes.untrained, episodes.too_long) == (76, 76, 0, 0)
    for row, rendered in zip(CHAT, episodes.episodes, strict=True):
        assert rendered == render(row, tokenizer, template)
        (run,) = trained_runs(rendered)
        assert tokenizer.decode(run[:-1]) == row[1]["content"]
        assert run[-1] in tokenizer.stop_ids
    assert str(episodes).startswith("76 rows, 76 episodes, ")


def test_prompt_and_completion_is_a_chat_of_one_turn(tmp_path: Path, tokenizer: Tokenizer, template: Any):
    rows = [{"prompt": "Say OK.", "completion": "OK."}, {"messages": turns("Say OK.", "OK.")}]
    first, second = read_episodes(write(tmp_path / "x.jsonl", rows), tokenizer, template, 256).episodes
    assert first == second


def test_several_files_are_read_in_order(tmp_path: Path, tokenizer: Tokenizer, template: Any):
    files = [write(tmp_path / f"{i}.jsonl", [{"messages": CHAT[i]}]) for i in (1, 0)]
    episodes = read_episodes(files, tokenizer, template, 256)
    assert episodes.episodes == [render(CHAT[i], tokenizer, template) for i in (1, 0)]


def test_rows_that_train_nothing_are_counted_and_dropped(tmp_path: Path, tokenizer: Tokenizer, template: Any):
    rows = [{"messages": turns("Say OK.")}, {"messages": turns("Say OK.", "OK.")}]
    episodes = read_episodes(write(tmp_path / "x.jsonl", rows), tokenizer, template, 256)
    assert (len(episodes.episodes), episodes.untrained) == (1, 1)
    assert str(episodes).endswith("; dropped 1 that train nothing")


def test_an_episode_longer_than_the_context_is_dropped_whole(tmp_path: Path, tokenizer: Tokenizer, template: Any):
    long = turns("Say OK.", "O" * 90)
    path = write(tmp_path / "x.jsonl", [{"messages": long}, {"messages": turns("Say OK.", "OK.")}])
    length = len(render(long, tokenizer, template).ids)
    fits = read_episodes(path, tokenizer, template, length - 1)
    assert (len(fits.episodes), fits.too_long) == (2, 0)
    EpisodeBatches(fits, 1, length - 1, seed=0)
    dropped = read_episodes(path, tokenizer, template, length - 2)
    assert (len(dropped.episodes), dropped.too_long) == (1, 1)
    assert str(dropped).endswith(f"; dropped 1 longer than {length - 1} tokens")


def test_a_file_with_nothing_to_train_on_is_refused(tmp_path: Path, tokenizer: Tokenizer, template: Any):
    path = write(tmp_path / "x.jsonl", [{"messages": turns("Say OK.")}])
    with pytest.raises(InputError) as error:
        read_episodes(path, tokenizer, template, 256)
    assert str(error.value).startswith(f"nothing to train on in {path}: 1 rows, 0 episodes")
    with pytest.raises(InputError, match="is not a file"):
        read_episodes(tmp_path / "none.jsonl", tokenizer, template, 256)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"messages": [{"role": "user", "content": "trunc', ":2 is not JSON"),
        ('{"messages": []}', ":2: `messages` must be a list with at least one message"),
        ('{"messages": {"role": "user"}}', ":2: `messages` must be a list"),
        ('{"messages": ["Say OK."]}', ":2: message 1 is str, expected an object with `role` and `content`"),
        ('{"messages": [{"role": "user"}]}', ":2: message 1: `content` is missing, expected a string"),
        ('{"messages": [{"role": "user", "content": null}]}', ":2: message 1: `content` is of type NoneType"),
        ('{"messages": [{"role": 1, "content": "a"}]}', ":2: message 1: `role` is of type int"),
        ('{"messages": [{"role": "user", "content": "abc\\ud800"}]}', "not valid Unicode at character 3 (U+D800)"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "wizard"),
        ('{"prompt": "a", "completion": 7}', ":2: message 2: `content` is of type int"),
        ('{"prompt": "a"}', ":2 has prompt; expected `messages`, or `prompt` and `completion`"),
        ('{"text": "a"}', ":2 has text; expected `messages`"),
        ("{}", ":2 has no keys; expected `messages`"),
        ("[]", ":2 is a JSON list"),
        ('{"messages": ' + "[" * 100_000, ":2 is nested too deeply"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path: Path, row: str, expected: str):
    template = TEMPLATES["chatml"]
    tokenizer = Tokenizer.create("char", template=template, corpus=CORPUS)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": MICRO[0]}) + "\n" + row + "\n")
    with pytest.raises(InputError) as error:
        read_episodes(path, tokenizer, template, 256)
    text = str(error.value)
    assert text.startswith(f"{path}:2")
    assert expected in text
    assert "\n" not in text


# -- The mask is checked from the ids alone ------------------------------------------------


def faulty(rendered: Rendered, fault: str) -> Rendered:
    ids, mask = list(rendered.ids), list(rendered.mask)
    last = len(mask) - 1 - mask[::-1].index(1)
    first = mask.index(1)
    if fault == "end token untrained":
        mask[last] = 0
    elif fault == "shifted left":
        mask = [*mask[1:], 0]
    elif fault == "shifted right":
        mask = [0, *mask[:-1]]
    elif fault == "header trained":
        mask[first - 1] = 1
    elif fault == "all trained":
        mask = [1] * len(mask)
    elif fault == "user trained":
        mask[2] = 1
    elif fault == "hole":
        mask[first + 1] = 0
    elif fault == "nothing trained":
        mask = [0] * len(mask)
    faulty = Rendered(ids, mask)
    if fault == "short":
        faulty.mask.pop()
    return faulty


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("short", r"loss mask has \d+ entries for \d+ tokens"),
        ("end token untrained", r"the last trained token is .*, expected <.*>$"),
        ("shifted left", r"the last trained token is .*, expected <.*>$"),
        ("shifted right", r"assistant message 1: the (last trained token is|trained tokens are not)"),
        ("header trained", r"assistant message 1: the trained tokens are not its content"),
        ("all trained", r"1 trained runs of tokens for 2 assistant messages"),
        ("user trained", r"3 trained runs of tokens for 2 assistant messages"),
        ("hole", r"3 trained runs of tokens for 2 assistant messages"),
        ("nothing trained", r"0 trained runs of tokens for 2 assistant messages"),
    ],
)
def test_a_faulty_mask_never_reaches_training(tokenizer: Tokenizer, template: Any, fault: str, expected: str):
    messages = turns("Say OK.", "OK.", "Repeat: red fish", "red fish")
    rendered = render(messages, tokenizer, template)
    check_mask(rendered, messages, tokenizer, template, "x.jsonl:7")
    with pytest.raises(InputError, match=rf"^x.jsonl:7: .*{expected}"):
        check_mask(faulty(rendered, fault), messages, tokenizer, template, "x.jsonl:7")


# -- The rest --------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_ids_mask_and_order():
    a, b = Rendered([1, 2, 3], [0, 1, 1]), Rendered([4, 5], [0, 1])
    sets = [
        [a, b],
        [b, a],
        [a],
        [Rendered([1, 2, 3], [1, 1, 1]), b],
        [Rendered([1, 2, 9], [0, 1, 1]), b],
        [Rendered([1, 2, 3, 0], [1, 1, 4, 5]), Rendered([0], [1])],
    ]
    assert len({Episodes(list(s), 2, 0, 0, 8).fingerprint for s in sets}) == len(sets)
    assert Episodes([a, b], 2, 0, 0, 8).fingerprint == Episodes([a, b], 9, 3, 4, 8).fingerprint


def test_an_episode_is_described_token_by_token(tokenizer: Tokenizer, template: Any):
    rendered = render(turns("Say OK.", "OK."), tokenizer, template)
    pieces = describe_episode(rendered, tokenizer)
    assert len(pieces) == len(rendered.ids)
    assert [text for text, trained in pieces if trained][:-1] == ["'O'", "'K'", "'.'"]
    assert all(text and "\n" not in text for text, _ in pieces)


def test_the_packed_answers_are_the_trained_text(tmp_path: Path, tokenizer: Tokenizer, template: Any):
    path = write(tmp_path / "x.jsonl", [{"messages": row} for row in MICRO])
    episodes = read_episodes(path, tokenizer, template, 128)
    batch = EpisodeBatches(episodes, 16, 128, seed=0).next()
    answers: list[str] = []
    for b in range(16):
        for segment in range(1, batch["segments"][b].max() + 1):
            on = (batch["segments"][b] == segment) & (batch["mask"][b] > 0)
            answers.append(tokenizer.decode(batch["targets"][b][on][:-1].tolist()))
    assert sorted(answers) == sorted(row[1]["content"] for row in MICRO)
