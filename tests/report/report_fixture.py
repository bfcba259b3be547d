"""A report document and pictures as a real build would make them; run it to look at the page."""

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmqexport.report.html import write_report
from dmqexport.report.pictures import ReportImages, picture_grid

_BLOCKS = ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")
_MEMBERS = (
    ("resnets.0.conv1", "Conv"),
    ("resnets.0.time_emb_proj", "Gemm"),
    ("resnets.0.conv2", "Conv"),
    ("resnets.0.conv_shortcut", "Conv"),
    ("attentions.0.to_q", "MatMul"),
    ("attentions.0.to_k", "MatMul"),
    ("attentions.0.to_v", "MatMul"),
    ("attentions.0.to_out.0", "MatMul"),
)
_FLOAT_REASONS = {
    "time_embedding.linear_1": "depends on the timestep alone: precomputed as a table, never runs",
    "time_embedding.linear_2": "depends on the timestep alone: precomputed as a table, never runs",
    "conv_out": "int8 was 3.1 dB worse here than any other layer and only 0.4 % of the MACs; kept in float32",
}


def layer_names(count: int) -> list[tuple[str, str]]:
    """Return `count` (name, op) pairs of a UNet; large counts repeat the blocks' members."""
    ends = [("conv_in", "Conv"), ("time_embedding.linear_1", "Gemm"), ("time_embedding.linear_2", "Gemm")]
    inner: list[tuple[str, str, str]] = []
    lap = 0
    while len(inner) < count - len(ends) - 1:
        inner += [(block, member.replace(".0.", f".{lap}.", 1), op) for block in _BLOCKS for member, op in _MEMBERS]
        lap += 1
    inner = sorted(inner[: count - len(ends) - 1], key=lambda item: _BLOCKS.index(item[0]))
    return [*ends, *((f"{block}.{member}", op) for block, member, op in inner), ("conv_out", "Conv")]


