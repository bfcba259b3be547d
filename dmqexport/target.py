"""What one runtime can execute: the closed list of deployment targets."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Target(StrEnum):
    """Deployment targets, as written after `--target`."""

    ONNX = "onnx"
    ORT_CPU = "ort-cpu"
    TRT_RTX = "trt-rtx"
    TRT = "trt"
    OPENVINO = "openvino"


@dataclass(frozen=True)
class TargetProfile:
    """What a target needs and does.

    compute: type that multiplies quantized layers; weight_containers: bits of the types that its file stores weights
    in; builds_engine: a binary is compiled beside the ONNX graph; runs_here: its deployed graph can be executed on a
    CPU machine.
    """

    target: Target
    summary: str
    compute: str
    weight_containers: tuple[int, ...]
    builds_engine: bool
    runs_here: bool


PROFILES: dict[Target, TargetProfile] = {
    profile.target: profile
    for profile in (
        TargetProfile(
            Target.ONNX, "canonical Q/DQ graph, packed weights, any ONNX runtime", "float32 (Q/DQ)", (4, 8), False, True
        ),
        TargetProfile(Target.ORT_CPU, "ONNX Runtime CPU with fused int8 products", "int8", (4, 8), False, True),
        TargetProfile(
            Target.TRT_RTX, "TensorRT-RTX engine, built without a GPU, int8 proven per layer", "int8", (8,), True, False
        ),
        TargetProfile(
            Target.TRT,
            "TensorRT 10/11 engine; needs a GPU to build, else a finishing script",
            "int8",
            (8,),
            True,
            False,
        ),
        TargetProfile(
            Target.OPENVINO, "OpenVINO on CPU, GPU or NPU, int8 proven per layer", "int8", (4, 8), True, True
        ),
    )
}


def cpu_has_vnni() -> bool:
    """Whether this CPU multiplies u8 × s8 without saturating (AVX-512 VNNI or AVX-VNNI); False when unknown."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags
