"""Fixtures that several test modules share: tiny pipelines, and bundles built from them once a session."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command_line import Answer, build
from tests.models.tiny_pipelines import save_text, save_unconditional


@dataclass(frozen=True)
class Built:
    """A finished bundle, the model it came from, and the work folder that later builds may reuse."""

    model: Path
    path: Path
    work: Path
    answer: Answer


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline."""
    return save_text(tmp_path_factory.mktemp("models") / "tiny-text")


@pytest.fixture(scope="session")
def tiny_plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pipeline with 20 training timesteps."""
    return save_unconditional(tmp_path_factory.mktemp("models") / "tiny-plain")


@pytest.fixture(scope="session")
def text_bundle(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """w4a4 for ONNX Runtime on CPU. Read only: copy it before changing anything."""
    return _built(tiny_text, tmp_path_factory.mktemp("text"), "w4a4")


@pytest.fixture(scope="session")
def plain_bundle(tiny_plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """w8a8 for ONNX Runtime on CPU. Read only."""
    return _built(tiny_plain, tmp_path_factory.mktemp("plain"), "w8a8")


def _built(model: Path, folder: Path, bits: str) -> Built:
    output, work = folder / f"bundle-{bits}", folder / "work"
    answer = build(model, output, work, "--bits", bits)
    assert answer.code == 0, answer.err
    return Built(model, output, work, answer)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Two cores run the whole suite; a tiny model gains nothing from more threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
