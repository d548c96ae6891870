"""What the README shows is true: its commands, options and recipes exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from fastad.cli import app
from fastad.training.recipe import shipped

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^fastad [a-z].*$", README, re.MULTILINE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line: str) -> None:
    _, name, *rest = shlex.split(line)
    group: Any = get_command(app)
    command = group.commands[name]
    known = {option for param in command.params for option in param.opts}
    assert {word for word in rest if word.startswith("--")} <= known


RECIPES = sorted(set(re.findall(r"`([a-z0-9-]+\.(?:paper|quick|cifar))`", README)))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_exist(name: str) -> None:
    assert name in shipped()


def test_readme_names_every_recipe() -> None:
    assert set(RECIPES) == set(shipped()) - {"demo"}


def test_readme_is_shown_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)))
)
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_make_bench_leaves_the_committed_results_alone() -> None:
    (place,) = re.findall(r"^RESULTS \?= (.+)$", MAKEFILE, re.MULTILINE)
    assert place == "build/bench"
    recipe = MAKEFILE.replace("\\\n", " ").partition("\nbench:")[2].partition("\n\n")[0]
    lines = [line for line in recipe.splitlines() if "python -m bench." in line]
    assert len(lines) >= 6
    # bench.engines makes models and has no result
    writing = [line for line in lines if "bench.engines" not in line]
    assert [line for line in writing if not line.endswith("--results $(RESULTS)")] == []
