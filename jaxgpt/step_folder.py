"""What a run folder and its step folders hold besides arrays: names, JSON files, finished or not.

DIR/step-00000120/
    model.json              config, stage, dtypes, provenance, what arrays there are
    tokenizer_state.json    absent where jaxgpt knows no tokenizer for the model
    template.json           chat template; may be absent
    train.json              data position, settings, counters; to resume
    golden.json             golden prompts, with which a run or import ends; may be absent
    params/  train/         arrays, by Orbax; train/ only to resume
    manifest.json           size and SHA-256 of all of the above, written last
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jaxgpt
from jaxgpt import manifest
from jaxgpt.chat import Template
from jaxgpt.config import ModelConfig
from jaxgpt.errors import InputError, first
from jaxgpt.tokenizer import Tokenizer

FORMAT_VERSION = 1
STAGES = ("base", "sft")
DTYPES = ("float32", "bfloat16", "float16")
"""What parameters and computation may be."""
MODEL, TOKENIZER, TEMPLATE, TRAIN = "model.json", "tokenizer_state.json", "template.json", "train.json"
GOLDEN = "golden.json"
"""See `jaxgpt.golden_prompts`."""
STEP = re.compile(r"step-(\d{8,})")
REPLACED = re.compile(r"\.step-(\d{8,})\.replaced")
_LEFTOVER = re.compile(r"\.step-\d+\.(partial.*|replaced|trash)")


class CheckpointError(InputError):
    """A checkpoint that cannot be used, or a step that could not be saved."""


@dataclass(frozen=True)
class Contents:
    """What one step consists of."""

    config: ModelConfig
    params: Mapping[str, Any]
    """By the names of `weights.parameters(config)`; jax or numpy arrays."""
    stage: str
    """`base` or `sft`."""
    compute_dtype: str
    """Dtype last trained in: `float32`, `bfloat16` or `float16`."""
    eos_token_ids: Sequence[int]
    """Every id that ends a text."""
    tokenizer: Tokenizer | None
    template: Template | None
    provenance: Mapping[str, Any]
    """JSON: where it comes from (parent, data fingerprint, source)."""
    train: Mapping[str, Any] | None = None
    """Arrays of the training state by name; None where training cannot go on from here."""
    train_json: Mapping[str, Any] | None = None
    """JSON of the training state."""


# -- Steps of a folder -----------------------------------------------------------------


def steps(directory: str | Path) -> list[int]:
    """Numbers of the finished steps in a run folder, oldest first; none where there is no folder."""
    return sorted(folders(Path(directory)))


def latest(directory: str | Path) -> Path:
    """The newest finished step's folder, or the directory itself where it is one.

    Raises:
        CheckpointError: no finished step.
    """
    return candidates(Path(directory), None)[0]


def folders(directory: Path) -> dict[int, Path]:
    """Folders of the finished steps by number."""
    found: dict[int, Path] = {}
    if not directory.is_dir():
        return found
    # A step that was being replaced when the process died stands until the new one does.
    for pattern in (REPLACED, STEP):
        for path in directory.iterdir():
            match = pattern.fullmatch(path.name)
            if match and not path.is_symlink() and (path / manifest.MANIFEST).is_file():
                found[int(match[1])] = path
    return found


def candidates(directory: Path, step: int | None) -> list[Path]:
    """The folders that may be loaded, newest first; those that lost their manifest are among them, to be refused."""
    if (directory / manifest.MANIFEST).exists():
        return [directory]
    found = {**unlisted(directory), **folders(directory)}
    if not found:
        raise CheckpointError(f"{directory} {_instead(directory)}")
    if step is not None and step not in found:
        raise CheckpointError(f"{directory} has no step {step}; it has {first([str(n) for n in sorted(found)], 12)}")
    return [found[n] for n in sorted(found, reverse=True) if step in (None, n)]


def unlisted(directory: Path) -> dict[int, Path]:
    """Step folders by number, those without a manifest among them, which was there when they were given their name."""
    if not directory.is_dir():
        return {}
    matches = {path: STEP.fullmatch(path.name) for path in directory.iterdir() if path.is_dir()}
    return {int(match[1]): path for path, match in matches.items() if match and not path.is_symlink()}


def refuse_damaged(directory: Path) -> None:
    """Raise CheckpointError where none of a run's steps has a manifest: a new one of that name would not count."""
    found = unlisted(directory)
    if found and not folders(directory):
        names = first([found[number].name for number in sorted(found)])
        raise CheckpointError(
            f"{directory} holds no step to go on from, but {names} without {manifest.MANIFEST}: damaged; restore or "
            "move away what is left of a run, or give another --out"
        )


