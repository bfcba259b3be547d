"""The two visible lists: float graph → canonical graph, canonical graph → target graph."""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import QuantWeights
from passes.cleanup import DropIdleSqueeze, GemmToMatMul, SimplifyKeyTranspose
from passes.gather_timestep_scale import GatherTimestepScale
from passes.insert_qdq import InsertQDQ
from passes.keep_boundary_8bit import KeepBoundary8Bit
from passes.lower.fuse_attention import FuseAttention
from passes.lower.group_by_row import GroupByRow
from passes.lower.join_products import JoinProducts
from passes.lower.narrow_float import NarrowFloat
from passes.lower.openvino import LowerOpenVINO, VerifyOpenVINO
from passes.lower.ort_cpu import FLOAT_KERNEL, LowerOrtCpu
from passes.lower.split_projection import SplitProjection
from passes.lower.tensorrt import LowerTensorRT, VerifyTensorRT
from passes.lower.weight_only import LowerWeightOnly
from passes.rotate_inputs import RotateInputs
from passes.row_group_norm import RowGroupNorm
from passes.split_concat import SplitConcat
from passes.split_remainder import SplitRemainder
from passes.unpad_shifted import UnpadShifted
from passes.verify_qdq import VerifyQDQ


def float_cleanup() -> ir.passes.Sequential:
    """Simplifications that float and quantized graphs share, so that comparisons are fair."""
    return ir.passes.Sequential(DropIdleSqueeze(), SimplifyKeyTranspose(), RemoveUnusedNodesPass())


def canonical(plan: QuantPlan, weights: QuantWeights, narrow_boundary: frozenset[str]) -> ir.passes.Sequential:
    """Float graph to the canonical quantized graph."""
    return ir.passes.Sequential(
        GemmToMatMul(),
        RotateInputs(plan),
        SplitConcat(plan),
        SplitRemainder(plan),
        KeepBoundary8Bit(plan, narrow_boundary),
        InsertQDQ(plan, weights),
        GatherTimestepScale(),
        RemoveUnusedNodesPass(),
        VerifyQDQ(plan),
    )


def lower_ort_cpu(
    plan: QuantPlan,
    weights: QuantWeights,
    *,
    vnni: bool,
    packed: bool = False,
    kernels: Mapping[str, str] | None = None,
) -> ir.passes.Sequential:
    """Canonical graph to the fast graph for ONNX Runtime; packed: see `LowerWeightOnly`, kernels: `LowerOrtCpu`."""
    expanded = [name for name, kernel in (kernels or {}).items() if kernel == FLOAT_KERNEL]
    return ir.passes.Sequential(
        LowerOrtCpu(plan, weights, vnni=vnni, kernels=kernels),
        LowerWeightOnly(plan, weights, packed=packed, expanded=expanded),
        *float_ort_cpu().passes,
    )


def group_by_row() -> ir.passes.Sequential:
    """The fast graph to the one that is deployed: from here on the layers are in `layer_graph`."""
    return ir.passes.Sequential(GroupByRow(), JoinProducts())


def float_ort_cpu() -> ir.passes.Sequential:
    """What the graph for ONNX Runtime gains beside integers; the float graph that it is timed against gets it too."""
    return ir.passes.Sequential(RowGroupNorm(), RemoveUnusedNodesPass())


def lower_tensorrt(
    plan: QuantPlan, weights: QuantWeights, *, fp8: bool = False, half: ir.DataType | None = None
) -> ir.passes.Sequential:
    """Canonical graph to the graph for TensorRT and TensorRT-RTX; half: type of what is not quantized."""
    narrow = [] if half is None else [NarrowFloat(plan, half)]
    return ir.passes.Sequential(
        LowerTensorRT(plan, weights, fp8=fp8), VerifyTensorRT(), *narrow, RemoveUnusedNodesPass()
    )


def lower_openvino(plan: QuantPlan, weights: QuantWeights, *, vnni: bool) -> ir.passes.Sequential:
    """Canonical graph to the graph for OpenVINO."""
    return ir.passes.Sequential(
        *([FuseAttention(plan)] if vnni else []),
        UnpadShifted(plan, weights),
        RowGroupNorm(),
        LowerOpenVINO(plan, vnni=vnni),
        VerifyOpenVINO(),
        RemoveUnusedNodesPass(),
    )


def openvino_engine() -> ir.passes.Sequential:
    """The graph for OpenVINO to the one that its IR is made from, in which some layers' results no longer exist."""
    return ir.passes.Sequential(SplitProjection(), RemoveUnusedNodesPass())
