"""Recipes: named job specs that come with the package, one YAML file each in `recipes/`.

A recipe is a job spec in YAML; its first line is a comment that describes it. `--set` works on top of it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from common.errors import SpecError, refusal

FOLDER = Path(__file__).parent / "recipes"
DEFAULT = "digits-dat-pgd"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe: its name, its description in one line, and its YAML document."""

    name: str
    description: str
    text: str


def all_recipes() -> list[Recipe]:
    """All recipes, the default one first, then by name."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [_read(name) for name in sorted(names, key=lambda name: (name != DEFAULT, name))]


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SpecError: there is none; the message names the nearest one.
    """
    names = [path.stem for path in FOLDER.glob("*.yaml")]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise SpecError(refusal(f"a known recipe{hint}", "recipe", name, "datps recipes lists them"))
    return _read(name)


def _read(name: str) -> Recipe:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    return Recipe(name=name, description=first.removeprefix("#").strip(), text=text)
