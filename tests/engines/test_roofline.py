"""Peaks of this machine, and how operators are placed under them."""

import pytest

from engines.ort_profile import OperatorTime
from engines.roofline import Peaks, measure_peaks, place

PEAKS = Peaks(gflops=100.0, int8_gops=400.0, gbytes=20.0)


@pytest.mark.parametrize(
    ("op", "gflops", "gbytes", "bound", "of_peak"),
    [
        ("MatMul", 50.0, 2.0, "arithmetic", 0.5),
        ("MatMulIntegerToFloat", 100.0, 2.0, "arithmetic", 0.25),
        ("MatMulIntegerToFloat", 20.0, 10.0, "traffic", 0.5),
        ("Conv", 10.0, 2.0, "arithmetic", 0.1),
        ("Add", 0.0, 30.0, "traffic", 1.5),
    ],
)
def test_an_operator_is_held_to_what_bounds_it(
    op: str, gflops: float, gbytes: float, bound: str, of_peak: float
) -> None:
    row = OperatorTime(op, ((1, 2),), 1, 1.0, gflops, gbytes, 0.5)
    assert place(row, PEAKS) == {"bound": bound, "of_peak": pytest.approx(of_peak)}


def test_this_machine_has_peaks() -> None:
    peaks = measure_peaks(1)
    assert peaks.gflops > 0.1
    assert peaks.int8_gops > 0.1
    assert peaks.gbytes > 0.1
