"""The rules of the house: who may import whom, what is pinned, how files are named and how long they get."""

import ast
import functools
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jaxgpt

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("jaxgpt", "torchref", "oracle")
SOURCES = sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))


# -- Who loads what ----------------------------------------------------------------------

ONLY_NUMPY = ("jaxgpt.config", "jaxgpt.errors", "jaxgpt.taps", "jaxgpt.weights")
NOTHING = ("jaxgpt", "jaxgpt.cli")
NO_JAX = (
    "jaxgpt.chat",
    "jaxgpt.tokenizer",
    "jaxgpt.data.batches",
    "jaxgpt.data.encode",
    "jaxgpt.data.episodes",
    "jaxgpt.data.shards",
)
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


@functools.cache
def third_party() -> frozenset[str]:
    """Top-level names of every installed package but the project's own."""
    return frozenset(importlib.metadata.packages_distributions()) - set(PRODUCT)


@functools.cache
def loaded_by(module: str) -> frozenset[str]:
    """Third-party packages that a fresh interpreter has loaded after `import module` and had not before."""
    return loaded_one_after_another([module])[module]


def loaded_one_after_another(modules: Sequence[str]) -> dict[str, frozenset[str]]:
    """The same of several in one interpreter: what one has loaded is not told of those after it."""
    code = (
        "import importlib, json, sys\nfor module in sys.argv[1:]:\n"
        "    before = set(sys.modules); importlib.import_module(module)\n"
        "    print(json.dumps([module, sorted(set(sys.modules) - before)]))"
    )
    command = [sys.executable, "-c", code, *modules]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, f"import {modules}: {run.stderr.strip()}"
    found = dict[str, list[str]](map(json.loads, run.stdout.splitlines()))
    return {module: frozenset(n.partition(".")[0] for n in names) & third_party() for module, names in found.items()}


def every_data_module() -> list[str]:
    found = [f"jaxgpt.data.{path.stem}" for path in (ROOT / "jaxgpt/data").glob("*.py") if path.stem != "__init__"]
    return sorted({*NO_JAX, *found})


def test_the_model_as_data_needs_only_numpy():
    found = loaded_one_after_another(ONLY_NUMPY)
    assert {module: names for module, names in found.items() if not names <= {"numpy"}} == {}


@pytest.mark.parametrize("module", NOTHING)
def test_the_command_line_starts_on_the_standard_library_alone(module: str):
    assert loaded_by(module) == set()


def test_text_and_data_need_no_jax():
    modules = every_data_module()
    found = loaded_one_after_another(modules)
    assert list(found) == modules
    assert {module: names for module, names in found.items() if names & {*JAX, "torch"}} == {}


def test_who_answers_from_weights_waits_for_no_library_of_training():
    loaded = loaded_by("jaxgpt.lm")
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "orbax", "torch"}


# -- Who names whom ----------------------------------------------------------------------


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Source(NamedTuple):
    """What the rules ask of a file; kept in place of its tree, whose many nodes would slow the collector down."""

    imported: frozenset[str]
    """Absolute dotted names of every import statement, those inside functions included."""
    imported_at_top: frozenset[str]
    functions: tuple[tuple[str, int], ...]
    """Name and number of lines."""


@functools.cache
def source(path: Path) -> Source:
    tree = ast.parse(path.read_text())
    functions, imports = list[tuple[str, int]](), list[ast.Import | ast.ImportFrom]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            functions.append((node.name, node.end_lineno - node.lineno + 1))
    names = [(node, name) for node in imports for name in names_in(node, path)]
    at_top = frozenset(name for node, name in names if node in tree.body)
    return Source(frozenset(name for _, name in names), at_top, tuple(functions))


def names_in(node: ast.Import | ast.ImportFrom, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = path.relative_to(ROOT).parent.parts
    base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
    origin = ".".join(part for part in (base, node.module) if part)
    yield origin
    # `from jaxgpt import taps` names a module; what is no module matches no rule.
    yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports_of(path: Path, forbidden: set[str]) -> list[str]:
    prefixes = tuple(f"{name}." for name in forbidden)
    return sorted({name for name in source(path).imported if name in forbidden or name.startswith(prefixes)})


def offenders(folder: str, forbidden: set[str], but: str = "") -> dict[str, list[str]]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} has no Python file"
    found = {module_name(path): imports_of(path, forbidden) for path in files}
    return {name: names for name, names in found.items() if names and name != but}


def reachable(start: str) -> set[str]:
    """Modules that `start` imports, directly or through others; the package itself, which is lazy, leads nowhere."""
    paths = {module_name(path): path for path in SOURCES}
    seen: set[str] = set()
    todo = {start}
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= {imported for imported in source(paths[name]).imported if imported in paths} - seen - {"jaxgpt"}
    return seen - {start}


