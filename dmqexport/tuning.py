"""How each kind of layer is fastest on a CPU: measured once, kept by CPU and runtime, and chosen from.

Times are inputs of a build, never silent: a build says which layers they moved, and the file they came from can be
given to another one (`lowering.tune`).
"""

import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dmqexport.errors import RecipeError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
#: Another kernel must take at most this share of the integer product's time: what is nearer differs from run to run.
WORTHWHILE = 0.9


class Kernel(StrEnum):
    """How ONNX Runtime multiplies a quantized layer. PRODUCT: im2col and a fused integer product; CONV_INTEGER: its
    integer convolution; FLOAT: a float32 operator on the dequantized codes. All compute the same function.
    """

    PRODUCT = "int8"
    CONV_INTEGER = "conv-integer"
    FLOAT = "float"


@dataclass(frozen=True)
class Timings:
    """What was measured on one machine. times: milliseconds by signature of a layer, then by kernel."""

    cpu: str
    runtime: str
    times: Mapping[str, Mapping[Kernel, float]]

    def choose(self, signatures: Mapping[str, str]) -> dict[str, Kernel]:
        """Kernel of every layer (name → signature) that another one than the integer product suits better."""
        chosen: dict[str, Kernel] = {}
        for name, signature in signatures.items():
            times = self.times.get(signature, {})
            if Kernel.PRODUCT not in times:
                continue
            best = min(times, key=lambda kernel: times[kernel])
            if times[best] <= WORTHWHILE * times[Kernel.PRODUCT] and best is not Kernel.PRODUCT:
                chosen[name] = best
        return chosen

    def merged(self, times: Mapping[str, Mapping[Kernel, float]]) -> "Timings":
        """These and newer ones."""
        return Timings(self.cpu, self.runtime, {**self.times, **times})

    def to_json(self) -> str:
        """The file that `read_timings` reads."""
        document = {"schema_version": SCHEMA_VERSION, "cpu": self.cpu, "runtime": self.runtime, "times": self.times}
        return json.dumps(document, indent=1, sort_keys=True) + "\n"


def cpu_model() -> str:
    """The processor's name, and what of it matters to integer products; the architecture where there is no name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = {key: match[1].strip() for key in ("vendor_id", "cpu family", "model", "model name", "flags")
              if (match := re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE))}  # fmt: skip
    flags = sorted(set(fields.pop("flags", "").split()) & {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"})
    name = " ".join([*(fields[key] for key in sorted(fields)), *flags])
    return name or platform.processor() or platform.machine()


def cache_file(cpu: str, runtime: str) -> Path:
    """Where timings of this CPU and runtime are kept: XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{cpu} ort {runtime}").strip("-").lower()
    return folder / "dmqexport" / "tuning" / f"{words}.json"


def load_cache(cpu: str, runtime: str) -> Timings:
    """What is known of this machine; nothing where the file is missing, damaged or of another machine."""
    empty = Timings(cpu, runtime, {})
    path = cache_file(cpu, runtime)
    try:
        known = read_timings(path)
    except RecipeError as error:
        if path.exists():
            logger.warning("measuring kernels anew: %s", error.message)
        return empty
    if (known.cpu, known.runtime) != (cpu, runtime):
        logger.warning("measuring kernels anew: %s is of %s, onnxruntime %s", path, known.cpu, known.runtime)
        return empty
    return known


def store_cache(timings: Timings) -> bool:
    """Keep timings for later builds, in one rename; False (and a warning) where the folder cannot be written."""
    path = cache_file(timings.cpu, timings.runtime)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            file.write(timings.to_json())
        temporary.replace(path)
    except OSError as error:
        logger.warning("kernel timings are not kept: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        return False
    return True


def read_timings(path: Path) -> Timings:
    """Read a file of timings; raises RecipeError when it is missing or is none."""
    hint = "give off, host, or a file that a build with lowering.tune=host left"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: kernel timings cannot be read ({error})", hint=hint) from error
    try:
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {document['schema_version']}, this version reads {SCHEMA_VERSION}")
        times = {
            str(signature): {Kernel(kernel): _positive(ms) for kernel, ms in kernels.items()}
            for signature, kernels in document["times"].items()
        }
        return Timings(str(document["cpu"]), str(document["runtime"]), times)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path}: these are no kernel timings ({error!r})", hint=hint) from error


def _positive(ms: object) -> float:
    if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 < ms < float("inf"):
        raise ValueError(f"{ms!r} is no number of milliseconds")
    return float(ms)
