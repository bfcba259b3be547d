"""Commands that torchrun starts several times: who speaks, who goes on, and which commands share their work at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dmqexport.cli_log import Session
from dmqexport.errors import RankError, RecipeError
from dmqexport.ranks import ALONE, Ranks
from dmqexport.workspace import writable_folder

if TYPE_CHECKING:
    from dmqexport.pipeline import Build

#: Verbs that several processes may run together.
SHARED = ("build", "calibrate", "plan", "train", "export", "compile", "validate")
_SHARED_STAGES = ("calibrate", "plan", "train")  # what follows is rank 0's


def launched_ranks() -> int:
    """How many processes the launcher says there are; 1 without one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() and "RANK" in os.environ else 1


def note_rank(command: str | None) -> None:
    """Remember which of several processes this is. Raises RecipeError for a command that they cannot share."""
    if launched_ranks() == 1:
        return
    rank = os.environ["RANK"]
    Session.rank = int(rank) if rank.isdigit() else 0
    if command is not None and command not in SHARED:
        raise RecipeError(
            f"{launched_ranks()} processes were started, but `dmqexport {command}` is the work of one",
            hint=f"start it without torchrun; {', '.join(SHARED)} share theirs",
        )


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of this build; loads torch only where there are several."""
    if launched_ranks() == 1:
        yield ALONE
        return
    from calib.distributed import joined

    with joined() as ranks:
        yield ranks


def share_stages(build: "Build", command: str) -> bool:
    """Run the stages of `command` that ranks share; returns whether this one goes on with the rest."""
    from dmqexport.pipeline import Stage

    workspace = build.workspace
    if workspace.ranks.size == 1:
        return True
    if command == "build":
        writable_folder(build.output.resolve().parent)  # now, not after hours of calibration
    build.run(Stage(command if command in _SHARED_STAGES else "train"))
    return workspace.go_on_alone()


def speaks(error: RankError) -> bool:
    """Whether it is this process that tells the user why all of them stopped: the first one that still can."""
    return Session.rank == (1 if error.rank == 0 else 0)
