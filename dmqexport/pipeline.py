"""The composition root: the ordered stages of a build, each cached by the content of what goes into it."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from dmqexport.bundle import GRAPH
from dmqexport.errors import BackendMissingError
from dmqexport.onnx_export import OPSET, export_float_graph, save_model
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_train import Training
from dmqexport.target import Target, cpu_has_vnni
from dmqexport.workspace import StageRecord
from passes.bind import bind
from passes.pipelines import canonical, float_cleanup, lower_ort_cpu, lower_tensorrt

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
    """What compiling gave. engine: the serialized engine, None where the target has none or its backend is missing."""

    engine: Path | None
    log: Path | None
    document: Mapping[str, Any]
    missing: str | None


class Build(Training):
    """One recipe on one work folder. Every stage is a property: asking for one runs what it needs, once."""

    # export

    @cached_property
    def exported(self) -> StageRecord:
        """Float graph: `float.onnx`."""
        key = {
            "version": STAGE_VERSIONS["export"],
            "model": self.model.fingerprint,
            "folds": self._fold_key(),
            "opset": OPSET,
            "torch": torch.__version__,
        }

        def build(folder: Path) -> None:
            family, denoiser = self.model.family, self.model.denoiser
            wrapped = family.wrap(denoiser)
            export_float_graph(
                wrapped,
                self.model.example_inputs(batch=2),
                folder / "exported.onnx",
                wrapper="" if wrapped is denoiser else "denoiser",
                dynamic_axes=family.dynamic_axes,
            )
            model = ir.load(folder / "exported.onnx")
            float_cleanup()(model)
            save_model(model, folder / "float.onnx")
            for path in folder.glob("exported.onnx*"):
                path.unlink()

        return self.workspace.stage("export", key, build)

    @property
    def float_graph(self) -> Path:
        """The float graph, simplified exactly as the quantized ones are."""
        return self.exported.path / "float.onnx"

    # passes

    @cached_property
    def vnni(self) -> bool:
        """Whether the ort-cpu graph may rely on VNNI."""
        choice = self.recipe.lowering.cpu_isa
        return cpu_has_vnni() if choice == "auto" else choice == "vnni"

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
            "vnni": self.vnni if target is Target.ORT_CPU else None,
        }

        def build(folder: Path) -> None:
            plan, weights = self.plan, self.weights
            model = ir.load(self.float_graph)
            insisted = frozenset(layer.name for layer in plan.layers if layer.reason.startswith("override"))
            canonical(plan, weights, insisted)(model)
            save_model(model, folder / "canonical.onnx")
            if target is Target.ORT_CPU:
                lower_ort_cpu(plan, weights, vnni=self.vnni)(model)
            elif target in (Target.TRT, Target.TRT_RTX):
                lower_tensorrt(plan, weights)(model)
            save_model(model, folder / GRAPH)
            nodes = {name: [n.name for n in item.compute] for name, item in bind(model, plan).layers.items()}
            (folder / "nodes.json").write_text(json.dumps(nodes), encoding="utf-8")

        return self.workspace.stage("passes", key, build)

    @property
    def canonical_graph(self) -> Path:
        """The canonical graph."""
        return self.passed.path / "canonical.onnx"

    @property
    def deployed_graph(self) -> Path:
        """The target's graph."""
        return self.passed.path / GRAPH

    @cached_property
    def compute_nodes(self) -> dict[str, list[str]]:
        """ONNX node names that multiply each planned layer, in the deployed graph."""
        nodes: dict[str, list[str]] = json.loads((self.passed.path / "nodes.json").read_text(encoding="utf-8"))
        return nodes

    # compile

    @cached_property
    def compiled(self) -> CompileResult:
        """The engine and the proof of its precision; a missing backend is reported, not raised."""
        if not self.profile.builds_engine:
            return CompileResult(None, None, {}, None)
        from engines.precision import prove_int8
        from engines.trt import TrtFlavor, build_engine, flavor_version

        flavor = TrtFlavor.RTX if self.recipe.target is Target.TRT_RTX else TrtFlavor.TRT
        quantized = {
            name: nodes
            for name, nodes in self.compute_nodes.items()
            if self.plan.layer(name).activation_bits is not None
        }
        key = {
            "version": STAGE_VERSIONS["compile"],
            "passes": self.passed.fingerprint,
            "flavor": flavor.value,
            "builder": flavor_version(flavor),
            "profiles": {name: [shape.min, shape.opt, shape.max] for name, shape in self.profiles.items()},
        }

        def build(folder: Path) -> None:
            result = build_engine(
                self.deployed_graph,
                folder / "engine.plan",
                flavor=flavor,
                profiles=self.profiles,
                log_path=folder / "build.log",
            )
            proofs = prove_int8(result.layers, quantized) if quantized else []
            document = {
                "target": flavor.value,
                "version": result.version,
                "seconds": result.seconds,
                "bytes": result.size_bytes,
                "peak_rss_bytes": result.peak_rss_bytes,
                "layers_proven": len({proof.layer for proof in proofs}),
                "layers_planned": len(quantized),
                "proofs": [
                    {"layer": p.layer, "node": p.node, "activation": p.activation, "weight": p.weight} for p in proofs
                ],
            }
            (folder / "engine.json").write_text(json.dumps(document, indent=1), encoding="utf-8")

        try:
            record = self.workspace.stage("compile", key, build)
        except BackendMissingError as error:
            return CompileResult(None, None, {}, str(error))
        document = json.loads((record.path / "engine.json").read_text(encoding="utf-8"))
        return CompileResult(record.path / "engine.plan", record.path / "build.log", document, None)

    @cached_property
    def profiles(self) -> dict[str, Any]:
        """Batch range of every input, for engines with dynamic batch."""
        from engines.trt import ShapeRange

        largest = self.recipe.lowering.max_batch
        shapes = {name: tuple(value.shape[1:]) for name, value in self.model.example_inputs(batch=2).items()}
        return {
            name: ShapeRange((1, *rest), (min(2, largest), *rest), (largest, *rest)) for name, rest in shapes.items()
        }

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
        for stage, action in stages.items():
            action()
            if stage is until:
                return


def copy_graph(source: Path, folder: Path, name: str) -> None:
    """Copy an ONNX file and its external data. The data file keeps the name the graph refers to it by."""
    shutil.copyfile(source, folder / name)
    data = source.with_name(source.name + ".data")
    if data.is_file():
        shutil.copyfile(data, folder / data.name)
