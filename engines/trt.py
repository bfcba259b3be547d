"""TensorRT and TensorRT-RTX: build engines in a child process, or hand the build to a machine with a GPU.

One code path serves TensorRT 10 and 11 and TensorRT-RTX; the caller says which by `TrtFlavor`. TensorRT needs a GPU to
build, TensorRT-RTX does not. The builder itself is driven by `engines.trt_standalone`.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/ and .../tensorrt-rtx/latest/.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dmqexport.errors import BackendMissingError, EngineError, ResourceError
from engines import trt_layers, trt_run, trt_standalone
from engines.runner import Arrays
from engines.trt_layers import EngineLayer
from engines.trt_standalone import BuildError

_log = logging.getLogger(__name__)

FINISH_SCRIPT = "finish_on_gpu.py"


class TrtFlavor(Enum):
    """Which of the vendor's two builders; the value is the target's name in paths and recipes."""

    TRT = "trt"
    RTX = "trt-rtx"

    @property
    def module(self) -> str:
        """Python package of the vendor."""
        return "tensorrt" if self is TrtFlavor.TRT else "tensorrt_rtx"

    @property
    def package(self) -> str:
        """What pip installs on a machine that only finishes a bundle."""
        return "tensorrt" if self is TrtFlavor.TRT else "tensorrt-rtx-cu13"

    @property
    def extra(self) -> str:
        """Extra of dmqexport that installs it."""
        return "gpu" if self is TrtFlavor.TRT else "rtx"

    @property
    def needs_gpu(self) -> bool:
        """Whether building needs a GPU; running always does."""
        return self is TrtFlavor.TRT


@dataclass(frozen=True)
class ShapeRange:
    """Extents of one dynamic input: smallest, the one tuned for, largest; static dimensions repeat theirs."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise EngineError unless the three have one rank and 1 <= min <= opt <= max everywhere."""
        same_rank = len(self.min) == len(self.opt) == len(self.max)
        if not same_rank or any(
            not 1 <= low <= mid <= high for low, mid, high in zip(self.min, self.opt, self.max, strict=True)
        ):
            raise EngineError(
                f"a shape range needs 1 <= min <= opt <= max everywhere, got {self.min}, {self.opt}, {self.max}",
                hint="give three shapes of the input's rank",
            )


class Hardware(Enum):
    """Which GPUs an engine of TensorRT runs on beside the one it was built on."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"


@dataclass(frozen=True)
class BuildOptions:
    """What a builder is told beside the graph, which holds every precision.

    workspace_bytes: GPU scratch memory of a kernel; timing_cache: file of measured kernels, read and written;
    hardware, version_compatible: other GPUs and versions the engine must run with; refit: weights can be replaced
    later. Options that the installed version does not have are refused.
    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html
    """

    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    hardware: Hardware = Hardware.NONE
    version_compatible: bool = False
    refit: bool = False

    def to_json(self) -> dict[str, Any]:
        """As the builder's process and the finish script read it."""
        cache = None if self.timing_cache is None else str(self.timing_cache.resolve())
        return {**asdict(self), "hardware": self.hardware.value, "timing_cache": cache}


@dataclass(frozen=True)
class EngineBuild:
    """A built engine: where it lies, what it cost, and the kernels it consists of."""

    engine_path: Path
    log_path: Path
    flavor: TrtFlavor
    version: str
    size_bytes: int
    seconds: float
    peak_rss_bytes: int | None
    layers: tuple[EngineLayer, ...]


@dataclass(frozen=True)
class FinishScript:
    """The script left in a bundle for a GPU host: its path and the command that runs it there."""

    path: Path
    command: str


def flavor_version(flavor: TrtFlavor) -> str | None:
    """Return the installed version of the flavor's package, or None where it is missing or broken; never raises.

    Takes up to a second: the package is imported in a child process, since a broken native library may abort.
    """
    try:
        if importlib.util.find_spec(flavor.module) is None:
            return None
    except (ImportError, ValueError):
        return None
    return trt_standalone.vendor_version(flavor.module)


def gpu_architecture() -> str | None:
    """The first GPU's architecture, "sm89", or None where the driver or a GPU is missing."""
    return trt_run.gpu_arch()


