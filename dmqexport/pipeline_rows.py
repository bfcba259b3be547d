"""The bits of timestep rows: what each sampling step's quantization error does to pictures, and the bits it earns."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib.freeze import RowBits, with_row_bits
from calib.network_distill import guidance_pairs, teacher_outputs
from calib.observer import load_statistics
from calib.quantizer import simulate
from calib.row_allocation import allocate_rows, offset_costs
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_remainder import Remaindering
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import WEIGHT_CODES, QuantWeights
from dmqexport.ranks import share
from dmqexport.workspace import StageRecord

_ENTRIES = 16  # calls a step that the error at other widths is measured on
_OFFSETS = (-1, 0, 1, 2, 3)  # two bits less make a row of 4 bits one of 2: never worth it in pictures


class RowAllocating(Remaindering):
    """Calibration that can give timestep rows bits of their own."""

    @cached_property
    def drafted(self) -> StageRecord:
        """The draft at the widths that were allocated."""
        return self.draft_of(self.allocated_bits)

    @cached_property
    def row_bits(self) -> RowBits | None:
        """How the activation bits of rows differ from their layer's; None: not at all."""
        if self.recipe.quantization.row_bits == "even" or self.recipe.widths.activation is None:
            return None
        macs = {info.name: info.macs for info in self.probe_result.layers}
        costs = offset_costs(QuantPlan.load(self.drafted.path), macs, _OFFSETS)
        if not any(costs.values()):
            return None  # 8-bit tensors have a form of their own, in every row
        weights = np.asarray(self.step_errors.weights)
        key = {
            "version": STAGE_VERSIONS["row-bits"],
            "draft": self.drafted.fingerprint,
            "statistics": self.calibrated.fingerprint,
            "weights": weights.tolist(),
            "rows": self.row_map.tolist(),
        }
        if any(cost != offset for offset, cost in costs.items()):
            key["costs"] = {str(offset): cost for offset, cost in costs.items()}

        def build(folder: Path) -> None:
            step_rows = self.row_map[self._step_timesteps]
            with self.computing():
                errors = self._errors_by_offset()
            if self.workspace.ranks.rank:
                return
            found = allocate_rows(errors, weights, step_rows.tolist(), costs)
            document = {
                "offsets": found.row_bits.offsets.tolist(),
                "share": found.row_bits.share.tolist(),
                "predicted": found.predicted,
                "predicted_even": found.predicted_even,
                "errors": {str(offset): values.tolist() for offset, values in errors.items()},
            }
            (folder / "row_bits.json").write_text(json.dumps(document), encoding="utf-8")

        record = self.workspace.stage("row-bits", key, build, shared=True)
        document = json.loads((record.path / "row_bits.json").read_text(encoding="utf-8"))
        offsets, share = np.asarray(document["offsets"], dtype=np.int64), np.asarray(document["share"], np.float32)
        return RowBits(offsets, share)

    @property
    def _step_timesteps(self) -> np.ndarray[Any, Any]:
        """The timestep of every sampling step, int64 [steps]."""
        data = self.calibration_set
        return np.asarray([int(data.timesteps[data.step == step][0]) for step in range(int(data.step.max()) + 1)])

    def _errors_by_offset(self) -> dict[int, np.ndarray[Any, Any]]:
        """Offset → mean squared error of the (guided) predicted noise at every step; ranks share the offsets."""
        data, ranks = self.calibration_set, self.workspace.ranks
        pairs = guidance_pairs(data)
        called = data.step[pairs[:, 0]]
        pairs = torch.cat([pairs[called == step][:_ENTRIES] for step in range(int(called.max()) + 1)])
        index = pairs.flatten()
        chosen = data.at(index)
        size = self.batch_size
        exact = teacher_outputs(chosen, self._denoise, size)
        draft, codes = QuantPlan.load(self.drafted.path), QuantWeights(self.drafted.path / WEIGHT_CODES)
        statistics = load_statistics(self.calibrated.path / "statistics.safetensors")
        rows = int(self.row_map.max()) + 1
        found = np.zeros((len(_OFFSETS), int(data.step.max()) + 1))
        for done, number in enumerate(share(ranks, range(len(_OFFSETS))), start=1):
            offset = _OFFSETS[number]
            even = RowBits(np.full(rows, offset, dtype=np.int64), np.full(rows, 1 / rows, dtype=np.float32))
            plan = with_row_bits(draft, self.probe_result, statistics, even, self.recipe.quantization.range)
            with simulate(self.model.denoiser, plan, codes):
                error = teacher_outputs(chosen, self._denoise, size) - exact
            error = error.reshape(*pairs.shape, *error.shape[1:])
            guided = error[:, 0] + self.guidance * (error[:, 1] - error[:, 0]) if pairs.shape[1] == 2 else error[:, 0]
            power = guided.square().flatten(1).mean(dim=1).double()
            step = data.step[pairs[:, 0]]
            sums = torch.zeros(found.shape[1], dtype=torch.float64).index_add_(0, step, power)
            found[number] = (sums / torch.bincount(step)).numpy()
            self.workspace.reporter.progress(min(done * ranks.size, len(_OFFSETS)), len(_OFFSETS))
        return dict(zip(_OFFSETS, ranks.total(found), strict=True))
