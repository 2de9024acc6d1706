"""Whoever misspells something in one of the files to copy is told so by the tests: each of these changes is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files import CONFIGS, FILES, problems

Mutant = tuple[str, str]
"""What was changed, and the text after it."""


OPTION, EXTRA, QUOTE = r"--([a-z-]+)", r"(?:\[|(?<=\w),)([a-z]+)(?=[],])", "[\"']"
FREE = {"gpus"}
"""Keys that are names of the user's."""


def misspelt(word: str) -> str:
    """With a letter too many; with one too few many programs would know what is meant."""
    return word + word[-1]


def of_yaml(text: str) -> Iterator[Mutant]:
    """Each key misspelt, each value of a wrong type, written as JSON, which is YAML as well. Then the
    options and extras of commands misspelt, and each quote missing."""
    written = yaml.safe_load(text)
    places = list(_places(written, ()))
    for kind, change in (("key", _rename), ("type", _retype)):
        for place in places:
            mutant = copy.deepcopy(written)
            parent = mutant
            for step in place[:-1]:
                parent = parent[step]
            if change(parent, place[-1]):
                yield f"{kind} {'.'.join(map(str, place))}", json.dumps(mutant)
    yield from _in_lines(text, OPTION, EXTRA, QUOTE)


def _places(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield (*place, name)
        yield from _places(child, (*place, name))


def _rename(parent: Any, name: Any) -> bool:
    changes = isinstance(parent, dict) and name not in FREE
    if changes:
        parent[misspelt(name)] = parent.pop(name)
    return changes


def _retype(parent: Any, name: Any) -> bool:
    parent[name] = ["wrong"] if isinstance(parent[name], (str, int)) else "wrong"
    return True


def of_script(text: str) -> Iterator[Mutant]:
    """Outside of comments: each option and each variable misspelt, each quote missing. Slurm's own options: misspelt,
    with a wrong number, taken for a comment."""
    for found in re.finditer(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M):
        yield f"SBATCH --{found[1]}", _put(text, found.start(1), found.end(1), misspelt(found[1]))
        yield f"comment --{found[1]}", _put(text, found.start(), found.start() + 7, "#SBTACH")
        if found[2].isdigit():
            yield f"number --{found[1]}", _put(text, found.start(2), found.end(2), "two")
    begin = text.index("\nset ")
    for found in re.finditer(r"(?<![\w-])--([a-z][\w-]+)|\$\{?([A-Za-z_]{2,})|(?<!\\)[\"']", text):
        line = text[text.rfind("\n", 0, found.start()) + 1 : found.end()]
        if found.start() < begin or " # " in line or line.startswith("#") or ":?" in line:
            continue
        at = f"{found[0]} at {text.count(chr(10), 0, found.start()) + 1}"
        number = 1 if found[1] else 2
        if found[number]:
            yield at, _put(text, found.start(number), found.end(number), misspelt(found[number]))
        else:
            yield f"quote {at}", _put(text, found.start(), found.end(), "")


def of_dockerfile(text: str) -> Iterator[Mutant]:
    """Each instruction, option, extra, program and source misspelt, each quote missing."""
    yield from _in_lines(text, r"^([A-Z]+)", OPTION, EXTRA, r"(?<!-)\b([a-z]+/?\w+\.?\w*) ", QUOTE)


def _in_lines(text: str, *parts: str) -> Iterator[Mutant]:
    """Each such part misspelt, or left out if it is a quote; not in comments."""
    for found in re.finditer("|".join(parts), text, re.M):
        line = text[text.rfind("\n", 0, found.start()) + 1 : found.end()]
        if not line.startswith("#") and " # " not in line:
            number = found.lastindex or 0
            changed = misspelt(found[number]) if number else ""
            yield f"{found[0]} in {line}", _put(text, found.start(number), found.end(number), changed)


def _put(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


def mutants_of(path: Path) -> Iterator[Mutant]:
    kinds: dict[str, Callable[[str], Iterator[Mutant]]] = {".yaml": of_yaml, "": of_dockerfile}
    yield from kinds.get(path.suffix, of_script)(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_mutant_is_refused(path: Path) -> None:
    mutants = {text: what for what, text in mutants_of(path)}
    assert len(mutants) >= 5
    assert [what for text, what in mutants.items() if not any(problems(path, text))] == []


def test_there_are_many() -> None:
    assert len({text for path in FILES for _, text in mutants_of(path)}) > 1000
