"""Ranks agree, add up, and stop together: real processes that meet, raise, return too early and are killed."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from thread_ranks import ThreadRanks, _Shared, together
from torch import nn

from calib.distributed import Place, joined, sum_floats, sum_gradients, use_cores
from dmqexport.errors import RecipeError
from dmqexport.ranks import ALONE, Ranks, share

WORK = Path(__file__).with_name("rank_work.py")
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@dataclass(frozen=True)
class Ended:
    code: int
    err: str


def start(size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start `size` ranks of rank_work.py; rank 0 holds the store, as without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(WORK.parents[2]), str(WORK.parents[1]), str(WORK.parent)]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, str(WORK), *map(str, arguments)],
            env={**common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end(processes: list[subprocess.Popen[str]]) -> list[Ended]:
    ended = []
    for process in processes:
        _, err = process.communicate(timeout=300)
        ended.append(Ended(process.returncode, err))
    return ended


# Where a process stands


def test_a_process_without_launcher_is_alone() -> None:
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "2"}, {**LAUNCHED, "WORLD_SIZE": "1", "RANK": "0"}):
        assert Place.of(environment) is None
        with joined(environment) as ranks:
            assert ranks is ALONE


def test_the_launchers_variables_are_read() -> None:
    assert Place.of({**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}) == Place(1, 4, 2, "10.0.0.1", 29500, "/0")
    again = Place.of({**LAUNCHED, "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"})
    assert again is not None
    assert again.attempt == "a/1", "a restarted worker must not meet the keys of the attempt before"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_variables_that_are_no_numbers_are_refused_by_name(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} is 'two', expected a number"):
        Place.of({**LAUNCHED, name: "two"})


def test_a_rank_beyond_the_last_is_refused() -> None:
    with pytest.raises(RecipeError, match="RANK is 4, expected 0 to 3"):
        Place.of({**LAUNCHED, "RANK": "4"})


def test_processes_share_the_cores_unless_the_user_said_how_many() -> None:
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        use_cores(2, {})
        assert torch.get_num_threads() == max(1, cores // 2)
        use_cores(4 * cores, {})
        assert torch.get_num_threads() == 1
        torch.set_num_threads(before)
        use_cores(2, {"OMP_NUM_THREADS": "3"})
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


# Shares and sums


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_make_the_whole_in_order(count: int, size: int) -> None:
    items = list(range(count))
    parts = [list(share(ThreadRanks(rank, size, _Shared(1)), items)) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_gradients_are_summed_and_rows_that_no_batch_held_stay_absent() -> None:
    """Rows 1 and 3 of a table are in the batch; row 4 is looked at by a rank without a share of it."""
    touched = [[1], [1, 3], [4]]

    def work(ranks: Ranks) -> tuple[float, torch.Tensor, torch.Tensor, Any]:
        table, weight, unused = (nn.Parameter(torch.ones(shape)) for shape in ((6, 2), (3,), (2,)))
        present = ranks.rank < 2
        rows = touched[ranks.rank]
        values = torch.full((len(rows), 2), float(present) * (ranks.rank + 1))
        table.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, table.shape, check_invariants=True)
        weight.grad = torch.arange(3.0) * present
        loss = sum_gradients(ranks, [table, unused, weight], torch.tensor(0.5 * present), present)
        assert unused.grad is None
        assert table.grad.is_sparse
        return loss, table.grad.coalesce().indices(), table.grad.coalesce().values(), weight.grad

    for loss, rows, values, dense in together(3, work):
        assert loss == 1.0
        assert rows.tolist() == [[1, 3]]
        assert values.tolist() == [[3.0, 3.0], [2.0, 2.0]]
        assert dense.tolist() == [0.0, 2.0, 4.0]
    assert together(3, lambda ranks: sum_floats(ranks, ranks.rank, 0.1)) == [[3.0, pytest.approx(0.3)]] * 3


# Real processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes", "message"),
    [
        ("raises", (5, 1), "stopped at the end, because rank 1 failed: the tensor is all NaN"),
        ("is killed", (5, -9), "rank 1 of 2 .* died without a word; the others stopped at the end"),
        ("while others sum, is killed", (5, -9), "rank 1 of 2 .* died without a word"),
        ("returns", (5, 0), "rank 1 has ended, although rank 0 waits for it at the end"),
        ("first is killed", (-9, 5), "rank 1 of 2 lost the store|rank 0 of 2 .* died without a word"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_the_others_stop_within_seconds_and_say_why(how: str, codes: tuple[int, int], message: str) -> None:
    processes = start(2, how, "-")
    stopped = 1 if codes[1] == 5 else 0
    processes[1 - stopped].wait(timeout=120)
    began = time.monotonic()
    ended = end(processes)
    assert time.monotonic() - began < 20
    assert (ended[0].code, ended[1].code) == codes, ended
    err = ended[stopped].err
    assert "Traceback" not in err
    assert re.search(message, err), err


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "coherence"), [("full", 0.0), ("rounding", 0.5)])
def test_ranks_train_what_one_process_does_but_for_the_order_of_sums(
    weights: str, coherence: float, tmp_path: Path
) -> None:
    """Blocks and the network; three ranks and batches of two calls or four entries, so that now and then one has none.

    All parameters, not losses alone: a rank that forgot its share, or counted a row it did not touch, is found.
    """
    for folder in ("one", "three"):
        (tmp_path / folder).mkdir()
    alone = start(1, "train", tmp_path / "one", weights, coherence)
    shared = start(3, "train", tmp_path / "three", weights, coherence)
    for ended in end(alone) + end(shared):
        assert ended.code == 0, ended.err
    expected = json.loads((tmp_path / "one" / "blocks-0.json").read_text())
    found = json.loads((tmp_path / "three" / "blocks-0.json").read_text())
    for one, other in zip(expected, found, strict=True):
        assert other["name"] == one["name"]
        for key in ("before", "after", "power"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
    losses = [json.loads((tmp_path / folder / "losses-0.json").read_text()) for folder in ("one", "three")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for kind in ("state", "network"):
        state = load_file(tmp_path / "one" / f"{kind}-0.safetensors")
        ranks = [load_file(tmp_path / "three" / f"{kind}-{rank}.safetensors") for rank in range(3)]
        for key, value in state.items():
            assert all(torch.equal(other[key], ranks[0][key]) for other in ranks), "ranks must hold one model"
            torch.testing.assert_close(ranks[0][key], value, rtol=1e-3, atol=1e-4)
