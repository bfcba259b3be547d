"""report.json keeps its shape, and report.html is one safe, self-contained file."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmqexport.errors import DmqExportError, ResourceError
from dmqexport.report import heatmap, wording
from dmqexport.report.chart import timestep_chart
from dmqexport.report.document import CAP_DB, ReportDocument, ReportError, TimestepError, parse_document, read_report
from dmqexport.report.html import render_html, write_report
from dmqexport.report.pictures import ReportImages, picture_grid, psnr_db
from tests.report.report_fixture import make_document, make_images

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & {{ 7 * 7 }}"


class Page(HTMLParser):
    """Collects what the tests ask about: tags, attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.text += data


def page(document: dict[str, Any], images: ReportImages | None = None) -> Page:
    return Page(render_html(parse_document(document), images))


def test_json_round_trip_keeps_every_value_and_extra_keys(tmp_path: Path) -> None:
    document = make_document()
    document["layers"][3]["onnx_nodes"] = ["Conv_12"]
    document["house_style"] = {"a": [1, 2]}
    json_path, html_path = write_report(document, make_images(), tmp_path / "new" / "folder")
    assert (json_path.name, html_path.name) == ("report.json", "report.html")
    assert json.loads(json_path.read_text(encoding="utf-8")) == document
    assert read_report(json_path) == parse_document(document)
    assert sorted(path.name for path in json_path.parent.iterdir()) == ["report.html", "report.json"]


def test_the_same_build_writes_the_same_bytes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_report(make_document(), make_images(), tmp_path / "a")]
    second = [path.read_bytes() for path in write_report(make_document(), make_images(), tmp_path / "b")]
    assert first == second


def test_nullable_keys_may_be_left_out_but_are_written(tmp_path: Path) -> None:
    document = make_document()
    for key in ("created", "latency", "engine", "polygraphy", "stages", "gates", "notes", "operators"):
        del document[key]
    json_path, _ = write_report(document, None, tmp_path)
    written = json.loads(json_path.read_text(encoding="utf-8"))
    assert set(written) == set(make_document())
    assert (written["latency"], written["gates"]) == (None, [])


def test_numpy_values_and_paths_become_plain_json() -> None:
    document = make_document()
    document["metrics"]["image_ssim"] = np.float32(0.5)
    document["layers"][0]["sqnr_by_row"] = np.arange(10, dtype=np.float64)
    document["layers"][0]["parameters"] = np.int64(7)
    document["recipe"]["cache"] = Path("a/b")
    checked = parse_document(document)
    assert checked.metrics.image_ssim == 0.5
    assert checked.layers[0].sqnr_by_row == tuple(range(10))
    assert checked.recipe["cache"] == str(Path("a/b"))


def test_infinite_decibels_are_capped_and_nan_is_null_with_a_warning() -> None:
    document = make_document()
    document["layers"][4]["sqnr_db"] = math.inf
    document["layers"][4]["sqnr_by_row"][0] = -math.inf
    document["gates"][1]["measured"] = math.inf  # its unit is dB
    document["metrics"]["image_ssim"] = math.nan
    checked = parse_document(document)
    assert checked.layers[4].sqnr_db == CAP_DB
    assert checked.layers[4].sqnr_by_row[0] == -CAP_DB
    assert checked.gates[1].measured == CAP_DB
    assert checked.metrics.image_ssim is None
    assert checked.warnings[-1] == "metrics.image_ssim was NaN or infinite; recorded as not measured"
    json.dumps(checked.as_json(), allow_nan=False)


@dataclass(frozen=True)
class Refusal:
    name: str
    change: Callable[[dict[str, Any]], object]
    says: str


