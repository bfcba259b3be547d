"""Activation bits of every tensor in every timestep row: by what its rounding there does to finished trajectories."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib.finished_activations import finished_activations, mean_activation_errors, save_activation_errors
from calib.freeze import LayerBits, RowBits
from calib.network_distill import guidance_pairs
from calib.quantizer import RowContext
from calib.row_allocation import Table, allocate_tables
from calib.sampling import CalibrationSet
from calib.trajectory_distill import first_calls
from dmqexport.byte_size import BudgetKind
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_parts import make_parts
from dmqexport.pipeline_rows import RowAllocating
from dmqexport.quant_types import MAX_BITS, BitWidths
from dmqexport.workspace import StageRecord

_PROBES = 2  # random directions a trajectory


class TableAllocating(RowAllocating):
    """Calibration that gives tensors bits of their own in each row, the average kept.

    Allocation before it gives a tensor its bits by single calls, and all tensors one pattern of rows.
    """

    @property
    def reallocates(self) -> bool:
        """Whether the recipe asks for bits by finished trajectories."""
        return self.recipe.allocation.allocates and self.recipe.allocation.trajectories > 0

    @property
    def reallocated_trajectories(self) -> int:
        """How many of them are looked at."""
        return min(self.recipe.allocation.trajectories, self.recipe.training.trajectories)

    @property
    def tabulates(self) -> bool:
        """Whether activations get theirs so: rows must be free to differ, and some tensor to have other bits."""
        return self.reallocates and super().row_bits is not None and bool(self._free_tensors[0])

    @property
    def row_bits(self) -> RowBits | None:
        """How the activation bits of rows differ from their layer's, and the bits of those that have their own."""
        common = super().row_bits
        if common is None or not self.tabulates:
            return common
        widths = {name: np.asarray(bits, dtype=np.int64) for name, bits in self.tables["row_bits"].items()}
        return replace(common, own=widths)

    @property
    def tabulated_bits(self) -> dict[str, LayerBits]:
        """The widths of every layer, activations as their widest row has it."""
        found = dict(self.allocated_bits)
        row_bits = self.row_bits
        for name, rows in ({} if row_bits is None else row_bits.own).items():
            widths = found[name].widths
            assert widths is not None
            found[name] = replace(found[name], widths=BitWidths(widths.weight, int(rows.max())))
        return found

    @cached_property
    def tables(self) -> dict[str, Any]:
        """What `tabulated` found."""
        text = (self.tabulated.path / "activation_bits.json").read_text(encoding="utf-8")
        document: dict[str, Any] = json.loads(text)
        return document

    @cached_property
    def tabulated(self) -> StageRecord:
        """The bits of every activation and what was measured: `activation_bits.json`."""
        common, count = super().row_bits, self.reallocated_trajectories
        assert common is not None
        candidates = self.candidates
        key = {
            "version": STAGE_VERSIONS["activation-bits"],
            "candidates": self._candidates_record.fingerprint,
            "allocation": self.allocated.fingerprint,
            "row_bits": common.offsets.tolist(),
            "trajectories": self.trajectory_ends.fingerprint,
            "count": count,
            "seed": self.recipe.seed,
        }

        def build(folder: Path) -> None:
            readers, widths = self._free_tensors
            context = RowContext(torch.from_numpy(self.row_map.copy()), timestep_scale=self.model.family.timestep_scale)
            rounded = {
                source: [
                    candidates.input_values(self.model.denoiser.get_submodule(source), source, bits, context)
                    for bits in widths[source]
                ]
                for source in readers
            }
            starts = CalibrationSet.load(self.trajectory_ends.path / "starts.safetensors")
            pairs = guidance_pairs(starts)

            def make(number: int, path: Path) -> None:
                generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + number)
                draw = partial(self.finish, first_calls(starts, pairs[number : number + 1]))
                found = finished_activations(
                    self.model.denoiser, readers, rounded, context, len(common.offsets), draw, _PROBES, generator
                )
                save_activation_errors(path, found)

            with self.workspace.partial("activation-bits", key) as scratch, self.computing():
                progress = self.workspace.reporter.progress
                paths = make_parts(self.workspace.ranks, scratch, "ends", count, make, progress)
                if self.workspace.ranks.rank == 0:
                    document = self._tables_of(mean_activation_errors(paths), common)
                    text = json.dumps({"trajectories": count, **document}, indent=1) + "\n"
                    (folder / "activation_bits.json").write_text(text, encoding="utf-8")

        return self.workspace.stage("activation-bits", key, build, shared=True)

    @cached_property
    def _free_tensors(self) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
        """Tensor → the layers that read it; and → its widths, where there are several. By the layer that it is named
        after. 8-bit tensors whose rows could differ keep their 8 bits, which are a form of their own."""
        infos, bits = {info.name: info for info in self.quantized_layers}, self.allocated_bits
        taken = set(self.remainders(bits))
        readers: dict[str, list[str]] = {}
        widths: dict[str, list[int]] = {}
        for group in self._groups:
            chosen = bits[group[0]].widths
            assert chosen is not None
            varies = infos[group[0]].timestep_dependent
            if chosen.activation is None or taken & set(group) or (varies and chosen.activation == MAX_BITS):
                continue
            offered = set.intersection(*({pair.activation for pair in self.pairs[name]} for name in group))
            most = MAX_BITS - 1 if varies else MAX_BITS
            able = sorted(width for width in offered if width is not None and width <= most)
            if len(able) > 1:
                source = infos[group[0]].source
                readers[source], widths[source] = list(group), able  # layers that may choose are one group a tensor
        return readers, widths

    def _spare(self, common: RowBits) -> float:
        """What the allocation before left of the average of activation bits, in bits times multiply-accumulates."""
        budget = self._budget
        if self.recipe.widths.activation is None or (budget is not None and budget.kind is BudgetKind.JOINT_BITS):
            return 0.0
        bits = self.allocated_bits
        doubled, spare = set(self.remainders(bits)), 0.0
        for info in self.quantized_layers:
            widths = bits[info.name].widths
            assert widths is not None
            if widths.activation is None:
                continue
            rows = common.widths(widths.activation, len(common.offsets) if info.timestep_dependent else 1)
            mean = float((rows * common.share).sum()) if len(rows) > 1 else float(rows[0])
            mean = 2 * MAX_BITS if info.name in doubled and widths.activation == MAX_BITS else mean
            spare += info.macs * (self.recipe.widths.activation - mean)
        return max(spare, 0.0)

    def _tables_of(self, errors: Mapping[str, Any], common: RowBits) -> dict[str, Any]:
        readers, offered = self._free_tensors
        infos, bits = {info.name: info for info in self.quantized_layers}, self.allocated_bits
        tables = {}
        for source, names in readers.items():
            varies, widths = infos[source].timestep_dependent, bits[names[0]].widths
            assert widths is not None
            assert widths.activation is not None
            macs = float(sum(infos[name].macs for name in names))
            before = common.widths(widths.activation, len(common.offsets) if varies else 1)
            rows = errors[source][:, :-1] if varies else errors[source][:, -1:]
            tables[source] = Table(
                {width: rows[index] for index, width in enumerate(offered[source])},
                {width: float(errors[source][index, -1]) for index, width in enumerate(offered[source])},
                macs * (common.share.astype(np.float64) if varies else np.ones(1)),
                before,
            )
        found = allocate_tables(tables, self._spare(common))
        return {
            "row_bits": {name: found.widths[source].tolist() for source, names in readers.items() for name in names},
            "changed": sum(int((found.widths[name] != table.before).sum()) for name, table in tables.items()),
            "rows": sum(len(table.before) for table in tables.values()),
            "predicted_share": found.predicted,
            "certified_gap": found.gap,
            "coherence": {name: round(table.coherence, 4) for name, table in tables.items()},
        }
