"""Proof that an engine runs the quantized layers of a plan in their types: builders fall back to float without a word.

The reading and the judging are in `engines.trt_layers`, which ships inside bundles; this module gives them our
errors.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dmqexport.errors import EngineError
from engines.trt_layers import (
    EngineLayer,
    LayerProof,
    Operand,
    describe,
    examine,
    examine_int8,
    parse_inspector,
    parse_layers,
)

__all__ = [
    "EngineLayer",
    "LayerProof",
    "Operand",
    "examine",
    "examine_int8",
    "half_sums",
    "parse_inspector",
    "parse_layers",
    "prove_int8",
    "prove_types",
    "read_build_log",
]

_log = logging.getLogger(__name__)


def read_build_log(path: Path) -> list[EngineLayer]:
    """Return the engine layers listed in the verbose build log at `path`.

    Raises EngineError where the log has no listing (a build without DETAILED profiling verbosity, or one that failed).
    """
    layers = parse_layers(path.read_text(encoding="utf-8", errors="replace"))
    if not layers:
        raise EngineError(
            f"no engine layers are listed in {path}",
            hint="the listing is written at VERBOSE severity with DETAILED profiling verbosity, when a build succeeds",
        )
    return layers


def prove_int8(layers: Sequence[EngineLayer], expected: Mapping[str, Sequence[str]]) -> list[LayerProof]:
    """`prove_types` where every node of `expected` must take Int8 x Int8."""
    return prove_types(layers, {name: ("Int8", nodes) for name, nodes in expected.items()})


def prove_types(
    layers: Sequence[EngineLayer], expected: Mapping[str, tuple[str, Sequence[str | Sequence[str]]]]
) -> list[LayerProof]:
    """Return one proof per node of `expected`, each multiplied, or held, as the type that is planned for it.

    `expected`: torch name of every quantized layer -> (type, nodes of the ONNX graph that was built), as in
    `engines.trt_layers.examine`. Raises EngineError naming every layer that is not as planned, what it takes
    instead, and the likely cause.
    """
    proofs = examine(layers, expected)
    failed = [proof for proof in proofs if proof.problem]
    if failed:
        raise EngineError(
            describe(
                failed, len(proofs), "in int8" if {kind for kind, _ in expected.values()} == {"Int8"} else "as planned"
            ),
            hint="each activation scale and zero-point must be a rank-0 constant and each weight a DequantizeLinear "
            "with zero_point 0; a layer that is meant to stay in float does not belong in the plan",
        )
    risky = half_sums(proofs)
    if risky:
        _log.warning(
            "%d int8 products hand on their unscaled sums in half precision, which overflows at 65504: %s; "
            "give their DequantizeLinear float32 scales and cast after the scale is applied",
            len(risky),
            ", ".join(sorted({proof.layer for proof in risky})),
        )
    return proofs


def half_sums(proofs: Sequence[LayerProof]) -> list[LayerProof]:
    """Return the proofs of int8 GEMMs that write their sums in half.

    Observed with TensorRT-RTX 1.7.1: in a float16 graph the GEMM's output is the plain sum of code products, and the
    scales come in the next kernel. Convolutions write float32 there. Only layers compiled to kernels are meant
    (`_myl` names); a CASK kernel of TensorRT scales before it rounds.
    """
    return [p for p in proofs if p.output == "Half" and p.activation in ("Int8", "FP8") and "_myl" in p.engine_layer]
