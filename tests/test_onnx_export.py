"""The float graph: names that come from the modules, bytes that come from the model alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from simulation_models import Wrapped, random_inputs, split_heads
from torch import Tensor, nn

from dmqexport import onnx_export
from dmqexport.onnx_export import export_float_graph, save_model
from passes.bind import graph_attentions, graph_layers


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Plain(nn.Module):
    """A convolution, a 2-D and a 3-D linear layer, an attention inside a nested module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.time = nn.Linear(1, 3)
        self.block = nn.ModuleDict({"text": nn.Linear(5, 6), "text_unbiased": nn.Linear(6, 6, bias=False)})
        self.attend = Attend()

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = self.time(timestep.float().unsqueeze(1) / 100)
        text = self.attend(self.block["text_unbiased"](self.block["text"](encoder_hidden_states)))
        return self.conv_out(sample + time[:, :, None, None] + text.mean(dim=(1, 2))[:, None, None, None])


class Attend(nn.Module):
    """Attention that is called from a module of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        heads = split_heads(tokens, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).flatten(2)


class Repeating(nn.Module):
    """One linear layer and one attention, each used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.attend = Twice()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = self.attend(self.shared(self.shared(encoder_hidden_states)))
        return self.conv(sample) * timestep[:, None, None, None] + text.mean(dim=(1, 2))[:, None, None, None]


class Twice(nn.Module):
    """Two attentions, one name."""

    def forward(self, tokens: Tensor) -> Tensor:
        heads = tokens.unsqueeze(1)
        once = F.scaled_dot_product_attention(heads, heads, heads)
        return F.scaled_dot_product_attention(once, heads, heads).squeeze(1)


