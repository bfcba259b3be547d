"""Weight codes as initializers: read from the plan's file when the graph is written, never all in memory at once."""

from collections.abc import Sequence
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dmqexport.quant_plan import LayerOp, LayerQuant
from dmqexport.quant_types import CodeArray
from dmqexport.quant_weights import QuantWeights
from passes.base import Builder

#: Weights of at most so many bits are packed two a byte.
PACKED_BITS = 4


def signed_weight(
    builder: Builder, weights: QuantWeights, layer: LayerQuant, segment: int, shape: Sequence[int], name: str
) -> ir.Value:
    """An int8 initializer of `shape` with the codes of one segment, zero_point 0, in the graph's layout."""
    return builder.lazy(partial(signed_codes, weights, layer, segment), ir.DataType.INT8, shape, name)


def nominal_weight(
    builder: Builder, weights: QuantWeights, layer: LayerQuant, segment: int, shape: Sequence[int], name: str
) -> ir.Value:
    """A packed uint4 initializer of `shape` with the codes of one segment plus their zero_point, at most 4 bits."""
    return builder.lazy(partial(nominal_codes, weights, layer, segment), ir.DataType.UINT4, shape, name)


def signed_codes(weights: QuantWeights, layer: LayerQuant, segment: int) -> CodeArray:
    """int8: torch's layout for a convolution, [in, out] for a linear layer, as MatMul takes it."""
    codes = weights.codes(layer.name, segment)
    return codes if layer.op is LayerOp.CONV else np.ascontiguousarray(codes.T)


def nominal_codes(weights: QuantWeights, layer: LayerQuant, segment: int) -> np.ndarray:
    """uint4 [as `signed_codes`]: 0 to 2^bits - 1."""
    codes = signed_codes(weights, layer, segment)
    spread = [1] * codes.ndim
    spread[weight_axis(layer)] = -1
    zero_point = layer.segments[segment].weight.zero_point.astype(np.int8).reshape(spread)
    return (codes + zero_point).astype(ml_dtypes.uint4)


def weight_axis(layer: LayerQuant) -> int:
    """Where the output channels lie in the graph's weight."""
    return 0 if layer.op is LayerOp.CONV else 1