def leftovers(directory: Path) -> list[Path]:
    """What a save that was killed or failed left in a folder, beside the steps that count."""
    counted = folders(directory).values()
    return [path for path in directory.glob(".step-*") if _LEFTOVER.fullmatch(path.name) and path not in counted]


def refuse_taken(directory: Path) -> None:
    """Raise InputError unless there is nothing at `directory`, or a folder with leftovers at most."""
    if directory.exists() and not (directory.is_dir() and {*directory.iterdir()} <= {*leftovers(directory)}):
        raise InputError(f"{directory} exists and is not an empty folder; choose another")


def is_checkpoint(directory: Path) -> bool:
    """A run folder with a finished step, or such a step."""
    return (directory / manifest.MANIFEST).is_file() or bool(folders(directory))


def _instead(directory: Path) -> str:
    """What a folder without a checkpoint is, and what to give in its place."""
    if (directory.parent / f".{directory.name}.replaced").is_dir():  # of `/` the name is empty
        return f"was being rewritten when the process died; `jaxgpt tokenizer repair {directory}` finishes it"
    if not directory.is_dir():
        return "is no folder; give a run folder, with steps such as step-00000120"
    inside: list[str] = []
    if (directory / "config.json").is_file():
        return f"is a Hugging Face folder, no checkpoint; `jaxgpt import {directory} DIR` makes one of it"
    with suppress(OSError):  # what may not be read is none that could be named
        inside = sorted(path.name for path in directory.iterdir() if path.is_dir() and is_checkpoint(path))
    if inside:
        return f"holds no checkpoint itself; give one of its folders: {first(inside)}"
    return "holds no checkpoint; give a run folder, with steps such as step-00000120"


def documents(step: int, contents: Contents, score: float | None) -> dict[str, str]:
    """The text of each JSON file of a step; inverse of `read`."""
    config = contents.config
    arrays = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in contents.params.items()}
    versions = {"jaxgpt": jaxgpt.__version__} | {name: version(name) for name in ("jax", "orbax-checkpoint")}
    model = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "stage": contents.stage,
        "config": config.to_dict(),
        "compute_dtype": contents.compute_dtype,
        "parameters": arrays,
        "generation": {"eos_token_ids": [int(i) for i in contents.eos_token_ids]},
        "score": score if score is not None and math.isfinite(score) else None,
        "provenance": {**contents.provenance, "versions": versions},
    }
    found: dict[str, Any] = {
        MODEL: model,
        TOKENIZER: contents.tokenizer and contents.tokenizer.state(),
        TEMPLATE: contents.template and contents.template.to_dict(),
        TRAIN: contents.train_json,
    }
    return {
        name: json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        for name, content in found.items()
        if content is not None
    }


def score_of(path: Path) -> float | None:
    """The score a finished step was saved with."""
    try:
        return json.loads((path / MODEL).read_text("utf-8"))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def title(path: Path) -> str:
    """`checkpoint step 1200`: how messages call a step folder."""
    match = STEP.fullmatch(path.name) or REPLACED.fullmatch(path.name)
    return f"checkpoint step {int(match[1])}" if match else f"checkpoint {path}"


@dataclass(frozen=True)
class Description:
    """What the JSON files of a step say."""

    step: int
    config: ModelConfig
    stage: str
    compute_dtype: str
    eos_token_ids: list[int]
    provenance: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    tokenizer: Tokenizer | None
    template: Template | None


