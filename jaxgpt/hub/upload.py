"""Folders to models of the hub: one commit that holds all of it; of a run folder, one step without training state."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxgpt import manifest, step_folder
from jaxgpt.errors import InputError, first
from jaxgpt.hub import remote

Steps = Literal["newest", "best", "all"]


@dataclass(frozen=True)
class Plan:
    """What of a folder goes up."""

    folder: Path
    kind: Literal["checkpoint", "hf"]
    files: dict[str, Path | bytes]
    """By the name on the hub; bytes where they differ from those on disk."""
    left_out: list[str]
    """Files and steps that stay."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in self.files.values())


@dataclass(frozen=True)
class Uploaded:
    """A commit that was compared with the folder."""

    plan: Plan
    name: str
    commit: str
    url: str


# -- Choosing --------------------------------------------------------------------------


def plan(directory: str | Path, *, steps: Steps = "newest", train: bool = False) -> Plan:
    """What of a folder goes up; every step is compared with its manifest first.

    Args:
        directory: a run folder or one step of it, or a folder with a Hugging Face model or GGUF files.
        steps: of a run folder, which: the newest, the best by validation, or every one.
        train: the state to resume training from, as well; it is about twice the size of the weights.

    Raises:
        InputError: no model in the folder, a damaged step, or `best` where no step has a score.
    """
    folder = Path(directory).absolute()
    if step_folder.is_checkpoint(folder):
        return _plan_steps(folder, steps, train)
    if not folder.is_dir():
        raise InputError(f"{directory} is no folder; give a run folder or a Hugging Face folder")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    wanted = [name for name in names if remote.is_hf_file(name) or ("/" not in name and name.endswith(".gguf"))]
    if not any(name == "config.json" or name.endswith(".gguf") for name in wanted):
        raise InputError(f"{directory} holds no model: no step such as step-00000120, no config.json and no .gguf file")
    left_out = sorted(name for name in set(names) - set(wanted) if not name.startswith("."))
    return Plan(folder, "hf", {name: folder / name for name in wanted}, left_out)


def plans(directory: str | Path, *, steps: Steps = "newest", train: bool = False) -> dict[str, Plan]:
    """A plan for every model folder directly below a folder, by its name; raises as `plan`, or if there is none."""
    folder = Path(directory)
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    models = [path for path in below if step_folder.is_checkpoint(path) or (path / "config.json").is_file()]
    if not models:
        raise InputError(f"{directory} has no folder with a model in it; --all takes a folder of model folders")
    return {path.name: plan(path, steps=steps, train=train) for path in models}


def _plan_steps(folder: Path, steps: Steps, train: bool) -> Plan:
    found = step_folder.folders(folder)
    if (folder / manifest.MANIFEST).is_file():
        found = {int((step_folder.document(folder, step_folder.MODEL) or {}).get("step", 0)): folder}
    wanted = _wanted_steps(folder, found, steps)
    files: dict[str, Path | bytes] = {}
    left_out = [f"step-{number:08d}" for number in sorted(found.keys() - set(wanted))]
    for number in wanted:
        try:
            manifest.verify(found[number])
        except InputError as error:
            raise InputError(f"{step_folder.title(found[number])}: {error}; nothing was uploaded") from None
        listed = manifest.read(found[number])
        kept = listed if train else {name: entry for name, entry in listed.items() if not _is_training(name)}
        if len(kept) < len(listed):
            left_out.append(f"step-{number:08d}/train")
        prefix = f"step-{number:08d}"
        files |= {f"{prefix}/{name}": found[number] / name for name in kept}
        files[f"{prefix}/{manifest.MANIFEST}"] = manifest.spelled(kept).encode()
    return Plan(folder, "checkpoint", files, left_out)


def _wanted_steps(folder: Path, found: dict[int, Path], steps: Steps) -> list[int]:
    if steps == "all":
        return sorted(found)
    if steps == "newest":
        return [max(found)]
    scores = {score: number for number, path in found.items() if (score := step_folder.score_of(path)) is not None}
    if not scores:
        raise InputError(f"no step of {folder} has a validation score; give --steps newest")
    return [scores[min(scores)]]


def _is_training(name: str) -> bool:
    return name.startswith("train/") or name == step_folder.TRAIN


# -- Sending ---------------------------------------------------------------------------


def upload(plan: Plan, name: str, *, revision: str = "", public: bool = False, message: str = "") -> Uploaded:
    """Send a plan as one commit, and compare what the hub then lists with what was sent.

    The model is made where there is none, private unless `public`. Large files that an
    earlier, interrupted try sent are not sent again.

    Raises:
        InputError: no token, a name without owner, the hub cannot be asked or refuses, or
            lists other bytes than were sent.
    """
    remote.check_name(name)
    if "/" not in name:
        raise InputError(f"{name} names no owner; give OWNER/{name}")
    if remote.token() is None:
        raise InputError(f"uploading needs a token that may write to {name}: set HF_TOKEN")
    client = remote.api()
    with remote.answers(name, revision):
        client.create_repo(name, private=not public, exist_ok=True)
        if revision:
            client.create_branch(name, branch=revision, exist_ok=True)
        done = client.create_commit(
            name,
            operations=list(_additions(plan)),
            commit_message=message or f"Upload {plan.folder.name}",
            revision=revision or None,
        )
    _compare(plan, remote.snapshot(name, done.oid))
    return Uploaded(plan, name, done.oid, f"{remote.endpoint()}/{name}")


def _additions(plan: Plan) -> Iterator[Any]:
    package = remote.package()
    for target, source in plan.files.items():
        content = source if isinstance(source, bytes) else str(source)
        yield package.CommitOperationAdd(path_in_repo=target, path_or_fileobj=content)


def _compare(plan: Plan, found: remote.Snapshot) -> None:
    missing = sorted(plan.files.keys() - found.files.keys())
    if missing:
        raise InputError(
            f"{found.name} lacks {first(missing)} after the upload, perhaps for its .gitignore; "
            "change that, then upload again"
        )
    wrong = sorted(target for target, source in plan.files.items() if not found.files[target].matches(source))
    if wrong:
        raise InputError(f"{found.name} has other bytes than were sent in {first(wrong)}; upload again")
