"""What this machine can build and run."""

import platform
from typing import Any

from dmqexport.pipeline_report import environment
from dmqexport.target import PROFILES, Target, cpu_has_vnni
from engines import openvino_ir, ort
from engines.trt import TrtFlavor, flavor_version, gpu_present


def examine() -> dict[str, Any]:
    """Versions, hardware, and for each target whether it can be built and run here, and why not."""
    runtime, gpu, found = ort.version(), gpu_present(), openvino_ir.devices()
    versions = {flavor: flavor_version(flavor) for flavor in TrtFlavor}
    targets: dict[str, dict[str, Any]] = {}
    for target, profile in PROFILES.items():
        build, run, notes = True, runtime is not None, []
        if runtime is None:
            build = False
            notes.append("onnxruntime is missing (validation needs it): pip install 'dmqexport[cpu]'")
        if target is Target.OPENVINO:
            build, run = build and bool(found), bool(found)
            notes += [] if found else ["openvino is missing: pip install 'dmqexport[openvino]'"]
            notes += [f"devices: {', '.join(found)}"] if found else []
        elif profile.builds_engine:
            flavor = TrtFlavor.RTX if target is Target.TRT_RTX else TrtFlavor.TRT
            run = gpu and versions[flavor] is not None
            if versions[flavor] is None:
                build = False
                notes.append(f"{flavor.package} is missing: the bundle then holds a script that finishes on a GPU host")
            elif flavor.needs_gpu and not gpu:
                build = False
                notes.append("building needs a GPU")
            if not gpu:
                notes.append("no NVIDIA GPU: engines cannot run here")
        targets[target.value] = {"summary": profile.summary, "build": build, "run": run, "notes": notes}
    return {
        "environment": environment(),
        "cores": ort.available_cores(),
        "vnni": cpu_has_vnni(),
        "gpu": gpu,
        "tensorrt": versions[TrtFlavor.TRT],
        "tensorrt_rtx": versions[TrtFlavor.RTX],
        "openvino": openvino_ir.version(),
        "targets": targets,
    }


def render(found: dict[str, Any]) -> str:
    """The findings as text."""
    machine = found["environment"]
    lines = [
        f"python {machine['python']}, {machine['platform']}, {platform.release()}",
        f"cpu: {machine['cpu']}, {found['cores']} cores, VNNI {'yes' if found['vnni'] else 'no'}",
        f"gpu: {'yes' if found['gpu'] else 'none'}; tensorrt {found['tensorrt'] or 'not installed'}; "
        f"tensorrt-rtx {found['tensorrt_rtx'] or 'not installed'}; openvino {found['openvino'] or 'not installed'}",
        "packages: " + ", ".join(f"{name} {version or 'missing'}" for name, version in machine["packages"].items()),
        "",
    ]
    for name, entry in found["targets"].items():
        able = f"build {'yes' if entry['build'] else 'no'}, run {'yes' if entry['run'] else 'no'}"
        lines.append(f"{name:<8} {able:<20} {entry['summary']}")
        lines += [f"{'':<9}{note}" for note in entry["notes"]]
    return "\n".join(lines)
