"""A built TensorRT engine, run and judged: numpy arrays in and out, memory and clock of the GPU by CUDA's driver API.

Travels into bundles inside `finish_on_gpu.py` (see `engines.trt.write_finish_script`), so it imports nothing of ours,
and numpy only where there are arrays. The driver's library comes with every GPU; CUDA's runtime and its Python packages
need not be there.

Sources: https://docs.nvidia.com/cuda/cuda-driver-api (memory, streams, events) and
https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api (IExecutionContext.execute_async_v3).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import statistics
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
CAP_DB = 200.0


class RunError(Exception):
    """An engine that cannot be run as asked, or a call of the driver that failed."""


def load_driver() -> Any:
    """The CUDA driver's library, initialised; None where there is no driver or no GPU."""
    for name in DRIVERS:
        with contextlib.suppress(OSError):
            driver = ctypes.CDLL(name)
            return driver if driver.cuInit(0) == 0 else None
    return None


def gpu_arch() -> str | None:
    """Return the first GPU's architecture, "sm89", or None where the NVIDIA driver or a GPU is missing."""
    driver, device = load_driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    parts = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        parts.append(str(value.value))
    return "sm" + "".join(parts)


class Gpu:
    """Memory, one stream and a clock of the first GPU, in the primary context, which TensorRT's runtime uses too.

    Raises RunError where there is no GPU, and wherever the driver refuses.
    """

    def __init__(self) -> None:
        driver = load_driver()
        if driver is None:
            raise RunError("no NVIDIA GPU, or no driver for it, on this machine")
        self._driver = driver
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._do("cuCtxSetCurrent", context)
        self._do("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        name = ctypes.create_string_buffer(256)
        self._do("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode(errors="replace")
        self.stream = stream

    def _do(self, call: str, *arguments: Any) -> None:
        status = getattr(self._driver, call)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RunError(f"{call} failed: {(text.value or b'').decode(errors='replace') or f'status {status}'}")

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        address = ctypes.c_uint64()
        self._do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def release(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._do("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, array: Any, address: int) -> None:
        """Copy a contiguous numpy array to the device; ends when it is there."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._do("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes), self.stream)
        self.wait()

    def download(self, address: int, array: Any) -> None:
        """Fill a contiguous numpy array from the device."""
        goal = ctypes.c_void_p(array.ctypes.data)
        self._do("cuMemcpyDtoHAsync_v2", goal, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self.stream)
        self.wait()

    def wait(self) -> None:
        """Until all that was asked of the stream is done; a kernel's fault comes to light here."""
        self._do("cuStreamSynchronize", self.stream)

    def event(self) -> ctypes.c_void_p:
        """A mark to put into the stream."""
        event = ctypes.c_void_p()
        self._do("cuEventCreate", ctypes.byref(event), 0)
        return event

    def record(self, event: ctypes.c_void_p) -> None:
        """Put the mark behind what the stream holds."""
        self._do("cuEventRecord", event, self.stream)

    def elapsed_ms(self, first: ctypes.c_void_p, last: ctypes.c_void_p) -> float:
        """Milliseconds of the device's own clock between two marks that it has passed."""
        elapsed = ctypes.c_float()
        self._do("cuEventElapsedTime", ctypes.byref(elapsed), first, last)
        return elapsed.value

    def used_bytes(self) -> int:
        """Memory of the device that is taken, by whomever."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._do("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value


class EngineRunner:
    """A serialized engine, ready to run on the first GPU; `engines.runner.Runner`, but for the error it raises."""

    def __init__(self, module: str, engine: Path, gpu: Gpu | None = None) -> None:
        """module: "tensorrt" or "tensorrt_rtx". Raises RunError when the engine cannot be loaded here."""
        try:
            self._trt: Any = importlib.import_module(module)
        except Exception as error:  # a broken vendor install raises OSError, RuntimeError, ... as readily
            raise RunError(f"{module} cannot be imported: {error!r}") from error
        self.gpu = Gpu() if gpu is None else gpu
        before = self.gpu.used_bytes()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise RunError(
                f"{module} {self._trt.__version__} does not load {engine}: it is damaged, or was built by another "
                "version or for another GPU"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RunError(f"no execution context for {engine}: the GPU lacks the memory")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        self.input_names: tuple[str, ...] = tuple(inputs)
        self.output_names: tuple[str, ...] = tuple(name for name in names if name not in inputs)
        self.memory_bytes = max(0, self.gpu.used_bytes() - before)
        self._buffers: dict[str, tuple[int, int]] = {}

    @property
    def batch_sizes(self) -> tuple[int, int, int]:
        """Smallest, usual and largest batch that the engine was built for."""
        low, usual, high = self._engine.get_tensor_profile_shape(self.input_names[0], 0)
        return int(low[0]), int(usual[0]), int(high[0])

    def example_inputs(self, batch: int) -> dict[str, Any]:
        """Inputs of `batch` samples: float ones standard normal, integers zero."""
        import numpy as np

        random, made = np.random.default_rng(0), {}
        for name in self.input_names:
            _, usual, _ = self._engine.get_tensor_profile_shape(name, 0)
            shape, dtype = (batch, *tuple(usual)[1:]), np.dtype(self._dtype(name))
            made[name] = random.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
        return made

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Execute once; numpy arrays of `outputs` (default: all) by name. Raises RunError."""
        import numpy as np

        unknown = sorted(set(outputs or ()) - set(self.output_names))
        if unknown:
            raise RunError(f"the engine has no outputs {unknown}; it has {list(self.output_names)}")
        found = self._bind(inputs)
        self._execute()
        for name, array in found.items():
            self.gpu.download(self._buffers[name][0], array)
        return {name: np.asarray(found[name]) for name in outputs or self.output_names}

    def time_ms(self, inputs: Mapping[str, Any], runs: int, warmup: int) -> list[float]:
        """Milliseconds of `runs` executions on the device's clock, copies left out. Raises RunError."""
        self._bind(inputs)
        for _ in range(warmup):
            self._execute()
        self.gpu.wait()
        first, last = self.gpu.event(), self.gpu.event()
        times = []
        for _ in range(runs):
            self.gpu.record(first)
            self._execute()
            self.gpu.record(last)
            self.gpu.wait()
            times.append(self.gpu.elapsed_ms(first, last))
        return times

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self.gpu.stream.value or 0):
            raise RunError("the engine refused to execute; TensorRT's messages say why")

    def _bind(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs to the device, room for the outputs there; returns empty arrays for these."""
        import numpy as np

        if set(inputs) != set(self.input_names):
            raise RunError(f"the engine takes the inputs {list(self.input_names)}, not {sorted(inputs)}")
        for name, value in inputs.items():
            array = np.ascontiguousarray(value, dtype=self._dtype(name))
            if not self._context.set_input_shape(name, array.shape):
                low, _, high = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))
                raise RunError(f"input {name!r} has shape {array.shape}; the engine was built for {low} to {high}")
            self.gpu.upload(array, self._room(name, array.nbytes))
        found = {}
        for name in self.output_names:
            found[name] = np.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._dtype(name))
            self._room(name, found[name].nbytes)
        for name, (address, _) in self._buffers.items():
            if not self._context.set_tensor_address(name, address):
                raise RunError(f"tensor {name!r} cannot be bound")
        return found

    def _dtype(self, name: str) -> Any:
        try:
            return self._trt.nptype(self._engine.get_tensor_dtype(name))
        except TypeError as error:
            raise RunError(f"tensor {name!r} has a type that numpy lacks: {error}") from error

    def _room(self, name: str, size: int) -> int:
        address, held = self._buffers.get(name, (0, -1))
        if held < size:
            if held >= 0:
                del self._buffers[name]
                self.gpu.release(address)
            address = self.gpu.allocate(size)
            self._buffers[name] = (address, size)
        return address


def judge(runner: EngineRunner, reference: Path, tolerance_db: float) -> dict[str, Any]:
    """Compare an engine with what the build kept: inputs, the float model's answers, and the exact quantized graph's.

    Both executions of one quantized network err against the float model; `passed` says that the engine errs no more
    than `tolerance_db` above the exact graph. reference: an .npz with "input:<name>", "float:<output>" and
    "exact:<output>", float32 [samples, ...]. Raises RunError.
    """
    import numpy as np

    try:
        with np.load(reference, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        name = runner.output_names[0]
        target, exact = arrays[f"float:{name}"], arrays[f"exact:{name}"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{reference} cannot be read: {error!r}") from error
    inputs = {key.partition(":")[2]: value for key, value in arrays.items() if key.startswith("input:")}
    low, _, high = runner.batch_sizes
    answers = np.empty_like(target)
    for start in range(0, len(target), high):
        stop = min(start + high, len(target))
        index = np.arange(start, max(stop, start + low)) % len(target)  # a part too small is filled up
        part = runner.run({key: value[index] for key, value in inputs.items()})[name]
        answers[start:stop] = part[: stop - start]
    engine_db, exact_db = _sqnr_db(target, answers), _sqnr_db(target, exact)
    return {
        "samples": len(target),
        "sqnr_db": engine_db,
        "exact_sqnr_db": exact_db,
        "distance_db": _sqnr_db(exact, answers),
        "tolerance_db": tolerance_db,
        "passed": bool(np.isfinite(answers).all()) and engine_db >= exact_db - tolerance_db,
    }


def _sqnr_db(signal: Any, noisy: Any) -> float:
    """10 log10(energy of the signal / energy of the difference), within CAP_DB; -CAP_DB where one is no number."""
    signal, noisy = signal.astype("float64"), noisy.astype("float64")
    energy, noise = float((signal**2).sum()), float(((noisy - signal) ** 2).sum())
    if noise != noise or energy == 0:
        return -CAP_DB
    return CAP_DB if noise == 0 else min(CAP_DB, 10 * math.log10(energy / noise))


def bench(runner: EngineRunner, runs: int, warmup: int = 10) -> list[dict[str, Any]]:
    """Time the engine at its smallest, usual and largest batch; times are medians on the device's clock.

    Inputs are noise and zeros, all samples of one timestep, as samplers call: no value changes what a kernel takes.
    """
    rows = []
    for batch in sorted(set(runner.batch_sizes)):
        times = sorted(runner.time_ms(runner.example_inputs(batch), runs, warmup))
        median = statistics.median(times)
        rows.append(
            {
                "batch": batch,
                "median_ms": median,
                "p90_ms": times[min(len(times) - 1, int(0.9 * len(times)))],
                "samples_per_second": 1000 * batch / max(median, 1e-6),
                "runs": runs,
            }
        )
    return rows
