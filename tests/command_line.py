"""Call the command line in this process, on pipelines of a few kilobytes, in builds of a few seconds."""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dmqexport.cli import main

#: As little as still goes through every stage.
SMALL: tuple[str, ...] = (
    *("--rows", "3", "--steps", "4", "--calib-size", "2"),
    *("--set", "validation.images=2", "--set", "validation.entries=12", "--set", "validation.layer_entries=6"),
    *("--set", "validation.latency_runs=3", "--set", "validation.gates.eps_sqnr_db=1"),
)


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, parsed."""
        return json.loads(self.out)

    @property
    def stages(self) -> dict[str, bool]:
        """Stage → whether it was reused, from the progress lines."""
        lines = [line.split(maxsplit=1) for line in self.err.splitlines() if line and not line.startswith(" ")]
        return {line[0]: line[1] == "reused" for line in lines if line[0].isidentifier() and len(line) == 2}


def dmqexport(*arguments: object) -> Answer:
    """Run `dmqexport ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        patch.object(sys, "argv", ["dmqexport", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return Answer(int(code), out.getvalue(), err.getvalue())


def build(model: Path, output: Path, work: Path, *arguments: object, verb: str = "build") -> Answer:
    """A small build; the work folder is shared, so that tests redo only what differs."""
    return dmqexport(verb, "-m", model, "-o", output, "--work", work, *SMALL, *arguments)


def refused(answer: Answer, code: int, words: Sequence[str]) -> None:
    """Assert one clear message, without a traceback, that contains `words`."""
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert sum(line.startswith("error: ") for line in answer.err.splitlines()) == 1, answer.err
    assert "internal" not in answer.err
    for word in words:
        assert word in answer.err, f"{word!r} is missing in {answer.err!r}"
