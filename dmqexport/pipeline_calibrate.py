"""The first half of a build: load, trajectories, equalize, statistics, plan; each cached by what goes into it."""

import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

import dmqexport
from calib.bit_allocation import uniform
from calib.equalize import apply_folds, fold_sites, measure_folds
from calib.freeze import LayerBits, freeze
from calib.observer import Observer, load_statistics, save_statistics
from calib.probe import LayerInfo, ProbeResult, probe
from calib.sampling import TIMESTEP, CalibrationSet
from calib.second_order import refine_weights
from calib.timestep_table import PER_STEP, equal_groups, per_step, used_rows
from dmqexport.bundle import is_replaceable
from dmqexport.errors import RecipeError
from dmqexport.models.loading import LoadedModel, load_model
from dmqexport.models.sampling import sample_images
from dmqexport.pipeline_checks import check_recipe
from dmqexport.quant_plan import WEIGHT_CODES, ChannelFold, QuantPlan, QuantWeights
from dmqexport.quant_types import BitWidths
from dmqexport.recipe import Recipe
from dmqexport.target import PROFILES
from dmqexport.workspace import StageRecord, Workspace, content_key

#: Raise a stage's number when its result changes for the same inputs, so that old work folders are not reused.
STAGE_VERSIONS = {
    "trajectories": 1,
    "equalize": 2,
    "statistics": 1,
    "plan": 2,
    "export": 1,
    "passes": 2,
    "compile": 1,
    "reference": 1,
    "features": 1,
}
_EQUALIZE_ENTRIES = 512  # channel extremes settle long before quantization ranges do
_REFINE_ENTRIES = 1024  # second moments; more changes nothing measurable
_CALIBRATION_SEED = 1_000_000  # far from the seeds of evaluation pictures


class Calibration:
    """From a recipe to its QuantPlan. Every stage is a property: asking for one runs what it needs, once."""

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
        reporter, start = self.workspace.reporter, time.perf_counter()
        reporter.started("load")
        sampling = self.recipe.sampling
        loaded = load_model(
            self.recipe.model,
            scheduler=sampling.scheduler,
            revision=self.recipe.revision,
            embeddings=self.recipe.calibration.embeddings,
        )
        check_recipe(self.recipe, loaded)
        reporter.finished("load", time.perf_counter() - start, False)
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
    def folds(self) -> tuple[ChannelFold, ...]:
        """Channel factors, folded into the model's weights once known: every later stage sees those weights."""
        strength = self.recipe.quantization.equalize
        sites = fold_sites(self.model.denoiser) if strength is not None else []
        if strength is None or not sites:
            return ()
        key = {
            "version": STAGE_VERSIONS["equalize"],
            "trajectories": self.trajectories.fingerprint,
            "strength": strength,
            "seed": self.recipe.seed,
        }

        def build(folder: Path) -> None:
            folds = measure_folds(
                self.model.denoiser,
                sites,
                self.calibration_set.subset(_EQUALIZE_ENTRIES, self.recipe.seed),
                self._denoise,
                self.recipe.calibration.batch_size,
                strength,
                self.workspace.reporter.progress,
            )
            save_file({fold.producer: fold.factor for fold in folds}, str(folder / "folds.safetensors"))

        record = self.workspace.stage("equalize", key, build)
        factors = load_file(str(record.path / "folds.safetensors"))
        folds = tuple(ChannelFold(site.producer, site.consumers, factors[site.producer]) for site in sites)
        apply_folds(self.model.denoiser, folds, lambda: self._denoise(self.calibration_set.select(torch.tensor([0]))))
        return folds

    def _fold_key(self) -> list[str]:
        """What the folded weights depend on, beside the model."""
        return [content_key({"producer": fold.producer, "factor": fold.factor.tobytes().hex()}) for fold in self.folds]

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
            "version": STAGE_VERSIONS["statistics"],
            "trajectories": self.trajectories.fingerprint,
            "folds": self._fold_key(),
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
    def layer_bits(self) -> dict[str, LayerBits]:
        """The widths of every layer."""
        quantization = self.recipe.quantization
        patterns: list[str] = list(self.boundary)
        if quantization.boundary is None:
            # The family's list covers all its variants; a pattern the user wrote must match.
            names = [layer.name for layer in self.probe_result.layers]
            patterns = [p for p in patterns if any(fnmatchcase(name, p) for name in names)]
        overrides = {pattern: BitWidths.parse(text) for pattern, text in quantization.overrides.items()}
        return uniform(self.probe_result, self.recipe.widths, patterns, overrides, quantization.keep_float)

    @property
    def boundary(self) -> tuple[str, ...]:
        """Patterns of the layers that stay at 8 bits."""
        chosen = self.recipe.quantization.boundary
        return tuple(self.model.family.boundary if chosen is None else chosen)

    @cached_property
    def planned(self) -> StageRecord:
        """QuantPlan and weight codes, nothing trained."""
        recipe, quantization = self.recipe, self.recipe.quantization
        key = {
            "version": STAGE_VERSIONS["plan"],
            "statistics": self.calibrated.fingerprint,
            "bits": recipe.bits,
            "layers": {name: str(item) for name, item in self.layer_bits.items()},
            "quantization": quantization.model_dump(mode="json"),
        }

        def build(folder: Path) -> None:
            reporter = self.workspace.reporter
            plan = freeze(
                self.model.denoiser,
                self.probe_result,
                self.layer_bits,
                load_statistics(self.calibrated.path / "statistics.safetensors"),
                self.row_map,
                quantization.attention_bits,
                self.model.fingerprint,
                recipe.bits,
                folder / WEIGHT_CODES,
                self.folds,
                reporter.progress,
                quantization.range,
            )
            if quantization.rounding == "second-order":
                plan, codes = refine_weights(
                    self.model.denoiser,
                    plan,
                    QuantWeights(folder / WEIGHT_CODES),
                    self.calibration_set.subset(_REFINE_ENTRIES, recipe.seed),
                    self._denoise,
                    recipe.calibration.batch_size,
                    recipe.seed,
                    reporter.progress,
                )
                QuantWeights.save(folder / WEIGHT_CODES, codes)
            plan.save(folder)

        return self.workspace.stage("plan", key, build)

    @cached_property
    def plan(self) -> QuantPlan:
        """The plan."""
        return QuantPlan.load(self.planned.path)

    @property
    def weights(self) -> QuantWeights:
        """Weight codes of the plan."""
        return QuantWeights(self.planned.path / WEIGHT_CODES)

    # shared

    def base_key(self, stage: str) -> dict[str, Any]:
        """What every stage that samples pictures depends on."""
        return {
            "version": STAGE_VERSIONS[stage],
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