def make_document(layers: int = 60, rows: int = 10, seed: int = 0) -> dict[str, Any]:
    """Return a document of a W4A4 build of a small UNet."""
    random = np.random.default_rng(seed)
    width = 1000 // rows
    progress = np.linspace(0, 1, rows)
    entries = []
    for index, (name, op) in enumerate(layer_names(layers)):
        reason = _FLOAT_REASONS.get(name)
        depth = index / max(1, layers - 1)
        base = 31 - 9 * math.sin(math.pi * depth) ** 3 + random.normal(0, 2.2) - (7 if name.endswith("conv2") else 0)
        curve = base - 6 * (1 - progress) ** 2 + 2 * progress + random.normal(0, 0.7, rows)
        by_row = [None] * rows if name.startswith("time_embedding") else [round(float(v), 2) for v in curve]
        known = [value for value in by_row if value is not None]
        weight = None if reason else int(random.choice([3, 4, 4, 4, 5, 6, 8]))
        parameters = int(random.integers(4_000, 190_000))
        entries.append(
            {
                "name": name,
                "op": op,
                "nominal_bits": {"weight": weight, "activation": None if reason else 4},
                "storage_bits": {"weight": 32 if reason else 4 if weight and weight <= 4 else 8, "activation": 8},
                "compute": "float32" if reason else "int8",
                "sqnr_db": round(sum(known) / len(known), 2) if known else None,
                "sqnr_by_row": by_row,
                "parameters": parameters,
                "macs": parameters * 256,
                "reason": reason,
            }
        )
    timesteps = [round(981 - index * 981 / 19) for index in range(20)]
    return {
        "schema_version": 1,
        "dmqexport_version": "0.1.0",
        "created": "2025-11-21T10:42:07+00:00",
        "model": {"name": "ddpm-shapes-32", "family": "ddpm", "parameters": 3_731_203, "source": "bundled preset"},
        "bits": "w4a4",
        "target": "ort-cpu",
        "recipe": {
            "model": "ddpm-shapes-32",
            "bits": "w4a4",
            "calibration": {"size": 512, "steps": 20, "rows": rows, "seed": 0},
            "gates": {"eps_sqnr_db": 20.0, "image_psnr_db": 30.0},
            "targets": ["ort-cpu"],
        },
        "metrics": {
            "eps_sqnr_db": 22.17,
            "image_psnr_db": 33.48,
            "image_psnr_pooled_db": 33.48,
            "image_ssim": 0.9714,
            "retrieval_accuracy": 0.949,
            "retrieval_accuracy_fp": 0.961,
            "retrieval_count": 512,
            "frechet_train": 0.0473,
            "frechet_train_fp": 0.0451,
            "frechet_train_ratio": 1.0488,
            "frechet_float": 0.0021,
            "frechet_extractor": "emoji-autoencoder-40",
            "frechet_features": 40,
            "frechet_count": 512,
            "canonical_max_rel_error": 3.1e-6,
            "by_timestep": [
                {
                    "timestep": timestep,
                    "row": min(rows - 1, timestep // width),
                    "eps_sqnr_db": round(17.5 + 9 * (timestep / 1000) ** 0.6 + float(random.normal(0, 0.35)), 2),
                    "samples": 64,
                }
                for timestep in timesteps
            ],
        },
        "layers": entries,
        "rows": [
            {"row": row, "timestep_min": row * width, "timestep_max": (row + 1) * width - 1} for row in range(rows)
        ],
        "size_bytes": {"float": 14_924_812, "nominal": 2_011_405, "storage": 2_894_112},
        "latency": {"fp32_ms": 41.8, "quantized_ms": 23.9, "ratio": 0.572, "batch": 4, "threads": 2, "runs": 50},
        "operators": {
            "int8": {"QLinearConv": 31, "MatMulInteger": 26},
            "float32": {"Conv": 1, "Gemm": 2, "Sigmoid": 34, "GroupNormalization": 29, "Softmax": 7, "Add": 61},
        },
        "gates": [
            _gate("predicted noise", 20.0, 22.17, True, "dB", "min"),
            _gate("picture PSNR", 30.0, 33.48, True, "dB", "min"),
            _gate("speed-up over float", 1.2, 1.749, True, "×", "min"),
            _gate("worst layer", 12.0, 11.2, False, "dB", "min"),
            _gate("FID to float", 4.0, None, None, "", "max"),
        ],
        "engine": {
            "target": "ort-cpu",
            "version": "1.22.0",
            "seconds": 3.4,
            "bytes": 3_120_554,
            "layers_proven": 57,
            "layers_planned": 57,
            "note": "read from the optimized graph that the runtime wrote",
        },
        "polygraphy": {
            "lint": [{"level": "warning", "message": "input 'timestep' has a dynamic shape"}],
            "compared_outputs": 1,
            "passed": True,
            "note": "compared on the CPU; TensorRT is not on this machine",
        },
        "stages": [
            _stage("sample", 84.2, True, 1_312_000_000),
            _stage("observe", 131.0, False, 2_410_000_000),
            _stage("sensitivity", 402.7, False, 2_388_000_000),
            _stage("allocate", 0.41, False, None),
            _stage("distill", 1093.0, False, 3_105_000_000),
            _stage("export and lower", 21.5, False, 1_904_000_000),
            _stage("validate", 66.3, False, 1_120_000_000),
        ],
        "environment": {
            "python": "3.11.9",
            "platform": "Linux-6.1-x86_64-with-glibc2.36",
            "cpu": "2 cores, AVX-512 VNNI",
            "packages": {"torch": "2.9.0", "onnx": "1.19.1", "onnxruntime": "1.22.0", "tensorrt": None},
        },
        "images": {
            "prompts": ["a red circle", "a green ring"],
            "seeds": list(range(8)),
            "note": "20 DDIM steps, eta 0.",
        },
        "warnings": ["onnxruntime runs int4 weights through int8 kernels on this CPU: nominal 4, compute int8"],
        "suggestions": [
            "the worst layers are the second convolutions of the residual blocks: try --set distill.iterations=2000",
            "rows 0 to 2 hold most of the error: try --set calibration.rows=20 with --set calibration.spacing=error",
        ],
        "notes": {"engine.version": "as the runtime reports itself"},
        "allocation": {
            "method": "integer",
            "budget": "w4a4 on average",
            "lambda": {"average weight bits": 0.012},
            "rate": {"average weight bits": {"used": 3.99, "limit": 4.0}},
            "predicted_distortion": 0.05,
            "measured_distortion": 0.07,
            "certified_gap": 0.0004,
            "pareto": [
                {
                    "method": "integer",
                    "nominal_bytes": 2_100_000,
                    "predicted_distortion": 0.05,
                    "measured_distortion": 0.07,
                }
            ],
        },
    }


def make_images(count: int = 8, side: int = 32, seed: int = 0) -> ReportImages:
    """Return coloured shapes on gradients and a copy with smooth, quantization-like error."""
    random = np.random.default_rng(seed)
    fp = np.stack([_shape(index, side, random) for index in range(count)])
    coarse = random.normal(0, 1, (count, side // 4 + 1, side // 4 + 1, 3))
    smooth = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :side, :side]
    strength = np.linspace(2, 9, count)[:, None, None, None]
    noisy = fp + strength * smooth + random.normal(0, 1.5, fp.shape)
    colours = ("red", "green", "blue", "yellow")
    captions = [
        f"a {colours[index % 4]} {('circle', 'square')[index // 4 % 2]}, seed {index}" for index in range(count)
    ]
    return ReportImages(_pixels(fp), _pixels(noisy), captions)


def _shape(index: int, side: int, random: np.random.Generator) -> NDArray[np.float64]:
    y, x = np.mgrid[0:side, 0:side] / side
    background = 60 + 90 * (np.cos(index) * x + np.sin(index) * y)[..., None] * np.array([0.6, 0.7, 1.0]) + 40
    cx, cy = random.uniform(0.35, 0.65, 2)
    away = np.hypot(x - cx, y - cy) if index // 4 % 2 == 0 else np.maximum(abs(x - cx), abs(y - cy))
    mask = np.clip((0.27 - away) * side, 0, 1)[..., None]
    colour = np.array([(220, 60, 50), (60, 180, 80), (60, 90, 220), (235, 200, 60)][index % 4])
    return np.asarray(background * (1 - mask) + (colour - 60 * (x - cx)[..., None]) * mask)


def _pixels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _gate(
    name: str, threshold: float, measured: float | None, passed: bool | None, unit: str, direction: str
) -> dict[str, Any]:
    return {
        "name": name,
        "threshold": threshold,
        "measured": measured,
        "passed": passed,
        "unit": unit,
        "direction": direction,
    }


def _stage(name: str, seconds: float, cached: bool, peak: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": seconds,
        "cpu_seconds": 1.6 * seconds,
        "forward_seconds": 0.5 * seconds if name in ("sample", "observe") else None,
        "cached": cached,
        "peak_rss_bytes": peak,
        "disk_bytes": None,
    }


def main() -> None:
    """Write report.json, report.html and grid.png of the fixture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--side", type=int, default=32)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images = make_images(side=options.side)
    paths = write_report(make_document(options.layers, options.rows), images, options.folder)
    picture_grid(images, 4, labels=("FP32", "W4A4 int8")).save(options.folder / "grid.png")
    logging.info("wrote %s", ", ".join(f"{path} ({path.stat().st_size:,} bytes)" for path in paths))


if __name__ == "__main__":
    main()
