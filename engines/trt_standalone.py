# ruff: noqa: T201 - this file is also a script that runs where dmqexport is not installed; there, print is its output
"""Build a TensorRT engine, prove that its quantized layers multiply int8 by int8, run it. Standard library only.

This one file runs in three places, so that they cannot differ: as the child process of `engines.trt` (a builder may
crash, and must not take the caller along), inside a bundle as `finish_on_gpu.py` (on a machine that has TensorRT and a
GPU but no dmqexport), and imported, for its pure functions. It needs Python 3.9, `tensorrt` 10 or later or
`tensorrt_rtx` to build, and numpy to run.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html (explicit
quantization), .../performance/best-practices.html ("Layers:" listing and engine inspector).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from engines.trt_layers import EngineLayer, describe, examine, layer_from_json, parse_inspector, parse_layers
from engines.trt_run import EngineRunner, RunError, bench, gpu_arch, judge

EXIT_FAILED, EXIT_GATE, EXIT_RESOURCE, EXIT_BACKEND = 1, 3, 5, 7
LOG_TAIL_LINES = 12
POLL_SECONDS = 0.1

# -P: neither the folder of this file nor the working folder may shadow a vendor's package
_PYTHON = (sys.executable, "-P") if sys.version_info >= (3, 11) else (sys.executable,)


class BuildError(Exception):
    """A build or proof that ended without a usable engine; `kind` says which way.

    Kinds: "backend" (vendor or GPU missing), "parse", "profile", "option", "build", "proof", "crash", "timeout",
    "memory", "io"; and of a built engine "run" and "gate" (it errs more than it may).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


# --- the build --------------------------------------------------------------------------------------------------------


def build_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Build the requested engine in this process, write it to request["engine"], and return what was built.

    Every message of the builder goes to stderr. Raises BuildError; a builder that crashes takes the process along.

    Request keys: "module" (vendor package), "onnx", "engine", "partial" (paths; the engine is written to
    the latter and renamed), "profiles" {input: {min, opt, max}}, "inspect" (whether to load the engine and ask its
    inspector; needs a GPU), and the fields of `engines.trt.BuildOptions`.
    """
    try:
        trt: Any = importlib.import_module(str(request["module"]))
    except Exception as error:  # a broken vendor install raises OSError, RuntimeError, ... as readily as ImportError
        raise BuildError("backend", f"{request['module']} cannot be imported: {error!r}") from error
    engine = Path(request["engine"])
    try:
        engine.parent.mkdir(parents=True, exist_ok=True)  # known now rather than after a build of minutes
    except OSError as error:
        raise BuildError("io", f"the engine cannot be written to {engine}: {error}") from error
    listing: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                listing.append(message)
            sys.stderr.write(f"[{severity.name}] {message}\n")

    logger = Log()
    started = time.monotonic()
    builder = trt.Builder(logger)
    if builder is None:  # a vendor package that finds no driver
        raise BuildError("backend", f"{request['module']} has no usable device")
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    typed = getattr(flags, "STRONGLY_TYPED", None)  # the only kind of network from version 11 on: the flag may go
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request["onnx"])):  # by path, or external data would not be found
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError("parse", f"the graph cannot be parsed: {errors}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    cache = _apply_options(trt, config, request)
    _add_profile(builder, network, config, request["profiles"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError("build", "the builder returned no engine; its errors are in the log")
    seconds = time.monotonic() - started
    partial = Path(request["partial"])
    try:
        partial.write_bytes(plan)
        partial.replace(engine)  # a reader sees the whole engine or none
        if cache is not None:
            partial.write_bytes(config.get_timing_cache().serialize())
            partial.replace(str(request["timing_cache"]))
    except OSError as error:
        raise BuildError("io", f"the engine cannot be written to {engine}: {error}") from error
    layers = _inspect(trt, logger, plan) if request.get("inspect") else []
    source = "inspector" if layers else "log"
    return {
        "version": str(trt.__version__),
        "size_bytes": engine.stat().st_size,
        "seconds": seconds,
        "peak_rss_bytes": _peak_rss_bytes(),
        "layers_from": source,
        "layers": [asdict(layer) for layer in layers or parse_layers("\n".join(listing[-1:]))],
    }


def _apply_options(trt: Any, config: Any, request: Mapping[str, Any]) -> Any:
    """Set what was asked for beside the graph; return the timing cache, None without one.

    Raises BuildError where this version has no such option: an engine that lacks what was asked for is worse.
    """

    def option(enum: str, name: str) -> Any:
        value = getattr(getattr(trt, enum, None), name, None)
        if value is None:
            raise BuildError("option", f"{request['module']} {trt.__version__} has no {enum}.{name}")
        return value

    if request.get("workspace_bytes"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request["workspace_bytes"]))
    for key, flag in (("version_compatible", "VERSION_COMPATIBLE"), ("refit", "REFIT")):
        if request.get(key):
            config.set_flag(option("BuilderFlag", flag))
    if request.get("hardware", "none") != "none":
        level = str(request["hardware"]).upper().replace("-", "_")
        config.hardware_compatibility_level = option("HardwareCompatibilityLevel", level)
    if not request.get("timing_cache"):
        return None
    path = Path(str(request["timing_cache"]))
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):  # False: not one of another device
        raise BuildError("option", f"the timing cache {path} is damaged, or of another version or device: remove it")
    return cache


def _add_profile(builder: Any, network: Any, config: Any, profiles: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    unknown = sorted(set(profiles) - set(inputs))
    open_ended = sorted(name for name, shape in inputs.items() if -1 in shape and name not in profiles)
    if unknown or open_ended:
        raise BuildError(
            "profile",
            f"shape ranges do not fit the graph's inputs {inputs}: unknown {unknown}, dynamic without a range "
            f"{open_ended}",
        )
    if not profiles:
        return
    profile = builder.create_optimization_profile()
    for name, ranges in profiles.items():
        if len(ranges["min"]) != len(inputs[name]):
            raise BuildError("profile", f"input {name!r} has shape {inputs[name]}, its range is {dict(ranges)}")
        profile.set_shape(name, tuple(ranges["min"]), tuple(ranges["opt"]), tuple(ranges["max"]))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError("profile", f"the builder refuses the shape ranges {dict(profiles)} for inputs {inputs}")


def _inspect(trt: Any, logger: Any, plan: Any) -> list[EngineLayer]:
    """Ask the built engine itself; an engine that this machine cannot load leaves the build log as the witness."""
    try:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is None:
            return []
        inspector = engine.create_engine_inspector()
        return parse_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except Exception as error:  # whatever the vendor raises here, the log still holds the same listing
        sys.stderr.write(f"[WARNING] the engine inspector cannot be used: {error!r}\n")
        return []


def _peak_rss_bytes() -> int | None:
    """Peak resident memory of this process; getrusage would count the parent's before exec, so read the kernel's."""
    return _status_bytes(os.getpid(), "VmHWM")


def _status_bytes(pid: int, key: str) -> int | None:
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None  # not Linux, or the process has just ended
    return int(match[1]) * 1024 if match else None


# --- the run ----------------------------------------------------------------------------------------------------------


def run_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Judge the built engine against what the bundle kept, and time it, in this process. Raises BuildError.

    Request keys: "module", "engine", "reference" (path of an .npz, see `judge`, or None), "tolerance_db", "runs".
    """
    if importlib.util.find_spec("numpy") is None:
        raise BuildError("backend", "numpy is not installed: pip install numpy, or build alone with --no-run")
    try:
        runner = EngineRunner(str(request["module"]), Path(request["engine"]))
        judged = None
        if request.get("reference") is not None:
            judged = judge(runner, Path(request["reference"]), float(request["tolerance_db"]))
        return {
            "gpu": runner.gpu.name,
            "memory_bytes": runner.memory_bytes,
            "judged": judged,
            "latency": bench(runner, int(request["runs"])),
        }
    except RunError as error:
        raise BuildError("run", str(error)) from error
    except OSError as error:
        raise BuildError("io", f"{request['engine']} cannot be read: {error}") from error


# --- the child process ------------------------------------------------------------------------------------------------


