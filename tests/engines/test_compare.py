"""What Polygraphy is asked, and what becomes of its answers; every graph is small enough to judge by hand."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from dmqexport.errors import EngineError
from engines.compare import LintFinding, compare_graphs, lint_graph, version
from engines.ort import Optimization, OrtRunner

SCALED = """
<ir_version: 10, opset_import: ["" : 21]>
scaled (float[batch, 4] sample) => (float[batch, 4] out_sample)
<float[4] factor = {{{factor}}}>
{{
   [scale] out_sample = Mul (sample, factor)
}}
"""


def _write(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def _scaled(path: Path, *factor: float) -> Path:
    return _write(path, SCALED.format(factor=", ".join(str(float(value)) for value in factor)))


def _feeds(*values: float) -> list[dict[str, np.ndarray]]:
    return [{"sample": np.full((2, 4), value, np.float32)} for value in values]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return _scaled(tmp_path / "reference.onnx", 1, 1, 1, 1)


def test_tolerance_is_a_share_of_the_references_mean_magnitude_over_all_inputs(reference: Path, tmp_path: Path) -> None:
    deployed = _scaled(tmp_path / "deployed.onnx", 1.1, 1.1, 1.1, 1.1)
    result = compare_graphs(reference, deployed, _feeds(1, -3), max_mean_relative_error=0.11)
    out = result.outputs["out_sample"]
    assert out.atol == pytest.approx(0.11 * 2)
    assert out.mean_abs_error == pytest.approx(0.1 * 2, rel=1e-5)
    assert out.max_abs_error == pytest.approx(0.3, rel=1e-5)
    assert result.passed
    assert out.passed
    assert "on 4 samples" in result.note
    assert not compare_graphs(reference, deployed, _feeds(1, -3), max_mean_relative_error=0.09).passed


def test_one_sample_may_be_far_off(reference: Path, tmp_path: Path) -> None:
    # What a rounding tie does: a step at 0.5 that the deployed graph takes and the reference does not.
    deployed = _write(
        tmp_path / "deployed.onnx",
        """
        <ir_version: 10, opset_import: ["" : 21]>
        stepped (float[batch, 4] sample) => (float[batch, 4] out_sample)
        <float half = {0.5}>
        {
           [above] over = Greater (sample, half)
           [step] one = Cast <to = 1> (over)
           [out] out_sample = Add (sample, one)
        }
        """,
    )
    result = compare_graphs(reference, deployed, _feeds(*[0.1] * 9, 0.6), max_mean_relative_error=0.7)
    out = result.outputs["out_sample"]
    assert (out.median_abs_error, out.max_abs_error) == (0.0, pytest.approx(1.0))
    assert out.mean_abs_error == pytest.approx(0.1)
    assert result.passed


def test_not_a_number_never_passes(reference: Path, tmp_path: Path) -> None:
    deployed = _write(
        tmp_path / "deployed.onnx",
        """
        <ir_version: 10, opset_import: ["" : 21]>
        rooted (float[batch, 4] sample) => (float[batch, 4] out_sample)
        { [root] out_sample = Sqrt (sample) }
        """,
    )
    result = compare_graphs(reference, deployed, _feeds(1, -1, 1), max_mean_relative_error=10)
    assert not result.passed
    assert np.isnan(result.outputs["out_sample"].mean_abs_error)


def test_outputs_of_another_shape_are_refused(reference: Path, tmp_path: Path) -> None:
    deployed = _write(
        tmp_path / "deployed.onnx",
        """
        <ir_version: 10, opset_import: ["" : 21]>
        summed (float[batch, 4] sample) => (float[batch, 1] out_sample)
        <int64[1] axes = {1}>
        { [total] out_sample = ReduceSum (sample, axes) }
        """,
    )
    with pytest.raises(EngineError, match=r"shape of out_sample \(2, 1\), expected \(2, 4\)"):
        compare_graphs(reference, deployed, _feeds(1), max_mean_relative_error=10)


def test_an_output_that_only_one_side_has_is_refused(reference: Path, tmp_path: Path) -> None:
    deployed = _write(
        tmp_path / "deployed.onnx",
        """
        <ir_version: 10, opset_import: ["" : 21]>
        renamed (float[batch, 4] sample) => (float[batch, 4] noise)
        { [same] noise = Identity (sample) }
        """,
    )
    with pytest.raises(EngineError, match=r"outputs \['noise'\], expected \['out_sample'\]"):
        compare_graphs(reference, deployed, _feeds(1), max_mean_relative_error=0.1)


def test_only_the_deployed_graph_is_optimized_and_configured(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed = _scaled(tmp_path / "deployed.onnx", 1, 1, 1, 1)
    built: dict[str, tuple[Optimization, Mapping[str, str] | None, int | None]] = {}

    class Recorded(OrtRunner):
        def __init__(
            self,
            path: Path,
            *,
            optimization: Optimization = Optimization.FAST,
            threads: int | None = None,
            config: Mapping[str, str] | None = None,
        ) -> None:
            built[path.stem] = (optimization, config, threads)
            super().__init__(path, optimization=optimization, threads=threads, config=config)

    monkeypatch.setattr("engines.compare.OrtRunner", Recorded)
    config = {"session.x64quantprecision": "1"}
    compare_graphs(reference, deployed, _feeds(1), max_mean_relative_error=0.1, config=config, threads=1)
    assert built == {
        "reference": (Optimization.REFERENCE, None, 1),
        "deployed": (Optimization.FAST, config, 1),
    }


def test_refuses_to_pass_on_nothing(reference: Path) -> None:
    with pytest.raises(EngineError, match="empty"):
        compare_graphs(reference, reference, [], max_mean_relative_error=0.1)
    with pytest.raises(EngineError, match="above 0"):
        compare_graphs(reference, reference, _feeds(1), max_mean_relative_error=0.0)


def test_a_run_that_fails_says_which(reference: Path) -> None:
    with pytest.raises(EngineError, match="run failed"):
        compare_graphs(reference, reference, [{"sample": np.ones((2, 5), np.float32)}], max_mean_relative_error=0.1)


def test_prints_nothing(reference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compare_graphs(reference, reference, _feeds(1), max_mean_relative_error=0.1)
    lint_graph(reference)
    assert capfd.readouterr() == ("", "")


def test_a_clean_graph_has_no_findings(reference: Path) -> None:
    assert lint_graph(reference) == []


def test_external_data_is_found_beside_the_graph(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(SCALED.format(factor="1, 1, 1, 1"))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(4, np.float32), "factor"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert (tmp_path / "model.onnx.data").is_file()
    assert lint_graph(path) == []


def test_operators_that_onnxruntime_adds_are_no_findings(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "contrib.onnx",
        """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        contrib (float[batch, 4] sample) => (float[batch, 4] out_sample)
        { [gelu] out_sample = com.microsoft.Gelu (sample) }
        """,
    )
    assert lint_graph(path) == []


def test_findings_name_the_node(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "faulty.onnx",
        """
        <ir_version: 10, opset_import: ["" : 21]>
        faulty (float[batch, 4] sample, float[batch] unused) => (float[batch, 4] out_sample)
        <float[3] bias = {1.0, 2.0, 3.0}>
        {
            [idle] nobody = Neg (sample)
            [bad_add] out_sample = Add (sample, bias)
        }
        """,
    )
    findings = lint_graph(path)
    assert [finding.level for finding in findings if finding.node == "bad_add"] == ["error"]
    assert LintFinding("warning", "idle", "Does not affect outputs, can be removed.") in findings
    assert any(finding.node is None and "'unused'" in finding.message for finding in findings)


def test_lint_runs_on_the_inputs_it_is_given(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "gather.onnx",
        """
        <ir_version: 10, opset_import: ["" : 21]>
        gather (int64[batch] timestep) => (float[batch] row)
        <float[3] table = {1.0, 2.0, 3.0}>
        { [row_of] row = Gather (table, timestep) }
        """,
    )
    assert lint_graph(path, {"timestep": np.array([0, 2])}) == []
    assert [finding.node for finding in lint_graph(path, {"timestep": np.array([0, 3])})] == ["row_of"]


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff not a graph")
    assert [finding.level for finding in lint_graph(path)] == ["error"]
    with pytest.raises(EngineError, match="no such file"):
        lint_graph(tmp_path / "absent.onnx")


def test_version_is_known() -> None:
    assert version()
