"""Ranks on torch.distributed: found in the environment that torchrun sets, watched, and stopped together.

Work is shared through files, so that a killed build resumes and no result depends on how many ranks there were; the
process group's store carries little more than who has arrived where. A barrier cannot have a time limit (a stage may
take hours), so life is watched instead: the others stop within moments of a rank that failed or was killed.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor

from dmqexport.errors import DmqExportError, RankError, RecipeError
from dmqexport.ranks import ALONE, Ranks

dist: Any = torch.distributed  # its types leave the stores out
logger = logging.getLogger(__name__)

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BEAT_SECONDS = 2.0
_SILENT_SECONDS = 60.0  # a rank of another machine that has not been heard of for so long is dead
_PRECEDENCE_SECONDS = 0.5
_POLL_SECONDS = (0.002, 0.1)  # between two looks at the store: at first, at most
_CONNECT = timedelta(minutes=5)
_REDUCE = timedelta(minutes=30)  # ranks arrive at a sum within seconds of each other
_KEPT = "finished stages and parts are kept: the same command resumes, with as many processes as you like"
_MEMORY = "a killed process has mostly run out of memory: start fewer, or lower calibration.batch_size; "


@dataclass(frozen=True)
class Place:
    """Where this process stands: rank of size in all, local of local_size on this machine; the store's address."""

    rank: int
    size: int
    local_size: int
    host: str
    port: int
    attempt: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place | None":
        """Read what torchrun (or any env:// launcher) sets; None for a process on its own. Raises RecipeError."""
        if any(name not in environment for name in _VARIABLES):
            return None
        numbers = {}
        for name, default in (("RANK", ""), ("WORLD_SIZE", ""), ("MASTER_PORT", ""), ("LOCAL_WORLD_SIZE", "1")):
            text = environment.get(name, default)
            if not text.isdigit():
                raise RecipeError(
                    f"the environment variable {name} is {text!r}, expected a number",
                    hint="start with torchrun --nproc-per-node N -m dmqexport ..., or unset RANK and WORLD_SIZE",
                )
            numbers[name] = int(text)
        if numbers["WORLD_SIZE"] == 1:
            return None
        if numbers["RANK"] >= numbers["WORLD_SIZE"]:
            raise RecipeError(f"RANK is {numbers['RANK']}, expected 0 to {numbers['WORLD_SIZE'] - 1} (WORLD_SIZE - 1)")
        # A restarted worker finds the store of the attempt before: its keys must not be taken for ours.
        attempt = f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        size, local = numbers["WORLD_SIZE"], max(1, numbers["LOCAL_WORLD_SIZE"])
        return cls(numbers["RANK"], size, local, environment["MASTER_ADDR"], numbers["MASTER_PORT"], attempt)


class _TerminatedError(BaseException):
    """SIGTERM: torchrun stops the others when one rank is gone. No handler of `Exception` may swallow it."""


