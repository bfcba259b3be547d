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

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

import dmqexport
from calib.bit_allocation import uniform
from calib.freeze import freeze
from calib.observer import Observer, load_statistics, save_statistics
from calib.probe import LayerInfo, ProbeResult, probe
from calib.sampling import TIMESTEP, CalibrationSet
from calib.timestep_table import PER_STEP, equal_groups, per_step, used_rows
from dmqexport.bundle import GRAPH, is_replaceable
from dmqexport.errors import BackendMissingError, RecipeError
from dmqexport.models.loading import LoadedModel, load_model
from dmqexport.models.sampling import sample_images
from dmqexport.onnx_export import OPSET, export_float_graph, save_model
from dmqexport.quant_plan import WEIGHT_CODES, QuantPlan, QuantWeights
from dmqexport.quant_types import BitWidths
from dmqexport.recipe import Recipe
from dmqexport.target import PROFILES, Target, cpu_has_vnni
from dmqexport.workspace import StageRecord, Workspace
from passes.bind import bind
from passes.pipelines import canonical, float_cleanup, lower_ort_cpu, lower_tensorrt

logger = logging.getLogger(__name__)

#: Raise a stage's number when its result changes for the same inputs, so that old work folders are not reused.
_STAGE_VERSIONS = {
    "trajectories": 1,
    "statistics": 1,
    "plan": 1,
    "export": 1,
    "passes": 2,
    "compile": 1,
    "reference": 1,
}
_CALIBRATION_SEED = 1_000_000  # far from the seeds of evaluation pictures


class Stage(StrEnum):
    """What a build does, in order; also the sub-commands."""

    LOAD = "load"
    CALIBRATE = "calibrate"
    PLAN = "plan"
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


