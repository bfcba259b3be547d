"""What OpenVINO's IR is made from: the deployed graph, in which some results that nothing reads are not computed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from dmqexport.bundle import GRAPH
from dmqexport.onnx_export import save_model
from passes.pipelines import openvino_engine


@contextmanager
def engine_graph(graph: Path, scratch: Path) -> Iterator[Path]:
    """A graph that computes what `graph` computes, for OpenVINO to convert inside the block; nothing in `scratch` is
    left behind. The bundle keeps `graph`: every layer's result has its name there.
    """
    model = ir.load(graph)
    if not openvino_engine()(model).modified:
        yield graph
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        save_model(model, Path(folder) / GRAPH)
        yield Path(folder) / GRAPH
