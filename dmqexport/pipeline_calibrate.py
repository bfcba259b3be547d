"""The first half of a build: trajectories, scaling, statistics, plan; each cached by what goes into it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dmqexport
from calib.bit_allocation import uniform
from calib.channel_scaling import ChannelScaling, ScalingSettings, choose_scaling
from calib.equalize import apply_folds, fold_sites
from calib.freeze import LayerBits, RowBits, freeze
from calib.observer import Observer, load_statistics, save_statistics
from calib.probe import LayerInfo, ProbeResult, probe
from calib.sampling import TIMESTEP, CalibrationSet
from calib.second_order import refinable, refine_weights
from calib.step_ranges import step_ranges
from calib.timestep_table import CLUSTER, PER_STEP, clustered, equal_groups, per_step, used_rows
from dmqexport.models.sampling import sample_images
from dmqexport.pipeline_checks import no_remainder
from dmqexport.pipeline_drawn import Drawing
from dmqexport.pipeline_parts import Progress, chunks, make_parts
from dmqexport.quant_plan import Allocation, ChannelFold, QuantPlan
from dmqexport.quant_types import MAX_BITS, BitWidths
from dmqexport.quant_weights import WEIGHT_CODES, QuantWeights
from dmqexport.workspace import StageRecord, content_key

#: Raise a stage's number when its result changes for the same inputs, so that old work folders are not reused.
STAGE_VERSIONS = {
    "trajectories": 3,
    "scaling": 3,
    "candidates": 2,
    "sensitivity": 1,
    "allocation": 2,
    "pareto": 1,
    "statistics": 3,
    "plan": 7,
    "training-set": 2,
    "targets": 1,
    "draft": 3,
    "step-errors": 2,
    "row-bits": 4,
    "remainders": 1,
    "activation-bits": 1,
    "weight-bits": 1,
    "blocks": 3,
    "network": 5,
    "trajectory-ends": 1,
    "sampler": 3,
    "export": 2,
    "tuning": 2,
    "passes": 12,
    "compile": 2,
    "reference": 1,
    "features": 1,
}
_RANGE_ENTRIES = 320  # a range a step is a mean over the entries of that step
_COMPENSATED = 0.5  # about what second-order rounding leaves of a weight's output error
_SCALING_ENTRIES = 256  # channel extremes settle long before quantization ranges do
_STATISTICS_PARTS = 32  # fixed: sums are added part by part
_WHOLE_TRAJECTORIES = 64  # kept call by call; of more trajectories, as many calls in all
_CALIBRATION_SEED = 1_000_000  # far from the seeds of evaluation pictures


class Calibration(Drawing):
    """From a recipe to its QuantPlan. Every stage is a property: asking for one runs what it needs, once."""

    # calibrate

    @property
    def calibration_seed(self) -> int:
        """Seed of the first calibration trajectory; the others follow."""
        return _CALIBRATION_SEED + self.recipe.seed * 100_003

    @cached_property
    def trajectories(self) -> StageRecord:
        """Calls along float trajectories: `calibration.safetensors`; about as many entries as 64 whole ones have."""
        recipe = self.recipe
        size = recipe.calibration.size
        prompts = self.calibration_prompts
        key = {**self.base_key("trajectories"), "prompts": prompts, "size": size, "seed": recipe.seed}
        stride = max(1, size // _WHOLE_TRAJECTORIES)

        def build(folder: Path) -> None:
            with self.workspace.partial("trajectories", key) as scratch:
                progress = self.workspace.reporter.progress
                parts = self.sampled(
                    scratch, size, prompts, self.calibration_seed, stride,
                    lambda done, total: progress(done * size // total, size),
                )  # fmt: skip
                if self.workspace.ranks.rank == 0:
                    joined = CalibrationSet.concatenate([CalibrationSet.load(part) for part in parts])
                    joined.save(folder / "calibration.safetensors")

        return self.workspace.stage("trajectories", key, build, shared=True)

    def sampled(
        self, scratch: Path, count: int, prompts: Sequence[str], seed: int, stride: int, progress: Progress
    ) -> list[Path]:
        """Files of `count` float trajectories from consecutive seeds, of each every `stride`-th call; batch by batch,
        each by one rank."""
        batch = self.batch_size

        def make(number: int, path: Path) -> None:
            start, stop = number * batch, min((number + 1) * batch, count)
            with self.computing(reduced=True):
                self.recorded(start, stop, prompts, seed).thinned(stride).save(path)

        return make_parts(self.workspace.ranks, scratch, f"by-{batch}", -(-count // batch), make, progress)

    def recorded(self, start: int, stop: int, prompts: Sequence[str], seed: int) -> CalibrationSet:
        """Every call along float trajectories `start` to `stop` - 1 of those that begin with `seed`, in one batch."""
        result = sample_images(
            self.model,
            list(prompts[start:stop]) or None,
            [seed + index for index in range(start, stop)],
            steps=self.steps,
            guidance=self.guidance,
            batch_size=stop - start,
            record=True,
        )
        assert result.calibration is not None
        return result.calibration.renumbered(start)

    @cached_property
    def calibration_set(self) -> CalibrationSet:
        """The recorded trajectories."""
        return CalibrationSet.load(self.trajectories.path / "calibration.safetensors")

    @cached_property
    def row_map(self) -> np.ndarray[Any, Any]:
        """int64 [training timesteps], timestep value → row."""
        if self.recipe.drawn:
            return self.drawn_row_map
        calibration, used = self.recipe.calibration, np.unique(self.calibration_set.timesteps.numpy())
        total = self.model.num_timesteps
        if calibration.row_assignment == PER_STEP:
            return per_step(total, used)
        if calibration.row_assignment == CLUSTER:
            found, entries = self.probe_result, self.calibration_set.subset(_RANGE_ENTRIES, self.recipe.seed)
            with self.computing():
                steps, features = step_ranges(self.model.denoiser, found, entries, self._denoise, self.batch_size)
            return clustered(total, steps, features, calibration.rows)
        return used_rows(equal_groups(total, calibration.rows), used)

    @cached_property
    def scaling(self) -> ChannelScaling:
        """Channel factors. Those that fold are in the model's weights once known: every later stage sees those."""
        recipe, denoiser = self.recipe, self.model.denoiser
        if recipe.scaling.method == "none":
            return ChannelScaling()
        row_map, found = self.row_map, self.probe_result
        compensated = recipe.quantization.rounding == "second-order"
        settings = ScalingSettings(
            **recipe.scaling.model_dump(exclude={"rotation"}), weight_error=_COMPENSATED if compensated else 1.0
        )
        key = {
            "version": STAGE_VERSIONS["scaling"],
            "trajectories": self.trajectories.fingerprint,
            "rows": content_key({"row_map": row_map.tolist()}),
            "layers": {name: str(item) for name, item in self.nominal_bits.items()},
            "split_concat": recipe.quantization.split_concat,
            "scaling": asdict(settings),
            "seed": recipe.seed,
        }

        def build(folder: Path) -> None:
            with self.computing():
                chosen = choose_scaling(
                    denoiser,
                    found,
                    self.nominal_bits,
                    row_map,
                    self.calibration_set.subset(_SCALING_ENTRIES, recipe.seed),
                    self._denoise,
                    self.batch_size,
                    settings,
                    recipe.seed,
                    self.workspace.reporter.progress,
                )
            chosen.save(folder)

        scaling = ChannelScaling.load(self.workspace.stage("scaling", key, build).path)
        first = self.calibration_set.select(torch.tensor([0]))
        apply_folds(denoiser, fold_sites(denoiser), scaling.folds, lambda: self._denoise(first))
        return scaling

    @property
    def folds(self) -> tuple[ChannelFold, ...]:
        """Channel factors that are part of the model's weights."""
        return self.scaling.folds

    def _fold_key(self) -> list[str]:
        """What the folded weights depend on, beside the model."""
        return [
            content_key({"consumer": fold.consumers[0], "factor": fold.factor.tobytes().hex()}) for fold in self.folds
        ]

    def _factor_key(self) -> dict[str, str]:
        """What the tensors that quantizers see depend on, beside the folded model."""
        return {key: content_key({"factor": array.tobytes().hex()}) for key, array in self.scaling.factors.items()}

    @cached_property
    def probe_result(self) -> ProbeResult:
        """What can be quantized, found by running the float model twice."""
        if self.recipe.drawn:
            return self.drawn_probe if self.recipe.quantization.split_concat else _unsplit(self.drawn_probe)
        entries = self.calibration_set
        first, last = int(torch.argmin(entries.timesteps)), int(torch.argmax(entries.timesteps))
        varying = {self.model.family.input_names[0], TIMESTEP}

        def run(index: int) -> Tensor:
            inputs = entries.select(torch.tensor([first]))
            if index == 1:
                other = entries.select(torch.tensor([last]))
                inputs = {name: other[name] if name in varying else value for name, value in inputs.items()}
            return self._denoise(inputs)

        with self.computing():
            found = probe(self.model.denoiser, run)
        return found if self.recipe.quantization.split_concat else _unsplit(found)

    @cached_property
    def calibrated(self) -> StageRecord:
        """Activation statistics per tensor and row: `statistics.safetensors`."""
        recipe = self.recipe
        if recipe.drawn:
            return self.drawn_statistics(self.probe_result)
        key = {
            "version": STAGE_VERSIONS["statistics"],
            "trajectories": self.trajectories.fingerprint,
            "folds": self._fold_key(),
            "factors": self._factor_key(),
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
                self.scaling.factors,
            )
            data, batch = self.calibration_set, self.batch_size
            pieces = chunks(-(-len(data) // batch), _STATISTICS_PARTS)

            def make(number: int, path: Path) -> None:
                found = observer.observe_part(self.model.denoiser, data, self._denoise, batch, pieces[number])
                save_file(found, str(path))

            with self.workspace.partial("statistics", key) as scratch, self.computing():
                progress, ranks = self.workspace.reporter.progress, self.workspace.ranks
                parts = make_parts(ranks, scratch, f"by-{batch}", len(pieces), make, progress)
                if ranks.rank == 0:
                    statistics = observer.combine(load_file(str(part)) for part in parts)
                    save_statistics(folder / "statistics.safetensors", statistics)

        return self.workspace.stage("statistics", key, build, shared=True)

    # plan

    @property
    def layer_bits(self) -> dict[str, LayerBits]:
        """The widths of every layer."""
        return self.nominal_bits

    @property
    def allocation_fingerprint(self) -> str | None:
        """What the widths were chosen by, when not by the recipe alone."""
        return None

    def allocation_of(self, plan: QuantPlan) -> Allocation:
        """How the widths of `plan` were chosen."""
        return plan.allocation

    @cached_property
    def nominal_bits(self) -> dict[str, LayerBits]:
        """The widths that the recipe asks for layer by layer; channel factors are chosen at these."""
        quantization = self.recipe.quantization
        patterns: list[str] = list(self.boundary)
        if quantization.boundary is None:
            # The family's list covers all its variants; a pattern the user wrote must match.
            names = [layer.name for layer in self.probe_result.layers]
            patterns = [p for p in patterns if any(fnmatchcase(name, p) for name in names)]
            if self.timestep_only:
                free = set(self.timestep_only)
                patterns = [name for name in names if name not in free and _matches(name, patterns)]
        overrides = {pattern: BitWidths.parse(text) for pattern, text in quantization.overrides.items()}
        return uniform(self.probe_result, self.recipe.widths, patterns, overrides, quantization.keep_float)

    @property
    def boundary(self) -> tuple[str, ...]:
        """Patterns of the layers that stay at 8 bits."""
        chosen = self.recipe.quantization.boundary
        return tuple(self.model.family.boundary if chosen is None else chosen)

    @property
    def timestep_only(self) -> tuple[str, ...]:
        """Layers that are given other bits than the boundary's though they belong to it: they see the timestep alone.
        Rounding them minds timesteps that no sampling step has, too."""
        allocation = self.recipe.allocation
        if not (allocation.allocates and allocation.time_projections) or self.recipe.quantization.boundary is not None:
            return ()
        patterns = self.model.family.time_projections
        return tuple(info.name for info in self.probe_result.layers if _matches(info.name, patterns))

    @property
    def remainder_patterns(self) -> tuple[str, ...]:
        """Patterns of the layers whose activations have a remainder where they have 8 bits."""
        chosen = self.recipe.quantization.remainder
        return tuple(self.model.family.first_layers if chosen is None else chosen)

    def remainders(self, bits: Mapping[str, LayerBits]) -> tuple[str, ...]:
        """Layers with 8-bit activations whose remainders are quantized too."""
        return self.named_remainders(bits)

    def named_remainders(self, bits: Mapping[str, LayerBits]) -> tuple[str, ...]:
        """Those of them that the recipe names, or the family.

        Raises RecipeError for a pattern of the recipe that matches no such layer.
        """
        chosen, patterns = self.recipe.quantization.remainder, self.remainder_patterns
        eight = [name for name, item in bits.items() if item.widths is not None and item.widths.activation == MAX_BITS]
        for pattern in chosen or ():
            if not any(fnmatchcase(name, pattern) for name in eight):
                raise no_remainder(pattern)
        return tuple(name for name in eight if any(fnmatchcase(name, pattern) for pattern in patterns))

    @property
    def attention_key(self) -> dict[str, Any]:
        """What plans with quantized attention depend on beside its bits."""
        return {} if self.recipe.quantization.attention_bits is None else {"probabilities": "unsigned"}

    @cached_property
    def planned(self) -> StageRecord:
        """QuantPlan and weight codes, nothing trained."""
        recipe, quantization = self.recipe, self.recipe.quantization
        key = {
            "version": STAGE_VERSIONS["plan"],
            "statistics": self.calibrated.fingerprint,
            "bits": recipe.bits,
            "layers": {name: str(item) for name, item in self.layer_bits.items()},
            "allocation": self.allocation_fingerprint,
            "quantization": quantization.model_dump(mode="json"),
            "remainders": self.remainders(self.layer_bits),
            "row_bits": None if self.row_bits is None else self.row_bits.offsets.tolist(),
            **self.attention_key,
            **self.refining_key,
        }

        def build(folder: Path) -> None:
            reporter = self.workspace.reporter
            refined = quantization.rounding == "second-order"
            plan = self.frozen(folder, self.row_bits, self._refinable if refined else ())
            if refined:
                with self.computing():
                    plan, codes = refine_weights(
                        self.model.denoiser,
                        plan,
                        QuantWeights(folder / WEIGHT_CODES),
                        self.refining_set,
                        self._denoise,
                        self.batch_size,
                        recipe.seed,
                        reporter.progress,
                        3 * self.working_bytes // 2,
                        self.timestep_only,
                        recipe.refits,
                    )
                QuantWeights.save(folder / WEIGHT_CODES, codes)
            replace(plan, scaling=self.scaling.record, allocation=self.allocation_of(plan)).save(folder)

        return self.workspace.stage("plan", key, build)

    @property
    def refining_set(self) -> CalibrationSet:
        """What second-order rounding fits weights to."""
        return self.calibration_set.subset(self.recipe.quantization.refine_entries, self.recipe.seed)

    @property
    def refining_key(self) -> dict[str, Any]:
        """What that depends on beside the recipe and what statistics were taken from."""
        return {}

    @property
    def row_bits(self) -> RowBits | None:
        """How the activation bits of timestep rows differ from their layer's; None: not at all."""
        return None

    @property
    def _refinable(self) -> tuple[str, ...]:
        """Layers whose weights second-order rounding rounds anew."""
        widths = {name: item.widths for name, item in self.layer_bits.items()}
        denoiser = self.model.denoiser
        return tuple(name for name, bits in widths.items() if bits is not None and refinable(denoiser, name))

    def frozen(
        self,
        folder: Path,
        row_bits: RowBits | None,
        provisional: Collection[str] = (),
        bits: Mapping[str, LayerBits] | None = None,
        remainders: Collection[str] | None = None,
    ) -> QuantPlan:
        """The plan with every range searched and weights rounded to the nearest code; writes the codes to `folder`.

        provisional: layers whose weights are rounded anew and are not worth a search here; bits: None for `layer_bits`;
        remainders: None for those.
        """
        quantization = self.recipe.quantization
        bits = self.layer_bits if bits is None else bits
        return freeze(
            self.model.denoiser,
            self.probe_result,
            bits,
            load_statistics(self.calibrated.path / "statistics.safetensors"),
            self.row_map,
            quantization.attention_bits,
            self.model.fingerprint,
            self.recipe.bits,
            folder / WEIGHT_CODES,
            self.folds,
            self.workspace.reporter.progress,
            quantization.range,
            factors=self.scaling.factors,
            row_bits=row_bits,
            timestep_scale=self.model.family.timestep_scale,
            provisional=provisional,
            remainders=self.remainders(bits) if remainders is None else remainders,
            weight_of=self.model.weight,
        )

    @property
    def trained_plan(self) -> StageRecord:
        """The stage whose plan is deployed."""
        return self.planned

    @cached_property
    def plan(self) -> QuantPlan:
        """The plan."""
        return QuantPlan.load(self.trained_plan.path)

    @property
    def weights(self) -> QuantWeights:
        """Weight codes of the plan."""
        return QuantWeights(self.trained_plan.path / WEIGHT_CODES)

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
            **self.rotation_key,
            **({} if self.recipe.calibration.dtype == "float32" else {"dtype": self.recipe.calibration.dtype}),
        }

    def _denoise(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.model.family.call(self.model.denoiser, inputs)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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
