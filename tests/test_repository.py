"""The repository tests itself: who imports whom, and house style."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.repository_sources import PACKAGES, ROOT, SOURCES, pyproject

# --- who imports whom -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportRule:
    """What the modules that match may import besides the standard library; patterns as of `fnmatch`, spaces between."""

    modules: str
    may_import: str
    in_functions: str = ""  # only inside a function or for type checkers: loaded when used, absent until then


# The contracts between the stages: numpy in, numpy out, no stage and no framework.
CONTRACTS = (
    "dmqexport.errors dmqexport.quant_types dmqexport.quant_plan dmqexport.quant_weights dmqexport.rotation_matrix "
    "dmqexport.target dmqexport.ranks"
)

# Above the contracts, still no stage and no framework: what a user writes and what lies on disk.
RECORDS = (
    "dmqexport dmqexport.recipe dmqexport.recipe_* dmqexport.recipes dmqexport.byte_size dmqexport.bundle"
    f" dmqexport.workspace dmqexport.memory_watch {CONTRACTS}"
)

ENGINE_VENDORS = "onnxruntime openvino tensorrt tensorrt_rtx polygraphy onnx onnx_graphsurgeon tritonclient"

# The first row that matches a module holds for it, and no other.
IMPORT_RULES = (
    # `import dmqexport` costs nothing.
    ImportRule("dmqexport", ""),
    ImportRule(CONTRACTS, f"numpy safetensors {CONTRACTS}"),
    # The stages: calibration knows torch and not ONNX, the graph passes ONNX and not torch, the engines neither.
    ImportRule("calib calib.*", f"torch numpy scipy safetensors calib.* {CONTRACTS}"),
    ImportRule("passes passes.*", f"onnx_ir numpy ml_dtypes passes.* {CONTRACTS}"),
    # They also run, as one file, where nothing of dmqexport is installed.
    ImportRule("engines.trt_layers", ""),
    ImportRule("engines.trt_run", "", in_functions="numpy tensorrt tensorrt_rtx"),
    ImportRule("engines.trt_standalone", "engines.trt_layers engines.trt_run", in_functions="tensorrt tensorrt_rtx"),
    ImportRule("engines engines.*", f"numpy engines engines.* {CONTRACTS}", in_functions=ENGINE_VENDORS),
    # The one bridge between torch and ONNX.
    ImportRule("dmqexport.onnx_export", f"torch onnx onnx_ir onnxscript numpy passes.base {CONTRACTS}"),
    # What a user's own code imports: torch, and nothing of ours.
    ImportRule("dmqexport.adapter", "torch"),
    # Models sample the calibration set that `calib` consumes, and the bundled one is trained against its own metric.
    ImportRule(
        "dmqexport.models dmqexport.models.*",
        "torch numpy safetensors diffusers transformers tokenizers huggingface_hub rich"
        f" dmqexport.models dmqexport.models.* dmqexport.report.retrieval dmqexport.adapter calib.sampling {RECORDS}",
    ),
    # The report draws what it is given; it opens on machines without torch or ONNX.
    ImportRule(
        "dmqexport.report dmqexport.report.*",
        "numpy pydantic jinja2 markupsafe PIL dmqexport.errors dmqexport.report dmqexport.report.*",
    ),
    # A bundle as a diffusers component, here or served: the only other places that run an engine.
    ImportRule(
        "dmqexport.runtime dmqexport.serving",
        f"torch numpy diffusers dmqexport.models.* dmqexport.runtime dmqexport.package engines engines.* {RECORDS}",
        in_functions="dmqexport dmqexport.pipeline_rebuild",
    ),
    # A bundle for an inference server: files copied, the graph's signature read, nothing run.
    ImportRule("dmqexport.package", f"{RECORDS}", in_functions="onnx"),
    # The composition root: hands the artifacts of one stage to the next, so it may name them all.
    ImportRule(
        "dmqexport.pipeline dmqexport.pipeline_*",
        "torch torchmetrics onnx onnx_ir numpy safetensors dmqexport dmqexport.* calib.* passes.* engines.*",
    ),
    # What the command line does with a bundle or a machine: runs engines, and neither calibrates nor rewrites graphs.
    ImportRule(
        "dmqexport.bench dmqexport.doctor dmqexport.draw",
        f"numpy PIL dmqexport.models.* dmqexport.pipeline dmqexport.pipeline_* dmqexport.runtime engines.* {RECORDS}",
    ),
    # The command line answers `--help` before anything heavy is loaded.
    ImportRule(
        "dmqexport.cli dmqexport.cli_* dmqexport.__main__",
        f"typer rich dmqexport.cli dmqexport.cli_* {RECORDS}",
        in_functions="dmqexport.* calib.* passes.* engines.*",
    ),
    # The parent of an ablation's processes: stays small, so that their peak memory is their own.
    ImportRule("dmqexport.ablate dmqexport.ablation_table", f"yaml dmqexport.ablation_table {RECORDS}"),
    ImportRule("dmqexport.*", f"numpy safetensors pydantic yaml {RECORDS}"),
)

# Loading the left loads the right.
BRINGS = {"safetensors.torch": "torch"}


TREES = {name: ast.parse(path.read_bytes(), str(path)) for name, path in SOURCES.items()}


@dataclass(frozen=True)
class Import:
    """One imported name: a module of ours in full, of anyone else the top-level package."""

    name: str
    line: int
    late: bool  # in a function, or for type checkers only


def _imported(name: str) -> str:
    """The module behind a dotted name: the longest of ours that matches, else what is before the first dot."""
    if name in BRINGS:
        return BRINGS[name]
    if name.partition(".")[0] not in PACKAGES:
        return name.partition(".")[0]
    while name not in SOURCES and "." in name:
        name = name.rpartition(".")[0]
    return name


def _imports(node: ast.AST, late: bool = False) -> Iterator[Import]:
    """Every import below a node, written as a statement or as `import_module` of a literal."""
    for child in ast.iter_child_nodes(node):
        inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = True
        match child:
            case ast.Import(names=names):
                dotted = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names):
                dotted = [
                    f"{module}.{alias.name}" if f"{module}.{alias.name}" in SOURCES else str(module) for alias in names
                ]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(literal)), *_],
            ):
                dotted = [literal]
            case _:
                dotted = []
        for name in dotted:
            yield Import(_imported(name), child.lineno, inside)
        yield from _imports(child, inside)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


@pytest.mark.parametrize("module", SOURCES)
def test_modules_import_only_what_their_rule_allows(module: str) -> None:
    rule = next((rule for rule in IMPORT_RULES if _matches(module, rule.modules)), None)
    assert rule is not None, f"no row of IMPORT_RULES is about {module}"
    for found in _imports(TREES[module]):
        allowed = f"{rule.may_import} {rule.in_functions}" if found.late else rule.may_import
        assert found.name in sys.stdlib_module_names or _matches(found.name, allowed), (
            f"{SOURCES[module].relative_to(ROOT)}:{found.line} imports {found.name}; "
            f"its rule allows the standard library and: {allowed or 'nothing else'}"
        )


# Import names whose distribution is called otherwise.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "tensorrt_rtx": "tensorrt-rtx-cu13"}


def test_whatever_is_imported_is_declared() -> None:
    """A package that only comes along with another goes away with it."""
    project = pyproject()["project"]
    needed = [
        *project["dependencies"],
        *(
            each
            for extra in ("cpu", "gpu", "rtx", "openvino", "serving")
            for each in project["optional-dependencies"][extra]
        ),
    ]
    declared = {re.split(r"[^\w.-]", requirement)[0] for requirement in needed}
    for module, tree in TREES.items():
        for found in _imports(tree):
            top = found.name.partition(".")[0]
            if top not in {*sys.stdlib_module_names, *PACKAGES}:
                distribution = DISTRIBUTIONS.get(top, top.replace("_", "-").lower())
                assert distribution in declared, f"{module} imports {top}; pyproject.toml does not name {distribution}"


def test_the_walk_sees_every_form_of_import() -> None:
    code = """
