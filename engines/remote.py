"""A graph behind an inference server that speaks the KServe v2 protocol (Triton, MLServer, ...), over HTTP or gRPC.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol, the Open Inference Protocol.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from dmqexport.errors import BackendMissingError, EngineError
from engines.runner import Arrays

Result = TypeVar("Result")

#: What gateways answer, and gRPC, while the worker behind them is away.
_AWAY = frozenset({"502", "503", "StatusCode.UNAVAILABLE"})
_LATE = frozenset({"499", "StatusCode.DEADLINE_EXCEEDED"})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
#: gRPC limits messages to 4 MB, and waits up to two minutes before it tries a lost server again.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Protocol(StrEnum):
    """How requests travel."""

    HTTP = "http"
    GRPC = "grpc"


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds.

    timeout_s: for one answer; reconnect_s: for a server that went away to come back, over all attempts of one request.
    A prediction has no side effects, so a request whose answer was lost is simply sent again.
    """

    timeout_s: float = 60.0
    reconnect_s: float = 30.0

    def __post_init__(self) -> None:
        """Raise EngineError unless there is some time to wait."""
        if not (self.timeout_s > 0 and self.reconnect_s >= 0):
            raise EngineError(f"a timeout is above 0 s and a wait for reconnection 0 or more, got {self}")


class RemoteRunner:
    """A served graph. Inputs and outputs are numpy arrays by name; may be called from several threads at once."""

    def __init__(
        self, url: str, model: str, protocol: Protocol, *, version: str = "", patience: Patience | None = None
    ) -> None:
        """Ask the server at `url` (host:port) about `model`; version "": the one that the server chooses.

        Raises BackendMissingError without tritonclient, EngineError when the server or the model is not there.
        """
        self.url, self.model, self.version, self.protocol = url, model, version, protocol
        self.patience = patience or Patience()
        if "://" in url:
            raise EngineError(f"server address {url!r}: host:port is enough", hint="e.g. localhost:8000")
        self._vendor = _vendor(protocol)
        self._clients = threading.local()  # the HTTP client must not be shared by threads
        metadata = self._persist(lambda client: client.get_model_metadata(model, version, **self._limit()))
        inputs, outputs = _signature(metadata)
        self._inputs = inputs
        self._binary = protocol is Protocol.GRPC or self._takes_binary()
        self.input_names: tuple[str, ...] = tuple(inputs)
        self.output_names: tuple[str, ...] = tuple(outputs)

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Send one request and wait; returns `outputs` (default: all) by name.

        Raises EngineError when inputs are missing, when the server refuses, is late, or stays away.
        """
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise EngineError(f"{self.model} on {self.url}: inputs {missing} missing, got {sorted(inputs)}")
        names = list(outputs) if outputs is not None else list(self.output_names)
        sent = [self._input(name, inputs[name]) for name in self.input_names]
        asked = [self._vendor.InferRequestedOutput(name, **self._form()) for name in names]
        answer = self._persist(
            lambda client: client.infer(self.model, sent, model_version=self.version, outputs=asked, **self._limit())
        )
        values = {name: answer.as_numpy(name) for name in names}
        absent = [name for name, value in values.items() if value is None]
        if absent:
            raise EngineError(f"{self.model} on {self.url} answered without {absent}")
        return {name: np.require(value, requirements="W") for name, value in values.items()}  # gRPC's are views

    def _takes_binary(self) -> bool:
        """Whether the server knows tensors as bytes over HTTP; JSON, which is always there, keeps float32 exactly."""
        return "binary_tensor_data" in self._persist(lambda client: client.get_server_metadata()).get("extensions", ())

    def _limit(self) -> dict[str, float]:
        """How long a call may take: gRPC is told with each one, an HTTP client once (see `_client`)."""
        return {"client_timeout": self.patience.timeout_s} if self.protocol is Protocol.GRPC else {}

    def _form(self) -> dict[str, bool]:
        return {"binary_data": self._binary} if self.protocol is Protocol.HTTP else {}

    def _input(self, name: str, value: np.ndarray[Any, Any]) -> Any:
        datatype, rank = self._inputs[name]
        if value.ndim == rank - 1:
            value = value[..., None]  # the protocol has no tensor without a dimension beside the batch
        tensor = self._vendor.InferInput(name, value.shape, datatype)
        try:
            tensor.set_data_from_numpy(value, **self._form())
        except Exception as error:  # the vendor's own, which says which type it expected
            raise EngineError(
                f"{self.model} on {self.url}: input {name} is {value.dtype}, the server takes {datatype}: {error}",
                hint="serve the bundle that this client's description came from",
            ) from error
        return tensor

    def _persist(self, call: Callable[[Any], Result]) -> Result:
        """`call` with this thread's client, again after losses of connection, until patience ends."""
        end = time.monotonic() + self.patience.reconnect_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return call(self._client())
            except Exception as error:  # sockets, the HTTP parser and the vendor each raise their own
                status = _status(error)
                self._forget()  # what is left of an answer must not be read as the next one's
                if isinstance(error, TimeoutError) or status in _LATE:
                    raise EngineError(
                        f"{self.model} on {self.url}: no answer within {self.patience.timeout_s:g} s",
                        hint="give the server more time, or more instances",
                    ) from error
                if status is not None and status not in _AWAY:
                    raise EngineError(
                        f"{self.model} on {self.url}: the server refused: {_message(error)}",
                        hint="is this the model's name, is it loaded, and was it packaged from the same bundle?",
                    ) from error
                if status is None and not _lost(error):
                    raise
                if time.monotonic() + pause > end:
                    raise EngineError(
                        f"{self.url}: no connection for {self.patience.reconnect_s:g} s: {_message(error)}",
                        hint="is the server running, and does this port speak " + self.protocol.value + "?",
                    ) from error
            # Of many clients that lost the same server, not all come back at once.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _client(self) -> Any:
        if not hasattr(self._clients, "client"):
            options: dict[str, Any] = {"channel_args": _CHANNEL}
            if self.protocol is Protocol.HTTP:
                options = {
                    "network_timeout": self.patience.timeout_s,
                    "connection_timeout": min(self.patience.timeout_s, max(self.patience.reconnect_s, 1.0)),
                }
            self._clients.client = self._vendor.InferenceServerClient(self.url, **options)
        return self._clients.client

    def _forget(self) -> None:
        client = self._clients.__dict__.pop("client", None)
        if client is not None:
            client.close()