def read(path: Path) -> Description:
    """The JSON files of a verified step folder; raises InputError where they are not what jaxgpt writes."""
    model = document(path, MODEL)
    if model is None or model.get("format_version") != FORMAT_VERSION:
        got = "is missing" if model is None else f"has format version {model.get('format_version')!r}"
        raise InputError(f"{MODEL} {got}; this jaxgpt reads version {FORMAT_VERSION}")
    try:
        config = ModelConfig.from_dict(model["config"])
        state, template = document(path, TOKENIZER), document(path, TEMPLATE)
        if model["stage"] not in STAGES or model["compute_dtype"] not in DTYPES:
            raise InputError(f"{MODEL} has stage {model['stage']!r} and compute dtype {model['compute_dtype']!r}")
        tokenizer = None if state is None else Tokenizer.from_state(state, config.vocab_size)
        found = Description(
            step=model["step"],
            config=config,
            stage=model["stage"],
            compute_dtype=model["compute_dtype"],
            eos_token_ids=list(model["generation"]["eos_token_ids"]),
            provenance=dict(model["provenance"]),
            shapes={name: tuple(entry["shape"]) for name, entry in model["parameters"].items()},
            dtypes={name: str(entry["dtype"]) for name, entry in model["parameters"].items()},
            tokenizer=tokenizer,
            template=None if template is None else Template.from_dict(template),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{MODEL} is not what jaxgpt wrote ({error!r})") from None
    _refuse_wrong_numbers(path, found)
    _refuse_unknown_specials(found)
    return found


def _refuse_wrong_numbers(path: Path, found: Description) -> None:
    match = STEP.fullmatch(path.name)
    if type(found.step) is not int or found.step < 0 or (match and int(match[1]) != found.step):
        raise InputError(f"{MODEL} is of step {found.step!r}, not of {path.name}; give the folder its own name back")
    rows = found.config.vocab_size
    outside = [i for i in found.eos_token_ids if type(i) is not int or not 0 <= i < rows]
    if outside:
        raise InputError(f"{MODEL} ends texts with token {outside[0]!r}, expected ids 0–{rows - 1}")
    for name, shape in found.shapes.items():
        if any(type(n) is not int or n < 1 for n in shape):
            raise InputError(f"{MODEL} gives {name} the shape {list(shape)}, expected positive integers")


def _refuse_unknown_specials(found: Description) -> None:
    """A template that spells a special token otherwise was made for another tokenizer."""
    if found.tokenizer is None or found.template is None:
        return
    own = {special.name: special.text for special in found.tokenizer.specials}
    for name, text in found.template.specials.items():
        if own.get(name) != text:
            raise InputError(
                f"template {found.template.name} needs {name} to be {text!r}, the tokenizer has {own.get(name)!r}; "
                "restore the files saved together"
            )


def document(path: Path, name: str) -> dict[str, Any] | None:
    """One JSON file of a step folder, None where it is absent; raises InputError if it is no JSON object."""
    if not (path / name).exists():
        return None
    try:
        content = json.loads((path / name).read_text("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not readable JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{name} is not a JSON object")
    return content


# -- Looking without loading -----------------------------------------------------------


def describe(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """What a checkpoint is, as JSON values, without reading an array; the config's keys are at the top.

    Raises:
        CheckpointError: as `load` does, but damage inside array files is not looked for.
    """
    directory = Path(directory).absolute()
    path = candidates(directory, step)[0]
    try:
        manifest.verify(path, unhashed=("params", "train"))
        found = read(path)
    except InputError as error:
        raise CheckpointError(f"{title(path)}: {error}") from None
    return {
        "path": str(path),
        "step": found.step,
        "steps": steps(directory) or [found.step],
        "format_version": FORMAT_VERSION,
        "stage": found.stage,
        **found.config.to_dict(),
        "compute_dtype": found.compute_dtype,
        "eos_token_ids": found.eos_token_ids,
        "parameter_count": sum(math.prod(shape) for shape in found.shapes.values()),
        "parameters": {name: {"shape": list(found.shapes[name]), "dtype": found.dtypes[name]} for name in found.shapes},
        "tokenizer": tokenizer_summary(found.tokenizer),
        "template": found.template and found.template.name,
        "resumable": (path / "train").is_dir(),
        "provenance": found.provenance,
    }


def tokenizer_summary(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """Kind, numbers of ids and special tokens, as JSON values."""
    if tokenizer is None:
        return None
    sizes = ("kind", "vocab_size", "base_vocab_size", "model_vocab_size")
    return {
        **{name: getattr(tokenizer, name) for name in sizes},
        "specials": {special.name: {"text": special.text, "id": special.id} for special in tokenizer.specials},
        "added": dict(tokenizer.added),
    }
