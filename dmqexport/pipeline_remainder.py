"""Which 8-bit activations are worth a second product: those whose rounding costs the output most for their size."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from calib.candidates import Candidates, WidthPair
from calib.freeze import LayerBits
from calib.observer import load_statistics
from calib.sketch import measure_sketch
from dmqexport.pipeline_allocate import Allocating
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.quant_types import MAX_BITS

_WIDTH = WidthPair(None, MAX_BITS)


class Remaindering(Allocating):
    """Calibration that spends a share of the multiply-accumulates on remainders, where that lowers the error most."""

    def remainders(self, bits: Mapping[str, LayerBits]) -> tuple[str, ...]:
        """Those that the recipe or the family names, those that were allocated, or those chosen by measurement."""
        named = super().remainders(bits)
        share = self.recipe.quantization.remainder_share
        # Averages that an allocation keeps to leave nothing to spend here.
        if share == 0 or self.recipe.widths.activation != MAX_BITS or self.recipe.allocation.allocates:
            return named
        return tuple(dict.fromkeys((*named, *self.chosen_remainders["chosen"])))

    @cached_property
    def chosen_remainders(self) -> dict[str, Any]:
        """`chosen`, layers in the order of what they gain; `share` of the multiply-accumulates that they take again;
        `gains`, by the first reader of every tensor: share of the distortion of all 8-bit activations, and of the work.
        """
        recipe, named = self.recipe, set(self.named_remainders(self.nominal_bits))
        eight = {name for name, item in self.nominal_bits.items() if item.widths and item.widths.activation == MAX_BITS}
        asked = {info.name: (_WIDTH,) for info in self.probe_result.layers if info.name in eight}
        entries = self._subset(recipe.allocation.entries, recipe.seed)
        key = {
            "version": STAGE_VERSIONS["remainders"],
            "statistics": self.calibrated.fingerprint,
            "layers": sorted(asked),
            "named": sorted(named),
            "share": recipe.quantization.remainder_share,
            "range": recipe.quantization.range,
            **self.metric_key,
            "entries": len(entries),
            "probes": recipe.allocation.probes,
            "seed": recipe.seed,
        }

        def build(folder: Path) -> None:
            progress = self.workspace.reporter.progress
            with self.workspace.partial("remainders", key) as scratch:
                prepared = scratch / "candidates"
                if not prepared.is_dir():
                    making = scratch / "making"
                    making.mkdir(exist_ok=True)
                    Candidates.build(
                        making, self.model.denoiser, self.probe_result, (MAX_BITS,),
                        load_statistics(self.calibrated.path / "statistics.safetensors"), self.row_map,
                        self.model.fingerprint, search=recipe.quantization.range, factors=self.scaling.factors,
                        timestep_scale=self.model.family.timestep_scale,
                    )  # fmt: skip
                    making.rename(prepared)
                size = min(self.sketch_batch, len(entries))
                table = measure_sketch(
                    self.model.denoiser, Candidates(prepared, (MAX_BITS,)), asked, entries, self._judged, self._metric,
                    size, recipe.allocation.probes, recipe.seed, scratch / f"parts-by-{size}.jsonl", progress,
                    self.workspace.ranks,
                )  # fmt: skip
            errors = {name: table.distortion[name][_WIDTH] for name in asked}
            if self.workspace.ranks.rank == 0:
                document = self._spend(errors, named)
                (folder / "remainders.json").write_text(json.dumps(document, indent=1), encoding="utf-8")

        record = self.workspace.stage("remainders", key, build, shared=True)
        document: dict[str, Any] = json.loads((record.path / "remainders.json").read_text(encoding="utf-8"))
        return document

    def _spend(self, errors: dict[str, float], named: set[str]) -> dict[str, Any]:
        """Take tensors, with all their readers, by error for their work while the share lasts."""
        readers: dict[str, list[str]] = {}
        macs = {info.name: info.macs for info in self.probe_result.layers}
        for info in self.probe_result.layers:
            if info.name in errors and info.name not in named:
                readers.setdefault(f"{info.source}{info.segments}", []).append(info.name)
        whole, total = sum(errors.values()) or 1.0, sum(macs.values())
        gains = [
            (sum(errors[name] for name in names), sum(macs[name] for name in names), names)
            for names in readers.values()
        ]
        gains.sort(key=lambda item: item[0] / item[1], reverse=True)
        chosen: list[str] = []
        left = self.recipe.quantization.remainder_share * total
        for _, work, names in gains:
            if work <= left:
                left -= work
                chosen += names
        return {
            "chosen": chosen,
            "share": sum(macs[name] for name in chosen) / total,
            "gains": {names[0]: {"error": error / whole, "work": work / total} for error, work, names in gains},
        }