class Build:
    """One recipe on one work folder. Every stage is a property: asking for one runs what it needs, once."""

    def __init__(self, recipe: Recipe, output: Path, workspace: Workspace) -> None:
        """Raises RecipeError when `output` holds something that is not a bundle."""
        if not is_replaceable(output):
            raise RecipeError(
                f"{output} exists and is not a dmqexport bundle; nothing was touched",
                hint="choose another -o/--output, or remove the folder yourself",
            )
        self.recipe = recipe
        self.output = output
        self.workspace = workspace

    @property
    def profile(self) -> Any:
        """The target's profile."""
        return PROFILES[self.recipe.target]

    # load

    @cached_property
    def model(self) -> LoadedModel:
        """The float model."""
        reporter = self.workspace.reporter
        reporter.started(Stage.LOAD)
        sampling = self.recipe.sampling
        loaded = load_model(
            self.recipe.model,
            scheduler=sampling.scheduler,
            revision=self.recipe.revision,
            embeddings=self.recipe.calibration.embeddings,
        )
        reporter.finished(Stage.LOAD, 0.0, False)
        return loaded

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's diffusers config, without where it was loaded from."""
        config: Any = self.model.denoiser.config
        return {key: value for key, value in dict(config).items() if key != "_name_or_path"}

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return self.recipe.sampling.steps or self.model.default_steps

    @property
    def guidance(self) -> float:
        """Guidance scale."""
        chosen = self.recipe.sampling.guidance
        return self.model.default_guidance if chosen is None else chosen

    @cached_property
    def calibration_prompts(self) -> tuple[str, ...]:
        """One prompt a calibration trajectory (repeated when there are fewer); empty for unconditional models."""
        size, path = self.recipe.calibration.size, self.recipe.calibration.prompts
        prompts = self.model.default_prompts
        if path is not None:
            try:
                lines = Path(path).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"calibration prompts {path} cannot be read: {error}") from error
            prompts = tuple(line.strip() for line in lines if line.strip())
            if not prompts:
                raise RecipeError(f"calibration prompts {path}: no line with text")
        return tuple(prompts[index % len(prompts)] for index in range(size)) if prompts else ()

    # calibrate

    @cached_property
    def trajectories(self) -> StageRecord:
        """Float trajectories: `calibration.safetensors`."""
        recipe = self.recipe
        key = {
            **self.base_key("trajectories"),
            "prompts": self.calibration_prompts,
            "size": recipe.calibration.size,
            "seed": recipe.seed,
        }

        def build(folder: Path) -> None:
            result = sample_images(
                self.model,
                list(self.calibration_prompts) or None,
                [_CALIBRATION_SEED + recipe.seed * 100_003 + index for index in range(recipe.calibration.size)],
                steps=self.steps,
                guidance=self.guidance,
                batch_size=recipe.calibration.batch_size,
                record=True,
                progress=self.workspace.reporter.progress,
            )
            assert result.calibration is not None
            result.calibration.save(folder / "calibration.safetensors")

        return self.workspace.stage("trajectories", key, build)

    @cached_property
    def calibration_set(self) -> CalibrationSet:
        """The recorded trajectories."""
        return CalibrationSet.load(self.trajectories.path / "calibration.safetensors")

    @cached_property
    def row_map(self) -> np.ndarray[Any, Any]:
        """int64 [training timesteps], timestep value → row."""
        calibration, used = self.recipe.calibration, np.unique(self.calibration_set.timesteps.numpy())
        total = self.model.num_train_timesteps
        if calibration.row_assignment == PER_STEP:
            return per_step(total, used)
        return used_rows(equal_groups(total, calibration.rows), used)

    @cached_property
    def probe_result(self) -> ProbeResult:
        """What can be quantized, found by running the float model twice."""
        entries = self.calibration_set
        first, last = int(torch.argmin(entries.timesteps)), int(torch.argmax(entries.timesteps))
        varying = {"sample", TIMESTEP}

        def run(index: int) -> Tensor:
            inputs = entries.select(torch.tensor([first]))
            if index == 1:
                other = entries.select(torch.tensor([last]))
                inputs = {name: other[name] if name in varying else value for name, value in inputs.items()}
            return self._denoise(inputs)

        found = probe(self.model.denoiser, run)
        return found if self.recipe.quantization.split_concat else _unsplit(found)

    @cached_property
    def calibrated(self) -> StageRecord:
        """Activation statistics per tensor and row: `statistics.safetensors`."""
        recipe = self.recipe
        key = {
            "version": _STAGE_VERSIONS["statistics"],
            "trajectories": self.trajectories.fingerprint,
            "rows": recipe.calibration.rows,
            "row_assignment": recipe.calibration.row_assignment,
            "samples_per_row": recipe.calibration.samples_per_row,
            "attention": recipe.quantization.attention_bits is not None,
            "split_concat": recipe.quantization.split_concat,
            "seed": recipe.seed,
        }

        def build(folder: Path) -> None:
            observer = Observer(
                self.probe_result,
                self.row_map,
                recipe.calibration.samples_per_row,
                recipe.seed,
                recipe.quantization.attention_bits is not None,
            )
            observer.observe(
                self.model.denoiser,
                self.calibration_set,
                self._denoise,
                recipe.calibration.batch_size,
                self.workspace.reporter.progress,
            )
            save_statistics(folder / "statistics.safetensors", observer.statistics_)

        return self.workspace.stage("statistics", key, build)

    # plan

    @cached_property
    def planned(self) -> StageRecord:
        """QuantPlan and weight codes."""
        recipe, quantization = self.recipe, self.recipe.quantization
        boundary = self.model.family.boundary if quantization.boundary is None else quantization.boundary
        key = {
            "version": _STAGE_VERSIONS["plan"],
            "statistics": self.calibrated.fingerprint,
            "bits": recipe.bits,
            "boundary": boundary,
            "quantization": quantization.model_dump(mode="json"),
        }

        def build(folder: Path) -> None:
            found = self.probe_result
            if quantization.boundary is None:
                # The family's list covers all its variants; a pattern the user wrote must match.
                names = [layer.name for layer in found.layers]
                patterns = [p for p in boundary if any(_matches(name, p) for name in names)]
            else:
                patterns = list(boundary)
            overrides = {pattern: BitWidths.parse(text) for pattern, text in quantization.overrides.items()}
            freeze(
                self.model.denoiser,
                found,
                uniform(found, recipe.widths, patterns, overrides, quantization.keep_float),
                load_statistics(self.calibrated.path / "statistics.safetensors"),
                self.row_map,
                quantization.attention_bits,
                self.model.fingerprint,
                recipe.bits,
                folder / WEIGHT_CODES,
                self.workspace.reporter.progress,
            ).save(folder)

        return self.workspace.stage("plan", key, build)

    @cached_property
    def plan(self) -> QuantPlan:
        """The plan."""
        return QuantPlan.load(self.planned.path)

    @property
    def weights(self) -> QuantWeights:
        """Weight codes of the plan."""
        return QuantWeights(self.planned.path / WEIGHT_CODES)

    # export

    @cached_property
    def exported(self) -> StageRecord:
        """Float graph: `float.onnx`."""
        key = {
            "version": _STAGE_VERSIONS["export"],
            "model": self.model.fingerprint,
            "opset": OPSET,
            "torch": torch.__version__,
        }

        def build(folder: Path) -> None:
            wrapped = self.model.family.wrap(self.model.denoiser)
            export_float_graph(wrapped, self.model.example_inputs(batch=2), folder / "exported.onnx")
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
            "version": _STAGE_VERSIONS["passes"],
            "plan": self.plan.fingerprint,
            "codes": self.planned.fingerprint,
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
            "version": _STAGE_VERSIONS["compile"],
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

    # shared

    def base_key(self, stage: str) -> dict[str, Any]:
        """What every stage that samples pictures depends on."""
        return {
            "version": _STAGE_VERSIONS[stage],
            "dmqexport": dmqexport.__version__,
            "model": self.model.fingerprint,
            "scheduler": self.recipe.sampling.scheduler,
            "steps": self.steps,
            "guidance": self.guidance,
            "embeddings": self.recipe.calibration.embeddings,
        }

    def _denoise(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.model.denoiser(**inputs, return_dict=False)[0]
        return output

    def run(self, until: Stage) -> None:
        """Run every stage up to and including `until`."""
        stages: dict[Stage, Callable[[], object]] = {
            Stage.LOAD: lambda: self.model,
            Stage.CALIBRATE: lambda: self.calibrated,
            Stage.PLAN: lambda: self.planned,
            Stage.EXPORT: lambda: self.exported,
            Stage.PASSES: lambda: self.passed,
            Stage.COMPILE: lambda: self.compiled,
        }
        for stage, action in stages.items():
            action()
            if stage is until:
                return


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern)


def _unsplit(found: ProbeResult) -> ProbeResult:
    layers = tuple(
        LayerInfo(
            layer.name,
            layer.op,
            ((0, layer.segments[-1][1]),),
            layer.source,
            layer.timestep_dependent,
            layer.parameters,
            layer.macs,
        )
        for layer in found.layers
    )
    return ProbeResult(layers, found.attentions, found.unsupported)


def copy_graph(source: Path, folder: Path, name: str) -> None:
    """Copy an ONNX file and its external data. The data file keeps the name the graph refers to it by."""
    shutil.copyfile(source, folder / name)
    data = source.with_name(source.name + ".data")
    if data.is_file():
        shutil.copyfile(data, folder / data.name)
