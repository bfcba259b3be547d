"""Sizes as people write them, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmqexport.byte_size import parse_bytes
from dmqexport.errors import RecipeError
from dmqexport.recipe import load_recipe


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 2**32),
        (" 2.5 MiB ", 2621440),
        ("400 MB", 400_000_000),
        ("1kb", 1000),
        ("7", 7),
        ("7B", 7),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(1, 2**40))
def test_every_whole_number_is_a_size(size: int) -> None:
    assert parse_bytes(str(size)) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1 pound", "1.5.2MiB", "nan", "1e3", "0.5", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        parse_bytes(text)


def test_the_recipe_names_its_key() -> None:
    recipe = load_recipe(None, {"model": "m", "training.max_ram": "1.5GiB"}, [])
    assert recipe.training.max_ram_bytes == 3 * 2**29
    with pytest.raises(RecipeError, match=r"'training.max_ram': 'much' is no size"):
        load_recipe(None, {"model": "m", "training.max_ram": "much"}, [])
    with pytest.raises(RecipeError, match=r"'max_disk' \(--max-disk\): '-1GiB' is no size"):
        load_recipe(None, {"model": "m", "max_disk": "-1GiB"}, [])
