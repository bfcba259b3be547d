"""Properties of the one quantizer: the float32 constants give exactly the asymmetric b-bit quantizer."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dmqexport.errors import RecipeError
from dmqexport.quant_types import (
    CENTERED_ZERO_POINT,
    MAX_BITS,
    MIN_BITS,
    REMAINDER_STEPS,
    ActivationQuant,
    BitWidths,
    RowConstants,
    WeightQuant,
    code_range,
    dequantize_weight,
    frozen_array,
    quantize_weight,
    remainder_of,
)

all_bits = st.integers(MIN_BITS, MAX_BITS)
narrow_bits = st.integers(MIN_BITS, MAX_BITS - 1)
scales = st.floats(2.0**-20, 2.0**10, width=32)
fixed = settings(deadline=None, derandomize=True, max_examples=60)


def zero_points(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**bits - 1)


def interesting_values(scale: float, bits: int, zero_point: int) -> np.ndarray:
    """Every code, every tie between two codes, their float32 neighbours, and values far outside the range."""
    quant_min, quant_max = (int(edge) for edge in code_range(bits, zero_point))
    halves = np.arange(2 * quant_min - 5, 2 * quant_max + 6, dtype=np.float32) / np.float32(2)
    exact = halves * np.float32(scale)
    beyond = np.array([0.0, -0.0, 1e30, -1e30, np.inf, -np.inf, 1e-38, -1e-38], dtype=np.float32)
    low, high = np.float32(-np.inf), np.float32(np.inf)
    return np.concatenate([exact, np.nextafter(exact, low), np.nextafter(exact, high), beyond])


def reference_codes(values: np.ndarray, scale: float, bits: int, zero_point: int) -> np.ndarray:
    """The textbook quantizer: unsigned codes with a zero_point, float32 division, ties to even."""
    unsigned = np.clip(np.rint(values / np.float32(scale)) + zero_point, 0, 2**bits - 1)
    return (unsigned - zero_point).astype(np.int64)


def canonical_codes(values: np.ndarray, constants: RowConstants, row: int = 0) -> np.ndarray:
    """The graph's operators in numpy: Mul, Max, Min, Add, and a symmetric int8 QuantizeLinear."""
    moved = values.astype(np.float32)
    if constants.has_rho:
        moved = moved * constants.rho[row]
    if constants.has_clip:
        moved = np.minimum(np.maximum(moved, constants.lo[row]), constants.hi[row])
    if constants.has_shift:
        moved = moved + constants.shift[row]
    return np.clip(np.rint(moved / np.float32(constants.scale_ref)), -128, 127).astype(np.int64)


@given(st.data(), narrow_bits, scales)
@fixed
def test_clip_and_symmetric_int8_is_the_asymmetric_quantizer(data: st.DataObject, bits: int, scale: float) -> None:
    zero_point = data.draw(zero_points(bits))
    constants = ActivationQuant.from_rows(bits, [scale], [zero_point]).constants()
    values = interesting_values(scale, bits, zero_point)
    expected = reference_codes(values, scale, bits, zero_point)
    np.testing.assert_array_equal(canonical_codes(values, constants), expected)
    assert not constants.has_rho
    assert not constants.has_shift


@pytest.mark.parametrize("bits", range(MIN_BITS, MAX_BITS))
def test_every_zero_point_of_every_width(bits: int) -> None:
    for zero_point in range(2**bits):
        for scale in (0.1, 1.0, 3.0e-3):
            constants = ActivationQuant.from_rows(bits, [scale], [zero_point]).constants()
            values = interesting_values(scale, bits, zero_point)
            expected = reference_codes(values, scale, bits, zero_point)
            np.testing.assert_array_equal(canonical_codes(values, constants), expected)


