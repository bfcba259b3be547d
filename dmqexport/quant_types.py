"""The one quantizer: its types and the float32 constants that simulation and every graph share.

A code is a signed integer `q = clip(round_half_even(x / scale), -zero_point, 2**bits - 1 - zero_point)`, that is the
usual unsigned code minus its zero_point, so real zero is always code 0 and fits int8 for up to 7 bits (and for 8 bits
with zero_point 128). An asymmetric 8-bit range is reached by adding an integer shift before rounding.

Simulation and deployment agree because both read the same float32 arrays computed here, with operations that IEEE 754
rounds exactly (one multiplication or one division each).
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmqexport.errors import RecipeError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
CodeArray = npt.NDArray[np.int8]

MIN_BITS = 2
MAX_BITS = 8
#: Code of real zero in an 8-bit tensor without shift: the int8 range [-128, 127].
CENTERED_ZERO_POINT = 128
#: Codes that a remainder has for one step of the quantizer that left it: ±127 of them span the half step either way.
REMAINDER_STEPS = 254


def frozen_array(values: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a contiguous read-only copy of `values` as `dtype`."""
    array = np.array(values, dtype=dtype, order="C")
    array.setflags(write=False)
    return array


def code_range(bits: int | IntArray, zero_point: npt.ArrayLike) -> tuple[IntArray, IntArray]:
    """Return (quant_min, quant_max) of the signed codes, same shape as `zero_point`; bits: of all, or of each."""
    zero = np.asarray(zero_point, dtype=np.int64)
    highest: IntArray = 2 ** np.asarray(bits, dtype=np.int64) - 1 - zero
    return -zero, highest


def check_bits(bits: int, where: str) -> None:
    """Raise RecipeError unless `bits` is a width this quantizer has."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise RecipeError(f"{where}: {bits} bits asked for, {MIN_BITS} to {MAX_BITS} can be quantized")


@dataclass(frozen=True)
class BitWidths:
    """Weight and activation bits of a plan or a layer; None leaves the activations in float (`w4a16`)."""

    weight: int
    activation: int | None

    def __post_init__(self) -> None:
        check_bits(self.weight, "weight bits")
        if self.activation is not None:
            check_bits(self.activation, "activation bits")

    @classmethod
    def parse(cls, text: str) -> "BitWidths":
        """Parse `w4a4`, `w8a8`, `w4a16` (16 or 32 activation bits mean float).

        Raises RecipeError for anything else.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if match is None:
            raise RecipeError(f"bits {text!r} are not of the form wNaM", hint="for example w4a4, w8a8 or w4a16")
        weight, activation = int(match[1]), int(match[2])
        return cls(weight, None if activation in (16, 32) else activation)

    def __str__(self) -> str:
        return f"w{self.weight}a{16 if self.activation is None else self.activation}"


@dataclass(frozen=True, eq=False)
class WeightQuant:
    """Quantization parameters of one weight (or of one slice of its input channels), per output channel.

    scale: float32 [out_channels] > 0; zero_point: int64 [out_channels] in [0, 2**bits - 1].
    8-bit weights are symmetric (zero_point 128), narrower ones may be asymmetric.
    """

    bits: int
    scale: FloatArray
    zero_point: IntArray

    def __post_init__(self) -> None:
        check_bits(self.bits, "weight")
        object.__setattr__(self, "scale", frozen_array(self.scale, np.float32))
        object.__setattr__(self, "zero_point", frozen_array(self.zero_point, np.int64))
        _check_qparams(self.bits, self.scale, self.zero_point)
        if self.bits == MAX_BITS and not bool(np.all(self.zero_point == CENTERED_ZERO_POINT)):
            raise ValueError("8-bit weights must be symmetric: zero_point 128 in every channel")


