"""Rewrites of the float graph: what they produce, what they leave alone, and that a second run finds nothing."""

import onnx_ir as ir
import pytest
from graph_text import assert_golden, read, render

from passes.cleanup import GemmToMatMul, SimplifyKeyTranspose
from passes.pipelines import float_cleanup


def test_key_transpose() -> None:
    model = read("key_transpose.before")
    assert SimplifyKeyTranspose()(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert_golden(model, "key_transpose.expected")


def test_key_transpose_touches_no_other_reshape() -> None:
    model = read("key_transpose_refused.before")
    before = render(model)
    assert not SimplifyKeyTranspose()(model).modified
    assert render(model) == before


def test_gemm_to_matmul() -> None:
    """alpha, transA and untagged nodes stay; a graph output keeps its name."""
    model = read("gemm.before")
    assert GemmToMatMul()(model).modified
    assert_golden(model, "gemm.expected")


@pytest.mark.parametrize(
    ("rewrite", "graph"),
    [(SimplifyKeyTranspose, "key_transpose.before"), (GemmToMatMul, "gemm.before")],
    ids=["key transpose", "gemm"],
)
def test_a_second_run_changes_nothing(rewrite: type[ir.passes.InPlacePass], graph: str) -> None:
    model = read(graph)
    rewrite()(model)
    once = render(model)
    assert not rewrite()(model).modified
    assert render(model) == once


def test_the_cleanup_as_a_whole_is_idempotent() -> None:
    model = read("key_transpose.before")
    assert float_cleanup()(model).modified
    assert not float_cleanup()(model).modified
