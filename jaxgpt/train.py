"""Pretraining and SFT: what each run is made of. The loop they share is `jaxgpt.training_loop`."""

import dataclasses
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt import checkpoint, device, field_checks, gates, mesh, preflight, processes, transformer
from jaxgpt.chat import PLAIN, TEMPLATES, Template
from jaxgpt.checkpoint import Checkpoint
from jaxgpt.config import ModelConfig
from jaxgpt.data.batches import Batches, EpisodeBatches, PretrainBatches, Validation, check_same_data, validation
from jaxgpt.data.episodes import Episodes, read_episodes
from jaxgpt.data.shards import TokenShards
from jaxgpt.errors import InputError
from jaxgpt.formats.hf_settings import LINEAGE
from jaxgpt.mesh import Layout
from jaxgpt.parallel_settings import MeshSettings
from jaxgpt.preflight import Preflight
from jaxgpt.presets import PRESETS
from jaxgpt.run_lock import RunLock
from jaxgpt.settings import ModelSettings, PretrainSettings, SFTSettings, TrainSettings
from jaxgpt.step_folder import refuse_damaged, steps
from jaxgpt.stop_signals import interrupting
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.training_loop import Loop, Run, TrainResult


def pretrain(settings: PretrainSettings) -> TrainResult:
    """Train a base model on token shards.

    Raises:
        InputError: settings, data or model that do not fit together; before anything is written.
    """
    with _writing(settings) as lock:
        return Loop(_pretraining(settings), lock).run()


def dry_run(settings: PretrainSettings | SFTSettings) -> Preflight:
    """What `pretrain` or `sft` with these settings would take; a step or two are taken and forgotten.

    Nothing is written but compiled programs, where JAX keeps them.

    Raises:
        InputError: as the run would, unless memory alone is wanting: see `Preflight.fits`.
    """
    with processes.joined(settings.processes):
        run = _pretraining(settings) if isinstance(settings, PretrainSettings) else _fine_tuning(settings)
        return Loop(run, RunLock(settings.out)).dry_run()


def _pretraining(settings: PretrainSettings) -> Run:
    settings, resumed = _resumed(settings, "pretrain")
    device.use(settings.train.device)
    if settings.init_from and settings.model != ModelSettings():
        raise InputError(
            f"the model's shape and dropout are those of --init-from {settings.init_from}; drop the others"
        )
    shards = TokenShards(_given("--data", settings.data))
    if settings.out and Path(settings.out).resolve() == Path(settings.data).resolve():
        raise InputError(f"--out {settings.out} is the data's own folder; give another")
    shards.verify()
    shards.judge_first_shard(accept=settings.train.accept_loss)
    tokenizer = shards.tokenizer()
    source = resumed or (checkpoint.load(settings.init_from) if settings.init_from else None)
    if source is not None:
        _same_tokenizer(source, tokenizer)
    config = source.config if source else model_config(settings.model, tokenizer.model_vocab_size)
    train = settings.train
    _fits_context(config, train)
    _sample_fits(config, tokenizer, train)
    notices: list[str] = []

    def windows(train: TrainSettings) -> Batches:
        return PretrainBatches(shards, train.batch_size, train.sequence_length, train.seed, train.epochs)

    batches, train = _batches(windows, train, notices, resumed)
    notices += gates.check_answers(source, accept=train.accept_loss) if source else []
    layout = _layout(settings, config, train, notices)
    params = source.params if source else transformer.init(config, train.seed, layout.parameters(config))
    held_out = None
    if shards.index["splits"]["val"]["shards"]:
        val = TokenShards(settings.data, "val")
        val.verify()
        held_out = _validation(val, train)
    return Run(
        out=Path(settings.out),
        settings=train,
        stage="base",
        config=config,
        params=params,
        tokenizer=tokenizer,
        template=shards.template(),
        batches=batches,
        held_out=held_out or [],
        layout=layout,
        # A run that a signal ended before its first step goes on with weights that are still new.
        fresh=not settings.init_from and (resumed is None or resumed.step == 0),
        origin=_origin("pretrain", settings, train, held_out, resumed),
        parent=settings.init_from or None,
        lineage=_lineage(source),
        resumed=resumed,
        notices=notices,
    )


def sft(settings: SFTSettings) -> TrainResult:
    """Teach a checkpoint to answer, from chat JSONL; only answers and their end token train.

    Raises:
        InputError: settings, data or model that do not fit together; before anything is written.
    """
    with _writing(settings) as lock:
        return Loop(_fine_tuning(settings), lock).run()


@contextmanager
def _writing(settings: PretrainSettings | SFTSettings) -> Generator[RunLock]:
    """One process, or several with one that writes, and the lock of the run folder."""
    out = _given("--out", settings.out)
    with interrupting(), processes.joined(settings.processes), RunLock(out, wanted=processes.first()) as lock:
        yield lock


