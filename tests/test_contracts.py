"""The private names of other libraries that we use: each is looked for in the version that is installed.

A release that takes one away fails its case here, which says what we did with it and which file to mend. Each wall (see
``WALLS``) has them in ``PRIVATE``, by the versions that have them and by what they are used for, written as

- ``module:name.name``; ``module:name(parameter)`` where it is called with these parameters, and ``...`` for others;
- ``module:Class().name`` for an attribute of its instances; ``module:Class{name}`` for a variable of its methods;
- any other text for one in the library's own files, such as a variable of the environment.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.test_house import FILES, ROOT, WALLS, name_of, private_names

TEXTS = {"ray": ("_raylet.so", "_private/**/*.py", "_common/**/*.py", "train/**/*.py")}
"""Files of a library in which a text is looked for."""
NAME = re.compile(r"([\w.]+):((?:\w+(?:\(\))?\.)*)(\w+)(?:\(([\w, .]*)\)|{(\w+)})?")


class Contract(NamedTuple):
    """A private name that we use."""

    wall: str
    """The file that uses it."""
    library: str
    """With the versions that have it."""
    use: str
    name: str


def contracts() -> Iterator[Contract]:
    for wall in WALLS:
        for library, uses in importlib.import_module(name_of(ROOT / wall)).PRIVATE.items():
            for use, names in uses.items():
                yield from (Contract(wall, library, use, name) for name in names)


CONTRACTS = list(contracts())


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_the_installed_version_has_it(contract: Contract) -> None:
    library = Requirement(contract.library)
    try:
        installed = version(library.name)
    except PackageNotFoundError:
        pytest.skip(f"{library.name} is not installed")
    if not library.specifier.contains(installed, prereleases=True):
        pytest.skip(f"{library.name} {installed} is none of those that have it")
    try:
        look_for(contract.name, library.name)
    except Exception as error:
        pytest.fail(
            f"{library.name} {installed} has no {contract.name} ({type(error).__name__}: {error}). We use it to "
            f"{contract.use}: mend {contract.wall}.",
            pytrace=False,
        )


def look_for(name: str, library: str) -> None:
    """Look for one name.

    Raises:
        Exception: it is not there, or not as it was. The text says what is.
    """
    match = NAME.fullmatch(name)
    if match is None or match[1].split(".")[0] != library:
        assert any(name.encode() in content for content in texts(library)), "none of its files has this text"
        return
    module, holders, last, parameters, variable = match.groups()
    holder: Any = importlib.import_module(module)
    for part in holders.split(".")[:-1]:
        holder = member(holder, part.removesuffix("()"))
    if holders.endswith("()."):
        assert last in attributes(holder), f"its instances have {', '.join(sorted(attributes(holder)))}"
        return
    found = member(holder, last)
    if variable is not None:
        assert variable in variables(found), "none of its methods has a variable of this name"
    if parameters is not None:
        bind(holder, found, [part for part in parameters.split(", ") if part])


def member(holder: Any, name: str) -> Any:
    """As ``from holder import name`` finds it."""
    if inspect.ismodule(holder) and not hasattr(holder, name):
        return importlib.import_module(f"{holder.__name__}.{name}")
    return getattr(holder, name)


def bind(holder: Any, function: Any, parameters: list[str]) -> None:
    signature = inspect.signature(function)
    if inspect.isclass(holder) and inspect.isfunction(inspect.getattr_static(holder, function.__name__)):
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])  # without self
    try:
        if "..." in parameters:
            signature.bind_partial(**dict.fromkeys(set(parameters) - {"..."}))
        else:
            signature.bind(**dict.fromkeys(parameters))
    except TypeError:
        raise TypeError(f"it takes {signature}") from None


def attributes(kind: type) -> set[str]:
    """What instances of a class have, as far as its source tells."""
    found = set(dir(kind))
    if hasattr(kind, "DESCRIPTOR"):  # a message
        return {*found, *kind.DESCRIPTOR.fields_by_name}
    for base in kind.__mro__[:-1]:
        found |= inspect.get_annotations(base).keys()
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found


def variables(owner: Any) -> set[str]:
    """Local variables of a function, or of the methods of a class."""
    if inspect.isclass(owner):
        functions = [
            inspect.unwrap(value) for base in owner.__mro__ for value in vars(base).values() if callable(value)
        ]
    else:
        functions = [inspect.unwrap(owner)]
    return {name for function in functions for name in _names(getattr(function, "__code__", None))}


def _names(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from (*code.co_varnames, *code.co_cellvars)
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from _names(inner)


@functools.cache
def texts(library: str) -> list[bytes]:
    spec = find_spec(library)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (root,) = map(Path, spec.submodule_search_locations)
    return [path.read_bytes() for pattern in TEXTS[library] for path in root.glob(pattern)]


@pytest.mark.parametrize("wall", WALLS)
def test_each_private_name_that_a_wall_uses_has_a_contract(wall: str) -> None:
    kept = {part for contract in CONTRACTS if contract.wall == wall for part in parts(contract.name)}
    assert private_names(ROOT / wall) - kept == set()


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_each_contract_is_needed(contract: Contract) -> None:
    match = NAME.fullmatch(contract.name)
    used = contract.name if match is None else match[5] or match[3]
    forms = used, re.sub("chosen|rejected", "{side}", used)
    is_used = any(form in source for source in sources() for form in forms)
    assert is_used, f"nothing uses {used} any more: take it out of {contract.wall}"


@functools.cache
def sources() -> list[str]:
    """Our files without what is said of private names."""
    return [re.sub(r"^PRIVATE = .*?^}", "", file.read_text(), flags=re.DOTALL | re.MULTILINE) for file in FILES]


def parts(name: str) -> Iterator[str]:
    """What of a contract's name may stand in our source: all that leads to it."""
    yield name
    match = NAME.fullmatch(name)
    if match is not None:
        module, holders, last, _, variable = match.groups()
        path = [*holders.replace("()", "").split(".")[:-1], last, *([variable] if variable else [])]
        yield from (module, f"{module}:{path[0]}", *path)
        yield ":".join(module.rsplit(".", 1))
