"""The composition root: the ordered stages of a build, each cached by the content of what goes into it."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from calib.rotation import original_weights, unrotated
from calib.sampling import TIMESTEP
from dmqexport.bundle import ENGINE_GRAPH, GRAPH
from dmqexport.errors import BackendMissingError, DmqExportError, LoweringError
from dmqexport.onnx_export import OPSET, export_float_graph, save_model
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_openvino import engine_graph
from dmqexport.pipeline_sampler import SamplerTraining
from dmqexport.pipeline_tune import HOST, KERNELS, OFF, Machine, tune
from dmqexport.target import Target, cpu_has_vnni
from dmqexport.tuning import cpu_model, read_timings
from dmqexport.workspace import StageRecord
from engines.ort import available_cores
from engines.ort import version as ort_version
from passes.bind import bind
from passes.lower.tensorrt import product_types
from passes.pipelines import (
    canonical,
    float_cleanup,
    float_ort_cpu,
    group_by_row,
    lower_openvino,
    lower_ort_cpu,
    lower_tensorrt,
)

logger = logging.getLogger(__name__)


class Stage(StrEnum):
    """What a build does, in order; also the sub-commands."""

    LOAD = "load"
    CALIBRATE = "calibrate"
    PLAN = "plan"
    TRAIN = "train"
    EXPORT = "export"
    PASSES = "passes"
    COMPILE = "compile"
    VALIDATE = "validate"
    BUNDLE = "bundle"


@dataclass(frozen=True)
class CompileResult:
    """What compiling gave. engine: the serialized engine, None where the target has none or its backend is missing;
    companions: what lies beside it and is part of it.
    """

    engine: Path | None
    log: Path | None
    document: Mapping[str, Any]
    missing: str | None
    companions: tuple[Path, ...] = ()


class Build(SamplerTraining):
    """One recipe on one work folder. Every stage is a property: asking for one runs what it needs, once."""

    # export

    @cached_property
    def exported(self) -> StageRecord:
        """Float graph: `float.onnx`, and with what its quantized version gains beside integers, `float_fast.onnx`."""
        key = {
            "version": STAGE_VERSIONS["export"],
            "model": self.model.fingerprint,
            "rotated": bool(self.rotation_key),  # left out of the graph, but weights are what a way back gave
            "folds": self._fold_key(),
            "opset": OPSET,
            "torch": torch.__version__,
        }

        def build(folder: Path) -> None:
            family, denoiser = self.model.family, self.model.denoiser
            wrapped = family.wrap(denoiser)
            weight_of = original_weights(denoiser, self.model.weight)
            with unrotated(denoiser):
                export_float_graph(
                    wrapped,
                    self.model.example_inputs(batch=2),
                    folder / "float.onnx",
                    wrapper="" if wrapped is denoiser else "denoiser",
                    dynamic_axes=family.dynamic_axes,
                    simplify=lambda model: _rewrite(model, float_cleanup()),
                    weight_of=weight_of,
                )
            model = ir.load(folder / "float.onnx")
            _rewrite(model, float_ort_cpu())
            ir.save(model, folder / "float_fast.onnx")  # large tensors stay where they are, beside float.onnx

        return self.workspace.stage("export", key, build)

    @property
    def float_graph(self) -> Path:
        """The float graph, simplified exactly as the quantized ones are."""
        return self.exported.path / "float.onnx"

    @property
    def float_baseline(self) -> Path:
        """The float graph that the deployed one is timed against."""
        fast = self.recipe.target is Target.ORT_CPU
        return self.exported.path / "float_fast.onnx" if fast else self.float_graph

    # passes

    @cached_property
    def vnni(self) -> bool:
        """Whether the graph for this machine's CPU may rely on VNNI; False for others, and without integer products."""
        lowering, target = self.recipe.lowering, self.recipe.target
        if not self.plan.activations():
            return False
        if target is not Target.ORT_CPU and not (target is Target.OPENVINO and lowering.openvino_device == "CPU"):
            return False
        return cpu_has_vnni() if lowering.cpu_isa == "auto" else lowering.cpu_isa == "vnni"

    @cached_property
    def tuned(self) -> dict[str, Any]:
        """Layers that another kernel than the integer product suits better (`pipeline_tune.tune`), and who says so."""
        mode = self.recipe.lowering.tune
        if mode == OFF or self.recipe.target is not Target.ORT_CPU or not self.plan.activations():
            return {"mode": OFF, "kernels": {}}
        machine = Machine(self.vnni, self.recipe.validation.latency_batch, available_cores())
        known = [cpu_model(), ort_version()] if mode == HOST else read_timings(Path(mode)).to_json()
        key = {
            "version": STAGE_VERSIONS["tuning"],
            "plan": self.plan.fingerprint,
            "codes": self.trained_plan.fingerprint,
            "export": self.exported.fingerprint,
            "timings": known,
            "circumstances": machine.circumstances,
        }

        def build(folder: Path) -> None:
            model = self._canonical()
            examples = self.model.example_inputs(batch=machine.batch)
            inputs = {name: value.numpy() for name, value in examples.items()}
            inputs[TIMESTEP] = np.full_like(inputs[TIMESTEP], inputs[TIMESTEP][0]) % len(self.plan.row_map)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                path = Path(scratch) / "canonical.onnx"
                save_model(model, path)
                document = tune(mode, path, self.plan, self.weights, inputs, machine)
            (folder / KERNELS).write_text(json.dumps(document, indent=1), encoding="utf-8")

        record = self.workspace.stage("tuning", key, build)
        document: dict[str, Any] = json.loads((record.path / KERNELS).read_text(encoding="utf-8"))
        return {"mode": HOST if mode == HOST else "file", **document}

    def _canonical(self) -> ir.Model:
        """The float graph, quantized."""
        model = ir.load(self.float_graph)
        insisted = frozenset(layer.name for layer in self.plan.layers if layer.reason.startswith("override"))
        _rewrite(model, canonical(self.plan, self.weights, insisted))
        return model

    @cached_property
    def passed(self) -> StageRecord:
        """Canonical and target graph: `canonical.onnx`, `model.onnx`, `nodes.json` (compute nodes by layer)."""
        target = self.recipe.target
        key = {
            "version": STAGE_VERSIONS["passes"],
            "plan": self.plan.fingerprint,
            "codes": self.trained_plan.fingerprint,
            "export": self.exported.fingerprint,
            "target": target,
            "vnni": self.vnni if target in (Target.ORT_CPU, Target.OPENVINO) else None,
            "weight_only": self.recipe.lowering.weight_only if target is Target.ORT_CPU else None,
            "kernels": {name: entry["kernel"] for name, entry in self.tuned["kernels"].items()},
            "types": [self.recipe.lowering.precision == "fp8", self.recipe.lowering.float_type],
        }
        other_device = target is Target.OPENVINO and self.recipe.lowering.openvino_device != "CPU"

        def build(folder: Path) -> None:
            plan, weights = self.plan, self.weights
            model = self._canonical()
            save_model(model, folder / "canonical.onnx")
            if target is Target.ORT_CPU:
                packed = self.recipe.lowering.weight_only == "packed"
                kernels = {name: entry["kernel"] for name, entry in self.tuned["kernels"].items()}
                _rewrite(model, lower_ort_cpu(plan, weights, vnni=self.vnni, packed=packed, kernels=kernels))
            elif target in (Target.TRT, Target.TRT_RTX):
                self._lower_tensorrt(model, folder)
            elif target is Target.OPENVINO:
                _rewrite(model, lower_openvino(plan, weights, vnni=self.vnni or other_device))
            nodes = {name: [n.name for n in item.compute] for name, item in bind(model, plan).layers.items()}
            if target is Target.ORT_CPU:
                _rewrite(model, group_by_row())
            save_model(model, folder / GRAPH)
            (folder / "nodes.json").write_text(json.dumps(nodes), encoding="utf-8")

        return self.workspace.stage("passes", key, build)

    def _lower_tensorrt(self, model: ir.Model, folder: Path) -> None:
        """Also `types.json`, what an engine must do with each layer, and `engine.onnx` where no CPU runs its graph."""
        plan, weights, lowering = self.plan, self.weights, self.recipe.lowering
        half = {"fp32": None, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[lowering.float_type]
        fp8 = lowering.precision == "fp8"
        if half is ir.DataType.BFLOAT16:  # ONNX Runtime has no bfloat16 on CPUs: model.onnx stays as it was before
            narrow = ir.load(folder / "canonical.onnx")
            _rewrite(narrow, lower_tensorrt(plan, weights, fp8=fp8, half=half))
            save_model(narrow, folder / ENGINE_GRAPH)
            half = None
        _rewrite(model, lower_tensorrt(plan, weights, fp8=fp8, half=half))
        types = product_types(model, plan)
        if fp8 and not any(kind == "FP8" for kind, _ in types.values()):
            raise LoweringError(
                f"--precision fp8: of {len(types)} layers none has codes that are all E4M3 numbers, up to 16",
                hint="rows or layers of more bits than 4 take int8: plan w4a4 without --mixed and with "
                "quantization.row_bits=even, or leave --precision out",
            )
        (folder / "types.json").write_text(json.dumps(types), encoding="utf-8")

    @property
    def canonical_graph(self) -> Path:
        """The canonical graph."""
        return self.passed.path / "canonical.onnx"

    @property
    def deployed_graph(self) -> Path:
        """The target's graph."""
        return self.passed.path / GRAPH

    @property
    def session_config(self) -> dict[str, str]:
        """Options without which ONNX Runtime does not load the deployed graph: of FP8 codes and a MatMul it would make
        an integer product.
        """
        return {"session.disable_quant_qdq": "1"} if self.recipe.lowering.precision == "fp8" else {}

    @property
    def engine_graph(self) -> Path:
        """What TensorRT builds from: the deployed graph, or one that only it runs."""
        own = self.passed.path / ENGINE_GRAPH
        return own if own.is_file() else self.deployed_graph

    @cached_property
    def engine_types(self) -> dict[str, tuple[str, list[str | list[str]]]]:
        """Type that TensorRT must give each planned layer, and the nodes to prove it by (`passes.lower.tensorrt`)."""
        found = json.loads((self.passed.path / "types.json").read_text(encoding="utf-8"))
        return {name: (kind, nodes) for name, (kind, nodes) in found.items()}

    @cached_property
    def compute_nodes(self) -> dict[str, list[str]]:
        """ONNX node names that multiply each planned layer, in the deployed graph."""
        nodes: dict[str, list[str]] = json.loads((self.passed.path / "nodes.json").read_text(encoding="utf-8"))
        return nodes

    # compile

    @cached_property
    def compiled(self) -> CompileResult:
        """The engine and the proof of its precision; a missing TensorRT is reported, not raised."""
        if not self.profile.builds_engine:
            return CompileResult(None, None, {}, None)
        if self.recipe.target is Target.OPENVINO:
            return self._compiled_for_openvino()
        from engines.precision import prove_types
        from engines.trt import TrtFlavor, build_engine, flavor_version, gpu_architecture

        flavor = TrtFlavor.RTX if self.recipe.target is Target.TRT_RTX else TrtFlavor.TRT
        types = self.engine_types
        key = {
            "version": STAGE_VERSIONS["compile"],
            "passes": self.passed.fingerprint,
            "flavor": flavor.value,
            "builder": flavor_version(flavor),
            "profiles": {name: [shape.min, shape.opt, shape.max] for name, shape in self.profiles.items()},
            "options": self.build_options.to_json(),
        }

        def build(folder: Path) -> None:
            result = build_engine(
                self.engine_graph,
                folder / "engine.plan",
                flavor=flavor,
                profiles=self.profiles,
                log_path=folder / "build.log",
                options=self.build_options,
            )
            proofs = prove_types(result.layers, types) if types else []
            facts: dict[str, Any] = {"target": flavor.value, "version": result.version}
            facts |= {"peak_rss_bytes": result.peak_rss_bytes}
            if flavor.needs_gpu:  # TensorRT-RTX builds for every architecture that it knows
                facts["arch"] = gpu_architecture()
            _write_proof(folder, {**facts, "seconds": result.seconds, "bytes": result.size_bytes}, proofs, types)

        try:
            record = self.workspace.stage("compile", key, build)
        except BackendMissingError as error:
            return CompileResult(None, None, {}, str(error))
        return CompileResult(record.path / "engine.plan", record.path / "build.log", _read_proof(record), None)

    def _compiled_for_openvino(self) -> CompileResult:
        from engines import openvino_ir

        device, quantized = self.recipe.lowering.openvino_device, self.quantized_nodes
        openvino_ir.check_device(device)
        examples = self.model.example_inputs(batch=2)
        shapes = {
            batch: {name: (batch, *value.shape[1:]) for name, value in examples.items()}
            for batch in sorted({1, self.recipe.lowering.max_batch})
        }
        key = {
            "version": STAGE_VERSIONS["compile"],
            "passes": self.passed.fingerprint,
            "builder": openvino_ir.version(),
            "device": device,
            "batches": list(shapes),
        }

        def build(folder: Path) -> None:
            with engine_graph(self.deployed_graph, folder) as graph:
                result = openvino_ir.build_ir(graph, folder, shapes, device=device, expected=quantized)
            facts = {"target": Target.OPENVINO.value, "version": result.version, "arch": device.lower()}
            _write_proof(
                folder, {**facts, "seconds": result.seconds, "bytes": result.size_bytes}, result.proofs, quantized
            )

        record = self.workspace.stage("compile", key, build)
        files = [record.path / name for name in (openvino_ir.IR_XML, openvino_ir.IR_BIN, openvino_ir.IR_JSON)]
        return CompileResult(files[0], None, _read_proof(record), None, tuple(files[1:]))

    @property
    def quantized_nodes(self) -> dict[str, list[str]]:
        """`compute_nodes` of the layers whose activations are quantized: what an engine must run in int8."""
        return {
            name: nodes
            for name, nodes in self.compute_nodes.items()
            if self.plan.layer(name).activation_bits is not None
        }

    @cached_property
    def profiles(self) -> dict[str, Any]:
        """Batch range of every input, for engines with dynamic batch."""
        from engines.trt import ShapeRange

        largest, tuned = self.recipe.lowering.max_batch, self.recipe.lowering.opt_batch
        shapes = {name: tuple(value.shape[1:]) for name, value in self.model.example_inputs(batch=2).items()}
        return {
            name: ShapeRange((1, *rest), (min(tuned, largest), *rest), (largest, *rest))
            for name, rest in shapes.items()
        }

    @cached_property
    def build_options(self) -> Any:
        """What TensorRT's builder is told beside the graph."""
        from engines.trt import BuildOptions, Hardware

        lowering = self.recipe.lowering
        return BuildOptions(
            timing_cache=None if lowering.timing_cache is None else Path(lowering.timing_cache),
            hardware=Hardware(lowering.hardware),
            version_compatible=lowering.version_compatible,
            refit=lowering.refit,
        )

    def run(self, until: Stage) -> None:
        """Run every stage up to and including `until`."""
        stages: dict[Stage, Callable[[], object]] = {
            Stage.LOAD: lambda: self.model,
            Stage.CALIBRATE: lambda: self.calibrated,
            Stage.PLAN: lambda: self.planned,
            Stage.TRAIN: lambda: self.trained_plan,
            Stage.EXPORT: lambda: self.exported,
            Stage.PASSES: lambda: self.passed,
            Stage.COMPILE: lambda: self.compiled,
        }
        if self.recipe.target is Target.OPENVINO and until is Stage.COMPILE:
            from engines.openvino_ir import check_device

            check_device(self.recipe.lowering.openvino_device)  # now, not after hours of calibration
        if self.recipe.lowering.tune not in (OFF, HOST):
            read_timings(Path(self.recipe.lowering.tune))
        for stage, action in stages.items():
            if stage is Stage.CALIBRATE and until not in (Stage.LOAD, Stage.CALIBRATE):
                self.prepare_sampler(until is not Stage.PLAN)  # now, not after hours of calibration
            action()
            if stage is until:
                return


def _rewrite(model: ir.Model, passes: ir.passes.Sequential) -> None:
    """Run passes in place; what a pass refuses is raised as it was meant, not wrapped by the pass manager."""
    try:
        passes(model)
    except ir.passes.PassError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DmqExportError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error


def _write_proof(folder: Path, facts: Mapping[str, Any], proofs: Sequence[Any], planned: Mapping[str, Any]) -> None:
    """`engine.json`: what was built, and for every planned layer the types that it multiplies."""
    document = {
        **facts,
        "layers_proven": len({proof.layer for proof in proofs}),
        "layers_planned": len(planned),
        "proofs": [{"layer": p.layer, "node": p.node, "activation": p.activation, "weight": p.weight} for p in proofs],
    }
    (folder / "engine.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def _read_proof(record: StageRecord) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((record.path / "engine.json").read_text(encoding="utf-8"))
    return document


def copy_graph(source: Path, folder: Path, name: str) -> None:
    """Copy an ONNX file and its external data. The data file keeps the name the graph refers to it by."""
    shutil.copyfile(source, folder / name)
    data = source.with_name(source.name + ".data")
    if data.is_file():
        shutil.copyfile(data, folder / data.name)