@pytest.mark.parametrize(
    "case",
    [
        Refusal("missing", lambda d: d.pop("metrics"), "metrics: Field required"),
        Refusal("deep", lambda d: d["layers"][5].pop("compute"), r"layers\.5\.compute: Field required"),
        Refusal("type", lambda d: d["layers"][5].update(op=3), r"layers\.5\.op: .*string \(got 3\)"),
        Refusal("version", lambda d: d.update(schema_version=2), r"schema_version: .*1 \(got 2\)"),
        Refusal("percent", lambda d: d["metrics"].update(retrieval_accuracy=95.0), "retrieval_accuracy: .*less than"),
        Refusal(
            "misspelt", lambda d: d["metrics"].update(image_psnr=d["metrics"].pop("image_psnr_db")), "did you mean"
        ),
        Refusal("rows", lambda d: d["layers"][0].update(sqnr_by_row=[1.0]), "'conv_in': sqnr_by_row has 1 values"),
        Refusal("row", lambda d: d["metrics"]["by_timestep"][0].update(row=99), "timestep 981 names row 99"),
        Refusal(
            "ratio", lambda d: d["latency"].update(ratio=1.749), "ratio is 1.749, but quantized_ms / fp32_ms is 0.572"
        ),
        Refusal("note", lambda d: d["notes"].update({"metrics.image_sim": "?"}), "did you mean 'metrics.image_ssim'"),
        Refusal("date", lambda d: d.update(created="yesterday"), "isoformat"),
        Refusal("object", lambda d: d["recipe"].update(model=object()), r"recipe\.model: a object has no JSON form"),
    ],
    ids=lambda case: case.name,
)
def test_a_document_of_another_shape_is_refused_with_the_place(case: Refusal) -> None:
    document = make_document()
    case.change(document)
    with pytest.raises(ReportError, match=case.says):
        parse_document(document)


def test_a_long_list_of_problems_is_cut() -> None:
    document = make_document()
    for layer in document["layers"]:
        del layer["op"]
    with pytest.raises(ReportError, match="and 52 more"):
        parse_document(document)


def test_read_report_explains_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"schema_version": 1', encoding="utf-8")
    with pytest.raises(ReportError, match="cannot read the report"):
        read_report(path)


def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ResourceError, match="cannot write the report"):
        write_report(make_document(), None, tmp_path / "file")


def test_every_string_is_escaped() -> None:
    document = json.loads(
        json.dumps(make_document())
        .replace('"mid_block.resnets.0.conv2"', json.dumps(HOSTILE))
        .replace('"bundled preset"', json.dumps(HOSTILE))
    )
    document["model"].update(name=HOSTILE, family=HOSTILE)
    document.update(
        bits=HOSTILE, target=HOSTILE, warnings=[HOSTILE], suggestions=[HOSTILE], operators={HOSTILE: {HOSTILE: 1}}
    )
    document["layers"][5].update(op=HOSTILE, compute=HOSTILE, reason=HOSTILE)
    document["images"].update(prompts=[HOSTILE], note=HOSTILE)
    document["gates"][0].update(name=HOSTILE, unit=HOSTILE)
    document["polygraphy"].update(lint=[HOSTILE, {HOSTILE: HOSTILE}], note=HOSTILE)
    document["engine"].update(target=HOSTILE, note=HOSTILE)
    document["stages"][0]["name"] = HOSTILE
    document["environment"]["packages"] = {HOSTILE: HOSTILE}
    document["recipe"]["model"] = HOSTILE
    document["notes"] = {"latency": HOSTILE, "metrics.image_ssim": HOSTILE}
    document["metrics"]["image_ssim"] = document["latency"] = None
    clean, hostile = page(make_document(), make_images(1)), page(document, ReportImages(*_pair(), [HOSTILE]))
    kinds = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in hostile.tags} <= kinds
    assert [tag for tag, _ in hostile.tags].count("script") == 1
    assert [tag for tag, _ in hostile.tags].count("img") == 3
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)
    assert "{{ 7 * 7 }}" in hostile.text


def _pair() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    images = make_images(1)
    return images.fp, images.quantized


def test_the_page_loads_nothing_and_its_policy_says_so() -> None:
    html = render_html(parse_document(make_document()), make_images())
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in html
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
        assert "style" not in attributes, "the page's own policy would drop it"
    assert "default-src 'none'" in html