class Group:
    """The ranks of one build; made by `joined`."""

    def __init__(self, place: Place) -> None:
        """Connect to the store. Raises RankError when nobody answers there."""
        self.rank, self.size = place.rank, place.size
        # Under torchrun its agent holds the store; otherwise rank 0 does.
        hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = dist.TCPStore(place.host, place.port, None, hosts, _CONNECT, wait_for_workers=False)
            self._base = dist.PrefixStore(f"dmqexport/{place.attempt}", store)
            # A client of its own: one that waits for a key holds its connection.
            self._pulse = dist.PrefixStore(f"dmqexport/{place.attempt}", store.clone())
        except (RuntimeError, OSError) as error:
            raise RankError(
                f"rank {place.rank} of {place.size}: no store answers at {place.host}:{place.port}",
                hint="start every process with the same MASTER_ADDR and MASTER_PORT; torchrun does so",
            ) from error
        self._calls = 0
        self._reducing = False
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._base.set(f"who/{self.rank}", json.dumps({"process": os.getpid(), "machine": _machine()}))
        self._others: dict[int, dict[str, Any]] = {}
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    # what stages use

    def meet(self, where: str) -> None:
        """Wait until every rank is here. Raises RankError as soon as one of them failed or died."""
        self._calls += 1
        keys = {rank: f"meet/{self._calls}/{rank}" for rank in range(self.size)}
        with self._answering():
            self._base.set(keys[self.rank], "1")
            self._wait(keys, where)

    def tell(self, where: str, value: str) -> str:
        """Return rank 0's `value` on every rank; the others wait for it. Raises RankError likewise."""
        self._calls += 1
        key = f"tell/{self._calls}"
        with self._answering():
            if self.rank == 0:
                self._base.set(key, value)
                return value
            self._wait({0: key}, where)
            return str(self._base.get(key).decode())

    def total(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum of every rank's `values`, bit for bit the same on all of them; in place. Raises RankError."""
        tensor = torch.from_numpy(values)
        try:
            if not self._reducing:
                store = dist.PrefixStore("gloo", self._base)
                dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=_REDUCE)
                self._reducing = True
            # gloo's ring adds every element on one rank and hands the result on.
            dist.all_reduce(tensor)
        except RuntimeError as error:  # the connection to a rank that died
            self._give_up(error)
        return values

    # life and death

    def failed(self, error: BaseException) -> bool:
        """Tell the others that this rank fails; returns whether it is the first."""
        text = error.message if isinstance(error, DmqExportError) else f"{type(error).__name__}: {error}"
        note = json.dumps({"rank": self.rank, "message": text, "cause": not isinstance(error, RankError)})
        with suppress(RuntimeError):
            # What is wrong with the command fails on all ranks at once; rank 0 is the one to say so.
            deadline = time.monotonic() + (_PRECEDENCE_SECONDS if self.rank else 0.0)
            while time.monotonic() < deadline and not self._base.check(["failure"]):
                time.sleep(_POLL_SECONDS[0])
            return bool(self._base.compare_set("failure", "", note) == note.encode())
        return True

    def close(self) -> None:
        """Leave; nobody waits for this rank any more."""
        self._stop.set()
        with suppress(RuntimeError):
            self._base.set(f"left/{self.rank}", "1")
        if self._reducing:
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def terminated(self) -> RankError:
        """Why a SIGTERM came, as far as can be known."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            try:
                with self._answering():
                    self._look("working")
            except RankError as error:
                return error
            time.sleep(_POLL_SECONDS[1])
        return RankError(f"stopped from outside (SIGTERM), or because another process died; {_KEPT}")

    def _wait(self, keys: Mapping[int, str], where: str) -> None:
        """Wait for the key of every rank in `keys`."""
        pause, longest = _POLL_SECONDS
        while not self._base.check(list(keys.values())):
            self._look(where)
            for rank, key in keys.items():
                if self._base.check([f"left/{rank}"]) and not self._base.check([key]):
                    raise RankError(f"rank {rank} has ended, although rank {self.rank} waits for it at {where}")
            time.sleep(pause)
            pause = min(1.5 * pause, longest)

    def _look(self, where: str) -> None:
        """Raise RankError when another rank failed or is dead."""
        if self._base.check(["failure"]):
            failure = json.loads(self._base.get("failure"))
            if failure["rank"] != self.rank:
                cause = f"stopped at {where}, because rank {failure['rank']} failed: " if failure["cause"] else ""
                raise RankError(cause + failure["message"], hint=_KEPT, rank=failure["rank"] or None)
        for rank in range(self.size):
            if rank != self.rank and not self._base.check([f"left/{rank}"]) and self._is_dead(rank):
                self._raise_dead(rank, where)

    def _is_dead(self, rank: int) -> bool:
        if rank not in self._others:
            if not self._base.check([f"who/{rank}"]):
                return False  # it is still starting; its launcher watches that
            self._others[rank] = json.loads(self._base.get(f"who/{rank}"))
        other = self._others[rank]
        if other["machine"] == _machine():
            return not _runs(int(other["process"]))
        beat = self._base.get(f"beat/{rank}") if self._base.check([f"beat/{rank}"]) else b""
        last, since = self._heard.get(rank, (b"", time.monotonic()))
        if beat != last or rank not in self._heard:
            since = time.monotonic()
        self._heard[rank] = (beat, since)
        return time.monotonic() - since > _SILENT_SECONDS

    def _raise_dead(self, rank: int, where: str) -> None:
        other = self._others[rank]
        raise RankError(
            f"rank {rank} of {self.size} (process {other['process']} on {other['machine'].split()[0]}) died without"
            f" a word; the others stopped at {where}",
            hint=_MEMORY + _KEPT,
            rank=rank,
        )

    def _give_up(self, error: RuntimeError) -> None:
        """Raise what stands behind a broken sum; the failed rank's own word may come a moment later."""
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            with self._answering():
                self._look("a sum of gradients")
            time.sleep(_POLL_SECONDS[1])
        raise RankError(f"rank {self.rank} lost the others in a sum of gradients: {error}", hint=_KEPT) from error

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:  # torch's DistError and its kin
            raise RankError(
                f"rank {self.rank} of {self.size} lost the store that the processes meet at: {error}",
                hint=f"the first machine or its launcher is gone; {_KEPT}",
            ) from error

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(_BEAT_SECONDS):
            number += 1
            try:
                self._pulse.set(f"beat/{self.rank}", str(number))
            except RuntimeError:
                return


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks that the launcher started; `ALONE` where there is no other.

    Whatever leaves the block is told to the others, which stop with a RankError of their own; SIGTERM becomes one too.
    """
    place = Place.of(environment)
    if place is None:
        yield ALONE
        return
    use_cores(place.local_size, environment)
    with _terminable():
        group = Group(place)
        try:
            yield group
        except _TerminatedError:
            raise group.terminated() from None
        except RankError as error:
            group.failed(error)
            raise
        except BaseException as error:
            if not group.failed(error):
                group._look("the same moment")
            raise
        finally:
            group.close()


@contextmanager
def _terminable() -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: what follows is cleaning up
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the message is still to be printed
        raise
    signal.signal(signal.SIGTERM, before)


def use_cores(processes: int, environment: Mapping[str, str]) -> None:
    """Give each of `processes` on this machine its share of the cores, unless the user set OMP_NUM_THREADS.

    torchrun sets it to 1 where the user did not; its own environment still tells what the user said.
    """
    chosen = environment.get("OMP_NUM_THREADS")
    if chosen == "1" and "TORCHELASTIC_RUN_ID" in environment and not _launcher_has("OMP_NUM_THREADS"):
        chosen = None
    if chosen is None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def _launcher_has(variable: str) -> bool:
    """Whether the process that started this one was started with `variable`; True where that cannot be known."""
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(entry.startswith(f"{variable}=".encode()) for entry in entries)


def _machine() -> str:
    """Tells machines, and containers with processes of their own, apart."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} "


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive; one that waits to be reaped is not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return state not in ("Z", "X")


