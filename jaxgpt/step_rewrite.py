"""One JSON file of a finished step written anew: beside the step, from links to its other files.

The step is at any moment the old or the new one, whole: the new folder is checked and
forced to disk under a name that does not count, and takes the old one's place by
`checkpoint.acknowledge`.
"""

import os
import shutil
from pathlib import Path

from jaxgpt import manifest, step_folder


def prepared(path: Path, name: str, text: str) -> Path:
    """A step folder like the one at `path`, but for one of its files; for `checkpoint.acknowledge`.

    Args:
        path: a verified step folder.
        name: of the file, which may be new.
        text: its content.

    Raises:
        InputError: a step that could not be loaded; nothing of it is left.
        OSError: it cannot be written; nothing of it is left.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(path, partial, copy_function=_linked)
        listed = manifest.read(path)
        _replace(partial / name, text)
        listed[name] = {"size": (partial / name).stat().st_size, "sha256": manifest.sha256(partial / name)}
        _replace(partial / manifest.MANIFEST, manifest.spelled(listed))
        for folder, _, _ in os.walk(partial, topdown=False):
            manifest.sync(Path(folder))
        manifest.verify(partial, unhashed=("params", "train"))
        step_folder.read(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def _linked(source: str, target: str) -> None:
    """The same file under another name; a copy with its times where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        manifest.sync(Path(target))


def _replace(path: Path, text: str) -> None:
    """Not written through a link: the old folder keeps its file."""
    path.unlink(missing_ok=True)
    manifest.write_synced(path, text)
