"""`jaxgpt hub download`, `jaxgpt hub upload` and `jaxgpt hub list`."""

import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import InputError, first
from jaxgpt.settings import HubDownloadSettings, HubListSettings, HubUploadSettings
from jaxgpt.verbs.output import Output, waiting
from jaxgpt.verbs.progress import bytes_bar

if TYPE_CHECKING:
    from jaxgpt.hub.download import Downloaded, Selection
    from jaxgpt.hub.upload import Plan


def list_(settings: HubListSettings, output: Output) -> int:
    """The models of users or organisations."""
    from jaxgpt.hub import remote

    for group in settings.groups:
        with waiting(f"asking {remote.endpoint()}"):
            models = remote.models(group)
        for model in models:
            marks = [mark for mark, holds in (("private", model.private), ("gated", model.gated)) if holds]
            output.say("  ".join([f"{model.name:<40}", model.modified, *marks]).rstrip())
        if output.json:
            output.result({"group": group, "models": [vars(model) for model in models]})
    return 0


# -- Download --------------------------------------------------------------------------


def download(settings: HubDownloadSettings, output: Output) -> int:
    """Models of the hub as folders."""
    from jaxgpt.hub import download, remote

    with waiting(f"asking {remote.endpoint()}"):
        names = list(settings.names)
        if settings.all:
            names = [model.name for group in settings.names for model in remote.models(group)]
        targets = _targets(names, settings)
        selections = [
            download.select(
                remote.snapshot(name, settings.revision), include=settings.include, every_step=settings.steps == "all"
            )
            for name in targets
        ]
    for selection in selections:
        if settings.list:
            _show(selection, output)
            continue
        out = targets[selection.snapshot.name]
        with bytes_bar(selection.snapshot.name) as progress:
            done = download.download(selection, out, progress=progress)
        _say_downloaded(done, out, output)
    return 0


def _targets(names: list[str], settings: HubDownloadSettings) -> dict[str, str]:
    """The folder of each model: --out itself for one, a folder in it for each of several."""
    several = settings.all or len(names) > 1
    targets: dict[str, str] = {}
    for name in dict.fromkeys(names):
        last = name.rpartition("/")[2]
        targets[name] = str(Path(settings.out, last)) if several or not settings.out else settings.out
    folders = list(targets.values())
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    if twice:
        both = [name for name, folder in targets.items() if folder == twice[0]]
        raise InputError(f"{first(both)} would all be written to {twice[0]}; download them one by one, each with --out")
    return targets


def _show(selection: "Selection", output: Output) -> None:
    from jaxgpt.array_files import in_bytes

    snapshot = selection.snapshot
    if output.json:
        files = {name: file.size for name, file in selection.files.items()}
        about = {"name": snapshot.name, "commit": snapshot.commit, "kind": selection.kind}
        output.result({**about, "files": files, "left_out": selection.left_out})
    output.say(f"{snapshot.name} at {snapshot.commit[:12]}: {len(selection.files)} files, {in_bytes(selection.size)}")
    for name, file in selection.files.items():
        output.say(f"  {in_bytes(file.size):>12}  {name}")
    _say_left_out(selection.left_out, "not downloaded", output)


def _say_downloaded(done: "Downloaded", out: str, output: Output) -> None:
    from jaxgpt.array_files import in_bytes

    snapshot = done.selection.snapshot
    importable = done.selection.kind == "hf" and "config.json" in done.selection.files
    remedy = f"jaxgpt import {shlex.quote(out)} {shlex.quote(out.rstrip('/') + '-checkpoint')}" if importable else ""
    if output.json:
        output.result(
            {
                "name": snapshot.name,
                "commit": snapshot.commit,
                "kind": done.selection.kind,
                "written": out,
                "files": len(done.selection.files),
                "bytes": done.selection.size,
                "fetched": done.fetched,
                "left_out": done.selection.left_out,
                "import": remedy or None,
            }
        )
    amount = f"{len(done.selection.files)} files, {in_bytes(done.selection.size)}"
    how = f"{in_bytes(done.fetched)} fetched" if done.fetched else "all here already"
    output.say(f"{snapshot.name} at {snapshot.commit[:12]} is in {out}: {amount}, {how}")
    _say_left_out(done.selection.left_out, "not downloaded", output)
    if remedy:
        output.say(f"to use it: {remedy}")
    if done.selection.kind == "checkpoint":
        output.say("every file matches the manifest of its step")


def _say_left_out(names: list[str], what: str, output: Output) -> None:
    if names:
        output.note(f"{what}: {first(names, 5)}")


# -- Upload ----------------------------------------------------------------------------


def upload(settings: HubUploadSettings, output: Output) -> int:
    """Folders as models of the hub."""
    from jaxgpt.hub import upload

    with waiting("comparing with the manifests"):
        if settings.all:
            found = upload.plans(settings.directory, steps=settings.steps, train=settings.train)
            plans = {f"{settings.name}/{folder}": plan for folder, plan in found.items()}
        else:
            plans = {settings.name: upload.plan(settings.directory, steps=settings.steps, train=settings.train)}
    for name, plan in plans.items():
        if settings.list:
            _show_plan(name, plan, output)
            continue
        with _sending(name):
            done = upload.upload(
                plan, name, revision=settings.revision, public=settings.public, message=settings.message
            )
        _say_uploaded(name, plan, {"commit": done.commit, "url": done.url}, output)
        output.say(f"{plan.folder} is at {done.url}, commit {done.commit[:12]}: {_amount(plan)}")
        _say_left_out(plan.left_out, "not uploaded", output)
    return 0


def _show_plan(name: str, plan: "Plan", output: Output) -> None:
    _say_uploaded(name, plan, {"names": list(plan.files)}, output)
    output.say(f"{plan.folder} would go to {name}: {_amount(plan)}")
    for target in plan.files:
        output.say(f"  {target}")
    _say_left_out(plan.left_out, "not uploaded", output)


def _say_uploaded(name: str, plan: "Plan", more: dict[str, Any], output: Output) -> None:
    if output.json:
        sizes = {"files": len(plan.files), "bytes": plan.size, "left_out": plan.left_out}
        output.result({"name": name, "kind": plan.kind, **more, **sizes})


def _amount(plan: "Plan") -> str:
    from jaxgpt.array_files import in_bytes

    return f"{len(plan.files)} files, {in_bytes(plan.size)}"


# -- Progress --------------------------------------------------------------------------


@contextmanager
def _sending(name: str) -> Generator[None]:
    """On a terminal the package's own bars, of each file that goes up."""
    from jaxgpt.hub import remote

    remote.package()
    if sys.stderr.isatty():
        yield
    else:
        remote.no_bars()
        yield
