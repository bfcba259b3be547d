"""The repository tests itself: who imports whom, what the wheel holds, what the README promises, and house style."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dmqexport", "calib", "passes", "engines")


# --- who imports whom -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportRule:
    """What the modules that match may import besides the standard library; patterns as of `fnmatch`, spaces between."""

    modules: str
    may_import: str
    in_functions: str = ""  # only inside a function or for type checkers: loaded when used, absent until then


# The contracts between the stages: numpy in, numpy out, no stage and no framework.
CONTRACTS = "dmqexport.errors dmqexport.quant_types dmqexport.quant_plan dmqexport.target dmqexport.ranks"

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


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_module_name(path): path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))}
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
    project = _pyproject()["project"]
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


# --- lean imports -----------------------------------------------------------------------------------------------------

FRAMEWORKS = {
    *("torch", "torchmetrics", "diffusers", "transformers", "tokenizers", "scipy"),
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "polygraphy", "tensorrt", "tensorrt_rtx"),
}


def _frameworks_loaded_by(code: str, *arguments: str) -> set[str]:
    """Run code in a new interpreter and say which frameworks it holds at the end, however the code ends."""
    program = f"""
import sys
try:
    {code}
except SystemExit as end:
    assert not end.code, f"exit code {{end.code}}"
print("\\nloaded:", *sorted(set(sys.modules) & {FRAMEWORKS}))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.rpartition("loaded:")[2].split())


def test_importing_dmqexport_loads_no_framework() -> None:
    assert _frameworks_loaded_by("import dmqexport") == set()


def test_help_of_the_command_and_of_every_verb_loads_no_framework() -> None:
    module, _, function = _pyproject()["project"]["scripts"]["dmqexport"].partition(":")
    run = f"from {module} import {function}; {function}()"
    assert _frameworks_loaded_by(run, "--help") == set()
    each = f"""
    from {module} import {function}
    for verb in {_verbs()}:
        sys.argv = ["dmqexport", verb, "--help"]
        try:
            {function}()
        except SystemExit as end:
            assert not end.code, verb
"""
    assert _frameworks_loaded_by(each.strip()) == set()


def test_the_module_of_the_command_runs_too() -> None:
    run = "import runpy; runpy.run_module('dmqexport.cli', run_name='__main__', alter_sys=True)"
    assert _frameworks_loaded_by(run, "--help") == set()


# --- the wheel --------------------------------------------------------------------------------------------------------

# What a wheel has lost before anyone noticed, elsewhere; the test below compares the whole tree.
CARGO = (
    "dmqexport/py.typed",
    "dmqexport/report/template.html.j2",
    "dmqexport/report/script.js.j2",
    "dmqexport/report/style.css",
    "dmqexport/models/prompts.txt",
    "dmqexport/models/emoji/NOTICE",
    "dmqexport/models/emoji/LICENSE.noto-emoji.txt",
    "dmqexport/models/emoji/captions.txt",
    "dmqexport/models/emoji/noto_emoji_64.npz",
    "dmqexport/models/emoji/pipeline/model_index.json",
    "dmqexport/models/emoji/pipeline/tokenizer/tokenizer.json",
    "dmqexport/models/emoji/pipeline/unet/diffusion_pytorch_model.safetensors",
)


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel made from the source distribution made from a clean copy, so that both are looked at."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", str(copy)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    project = _pyproject()["project"]
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {*PACKAGES, f"dmqexport-{project['version']}.dist-info"}


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    source = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".png"  # the README's pictures
    }
    held = {name for name in wheel.namelist() if name.partition("/")[0] in PACKAGES}
    assert held == source
    assert set(CARGO) <= held


def test_the_wheel_carries_its_licences_and_its_command(wheel: zipfile.ZipFile) -> None:
    info = f"dmqexport-{_pyproject()['project']['version']}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(wheel.namelist())
    assert "dmqexport = dmqexport.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_what_others_made_is_named_in_the_notice() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for path in re.findall(r"dmqexport/[\w./-]*\w", notice):
        assert (ROOT / path).exists(), f"NOTICE names {path}, which is not there"
    assert "dmqexport/models/emoji/pipeline/" in notice
    assert "dmqexport/models/prompts.txt" in notice