def exported(module: nn.Module, path: Path) -> Path:
    export_float_graph(Wrapped(module.eval()), random_inputs(2, 0), path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = Plain()
    return module, exported(module, tmp_path_factory.mktemp("plain") / "model.onnx")


@pytest.fixture(scope="module")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = Repeating()
    return module, exported(module, tmp_path_factory.mktemp("repeating") / "model.onnx")


def assert_same_outputs(module: nn.Module, path: Path, batch: int) -> None:
    inputs = random_inputs(batch, 7)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(["out_sample"], {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        np.testing.assert_allclose(output, module(**inputs).numpy(), rtol=1e-4, atol=1e-5)


def test_inputs_and_outputs_have_the_names_of_the_ecosystem(plain: tuple[nn.Module, Path]) -> None:
    graph = ir.load(plain[1]).graph
    assert [value.name for value in graph.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert [value.name for value in graph.outputs] == ["out_sample"]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_graph_computes_the_module_at_any_batch(plain: tuple[nn.Module, Path], batch: int) -> None:
    assert_same_outputs(*plain, batch)


def test_layers_and_attentions_are_named_after_their_modules(plain: tuple[nn.Module, Path]) -> None:
    graph = ir.load(plain[1]).graph
    layers = graph_layers(graph)
    assert set(layers) == {"time", "block.text", "block.text_unbiased", "conv_out"}
    assert set(graph_attentions(graph)) == {"attend"}
    values = {output.name for node in graph for output in node.outputs}
    assert {"time/output", "block.text/product", "block.text/output", "block.text_unbiased/output"} <= values
    assert {"attend/scores", "attend/probability", "attend/output", "out_sample"} <= values
    assert layers["block.text"].bias is not None


def test_the_file_says_nothing_about_the_machine_it_was_made_on(plain: tuple[nn.Module, Path]) -> None:
    content = plain[1].read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b"site-packages" not in content
    assert b"pkg.torch" not in content


def test_the_same_model_exports_to_the_same_bytes(plain: tuple[nn.Module, Path], tmp_path: Path) -> None:
    assert exported(plain[0], tmp_path / "again.onnx").read_bytes() == plain[1].read_bytes()


def test_a_layer_that_runs_twice_exports_to_a_valid_graph(repeating: tuple[nn.Module, Path]) -> None:
    """Its results must not share one name: calibration leaves such a layer in float, the graph still has to load."""
    model = ir.load(repeating[1])
    assert len(graph_layers(model.graph)["shared"].compute) == 2
    assert_same_outputs(*repeating, 3)


def test_the_matmuls_of_a_module_that_attends_twice_are_not_mixed(repeating: tuple[nn.Module, Path]) -> None:
    """The scores of one attention and the output of another are no pair; neither may be bound as if they were."""
    assert "attend" not in graph_attentions(ir.load(repeating[1]).graph)


def test_a_graph_that_shrank_below_the_limit_takes_its_constants_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight, bias = np.ones(64, dtype=np.float32), np.arange(64, dtype=np.float32)
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[64] x) => (float[64] y) { s = Add(x, bias)
        y = Mul(s, weight) }"""
    model = ir.from_onnx_text(text)
    for name, array in (("weight", weight), ("bias", bias)):
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    (tmp_path / "float").mkdir()
    (tmp_path / "small").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "_INLINE_LIMIT", 100)
        patch.setattr(onnx_export, "_INLINE_TENSOR", 100)
        save_model(model, tmp_path / "float" / "model.onnx")
    save_model(ir.load(tmp_path / "float" / "model.onnx"), tmp_path / "small" / "model.onnx")
    assert (tmp_path / "float" / "model.onnx.data").is_file()
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["model.onnx"]
    session = ort.InferenceSession(str(tmp_path / "small" / "model.onnx"))
    assert np.array_equal(session.run(None, {"x": weight})[0], bias + 1)


def test_constants_are_described_by_their_tensors_alone(plain: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model = ir.load(plain[1])
    before = {name: (value.dtype, value.shape) for name, value in model.graph.initializers.items()}
    save_model(model, tmp_path / "again.onnx")
    document = onnx.load(tmp_path / "again.onnx")
    assert before
    assert {value.name for value in document.graph.value_info}.isdisjoint(before)
    assert {name: (value.dtype, value.shape) for name, value in model.graph.initializers.items()} == before
    again = ir.load(tmp_path / "again.onnx")
    assert {name: (value.dtype, value.shape) for name, value in again.graph.initializers.items()} == before


def test_the_parts_of_a_split_stay_in_the_graph_whose_weights_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime infers shapes before it reads what lies beside a graph, and refuses sizes that it cannot see."""
    monkeypatch.setattr(onnx_export, "_INLINE_LIMIT", 0)
    parts = [2] * 64  # 512 bytes, above the usual least size of what is stored outside
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 128] x) => (float[1, 2] y) {{
            {", ".join(f"p{index}" for index in range(64))} = Split <axis = 1> (x, sizes)
            y = Identity (p63)
        }}"""
    model = ir.from_onnx_text(text)
    sizes = next(value for value in model.graph[0].inputs if value is not None and value.name == "sizes")
    sizes.const_value = ir.tensor(np.array(parts), name="sizes")
    model.graph.register_initializer(sizes)
    path = tmp_path / "model.onnx"
    save_model(model, path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = np.arange(128, dtype=np.float32).reshape(1, 128)
    assert session.run(None, {"x": values})[0].tolist() == [[126.0, 127.0]]


def test_what_another_graph_kept_outside_comes_in_while_an_array_of_it_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_INLINE_LIMIT", 0)
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[64] x) => (float[64] y) { y = Add(x, bias) }"""
    model = ir.from_onnx_text(text)
    bias = next(value for value in model.graph[0].inputs if value is not None and value.name == "bias")
    bias.const_value = ir.tensor(np.arange(64, dtype=np.float32), name="bias")
    model.graph.register_initializer(bias)
    (tmp_path / "one").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "_INLINE_TENSOR", 100)
        save_model(model, tmp_path / "one" / "model.onnx")
    assert (tmp_path / "one" / "model.onnx.data").stat().st_size
    read = ir.load(tmp_path / "one" / "model.onnx")
    tensor = read.graph.initializers["bias"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    in_use = tensor.numpy()
    path = tmp_path / "model.onnx"
    save_model(read, path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros(64, dtype=np.float32)})[0].tolist() == list(range(64))
    assert in_use[-1] == 63