def build_in_child(
    request: Mapping[str, Any], log: Path, *, timeout_s: float | None = None, max_ram_bytes: int | None = None
) -> dict[str, Any]:
    """Run `build_here(request)`, or `run_here` for an "action" of "run", in a child process, and return its result.

    Its output goes to `log`. Raises BuildError, also where the child crashes, exceeds `timeout_s` or holds more than
    `max_ram_bytes` (watched on Linux only); the last log lines are in the message.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trt-build-") as folder:
        order, answer = Path(folder, "request.json"), Path(folder, "result.json")
        engine = Path(str(request["engine"]))
        partial = engine.with_name(f".{engine.name}.{os.getpid()}.partial")
        order.write_text(json.dumps({**request, "partial": str(partial)}))
        command = [*_PYTHON, __file__, "--child", str(order), str(answer)]
        try:
            with log.open("wb") as sink, _running(command, sink) as child:
                _watch(child, log, timeout_s, max_ram_bytes)
        finally:
            with contextlib.suppress(OSError):  # there is none unless the child ended while it wrote
                partial.unlink()
        if child.returncode < 0 or not answer.exists():
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit status {child.returncode}"
            raise BuildError("crash", f"the builder process died ({how}).{_tail(log)}")
        result: dict[str, Any] = json.loads(answer.read_text())
    if "failure" in result:
        raise BuildError(str(result["failure"]), f"{result['message']}{_tail(log)}")
    return result


@contextlib.contextmanager
def _running(command: Sequence[str], sink: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that never outlives this block, however the block is left."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _watch(child: subprocess.Popen[bytes], log: Path, timeout_s: float | None, max_ram_bytes: int | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=POLL_SECONDS)
            return
        if deadline is not None and time.monotonic() > deadline:
            raise BuildError("timeout", f"the builder was still running after {timeout_s:g} s.{_tail(log)}")
        used = None if max_ram_bytes is None else _status_bytes(child.pid, "VmRSS")
        if used is not None and max_ram_bytes is not None and used > max_ram_bytes:
            raise BuildError(
                "memory", f"the builder held {used >> 20} MiB, more than the {max_ram_bytes >> 20} MiB allowed"
            )


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    shown = "\n".join(f"    {line[:300]}" for line in lines[-LOG_TAIL_LINES:])
    return f"\n  last lines of {log}:\n{shown}" if shown else f"\n  {log} is empty"


def _child_main(order: str, answer: str) -> NoReturn:
    faulthandler.enable()  # where it crashed, in the log
    try:
        request = json.loads(Path(order).read_text())
        result = run_here(request) if request.get("action") == "run" else build_here(request)
    except BuildError as failure:
        result = {"failure": failure.kind, "message": failure.message}
    Path(answer).write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)  # all is on disk: a vendor library that crashes while it unloads must not spoil it


# --- the script in a bundle -------------------------------------------------------------------------------------------

#: Filled in when this file is copied into a bundle: what to build there (see `engines.trt.write_finish_script`).
BUNDLE_REQUEST = ""


def finish(bundle: Path, request: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Build the bundle's engine for this machine's GPU, prove it, put it in place, run it; return the record.

    The engine goes to "<engines>/<target>-<arch>-<version>/engine.plan" under the bundle, and only once every expected
    layer is proven; build.log and result.json lie beside it. One that is there already is taken. What running it
    measured is in run.json, also where the engine fails its gate. Raises BuildError.
    """
    arch = gpu_arch()
    if arch is None:
        raise BuildError("backend", "no NVIDIA GPU, or no driver for it, on this machine: run this where the GPU is")
    version = vendor_version(str(request["module"]))
    if version is None:
        raise BuildError("backend", f"{request['module']} cannot be imported: pip install {request['package']}")
    if not (bundle / str(request["onnx"])).is_file():
        raise BuildError("io", f"{bundle} lacks {request['onnx']}: --bundle takes the folder that this script came in")
    folders = engine_folders(bundle / str(request["engines"]), str(request["target"]), arch, version)
    found = [folder for folder in folders if (folder / "engine.plan").is_file()]
    reused = bool(found) and not options.rebuild
    folder = found[0] if reused else folders[0]
    built = None if reused else _build_and_prove(bundle, folder, arch, request)
    engine = folder / "engine.plan"
    record: dict[str, Any] = {"engine": str(engine.relative_to(bundle)), "built": built, "run": None}
    if options.no_run:
        return record
    reference = request.get("reference")
    order = {
        "action": "run",
        "module": request["module"],
        "engine": str(engine),
        "reference": None if reference is None else str(bundle / reference),
        "tolerance_db": options.tolerance_db,
        "runs": options.runs,
    }
    record["run"] = build_in_child(order, folder / "run.log")
    (folder / "run.json").write_text(json.dumps(record["run"], indent=1) + "\n")
    judged = record["run"]["judged"]
    if judged is not None and not judged["passed"]:
        raise BuildError(
            "gate",
            f"the engine's answers are {judged['sqnr_db']:.1f} dB from the float model's, those of the exact graph "
            f"{judged['exact_sqnr_db']:.1f} dB, over the same {judged['samples']} samples; up to "
            f"{judged['tolerance_db']:g} dB less is allowed (--tolerance-db)",
        )
    return record


def engine_folders(engines: Path, target: str, arch: str, version: str) -> list[Path]:
    """Where an engine for this machine lies or is put, and where one for every architecture would lie."""
    return [engines / f"{target}-{fit}-{version}" for fit in (arch, "any")]


