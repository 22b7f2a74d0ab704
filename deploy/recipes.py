"""Recipes: named job specs that come with the package, one YAML file each in `recipes/`.

A recipe is a job spec in YAML; its first line is a comment that describes it. `--set` works on top of it. A recipe
whose second line is `# extends: NAME` holds only what differs from it; `# without: KEY, KEY` below leaves out keys that
mean nothing in it. Recipes are written one key a line, with the source of a value in a comment behind it, so that a
whole recipe with all its sources is put together line by line.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import SpecError, refusal

FOLDER = Path(__file__).parent / "recipes"
DEFAULT = "digits-dat-pgd"
_EXTENDS = re.compile(r"# extends: (\S+)")
_WITHOUT = re.compile(r"# without: (.+)")
_KEY = re.compile(r"( *)([a-z_0-9]+):(?: (.*))?")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe: its name, its description in one line, and its YAML document, with what it extends."""

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


def extended(base: str, text: str) -> str:
    """The lines of `base` with those of `text` in their place, or at the end of their section.

    Args:
        base, text: YAML mappings of one key a line, nested by indentation; comments behind a value belong to it. The
            comments at the head are those of `text`, then the notes of `base`.
    """
    root = _Section()
    root.take(base)
    for key in _left_out(text):
        root.drop(key)
    root.take(text)
    return "".join(f"{line}\n" for line in (*_head(text), *_notes(base), *root.lines()))


def _read(name: str) -> Recipe:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    extends = _EXTENDS.match(rest)
    if extends:
        text = extended(_read(extends[1]).text, text)
    return Recipe(name=name, description=first.removeprefix("#").strip(), text=text)


@dataclass
class _Section:
    """Keys in order: each a line's rest, or a section."""

    keys: dict[str, _Section | str] = field(default_factory=dict)

    def take(self, document: str) -> None:
        """Takes over the keys of a document."""
        open_: list[tuple[int, _Section]] = [(-1, self)]
        for line in document.splitlines():
            found = _KEY.fullmatch(line.rstrip())
            if found is None:
                continue  # a comment or nothing
            indent, key, rest = len(found[1]), found[2], found[3]
            while indent <= open_[-1][0]:
                open_.pop()
            section = open_[-1][1]
            if rest is not None and not rest.lstrip().startswith("#"):
                section.keys[key] = rest
                continue
            below = section.keys.get(key)
            if not isinstance(below, _Section):
                below = section.keys[key] = _Section()
            open_.append((indent, below))

    def drop(self, key: str) -> None:
        """Leaves out a dotted key, which must be there."""
        *sections, last = key.split(".")
        section = self
        for name in sections:
            below = section.keys[name]
            assert isinstance(below, _Section)
            section = below
        del section.keys[last]

    def lines(self, indent: str = "") -> list[str]:
        """The section as YAML."""
        lines: list[str] = []
        for key, value in self.keys.items():
            if isinstance(value, _Section):
                lines += [f"{indent}{key}:", *value.lines(indent + "  ")]
            else:
                lines.append(f"{indent}{key}: {value}")
        return lines


def _head(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]


def _left_out(text: str) -> list[str]:
    """What `# without:` names."""
    return [key.strip() for line in _head(text) if (found := _WITHOUT.fullmatch(line)) for key in found[1].split(",")]


def _notes(base: str) -> list[str]:
    """The comments at the head of a recipe that hold for those that extend it, too."""
    first, *notes = (line for line in _head(base) if not (_EXTENDS.fullmatch(line) or _WITHOUT.fullmatch(line)))
    while notes and notes[0] == "#":
        notes = notes[1:]
    return ["#", f"# What it extends ({first.removeprefix('# ').partition(':')[0]}) says:", *notes] if notes else []
