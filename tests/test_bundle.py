"""Bundles on disk: whatever was changed, removed or cut off is found and named, and nothing of a user is replaced."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmqexport.bundle import MANIFEST, SEAL, check_replaceable, is_replaceable, open_bundle, write_manifest
from dmqexport.errors import BundleError, RecipeError

FIELDS: dict[str, Any] = {
    "component": "unet",
    "model": {"name": "m", "family": "UNet2DModel", "fingerprint": "0"},
    "bits": "w8a8",
    "target": "ort-cpu",
    "num_timesteps": 20,
    "session": {"config": {}},
    "sampling": {"steps": 4, "guidance": 1.0},
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    for name in (
        *("unet/model.onnx", "unet/engines/trt-any-11/engine.plan", "vae/config.json"),
        *("dmqexport/quant_plan.json", "dmqexport/report.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    write_manifest(folder, FIELDS)
    return folder


def change(**fields: Any) -> Callable[[Path], object]:
    def harm(folder: Path) -> None:
        document = json.loads((folder / MANIFEST).read_text())
        for name, value in fields.items():
            if value is ...:
                del document[name]
            else:
                document[name] = value
        (folder / MANIFEST).write_text(json.dumps(document))

    return harm


def test_opens_and_verifies(bundle: Path) -> None:
    opened = open_bundle(bundle, verify=True)
    assert opened.graph == bundle / "unet" / "model.onnx"
    assert opened.component == "unet"
    assert opened.manifest["files"].keys() == {"unet/model.onnx", "vae/config.json", "dmqexport/quant_plan.json"}
    assert opened.sealed.keys() == {"dmqexport/report.json", "unet/engines/trt-any-11/engine.plan"}
    on_disk = {file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()}
    assert opened.files.keys() == on_disk - {MANIFEST, SEAL}, "the manifest and the seal vouch for each other"


def test_the_same_content_makes_the_same_manifest(bundle: Path) -> None:
    before = (bundle / MANIFEST).read_bytes()
    seal = (bundle / SEAL).read_bytes()
    (bundle / "dmqexport" / "report.json").write_text("another measurement")
    (bundle / "unet/engines/trt-any-11/engine.plan").write_text("another timing of tactics")
    write_manifest(bundle, dict(reversed(FIELDS.items())))
    assert (bundle / MANIFEST).read_bytes() == before
    assert (bundle / SEAL).read_bytes() != seal
    open_bundle(bundle, verify=True)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda b: (b / "unet/model.onnx").write_text("short"), ("unet/model.onnx: 5 bytes, expected 26",)),
        (lambda b: (b / "vae/config.json").unlink(), ("1 file differs", "vae/config.json: missing")),
        (lambda b: (b / MANIFEST).unlink(), ("not a dmqexport bundle", "pass the -o folder")),
        (lambda b: (b / MANIFEST).write_text("{"), ("manifest.json", "cannot be read")),
        (lambda b: (b / MANIFEST).write_bytes(b"\xff\xfe"), ("manifest.json", "cannot be read")),
        (lambda b: (b / MANIFEST).write_text("[]"), ("manifest.json", "not a JSON object")),
        (change(schema_version=99), ("schema 99", "rebuild")),
        (change(bits=...), ("lacks bits",)),
        (change(files=[]), ("files cannot be understood",)),
        (change(files={"a": 1}), ("files cannot be understood",)),
        (change(model={}), ("model cannot be understood",)),
        (change(session={}, target="tpu"), ("session, target cannot be understood",)),
        (change(num_timesteps="20"), ("num_timesteps cannot be understood",)),
        (change(engine={"folder": "../elsewhere"}), ("engine cannot be understood",)),
        (change(engine={"folder": "/etc"}), ("engine cannot be understood",)),
        (change(engine={}), ("engine cannot be understood",)),
        (change(bits="w4a4"), ("manifest.json is not the one that was sealed",)),
        (lambda b: (b / SEAL).unlink(), ("seal.json is missing",)),
        (lambda b: (b / SEAL).write_text("{"), ("seal.json", "cannot be read")),
        (lambda b: (b / SEAL).write_text('{"files": 3}'), ("seal.json: files cannot be understood",)),
        (lambda b: (b / "dmqexport/report.json").write_text("x"), ("dmqexport/report.json: 1 bytes, expected",)),
    ],
)
def test_damage_is_found_without_reading_everything(
    bundle: Path, harm: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    harm(bundle)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    for word in words:
        assert word in str(caught.value)
    assert str(bundle) in str(caught.value)


@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/engines/trt-any-11/engine.plan", "dmqexport/report.json"])
def test_changed_content_of_the_same_size_needs_verify(bundle: Path, name: str) -> None:
    (bundle / name).write_text(f"CONTENT of {name}")
    open_bundle(bundle)
    with pytest.raises(BundleError, match=rf"{name}: content differs \(sha256\)"):
        open_bundle(bundle, verify=True)


def test_added_files_need_verify_and_engines_may_be_added(bundle: Path) -> None:
    """A pickle beside the graph would be loaded by other tools; a GPU host adds engines by design."""
    (bundle / "unet/engines/trt-sm90-11").mkdir()
    (bundle / "unet/engines/trt-sm90-11/engine.plan").write_text("built on a GPU host")
    open_bundle(bundle, verify=True)
    (bundle / "unet/diffusion_pytorch_model.bin").write_text("pickle")
    (bundle / "unet/link").symlink_to("/nowhere")
    open_bundle(bundle)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle, verify=True)
    assert "unet/diffusion_pytorch_model.bin: not part of the build" in str(caught.value)
    assert "unet/link: not part of the build" in str(caught.value)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="not a dmqexport bundle"):
        open_bundle(tmp_path / "file")


def test_a_report_of_another_kind(bundle: Path) -> None:
    for text in ("{}", '{"metrics": 3, "layers": []}', "x"):
        (bundle / "dmqexport" / "report.json").write_text(text)
        with pytest.raises(BundleError, match=r"report\.json"):
            _ = open_bundle(bundle).report


# What a build may replace


def test_replaceable(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (bundle, tmp_path / "empty", tmp_path / "nowhere"):
        assert is_replaceable(path)
        check_replaceable(path)


def test_folders_and_files_of_a_user_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        assert not is_replaceable(path)
        with pytest.raises(RecipeError, match="not a dmqexport bundle; nothing was touched"):
            check_replaceable(path)


def test_bundles_with_a_users_files_are_not_replaced(bundle: Path) -> None:
    (bundle / "unet" / "engines" / "engine.plan").touch()
    with pytest.raises(RecipeError, match=r"did not write: unet/engines/engine\.plan; nothing was touched"):
        check_replaceable(bundle)
    for index in range(9):
        (bundle / f"note{index}").touch()
    with pytest.raises(RecipeError, match="and 5 more"):
        check_replaceable(bundle)


def test_bundles_of_the_first_schema_are_replaced(bundle: Path) -> None:
    """They had no seal, and hashed engines in the manifest."""
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"].update(json.loads((bundle / SEAL).read_text())["files"])
    (bundle / MANIFEST).write_text(json.dumps({**document, "schema_version": 1}))
    (bundle / SEAL).unlink()
    check_replaceable(bundle)


def test_a_bundle_with_a_broken_manifest_is_not_replaced(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(RecipeError, match="nothing was touched"):
        check_replaceable(bundle)