@given(scales)
@fixed
def test_centered_8_bit_needs_nothing_but_int8_saturation(scale: float) -> None:
    constants = ActivationQuant.from_rows(8, [scale], [CENTERED_ZERO_POINT]).constants()
    assert (constants.has_rho, constants.has_clip, constants.has_shift) == (False, False, False)
    values = interesting_values(scale, 8, CENTERED_ZERO_POINT)
    expected = reference_codes(values, scale, 8, CENTERED_ZERO_POINT)
    np.testing.assert_array_equal(canonical_codes(values, constants), expected)


@given(zero_points(8), scales)
@fixed
def test_shifted_8_bit_reaches_every_code_and_saturates_at_both_ends(zero_point: int, scale: float) -> None:
    constants = ActivationQuant.from_rows(8, [scale], [zero_point]).constants()
    codes = np.arange(256) - zero_point
    values = codes.astype(np.float32) * np.float32(scale)
    shifted = canonical_codes(values, constants)
    np.testing.assert_array_equal(shifted, codes + (zero_point - CENTERED_ZERO_POINT))
    beyond = np.array([-np.inf, values[0] - 3 * scale, values[-1] + 3 * scale, np.inf], dtype=np.float32)
    np.testing.assert_array_equal(canonical_codes(beyond, constants), [-128, -128, 127, 127])
    # Away from ties, rounding after the shift is rounding before it.
    between = (np.arange(2049) / 8 - zero_point).astype(np.float32)
    between = between[np.abs(between - np.floor(between) - 0.5) > 0.1] * np.float32(scale)
    expected = reference_codes(between, scale, 8, zero_point) + (zero_point - CENTERED_ZERO_POINT)
    np.testing.assert_array_equal(canonical_codes(between, constants), expected)


@given(zero_points(8), scales)
@fixed
def test_correction_undoes_the_shift(zero_point: int, scale: float) -> None:
    constants = ActivationQuant.from_rows(8, [scale], [zero_point]).constants()
    codes = (np.arange(256) - zero_point).astype(np.float32)
    shifted = codes + (zero_point - CENTERED_ZERO_POINT)
    returned = shifted * np.float32(constants.scale_ref) - constants.correction[0]
    np.testing.assert_allclose(returned, codes * np.float32(scale), atol=1e-4 * scale, rtol=0)