# --- the README and the Makefile --------------------------------------------------------------------------------------


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def _shell_lines() -> list[str]:
    """The commands in the README's shell blocks, prompts dropped and continued lines joined."""
    blocks = re.findall(r"^ *```(?:sh|bash|shell|console)\n(.*?)^ *```", _readme(), re.MULTILINE | re.DOTALL)
    lines = []
    for block in blocks:
        shown = block.replace("\\\n", " ").splitlines()
        prompted = [line.strip().removeprefix("$ ") for line in shown if line.strip().startswith("$ ")]
        lines += prompted or [line.strip() for line in shown]
    return lines


def _commands() -> Iterator[list[str]]:
    """Every command of those lines as words, one for each part between `&&`, `|` and `;`, variables set before cut."""
    for line in _shell_lines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                while command and re.fullmatch(r"\w+=.*", command[0]):
                    command.pop(0)
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def _typer_command() -> Any:
    """The command tree behind the `dmqexport` command."""
    import typer

    from dmqexport.cli import app

    return typer.main.get_command(app)


def _verbs() -> list[str]:
    return sorted(_typer_command().commands)


def _check(arguments: list[str]) -> None:
    """Read arguments as the command line does; where a verb has a dry run, also resolve the recipe."""
    command, context, rest = _typer_command(), None, arguments
    while True:
        context = command.context_class(command, info_name=command.name, parent=context)
        values, rest, _ = command.make_parser(context).parse_args(args=list(rest))
        if "help" in values or "version" in values:
            return
        if not hasattr(command, "commands"):
            break
        assert rest, "a verb is missing"
        assert rest[0] in command.commands, f"no verb {rest[0]!r}; there are {sorted(command.commands)}"
        command, rest = command.commands[rest[0]], rest[1:]
    assert not rest, f"unexpected arguments {rest}"
    for parameter in command.get_params(context):
        assert values.get(parameter.name) is not None or not parameter.required, f"{parameter.name} is missing"
    if any("--dry-run" in parameter.opts for parameter in command.get_params(context)):
        recipe = values.get("recipe")  # may be the reader's own file
        if recipe is None or (ROOT / recipe).exists():
            from dmqexport.cli import app

            app([*arguments, "--dry-run"], standalone_mode=False)


def test_every_dmqexport_command_of_the_readme_would_be_accepted() -> None:
    checked = 0
    for words in _commands():
        program = Path(words[0]).name
        arguments = words[1:]
        if re.fullmatch(r"python[\d.]*", program) and len(words) > 2 and words[1] == "-m":
            program, arguments = words[2], words[3:]
            if program.partition(".")[0] in PACKAGES:
                assert importlib.util.find_spec(program), f"README: {shlex.join(words)}: no module {program}"
                assert program in SOURCES, f"README: {shlex.join(words)}: {program} cannot be run"
        if program in ("dmqexport", "dmqexport.cli"):
            try:
                _check(arguments)
            except Exception as error:
                pytest.fail(f"README: {shlex.join(words)}: {getattr(error, 'message', error)}")
            checked += 1
    assert checked, "the README shows no dmqexport command"


def test_the_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        word
        for words in _commands()
        if words[0] == "make"
        for word in words[1:]
        if not word.startswith("-") and "=" not in word
    }
    assert named <= targets
    assert {"demo", "test"} <= named


def test_the_readme_shows_recipes_that_are_recipes(tmp_path: Path) -> None:
    from dmqexport.recipe import load_recipe

    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", _readme(), re.MULTILINE | re.DOTALL)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        load_recipe(path, {}, [])


def test_the_readme_links_to_files_that_exist() -> None:
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", _readme()):
        assert (ROOT / target).exists(), f"README.md links to {target}"


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
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in SOURCES.values()
    }
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