def test_links_within_the_page_lead_somewhere() -> None:
    tags = page(make_document(), make_images()).tags
    ids = {attributes.get("id") for _, attributes in tags}
    assert {str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"} <= ids


def test_what_was_not_measured_says_so_with_its_note() -> None:
    document = make_document()
    document.update(latency=None, engine=None, polygraphy=None, operators={}, stages=[], gates=[])
    document["metrics"].update(
        eps_sqnr_db=None, image_psnr_db=None, image_ssim=None, retrieval_accuracy=None, by_timestep=[]
    )
    document["size_bytes"] = {"float": None, "nominal": None, "storage": None}
    document["notes"] = {"latency": "no timer on this machine", "metrics.image_psnr_db": "no sampler given"}
    document["images"] = {"prompts": [], "seeds": [], "note": "pictures were switched off"}
    for layer in document["layers"]:
        layer.update(sqnr_db=None, sqnr_by_row=[None] * 10, parameters=None, macs=None)
    text = page(document).text
    assert text.count("not measured: no timer on this machine") == 1
    assert "no sampler given" in text
    assert "not measured: pictures were switched off" in text
    assert "No gates were set" in text
    assert not re.search(r"\b(nan|None|inf)\b", text)


def test_an_empty_model_still_makes_a_page() -> None:
    document = make_document()
    document.update(layers=[], rows=[])
    document["metrics"]["by_timestep"] = []
    assert "No layer was left in float." in page(document).text


def test_the_verdict_names_the_failed_gates() -> None:
    document = make_document()
    assert "1 of 5 gates failed" in page(document).text
    document["gates"] = document["gates"][:3]
    assert "All 3 gates passed" in page(document).text
    document["gates"].append({"name": "FID", "threshold": 4.0, "measured": None, "passed": None, "unit": ""})
    assert "1 of 4 gates were not measured" in page(document).text


def test_slower_than_float_is_said_plainly() -> None:
    document = make_document()
    document["latency"].update(fp32_ms=10.0, quantized_ms=20.0, ratio=2.0)
    assert "slower than float: 10 ms → 20 ms a call" in page(document).text


def test_layers_are_listed_worst_first_and_float_layers_without_reason_stand_out() -> None:
    document = make_document()
    document["layers"][0].update(compute="float32", reason=None)
    html = render_html(parse_document(document), None)
    listed = [float(value) for value in re.findall(r'<td class="n" data-v="([\d.]+)">[\d.]+ dB</td>', html)]
    assert listed == sorted(listed)
    assert len(listed) == 58  # the two precomputed layers have no value
    assert "no reason was recorded" in html


def test_a_large_model_stays_small_on_disk(tmp_path: Path) -> None:
    json_path, html_path = write_report(make_document(300, 50), make_images(16, side=512), tmp_path)
    assert html_path.stat().st_size < 3_000_000
    assert json_path.stat().st_size < 1_000_000
    opened = re.findall(r'<details class="block" open>', html_path.read_text(encoding="utf-8"))
    assert len(opened) == 3


def test_only_some_of_many_pictures_are_embedded() -> None:
    shown = page(make_document(), make_images(40))
    assert "16 of 40 pictures" in shown.text
    assert sum(tag == "img" for tag, _ in shown.tags) == 3 * 16


def test_grid_pastes_exact_pixels_float_above_quantized() -> None:
    images = make_images(3, side=8)
    plain, labelled = picture_grid(images, 2), picture_grid(images, 2, labels=("FP32", "W4A4 int8 on a long label"))
    assert labelled.width > plain.width
    pixels = np.asarray(plain)
    gap = 4
    left = pixels.shape[1] - 3 * (16 + gap)
    for line, source in enumerate((images.fp, images.quantized)):
        for column in range(3):
            top, start = gap + line * (16 + gap), left + column * (16 + gap)
            tile = pixels[top : top + 16, start : start + 16]
            np.testing.assert_array_equal(tile, source[column].repeat(2, axis=0).repeat(2, axis=1))
    assert picture_grid(images, 2, with_difference=True).height == plain.height + 16 + gap
    with pytest.raises(ReportError, match="scale is 0"):
        picture_grid(images, 0)


@pytest.mark.parametrize(
    ("fp", "quantized", "captions", "says"),
    [
        pytest.param(np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 3), np.uint8), ["a"], "fp: got float64", id="dtype"),
        pytest.param(
            np.zeros((1, 3, 4, 4), np.uint8), np.zeros((1, 3, 4, 4), np.uint8), ["a"], "channels last", id="channels"
        ),
        pytest.param(
            np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), ["a", "b"], "same seeds", id="count"
        ),
        pytest.param(
            np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), [], "0 captions for 1", id="captions"
        ),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(fp: Any, quantized: Any, captions: list[str], says: str) -> None:
    with pytest.raises(DmqExportError, match=says):
        ReportImages(fp, quantized, captions)


