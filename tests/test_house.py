"""The house: what may import what, and how large a file and a room may be. All of it is read, nothing is imported."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "observer", "plugin")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BELOW = {"actors": set(), "observer": {"actors"}, "plugin": {"actors", "observer"}}
"""The packages that a file of each may import besides its own."""
LINES = 450
ROOM = 10
WALLS = (
    "actors/swanlab/sdk.py",
    "observer/ray_cluster/patches.py",
    "observer/trainers/internals.py",
    "observer/trainers/trl_internals.py",
)
"""The files that may know private parts of other libraries: each is the only one for its own."""
KEPT_TO_ITSELF = ("internal", "proto", "deprecated", "utils")
"""Parts of SwanLab that it keeps for itself, besides names with an underscore."""
DOCUMENTED = {
    *("_getframe", "_current_frames", "_exit", "_fields", "_inheriting", "asyncio:_get_running_loop"),
    *("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "RAY_USE_TLS"),
}
"""Names that look private, and are Python's, or documented by Ray."""
FIELD = {"ray", "torch", "swanlab", "transformers", "trl", "accelerate"}
"""Large libraries: a file that is read on the way to ``connect`` imports them where they are used."""


def name_of(file: Path) -> str:
    return ".".join(("swanlab_ray", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


NAMES = {name_of(file): file for file in FILES}


def imports(file: Path, top: bool = False) -> Iterator[tuple[str, str | None]]:
    """``(module, name taken from it)``; only those that are made when the file itself is imported, with ``top``."""
    tree = ast.parse(file.read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, None) if whole in NAMES else (str(node.module), alias.name)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    """``plugin -> observer -> actors``."""
    allowed = {package, *BELOW[package]}
    for file in (ROOT / package).rglob("*.py"):
        for module, _ in imports(file):
            if module.startswith("swanlab_ray."):
                assert module.split(".")[1] in allowed, f"{file.relative_to(ROOT)} imports {module}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {
        name: {module for module, _ in imports(file, top=True) if module in NAMES and module != name}
        for name, file in NAMES.items()
    }
    TopologicalSorter(graph).prepare()


def test_nobody_takes_private_names() -> None:
    for file in FILES:
        for module, name in imports(file):
            if module in NAMES and name is not None:
                assert not name.startswith("_"), f"{file.relative_to(ROOT)} takes {name} from {module}"


@functools.cache
def own_names() -> set[str]:
    """What our own files define."""
    nodes = [node for file in FILES for node in ast.walk(ast.parse(file.read_text()))]
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {
        *(node.name for node in nodes if isinstance(node, defined)),
        *(node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self.")),
        *(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)),
    }


def private_names(file: Path) -> set[str]:
    """The private names of others that a file uses, outside of a ``PRIVATE`` of its own.

    ``module:name`` for what it imports, ``name`` for attributes; modules, attributes and variables of the environment
    that are given as text.
    """
    tree = ast.parse(file.read_text())
    skipped = [node for node in ast.walk(tree) if _defines(node, "PRIVATE", "__slots__") or _is_part_of_a_name(node)]
    nodes = set(ast.walk(tree)) - {node for root in skipped for node in ast.walk(root)}
    taken = {
        (node.module, alias.name, alias.asname or alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("swanlab_ray")
        for alias in node.names
        if _is_private(node.module, alias.name)
    }
    found = {f"{module}:{name}" for module, name, _ in taken}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _is_private(alias.name)}
        elif isinstance(node, ast.Attribute):
            of_private = isinstance(node.value, ast.Name) and node.value.id in {known for _, _, known in taken}
            if of_private or (re.match("_[^_]", node.attr) and node.attr not in own_names()):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = re.fullmatch(r"[a-z]\w*(\.\w+)+", node.value) and _is_private(node.value)
            if module or re.fullmatch(r"_(?!swanlab_ray)[a-zA-Z]\w*|RAY_\w*[a-zA-Z]", node.value):
                found.add(node.value)
    return found - DOCUMENTED


def _is_private(module: str, name: str = "") -> bool:
    parts = [*module.split("."), name]
    return any(re.match("_[^_]", part) for part in parts) or (
        parts[0] == "swanlab" and not set(KEPT_TO_ITSELF).isdisjoint(parts)
    )


def _is_part_of_a_name(node: ast.AST) -> bool:
    suffix = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "endswith"
    return suffix or isinstance(node, ast.JoinedStr)


def _defines(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names


def test_private_parts_of_others_are_used_behind_walls_only() -> None:
    """``PRIVATE`` in :data:`WALLS` says of each what it is used for; tests/test_contracts.py looks for them."""
    found = {str(file.relative_to(ROOT)): private_names(file) for file in FILES}
    assert {name: names for name, names in found.items() if names and name not in WALLS} == {}


def test_what_both_sides_speak_needs_no_library_of_the_field() -> None:
    for file in [*(ROOT / "actors" / "wire").glob("*.py"), ROOT / "actors" / "settings.py"]:
        assert FIELD.isdisjoint(module.split(".")[0] for module, _ in imports(file)), file


def test_types_are_decoded_by_decoders_that_one_thread_has_made() -> None:
    """msgspec crashes where two threads are the first to decode a type, so its decoders are made by an import."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                typed = called.startswith("msgspec.") and any(keyword.arg == "type" for keyword in node.keywords)
                assert not typed, f"{file}:{node.lineno}"
                assert called != "msgspec.convert", f"{file}:{node.lineno}"


def test_large_libraries_are_imported_where_they_are_used() -> None:
    """Except by the files that are of no use without them."""
    found = {
        str(file.relative_to(ROOT)): module
        for file in FILES
        for module in FIELD & {name.split(".")[0] for name, _ in imports(file, top=True)}
        if not file.is_relative_to(ROOT / "plugin")
    }
    assert found.keys() == {
        "actors/writer/actor.py",
        "actors/writer/handle.py",
        "actors/writer/ticker.py",
        "observer/callback.py",
        "observer/demo/training.py",
        "observer/tracker.py",
        "observer/trainers/own_loss.py",
    }


def test_rooms_are_small() -> None:
    rooms = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert {str(room): files for room, files in rooms.items() if files > ROOM} == {}


def test_files_are_small() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > LINES} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 150


def test_every_room_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {"swanlab_ray", *(name_of(file) for file in FILES if file.name == "__init__.py")}


def test_a_room_says_what_it_is_for() -> None:
    for package in PACKAGES:
        for folder in {file.parent for file in (ROOT / package).rglob("*.py")}:
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
