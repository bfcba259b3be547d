"""From a budget to the widths of every layer: quantizers at all widths, sensitivities, allocation; each a stage."""

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib.allocation_problem import Problem, Resource, Solution, solve_integer, solve_lagrangian
from calib.allocation_search import Found, agreed, search
from calib.candidates import Candidates, WidthPair
from calib.freeze import LayerBits
from calib.joint_distortion import measure_joint, measure_marginals
from calib.observer import load_statistics
from calib.probe import LayerInfo
from calib.rate import (
    LatencyModel,
    Rate,
    average_activation_bits,
    average_weight_bits,
    input_elements,
    joint_bits,
    latency,
    stored_bytes,
)
from calib.sampling import CalibrationSet
from calib.sensitivity import Sensitivity, candidate_pairs, measure_exact
from calib.sketch import measure_sketch
from dmqexport.byte_size import Budget, BudgetKind
from dmqexport.errors import RecipeError
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_drafts import Drafting
from dmqexport.quant_plan import Allocation, QuantPlan
from dmqexport.quant_types import MAX_BITS, BitWidths
from dmqexport.report.pareto_chart import pareto_svg
from dmqexport.workspace import StageRecord

_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)  # of average bits, around what was asked for
_FACTORS = (0.75, 0.9, 1.0, 1.1, 1.25, 1.5)  # of a single budget, likewise
_JUDGES = 4  # times as many entries for a whole plan as for curves
PARETO_JSON, PARETO_SVG = "pareto.json", "pareto.svg"


