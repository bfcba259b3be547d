"""Sensitivities of a small denoiser: exact ones against whole forwards, sketched ones against exact ones."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import together
from torch import Tensor

from calib.candidates import Candidates, WidthPair
from calib.joint_distortion import Marginals, measure_joint, measure_marginals
from calib.metrics import METRICS
from calib.observer import Observer
from calib.probe import probe
from calib.quantizer import simulate
from calib.sensitivity import Sensitivity, candidate_pairs, measure_exact, rank_correlation
from calib.sketch import measure_sketch
from calib.timestep_table import equal_groups
from dmqexport.errors import CalibrationError
from dmqexport.ranks import ALONE, Ranks

WIDTHS = (2, 4, 8)
PAIRS = candidate_pairs(WIDTHS, WIDTHS, separated=True)
METRIC = METRICS["mse"]


class Prepared:
    """A denoiser with its candidates."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.denoiser = ParallelDenoiser()
        self.entries = random_calibration(16)
        found = probe(self.denoiser, lambda index: run_on(self.denoiser, self.entries, index))
        row_map = equal_groups(TIMESTEPS, 4)
        observer = Observer(found, row_map, 512, 0, False)
        observer.observe(self.denoiser, self.entries, lambda batch: self.denoiser(**batch), 8)
        Candidates.build(folder, self.denoiser, found, WIDTHS, observer.statistics_, row_map, "none")
        self.candidates = Candidates(folder, WIDTHS)
        self.names = [info.name for info in found.layers]

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(**inputs)
        return output

    def exact(self, journal: Path, batch_size: int = 8, ranks: Ranks = ALONE) -> Sensitivity:
        pairs = dict.fromkeys(self.names, PAIRS)
        return measure_exact(
            self.denoiser, self.candidates, pairs, self.entries, self.run, METRIC, batch_size, journal, ranks=ranks
        )  # fmt: skip

    def sketch(self, journal: Path, probes: int, ranks: Ranks = ALONE) -> Sensitivity:
        pairs = dict.fromkeys(self.names, PAIRS)
        return measure_sketch(
            self.denoiser, self.candidates, pairs, self.entries, self.run, METRIC, 8, probes, 0, journal, ranks=ranks
        )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("candidates"))


def test_the_exact_sweep_is_the_mean_over_whole_forwards(prepared: Prepared, tmp_path: Path) -> None:
    table = prepared.exact(tmp_path / "parts")
    with torch.no_grad():
        reference = prepared.run(prepared.entries.inputs)
        for name in prepared.names:
            pair = WidthPair(4, 2)
            plan, codes = prepared.candidates.plan({name: pair})
            with simulate(prepared.denoiser, plan, codes):
                output = prepared.run(prepared.entries.inputs)
            expected = float((output - reference).square().mean())
            assert table.distortion[name][pair] == pytest.approx(expected, rel=1e-4)


def test_the_sketch_estimates_the_exact_sweep_and_ranks_like_it(prepared: Prepared, tmp_path: Path) -> None:
    # Nothing lies between these layers and the output but sums, so that the only error is that of sampling.
    exact, sketch = prepared.exact(tmp_path / "exact"), prepared.sketch(tmp_path / "sketch", 64)
    for name in prepared.names:
        for pair in PAIRS:
            assert sketch.distortion[name][pair] == pytest.approx(exact.distortion[name][pair], rel=0.35)
    assert rank_correlation(exact, sketch) > 0.99


