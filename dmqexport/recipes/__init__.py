"""Recipes that ship with dmqexport; `--recipe NAME` finds them, and each says in its first lines what it is."""

import difflib
from pathlib import Path

from dmqexport.errors import RecipeError

_FOLDER = Path(__file__).resolve().parent
_SUFFIX = ".yaml"


def names() -> list[str]:
    """The shipped recipes, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob(f"*{_SUFFIX}"))


def find(name_or_file: str | Path) -> Path:
    """The file of a shipped recipe, or the user's own file.

    A word alone is a shipped name; anything with a folder or a suffix is a file, and so is a word that no recipe has
    but a file does. Raises RecipeError for a name that is neither, with the nearest one.
    """
    text = str(name_or_file)
    path = Path(name_or_file)
    if text in names():
        return _FOLDER / f"{text}{_SUFFIX}"
    if path.exists() or path.name != text or path.suffix:
        return path
    near = difflib.get_close_matches(text.lower(), names(), n=1)
    known = ", ".join(names())
    raise RecipeError(
        f"no recipe is called {text!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        hint=f"shipped recipes: {known}; a file of your own needs its suffix, e.g. --recipe {text}.yaml",
    )