@given(st.data(), all_bits, st.integers(2, 50))
@fixed
def test_rows_differ_from_their_own_quantizer_only_next_to_ties(data: st.DataObject, bits: int, rows: int) -> None:
    """Mul(rho) rounds once more than a division by the row's scale; more than an ulp from a tie the codes are equal."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    scale = (np.exp(random.uniform(-4, 4, rows)) * 0.01).astype(np.float32)
    zero = np.full(rows, CENTERED_ZERO_POINT) if bits == 8 else random.integers(0, 2**bits, rows)
    qparams = ActivationQuant.from_rows(bits, scale, zero)
    constants = qparams.constants()
    for row in range(rows):
        values = (random.uniform(-1.5, 1.5, 200) * 2**bits * scale[row]).astype(np.float32)
        steps = values.astype(np.float64) / float(scale[row])
        clear = np.abs(steps - np.floor(steps) - 0.5) > 2.0**-14
        expected = reference_codes(values, scale[row], bits, int(zero[row]))
        np.testing.assert_array_equal(canonical_codes(values, constants, row)[clear], expected[clear])


@given(st.lists(scales, min_size=1, max_size=50), narrow_bits, st.data())
@fixed
def test_constants_are_those_of_the_formula(row_scales: list[float], bits: int, data: st.DataObject) -> None:
    zero = data.draw(st.lists(zero_points(bits), min_size=len(row_scales), max_size=len(row_scales)))
    qparams = ActivationQuant.from_rows(bits, row_scales, zero)
    constants = qparams.constants()
    reference = np.float32(constants.scale_ref)
    assert min(row_scales) <= constants.scale_ref * (1 + 1e-6)
    assert max(row_scales) >= constants.scale_ref * (1 - 1e-6)
    np.testing.assert_array_equal(constants.rho, reference / qparams.scale)
    np.testing.assert_allclose(constants.rho * constants.inv_rho, 1.0, rtol=2.0**-22)
    np.testing.assert_array_equal(constants.lo, -qparams.zero_point.astype(np.float32) * reference)
    assert bool(np.all(constants.lo <= 0))
    assert bool(np.all(constants.hi >= 0))
    assert constants.has_clip
    assert constants.has_rho == constants.has_rescale == (len(set(row_scales)) > 1)
    for table in (constants.rho, constants.inv_rho, constants.lo, constants.hi, constants.shift, constants.correction):
        assert table.dtype == np.float32
        assert not table.flags.writeable


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 7e-5])
def test_equal_rows_collapse_and_keep_their_scale_to_the_bit(scale: float) -> None:
    qparams = ActivationQuant.from_rows(4, [scale] * 10, [3] * 10)
    assert qparams.rows == 1
    assert np.float32(qparams.scale_ref) == np.float32(scale)
    assert qparams.same_as(ActivationQuant.from_rows(4, [scale], [3]))
    varying_zero = ActivationQuant.from_rows(4, [scale] * 2, [3, 4])
    assert varying_zero.rows == 2
    assert not varying_zero.constants().has_rho
    assert not qparams.same_as(varying_zero)


@given(st.lists(scales, min_size=1, max_size=9), st.lists(scales, min_size=2, max_size=9), all_bits)
@fixed
def test_a_channel_factor_is_one_table_with_the_rows(rows: list[float], factor: list[float], bits: int) -> None:
    """One product by rho divides by the factor and by the row's part of the scale; only the latter is undone."""
    zero = [CENTERED_ZERO_POINT if bits == 8 else 1] * len(rows)
    plain = ActivationQuant.from_rows(bits, rows, zero)
    factored = ActivationQuant.from_rows(bits, rows, zero, factor)
    constants = factored.constants()
    if factored.channel_factor is None:
        assert set(factor) == {1.0}
        assert factored.same_as(plain)
        return
    assert constants.rho.shape == (plain.rows, len(factor))
    divided = plain.constants().rho[:, np.newaxis] / np.asarray(factor, dtype=np.float32)
    np.testing.assert_array_equal(constants.rho, divided)
    np.testing.assert_array_equal(constants.inv_rho, plain.constants().inv_rho)
    np.testing.assert_array_equal(constants.hi, plain.constants().hi)
    assert constants.has_rescale == plain.constants().has_rescale
    assert not factored.same_as(plain)
    assert factored.same_as(ActivationQuant.from_rows(bits, rows, zero, factor))


@pytest.mark.parametrize("factor", [[0.0, 1.0], [-1.0], [np.nan], [np.inf], [], [[1.0]]])
def test_impossible_channel_factors_are_refused(factor: list[float]) -> None:
    with pytest.raises(ValueError, match="channel factors"):
        ActivationQuant(4, [1.0], [1], 1.0, factor)


def test_rows_may_differ_in_bits_up_to_7() -> None:
    qparams = ActivationQuant.from_rows([4, 6, 2], [0.5, 0.1, 1.0], [7, 40, 3])
    assert (qparams.bits, qparams.widths.tolist()) == (6, [4, 6, 2])
    constants = qparams.constants()
    reference = np.float32(qparams.scale_ref)
    assert np.array_equal(constants.lo, np.float32([-7, -40, -3]) * reference)
    assert np.array_equal(constants.hi, np.float32([8, 23, 0]) * reference)
    assert ActivationQuant.from_rows([5, 5], [0.5, 0.5], [3, 3]).row_bits is None
    assert not ActivationQuant.from_rows([5, 4], [0.5, 0.5], [3, 3]).same_as(
        ActivationQuant.from_rows(5, [0.5, 0.5], [3, 3])
    )


