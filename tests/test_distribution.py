"""What is distributed: what an import loads, what the wheel holds, and what the README promises."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.repository_sources import PACKAGES, ROOT, SOURCES, pyproject

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
    module, _, function = pyproject()["project"]["scripts"]["dmqexport"].partition(":")
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
    project = pyproject()["project"]
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
    info = f"dmqexport-{pyproject()['project']['version']}.dist-info"
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
