"""The methods of an ablation, read from a table: each a name, where it comes from, and the recipe keys it sets."""

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from dmqexport.errors import RecipeError
from dmqexport.recipe import known_keys, read_mapping

SHIPPED: Final = Path(__file__).resolve().parent / "ablation_methods.yaml"
_LEAVES: Final = frozenset(known_keys())
_KEYS: Final = frozenset({"title", "source", "like", "base", "recipe"})


@dataclass(frozen=True)
class Method:
    """One row of the table.

    base: the recipe it starts from (shipped name or file), None for the defaults; assignments: `key=value` as of
    `--set`; source: the paper or program that it follows.
    """

    name: str
    title: str
    group: str
    source: str
    base: str | None
    assignments: tuple[str, ...]


def load_methods(path: Path | None = None) -> dict[str, Method]:
    """Name → method, in the table's order; None reads the table that ships with dmqexport.

    Raises RecipeError for a file that cannot be read, an unknown key, and `like` of a method that is not there.
    """
    table = SHIPPED if path is None else path
    document = read_mapping(table)
    sections = [document.get(name) or {} for name in ("common", "templates", "groups")]
    if not all(isinstance(section, dict) for section in sections) or not sections[-1]:
        raise RecipeError(
            f"{table}: expected sections `common` (recipe keys), `templates` (methods) and `groups` (group → methods)",
            hint=f"{SHIPPED} is an example",
        )
    common, templates, groups = sections
    entries: dict[str, Mapping[str, Any]] = {}
    group_of: dict[str, str | None] = {}
    for group, members in [(None, templates), *groups.items()]:
        for name, entry in (members or {}).items():
            if name in entries or name in groups:
                raise RecipeError(
                    f"{table}: {name!r} is there twice", hint="methods and groups need names of their own"
                )
            if not isinstance(entry, dict) or not set(entry) <= _KEYS:
                odd = sorted(set(entry) - _KEYS) if isinstance(entry, dict) else entry
                raise RecipeError(f"{table}, method {name!r}: got {odd}, expected keys of {sorted(_KEYS)}")
            entries[name], group_of[name] = entry, group
    return {
        name: Method(
            name=name,
            title=str(entry.get("title", name)),
            group=group,
            source=str(entry.get("source", "")),
            base=_base(name, entries, table),
            assignments=tuple(
                f"{key}={json.dumps(value)}" for key, value in _flat(_merged(name, entries, common, table)).items()
            ),
        )
        for name, entry in entries.items()
        if (group := group_of[name]) is not None
    }


def choose(methods: Mapping[str, Method], wanted: Sequence[str]) -> list[Method]:
    """The methods that `wanted` (names of methods or groups; empty: all) asks for, each once, in the table's order.

    Raises RecipeError for a name that is neither.
    """
    groups = list(dict.fromkeys(method.group for method in methods.values()))
    for name in wanted:
        if name not in methods and name not in groups:
            near = difflib.get_close_matches(name, [*methods, *groups], n=1)
            raise RecipeError(
                f"no method is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                hint=f"groups: {', '.join(groups)}; methods: {', '.join(methods)}",
            )
    return [m for m in methods.values() if not wanted or m.name in wanted or m.group in wanted]


def _base(name: str, entries: Mapping[str, Mapping[str, Any]], table: Path) -> str | None:
    for ancestor in _lineage(name, entries, table):
        if "base" in entries[ancestor]:
            return str(entries[ancestor]["base"])
    return None


def _merged(
    name: str, entries: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any], table: Path
) -> dict[str, Any]:
    """Recipe keys of a method: the common ones, then from its farthest ancestor to itself."""
    merged: dict[str, Any] = {}
    overlays = [entries[ancestor].get("recipe") or {} for ancestor in reversed(_lineage(name, entries, table))]
    for overlay in (common, *overlays):
        _merge(merged, overlay)
    return merged


def _lineage(name: str, entries: Mapping[str, Mapping[str, Any]], table: Path) -> list[str]:
    """The method, what it is like, what that is like ..."""
    line = [name]
    while (parent := entries[line[-1]].get("like")) is not None:
        if parent not in entries or parent in line:
            problem = "which is like itself" if parent in line else "which is not in the table"
            raise RecipeError(f"{table}, method {line[-1]!r}: it is like {parent!r}, {problem}")
        line.append(parent)
    return line


def _merge(target: dict[str, Any], overlay: Mapping[str, Any]) -> None:
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)  # the next overlay must not write into this one


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value. A key that holds a mapping by itself, such as quantization.overrides, is one value."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _LEAVES:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def describe(methods: Sequence[Method]) -> str:
    """YAML of what each method sets, for `--list`."""
    document = {
        method.name: {
            "title": method.title,
            "group": method.group,
            **({"source": method.source} if method.source else {}),
            **({"base": method.base} if method.base else {}),
            "sets": list(method.assignments),
        }
        for method in methods
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