def sum_gradients(ranks: Ranks, parameters: Sequence[torch.nn.Parameter], loss: Tensor, present: bool) -> float:
    """Replace the gradients of `parameters` by their sums over the ranks; returns the sum of `loss` (a scalar).

    Rows of a sparse gradient that no rank touched stay absent, so that their optimizer state is not moved. All ranks
    must hold the same parameters, with gradients at the same ones; one without a share of its own in the batch is not
    `present`, its gradients are zero and its rows do not count.
    """
    if ranks.size == 1:
        return float(loss.detach())
    live = [parameter for parameter in parameters if parameter.grad is not None]
    pieces = [loss.detach().reshape(1)]
    for parameter in live:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            touched = torch.zeros(len(gradient))
            touched[gradient.coalesce().indices()[0]] = float(present)
            pieces += [touched, gradient.to_dense().flatten()]
        else:
            pieces.append(gradient.flatten())
    sums = list(
        torch.from_numpy(ranks.total(torch.cat(pieces).numpy())).split_with_sizes([len(piece) for piece in pieces])
    )
    total = float(sums.pop(0))
    for parameter in live:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            rows = sums.pop(0).nonzero().flatten()
            values = sums.pop(0).reshape(parameter.shape)[rows]
            parameter.grad = torch.sparse_coo_tensor(
                rows.unsqueeze(0), values, parameter.shape, check_invariants=False
            ).coalesce()
        else:
            parameter.grad = sums.pop(0).reshape(parameter.shape)
    return total


def sum_floats(ranks: Ranks, *values: float) -> list[float]:
    """The sums of every rank's values, float64."""
    return [float(value) for value in ranks.total(np.asarray(values, dtype=np.float64))]
