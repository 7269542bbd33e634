"""`jaxgpt pretrain` and `jaxgpt sft`."""

import dataclasses
import math
from typing import TYPE_CHECKING

from jaxgpt import processes
from jaxgpt.errors import InputError
from jaxgpt.parallel_settings import MeshSettings, ProcessSettings
from jaxgpt.settings import ModelSettings, PretrainSettings, SFTSettings
from jaxgpt.verbs.output import Output

if TYPE_CHECKING:
    from jaxgpt.preflight import Preflight
    from jaxgpt.training_loop import TrainResult

SPREAD = {
    "--" + field.name.replace("_", "-")
    for settings in (MeshSettings, ProcessSettings)
    for field in dataclasses.fields(settings)
}
ALLOWED_ON_RESUME = {"--out", "--resume", "--dry-run", "--json", "--debug", "--loss-unit", *SPREAD}


def pretrain(settings: PretrainSettings, output: Output) -> int:
    """Train a base model on token shards."""
    _check(settings, output)
    _required("--data", settings.data or settings.resume, "a folder written by `jaxgpt data encode`")
    shape = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(ModelSettings)}
    if settings.init_from and (given := [flag for flag in output.given if flag in shape]):
        raise InputError(f"the model's shape and dropout are those of --init-from; drop {' '.join(given)}")
    from jaxgpt import train

    unit = settings.train.loss_unit
    if settings.dry_run:
        return _told(train.dry_run(settings), unit, output)
    return _ended(train.pretrain(settings), unit, output)


def sft(settings: SFTSettings, output: Output) -> int:
    """Fine-tune a checkpoint on conversations."""
    _check(settings, output)
    _required("--model", settings.model or settings.resume, "the checkpoint to start from")
    _required("--data", settings.data or settings.resume, "a file of chat JSONL")
    from jaxgpt import train

    unit = settings.train.loss_unit
    if settings.dry_run:
        return _told(train.dry_run(settings), unit, output)
    return _ended(train.sft(settings), unit, output)


def _required(flag: str, given: object, meaning: str) -> None:
    if not given:
        raise InputError(f"{flag} is missing; give {meaning}")


def _check(settings: PretrainSettings | SFTSettings, output: Output) -> None:
    _required("--out", settings.out or (settings.dry_run and not settings.resume), "a folder for checkpoints and logs")
    changed = [flag for flag in output.given if flag not in ALLOWED_ON_RESUME]
    if settings.resume and changed:
        raise InputError(
            f"--resume goes on with the settings the run was started with, got {' '.join(changed)} too; "
            "drop it, or start a new run from this one's checkpoint (pretrain --init-from, sft --model)"
        )


def _told(found: "Preflight", unit: str, output: Output) -> int:
    """A dry run's report; what does not fit is refused after it, as the run would."""
    if processes.first():
        if output.json:
            output.result({**dataclasses.asdict(found), "fits": found.fits})
        for line in (found.headline(), *found.lines(unit)):
            output.say(line)
    found.refuse()
    return 0


def _ended(result: "TrainResult", unit: str, output: Output) -> int:
    from jaxgpt import run_log

    if output.json and processes.first():
        output.result(dataclasses.asdict(result))
    # A finished run that is resumed takes no step, so it has no loss to tell.
    losses = {"loss": None if math.isnan(result.loss) else result.loss, "validation loss": result.validation_loss}
    told = ", ".join(f"{name} {run_log.told(loss, unit)}" for name, loss in losses.items() if loss is not None)
    if result.validated_at not in (None, result.step):
        told += f" (of step {result.validated_at})"
    if processes.first():
        output.say(f"step {result.step}: {told or 'no step was taken'}; saved in {result.out}")
    # A signal ended it early, with everything saved; scripts must not take that for done.
    return 130 if result.stop_reason == "signal" else 0
