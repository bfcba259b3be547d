"""Tiny pipelines on disk that several modules read, and the promise that nothing is downloaded."""

from pathlib import Path

import pytest

from tests.models.tiny_pipelines import save_text, save_unconditional


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the network fails the test."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline's folder. Read only."""
    return save_text(tmp_path_factory.mktemp("text") / "tiny-text")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pipeline's folder. Read only."""
    return save_unconditional(tmp_path_factory.mktemp("plain") / "tiny-ddpm")
