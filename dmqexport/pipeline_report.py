"""From metrics to the report document, its gates and its suggestions."""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import dmqexport
from dmqexport.models.picture_features import DIMENSION
from dmqexport.pipeline import Build
from dmqexport.pipeline_allocate import PARETO_JSON
from dmqexport.pipeline_drawn import DRAWN_WARNING
from dmqexport.pipeline_tune import why
from dmqexport.pipeline_validate import Validation
from dmqexport.quant_plan import LayerQuant
from dmqexport.report.pictures import ReportImages
from dmqexport.target import Target
from engines.compare import GraphComparison, LintFinding, compare_graphs, lint_graph
from passes.lower.group_by_row import layer_graph
from passes.lower.ort_cpu import FUSED_PRODUCT

_GRID_PICTURES = 16
_INTEGER_OPS = (FUSED_PRODUCT, "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
#: Polygraphy's comparison fails above this mean error relative to the mean output; float noise of 3 dB SQNR.
_MAX_MEAN_RELATIVE_ERROR = 0.7


class ReportBuilder:
    """Collects everything the report says about one build."""

    def __init__(self, build: Build, validation: Validation) -> None:
        self.build = build
        self.validation = validation

    def document(self) -> dict[str, Any]:
        """The report document, as `dmqexport.report.document` defines it."""
        build, metrics = self.build, self.validation.metrics
        plan, notes = build.plan, self._notes()
        layers = self._layers(metrics)
        latency = self.validation.latency
        return {
            "schema_version": 1,
            "dmqexport_version": dmqexport.__version__,
            "created": None,
            "model": {
                "name": build.model.name,
                "family": build.model.family.class_name,
                "parameters": sum(p.numel() for p in build.model.denoiser.parameters()),
                "source": build.model.source,
            },
            "bits": plan.bits,
            "target": build.recipe.target.value,
            "recipe": build.recipe.model_dump(mode="json"),
            "metrics": {
                key: metrics.get(key)
                for key in (
                    "eps_sqnr_db",
                    "image_psnr_db",
                    "image_psnr_pooled_db",
                    "image_ssim",
                    "image_count",
                    "retrieval_accuracy",
                    "retrieval_accuracy_fp",
                    "retrieval_count",
                    "frechet_train",
                    "frechet_train_fp",
                    "frechet_train_ratio",
                    "frechet_float",
                    "frechet_extractor",
                    "frechet_features",
                    "frechet_count",
                    "canonical_max_rel_error",
                    "canonical_sqnr_db",
                )
            }
            | {"by_timestep": metrics.get("by_timestep", [])},
            "layers": layers,
            "rows": [{"row": row, "timestep_min": low, "timestep_max": high} for row, low, high in plan.row_ranges()],
            "size_bytes": self._sizes(),
            "latency": latency,
            "allocation": self._allocation(),
            "operators": self._operators(),
            "gates": self.gates,
            "engine": self._engine(),
            "polygraphy": self._polygraphy(),
            "stages": self._stages(),
            "environment": environment(),
            "statistics": build.recipe.calibration.statistics,
            "images": self._images(),
            "warnings": self._warnings(),
            "suggestions": self._suggestions(layers),
            "notes": notes,
        }

    def _stages(self) -> list[dict[str, Any]]:
        """Each stage once, with what it cost when it was built, whichever run that was."""
        records = {record.path: record for record in reversed(self.build.workspace.records)}
        plain = next((record for record in records.values() if record.name == "trajectories"), None)
        a_sample = None
        if plain is not None and plain.forwards and plain.built_seconds is not None:
            a_sample = plain.built_seconds / plain.forwards  # nothing but the sampler runs beside the model there
        return [
            {
                "name": record.name,
                "seconds": record.seconds if record.built_seconds is None else record.built_seconds,
                "cpu_seconds": record.cpu_seconds,
                "forward_seconds": None if a_sample is None or not record.forwards else record.forwards * a_sample,
                "cached": record.cached,
                "peak_rss_bytes": record.built_peak_rss_bytes,
                "disk_bytes": record.disk_bytes,
            }
            for record in reversed(records.values())
        ]

    def _allocation(self) -> dict[str, Any]:
        """How the bits were chosen, and the Pareto sweep where the recipe asks for one."""
        found, points = self.build.plan.allocation, []
        if self.build.recipe.allocation.pareto:
            points = json.loads((self.build.pareto.path / PARETO_JSON).read_text(encoding="utf-8"))["points"]
        return {
            "method": found.method,
            "budget": found.budget,
            "lambda": dict(found.multipliers),
            "rate": {name: dict(spent) for name, spent in found.rate.items()},
            "predicted_distortion": found.predicted_distortion,
            "measured_distortion": found.measured_distortion,
            "certified_gap": found.certified_gap,
            "pareto": points,
        }

    def _images(self) -> dict[str, Any]:
        """What the pictures are of."""
        build = self.build
        if build.recipe.drawn:
            return {"prompts": [], "seeds": [], "note": "none: statistics were drawn, and pictures would be noise"}
        reference = self.validation.reference
        return {
            "prompts": reference.prompts[:_GRID_PICTURES],
            "seeds": reference.seeds[:_GRID_PICTURES],
            "note": f"{build.steps} steps, guidance {build.guidance:g}, same seeds on both sides",
        }

    def pictures(self) -> ReportImages | None:
        """The first pictures of both sides; None where nothing was judged."""
        if self.build.recipe.drawn:
            return None
        reference = self.validation.reference
        count = min(_GRID_PICTURES, len(reference.images))
        captions = reference.prompts[:count] or [f"seed {seed}" for seed in reference.seeds[:count]]
        return ReportImages(reference.images[:count], self.validation.images[:count], captions)

    # Parts

    @cached_property
    def gates(self) -> list[dict[str, Any]]:
        """Every gate of the recipe that has a threshold, measured."""
        thresholds, metrics = self.build.recipe.validation.gates, self.validation.metrics
        found: list[dict[str, Any]] = []

        def gate(name: str, threshold: float | None, measured: float | None, unit: str, direction: str) -> None:
            if threshold is None:
                return
            passed = None
            if measured is not None:
                passed = bool(measured >= threshold if direction == "min" else measured <= threshold)
            found.append(
                {
                    "name": name,
                    "threshold": threshold,
                    "measured": measured,
                    "passed": passed,
                    "unit": unit,
                    "direction": direction,
                }
            )

        gate("eps_sqnr_db", thresholds.eps_sqnr_db, metrics["eps_sqnr_db"], "dB", "min")
        gate("image_psnr_db", thresholds.image_psnr_db, metrics["image_psnr_db"], "dB", "min")
        gate("image_ssim", thresholds.image_ssim, metrics["image_ssim"], "", "min")
        drop = None
        if metrics.get("retrieval_accuracy") is not None:
            drop = metrics["retrieval_accuracy_fp"] - metrics["retrieval_accuracy"]
        gate("retrieval_drop", thresholds.retrieval_drop, drop, "", "max")
        latency = self.validation.latency if thresholds.latency_ratio is not None else None
        gate("latency_ratio", thresholds.latency_ratio, None if latency is None else latency["ratio"], "", "max")
        return found

    def _layers(self, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
        build = self.build
        plan = build.plan
        macs = {info.name: info for info in build.probe_result.layers}
        types = self.graph_compute
        tuned = {name: why(entry) for name, entry in build.tuned["kernels"].items()}
        layers = []
        for layer in plan.layers:
            measured = metrics["layers"][layer.name]
            layers.append(
                {
                    "name": layer.name,
                    "op": layer.op.value,
                    "nominal_bits": {"weight": layer.weight_bits, "activation": layer.mean_activation_bits},
                    "storage_bits": self._storage_bits(layer),
                    "compute": types.get(layer.name, "float32"),
                    "sqnr_db": measured["sqnr_db"],
                    "sqnr_by_row": measured["by_row"],
                    "parameters": layer.parameters,
                    "macs": macs[layer.name].macs,
                    "reason": "; ".join(filter(None, (layer.reason, tuned.get(layer.name)))) or None,
                }
            )
        for name, reason in plan.float_layers.items():
            info = macs.get(name)
            layers.append(
                {
                    "name": name,
                    "op": info.op.value if info is not None else "attention" if "attention" in reason else "other",
                    "nominal_bits": {"weight": None, "activation": None},
                    "storage_bits": {"weight": 32 if info is not None else None, "activation": None},
                    "compute": self._float_type,
                    "sqnr_db": None,
                    "sqnr_by_row": [None] * plan.rows,
                    "parameters": info.parameters if info is not None else 0,
                    "macs": info.macs if info is not None else None,
                    "reason": reason,
                }
            )
        return layers

    @cached_property
    def graph_compute(self) -> dict[str, str]:
        """Type that multiplies each planned layer, read from the deployed graph (or proven by the engine)."""
        build = self.build
        if build.profile.builds_engine:
            proven = {proof["layer"]: proof["activation"] for proof in build.compiled.document.get("proofs", ())}
            if build.recipe.target is Target.OPENVINO:
                return {layer.name: "int8" if layer.name in proven else "float32" for layer in build.plan.layers}
            names = {"Int8": "int8", "FP8": "fp8"}  # any other is of a layer whose weights alone are quantized
            kinds = {layer: names.get(kind, self._float_type) for layer, kind in proven.items()}
            return {layer.name: kinds.get(layer.name, "unproven") for layer in build.plan.layers}
        nodes = {node.name: node for node in layer_graph(ir.load(build.deployed_graph))}
        result = {}
        for name, members in build.compute_nodes.items():
            result[name] = "int8" if all(nodes[member].op_type in _INTEGER_OPS for member in members) else "float32"
        return result

    @property
    def _float_type(self) -> str:
        """What an engine computes in where nothing is quantized."""
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.build.recipe.lowering.float_type]

    def _storage_bits(self, layer: LayerQuant) -> dict[str, int | None]:
        """Container of the weights in the deployed file; activations travel in int8."""
        packs = self.build.recipe.target in (Target.ONNX, Target.ORT_CPU, Target.OPENVINO)
        weight = 4 if layer.weight_bits <= 4 and (packs or layer.activation_bits is None) else 8
        return {"weight": weight, "activation": None if layer.activation_bits is None else 8}

    def _sizes(self) -> dict[str, int]:
        parameters = sum(p.numel() for p in self.build.model.denoiser.parameters())
        quantized = sum(layer.parameters for layer in self.build.plan.layers)
        nominal = sum(layer.parameters * layer.weight_bits for layer in self.build.plan.layers) / 8
        graph = self.build.deployed_graph
        data = graph.with_name(graph.name + ".data")
        return {
            "float": parameters * 4,
            "nominal": round(nominal + (parameters - quantized) * 4),
            "storage": graph.stat().st_size + (data.stat().st_size if data.is_file() else 0),
        }

    def _operators(self) -> dict[str, dict[str, int]]:
        """Operators by compute type: what the engine proved, or what the deployed graph holds."""
        build = self.build
        counts: dict[str, Counter[str]] = {}
        planned = {node for nodes in build.compute_nodes.values() for node in nodes}
        types = {node: self.graph_compute[name] for name, nodes in build.compute_nodes.items() for node in nodes}
        heavy = {"Conv", "MatMul", "Gemm", "MatMulNBits", *_INTEGER_OPS}
        for node in layer_graph(ir.load(build.deployed_graph)):
            if node.op_type in heavy:
                kind = types[str(node.name)] if node.name in planned else self._float_type
                if node.name not in planned and node.op_type in _INTEGER_OPS:
                    kind = "int8"
                counts.setdefault(kind, Counter())[node.op_type] += 1
        return {kind: dict(sorted(counter.items())) for kind, counter in sorted(counts.items())}

    def _engine(self) -> dict[str, Any] | None:
        compiled = self.build.compiled
        if not self.build.profile.builds_engine:
            return None
        if compiled.missing is not None:
            return {"target": self.build.recipe.target.value, "note": compiled.missing.splitlines()[0]}
        kept = ("target", "version", "seconds", "bytes", "layers_proven", "layers_planned")
        where = "executed network" if self.build.recipe.target is Target.OPENVINO else "builder's log"
        found = Counter(f"{proof['activation']} x {proof['weight']}" for proof in compiled.document["proofs"])
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
        return {
            **{key: compiled.document[key] for key in kept},
            "note": f"precision read back from the {where}: {types}",
        }

    @cached_property
    def comparison(self) -> GraphComparison:
        """Polygraphy's comparison of the deployed graph with the float graph."""
        entries = self.validation.reference.entries
        index = np.linspace(0, len(entries) - 1, 4).astype(int)
        inputs = [
            {name: value[i : i + 1].numpy() for name, value in entries.inputs.items()} for i in index
        ]  # one sample each: a step of the loop as the graph sees it
        return compare_graphs(
            self.build.float_graph,
            self.build.deployed_graph,
            inputs,
            max_mean_relative_error=_MAX_MEAN_RELATIVE_ERROR,
            config=self.build.session_config,
        )

    @cached_property
    def lint(self) -> list[LintFinding]:
        """Polygraphy's lint of the deployed graph."""
        return lint_graph(self.build.deployed_graph)

    def _polygraphy(self) -> dict[str, Any]:
        if self.build.recipe.drawn:
            return {
                "lint": [],
                "compared_outputs": None,
                "passed": None,
                "note": "statistics were drawn: the ONNX checker read the graph, nothing was run",
            }
        comparison = self.comparison
        return {
            "lint": [{"level": f.level, "node": f.node, "message": f.message} for f in self.lint],
            "compared_outputs": len(comparison.outputs),
            "passed": comparison.passed and not any(finding.level == "error" for finding in self.lint),
            "note": comparison.note,
        }

    def _notes(self) -> dict[str, str]:
        notes: dict[str, str] = {}
        target = self.build.recipe.target
        if self.build.recipe.drawn:
            return dict.fromkeys(("metrics.eps_sqnr_db", "metrics.image_psnr_db", "latency"), DRAWN_WARNING)
        if not self.validation.judges_retrieval:
            notes["metrics.retrieval_accuracy"] = "only the bundled model has a gallery to search"
            notes["metrics.frechet_train"] = "only the bundled model has its training set at hand"
        elif not self.validation.judges_frechet:
            recipe = self.build.recipe.validation
            notes["metrics.frechet_train"] = (
                f"{recipe.retrieval} pictures are too few for {DIMENSION} features"
                if recipe.frechet
                else "switched off"
            )
        if target in (Target.TRT, Target.TRT_RTX):
            built = self.build.engine_graph == self.build.deployed_graph
            graph = "the graph the engine is built from" if built else f"the engine's graph before {self._float_type}"
            notes["latency"] = f"engines run on a GPU; metrics are of {graph}, run on the CPU"
        elif target is Target.ONNX:
            notes["latency"] = "the canonical graph states the integers; it is not meant to be fast"
        return notes

    def _warnings(self) -> list[str]:
        warnings = [DRAWN_WARNING] if self.build.recipe.drawn else []
        if self.build.model.random_weights:
            warnings.append("weights are random: sizes, times and exactness hold, accuracy and pictures mean nothing")
        if self.build.compiled.missing is not None:
            warnings.append(f"no engine was built: {self.build.compiled.missing.splitlines()[0]}")
        if self.validation.latency is not None and self.validation.latency["ratio"] >= 1:
            warnings.append("the quantized graph is not faster than float32 on this machine")
        if self.build.vnni:
            warnings.append("built for CPUs with VNNI; use --set lowering.cpu_isa=portable for older ones")
        return warnings

    def _suggestions(self, layers: list[dict[str, Any]]) -> list[str]:
        """What to try first, from the layers that hurt most."""
        if self.build.recipe.drawn:
            return ["leave --random-statistics out for a model that can be used"]
        planned = [layer for layer in layers if layer["sqnr_db"] is not None]
        worst = sorted(planned, key=lambda layer: float(layer["sqnr_db"]))[:3]
        found = []
        narrow = [layer["name"] for layer in worst if (layer["nominal_bits"]["weight"] or 8) < 8]
        if narrow:
            option = " ".join(f"--set 'quantization.overrides={{{name}: w8a8}}'" for name in narrow[:1])
            found.append(f"worst layers: {', '.join(narrow)}; give them 8 bits, e.g. {option}")
        if self.build.plan.rows < self.build.steps:
            found.append(f"one table row a step (--rows {self.build.steps}) follows the activations more closely")
        if any(gate["passed"] is False for gate in self.gates):
            found.append("a gate failed: raise --bits, or give the worst layers more bits")
        return found


def environment() -> dict[str, Any]:
    """Versions and machine, for the report and the manifest."""
    from importlib import metadata

    packages: dict[str, str | None] = {}
    for name in ("torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "polygraphy", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "packages": packages,
        "cores": os.cpu_count(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