@dataclass(frozen=True, eq=False)
class ActivationQuant:
    """Quantization parameters of one activation tensor: one scale and zero_point per timestep row.

    scale: float32 [rows] > 0; zero_point: int64 [rows] in [0, 2**bits - 1]; rows is 1 for a tensor that does not depend
    on the timestep. scale_ref: float32 scalar, the constant scale of the Q/DQ pair (geometric mean of the rows).
    channel_factor: float32 [channels] > 0, or None for ones: the tensor is divided by it before it is rounded, and the
    columns of its readers' weights were multiplied by it before *they* were quantized, so nothing undoes it later.
    row_bits: int64 [rows], or None when every row has `bits`: rows may be narrower or wider than each other (DMQ's
    allocation a timestep group), up to 7 bits, since a row's bits are nothing but the ends of its clip; `bits` is then
    the widest row's.
    gain: float32 [rows] > 0, or None for ones: the value of a code is code · scale · gain. It has no part in rounding;
    the rescaling that follows the operator anyway holds it, so that a single row, which has none, cannot have it.
    """

    bits: int
    scale: FloatArray
    zero_point: IntArray
    scale_ref: float
    channel_factor: FloatArray | None = None
    row_bits: IntArray | None = None
    gain: FloatArray | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, "activation")
        if self.channel_factor is not None:
            object.__setattr__(self, "channel_factor", frozen_array(self.channel_factor, np.float32))
            check_channel_factor(self.channel_factor)
        object.__setattr__(self, "scale", frozen_array(self.scale, np.float32))
        object.__setattr__(self, "zero_point", frozen_array(self.zero_point, np.int64))
        object.__setattr__(self, "scale_ref", float(np.float32(self.scale_ref)))
        if self.row_bits is not None:
            object.__setattr__(self, "row_bits", frozen_array(self.row_bits, np.int64))
            _check_row_bits(self.row_bits, self.bits, len(self.scale))
        _check_qparams(self.bits if self.row_bits is None else self.row_bits, self.scale, self.zero_point)
        if not (np.isfinite(self.scale_ref) and self.scale_ref > 0):
            raise ValueError(f"scale_ref must be positive and finite, got {self.scale_ref}")
        if self.gain is not None:
            object.__setattr__(self, "gain", frozen_array(self.gain, np.float32))
            if len(self.scale) == 1:
                raise ValueError("a gain needs a table of several rows; that of a single one belongs into the weights")
            if self.gain.shape != self.scale.shape or not bool(np.all(np.isfinite(self.gain) & (self.gain > 0))):
                raise ValueError(f"gain must be positive and finite, one a row of {len(self.scale)}, got {self.gain}")

    @classmethod
    def from_rows(
        cls,
        bits: int | npt.ArrayLike,
        scale: npt.ArrayLike,
        zero_point: npt.ArrayLike,
        channel_factor: npt.ArrayLike | None = None,
        gain: npt.ArrayLike | None = None,
    ) -> "ActivationQuant":
        """Build from per-row arrays [rows]; equal rows without a gain collapse to one, scale_ref is the geometric mean.

        bits: of every row, or [rows]; channel_factor [channels] and gain [rows]: nothing but ones is none.
        """
        widths = np.asarray(bits, dtype=np.int64).reshape(-1)
        even = bool(np.all(widths == widths[0]))
        scales = np.asarray(scale, dtype=np.float32).reshape(-1)
        zeros = np.asarray(zero_point, dtype=np.int64).reshape(-1)
        gains = None if gain is None else np.asarray(gain, dtype=np.float32).reshape(-1)
        if gains is not None and bool(np.all(gains == 1)):
            gains = None
        if even and gains is None and bool(np.all(scales == scales[0])) and bool(np.all(zeros == zeros[0])):
            scales, zeros = scales[:1], zeros[:1]
        constant = bool(np.all(scales == scales[0]))
        reference = scales[0] if constant else np.float32(np.exp(np.mean(np.log(scales.astype(np.float64)))))
        factor = None if channel_factor is None else np.asarray(channel_factor, dtype=np.float32)
        if factor is not None and bool(np.all(factor == 1)):
            factor = None
        return cls(int(widths.max()), scales, zeros, float(reference), factor, None if even else widths, gains)

    @property
    def rows(self) -> int:
        """Number of table rows, 1 when nothing varies with the timestep."""
        return int(self.scale.shape[0])

    @property
    def widths(self) -> IntArray:
        """Bits of every row, int64 [rows]."""
        return np.full(self.rows, self.bits, dtype=np.int64) if self.row_bits is None else self.row_bits

    def same_as(self, other: "ActivationQuant") -> bool:
        """Whether both quantize any tensor to the same codes, which stand for the same values."""
        return (
            self.bits == other.bits
            and self.scale_ref == other.scale_ref
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
            and np.array_equal(self.widths, other.widths)
            and _bytes(self.channel_factor) == _bytes(other.channel_factor)
            and _bytes(self.gain) == _bytes(other.gain)
        )

    def constants(self) -> "RowConstants":
        """Return the float32 constants that the simulation and the graphs use."""
        reference = np.float32(self.scale_ref)
        quant_min, quant_max = code_range(self.widths, self.zero_point)
        shift = self.zero_point - CENTERED_ZERO_POINT if self.bits == MAX_BITS else np.zeros_like(self.zero_point)
        shift32 = shift.astype(np.float32)
        rho = reference / self.scale
        value = self.scale if self.gain is None else self.scale * self.gain
        if self.channel_factor is not None:
            rho = rho[:, np.newaxis] / self.channel_factor
        return RowConstants(
            scale_ref=float(reference),
            rho=frozen_array(rho, np.float32),
            inv_rho=frozen_array(value / reference, np.float32),
            lo=frozen_array(quant_min.astype(np.float32) * reference, np.float32),
            hi=frozen_array(quant_max.astype(np.float32) * reference, np.float32),
            shift=frozen_array(shift32 * reference, np.float32),
            correction=frozen_array(shift32 * value, np.float32),
            has_rho=bool(np.any(rho != 1)),
            has_rescale=bool(np.any(value != reference)),
            has_clip=self.bits < MAX_BITS,
            has_shift=bool(np.any(shift != 0)),
        )


