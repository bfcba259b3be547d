"""What of NVIDIA's package runs engines. An "engine" here is JSON that names a graph and its shape ranges; ONNX Runtime
computes it, from and to the addresses that were bound."""

import ctypes
import json
from enum import Enum
from typing import Any

import numpy as np
import onnxruntime

__version__ = "10.99.1"

_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Logger:
    WARNING = 1

    def __init__(self, severity: int) -> None:
        self.severity = severity


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


def nptype(dtype: Any) -> Any:
    return dtype


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> "_Engine | None":
        try:
            return _Engine(**json.loads(plan))
        except ValueError:
            return None


class _Engine:
    def __init__(self, onnx: str, profiles: dict[str, Any]) -> None:
        self.profiles = profiles
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.tensors = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.OUTPUT if name in self.outputs else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self.tensors[name].type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        return [tuple(self.profiles[name][kind]) for kind in ("min", "opt", "max")]

    def create_execution_context(self) -> "_Context":
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        fits = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        return tuple(size if isinstance(size, int) else batch for size in self.engine.outputs[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.tensors

    def execute_async_v3(self, stream: int) -> bool:
        if stream != 2:
            return False
        inputs = {name: self._view(name, shape).copy() for name, shape in self.shapes.items()}
        for name, value in zip(self.engine.outputs, self.engine.session.run(None, inputs), strict=True):
            self._view(name, self.get_tensor_shape(name))[...] = value
        return True

    def _view(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)
