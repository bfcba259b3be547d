"""Drafts: plans good enough to tell where errors come from, and what each sampling step's error does to pictures."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.freeze import LayerBits
from calib.metrics import PICTURE, Metric, metric_named
from calib.network_distill import guidance_pairs, guided_error
from calib.sampling import TIMESTEP, CalibrationSet, timestep_keys
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_size import sketch_within
from dmqexport.pipeline_steps import StepErrors, measure_step_errors
from dmqexport.pipeline_trajectories import Drawing
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import WEIGHT_CODES, QuantWeights
from dmqexport.workspace import StageRecord

_PICTURES = 16
_CALL = "call"


class Drafting(Drawing):
    """Calibration that can measure errors before anything is allocated, refined or trained."""

    def draft_of(self, bits: Mapping[str, LayerBits]) -> StageRecord:
        """A plan at these widths with even rows and nearest rounding, no remainders but those that are named."""
        quantization, remainders = self.recipe.quantization, self.named_remainders(bits)
        key = {
            "version": STAGE_VERSIONS["draft"],
            "statistics": self.calibrated.fingerprint,
            "layers": {name: str(item) for name, item in bits.items()},
            "attention": quantization.attention_bits,
            **self.attention_key,
            "remainders": remainders,
            "range": quantization.range,
        }

        def build(folder: Path) -> None:
            self.frozen(folder, None, bits=bits, remainders=remainders).save(folder)

        return self.workspace.stage("draft", key, build)

    @cached_property
    def step_errors(self) -> StepErrors:
        """What each step's error does to the pictures, from the draft at the widths that were asked for on average."""
        draft = self.draft_of(self.nominal_bits)
        prompts = self.prompts_for(_PICTURES)
        key = {
            **self.base_key("step-errors"),
            "draft": draft.fingerprint,
            "prompts": prompts,
            "seed": self.recipe.seed,
        }

        def build(folder: Path) -> None:
            with self.computing():
                found = measure_step_errors(
                    self.model,
                    QuantPlan.load(draft.path),
                    QuantWeights(draft.path / WEIGHT_CODES),
                    prompts or None,
                    [self.calibration_seed + index for index in range(_PICTURES)],
                    steps=self.steps,
                    guidance=self.guidance,
                    progress=self.workspace.reporter.progress,
                    ranks=self.workspace.ranks,
                )
            if self.workspace.ranks.rank == 0:
                (folder / "step_errors.json").write_text(json.dumps(asdict(found)), encoding="utf-8")

        record = self.workspace.stage("step-errors", key, build, shared=True)
        return StepErrors(**json.loads((record.path / "step_errors.json").read_text(encoding="utf-8")))

    # what allocation judges errors by

    @property
    def _metric(self) -> Metric:
        return metric_named(self.recipe.allocation.metric)

    @property
    def metric_key(self) -> dict[str, Any]:
        """What a stage that judges by it depends on; measured here, before anything watches the denoiser run."""
        metric = self.recipe.allocation.metric
        weighed = {"step_weights": self.step_errors.training_weights} if metric == PICTURE else {}
        return {"metric": metric, **weighed}

    @property
    def _batch_size(self) -> int:
        """Of whole calls."""
        return max(1, self.batch_size // self._halves) * self._halves

    @property
    def sketch_batch(self) -> int:
        """Of whole calls, as many as a sketch has memory for: it holds gradients at every layer's output."""
        fits = sketch_within(self._batch_size, self.footprint, self.recipe.allocation.probes, self.working_bytes)
        return max(1, fits // self._halves) * self._halves

    @cached_property
    def _halves(self) -> int:
        """Entries of a call that are judged together."""
        return guidance_pairs(self.calibration_set).shape[1] if self.recipe.allocation.metric == PICTURE else 1

    def _subset(self, count: int, seed: int) -> CalibrationSet:
        """About `count` entries, spread over every step; whole calls, their halves side by side, where that matters."""
        if self._halves == 1:
            return self.calibration_set.subset(count, seed)
        calls = guidance_pairs(self.calibration_set)
        first = self.calibration_set.at(calls[:, 0])
        numbered = CalibrationSet({**first.inputs, _CALL: torch.arange(len(calls))}, first.trajectory, first.step)
        picked = numbered.subset(max(1, count // self._halves), seed).inputs[_CALL]
        return self.calibration_set.at(calls[picked].flatten())

    def _judged(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What is judged of the denoiser's answer to `inputs`, with a gradient where one is asked for.

        The answer itself, [entries, ...], or for pictures the guided prediction of every call, [calls, ...], times the
        root of what its step's squared error counts: errors that both halves share cancel in it as in the sampler.
        """
        output = self.model.family.call(self.model.denoiser, inputs)
        if self.recipe.allocation.metric != PICTURE:
            return output
        guided, _ = guided_error(output.reshape(-1, self._halves, output[0].numel()), self.guidance)
        keys = timestep_keys(inputs[TIMESTEP], self.calibration_set.timestep_scale)
        weights = self._weight_of_key[keys[:: self._halves]]
        # Sums over calls are divided by the number of entries.
        return (guided * (self._halves * weights).sqrt().unsqueeze(1)).reshape(-1, *output.shape[1:])

    @cached_property
    def _weight_of_key(self) -> Tensor:
        """What a squared error counts, float32 [largest key + 1], by the key of its timestep."""
        data, weights = self.calibration_set, torch.tensor(self.step_errors.training_weights)
        table = torch.zeros(int(data.timesteps.max()) + 1)
        table[data.timesteps] = weights[data.step]
        return table
