"""Timings of kernels: what is chosen from them, where they are kept, and that no file can spoil a build."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from operator_pieces import compare, draw, float_values, pieces, run_piece
from simulation_fixture import Exported, canonical_graph, export, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.errors import RecipeError
from dmqexport.onnx_export import save_model
from dmqexport.pipeline_tune import HOST, Machine, layer_signatures, tune
from dmqexport.quant_plan import LayerOp, QuantPlan
from dmqexport.quant_weights import QuantWeights
from dmqexport.tuning import Kernel, Timings, cache_file, cpu_model, load_cache, read_timings, store_cache
from engines import ort
from engines.ort_profile import profile_nodes
from passes.bind import bind
from passes.lower.uniform_rows import UniformRows
from passes.pipelines import lower_ort_cpu

SLOW, EVEN, FAST = ({Kernel.PRODUCT: ms, Kernel.FLOAT: 1.0, Kernel.CONV_INTEGER: 3.0} for ms in (2.0, 1.05, 0.5))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_file("a cpu", "1.0")


def test_only_what_is_clearly_faster_is_chosen() -> None:
    timings = Timings("a cpu", "1.0", {"slow": SLOW, "even": EVEN, "fast": FAST, "half": {Kernel.FLOAT: 1.0}})
    layers = {"a": "slow", "b": "even", "c": "fast", "d": "half", "e": "unknown", "f": "slow"}
    assert timings.choose(layers) == {"a": Kernel.FLOAT, "f": Kernel.FLOAT}


def test_timings_come_back(cache: Path) -> None:
    timings = Timings("a cpu", "1.0", {"s": SLOW})
    assert load_cache("a cpu", "1.0") == Timings("a cpu", "1.0", {})
    assert store_cache(timings)
    assert load_cache("a cpu", "1.0") == read_timings(cache) == timings
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    merged = timings.merged({"s": FAST, "t": EVEN})
    assert (merged.times["s"], merged.times["t"], timings.times["s"]) == (FAST, EVEN, SLOW)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"schema_version": 2}', json.dumps({"schema_version": 1, "cpu": "c", "runtime": "r"}),
     *(json.dumps({"schema_version": 1, "cpu": "a cpu", "runtime": "1.0", "times": times})
       for times in ([], {"s": 1}, {"s": {"fpga": 1.0}}, {"s": {"float": -1}}, {"s": {"float": "1"}},
                     {"s": {"float": True}}, {"s": {"float": float("nan")}}))],
)  # fmt: skip
def test_a_damaged_cache_is_measured_anew_and_a_damaged_file_refused(
    cache: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content, encoding="utf-8")
    assert load_cache("a cpu", "1.0").times == {}
    assert str(cache) in caplog.text
    with pytest.raises(RecipeError, match=r"kernel timings.*\n.*lowering.tune=host"):
        read_timings(cache)
    assert store_cache(Timings("a cpu", "1.0", {"s": SLOW}))
    assert load_cache("a cpu", "1.0").times == {"s": SLOW}


def test_another_machines_timings_are_not_this_ones(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cache_file("b cpu", "1.0") != cache != cache_file("a cpu", "1.1")
    store_cache(Timings("a cpu", "1.0", {"s": SLOW}))
    other = cache_file("b cpu", "1.0")
    other.write_bytes(cache.read_bytes())
    assert load_cache("b cpu", "1.0").times == {}
    assert "is of a cpu" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not store_cache(Timings("a cpu", "1.0", {"s": SLOW}))
    assert load_cache("a cpu", "1.0").times == {}
    assert "not kept" in caplog.text
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "locked"))
        assert not store_cache(Timings("a cpu", "1.0", {"s": SLOW}))
        assert list((tmp_path / "locked").iterdir()) == []


def everywhere(plan: QuantPlan, kernel: Kernel) -> dict[str, str]:
    """One kernel wherever it can be."""
    layers = [layer.name for layer in plan.layers if layer.op is LayerOp.CONV or kernel is Kernel.FLOAT]
    attentions = [attention.name for attention in plan.attentions if kernel is Kernel.FLOAT]
    return dict.fromkeys(layers + attentions, kernel.value)


@pytest.mark.parametrize("kernel", [Kernel.FLOAT, Kernel.CONV_INTEGER])
@pytest.mark.parametrize("seed", range(4))
def test_every_kernel_computes_the_canonical_operators(
    deep: Exported, tmp_path: Path, seed: int, kernel: Kernel
) -> None:
    plan = draw(deep, tmp_path, seed)
    kernels = everywhere(plan, kernel)
    lowering = lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=False, kernels=kernels)
    model = canonical_graph(deep, plan, tmp_path / "codes")
    lowering(model)
    quantized = {layer.name for layer in plan.layers if layer.segments[0].activation is not None}
    operators = {name: {n.op_type for n in nodes.compute} for name, nodes in bind(model, plan).layers.items()}
    wanted = {"Conv", "MatMul"} if kernel is Kernel.FLOAT else {"ConvInteger"}
    assert all(operators[name] <= wanted for name in quantized & kernels.keys())
    assert compare(deep, plan, tmp_path / "codes", lowering) <= 1e-5


@pytest.mark.parametrize("kernel", [Kernel.FLOAT, Kernel.CONV_INTEGER])
@pytest.mark.parametrize(("seed", "bits"), [(2, (8, 8)), (2, (4, 4)), (1, (4, 4))])
def test_every_kernel_does_in_batches_of_one_row(
    deep: Exported, tmp_path: Path, seed: int, bits: tuple[int, int], kernel: Kernel
) -> None:
    plan = draw(deep, tmp_path, seed, bits=bits)
    kernels = everywhere(plan, kernel)
    reference, uniform = (canonical_graph(deep, plan, tmp_path / "codes") for _ in range(2))
    lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=False, kernels=kernels)(uniform)
    assert UniformRows()(uniform).modified
    operators, inputs = pieces(deep, plan), random_inputs(3, seed=5)
    inputs["timestep"] = torch.full_like(inputs["timestep"], len(plan.row_map) - 1)
    values = float_values(deep, {name for names, _ in operators.values() for name in names}, inputs)
    values["timestep"] = inputs["timestep"].numpy()
    for names, result in operators.values():
        expected, actual = (run_piece(model, names, result, values) for model in (reference, uniform))
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max(), result


@pytest.mark.parametrize("seed", [1, 2], ids=["8 bits", "5 bits"])
@pytest.mark.parametrize("vnni", [True, False], ids=["signed", "portable"])
def test_attention_in_float_is_executed_in_float(deep: Exported, tmp_path: Path, seed: int, vnni: bool) -> None:
    """ONNX Runtime makes an integer product of a MatMul between two DequantizeLinear, and must find none."""
    plan = draw(deep, tmp_path, seed, bits=(8, 8))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    names = {attention.name: Kernel.FLOAT.value for attention in plan.attentions}
    lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=vnni, kernels=names)(model)
    UniformRows()(model)
    save_model(model, tmp_path / "model.onnx")
    inputs = {name: value.numpy() for name, value in random_inputs(2, 3).items()}
    nodes = profile_nodes(tmp_path / "model.onnx", inputs, runs=1, threads=1)
    for name in names:
        products = {node.op for node in nodes if node.name.startswith(f"{name}/") and "MatMul" in node.op}
        assert products
        assert products <= {"MatMul", "FusedMatMul"}
    # Tables cost nothing after these products: their numbers are in what scales the right operand.
    left = [
        str(node.name) for node in model.graph if str(node.name).endswith(("/rescaled", "/rescaled1", "/corrected"))
    ]
    assert not [node for node in left if node.startswith(tuple(names))]


def test_signatures_name_what_time_depends_on(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, 4))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    few, many = (layer_signatures(model, plan, Machine(True, batch, 1).circumstances) for batch in (2, 8))
    assert (
        few.keys()
        == many.keys()
        == {*(layer.name for layer in plan.layers), *(attention.name for attention in plan.attentions)}
    )
    assert set(few.values()).isdisjoint(many.values())
    assert len(set(few.values())) < len(few), "layers of a kind are measured once"
    for attention in plan.attentions:
        assert few[attention.name].startswith("attention a8a8a8a8 batch 2 threads 1 signed query")
    assert len({few[attention.name] for attention in plan.attentions}) == 2, (
        "one has 16 keys, the other those of the text"
    )
    for name, signature in few.items():
        if name not in {layer.name for layer in plan.layers}:
            continue
        layer = plan.layer(name)
        assert signature.startswith(f"{layer.op.value} w{layer.weight_bits}a{layer.activation_bits} batch 2 threads 1")


def test_what_is_measured_is_kept_and_asked_for_once(
    deep: Exported,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, 4))
    model, weights = canonical_graph(deep, plan, tmp_path / "codes"), QuantWeights(tmp_path / "codes")
    save_model(model, tmp_path / "canonical.onnx")
    machine = Machine(False, 2, 1)
    inputs = {name: value.numpy() for name, value in random_inputs(2, 3).items()}
    inputs["timestep"] = np.full_like(inputs["timestep"], 1)
    first = tune(HOST, tmp_path / "canonical.onnx", plan, weights, inputs, machine)
    stored = cache_file(cpu_model(), str(ort.version()))
    timings = read_timings(stored)
    signatures = layer_signatures(model, plan, machine.circumstances)
    assert timings.times.keys() == set(signatures.values())
    for signature in signatures.values():
        expected = set(Kernel) if signature.startswith("conv ") else {Kernel.PRODUCT, Kernel.FLOAT}
        assert set(timings.times[signature]) == expected

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("dmqexport.pipeline_tune.measure", never)
    assert tune(HOST, tmp_path / "canonical.onnx", plan, weights, inputs, machine) == first
    assert tune(str(stored), tmp_path / "canonical.onnx", plan, weights, inputs, machine) == first
    slow = Timings("elsewhere", "0.9", dict.fromkeys(signatures.values(), SLOW))
    (tmp_path / "slow.json").write_text(slow.to_json(), encoding="utf-8")
    caplog.clear()
    told = tune(str(tmp_path / "slow.json"), tmp_path / "canonical.onnx", plan, weights, inputs, machine)
    assert {entry["kernel"] for entry in told["kernels"].values()} == {"float"}
    assert told["kernels"].keys() == signatures.keys()
    assert told["cpu"] == "elsewhere"
    assert "slow.json is of elsewhere, onnxruntime 0.9" in caplog.text
    some = Timings(cpu_model(), str(ort.version()), dict([*slow.times.items()][:2]))
    (tmp_path / "some.json").write_text(some.to_json(), encoding="utf-8")
    caplog.clear()
    tune(str(tmp_path / "some.json"), tmp_path / "canonical.onnx", plan, weights, inputs, machine)
    assert f"knows 2 of {len(slow.times)} kinds of layers" in caplog.text
    assert "elsewhere" not in caplog.text
    other = Machine(False, 4, 1)
    with pytest.raises(RecipeError, match=r"none of them one of the .* at batch 4 threads 1 portable\n.*tune=host"):
        tune(str(tmp_path / "slow.json"), tmp_path / "canonical.onnx", plan, weights, inputs, other)


def test_this_cpu_has_a_name() -> None:
    assert cpu_model() == cpu_model() != ""