def gpu_present() -> bool:
    """Whether the NVIDIA driver is here and sees a GPU."""
    return trt_run.gpu_arch() is not None


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    flavor: TrtFlavor,
    profiles: Mapping[str, ShapeRange],
    log_path: Path,
    timeout_s: float | None = None,
    max_ram_bytes: int | None = None,
    options: BuildOptions | None = None,
) -> EngineBuild:
    """Build `onnx_path` (external data beside it) to `engine_path`, in a child process, and list its layers.

    The graph's own types and Q/DQ decide every precision. `profiles`: one range for each input with a dynamic
    dimension. `log_path` receives the builder's verbose log. `max_ram_bytes` limits the child's resident memory
    (watched on Linux).

    Raises BackendMissingError where the flavor (or the GPU it needs) is missing, ResourceError where the memory limit
    or the disk ends it, EngineError where the graph is refused, the builder dies or time runs out.
    """
    _require(flavor)
    if not onnx_path.is_file():
        raise EngineError(f"there is no ONNX graph at {onnx_path}", hint="export and lower the model first")
    request = {
        "module": flavor.module,
        "onnx": str(onnx_path.resolve()),
        "engine": str(engine_path.resolve()),
        "profiles": _profiles_json(profiles),
        **(options or BuildOptions()).to_json(),
        "inspect": flavor.needs_gpu,
    }
    try:
        result = trt_standalone.build_in_child(request, log_path, timeout_s=timeout_s, max_ram_bytes=max_ram_bytes)
    except BuildError as failure:
        raise _teach(failure, flavor, onnx_path) from failure
    except OSError as error:
        raise ResourceError(f"the build log {log_path} cannot be written: {error}") from error
    layers = tuple(trt_layers.layer_from_json(layer) for layer in result["layers"])
    if not layers:
        raise EngineError(
            f"{flavor.module} {result['version']} built {engine_path} but listed no layers, so nothing can be proven",
            hint=f"this version's log format is unknown to dmqexport; please report it with {log_path}",
        )
    _log.info("built %s with %s %s in %.1f s", engine_path, flavor.module, result["version"], result["seconds"])
    return EngineBuild(
        engine_path=engine_path,
        log_path=log_path,
        flavor=flavor,
        version=result["version"],
        size_bytes=result["size_bytes"],
        seconds=result["seconds"],
        peak_rss_bytes=result["peak_rss_bytes"],
        layers=layers,
    )


def find_engine(engines: Path, flavor: TrtFlavor) -> Path | None:
    """The engine below `engines` that this machine's GPU and installed version run; None where there is none."""
    version, arch = flavor_version(flavor), gpu_architecture()
    if version is None or arch is None:
        return None
    candidates = trt_standalone.engine_folders(engines, flavor.value, arch, version)
    return next((folder / "engine.plan" for folder in candidates if (folder / "engine.plan").is_file()), None)