from typing import TYPE_CHECKING
import torch.nn.functional as F
from safetensors.torch import save_file
from passes import bind
from passes.bind import bind
if TYPE_CHECKING:
    import onnx
def run():
    import onnxruntime
    importlib.import_module("tensorrt")
class Late:
    import polygraphy
"""
    found = [(each.name, each.late) for each in _imports(ast.parse(code))]
    assert found == [
        ("typing", False),
        ("torch", False),
        ("torch", False),
        ("passes.bind", False),
        ("passes.bind", False),
        ("onnx", True),
        ("onnxruntime", True),
        ("tensorrt", True),
        ("polygraphy", False),
    ]


def test_every_row_of_the_import_rules_is_about_some_module() -> None:
    """A row that a rename left behind would silently guard nothing."""
    first = {next(rule for rule in IMPORT_RULES if _matches(name, rule.modules)) for name in SOURCES}
    unused = [rule.modules for rule in IMPORT_RULES[:-1] if rule not in first]
    assert not unused


def test_no_module_is_named_like_a_vendors_package_or_like_a_drawer() -> None:
    vendors = {name.lower() for name in f"{ENGINE_VENDORS} onnx_ir torch diffusers transformers".split()}
    drawers = {"utils", "util", "helpers", "helper", "misc", "common"}
    named = [name for name in SOURCES if name.rpartition(".")[2] in vendors | drawers]
    # Targets are named like their siblings; absolute imports keep them apart from the packages.
    assert {name.rpartition(".")[0] for name in named} <= {"passes.lower"}, named


# --- house style ------------------------------------------------------------------------------------------------------

MAX_LINES = 500
# Files that may be longer, and why.
LONGER: dict[str, int] = {}

# Written in pieces, so that this file does not hold what it looks for.
FORBIDDEN_TEXT = {
    "a path of one machine": re.compile(r"(?<![\w.~-])/(?:work|farm)" + r"/(?!\s)"),
    "a note to self": re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b"),
}


def _text_files() -> Iterator[Path]:
    """Everything a person wrote: the packages, the tests, the files on top, and what drives CI."""
    folders = [ROOT / name for name in (*PACKAGES, "tests", ".ci")]
    below = [path for folder in folders for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
    for path in [*sorted(ROOT.iterdir()), *below]:
        if path.is_file() and path.suffix not in {".npz", ".safetensors", ".png", ".onnx"} and path.name != ".git":
            yield path


def test_no_file_holds_a_machines_path_or_a_note_to_self() -> None:
    for path in _text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for what, pattern in FORBIDDEN_TEXT.items():
                assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number} holds {what}"


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    written = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in written}
    assert {path: n for path, n in lengths.items() if n > LONGER.get(path, MAX_LINES)} == {}
    assert set(LONGER) <= {path for path, n in lengths.items() if n > MAX_LINES}, "an exception nobody needs any more"


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_unpickled(module: str) -> None:
    """A model file is data, never a program."""
    where = SOURCES[module].relative_to(ROOT)
    for each in _imports(TREES[module]):
        assert each.name not in {"pickle", "dill", "joblib", "shelve"}, f"{where}:{each.line} imports {each.name}"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            switched = {each.arg: ast.unparse(each.value) for each in node.keywords}
            assert switched.get("allow_pickle", "False") == "False", f"{where}:{node.lineno} unpickles"
            if ast.unparse(node.func) == "torch.load":
                assert switched.get("weights_only") == "True", f"{where}:{node.lineno} lacks weights_only=True"


@pytest.mark.parametrize("module", SOURCES)
def test_modules_and_what_they_offer_have_docstrings(module: str) -> None:
    where = SOURCES[module].relative_to(ROOT)
    assert ast.get_docstring(TREES[module]), f"{where} does not say what it is for"
    for node in TREES[module].body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{where}:{node.lineno} {node.name} does not say what it does"
