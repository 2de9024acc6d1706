"""The documents say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import AliasChoices

from swanlab_ray.actors.settings import ObserverSettings
from tests.command_reference import reference

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster_configs/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_every_setting_is_documented_with_its_variables_and_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text().partition("## Modes")[0]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|[^|]*\|([^|]*)\|", text, re.M)
    documented = {name: (variables, default.strip().strip("`")) for name, variables, default in rows}
    assert list(documented) == list(ObserverSettings.model_fields)
    for name, field in ObserverSettings.model_fields.items():
        variables, default = documented[name]
        assert isinstance(field.validation_alias, AliasChoices)
        named = re.findall(r"`(\w+)`", variables)
        assert named == [alias for alias in field.validation_alias.choices if alias != name][: len(named)]
        if name == "log_dir":
            continue
        if isinstance(field.default, tuple):
            assert default == "; ".join(field.default)
            continue
        assert default == ("" if field.default is None else str(field.default).lower().removesuffix(".0"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(block, str(page), "exec")


def test_the_command_reference_is_what_the_commands_say() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == reference(), "write it again: make docs"


def test_commands_exist() -> None:
    """Every ``swanlab-ray`` command, ``make`` target and module that the documents name."""
    from swanlab_ray.observer.cli import main

    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        code = re.findall(r"`([^`\n]+)`", page.read_text()) + re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S)
        for text in code:
            for command in re.findall(r"(?<![/\w])swanlab-ray +([a-z]\S*)", text):
                assert command in main.commands, command
            for target in re.findall(r"(?:^|&& )make (\w+)", text, re.M):
                assert re.search(rf"^{target}:", makefile, re.M), target
            for module in re.findall(r"python -m (tests\.[\w.]+)", text):
                assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_an_example_of_running_a_test_selects_one() -> None:
    examples = [found for page in PAGES for found in re.findall(r"pytest (tests/\w+\.py) -k (\w+)", page.read_text())]
    assert examples
    for file, word in examples:
        assert re.search(rf"^ *def test_\w*{word}", (ROOT / file).read_text(), re.M), f"{file} -k {word}"


def test_what_a_message_tells_to_run_exists() -> None:
    """A user who was told to run a command runs it when something has gone wrong already."""
    from swanlab_ray.observer.cli import main

    told = [
        command
        for room in ("actors", "observer", "plugin", "cluster_configs")
        for path in sorted((ROOT / room).rglob("*"))
        if path.suffix in (".py", ".yaml", ".sh", ".md")
        for command in re.findall(r"(?:`|: )swanlab-ray ([a-z]\w*)", path.read_text())
    ]
    assert len(told) > 20
    assert set(told) <= main.commands.keys()
