# ruff: noqa: E501 - log lines as they were recorded
"""The reading of build logs and inspector listings, and what counts as proof of int8; no vendor needed."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmqexport.errors import EngineError
from engines.precision import (
    EngineLayer,
    Operand,
    examine_int8,
    half_sums,
    parse_inspector,
    parse_layers,
    prove_int8,
    read_build_log,
)


def _listing(*lines: str) -> str:
    return "\n".join(
        ["[INFO] Engine generation completed in 0.3 seconds.", "[VERBOSE] Layers:", *lines, "", "I/O:", ""]
    )


# Lines as TensorRT-RTX 1.7.1 wrote them, strides and formats shortened.
CONV = (
    "Name: node_conv1_myl0_7, LayerType: correlation, Inputs: [ { Name: __myln_k_arg__bb1_26_myl0, Dimensions: "
    "[-1,32,8,8], Strides: [2048,1,256,32], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format "
    "}], Constants: [ { Name: __mye32500dconst_myl0, Dimensions: [32,32,3,3], Strides: [288,1,96,32], StrideOrder: "
    "[3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }, { Name: __mye32505dconst_myl0, Dimensions: "
    "[1,32,1,1], Strides: [32,1,32,32], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], "
    "Outputs: [ { Name: __myln_k_arg__bb1_33_myl0, Dimensions: [-1,32,8,8], Strides: [2048,1,256,32], StrideOrder: "
    "[3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, "
    "Metadata: [ONNX Layer: node_conv1]\x1e[ONNX Layer: node_conv1_xd]\x1e[ONNX Layer: node_conv1_wd]"
)
RANK1_CONV = (
    "Name: node_conv1_myl0_8, LayerType: correlation, Inputs: [ { Name: __mye1_myl0, Dimensions: [-1,32,8,8], Strides: "
    "[2048,1,256,32], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }, { Name: __mye2_myl0, "
    "Dimensions: [32,32,3,3], Strides: [288,1,96,32], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel "
    "major format }], Constants: [ { Name: __mye3_alpha_myl0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: "
    "Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: __mye5_myl0, Dimensions: [-1,32,8,8], Strides: "
    "[2048,1,256,32], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: "
    "__myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: node_conv1]"
)
WEIGHT_ONLY_BIAS_CONV = (
    "Name: node_conv1_myl0_7, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [-1,32,8,8], Strides: [1,1,1,1], "
    "StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) C }, { Name: w, Dimensions: [32,32,3,3], Strides: [1,1,1,1], "
    "StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) C }, { Name: residual, Dimensions: [-1,32,8,8], Strides: "
    "[1,1,1,1], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) C }], Constants: [ { Name: alpha, Dimensions: [1], "
    "Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) R }, { Name: bias, Dimensions: [1,32,1,1], Strides: "
    "[1,1,1,1], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) C }], Outputs: [ { Name: o, Dimensions: "
    "[-1,32,8,8], Strides: [1,1,1,1], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) C }], TacticName: x, "
    "StreamId: 0, Metadata: [ONNX Layer: node_conv1][ONNX Layer: node_conv1_y]"
)
QKV = (
    "Name: node_to_v+node_to_k+node_to_q_myl0_9, LayerType: gemm, Inputs: [ { Name: qkv_xq.1_myl0, Dimensions: [-1,32], "
    "Strides: [32,1], StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [ { Name: "
    "__mye32211_dconst_myl0, Dimensions: [32,96], Strides: [96,1], StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row "
    "major linear format }, { Name: __mye30514node_to_v_alpha_myl0, Dimensions: [1], Strides: [1], StrideOrder: [0], "
    "Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: __mye32216_myl0, Dimensions: [-1,96], "
    "Strides: [96,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], TacticName: "
    "__myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: node_to_v][ONNX Layer: node_qkv_xd][ONNX Layer: "
    "node_to_k][ONNX Layer: node_to_q]"
)
QKV_EPILOGUE = (
    "Name: __myl_ReshMulReshMulAdd_myl0_10, LayerType: kgen, Inputs: [ { Name: __mye32216_myl0, Dimensions: [-1,32], "
    "Strides: [96,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], "
    "Outputs: [ { Name: q, Dimensions: [-1,2,64,16], Strides: [2048,1024,16,1], StrideOrder: [3,2,1,0], Datatype: Float, "
    "Format: (Linear) Row major linear format }], TacticName: __myl_ReshMul_0x52, StreamId: 0, Metadata: [ONNX Layer: "
    "node_to_v][ONNX Layer: node_to_k][ONNX Layer: node_to_q][ONNX Layer: node_temb]"
)
FLOAT_FUSION = (
    "Name: __myl_FcAdd_myl0_9, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [-1,32], Strides: [32,1], "
    "StrideOrder: [1,0], Datatype: Float, Format: (Linear) R }], Constants: [ { Name: b, Dimensions: [1,32], Strides: "
    "[32,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) R }, { Name: w, Dimensions: [32,32], Strides: [32,1], "
    "StrideOrder: [1,0], Datatype: Float, Format: (Linear) R }], Outputs: [ { Name: y, Dimensions: [-1,32], Strides: "
    "[32,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) R }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: "
    "node_to_k][ONNX Layer: node_to_k_y]"
)
SHAPES = (
    "Name: __mye8807_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    "Metadata: "
)
# As TensorRT 10 lists a convolution of its own (not compiled) kernels.
CASK_CONV = (
    "Name: w + /backbone/input_quantizer/QuantizeLinear + /backbone/Conv, LayerType: CaskConvolution, Inputs: [ { Name: "
    "/q_output_0, Location: Device, Dimensions: [1,3,640,960], Format/Datatype: Thirty-two wide channel vectorized row "
    "major Int8 format }], Outputs: [ { Name: /o, Location: Device, Dimensions: [1,32,320,480], Format/Datatype: Row major "
    'linear FP16 format }], ParameterType: Convolution, Kernel: [3,3], Weights: {"Type": "Int8", "Count": 864}, Bias: '
    '{"Type": "Float", "Count": 32}, TacticName: ampere_imma_fwd, TacticValue: 0x9ae0c0d2fb3a01e5, StreamId: 0, Metadata: '
    "[ONNX Layer: /backbone/Conv]"
)


@dataclass(frozen=True)
class _Case:
    id: str
    line: str
    node: str
    operands: tuple[str, str]
    problem: str


CASES = [
    _Case("int8 convolution", CONV, "node_conv1", ("Int8", "Int8"), ""),
    _Case("merged projections", QKV, "node_to_k", ("Int8", "Int8"), ""),
    _Case("library convolution", CASK_CONV, "/backbone/Conv", ("Int8", "Int8"), ""),
    _Case("scale of shape [1]", RANK1_CONV, "node_conv1", ("Float", "Float"), "rank-0"),
    _Case("only the weight", WEIGHT_ONLY_BIAS_CONV, "node_conv1", ("Float", "Float"), "takes Float x Float"),
    _Case("float GEMM with bias", FLOAT_FUSION, "node_to_k", ("Float", "Float"), "not quantized"),
    _Case("element-wise kernel only", QKV_EPILOGUE, "node_temb", ("none", "none"), "element-wise"),
    _Case("absent", CONV, "node_conv2", ("none", "none"), "none of the 1 engine layers names it"),
    _Case("a prefix is not the node", CONV, "node_conv", ("none", "none"), "none of the 1"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_examines_what_the_engine_multiplies(case: _Case) -> None:
    (proof,) = examine_int8(parse_layers(_listing(case.line)), {"block.layer": [case.node]})
    assert (proof.activation, proof.weight) == case.operands
    assert case.problem in proof.problem
    assert bool(proof.problem) == bool(case.problem)


def test_reads_a_whole_listing() -> None:
    layers = parse_layers(_listing(SHAPES, CONV, QKV, QKV_EPILOGUE))
    assert [layer.type for layer in layers] == ["shape_call", "correlation", "gemm", "kgen"]
    conv = layers[1]
    assert conv.inputs == (Operand("__myln_k_arg__bb1_26_myl0", (-1, 32, 8, 8), "Int8"),)
    assert conv.constants[0].dims == (32, 32, 3, 3)
    assert conv.onnx_nodes == ("node_conv1", "node_conv1_xd", "node_conv1_wd")
    assert conv.output_dtype == "Float"
    assert [layer.is_matrix_op for layer in layers] == [False, True, True, False]


def test_reads_the_last_listing_of_a_log_and_stops_at_its_end() -> None:
    log = _listing(RANK1_CONV) + _listing(CONV) + "\n" + RANK1_CONV
    assert [layer.activation_dtype for layer in parse_layers(log)] == ["Int8"]


def test_reads_node_names_with_any_character() -> None:
    line = CONV.replace("node_conv1_myl0_7", "/conv[0], {x} + 1x1_myl0_7").replace(
        "node_conv1]", "/conv[0], {x} + 1x1]"
    )
    (layer,) = parse_layers(_listing(line))
    assert layer.onnx_nodes[0] == "/conv[0], {x} + 1x1"


def test_reads_the_inspector_listing() -> None:
    text = json.dumps(
        {
            "Layers": [
                "a layer whose details were not kept",
                {
                    "Name": "node_a+node_b_myl0_3",
                    "LayerType": "gemm",
                    "Inputs": [
                        {"Name": "x", "Dimensions": [-1, 32], "Format/Datatype": "Row major linear INT8 format"}
                    ],
                    "Constants": [{"Name": "w", "Dimensions": [32, 64], "Datatype": "Int8", "Format": "Linear"}],
                    "Outputs": [{"Name": "y", "Dimensions": [-1, 64], "Format/Datatype": "Half"}],
                    "TacticName": "t",
                    "Metadata": "",
                },
                {
                    "Name": "w + node_c",
                    "LayerType": "CaskConvolution",
                    "Inputs": [{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major BF16 format"}],
                    "Outputs": [],
                    "Weights": {"Type": "Int8", "Count": 864},
                    "Metadata": "[ONNX Layer: node_c]",
                },
            ]
        }
    )
    layers = parse_inspector(text)
    assert [layer.onnx_nodes for layer in layers] == [("node_a", "node_b"), ("node_c",)]
    proofs = examine_int8(layers, {"b": ["node_b"], "c": ["node_c"]})
    assert proofs[0].problem == ""
    assert "takes BFloat16 x Int8: only the weight is quantized" in proofs[1].problem


def test_one_float_kernel_among_several_of_a_node_is_a_problem() -> None:
    line = FLOAT_FUSION.replace("node_to_k]", "node_conv1]")
    (proof,) = examine_int8(parse_layers(_listing(CONV, line)), {"conv1": ["node_conv1"]})
    assert proof.engine_layer == "__myl_FcAdd_myl0_9"
    assert proof.problem


def test_proves_every_node_of_every_layer() -> None:
    proofs = prove_int8(
        parse_layers(_listing(CONV, QKV, QKV_EPILOGUE)),
        {"conv1": ["node_conv1"], "attn.to_q": ["node_to_q"], "attn.to_k": ["node_to_k"]},
    )
    assert [(p.layer, p.activation, p.weight) for p in proofs] == [
        ("conv1", "Int8", "Int8"),
        ("attn.to_q", "Int8", "Int8"),
        ("attn.to_k", "Int8", "Int8"),
    ]


def test_names_every_layer_that_is_not_int8() -> None:
    with pytest.raises(EngineError) as caught:
        prove_int8(
            parse_layers(_listing(RANK1_CONV, QKV)),
            {"down.conv1": ["node_conv1"], "attn.to_q": ["node_to_q"], "up.conv": ["node_up"], "empty": []},
        )
    text = str(caught.value)
    assert "3 of 4 quantized operators" in text
    assert "down.conv1 (node 'node_conv1') takes Float x Float" in text
    assert "up.conv (node 'node_up') none of the 2 engine layers" in text
    assert "empty" in text
    assert "attn.to_q" not in text


def test_warns_of_int8_sums_in_half_precision(caplog: pytest.LogCaptureFixture) -> None:
    half = QKV.replace("[96,1], StrideOrder: [1,0], Datatype: Float", "[96,1], StrideOrder: [1,0], Datatype: Half")
    with caplog.at_level(logging.WARNING):
        proofs = prove_int8(parse_layers(_listing(half)), {"attn.to_q": ["node_to_q"]})
    assert half_sums(proofs) == proofs
    assert "65504" in caplog.text
    assert half_sums(prove_int8(parse_layers(_listing(QKV)), {"attn.to_q": ["node_to_q"]})) == []


def test_product_of_two_activations_and_unpacked_weights_come_from_the_second_input() -> None:
    layer = EngineLayer(
        "node_qk_myl0_6",
        "gemm",
        (Operand("q", (-1, 256, 64), "Int8"), Operand("k", (-1, 64, 256), "Float")),
        (Operand("alpha", (1,), "Float"),),
        (Operand("s", (-1, 256, 256), "Float"),),
        ("node_qk",),
    )
    assert layer.multiplied_dtype == "Float"


def test_a_log_without_a_listing_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    log.write_text("[ERROR] no\n")
    with pytest.raises(EngineError, match="no engine layers are listed"):
        read_build_log(log)
    log.write_text(_listing(CONV))
    assert len(read_build_log(log)) == 1