def _fine_tuning(settings: SFTSettings) -> Run:
    settings, resumed = _resumed(settings, "sft")
    device.use(settings.train.device)
    source = resumed or checkpoint.load(_given("--model", settings.model))
    if source.tokenizer is None:
        raise InputError(f"{settings.model} has no tokenizer jaxgpt knows; SFT needs one to encode the conversations")
    notices: list[str] = []
    template = _template(settings, source, notices)
    train = _within_context(source.config, settings.train, notices)
    episodes = read_episodes(_given("--data", settings.data), source.tokenizer, template, train.sequence_length)
    training, others = _split(episodes, settings, train.sequence_length, source.tokenizer, template)

    def rows(train: TrainSettings) -> Batches:
        size, length = train.batch_size, train.sequence_length
        return EpisodeBatches(training, size, length, train.seed, train.epochs, packed=settings.pack)

    batches, train = _batches(rows, train, notices, resumed)
    held_out = _validation(others, train) if others.episodes else None
    notices += gates.check_answers(source, accept=train.accept_loss)
    layout = _layout(settings, source.config, train, notices)
    return Run(
        out=Path(settings.out),
        settings=train,
        stage="sft",
        config=source.config,
        params=source.params,
        tokenizer=source.tokenizer,
        template=template.as_trained(),
        batches=batches,
        held_out=held_out or [],
        layout=layout,
        fresh=False,
        origin={**_origin("sft", settings, train, held_out, resumed), "episodes": str(training)},
        parent=settings.model,
        lineage=_lineage(source),
        resumed=resumed,
        notices=notices,
    )


_Settings = TypeVar("_Settings", PretrainSettings, SFTSettings)


def _lineage(source: Checkpoint | None) -> dict[str, Any]:
    return {key: source.provenance[key] for key in LINEAGE if key in source.provenance} if source else {}


def _origin(
    command: str,
    settings: PretrainSettings | SFTSettings,
    train: TrainSettings,
    held_out: Validation | None,
    resumed: Checkpoint | None,
) -> dict[str, Any]:
    """What is saved of how the run began; another held-out set than a resumed run's is refused."""
    rows = held_out.rows.data() if held_out else {}
    if resumed and resumed.train_json:  # steps of before do not tell their rows
        check_same_data("held-out", rows, resumed.train_json["origin"].get("held_out", rows))
    return {"command": command, "settings": _kept(settings, train), "held_out": rows}


def _kept(settings: PretrainSettings | SFTSettings, train: TrainSettings) -> dict[str, Any]:
    """What `resume` starts from: the batch as it was lowered to the data, all else as it was asked for.

    Not which process this was: that may change.
    """
    asked = dataclasses.replace(settings.train, batch_size=train.batch_size)
    kept = dataclasses.asdict(dataclasses.replace(settings, train=asked))
    del kept["processes"]
    return kept


# -- Putting a run together ------------------------------------------------------------


def model_config(settings: ModelSettings, vocab_size: int) -> ModelConfig:
    """The preset with what was changed, for a tokenizer of `vocab_size` rows."""
    changes = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if value is not None and name not in ("preset", "dropout")
    }
    for name, value in changes.items():
        field_checks.size(name, value)
    preset = PRESETS[settings.preset]
    heads = changes.get("num_attention_heads", preset.num_attention_heads)
    if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
        same = preset.num_key_value_heads == preset.num_attention_heads
        changes["num_key_value_heads"] = heads if same else math.gcd(heads, preset.num_key_value_heads)
    if "head_dim" not in changes and {"hidden_size", "num_attention_heads"} & changes.keys():
        hidden = changes.get("hidden_size", preset.hidden_size)
        if hidden % heads:
            raise InputError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim")
        changes["head_dim"] = hidden // heads
    if "hidden_size" in changes and "intermediate_size" not in changes:
        changes["intermediate_size"] = changes["hidden_size"] * preset.intermediate_size // preset.hidden_size
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout)
    return dataclasses.replace(preset, vocab_size=vocab_size, **changes, **rates)


def _given(flag: str, value: str) -> str:
    if not value:
        raise InputError(f"{flag} is missing")
    return value


def _resumed(settings: _Settings, command: str) -> tuple[_Settings, Checkpoint | None]:
    """The settings to run with, and the checkpoint to go on from when resuming.

    A resumed run takes the settings it was started with; only where it lies and how it is told may have changed.
    """
    out = settings.out
    if out and Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"--out {out} is a file; give a folder for checkpoints and logs")
    if out:
        refuse_damaged(Path(out))
    if not settings.resume:
        if out and steps(out):
            raise InputError(f"{out} already holds a run; pass --resume to go on with it, or another --out")
        return settings, None
    if not steps(_given("--out", out)):
        raise InputError(f"{out} holds no saved step to go on from; start the run without --resume")
    found = _newest(out)
    if found.train is None or found.train_json is None:
        raise InputError(f"{out} has no training state to resume; start from it with --init-from")
    origin = found.train_json["origin"]
    if origin["command"] != command:
        raise InputError(f"{out} was written by {origin['command']}; resume it with that command")
    values: dict[str, Any] = {**origin["settings"], "out": out, "resume": True, "processes": settings.processes}
    values["train"] = dataclasses.replace(TrainSettings(**values["train"]), loss_unit=settings.train.loss_unit)
    # Another mesh makes the same updates: it may be given anew. Runs of before there were any say nothing of one.
    given = {name: size for name, size in dataclasses.asdict(settings.mesh).items() if size is not None}
    values["mesh"] = MeshSettings(**{**values.get("mesh", {}), **given})
    if isinstance(settings, PretrainSettings):
        values["model"] = ModelSettings(**values["model"])
    return type(settings)(**values), found