class Allocating(Drafting):
    """Calibration whose widths come from a budget when the recipe's `allocation.method` is not uniform."""

    @property
    def allocated_bits(self) -> dict[str, LayerBits]:
        """The widths of every layer, allocated where a budget was given."""
        if not self.recipe.allocation.allocates:
            return self.nominal_bits
        found = dict(self.nominal_bits)
        for name, text in self.allocation["choice"].items():
            pair = WidthPair.parse(text)
            assert pair.weight is not None
            activation = MAX_BITS if pair.activation is None and name in self.doubled else pair.activation
            found[name] = LayerBits(BitWidths(pair.weight, activation), found[name].reason)
        return found

    def remainders(self, bits: Mapping[str, LayerBits]) -> tuple[str, ...]:
        """Those that are named, and those that the allocation gave 16 bits."""
        named = super().remainders(bits)
        if not self.recipe.allocation.allocates:
            return named
        choice = {name: WidthPair.parse(text) for name, text in self.allocation["choice"].items()}
        given = [name for name in self.doubled if name in choice and choice[name].activation is None]
        return tuple(dict.fromkeys((*named, *sorted(given))))

    @property
    def allocation_fingerprint(self) -> str | None:
        """What the plan depends on beside the widths themselves."""
        return None if not self.recipe.allocation.allocates else self.allocated.fingerprint

    def allocation_of(self, plan: QuantPlan) -> Allocation:
        """The plan's own averages, and how they were chosen."""
        if not self.recipe.allocation.allocates:
            return plan.allocation
        found = self.allocation
        return Allocation(
            method=found["method"],
            budget=found["budget"],
            average_weight_bits=plan.allocation.average_weight_bits,
            average_activation_bits=plan.allocation.average_activation_bits,
            multipliers=found["lambda"],
            rate=found["rate"],
            predicted_distortion=found["predicted_distortion"],
            measured_distortion=found["measured_distortion"],
            certified_gap=found["certified_gap"],
            details={**plan.allocation.details, **found["details"]},
        )

    # the problem

    @cached_property
    def quantized_layers(self) -> tuple[LayerInfo, ...]:
        """Layers that are not kept in float."""
        return tuple(info for info in self.probe_result.layers if self.nominal_bits[info.name].widths is not None)

    @cached_property
    def pairs(self) -> dict[str, tuple[WidthPair, ...]]:
        """The widths that each layer may get. Boundary layers and overrides, which say why, have one pair."""
        recipe = self.recipe.allocation
        for label, patterns in (("floors", recipe.floors), ("ceilings", recipe.ceilings)):
            for pattern in patterns:
                if not any(fnmatchcase(info.name, pattern) for info in self.quantized_layers):
                    names = ", ".join(info.name for info in self.quantized_layers[:3])
                    raise RecipeError(
                        f"allocation.{label}: {pattern!r} matches no layer of the model",
                        hint=f"layers are named like {names}",
                    )
        float_activations = self.recipe.widths.activation is None
        found: dict[str, tuple[WidthPair, ...]] = {}
        for info in self.quantized_layers:
            bits = self.nominal_bits[info.name]
            assert bits.widths is not None
            named, offered = info.name in self._named_remainders, info.name in self.doubled
            if bits.reason:
                own, twice = (WidthPair(bits.widths.weight, at) for at in (bits.widths.activation, None))
                found[info.name] = (twice,) if named else (own, twice) if offered else (own,)
                continue
            least, most = _bound(recipe.floors, info.name, 2), _bound(recipe.ceilings, info.name, 8)
            weights = [bits for bits in recipe.weight_bits if least.weight <= bits <= most.weight]
            activations: list[int | None] = [None]
            if not float_activations:
                low, high = least.activation or 2, most.activation or 8
                # One that is named has its remainder where it has 8 bits.
                narrow = [bits for bits in recipe.activation_bits if low <= bits <= high]
                activations = [bits for bits in narrow if bits < MAX_BITS or not named]
                activations += [None] if offered and MAX_BITS in narrow else []
            if not weights or not activations:
                raise RecipeError(
                    f"allocation: no width is left for {info.name} between {least} and {most}",
                    hint="widen allocation.floors and allocation.ceilings, or allow more widths",
                )
            found[info.name] = candidate_pairs(weights, activations, separated=False)
        return found

    def _able(self, patterns: Sequence[str]) -> frozenset[str]:
        """Layers matched by `patterns` that may have a remainder: free to choose their bits, or given 8 by name."""
        return frozenset(
            name
            for name, bits in self.nominal_bits.items()
            if bits.widths is not None
            and bits.widths.activation is not None
            and (not bits.reason or bits.widths.activation == MAX_BITS)
            and any(fnmatchcase(name, pattern) for pattern in patterns)
        )

    @cached_property
    def _named_remainders(self) -> frozenset[str]:
        """Layers whose activations have a remainder where they have 8 bits, whatever is allocated."""
        return self._able(self.remainder_patterns)

    @cached_property
    def doubled(self) -> frozenset[str]:
        """Layers that may have 16 activation bits: what a pair of theirs without any stands for, being as exact."""
        recipe = self.recipe.allocation
        if not recipe.remainders or recipe.method == "mixdq":
            return self._named_remainders
        return self._named_remainders | (self._able("*") - self._able(tuple(self.recipe.quantization.overrides)))

    @property
    def _pinned(self) -> set[str]:
        return {name for name, pairs in self.pairs.items() if len(pairs) == 1}

    @property
    def _groups(self) -> tuple[tuple[str, ...], ...]:
        """Layers that share an activation and may choose it; the plan quantizes such a tensor once."""
        groups: dict[str, list[str]] = {}
        for info in self.quantized_layers:
            # Boundary layers' pairs have nothing in common with those of others that read the same tensor.
            tensor = f"={info.source}{'#' if self.nominal_bits[info.name].reason else ''}"
            groups.setdefault(info.name if info.name in self._pinned else tensor, []).append(info.name)
        return tuple(tuple(group) for group in groups.values())

    @property
    def _budget(self) -> Budget | None:
        text = self.recipe.allocation.budget
        return None if text is None else Budget.parse(text)

    def _resources(self, curves: Mapping[str, Mapping[WidthPair, float]], scale: float, shift: float) -> list[Resource]:
        """The budgets of the recipe; averages moved by `shift` bits, a single budget multiplied by `scale`."""
        layers, widths, budget = self.quantized_layers, self.recipe.widths, self._budget
        containers, chosen = self.profile.weight_containers, self.recipe.allocation.rate
        nominal = chosen != "realisable" if budget is None or budget.kind is BudgetKind.JOINT_BITS else False
        rate = Rate.NOMINAL if nominal or chosen == "nominal" else Rate.REALISABLE
        activations: list[Resource] = []
        if widths.activation is not None:
            activations = [average_activation_bits(layers, curves, widths.activation + shift, self.doubled)]
        if budget is None:
            return [average_weight_bits(layers, curves, widths.weight + shift, containers, rate), *activations]
        limit = budget.limit * scale
        if budget.kind is BudgetKind.BYTES:
            sizes = {name: parameter.shape[0] for name, parameter in self.model.denoiser.named_parameters()}
            channels = {info.name: sizes[f"{info.name}.weight"] * len(info.segments) for info in layers}
            total = sum(parameter.numel() for parameter in self.model.denoiser.parameters())
            rest = total - sum(info.parameters for info in layers)
            return [stored_bytes(layers, curves, rest, channels, limit, containers, rate), *activations]
        if budget.kind is BudgetKind.MILLISECONDS:
            model = LatencyModel.load(self.recipe.allocation.latency_table)
            return [latency(layers, curves, model, limit, containers, self.doubled), *activations]
        one = self.calibration_set.select(torch.tensor([0]))
        sources = sorted({info.source for info in layers})
        elements = input_elements(self.model.denoiser, sources, lambda: self._denoise(one))
        return [joint_bits(layers, curves, elements, limit, containers, rate)]

    def _problem(self, table: Sensitivity, scale: float = 1.0, shift: float = 0.0) -> Problem:
        curves = {name: {pair: table.distortion[name][pair] for pair in pairs} for name, pairs in self.pairs.items()}
        return Problem(curves, self._groups, tuple(self._resources(curves, scale, shift)))

    def _solve(self, problem: Problem) -> Solution:
        return solve_lagrangian(problem) if self.recipe.allocation.method == "lagrangian" else solve_integer(problem)

    # stages

    @cached_property
    def candidate_widths(self) -> tuple[int, ...]:
        """Every width that some layer may get, on either side."""
        found = {bits for pairs in self.pairs.values() for pair in pairs for bits in (pair.weight, pair.activation)}
        return tuple(sorted(bits for bits in found if bits is not None))

    @cached_property
    def candidates(self) -> Candidates:
        """Quantizers of every layer at every width, from a stage of that name."""
        key = {
            "version": STAGE_VERSIONS["candidates"],
            "statistics": self.calibrated.fingerprint,
            "widths": self.candidate_widths,
            "range": self.recipe.quantization.range,
            "float_activations": self.recipe.widths.activation is None,
        }

        def build(folder: Path) -> None:
            Candidates.build(
                folder,
                self.model.denoiser,
                self.probe_result,
                self.candidate_widths,
                load_statistics(self.calibrated.path / "statistics.safetensors"),
                self.row_map,
                self.model.fingerprint,
                quantized_activations=self.recipe.widths.activation is not None,
                search=self.recipe.quantization.range,
                factors=self.scaling.factors,
                progress=self.workspace.reporter.progress,
                timestep_scale=self.model.family.timestep_scale,
                ranks=self.workspace.ranks,
            )

        self._candidates_record = self.workspace.stage("candidates", key, build, shared=True)
        return Candidates(self._candidates_record.path, self.candidate_widths)

    @cached_property
    def measured(self) -> StageRecord:
        """Distortion of every layer at every pair: `sensitivity.json`; unfinished ones are taken up again."""
        recipe, candidates = self.recipe.allocation, self.candidates
        # Separated curves are what mixdq decides by; the others need pairs alone.
        separated = recipe.method == "mixdq" and self.recipe.widths.activation is not None
        asked = {name: self._measured_pairs(pairs, separated) for name, pairs in self.pairs.items()}
        key = {
            "version": STAGE_VERSIONS["sensitivity"],
            "candidates": self._candidates_record.fingerprint,
            "pairs": {name: [str(pair) for pair in pairs] for name, pairs in asked.items()},
            "sensitivity": recipe.sensitivity,
            **self.metric_key,
            "entries": recipe.entries,
            "probes": recipe.probes if recipe.sensitivity == "sketch" else None,
            "batch_size": self.recipe.calibration.batch_size,
            "seed": self.recipe.seed,
        }

        def build(folder: Path) -> None:
            metric, progress = self._metric, self.workspace.reporter.progress
            with self.workspace.partial("sensitivity", key) as scratch:
                exact = recipe.sensitivity == "exact"
                size = min(self._batch_size if exact else self.sketch_batch, len(self._entries))
                journal = scratch / f"parts-by-{size}.jsonl"
                if exact:
                    table = measure_exact(
                        self.model.denoiser, candidates, asked, self._entries, self._judged, metric, size, journal,
                        progress, self.workspace.ranks,
                    )  # fmt: skip
                else:
                    table = measure_sketch(
                        self.model.denoiser, candidates, asked, self._entries, self._judged, metric, size,
                        recipe.probes, self.recipe.seed, journal, progress, self.workspace.ranks,
                    )  # fmt: skip
            if self.workspace.ranks.rank == 0:
                table.save(folder / "sensitivity.json")

        return self.workspace.stage("sensitivity", key, build, shared=True)

    @staticmethod
    def _measured_pairs(pairs: tuple[WidthPair, ...], separated: bool) -> tuple[WidthPair, ...]:
        weights, activations = ({getattr(pair, side) for pair in pairs} for side in ("weight", "activation"))
        return candidate_pairs(weights, activations, separated=separated)

    @cached_property
    def table(self) -> Sensitivity:
        """The curves that are allocated by: monotone, and separated for mixdq."""
        table = Sensitivity.load(self.measured.path / "sensitivity.json")
        if self.recipe.allocation.method == "mixdq" and self.recipe.widths.activation is not None:
            table = table.separated()
        return table.isotonic()

    @cached_property
    def allocated(self) -> StageRecord:
        """The chosen widths and what is known about the choice: `allocation.json`."""
        recipe = self.recipe.allocation
        key = {
            "version": STAGE_VERSIONS["allocation"],
            "sensitivity": self.measured.fingerprint,
            "bits": self.recipe.bits,
            "recipe": recipe.model_dump(mode="json", exclude={"pareto", "trajectories"}),
            "containers": self.profile.weight_containers,
        }
        if recipe.latency_table is not None:  # what the file says, not where it lies
            key["latency"] = {name: dict(row) for name, row in LatencyModel.load(recipe.latency_table).table.items()}

        def build(folder: Path) -> None:
            def found(factors: Mapping[str, float], solve: Callable[[Problem], Solution]) -> Found:
                problem = self._problem(self.table.scaled(factors))
                solution = agreed(solve(problem), self.workspace.ranks)
                return Found(solution, factors, problem, self._joint(solution.choice, self._judges))

            best = found(dict.fromkeys(self.pairs, 1.0), self._solve)
            rounds = [self._round("curves as measured", best)]
            for _ in range(recipe.relinearize):
                choice = best.solution.choice
                around = measure_marginals(
                    self.model.denoiser, self.candidates, choice, self._entries, self._judged,
                    self._metric, self._batch_size, self.workspace.reporter.progress, self.workspace.ranks,
                )  # fmt: skip
                bent = around.factors({name: best.problem.curves[name][pair] for name, pair in choice.items()})
                again = found({name: best.factors[name] * bent[name] for name in bent}, self._solve)
                rounds.append(self._round("curves rescaled at the solution", again))
                if again.measured >= best.measured:
                    break
                best = again
            if recipe.proposals:
                best = search(
                    best,
                    lambda factors: self._problem(self.table.scaled(factors)),
                    lambda problem: agreed(solve_lagrangian(problem), self.workspace.ranks),
                    lambda solution: self._joint(solution.choice, self._judges),
                    recipe.proposals,
                    self.recipe.seed,
                    self.workspace.reporter.progress,
                )
                rounds.append(self._round("best of the proposals", best))
            text = json.dumps(self._document(best, rounds), indent=1) + "\n"
            if self.workspace.ranks.rank == 0:
                (folder / "allocation.json").write_text(text, encoding="utf-8")

        return self.workspace.stage("allocation", key, build, shared=True)

    @cached_property
    def allocation(self) -> dict[str, Any]:
        """What `allocated` found."""
        document: dict[str, Any] = json.loads((self.allocated.path / "allocation.json").read_text(encoding="utf-8"))
        return document

    def _round(self, curves: str, found: Found) -> dict[str, Any]:
        """What is reported of one solution: by the curves as measured, by those it solves, and measured whole."""
        return {
            "curves": curves,
            "predicted": self._problem(self.table).distortion(found.solution.choice),
            "predicted_by_these_curves": found.solution.predicted,
            "certified_gap": found.solution.gap,
            "measured": found.measured,
        }

    def _document(self, found: Found, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        solution, problem, measured = found.solution, found.problem, found.measured
        recipe = self.recipe.allocation
        uniform = self._uniform(self.recipe.widths)
        prepared = {None, *self.candidate_widths}
        ready = all({pair.weight, pair.activation} <= prepared for pair in uniform.values())
        compared = self._joint(uniform, self._judges) if ready else None  # other widths have no quantizers
        sizes = {name: self._sizes(choice) for name, choice in (("allocated", solution.choice), ("uniform", uniform))}
        return {
            "method": recipe.method,
            "budget": recipe.budget or f"{self.recipe.bits} on average",
            "lambda": dict(solution.multipliers),
            "rate": {r.name: {"used": r.used(solution.choice), "limit": r.limit} for r in problem.resources},
            "predicted_distortion": self._problem(self.table).distortion(solution.choice),
            "measured_distortion": measured,
            "certified_gap": solution.gap,
            "choice": {name: str(pair) for name, pair in solution.choice.items()},
            "details": {
                "distortion": recipe.metric,
                "sensitivity": recipe.sensitivity,
                "entries": len(self._entries),
                "measured_entries": len(self._judges),
                "measured_with": "all layers quantized at once, rounding to nearest, before any refinement or training",
                "additivity": rounds,
                "uniform": {"bits": self.recipe.bits, "measured_distortion": compared, **sizes["uniform"]},
                **sizes["allocated"],
            },
        }

    @cached_property
    def pareto(self) -> StageRecord:
        """The allocation at budgets around the one asked for, beside uniform widths: `pareto.json`, `pareto.svg`."""
        key = {"version": STAGE_VERSIONS["pareto"], "allocation": self.allocated.fingerprint}

        def build(folder: Path) -> None:
            shifts = [(1.0, shift) for shift in _SHIFTS] if self._budget is None else [(f, 0.0) for f in _FACTORS]
            points: list[dict[str, Any]] = []
            widths = [bits for bits in self.candidate_widths if self.recipe.widths.activation is not None]
            total = len(shifts) + len(widths)
            for scale, shift in shifts:
                problem = self._problem(self.table, scale, shift)
                try:
                    found = self._solve(problem)
                except RecipeError:
                    total -= 1  # below the least that is possible: the curve starts further right
                    continue
                points.append(self._point(self.recipe.allocation.method, problem, found.choice, found.gap))
                self.workspace.reporter.progress(len(points), total)
            for bits in widths:
                choice = self._uniform(BitWidths(bits, bits))
                points.append(self._point("uniform", self._problem(self.table), choice, None))
                self.workspace.reporter.progress(len(points), total)
            document = {"distortion": self.recipe.allocation.metric, "bits": self.recipe.bits, "points": points}
            (folder / PARETO_JSON).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            (folder / PARETO_SVG).write_text(pareto_svg(points), encoding="utf-8")

        return self.workspace.stage("pareto", key, build)

    def _point(
        self, method: str, problem: Problem, choice: Mapping[str, WidthPair], gap: float | None
    ) -> dict[str, Any]:
        # A uniform width may lie outside a layer's floors and ceilings; then nothing predicts it.
        known = all(pair in problem.curves[name] for name, pair in choice.items())
        return {
            "method": method,
            "rate": {r.name: r.used(choice) if known else None for r in problem.resources},
            "limit": {r.name: r.limit for r in problem.resources} if method != "uniform" else None,
            **self._sizes(choice),
            "predicted_distortion": problem.distortion(choice) if known else None,
            "measured_distortion": self._joint(choice, self._judges),
            "certified_gap": gap,
        }

    def _uniform(self, widths: BitWidths) -> dict[str, WidthPair]:
        return {
            name: pairs[0] if self.nominal_bits[name].reason else WidthPair(widths.weight, widths.activation)
            for name, pairs in self.pairs.items()
        }

    def _sizes(self, choice: Mapping[str, WidthPair]) -> dict[str, int]:
        """Bytes of the quantized layers' codes, at nominal bits and in the target's containers."""
        nominal = stored = 0.0
        for info in self.quantized_layers:
            bits = choice[info.name].weight or 32
            nominal += bits * info.parameters / 8
            stored += min((c for c in self.profile.weight_containers if c >= bits), default=32) * info.parameters / 8
        return {"nominal_bytes": round(nominal), "stored_bytes": round(stored)}

    def _joint(self, choice: Mapping[str, WidthPair], entries: CalibrationSet) -> float:
        return measure_joint(
            self.model.denoiser, self.candidates, choice, entries, self._judged, self._metric, self._batch_size,
            self.workspace.ranks,
        )  # fmt: skip

    @cached_property
    def _judges(self) -> CalibrationSet:
        """Entries that whole plans are measured on: more than curves are, since that takes one forward, not thousands.

        Another seed, so that allocations chosen by the curves' entries are not judged by those alone.
        """
        return self._subset(_JUDGES * self.recipe.allocation.entries, self.recipe.seed + 1)

    @cached_property
    def _entries(self) -> CalibrationSet:
        """Calibration entries spread over every step, that curves are measured on."""
        chosen = self._subset(self.recipe.allocation.entries, self.recipe.seed)
        rows = len(np.unique(self.row_map[chosen.timesteps.numpy()]))
        if rows < int(self.row_map.max()) + 1:
            raise RecipeError(
                f"allocation.entries: {self.recipe.allocation.entries} entries reach {rows} of "
                f"{int(self.row_map.max()) + 1} timestep rows",
                hint="ask for at least one entry a row",
            )
        return chosen


def _bound(patterns: Mapping[str, str], name: str, default: int) -> BitWidths:
    """The last pattern that matches, as overrides do."""
    found = BitWidths(default, default)
    for pattern, text in patterns.items():
        if fnmatchcase(name, pattern):
            found = BitWidths.parse(text)
    return found
