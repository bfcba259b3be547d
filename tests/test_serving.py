"""A served bundle against the bundle itself: real servers, clients that come together, and servers that go away."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmqexport.bundle import open_bundle
from dmqexport.errors import BackendMissingError, BundleError, DmqExportError, EngineError
from dmqexport.package import Packaged, TritonOptions, write_triton
from dmqexport.runtime import load_denoiser, load_pipeline
from dmqexport.serving import RemoteDenoiser
from engines.ort import OrtRunner
from engines.remote import Patience, Protocol, RemoteRunner
from tests.conftest import Built

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

CLIENT = importlib.util.find_spec("tritonclient") is not None
SERVER = CLIENT and importlib.util.find_spec("mlserver") is not None
needs_client = pytest.mark.skipif(not CLIENT, reason="pip install 'dmqexport[serving]'")
needs_server = pytest.mark.skipif(not SERVER, reason="pip install 'dmqexport[serving,serving-test]'")

ROOT = Path(__file__).resolve().parents[1]
MODEL = "faces"
#: Long enough for a server to start on a busy machine.
START_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """One server process with a packaged model; the same ports after a restart."""

    def __init__(self, package: Packaged, folder: Path) -> None:
        self.package = package
        self.log = folder / "batches"
        self.output = folder / "output"
        self.ports = {"http": free_port(), "grpc": free_port()}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        script = Path(__file__).with_name("serving_process.py")
        arguments = [self.package.model, MODEL, self.ports["http"], self.ports["grpc"], self.log]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                cwd=self.output.parent,  # where the server looks for settings
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
            )

    def wait(self) -> None:
        """Until the model answers that it is ready."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, self.output.read_text()
            try:
                with urllib.request.urlopen(f"http://{self.url('http')}/v2/models/{MODEL}/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.output.read_text())

    def kill(self) -> None:
        """As a lost machine would: nothing is finished, nobody is told."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def url(self, protocol: str) -> str:
        return f"127.0.0.1:{self.ports[protocol]}"

    def remote(self, protocol: str, **options: Any) -> RemoteDenoiser:
        return RemoteDenoiser(self.url(protocol), MODEL, self.package.folder, protocol, **options)

    def batches(self) -> list[list[int]]:
        """The timesteps of every batch so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def package(text_bundle: Built, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    repository = tmp_path_factory.mktemp("repository")
    return write_triton(open_bundle(text_bundle.path), repository, TritonOptions(MODEL))


@pytest.fixture(scope="module")
def served(package: Packaged, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(package, tmp_path_factory.mktemp("server"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 16, 16, generator=generator),
    }


@needs_server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_predicts_what_the_bundle_predicts(text_bundle: Built, served: Served, protocol: str) -> None:
    remote, local = served.remote(protocol), load_denoiser(text_bundle.path, threads=1)
    for batch in (1, 3):
        given = inputs(batch)
        assert torch.equal(remote(**given).sample, local(**given).sample)
    sample, text = given["sample"], given["encoder_hidden_states"]
    assert torch.equal(remote(sample, 501, text, return_dict=False)[0], local(sample, 501, text).sample)
    assert remote(sample.half(), 501, text.half()).sample.dtype == torch.float16
    assert remote.config.in_channels == 4
    with pytest.raises(BundleError, match="timestep 1000 outside 0 to 999"):
        remote(sample, 1000, text)


@needs_server
def test_pictures_of_clients_that_share_batches_are_those_of_each_alone(text_bundle: Built, served: Served) -> None:
    """Every client is at a step of its own, so that the server's batches mix timesteps."""
    drawn = [("a", 3), ("b", 4), ("a b", 5), ("b a", 6), ("a", 7), ("b", 8)]

    def draw(index: int, pipeline: Any) -> np.ndarray[Any, Any]:
        prompt, steps = drawn[index]
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(index)
        images = pipeline([prompt], num_inference_steps=steps, output_type="np", generator=generator).images
        return np.asarray(images)

    pipelines = []
    for index in range(len(drawn)):
        pipeline = load_pipeline(text_bundle.path, threads=1)
        expected = draw(index, pipeline)
        pipeline.unet = served.remote(("http", "grpc")[index % 2])
        pipelines.append((pipeline, expected))
    before = len(served.batches())
    together = threading.Barrier(len(drawn))

    def draw_with_the_others(index: int) -> np.ndarray[Any, Any]:
        together.wait()
        return draw(index, pipelines[index][0])

    with ThreadPoolExecutor(len(drawn)) as pool:
        images = list(pool.map(draw_with_the_others, range(len(drawn))))
    mixed = [batch for batch in served.batches()[before:] if len(set(batch)) > 1]
    assert mixed, "no batch held requests of different timesteps: this test has not tested anything"
    for image, (_, expected) in zip(images, pipelines, strict=True):
        np.testing.assert_allclose(image, expected, rtol=0, atol=1e-5)


@needs_server
def test_a_thousand_requests_survive_a_worker_that_is_killed(package: Packaged, tmp_path: Path) -> None:
    count, clients, kill_after = 1000, 16, 300
    given = {name: value.numpy() for name, value in inputs(count).items()}
    alone = OrtRunner(package.model, threads=1)
    server = Served(package, tmp_path)
    server.start()
    answers: dict[int, np.ndarray[Any, Any]] = {}
    lock, reached = threading.Lock(), threading.Event()
    try:
        server.wait()
        runners = {
            protocol: RemoteRunner(
                server.url(protocol), MODEL, Protocol(protocol), patience=Patience(START_S, reconnect_s=START_S)
            )
            for protocol in ("http", "grpc")
        }

        def ask(index: int) -> None:
            runner = runners[("http", "grpc")[index % 2]]
            answer = runner.run({name: value[index : index + 1] for name, value in given.items()})["out_sample"]
            with lock:
                assert index not in answers
                answers[index] = answer
                if len(answers) >= kill_after:
                    reached.set()

        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(ask, index) for index in range(count)]
            assert reached.wait(START_S)
            server.kill()
            with lock:
                assert kill_after <= len(answers) < count, "the server was killed after its work was done"
            server.start()
            for request in asked:
                request.result()
    finally:
        server.kill()
    assert sorted(answers) == list(range(count)), "nothing lost"
    assert any(len(set(batch)) > 1 for batch in server.batches())
    for index in range(0, count, 50):  # batches of another size round sums otherwise, no further
        expected = alone.run({name: value[index : index + 50] for name, value in given.items()})["out_sample"]
        got = np.concatenate([answers[index + offset] for offset in range(50)])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@needs_server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_the_server_does_not_know(served: Served, protocol: str) -> None:
    with pytest.raises(EngineError, match=r"the server refused: .*nobody") as caught:
        RemoteDenoiser(served.url(protocol), "nobody", served.package.folder, protocol)
    assert "is this the model's name" in str(caught.value)
    runner = served.remote(protocol).runner
    with pytest.raises(EngineError, match=r"inputs \['timestep', 'encoder_hidden_states'\] missing"):
        runner.run({"sample": np.zeros((1, 4, 8, 8), np.float32)})
    wrong = {name: value.numpy() for name, value in inputs(2).items()}
    with pytest.raises(EngineError, match="input sample is float64, the server takes FP32"):
        runner.run(wrong | {"sample": wrong["sample"].astype(np.float64)})
    with pytest.raises(EngineError, match="the server refused"):
        runner.run(wrong | {"sample": wrong["sample"][:, :2]})
    assert served.remote(protocol)(**inputs(1)).sample.shape == (1, 4, 8, 8), "the server lives on"


@needs_client
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_is_not_there_is_given_up(package: Packaged, protocol: str) -> None:
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"no connection for 0\.5 s") as caught:
        RemoteDenoiser(f"127.0.0.1:{free_port()}", MODEL, package.folder, protocol, reconnect_s=0.5)
    assert f"does this port speak {protocol}?" in str(caught.value)
    assert time.monotonic() - start < 30


@needs_client
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_does_not_answer_is_given_up(package: Packaged, protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"no answer within 0\.5 s|no connection for"):
            RemoteDenoiser(url, MODEL, package.folder, protocol, timeout_s=0.5, reconnect_s=0.5)


def test_descriptions_that_describe_nothing(package: Packaged, tmp_path: Path) -> None:
    def refused(path: Path, words: str, url: str = "localhost:1", protocol: str = "http") -> None:
        with pytest.raises(DmqExportError) as caught:
            RemoteDenoiser(url, MODEL, path, protocol, reconnect_s=0.1)
        assert words in str(caught.value)

    refused(tmp_path, "there is no denoiser.json")
    refused(tmp_path / "nowhere", "there is no denoiser.json")
    file = tmp_path / "denoiser.json"
    file.write_text("{")
    refused(tmp_path, "cannot be read")
    file.write_text('{"schema_version": 99}')
    refused(file, "schema 99")
    file.write_text('{"schema_version": 1, "family": "UNet2DModel"}')
    refused(file, "lacks config, num_timesteps, latent_size")
    refused(package.folder, "known: http, grpc", protocol="carrier pigeon")
    refused(package.folder, "host:port is enough", url="http://localhost:1")


@needs_client
def test_a_runner_waits_for_some_time() -> None:
    with pytest.raises(EngineError, match="a timeout is above 0 s"):
        Patience(timeout_s=0)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_without_the_client_library(package: Packaged, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}", None)
    with pytest.raises(BackendMissingError, match="tritonclient is not installed") as caught:
        RemoteDenoiser("localhost:1", MODEL, package.folder, protocol)
    assert "dmqexport[serving]" in str(caught.value)


@needs_server
def test_a_description_of_another_model_is_refused(plain_bundle: Built, served: Served) -> None:
    with pytest.raises(BundleError, match="name the model that was packaged with this description"):
        RemoteDenoiser(served.url("http"), MODEL, plain_bundle.path)
