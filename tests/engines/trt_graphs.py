"""A small denoiser-shaped graph in canonical quantized form, for the TensorRT tests.

Two convolutions around a GroupNorm and a SiLU, then a LayerNorm, one attention block whose projections share their
input quantizer, a Linear as Gemm, and a time-embedding Gemm that stays in float. Batch is dynamic; the
clip bounds of a quantized layer come from one packed table, one row per timestep.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 32
SIDE = 8
TOKENS = SIDE * SIDE
ROWS = 4

#: Compute nodes of every quantized layer of the graph: torch FQN -> ONNX node names.
EXPECTED: Mapping[str, tuple[str, ...]] = {
    "conv_in": ("node_conv_in",),
    "down_blocks.0.resnets.0.conv1": ("node_conv1",),
    "attn.to_q": ("node_to_q",),
    "attn.to_k": ("node_to_k",),
    "attn.to_v": ("node_to_v",),
    "attn.to_out.0": ("node_to_out",),
    "ff.proj": ("node_ff",),
}


@dataclass
class _Graph:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def const(self, name: str, array: NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def f32(self, name: str, values: object) -> str:
        return self.const(name, np.asarray(values, dtype=np.float32))

    def add(self, op: str, inputs: list[str], output: str, *, node: str | None = None, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=node or f"node_{output}", **attributes))
        return output


def _bounds(g: _Graph, column: int, name: str, rank: int) -> tuple[str, str, str, str]:
    """Return rho, lo, hi and 1/rho of one layer, shaped [B,1,...], from columns 4c..4c+3 of the gathered row."""
    out = []
    for offset, kind in enumerate(("rho", "lo", "hi", "inv_rho")):
        out.append(g.add("Reshape", [f"col_{4 * column + offset}", f"shape_{rank}"], f"{name}_{kind}"))
    return out[0], out[1], out[2], out[3]


def _quantized(g: _Graph, x: str, name: str, rank: int, column: int | None, scale_rank: int) -> tuple[str, str | None]:
    """Emit the activation half of the canonical form; return the dequantized value and 1/rho (None: constant scale)."""
    inv = None
    if column is not None:
        rho, lo, hi, inv = _bounds(g, column, name, rank)
        x = g.add("Mul", [x, rho], f"{name}_xm")
        x = g.add("Max", [x, lo], f"{name}_xl")
        x = g.add("Min", [x, hi], f"{name}_xc")
    shape = [1] * scale_rank
    scale = g.f32(f"{name}_s", np.full(shape, 0.05))
    zero = g.const(f"{name}_z", np.zeros(shape, np.int8))
    axis = {"axis": 0} if scale_rank else {}
    q = g.add("QuantizeLinear", [x, scale, zero], f"{name}_xq", **axis)
    return g.add("DequantizeLinear", [q, scale, zero], f"{name}_xd", **axis), inv


def _weight(g: _Graph, name: str, shape: tuple[int, ...], axis: int, *, quantize: bool = True) -> str:
    codes = g.rng.integers(-7, 8, shape).astype(np.int8)
    if not quantize:
        return g.f32(f"{name}_w", codes * 0.01)
    q = g.const(f"{name}_wq", codes)
    scale = g.f32(f"{name}_ws", g.rng.uniform(0.005, 0.02, shape[axis]))
    zero = g.const(f"{name}_wz", np.zeros(shape[axis], np.int8))
    return g.add("DequantizeLinear", [q, scale, zero], f"{name}_wd", axis=axis)


def _epilogue(g: _Graph, y: str, name: str, inv: str | None, bias_shape: tuple[int, ...]) -> str:
    if inv is not None:
        y = g.add("Mul", [y, inv], f"{name}_ym")
    return g.add("Add", [y, g.f32(f"{name}_b", g.rng.normal(size=bias_shape) * 0.1)], f"{name}_y")


def tiny_denoiser(path: Path, *, broken: str | None = None, external: bool = False) -> Path:
    """Write the graph to `path` and return it.

    `broken` makes the one layer "conv1" unable to run in int8: "rank1" gives its activation scale the shape [1],
    "float" leaves it unquantized, "weight-only" quantizes only its weight, and "float-k" leaves to_k in float.
    """
    g = _Graph()
    for rank in (3, 4):
        g.const(f"shape_{rank}", np.array([-1] + [1] * (rank - 1), np.int64))
    g.const("map", np.arange(1000, dtype=np.int64) // 250)
    quantized_columns = 4
    table = np.tile(np.array([1.0, -3.0, 3.0, 1.0], np.float32), (ROWS, quantized_columns))
    table[:, 0::4] *= np.linspace(0.5, 2, ROWS, dtype=np.float32)[:, None]
    table[:, 3::4] = 1 / table[:, 0::4]
    g.const("table", table)
    g.add("Gather", ["map", "timestep"], "row", axis=0)
    g.add("Gather", ["table", "row"], "row_values", axis=0)
    columns = [f"col_{i}" for i in range(table.shape[1])]
    g.const("split_sizes", np.ones(table.shape[1], np.int64))
    g.nodes.append(helper.make_node("Split", ["row_values", "split_sizes"], columns, name="node_split", axis=1))

    # conv_in: 8 bits, one constant scale, neither Mul nor clip
    xd, inv = _quantized(g, "sample", "conv_in", 4, None, 0)
    w = _weight(g, "conv_in", (CHANNELS, 4, 3, 3), 0)
    y = g.add("Conv", [xd, w], "conv_in_o", node="node_conv_in", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    h = _epilogue(g, y, "conv_in", inv, (1, CHANNELS, 1, 1))

    # the time embedding stays in float
    g.add("Cast", ["timestep"], "t_f", to=TensorProto.FLOAT)
    g.const("shape_col", np.array([-1, 1], np.int64))
    g.add("Reshape", ["t_f", "shape_col"], "t_col")
    g.add("Gemm", ["t_col", _weight(g, "temb", (1, CHANNELS), 1, quantize=False)], "temb", node="node_temb")
    g.const("shape_bc11", np.array([-1, CHANNELS, 1, 1], np.int64))
    h = g.add("Add", [h, g.add("Reshape", ["temb", "shape_bc11"], "temb_4d")], "h0")

    g.f32("gn_s", np.ones(CHANNELS))
    g.f32("gn_b", np.zeros(CHANNELS))
    g.add("GroupNormalization", [h, "gn_s", "gn_b"], "gn", num_groups=8, epsilon=1e-5)
    g.add("Sigmoid", ["gn"], "gn_sig")
    x = g.add("Mul", ["gn", "gn_sig"], "silu")
    w = _weight(g, "conv1", (CHANNELS, CHANNELS, 3, 3), 0, quantize=broken != "float")
    if broken in ("float", "weight-only"):
        xd, inv = x, None
    else:
        xd, inv = _quantized(g, x, "conv1", 4, 0, 1 if broken == "rank1" else 0)
    y = g.add("Conv", [xd, w], "conv1_o", node="node_conv1", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    h = g.add("Add", [_epilogue(g, y, "conv1", inv, (1, CHANNELS, 1, 1)), h], "h1")

    # attention: LayerNorm -> one shared Q -> q, k, v; the two attention matmuls in float
    g.const("shape_bct", np.array([0, CHANNELS, TOKENS], np.int64))
    tokens = g.add("Transpose", [g.add("Reshape", [h, "shape_bct"], "bct")], "btc", perm=[0, 2, 1])
    g.f32("ln_s", np.ones(CHANNELS))
    g.f32("ln_b", np.zeros(CHANNELS))
    normed = g.add("LayerNormalization", [tokens, "ln_s", "ln_b"], "ln", axis=-1)
    xd, inv = _quantized(g, normed, "qkv", 3, 1, 0)
    heads = 2
    g.const("shape_heads", np.array([0, TOKENS, heads, CHANNELS // heads], np.int64))
    for which in "qkv":
        is_float = broken == "float-k" and which == "k"
        w = _weight(g, f"to_{which}", (CHANNELS, CHANNELS), 1, quantize=not is_float)
        g.add("MatMul", [normed if is_float else xd, w], f"{which}_o", node=f"node_to_{which}")
        y = _epilogue(g, f"{which}_o", f"to_{which}", None if is_float else inv, (CHANNELS,))
        perm = [0, 2, 3, 1] if which == "k" else [0, 2, 1, 3]
        g.add("Transpose", [g.add("Reshape", [y, "shape_heads"], f"{which}_r")], f"{which}_h", perm=perm)
    g.add("MatMul", ["q_h", "k_h"], "scores", node="node_qk")
    g.add("Mul", ["scores", g.f32("qk_scale", (CHANNELS // heads) ** -0.5)], "scores_s")
    g.add("Softmax", ["scores_s"], "probs", axis=-1)
    g.add("MatMul", ["probs", "v_h"], "pv", node="node_pv")
    g.const("shape_btc", np.array([0, TOKENS, CHANNELS], np.int64))
    a = g.add("Reshape", [g.add("Transpose", ["pv"], "pv_t", perm=[0, 2, 1, 3]), "shape_btc"], "attn")
    xd, inv = _quantized(g, a, "to_out", 3, 2, 0)
    y = g.add("MatMul", [xd, _weight(g, "to_out", (CHANNELS, CHANNELS), 1)], "to_out_o", node="node_to_out")
    tokens = g.add("Add", [_epilogue(g, y, "to_out", inv, (CHANNELS,)), tokens], "tokens")

    # a Linear that was exported as Gemm: [B*T, C] x [C_out, C] with transB
    g.const("shape_2d", np.array([-1, CHANNELS], np.int64))
    xd, inv = _quantized(g, tokens, "ff", 3, 3, 0)
    flat = g.add("Reshape", [xd, "shape_2d"], "ff_2d")
    w = _weight(g, "ff", (CHANNELS, CHANNELS), 0)
    y = g.add("Gemm", [flat, w], "ff_g", node="node_ff", transB=1)
    g.const("shape_3d", np.array([-1, TOKENS, CHANNELS], np.int64))
    y = g.add("Reshape", [y, "shape_3d"], "ff_o")
    out = _epilogue(g, y, "ff", inv, (CHANNELS,))
    g.const("shape_img", np.array([0, CHANNELS, SIDE, SIDE], np.int64))
    g.add("Reshape", [g.add("Transpose", [out], "out_t", perm=[0, 2, 1]), "shape_img"], "out_sample")

    graph = helper.make_graph(
        g.nodes,
        "tiny_denoiser",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 4, SIDE, SIDE]),
            helper.make_tensor_value_info("timestep", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, ["batch", CHANNELS, SIDE, SIDE])],
        g.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path), save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def crashing_graph(path: Path) -> tuple[Path, dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]]:
    """Write a graph that crashes TensorRT-RTX 1.7.1 (a run-time rank-0 scale into a Conv); return it and its ranges."""
    g = _Graph()
    zero = g.const("z", np.zeros((), np.int8))
    q = g.add("QuantizeLinear", ["sample", "scale", zero], "xq")
    xd = g.add("DequantizeLinear", [q, "scale", zero], "xd")
    w = _weight(g, "conv", (64, 64, 3, 3), 0)
    g.add("Conv", [xd, w], "out_sample", node="node_conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    graph = helper.make_graph(
        g.nodes,
        "crash",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 64, 16, 16]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, ["batch", 64, 16, 16])],
        g.initializers,
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path, {"sample": ((1, 64, 16, 16), (2, 64, 16, 16), (8, 64, 16, 16))}
