"""Finished blocks on disk, so that a killed block-wise training goes on where it stopped."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmqexport.errors import CalibrationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockScore:
    """How training one block went.

    layers: how many it holds; before and after: mean squared error of its output on held-out entries behind the
    quantized blocks, with the plan's parameters and the trained ones; power: mean square of the float output; kept:
    whether the trained parameters stayed; seconds: time from capturing its inputs to its last measurement.
    """

    name: str
    layers: int
    before: float
    after: float
    power: float
    kept: bool
    seconds: float

    @property
    def error(self) -> float:
        """Mean squared error of the parameters that stayed."""
        return self.after if self.kept else self.before


class BlockCheckpoints:
    """One safetensors file a finished block in `folder`; `key` tells runs of different settings apart."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def save(self, number: int, score: BlockScore, state: dict[str, Tensor]) -> None:
        """Write block `number` (in order of training) under a temporary name, then rename it."""
        path = self._path(number)
        temporary = path.with_suffix(".tmp")
        metadata = {"key": self._key, "score": json.dumps(asdict(score))}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(temporary), metadata)
        temporary.replace(path)

    def load(self, number: int, name: str) -> tuple[BlockScore, dict[str, Tensor]] | None:
        """Score and parameters of block `number`, None when it is not there, damaged, or of another run."""
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                score = BlockScore(**json.loads(metadata["score"]))
                state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            logger.warning("%s is damaged; the block is trained again", path)
            return None
        if score.name != name:
            raise CalibrationError(
                f"{path} holds block {score.name!r}, expected {name!r}", hint=f"remove {self._folder} and start again"
            )
        return score, state

    def _path(self, number: int) -> Path:
        return self._folder / f"block-{number:04d}.safetensors"