def _newest(out: str) -> Checkpoint:
    """The newest verified step, which the first process chooses, and puts in order what is damaged."""
    if processes.first():
        found = checkpoint.load(out, train=True, fallback=True)
        processes.told_by_first(found.step)
        return found
    return checkpoint.load(out, train=True, tidy=False, step=int(processes.told_by_first(0)))


def _layout(
    settings: PretrainSettings | SFTSettings, config: ModelConfig, train: TrainSettings, notices: list[str]
) -> Layout:
    """The mesh, for a model that can be trained on it."""
    layout = mesh.layout(settings.mesh, config, train.batch_size, notices)
    preflight.check_size(config, layout.parameter_shards)
    return layout


def _same_tokenizer(source: Checkpoint, tokenizer: Tokenizer) -> None:
    if source.tokenizer is None or source.tokenizer.state() != tokenizer.state():
        raise InputError(f"{source.path} and the data have different tokenizers; encode the data with the checkpoint's")


def _fits_context(config: ModelConfig, settings: TrainSettings) -> None:
    if settings.sequence_length > config.max_position_embeddings:
        raise InputError(
            f"sequence_length {settings.sequence_length} exceeds the model's context of "
            f"{config.max_position_embeddings}; lower it or raise --max-position-embeddings"
        )


def _within_context(config: ModelConfig, settings: TrainSettings, notices: list[str]) -> TrainSettings:
    """Rows as long as asked for; those that nobody asked for are as long as a short context holds."""
    context = config.max_position_embeddings
    if settings.sequence_length == TrainSettings.sequence_length > context:
        notices.append(f"rows have {context} tokens, the model's context, not {settings.sequence_length}")
        return dataclasses.replace(settings, sequence_length=context)
    _fits_context(config, settings)
    return settings


def _batches(
    make: Callable[[TrainSettings], Batches], train: TrainSettings, notices: list[str], resumed: Checkpoint | None
) -> tuple[Batches, TrainSettings]:
    """Batches of no more rows than the data has: more would hold the same row twice.

    One that nobody asked for is as large as the data. A resumed run goes on as it was.
    """
    batches = make(train)
    rows = len(batches.rows)
    if train.batch_size <= rows or resumed:
        return batches, train
    if train.batch_size != TrainSettings.batch_size:
        raise InputError(
            f"batch_size {train.batch_size:,} is larger than the data, which is {rows:,} rows of "
            f"{train.sequence_length} tokens; lower --batch-size to {rows:,} or give more data"
        )
    notices.append(f"batches have {rows} rows, all that the data is, not {train.batch_size}")
    train = dataclasses.replace(train, batch_size=rows)
    return make(train), train


def _sample_fits(config: ModelConfig, tokenizer: Tokenizer, settings: TrainSettings) -> None:
    if not settings.sample_every:
        return
    length, limit = len(tokenizer.encode(settings.sample_prompt)), config.max_position_embeddings
    if not 0 < length < limit:
        raise InputError(f"sample_prompt is {length} tokens, expected 1–{limit - 1}; give another --sample-prompt")


def _template(settings: SFTSettings, source: Checkpoint, notices: list[str]) -> Template:
    """The one asked for, the checkpoint's, or the one that needs no special tokens of its own."""
    if settings.template:
        return TEMPLATES[settings.template]
    if source.template is None:
        notices.append(f"{settings.model} has no chat template; taught with {PLAIN.name}, change it with --template")
        return PLAIN
    return source.template


def _split(
    episodes: Episodes, settings: SFTSettings, length: int, tokenizer: Tokenizer, template: Template
) -> tuple[Episodes, Episodes]:
    """Training and held-out episodes: another file's, or the last twentieth of many."""
    if settings.validation:
        return episodes, read_episodes(settings.validation, tokenizer, template, length)
    count = len(episodes.episodes) // 20 if len(episodes.episodes) >= 100 else 0
    cut = len(episodes.episodes) - count
    return (
        dataclasses.replace(episodes, episodes=episodes.episodes[:cut]),
        dataclasses.replace(episodes, episodes=episodes.episodes[cut:]),
    )


def _validation(source: TokenShards | Episodes, settings: TrainSettings) -> Validation:
    return validation(source, settings.batch_size, settings.sequence_length, limit=settings.eval_batches or None)