@dataclass(frozen=True, eq=False)
class RowConstants:
    """What the canonical operator multiplies, clips and adds, float32 [rows] each; rho is [rows, channels] where the
    tensor has a channel_factor.

    xm = x * rho; xc = min(max(xm, lo), hi) for bits <= 7, xm + shift for shifted 8-bit; Q/DQ with scale_ref; the
    operator; * inv_rho; - correction * sum of the other operand over the contracted axis. `has_*` tell what can be
    skipped because it would change nothing: `has_rho` the first product, `has_rescale` the one with inv_rho.
    """

    scale_ref: float
    rho: FloatArray
    inv_rho: FloatArray
    lo: FloatArray
    hi: FloatArray
    shift: FloatArray
    correction: FloatArray
    has_rho: bool
    has_rescale: bool
    has_clip: bool
    has_shift: bool


def remainder_of(first: ActivationQuant) -> ActivationQuant:
    """The quantizer of what rounding with `first`, 8 bits and not shifted, leaves over.

    It reads first's own product x · rho minus the dequantized codes, so that neither is multiplied again: with one
    constant scale, scale_ref / 254, its codes are those of the remainder of every row and channel. The sum of both
    codes' values is x to a 65,024th of the range, 16 bits from two int8 tensors.
    Raises ValueError for a quantizer that has other bits or a shift.
    """
    if first.bits != MAX_BITS or bool(np.any(first.zero_point != CENTERED_ZERO_POINT)):
        raise ValueError("only centered 8-bit codes can have a remainder")
    return ActivationQuant(
        MAX_BITS,
        first.scale / np.float32(REMAINDER_STEPS),
        first.zero_point,
        float(np.float32(first.scale_ref) / np.float32(REMAINDER_STEPS)),
        first.channel_factor,
    )


def remainder_name(operand: str) -> str:
    """What the remainder of the activation `layer#segment` is called in graphs and simulations."""
    return f"{operand}/remainder"


def quantize_weight(weight: FloatArray, qparams: WeightQuant) -> CodeArray:
    """Return the signed codes, int8, of `weight` [out_channels, ...] rounded half to even."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    quant_min, quant_max = code_range(qparams.bits, qparams.zero_point)
    codes = np.rint(weight.astype(np.float32) / qparams.scale.reshape(shape))
    clipped: CodeArray = np.clip(codes, quant_min.reshape(shape), quant_max.reshape(shape)).astype(np.int8)
    return clipped


def dequantize_weight(codes: CodeArray, qparams: WeightQuant) -> FloatArray:
    """Return float32 codes * scale, as DequantizeLinear computes it (ONNX operator spec)."""
    shape = (-1,) + (1,) * (codes.ndim - 1)
    values: FloatArray = codes.astype(np.float32) * qparams.scale.reshape(shape)
    return values


def _bytes(array: FloatArray | None) -> bytes:
    return b"" if array is None else array.tobytes()


def check_channel_factor(factor: FloatArray) -> None:
    """Raise ValueError unless `factor` is a non-empty vector of positive finite numbers."""
    if factor.ndim != 1 or factor.size == 0 or not bool(np.all(np.isfinite(factor) & (factor > 0))):
        raise ValueError(f"channel factors must be a positive finite vector, got shape {factor.shape}")


def _check_row_bits(row_bits: IntArray, bits: int, rows: int) -> None:
    if row_bits.shape != (rows,) or int(row_bits.min()) < MIN_BITS or int(row_bits.max()) != bits:
        raise ValueError(f"row_bits {row_bits.tolist()} must be {rows} widths from {MIN_BITS} up, the widest {bits}")
    if bits == MAX_BITS:
        raise ValueError(f"rows of different bits may have {MAX_BITS - 1} at most: {MAX_BITS} bits have another form")


def _check_qparams(bits: int | IntArray, scale: FloatArray, zero_point: IntArray) -> None:
    if scale.ndim != 1 or scale.shape != zero_point.shape or scale.size == 0:
        raise ValueError(f"scale {scale.shape} and zero_point {zero_point.shape} must be equal, non-empty vectors")
    if not bool(np.all(np.isfinite(scale) & (scale > 0))):
        raise ValueError("every scale must be positive and finite")
    largest = 2 ** np.asarray(bits, dtype=np.int64) - 1
    if bool(np.any((zero_point < 0) | (zero_point > largest))):
        raise ValueError(f"zero_point outside [0, {int(np.max(largest))}]")
