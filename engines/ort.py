"""ONNX Runtime: sessions on the CPU, with and without graph optimizations."""

import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dmqexport.errors import BackendMissingError, EngineError
from engines.runner import Arrays


class Optimization(Enum):
    """REFERENCE executes every node as written (the meaning of the graph); FAST lets the runtime fuse."""

    REFERENCE = "reference"
    FAST = "fast"


def version() -> str | None:
    """Version of onnxruntime, None when it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


class OrtRunner:
    """An ONNX graph on the CPU. Inputs and outputs are numpy arrays by name."""

    def __init__(
        self,
        path: Path,
        *,
        optimization: Optimization = Optimization.FAST,
        threads: int | None = None,
        config: Mapping[str, str] | None = None,
        profile_prefix: str | None = None,
    ) -> None:
        """Load `path`. threads: None takes every physical core the process may use.

        profile_prefix: where `session.end_profiling()` writes the time of every node.

        Raises BackendMissingError without onnxruntime, EngineError when the graph does not load.
        """
        self.path = path
        self.session = _session(path, optimization, threads or available_cores(), config or {}, profile_prefix)
        self.input_names: tuple[str, ...] = tuple(item.name for item in self.session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(item.name for item in self.session.get_outputs())

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Execute once; returns `outputs` (default: all) by name. Raises EngineError on missing or misshapen inputs."""
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise EngineError(f"{self.path.name}: inputs {missing} missing, got {sorted(inputs)}")
        names = list(outputs) if outputs is not None else list(self.output_names)
        try:
            values = self.session.run(names, {name: inputs[name] for name in self.input_names})
        except Exception as error:  # onnxruntime raises its own untyped errors
            shapes = {name: (inputs[name].dtype.name, inputs[name].shape) for name in self.input_names}
            raise EngineError(f"{self.path.name}: onnxruntime failed on inputs {shapes}: {error}") from error
        return dict(zip(names, values, strict=True))


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _session(
    path: Path, optimization: Optimization, threads: int, config: Mapping[str, str], profile_prefix: str | None
) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError("onnxruntime is not installed", hint="pip install 'dmqexport[cpu]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures reach the user as our errors
    levels = onnxruntime.GraphOptimizationLevel
    reference = optimization is Optimization.REFERENCE
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if reference else levels.ORT_ENABLE_ALL
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own untyped errors
        raise EngineError(f"{path}: onnxruntime cannot load this graph: {error}") from error