def _vendor(protocol: Protocol) -> Any:
    try:
        if protocol is Protocol.HTTP:
            import tritonclient.http as http

            return http
        import tritonclient.grpc as grpc
    except ImportError as error:
        raise BackendMissingError(
            f"tritonclient is not installed for {protocol.value}: {error}", hint="pip install 'dmqexport[serving]'"
        ) from error
    return grpc


def _signature(metadata: Any) -> tuple[dict[str, tuple[str, int]], tuple[str, ...]]:
    """input → (datatype, rank), and the outputs' names; HTTP answers with a dictionary, gRPC with a message."""
    if isinstance(metadata, dict):
        inputs = {item["name"]: (item["datatype"], len(item["shape"])) for item in metadata["inputs"]}
        return inputs, tuple(item["name"] for item in metadata["outputs"])
    inputs = {item.name: (item.datatype, len(item.shape)) for item in metadata.inputs}
    return inputs, tuple(item.name for item in metadata.outputs)


def _status(error: Exception) -> str | None:
    """The server's status, None for errors that are not its answer."""
    status = getattr(error, "status", None)
    value = status() if callable(status) else None
    return None if value is None else str(value)


def _message(error: Exception) -> str:
    message = getattr(error, "message", None)
    return str(message() if callable(message) else error) or type(error).__name__


def _lost(error: Exception) -> bool:
    """Whether the connection was refused, cut, or closed in the middle of an answer."""
    return isinstance(error, OSError) or type(error).__module__.startswith("geventhttpclient")