class TrtRunner:
    """A built engine as a `Runner`: it runs on the first GPU, arrays come from and go to the host."""

    def __init__(self, engine: Path, flavor: TrtFlavor) -> None:
        """Raises EngineError when the engine cannot be loaded here, or there is no GPU."""
        try:
            self._runner = trt_run.EngineRunner(flavor.module, engine)
        except trt_run.RunError as error:
            raise EngineError(
                str(error), hint="dmqexport inspect --rebuild builds the engine for this machine"
            ) from error
        except OSError as error:
            raise EngineError(f"{engine} cannot be read: {error}") from error

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return self._runner.input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return self._runner.output_names

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Execute once; returns `outputs` (default: all) by name. Raises EngineError."""
        try:
            return self._runner.run(inputs, outputs)
        except trt_run.RunError as error:
            raise EngineError(str(error)) from error


def write_finish_script(
    bundle: Path,
    onnx_relpath: str,
    *,
    flavor: TrtFlavor,
    profiles: Mapping[str, ShapeRange],
    expected: Mapping[str, tuple[str, Sequence[str | Sequence[str]]]],
    engines_relpath: str = "engines",
    options: BuildOptions | None = None,
    reference_relpath: str | None = None,
) -> FinishScript:
    """Write `finish_on_gpu.py` into `bundle`, for a machine with the GPU and the vendor's package and nothing else.

    It builds `onnx_relpath` (relative to the bundle) with the settings of `build_engine`, proves every layer of
    `expected` (see `engines.precision.prove_types`) by the engine inspector, writes
    "<engines_relpath>/<flavor>-<arch>-<version>/engine.plan" unless one for the machine is there, compares its answers
    with those in `reference_relpath` (see `engines.trt_run.judge`; None: nothing to compare with), and times it. All
    relative paths use "/".

    Raises EngineError for a path that leaves the bundle.
    """
    for relative in (onnx_relpath, engines_relpath, reference_relpath or "."):
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise EngineError(f"{relative!r} leaves the bundle", hint="give paths relative to the bundle's folder")
    request = {
        "module": flavor.module,
        "package": flavor.package,
        "target": flavor.value,
        "onnx": onnx_relpath,
        "engines": engines_relpath,
        "reference": reference_relpath,
        "profiles": _profiles_json(profiles),
        **(options or BuildOptions()).to_json(),
        "timing_cache": "timing.cache" if options is not None and options.timing_cache is not None else None,
        "expected": {name: [kind, list(nodes)] for name, (kind, nodes) in expected.items()},
    }
    source = _one_file()
    blank = 'BUNDLE_REQUEST = ""\n'
    assert source.count(blank) == 1, "trt_standalone.py must hold exactly one blank request"
    # In a raw string JSON's backslashes stay; its only possible end, a quote, is spelled as an escape.
    text = json.dumps(request, indent=1).replace("'", "\\u0027")
    path = bundle / FINISH_SCRIPT
    try:
        path.write_text(source.replace(blank, f"BUNDLE_REQUEST = r'''{text}'''\n"), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error}") from error
    return FinishScript(path, f"python {FINISH_SCRIPT}")


def _one_file() -> str:
    """The source of `trt_standalone`, with that of our modules in the place of their imports: a script of its own."""
    source = Path(trt_standalone.__file__).read_text(encoding="utf-8")
    for module in (trt_layers, trt_run):
        future = "from __future__ import annotations\n"
        body = Path(str(module.__file__)).read_text(encoding="utf-8").partition(future)[2]
        found = re.findall(rf"^from {re.escape(module.__name__)} import .*\n", source, re.MULTILINE)
        assert len(found) == 1, f"trt_standalone.py must import {module.__name__} in one line"
        source = source.replace(found[0], body.lstrip("\n"))
    return source


def _require(flavor: TrtFlavor) -> None:
    """Raise BackendMissingError unless the flavor can build here."""
    if importlib.util.find_spec(flavor.module) is None:
        raise BackendMissingError(
            f"the target {flavor.value!r} needs the Python package {flavor.module}, which is not installed",
            hint=f"pip install 'dmqexport[{flavor.extra}]', or run the bundle's {FINISH_SCRIPT} on a GPU machine",
        )
    if flavor.needs_gpu and not gpu_present():
        raise BackendMissingError(
            f"{flavor.module} builds engines only where an NVIDIA GPU is, and none is visible here",
            hint=f"run the bundle's {FINISH_SCRIPT} on the GPU machine, or build for {TrtFlavor.RTX.value!r} here",
        )


def _profiles_json(profiles: Mapping[str, ShapeRange]) -> dict[str, dict[str, list[int]]]:
    return {name: {"min": list(r.min), "opt": list(r.opt), "max": list(r.max)} for name, r in profiles.items()}


def _teach(
    failure: BuildError, flavor: TrtFlavor, onnx_path: Path
) -> EngineError | BackendMissingError | ResourceError:
    where = f"{flavor.module} on {onnx_path}: {failure.message}"
    if failure.kind == "backend":
        return BackendMissingError(where, hint=f"pip install 'dmqexport[{flavor.extra}]' repairs the installation")
    if failure.kind in ("memory", "io"):
        return ResourceError(where, hint="free memory or disk, raise the limit, or build on a larger machine")
    hints = {
        "crash": "the builder crashes on run-time scales into a convolution, among others; "
        "`polygraphy debug reduce` finds the smallest failing graph",
        "timeout": "raise the time limit; a gigabyte of weights takes about 15 s on two cores",
        "profile": "give one shape range for each input with a dynamic dimension, and no other",
        "option": "leave the option out, or build with a version that has it",
        "parse": "the graph has an operator, type or zero-point that this version does not accept",
    }
    return EngineError(where, hint=hints.get(failure.kind, "the errors before these lines are in the log"))