def test_picture_psnr() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(black, black) == CAP_DB
    assert psnr_db(black, black + 255) == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["conv_in", "mid.a.b"], ["", "mid"], id="outside"),
        pytest.param(["unet.down.0.conv", "unet.down.1.conv"], ["down.0", "down.1"], id="wrapper"),
        pytest.param(["blocks.0.attn", "blocks.1.attn"], ["blocks.0", "blocks.1"], id="list is no wrapper"),
        pytest.param(["/blocks.0/attn/MatMul", "/out/MatMul"], ["blocks.0", "out"], id="onnx names"),
    ],
)
def test_layers_are_grouped_by_block(names: list[str], expected: list[str]) -> None:
    document = make_document(len(names))
    document["layers"] = [{**document["layers"][0], "name": name} for name in names]
    checked = parse_document(document)
    scale = heatmap.fit_scale(checked.layers)
    assert scale is not None
    found = [block.name for block in heatmap.blocks(checked.layers, checked.rows, scale)]
    assert found == [name or heatmap.OUTSIDE for name in expected]


def test_heat_map_levels_run_from_best_to_worst() -> None:
    scale = heatmap.Scale(worst=10, best=34)
    assert [scale.level(value) for value in (200, 34, 33.1, 10.5, 10, -200)] == [0, 0, 0, 23, 23, 23]
    colours = heatmap.colours()
    assert (len(colours), colours[0], colours[-1]) == (heatmap.LEVELS, "#440154", "#fde725")


@pytest.mark.parametrize("values", [[5.0], [7.0, 7.0], [-200.0, 200.0], [0.001, 0.002], [1e-9, 1e-9 + 1e-12]])
def test_chart_keeps_every_point_inside(values: list[float]) -> None:
    points = [TimestepError(timestep=at, row=0, eps_sqnr_db=value, samples=1) for at, value in enumerate(values)]
    chart = timestep_chart(points, (), None, width=340, height=250)
    assert chart is not None
    assert all(chart.left <= point.x <= chart.right and chart.top <= point.y <= chart.bottom for point in chart.points)
    assert 2 <= len(chart.y_ticks) <= 7


def test_chart_breaks_its_line_where_nothing_was_measured() -> None:
    points = [TimestepError(timestep=at, row=0, eps_sqnr_db=None if at == 3 else 20.0, samples=1) for at in range(6)]
    chart = timestep_chart(points, (), None, width=340, height=250)
    assert chart is not None
    assert (len(chart.points), len(chart.lines)) == (5, 2)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.size(999), "999 B"),
        (wording.size(14_235_648), "14.2 MB"),
        (wording.count(9_999), "9,999"),
        (wording.count(3_731_203), "3.73 M"),
        (wording.duration(0.0421), "42 ms"),
        (wording.duration(59.96), "1 min 0 s"),
        (wording.duration(3725), "1 h 2 min"),
        (wording.percent(1.0), "100 %"),
        (wording.times(1.749), "1.75×"),
    ],
)
def test_numbers_in_words(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_documented_keys_are_the_promise() -> None:
    """Renaming a key breaks other people's scripts; add keys instead, and never change this list."""
    promised = (
        "schema_version dmqexport_version created model bits target recipe metrics layers rows size_bytes latency "
        "operators gates engine polygraphy stages environment images warnings suggestions notes"
    )
    assert " ".join(ReportDocument.model_fields).startswith(promised)  # later keys come after
