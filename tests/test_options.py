"""Flags, config files and help come from the fields of dataclasses, and nothing else is taken."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from jaxgpt import cli, options, settings
from jaxgpt.errors import InputError
from jaxgpt.settings import GenerateSettings, PretrainSettings, SFTSettings


@dataclass(frozen=True)
class Inner:
    """Nested settings."""

    warmth: float = 0.5
    """how warm,
    in words of two lines"""
    kind: Literal["", "soft", "hard"] = ""
    """which kind"""

    def __post_init__(self) -> None:
        if self.warmth < 0:
            raise InputError(f"warmth must be ≥ 0, got {self.warmth}")


@dataclass(frozen=True)
class Outer:
    """Settings of a verb."""

    place: str = field(metadata={"positional": True})
    """where"""
    words: tuple[str, ...] = field(default=(), metadata={"positional": True})
    """what"""
    count: int = 3
    """how many"""
    limit: float | None = None
    """at most"""
    fresh: bool = True
    """not stale"""
    tag: tuple[str, ...] = ()
    """a label"""
    inner: Inner = Inner(warmth=0.25)


def parse(*words: str) -> Outer:
    return options.parse(Outer, words, "jaxgpt try").settings


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as refused:
        parse(*words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_flag_for_each_field_and_nested_ones_flattened():
    got = parse("here", "--count", "5", "--limit=2.5", "--no-fresh", "--warmth", "1", "--kind", "soft")
    assert got == Outer("here", (), 5, 2.5, False, (), Inner(1.0, "soft"))


def test_what_is_not_given_keeps_its_default_the_outer_dataclass_first():
    assert parse("here") == Outer("here")
    assert parse("here", "--kind", "hard").inner == Inner(0.25, "hard")


def test_positional_arguments_and_flags_come_in_any_order():
    expected = Outer("here", ("a b", "c"), count=5, tag=("x", "y"))
    assert parse("here", "a b", "c", "--count", "5", "--tag", "x", "--tag", "y") == expected
    assert parse("--count", "5", "here", "--tag", "x", "a b", "--tag", "y", "c") == expected


@pytest.mark.parametrize("text", ["-5", "- a list", "-", "---", "a=b"])
def test_text_that_begins_with_a_dash_is_text_where_it_is_no_flag(text: str):
    assert parse("here", text).words == (text,)


def test_after_two_dashes_everything_is_text():
    assert parse("here", "--", "--count", "-x").words == ("--count", "-x")


def test_a_negative_value_is_a_value():
    assert parse("here", "--limit", "-1").limit == -1.0


def test_an_unknown_flag_is_refused_with_the_nearest_known_one():
    assert refusal("here", "--cuont", "5") == "unknown flag --cuont; the nearest is --count; see `jaxgpt try --help`"
    assert "nearest is --no-fresh" in refusal("here", "--no-frsh")
    assert "unknown flag -c" in refusal("here", "-c")


def test_a_prefix_of_a_flag_is_not_the_flag():
    assert "unknown flag --coun;" in refusal("here", "--coun", "5")


def test_values_of_the_wrong_type_are_named():
    assert refusal("here", "--count", "2.5") == "--count must be an integer, got '2.5'"
    assert refusal("here", "--limit", "much") == "--limit must be a number, got 'much'"
    assert refusal("here", "--kind", "sotf") == "--kind must be one of '', 'soft', 'hard'; got 'sotf'"
    assert refusal("here", "--fresh=yes") == "--fresh takes no value; write --fresh or --no-fresh"
    assert refusal("here", "--warmth", "-2") == "warmth must be ≥ 0, got -2.0"


def test_a_missing_value_is_not_the_next_flag():
    assert "--count needs a value" in refusal("here", "--count", "--no-fresh")
    assert "--count needs a value" in refusal("here", "--count")


def test_a_missing_or_surplus_argument_is_named():
    assert refusal() == "PLACE is missing (where); see `jaxgpt try --help`"
    with pytest.raises(InputError, match="one argument too many: 'more'; jaxgpt x takes DIRECTORY"):
        options.parse(settings.InspectSettings, ["a", "more"], "jaxgpt x")


# -- Config files ----------------------------------------------------------------------


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_the_config_file(tmp_path: Path):
    file = write(tmp_path, 'place = "there"\ncount = 7\nlimit = 4\ntag = ["q"]\n[inner]\nwarmth = 0.75\n')
    assert parse("--config", file) == Outer("there", (), 7, 4.0, True, ("q",), Inner(0.75))
    assert parse("here", f"--config={file}", "--count", "8") == Outer("here", (), 8, 4.0, True, ("q",), Inner(0.75))


def test_keys_may_have_dashes_and_nested_ones_may_be_flat(tmp_path: Path):
    file = write(tmp_path, "learning-rate = 0.5\nhidden_size = 64\n[train]\nbatch-size = 3\n")
    got = options.parse(PretrainSettings, ["--config", file], "jaxgpt pretrain").settings
    assert (got.train.learning_rate, got.model.hidden_size, got.train.batch_size) == (0.5, 64, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont = 3", "unknown key cuont; the nearest is count"),
        ("[inner]\nwarmht = 3", "unknown key [inner] warmht; the nearest is warmth"),
        ("[iner]\nwarmth = 3", "unknown key iner"),
        ("[inner]\ncount = 3", "unknown key [inner] count"),
        ("count = 2.5", "count must be an integer, got 2.5"),
        ("count = true", "count must be an integer, got True"),
        ('fresh = "no"', "fresh must be true or false, got 'no'"),
        ("tag = 'x'", "tag must be a list of texts, got 'x'"),
        ("warmth = 1.0\n[inner]\nwarmth = 2.0", "[inner] warmth is set twice; keep one"),
        ("count = ", "is not TOML"),
        ("count = " + "[" * 5000, "is nested too deeply to read; settings are one table deep"),
    ],
)
def test_a_config_file_with_something_else_is_refused(tmp_path: Path, text: str, message: str):
    file = write(tmp_path, text)
    got = refusal("here", "--config", file)
    assert message in got
    assert file in got


def test_a_config_file_that_is_not_there_is_named():
    assert "--config no.toml cannot be read: No such file" in refusal("here", "--config", "no.toml")


# -- Help ------------------------------------------------------------------------------


def test_help_is_the_docstring_of_the_field_and_its_default():
    text = " ".join(options.usage(Outer, "jaxgpt try", "Try it.").split())
    assert "usage: jaxgpt try PLACE [WORDS…] [flags]" in text
    assert "--warmth X how warm, in words of two lines (default: 0.25)" in text
    assert "--kind soft|hard which kind" in text
    assert "--fresh, --no-fresh not stale (on by default)" in text


def test_the_default_shown_is_the_verbs_own():
    rates = {o.name: o.default for o in options.options_of(SFTSettings)}
    assert rates["learning_rate"] == 3e-4
    assert "peak learning rate (default: 0.0003)" in options.usage(SFTSettings, "jaxgpt sft", "")


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_every_option_of_every_verb_says_what_it_means(verb: cli.Verb):
    found = options.options_of(verb.settings)
    assert [option.name for option in found if not option.meaning] == []
    assert len({option.flag for option in found}) == len(found)


def test_an_optional_choice_may_be_left_out():
    got = options.parse(GenerateSettings, ["d", "text", "--compute-dtype", "bfloat16"], "jaxgpt generate").settings
    assert got.compute_dtype == "bfloat16"
    assert dataclasses.replace(got, compute_dtype=None) == GenerateSettings("d", ("text",))


def test_what_the_command_line_said_is_known_apart_from_the_file(tmp_path: Path):
    file = write(tmp_path, "steps = 5\n")
    parsed = options.parse(PretrainSettings, ["--config", file, "--resume", "--out", "x", "--json"], "jaxgpt pretrain")
    assert parsed.given == ("--out", "--resume", "--json")
    assert parsed.settings.train.steps == 5
    assert parsed.output.json


def test_initials_name_a_flag_better_than_spelling():
    assert options.nearest("--lr", ["--remat", "--learning-rate", "--log-every"]) == "--learning-rate"
    assert options.nearest("--stepz", ["--remat", "--steps"]) == "--steps"


def test_a_nul_in_a_config_file_is_refused(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('out = "a\\u0000b"\n')
    with pytest.raises(InputError, match="out holds a NUL character"):
        options.parse(PretrainSettings, ["--config", str(file)], "jaxgpt pretrain")


def test_what_is_not_utf_8_is_refused():
    assert refusal("caf\udce9") == "'caf\\udce9' is not UTF-8; rename the file, or write the text in UTF-8"
    assert "'--place=\\udcff' is not UTF-8" in refusal("--place=\udcff")


def test_a_pipe_for_a_config_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert f"{tmp_path / 'pipe'} is a folder, pipe or device" in refusal("here", "--config", str(tmp_path / "pipe"))