def test_entries_that_are_judged_together_are_sketched_together(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepared.run

    def guided(inputs: Mapping[str, Tensor]) -> Tensor:
        halves = plain(inputs)
        return halves[0::2] + 3 * (halves[1::2] - halves[0::2])

    monkeypatch.setattr(prepared, "run", guided)
    exact, sketch = prepared.exact(tmp_path / "exact"), prepared.sketch(tmp_path / "sketch", 64)
    monkeypatch.undo()
    apart = prepared.sketch(tmp_path / "apart", 64)
    assert rank_correlation(exact, sketch) > 0.97
    for name in prepared.names:
        pair = WidthPair(4, None)
        assert sketch.distortion[name][pair] == pytest.approx(exact.distortion[name][pair], rel=0.4)
        assert sketch.distortion[name][pair] != pytest.approx(apart.distortion[name][pair], rel=0.01)


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_a_killed_measurement_goes_on_where_it_was_and_ends_the_same(
    prepared: Prepared, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(journal: Path) -> Sensitivity:
        return prepared.exact(journal) if kind == "exact" else prepared.sketch(journal, 2)

    whole = measure(tmp_path / "whole")
    lines = (tmp_path / "whole").read_text().splitlines()
    assert len(lines) == 2 * len(prepared.names)
    # Two of the parts of the second batch are missing and the last line is cut short.
    cut = "\n".join([*lines[:-2], lines[-2][: len(lines[-2]) // 2]])
    (tmp_path / "cut").write_text(cut)
    measured = []
    original = prepared.candidates.module
    monkeypatch.setattr(
        prepared.candidates, "module", lambda base, name, *rest: measured.append(name) or original(base, name, *rest)
    )
    assert measure(tmp_path / "cut") == whole
    assert set(measured) == set(prepared.names[-2:])


@pytest.mark.parametrize("kind", ["exact", "sketch"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_measure_what_one_process_does_to_the_last_bit(
    prepared: Prepared, tmp_path: Path, kind: str, size: int
) -> None:
    def measure(journal: Path, ranks: Ranks = ALONE) -> Sensitivity:
        own = copy.copy(prepared)
        own.denoiser = copy.deepcopy(prepared.denoiser)
        return own.exact(journal, 4, ranks) if kind == "exact" else own.sketch(journal, 2, ranks)

    alone = measure(tmp_path / "alone")
    assert together(size, lambda ranks: measure(tmp_path / "shared", ranks)) == [alone] * size
    # Each measured its share and no more, and a single process goes on with what is left of it.
    files = sorted(tmp_path.glob("shared*"))
    lines = [file.read_text().splitlines() for file in files]
    batches = 4 if kind == "exact" else 2
    assert len(files) == size
    assert sum(map(len, lines)) == batches * len(prepared.names)
    assert max(map(len, lines)) - min(map(len, lines)) <= 1
    files[-1].unlink()
    assert measure(tmp_path / "shared") == alone


def test_measuring_leaves_the_denoiser_as_it_was(prepared: Prepared, tmp_path: Path) -> None:
    modules = dict(prepared.denoiser.named_modules())
    needed = [parameter.requires_grad for parameter in prepared.denoiser.parameters()]
    prepared.exact(tmp_path / "exact")
    prepared.sketch(tmp_path / "sketch", 1)
    assert dict(prepared.denoiser.named_modules()) == modules
    assert [parameter.requires_grad for parameter in prepared.denoiser.parameters()] == needed


def test_marginals_are_what_vanishes_with_a_layer(prepared: Prepared) -> None:
    choice = dict.fromkeys(prepared.names, WidthPair(4, 4))
    arguments = (prepared.entries, prepared.run, METRIC, 8)
    found = measure_marginals(prepared.denoiser, prepared.candidates, choice, *arguments)
    assert found.joint == pytest.approx(measure_joint(prepared.denoiser, prepared.candidates, choice, *arguments))
    without = {name: pair for name, pair in choice.items() if name != "conv"}
    expected = measure_joint(prepared.denoiser, prepared.candidates, without, *arguments)
    assert found.without["conv"] == pytest.approx(expected, rel=1e-5)


def test_factors_make_curves_say_what_layers_cost_as_far_as_that_is_certain() -> None:
    predicted = {"a": 1.0, "b": 0.5, "c": 1.0, "d": 1.0}
    without = {"a": 8.0, "b": 9.5, "c": 11.0, "d": 8.0}
    certain = Marginals(10.0, without, dict.fromkeys(without, 0.0))
    assert certain.factors(predicted) == {"a": 2.0, "b": 1.0, "c": 0.125, "d": 2.0}
    unsure = Marginals(10.0, without, {"a": 1.0, "b": 9.0, "c": 1e9, "d": float("inf")})
    assert unsure.factors(predicted) == pytest.approx({"a": 1.5, "b": 1.0, "c": 1.0, "d": 1.0})


def test_a_distortion_that_is_not_finite_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    def broken(inputs: Mapping[str, Tensor]) -> Tensor:
        return prepared.run(inputs) * float("nan")

    with pytest.raises(CalibrationError, match=r"conv at w2a2: the distortion of the output is nan"):
        measure_exact(
            prepared.denoiser, prepared.candidates, {"conv": [WidthPair(2, 2)]}, prepared.entries, broken, METRIC, 8,
            tmp_path / "parts",
        )  # fmt: skip


def test_tables_survive_the_disk(tmp_path: Path) -> None:
    table = Sensitivity({"a": {WidthPair(4, 8): 0.25, WidthPair(None, 4): 1e-9, WidthPair(2, None): 3.0}})
    table.save(tmp_path / "table.json")
    assert Sensitivity.load(tmp_path / "table.json") == table


def test_separated_sensitivities_add_the_two_sides() -> None:
    curve = {WidthPair(4, 4): 9.0, WidthPair(4, None): 1.0, WidthPair(None, 4): 2.0}
    assert Sensitivity({"a": curve}).separated().distortion["a"][WidthPair(4, 4)] == 3.0
    with pytest.raises(CalibrationError, match="w16a4 was not measured"):
        Sensitivity({"a": {WidthPair(4, 4): 9.0, WidthPair(4, None): 1.0}}).separated()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-9, 10.0), min_size=9, max_size=9))
def test_isotonic_tables_fall_along_both_axes_and_keep_what_already_does(values: list[float]) -> None:
    pairs = candidate_pairs(WIDTHS, WIDTHS, separated=False)
    fitted = Sensitivity({"a": dict(zip(pairs, values, strict=True))}).isotonic()
    grid = np.array([[fitted.distortion["a"][WidthPair(w, a)] for a in WIDTHS] for w in WIDTHS])
    assert (np.diff(grid, axis=0) <= 0).all()
    assert (np.diff(grid, axis=1) <= 0).all()
    again = fitted.isotonic().distortion["a"]
    assert again == pytest.approx(fitted.distortion["a"], rel=1e-9)
