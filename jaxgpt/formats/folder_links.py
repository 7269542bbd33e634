"""A model folder is read alone: a link in it could show any file of whoever imports it."""

from collections.abc import Iterator
from pathlib import Path

from jaxgpt.errors import InputError

_READ = (".json", ".safetensors", ".bin", ".pt", ".txt", ".jinja")
"""Ends of the names that readers of model folders open."""


def refuse_links_outside(folder: Path) -> None:
    """Raise InputError for a link whose target is neither in the folder nor in the hub's cache that it belongs to."""
    inside = folder.resolve()
    homes = [inside]
    if inside.parent.name == "snapshots":  # huggingface_hub's cache: snapshots/COMMIT/NAME → blobs/DIGEST
        homes.append(inside.parent.parent / "blobs")
    for path in _links(folder):
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a loop
            raise InputError(f"{path.name} is a link to itself; put the file there") from None
        if not any(target.is_relative_to(home) for home in homes):
            raise InputError(f"{path.name} is a link to {target}, outside the model directory; put the file there")


def _links(folder: Path) -> Iterator[Path]:
    try:
        for path in folder.iterdir():
            if path.is_symlink() and (path.suffix in _READ or path.is_dir()):
                yield path
            elif path.name == "additional_chat_templates" and path.is_dir():
                yield from _links(path)
    except OSError:  # no folder, or not ours to list: its reader says so
        return