def _build_and_prove(bundle: Path, folder: Path, arch: str, request: Mapping[str, Any]) -> dict[str, Any]:
    engine, unproven = folder / "engine.plan", folder / "engine.plan.unproven"
    build = {**request, "onnx": str(bundle / str(request["onnx"])), "engine": str(unproven), "inspect": True}
    try:
        result = build_in_child(build, folder / "build.log")
        proofs = examine([layer_from_json(layer) for layer in result.pop("layers")], request["expected"])
        record = {
            "engine": str(engine.relative_to(bundle)),
            "arch": arch,
            "module": request["module"],
            **result,
            "products": dict(Counter(f"{p.activation} x {p.weight}" for p in proofs if not p.problem)),
            "proofs": [asdict(proof) for proof in proofs],
        }
        (folder / "result.json").write_text(json.dumps(record, indent=1) + "\n")
        failed = [proof for proof in proofs if proof.problem]
        if failed:
            planned = {kind for kind, _ in request["expected"].values()}
            raise BuildError("proof", describe(failed, len(proofs), "in int8" if planned == {"Int8"} else "as planned"))
        unproven.replace(engine)
    finally:
        unproven.unlink(missing_ok=True)
    return record


def vendor_version(module: str) -> str | None:
    """Return the version of `tensorrt` or `tensorrt_rtx`, None where it cannot be imported.

    Asked in a child process: a broken native library may abort, and a working one stays out of the caller's memory.
    """
    code = f"import {module}; print({module}.__version__)"
    try:
        answer = subprocess.run([*_PYTHON, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split()[-1] if answer.returncode == 0 and answer.stdout.strip() else None


def main(arguments: Sequence[str]) -> int:
    """Run as the child of a build, or, inside a bundle, as its finish script. Returns the exit status."""
    if len(arguments) == 3 and arguments[0] == "--child":
        _child_main(arguments[1], arguments[2])
    parser = argparse.ArgumentParser(
        description="Build this bundle's TensorRT engine here, prove that its quantized layers run in int8, compare "
        "its answers with those that the build kept, and time it.",
        epilog="exit status: 0 all well, 1 build, proof or run failed, 3 the engine errs more than it may, "
        "5 resource limit, 7 TensorRT, numpy or GPU missing",
    )
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help="default: this folder")
    parser.add_argument("--rebuild", action="store_true", help="build even where an engine for this machine is there")
    parser.add_argument("--no-run", action="store_true", help="build and prove only")
    parser.add_argument("--runs", type=_positive, default=50, help="timed executions a batch size (default: 50)")
    parser.add_argument(
        "--tolerance-db",
        type=float,
        default=1.0,
        help="how much less SQNR against the float model the engine may have than the exact graph (default: 1)",
    )
    options = parser.parse_args(arguments)
    if not BUNDLE_REQUEST:
        parser.error("this copy was not written into a bundle; use `dmqexport compile`")
    request = json.loads(BUNDLE_REQUEST)
    codes = {"backend": EXIT_BACKEND, "io": EXIT_RESOURCE, "memory": EXIT_RESOURCE, "gate": EXIT_GATE}
    try:
        record = finish(options.bundle.resolve(), request, options)
    except BuildError as failure:
        print(f"failed ({failure.kind}): {failure.message}", file=sys.stderr)
        return codes.get(failure.kind, EXIT_FAILED)
    except OSError as error:  # of logs and records; what a build itself cannot write is a BuildError
        print(f"failed (io): {error}", file=sys.stderr)
        return EXIT_RESOURCE
    for line in _told(record):
        print(line)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive count")
    return value


def _told(record: Mapping[str, Any]) -> Iterator[str]:
    built, run = record["built"], record["run"]
    if built is None:
        yield f"{record['engine']}: was there already (--rebuild builds it anew)"
    else:
        yield (
            f"{built['engine']}: {built['size_bytes']} bytes in {built['seconds']:.1f} s, {built['module']} "
            f"{built['version']} on {built['arch']}; quantized operators by engine {built['layers_from']}: "
            + ", ".join(f"{count} take {types}" for types, count in sorted(built["products"].items()))
        )
    if run is None:
        return
    judged = run["judged"]
    if judged is None:
        yield "answers: not judged, since the build drew its statistics and kept no answers"
    else:
        yield (
            f"answers: {judged['sqnr_db']:.1f} dB from the float model's, the exact graph's "
            f"{judged['exact_sqnr_db']:.1f} dB; {judged['distance_db']:.1f} dB from each other ({judged['samples']} "
            "samples)"
        )
    for row in run["latency"]:
        yield (
            f"batch {row['batch']}: {row['median_ms']:.3f} ms (90 % within {row['p90_ms']:.3f}), "
            f"{row['samples_per_second']:.0f} samples a second on {run['gpu']}"
        )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