def test_the_product_never_imports_torch_or_the_oracle():
    assert offenders("jaxgpt", {"torch", "torchref", "oracle"}) == {}


def test_the_reference_shares_no_code_with_the_product():
    assert offenders("torchref", {"jaxgpt", "oracle", "transformers", *JAX}) == {}


def test_the_model_reaches_neither_files_nor_text():
    forbidden = {"jaxgpt.checkpoint", "jaxgpt.formats", "jaxgpt.tokenizer", "jaxgpt.chat"}
    reached = reachable("jaxgpt.model")
    assert "jaxgpt.config" in reached
    assert not {name for name in reached if name in forbidden or name.startswith("jaxgpt.formats.")}


def test_only_one_module_knows_orbax():
    assert offenders("jaxgpt", {"orbax"}, but="jaxgpt.orbax_arrays") == {}
    assert offenders("oracle", {"orbax"}) == {}


def test_matplotlib_is_imported_where_the_picture_is_drawn():
    found = {module_name(path): source(path).imported_at_top for path in SOURCES}
    assert [name for name, names in found.items() if any(n.partition(".")[0] == "matplotlib" for n in names)] == []
    assert "matplotlib.figure" in source(ROOT / "jaxgpt/run_log.py").imported


# -- What is declared and pinned ---------------------------------------------------------


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[Requirement]:
    table = project()
    lines = [*table["dependencies"], *(line for extra in extras for line in table["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            found.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    return found


def test_the_package_says_the_version_of_the_project():
    assert jaxgpt.__version__ == project()["version"]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_dependency_has_one_pin_that_its_range_allows(python: str):
    for wanted in requirements("oracle", "test"):
        rows = pins().get(canonicalize_name(wanted.name), [])
        rows = [row for row in rows if row.marker is None or row.marker.evaluate({"python_version": python})]
        assert len(rows) == 1, f"constraints.txt pins {wanted.name} {len(rows)} times for Python {python}"
        version = str(rows[0].specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"pyproject.toml asks {wanted}, constraints.txt pins {version}"


def needed_packages() -> set[str]:
    """Canonical names of all that `pip install .[oracle,test]` brings, from the installed packages' metadata."""
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements("oracle", "test")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for r in map(Requirement, importlib.metadata.requires(name) or []):
            if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((canonicalize_name(r.name), frozenset(r.extras)))
    return {name for name, _ in seen}


@pytest.mark.skipif(sys.platform != "linux", reason="constraints.txt is the set for Linux")
def test_the_pins_are_exactly_what_gets_installed():
    # What torch's CUDA build needs on Linux is pinned by torch itself.
    of_torch = re.compile(r"(nvidia|cuda|triton)(-|$)")
    needed = {name for name in needed_packages() if not of_torch.match(name)}
    assert sorted(pins().keys() - needed) == [], "pinned, but nobody needs it"
    assert sorted(needed - pins().keys()) == [], "needed, but not pinned"


def test_every_import_is_a_declared_dependency():
    packages = importlib.metadata.packages_distributions()
    runtime, with_oracle = (
        {canonicalize_name(r.name) for r in requirements(*extra)} for extra in (("gguf", "hub"), ("oracle",))
    )
    undeclared: set[str] = set()
    for path in SOURCES:
        # pytest is that of the plugin, which pytest alone loads.
        declared = runtime if path.is_relative_to(ROOT / "jaxgpt") else {*with_oracle, "pytest"}
        roots = {name.partition(".")[0] for name in source(path).imported} - sys.stdlib_module_names - set(PRODUCT)
        undeclared |= {
            f"{module_name(path)} imports {root}"
            for root in roots
            if not declared & {canonicalize_name(distribution) for distribution in packages.get(root, [])}
        }
    assert undeclared == set()


def test_the_license_is_the_unmodified_apache_2_text():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


# -- How code is cut ---------------------------------------------------------------------


def test_modules_are_named_after_their_concept():
    vague = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert [str(path) for path in ROOT.glob("[a-z]*/**/*.py") if vague & {path.stem, *path.parts}] == []


def test_no_file_has_more_than_500_lines():
    assert {module_name(path): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 500} == {}


def test_no_function_has_more_than_60_lines():
    long = {
        f"{module_name(p)}.{name}": n for p in SOURCES for name, n in source(p).functions if n > 60 and name != "main"
    }
    assert long == {}


def test_nothing_is_left_to_do_later():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError")
    assert [module_name(path) for path in SOURCES if marks.search(path.read_text())] == []
