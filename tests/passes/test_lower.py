"""Every lowered operator computes what the canonical one does, given the same inputs.

Operators are cut out of both graphs and compared one by one: end to end, a rounding tie that falls the other way in an
early layer would hide what a lowering did to a later one.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from operator_pieces import compare, draw, draw_remainders
from simulation_fixture import Exported, canonical_graph, export, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerOp
from dmqexport.quant_weights import QuantWeights
from passes.base import constant_array, is_remainder
from passes.bind import bind
from passes.lower.ort_cpu import CONV_KERNEL, FLOAT_KERNEL, FUSED_PRODUCT, LowerOrtCpu, may_saturate
from passes.lower.portable import MakePortable
from passes.lower.tensorrt import LowerTensorRT, VerifyTensorRT
from passes.pipelines import lower_ort_cpu, lower_tensorrt


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
@pytest.mark.parametrize("seed", range(6))
def test_ort_cpu_computes_the_canonical_operators(deep: Exported, tmp_path: Path, seed: int, vnni: bool) -> None:
    plan = draw(deep, tmp_path, seed)
    if vnni and not _host_has_vnni():
        pytest.skip("signed 8-bit weights may saturate on this CPU: that graph is not built here")
    lowering = lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=vnni)
    assert compare(deep, plan, tmp_path / "codes", lowering) <= 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_tensorrt_computes_the_canonical_operators(deep: Exported, tmp_path: Path, seed: int) -> None:
    plan = draw(deep, tmp_path, seed)
    assert compare(deep, plan, tmp_path / "codes", lower_tensorrt(plan, QuantWeights(tmp_path / "codes"))) == 0.0


@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
@pytest.mark.parametrize(("seed", "bits"), [(0, 8), (1, 8), (2, 4), (3, 6)])
def test_ort_cpu_computes_both_products_of_remainders(
    deep: Exported, tmp_path: Path, seed: int, bits: int, vnni: bool
) -> None:
    plan = draw_remainders(deep, tmp_path, seed, bits)
    if vnni and not _host_has_vnni():
        pytest.skip("signed 8-bit weights may saturate on this CPU: that graph is not built here")
    lowering = lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=vnni)
    assert compare(deep, plan, tmp_path / "codes", lowering) <= 1e-5


@pytest.mark.parametrize("kernel", [FLOAT_KERNEL, CONV_KERNEL])
@pytest.mark.parametrize("seed", [1, 2])
def test_other_kernels_of_onnx_runtime_compute_remainders_too(
    deep: Exported, tmp_path: Path, seed: int, kernel: str
) -> None:
    plan = draw_remainders(deep, tmp_path, seed)
    names = [layer.name for layer in plan.layers if kernel == FLOAT_KERNEL or layer.op is LayerOp.CONV]
    kernels = dict.fromkeys(names, kernel)
    lowering = lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=False, kernels=kernels)
    assert compare(deep, plan, tmp_path / "codes", lowering) <= 1e-5


@pytest.mark.parametrize(("seed", "bits"), [(1, 8), (2, 4)])
def test_tensorrt_computes_both_products_of_remainders(deep: Exported, tmp_path: Path, seed: int, bits: int) -> None:
    plan = draw_remainders(deep, tmp_path, seed, bits)
    assert compare(deep, plan, tmp_path / "codes", lower_tensorrt(plan, QuantWeights(tmp_path / "codes"))) == 0.0


def test_every_remainder_becomes_an_integer_product_of_its_own(deep: Exported, tmp_path: Path) -> None:
    plan = draw_remainders(deep, tmp_path, 1)
    model = canonical_graph(deep, plan, tmp_path / "codes")
    lowering = LowerOrtCpu(plan, QuantWeights(tmp_path / "codes"), vnni=False)
    assert lowering(model).modified
    assert not lowering(model).modified
    for layer in plan.layers:
        nodes = bind(model, plan).layers[layer.name].compute
        assert {node.op_type for node in nodes} <= {FUSED_PRODUCT, "ConvInteger"}
        assert [is_remainder(node) for node in nodes] == [False, True] * len(layer.segments)
    names = [str(node.name) for node in model.graph]
    assert len(names) == len(set(names))


def test_remainders_of_a_graph_for_vnni_become_portable_too(deep: Exported, tmp_path: Path) -> None:
    plan = draw_remainders(deep, tmp_path, 2)
    lowering = lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=True)

    def twice(model: ir.Model) -> None:
        lowering(model)
        assert MakePortable()(model).modified
        assert not MakePortable()(model).modified

    assert compare(deep, plan, tmp_path / "codes", twice) <= 1e-5


def test_every_planned_layer_becomes_an_integer_product(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, 4))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    lowering = LowerOrtCpu(plan, QuantWeights(tmp_path / "codes"), vnni=True)
    assert lowering(model).modified
    assert not lowering(model).modified
    products = [node for node in model.graph if node.op_type in (FUSED_PRODUCT, "ConvInteger")]
    attention = 2 * len(plan.attentions)
    assert len(products) == sum(len(layer.segments) for layer in plan.layers) + attention


def test_portable_weights_never_meet_the_saturating_kernel(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 2, bits=(8, 8))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    weights = QuantWeights(tmp_path / "codes")
    LowerOrtCpu(plan, weights, vnni=False)(model)
    risky = [
        layer
        for layer in plan.layers
        for index, segment in enumerate(layer.segments)
        if segment.activation is not None and may_saturate(weights.codes(layer.name, index), segment.activation)
    ]
    assert risky
    for node in model.graph:
        if node.op_type == FUSED_PRODUCT and node.inputs[1] is not None and node.inputs[1].is_initializer():
            assert node.inputs[1].dtype == ir.DataType.UINT8


@pytest.mark.parametrize("seed", [1, 2], ids=["attention of 8 bits", "attention of 5 bits"])
def test_a_graph_for_vnni_becomes_the_portable_one(deep: Exported, tmp_path: Path, seed: int) -> None:
    """What a bundle keeps can be rebuilt for another CPU without the weights it was made from."""
    plan = draw(deep, tmp_path, seed, bits=(8, 8))
    assert plan.attentions
    lowering = lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=True)

    def twice(model: ir.Model) -> None:
        lowering(model)
        assert MakePortable()(model).modified
        assert not MakePortable()(model).modified
        for node in model.graph:
            if node.op_type == FUSED_PRODUCT and (weight := constant_array(node.inputs[1])) is not None:
                assert weight.dtype == np.uint8 or np.abs(weight.astype(np.int64)).max() <= 64
            elif node.op_type == FUSED_PRODUCT and node.inputs[1] is not None:
                assert node.inputs[1].dtype == ir.DataType.UINT8

    assert compare(deep, plan, tmp_path / "codes", twice) <= 1e-5


def test_tensorrt_weights_are_int8_with_an_explicit_zero(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(3, 4))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    with pytest.raises(LoweringError, match="zero_point must be an int8 zero"):
        VerifyTensorRT()(model)
    lowering = LowerTensorRT(plan, QuantWeights(tmp_path / "codes"))
    assert lowering(model).modified
    assert not lowering(model).modified
    assert not VerifyTensorRT()(model).modified


def test_tensorrt_refuses_what_it_would_run_in_float(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(8, 8))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    scale = ir.Value(
        name="wide",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor([0.1], name="wide"),
    )
    model.graph.register_initializer(scale)
    node.replace_input_with(1, scale)
    with pytest.raises(LoweringError, match="rank 0 needed"):
        VerifyTensorRT()(model)


def _host_has_vnni() -> bool:
    from dmqexport.target import cpu_has_vnni

    return cpu_has_vnni()
