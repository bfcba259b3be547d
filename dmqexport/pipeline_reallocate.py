"""Weight bits allocated once more: by what rounding a weight does to where whole trajectories end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from calib.allocation_problem import Problem, Solution
from calib.candidates import WidthPair
from calib.finished_errors import RoundingErrors, finished_errors, mean_errors, save_errors
from calib.freeze import LayerBits
from calib.network_distill import guidance_pairs
from calib.sampling import CalibrationSet
from calib.second_order import refinable, rounding_errors
from calib.sensitivity import Sensitivity
from calib.trajectory_distill import first_calls
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_parts import make_parts
from dmqexport.pipeline_tables import TableAllocating
from dmqexport.quant_plan import Allocation, QuantPlan
from dmqexport.quant_types import BitWidths
from dmqexport.ranks import share
from dmqexport.workspace import StageRecord

_PROBES = 2  # random directions a trajectory
_ENTRIES = 2048  # points that candidate roundings are fitted to


class Reallocating(TableAllocating):
    """Calibration that, activations given, allocates the bits of weights again by finished trajectories.

    Allocation before it judges single calls, rounds to the nearest code, and gives activations their bits as well. This
    sees the codes that weights really get (calib/second_order.py), and errors that add up over a sampler's steps.
    """

    @property
    def layer_bits(self) -> dict[str, LayerBits]:
        """The widths of every layer."""
        found = self.tabulated_bits
        if self.reallocates:
            for name, weight in self.reallocation["weight_bits"].items():
                widths = found[name].widths
                assert widths is not None
                found[name] = replace(found[name], widths=BitWidths(weight, widths.activation))
        return found

    @property
    def allocation_fingerprint(self) -> str | None:
        """What the plan depends on beside the widths themselves."""
        before = super().allocation_fingerprint
        if not self.reallocates:
            return before
        tables = f" {self.tabulated.fingerprint}" if self.tabulates else ""
        return f"{before}{tables} {self.reallocated.fingerprint}"

    def allocation_of(self, plan: QuantPlan) -> Allocation:
        """The plan's own averages, and how they were chosen."""
        found = super().allocation_of(plan)
        if not self.reallocates:
            return found
        told = ("trajectories", "predicted_share", "certified_gap", "changed")
        details = {"weights_by_finished_trajectories": {key: self.reallocation[key] for key in told}}
        if self.tabulates:
            details["activations_by_finished_trajectories"] = {key: self.tables[key] for key in (*told, "rows")}
        return replace(found, details={**found.details, **details})

    @cached_property
    def reallocation(self) -> dict[str, Any]:
        """What `reallocated` found."""
        path = self.reallocated.path / "weight_bits.json"
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document

    @cached_property
    def reallocated(self) -> StageRecord:
        """The bits of every weight, and what was measured: `weight_bits.json`."""
        recipe, bits, count = self.recipe, self.tabulated_bits, self.reallocated_trajectories
        key = {
            "version": STAGE_VERSIONS["weight-bits"],
            "statistics": self.calibrated.fingerprint,
            "allocation": self.allocated.fingerprint,
            "row_bits": None if self.row_bits is None else self.row_bits.offsets.tolist(),
            "trajectories": self.trajectory_ends.fingerprint,
            "count": count,
            "quantization": recipe.quantization.model_dump(mode="json"),
            "seed": recipe.seed,
            **({"activations": self.tabulated.fingerprint} if self.tabulates else {}),
            **self.refining_key,
        }

        def build(folder: Path) -> None:
            with self.workspace.partial("weight-bits", key) as scratch, self.computing():
                names = self._round_at_every_width(scratch, bits)
                paths = self._project(scratch, names, count)
                if self.workspace.ranks.rank == 0:
                    document = {"trajectories": count, **self._allocated_again(mean_errors(paths))}
                    text = json.dumps(document, indent=1) + "\n"
                    (folder / "weight_bits.json").write_text(text, encoding="utf-8")

        return self.workspace.stage("weight-bits", key, build, shared=True)

    def _round_at_every_width(self, scratch: Path, bits: Mapping[str, LayerBits]) -> list[str]:
        """Write what rounding changes in every weight at each of its widths; returns the layers of all ranks."""
        ranks, denoiser = self.workspace.ranks, self.model.denoiser
        widths = {
            name: sorted({pair.weight for pair in pairs if pair.weight is not None})
            for name, pairs in self.pairs.items()
            if refinable(denoiser, name)
        }
        free = [name for name, found in widths.items() if len(found) > 1]
        errors = RoundingErrors(_folder(scratch))
        held = ranks.tell("weight-bits", json.dumps([name for name in free if errors.holds(name)]))
        mine = share(ranks, [name for name in free if name not in set(json.loads(held))])
        if mine:
            own = scratch / f"rank-{ranks.rank}"
            own.mkdir(exist_ok=True)
            plan = self.frozen(own, self.row_bits, tuple(widths), bits=bits, remainders=self.remainders(bits))
            progress = self.workspace.reporter.progress
            data = self.refining_set.subset(_ENTRIES, self.recipe.seed)
            found = rounding_errors(
                denoiser, plan, {name: widths[name] for name in mine}, data, self._denoise, self.batch_size,
                self.recipe.seed, lambda done, total: progress(done, 2 * total), 3 * self.working_bytes // 2,
                self.timestep_only, self.recipe.refits,
            )  # fmt: skip
            for name, changes in found:
                errors.add(name, changes)
        ranks.meet("weight-bits")
        return free

    def _project(self, scratch: Path, names: Sequence[str], count: int) -> list[Path]:
        """One file a trajectory: what each width of each layer does to its end."""
        starts = CalibrationSet.load(self.trajectory_ends.path / "starts.safetensors")
        pairs, errors = guidance_pairs(starts), RoundingErrors(_folder(scratch))

        def make(number: int, path: Path) -> None:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + number)
            draw = partial(self.finish, first_calls(starts, pairs[number : number + 1]))
            save_errors(path, finished_errors(self.model.denoiser, names, errors, draw, _PROBES, generator))

        progress = self.workspace.reporter.progress
        return make_parts(
            self.workspace.ranks, scratch, "ends", count, make, lambda done, total: progress(total + done, 2 * total)
        )

    def _allocated_again(self, errors: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
        """The allocation of least error with every activation as it is, within the recipe's budgets."""
        choice = {name: WidthPair.parse(text) for name, text in self.allocation["choice"].items()}
        curves: dict[str, dict[WidthPair, float]] = {}
        for name, pairs in self.pairs.items():
            able = [pair for pair in pairs if pair.activation == choice[name].activation and pair.weight is not None]
            if name in errors:
                curves[name] = {pair: errors[name][pair.weight] for pair in able if pair.weight is not None}
            else:
                curves[name] = {choice[name]: 0.0}
        before = sum(curves[name][pair] for name, pair in choice.items()) or 1.0
        table = Sensitivity(curves).scaled(dict.fromkeys(curves, 1 / before)).isotonic()
        problem = Problem(table.distortion, tuple((name,) for name in curves), tuple(self._resources(curves, 1.0, 0.0)))
        solution: Solution = self._solve(problem)
        if solution.predicted > problem.distortion(choice):  # slopes may leave of the budget what the widths had
            solution = replace(solution, choice=choice, predicted=problem.distortion(choice))
        return {
            "weight_bits": {name: pair.weight for name, pair in solution.choice.items()},
            "changed": sum(pair != choice[name] for name, pair in solution.choice.items()),
            "predicted_share": solution.predicted / problem.distortion(choice),
            "certified_gap": solution.gap,
            "errors": {name: {str(bits): value for bits, value in curve.items()} for name, curve in errors.items()},
        }


def _folder(scratch: Path) -> Path:
    folder = scratch / "errors"
    folder.mkdir(exist_ok=True)
    return folder