@pytest.mark.parametrize(
    ("bits", "zero", "message"),
    [([8, 4], [0, 0], "7 at most"), ([4, 1], [0, 0], "from 2 up"), ([4, 2], [0, 9], "zero_point outside")],
    ids=["8 bits have another form", "too narrow", "zero_point beyond its own row"],
)
def test_impossible_row_bits_are_refused(bits: list[int], zero: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationQuant.from_rows(bits, [0.5, 0.5], zero)


@given(
    st.lists(scales, min_size=1, max_size=4),
    st.none() | st.lists(st.floats(2.0**-4, 2.0**4, width=32), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
@fixed
def test_codes_and_those_of_the_remainder_are_the_value_to_16_bits(
    rows: list[float], factor: list[float] | None, seed: int
) -> None:
    """Half a step of the remainder is all that is lost, but for float32's own rounding of a value of 128 steps."""
    first = ActivationQuant.from_rows(MAX_BITS, rows, [CENTERED_ZERO_POINT] * len(rows), factor)
    rest, constants = remainder_of(first), first.constants()
    reference, finer = np.float32(first.scale_ref), np.float32(rest.scale_ref)
    factors = np.ones(1, dtype=np.float32) if first.channel_factor is None else first.channel_factor
    random = np.random.default_rng(seed)
    for row in range(first.rows):
        step = first.scale[row].astype(np.float64) * factors
        within = np.concatenate([np.arange(-128, 127.5, 0.5), random.uniform(-128, 127, 300)])
        values = (within[:, np.newaxis] * step).astype(np.float32)
        scaled = values * constants.rho[row]
        codes = np.clip(np.rint(scaled / reference), -128, 127).astype(np.float32)
        left = scaled - codes * reference
        codes_left = np.rint(left / finer)
        assert np.abs(codes_left).max() <= REMAINDER_STEPS // 2, "the remainder's int8 codes never saturate"
        sums = codes * reference + codes_left.astype(np.float32) * finer
        error = np.abs((sums * constants.inv_rho[row] * factors).astype(np.float64) - values) / step
        assert error.max() <= 0.5 / REMAINDER_STEPS + 2.0**-14


@given(st.lists(scales, min_size=1, max_size=5), st.none() | st.lists(scales, min_size=1, max_size=5))
@fixed
def test_a_remainder_has_a_254th_of_the_scales_and_the_rest_of_its_quantizer(
    rows: list[float], factor: list[float] | None
) -> None:
    first = ActivationQuant.from_rows(MAX_BITS, rows, [CENTERED_ZERO_POINT] * len(rows), factor)
    rest = remainder_of(first)
    np.testing.assert_array_equal(rest.scale, first.scale / np.float32(254))
    assert np.float32(rest.scale_ref) == np.float32(first.scale_ref) / np.float32(254)
    np.testing.assert_array_equal(rest.zero_point, first.zero_point)
    assert (rest.bits, rest.rows) == (MAX_BITS, first.rows)
    assert (rest.channel_factor is None) == (first.channel_factor is None)
    if first.channel_factor is not None:
        np.testing.assert_array_equal(rest.channel_factor, first.channel_factor)
    assert not rest.constants().has_clip
    assert not rest.constants().has_shift


@pytest.mark.parametrize(
    "qparams",
    [
        ActivationQuant.from_rows(7, [0.5], [64]),
        ActivationQuant.from_rows(4, [0.5], [8]),
        ActivationQuant.from_rows(8, [0.5], [127]),
        ActivationQuant.from_rows(8, [0.5, 0.25], [128, 0]),
    ],
    ids=["7 bits", "4 bits", "a shift", "a shift in one row"],
)
def test_only_centered_8_bit_codes_have_a_remainder(qparams: ActivationQuant) -> None:
    with pytest.raises(ValueError, match="only centered 8-bit codes can have a remainder"):
        remainder_of(qparams)


@given(st.lists(scales, min_size=2, max_size=20), narrow_bits, st.data())
@fixed
def test_a_gain_multiplies_values_and_no_code(row_scales: list[float], bits: int, data: st.DataObject) -> None:
    count = len(row_scales)
    zero = data.draw(st.lists(zero_points(bits), min_size=count, max_size=count))
    gain = data.draw(st.lists(st.floats(0.5, 2.0, width=32), min_size=count, max_size=count))
    plain = ActivationQuant(bits, row_scales, zero, row_scales[0])
    gained = replace(plain, gain=gain)
    before, after = plain.constants(), gained.constants()
    for name in ("rho", "lo", "hi", "shift", "scale_ref"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    wanted = before.inv_rho.astype(np.float64) * np.asarray(gain)
    np.testing.assert_allclose(after.inv_rho, wanted, rtol=2.0**-22)
    assert after.has_rescale == bool(np.any(after.inv_rho != 1))


def test_gains_make_rows_differ_and_ones_are_none() -> None:
    assert ActivationQuant.from_rows(4, [0.5, 0.5], [3, 3], gain=[1.0, 1.0]).gain is None
    same = ActivationQuant.from_rows(4, [0.5, 0.5], [3, 3], gain=[1.25, 1.25])
    assert same.rows == 2
    assert same.constants().inv_rho.tolist() == [1.25, 1.25]
    with pytest.raises(ValueError, match="a gain needs a table of several rows"):
        ActivationQuant.from_rows(4, [0.5], [3], gain=[1.25])
    assert ActivationQuant.from_rows(4, [0.5, 0.5], [3, 3], gain=[1.0, 1.25]).rows == 2


@pytest.mark.parametrize("gain", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_impossible_gains_are_refused(gain: list[float]) -> None:
    with pytest.raises(ValueError, match="gain must be positive and finite, one a row of 2"):
        ActivationQuant(4, [0.5, 0.25], [3, 3], 0.5, gain=gain)


def test_same_as_sees_every_field() -> None:
    base = ActivationQuant(4, [0.1, 0.2], [3, 4], 0.15)
    assert base.same_as(ActivationQuant(4, [0.1, 0.2], [3, 4], 0.15))
    for other in (
        ActivationQuant(5, [0.1, 0.2], [3, 4], 0.15),
        ActivationQuant(4, [0.1, 0.3], [3, 4], 0.15),
        ActivationQuant(4, [0.1, 0.2], [3, 5], 0.15),
        ActivationQuant(4, [0.1, 0.2], [3, 4], 0.16),
        ActivationQuant(4, [0.1], [3], 0.15),
        ActivationQuant(4, [0.1, 0.2], [3, 4], 0.15, [1.0, 2.0]),
        ActivationQuant(4, [0.1, 0.2], [3, 4], 0.15, gain=[1.0, 2.0]),
    ):
        assert not base.same_as(other)


@given(st.data(), all_bits)
@fixed
def test_weight_codes_round_trip(data: st.DataObject, bits: int) -> None:
    """Codes → values → codes is the identity, for every code of every channel."""
    channels = data.draw(st.integers(1, 5))
    scale = data.draw(arrays(np.float32, channels, elements=scales))
    zero = data.draw(arrays(np.int64, channels, elements=zero_points(bits)))
    if bits == MAX_BITS:
        zero[:] = CENTERED_ZERO_POINT
    qparams = WeightQuant(bits, scale, zero)
    codes = (np.arange(2**bits) - zero[:, None]).astype(np.int8)
    values = dequantize_weight(codes, qparams)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(quantize_weight(values, qparams), codes)
    np.testing.assert_array_equal(quantize_weight(values.reshape(channels, 2, -1), qparams).reshape(codes.shape), codes)


@given(st.data(), all_bits)
@fixed
def test_weight_codes_stay_in_range_and_are_the_nearest(data: st.DataObject, bits: int) -> None:
    channels = data.draw(st.integers(1, 4))
    scale = data.draw(arrays(np.float32, channels, elements=st.floats(2.0**-10, 4.0, width=32)))
    zero = data.draw(arrays(np.int64, channels, elements=zero_points(bits)))
    if bits == MAX_BITS:
        zero[:] = CENTERED_ZERO_POINT
    weight = data.draw(arrays(np.float32, (channels, 3, 2), elements=st.floats(-1000, 1000, width=32)))
    qparams = WeightQuant(bits, scale, zero)
    codes = quantize_weight(weight, qparams)
    quant_min, quant_max = code_range(bits, zero)
    assert codes.dtype == np.int8
    assert bool(np.all(codes >= quant_min.reshape(-1, 1, 1)))
    assert bool(np.all(codes <= quant_max.reshape(-1, 1, 1)))
    error = np.abs(dequantize_weight(codes, qparams).astype(np.float64) - weight)
    low = quant_min * scale.astype(np.float64)
    high = quant_max * scale.astype(np.float64)
    outside = np.maximum(low.reshape(-1, 1, 1) - weight, weight - high.reshape(-1, 1, 1))
    bound = np.maximum(outside, scale.reshape(-1, 1, 1) / 2)
    assert bool(np.all(error <= bound * (1 + 1e-5) + 1e-6))


def test_ties_of_weights_round_to_even() -> None:
    qparams = WeightQuant(8, [2.0], [128])
    weight = np.array([[-3.0, -1.0, 1.0, 3.0, 5.0, 1e9, -1e9]], dtype=np.float32)
    np.testing.assert_array_equal(quantize_weight(weight, qparams), [[-2, 0, 0, 2, 2, 127, -128]])


@pytest.mark.parametrize("text", ["w4a4", "w8a8", "w2a8", "w3a6", "w4a16", "w8a16"])
def test_bit_widths_parse_what_they_print(text: str) -> None:
    assert str(BitWidths.parse(text)) == text
    assert BitWidths.parse(f" {text.upper()} ") == BitWidths.parse(text)


def test_32_activation_bits_mean_float_too() -> None:
    assert BitWidths.parse("w4a32") == BitWidths(4, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not of the form"),
        ("w4", "not of the form"),
        ("a4w4", "not of the form"),
        ("w4a4x", "not of the form"),
        ("w-4a4", "not of the form"),
        ("4/8", "not of the form"),
        ("w1a8", "weight bits: 1 bits asked for, 2 to 8"),
        ("w16a16", "weight bits: 16 bits asked for"),
        ("w4a9", "activation bits: 9 bits asked for"),
        ("w4a0", "activation bits: 0 bits asked for"),
    ],
)
def test_bit_widths_refuse(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        BitWidths.parse(text)


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [
        ([0.0], [1], "positive and finite"),
        ([-1.0], [1], "positive and finite"),
        ([np.nan], [1], "positive and finite"),
        ([np.inf], [1], "positive and finite"),
        ([1e-60], [1], "positive and finite"),  # zero in float32
        ([1.0], [-1], "zero_point outside"),
        ([1.0], [16], "zero_point outside"),
        ([1.0, 1.0], [1], "equal, non-empty vectors"),
        ([], [], "equal, non-empty vectors"),
        ([[1.0]], [[1]], "equal, non-empty vectors"),
    ],
)
def test_impossible_qparams_are_refused(scale: list[float], zero: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightQuant(4, scale, zero)
    with pytest.raises(ValueError, match=message):
        ActivationQuant(4, scale, zero, 1.0)


@pytest.mark.parametrize("reference", [0.0, -1.0, np.nan, np.inf])
def test_impossible_reference_scale_is_refused(reference: float) -> None:
    with pytest.raises(ValueError, match="scale_ref"):
        ActivationQuant(4, [1.0], [1], reference)


def test_8_bit_weights_are_symmetric() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        WeightQuant(8, [1.0, 1.0], [128, 127])


def test_frozen_arrays_are_copies_and_read_only() -> None:
    source = np.array([1.0, 2.0])
    frozen = frozen_array(source, np.float32)
    source[0] = 9.0
    assert frozen[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        frozen[0] = 3.0
