"""What the README shows is true: its commands, options and recipes exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fastad.cli import app
from fastad.training.recipe import shipped

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^fastad [a-z].*$", README, re.MULTILINE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line: str) -> None:
    _, name, *rest = shlex.split(line)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    known = {option for param in command.params for option in param.opts}
    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`([a-z0-9-]+\.(?:paper|quick))`", README)))
)
def test_recipes_exist(name: str) -> None:
    assert name in shipped()


def test_readme_is_shown_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)))
)
def test_make_targets_exist(target: str) -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
