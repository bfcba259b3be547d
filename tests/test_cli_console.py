"""What the terminal says of an engine is what was read back from it."""

import pytest

from dmqexport.cli_console import proven

READ = "precision read back from the builder's log"


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ("119 Int8 x Int8", "proven int8"),
        ("50 i8 x i8, 37 u8 x i8", "proven int8"),
        ("111 Float x Int4, 12 Int8 x Int8", "proven: 111 Float x Int4, 12 Int8 x Int8"),
        ("4 FP8 x FP8", "proven: 4 FP8 x FP8"),
    ],
)
def test_only_int8_is_called_int8(types: str, words: str) -> None:
    assert proven({"note": f"{READ}: {types}"}) == words
