"""What every runtime offers: named arrays in, named arrays out."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray[Any, Any]]


class Runner(Protocol):
    """A graph that is ready to run."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the graph's order."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the graph's order."""
        ...

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Execute once; returns `outputs` (default: all) by name. Raises EngineError."""
        ...
