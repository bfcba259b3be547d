"""A server that takes a connection and never answers must not keep its client waiting, whatever was asked."""

import importlib.util
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from dmqexport.errors import EngineError
from engines.remote import Patience, Protocol, RemoteRunner

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None, reason="pip install 'dmqexport[serving]'"
)
#: An empty SETTINGS frame, the server's half of HTTP/2's handshake (RFC 9113, section 3.4): gRPC is then connected.
_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def silent_server(greeting: bytes) -> Iterator[str]:
    """host:port of a server that greets, reads all it is sent, and answers nothing."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=swallow, args=(connection,), daemon=True).start()

    def swallow(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.sendall(greeting)
            while connection.recv(4096):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@needs_client
@pytest.mark.parametrize(
    ("protocol", "greeting"),
    [
        pytest.param(Protocol.GRPC, _SETTINGS, id="gRPC, connected"),
        pytest.param(Protocol.HTTP, b"", id="HTTP"),
    ],
)
def test_metadata_that_never_comes_is_given_up(protocol: Protocol, greeting: bytes) -> None:
    started = time.monotonic()
    with silent_server(greeting) as url, pytest.raises(EngineError, match=r"no answer within 0\.5 s"):
        RemoteRunner(url, "unet", protocol, patience=Patience(timeout_s=0.5, reconnect_s=30.0))
    assert time.monotonic() - started < 10
