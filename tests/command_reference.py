"""The command reference of the docs, from each command's own help: ``make docs`` writes it, a test compares it."""

from __future__ import annotations

from click.testing import CliRunner

from swanlab_ray.observer.cli import main

HEAD = """# Commands

What each command says of itself with `--help`. This page is written by `make docs`.
"""


def reference() -> str:
    """The page, as Markdown."""
    pages = [[], *([name] for name in sorted(main.commands))]
    return HEAD + "".join(
        f"\n## swanlab-ray {' '.join(command)}".rstrip() + f"\n\n```\n{help_of(command)}```\n" for command in pages
    )


def help_of(command: list[str]) -> str:
    """Its help, 80 columns wide."""
    done = CliRunner().invoke(main, [*command, "--help"], prog_name="swanlab-ray", terminal_width=80)
    assert done.exit_code == 0, done.output
    return done.stdout


if __name__ == "__main__":
    print(reference(), end="")
