"""The pictures of an allocation: drawn to scale, safe to inline, and present in the page."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from dmqexport.report.document import Layer, parse_document
from dmqexport.report.html import render_html
from dmqexport.report.pareto_chart import bits_svg, pareto_svg
from tests.report.report_fixture import make_document


def point(method: str, size: int, predicted: float | None, measured: float) -> dict[str, Any]:
    return {
        "method": method, "nominal_bytes": size, "predicted_distortion": predicted, "measured_distortion": measured
    }  # fmt: skip


def circles(text: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}circle")
    return [(float(item.get("cx", "")), float(item.get("cy", ""))) for item in found if len(item)]


def test_larger_is_further_right_and_worse_is_higher() -> None:
    drawn = circles(pareto_svg([point("integer", 1_000_000, None, 1e-1), point("integer", 2_000_000, None, 1e-3)]))
    (left, high), (right, low) = drawn
    assert left < right
    assert high < low  # SVG counts downwards


def test_what_was_not_predicted_is_not_drawn() -> None:
    assert len(circles(pareto_svg([point("uniform", 10**6, None, 0.1), point("integer", 10**6, 0.2, 0.1)]))) == 3


def test_without_any_figure_there_is_still_a_picture() -> None:
    ElementTree.fromstring(pareto_svg([point("uniform", 10**6, None, 0.0)]))


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b'])
def test_names_are_escaped(name: str) -> None:
    layer = Layer.model_validate(
        {
            "name": name, "op": "conv", "nominal_bits": {"weight": 4, "activation": None},
            "storage_bits": {"weight": 4, "activation": None}, "compute": "int8", "sqnr_db": None, "sqnr_by_row": [],
            "parameters": 1,
        }
    )  # fmt: skip
    drawn = bits_svg([layer])
    assert drawn is not None
    title = ElementTree.fromstring(drawn).find(".//title")
    assert title is not None
    assert title.text == f"{name}: w4a16"


def test_the_page_tells_how_bits_were_chosen_when_they_were() -> None:
    allocated = make_document()
    uniform = {**allocated, "allocation": {"method": "uniform", "budget": "w4a4"}}
    assert 'id="allocation"' not in render_html(parse_document(uniform), None)
    page = render_html(parse_document(allocated), None)
    section = re.search(r'<section id="allocation">.*?</section>', page, re.DOTALL)
    assert section is not None
    for text in ("w4a4 on average", "average weight bits", "3.99", "0.012", "0.05", "0.07", "0.04 %"):
        assert text in section[0]
    assert section[0].count("<svg") == 2
