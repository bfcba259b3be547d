"""A server of the KServe v2 protocol, for the tests of serving: MLServer with one graph in ONNX Runtime behind it.

    python serving_process.py GRAPH NAME HTTP_PORT GRPC_PORT LOG

The signature is the one that Triton shows: what has no dimension beside the batch travels as [batch, 1].
Requests that wait together are merged; the timesteps of every batch that ran go to LOG, one JSON list a line.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor

from engines.ort import OrtRunner

MAX_BATCH = 8
DATATYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}


class Denoiser(MLModel):
    """One graph, run in a thread so that the server answers meanwhile."""

    async def load(self) -> bool:
        self.runner = OrtRunner(Path(str(self.settings.parameters.uri)), threads=1)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given: dict[str, np.ndarray[Any, Any]] = {
            item.name: NumpyCodec.decode_input(item).reshape(item.shape) for item in payload.inputs
        }
        ranks = {item.name: len(item.shape) for item in self.runner.session.get_inputs()}
        given = {name: value.reshape(-1) if ranks[name] == 1 else value for name, value in given.items()}
        values = await asyncio.to_thread(self.runner.run, given)
        with LOG.open("a") as log:
            log.write(json.dumps(given["timestep"].tolist()) + "\n")
        outputs = [NumpyCodec.encode_output(name, value) for name, value in values.items()]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def signature(items: list[Any]) -> list[MetadataTensor]:
    """Shapes with -1 for what varies."""
    return [
        MetadataTensor(
            name=item.name,
            datatype=DATATYPES[item.type],
            shape=[-1, *[size if isinstance(size, int) else -1 for size in item.shape[1:] or [1]]],
        )
        for item in items
    ]


async def serve(graph: str, name: str, http_port: int, grpc_port: int) -> None:
    session = OrtRunner(Path(graph), threads=1).session
    settings = Settings(
        host="127.0.0.1", http_port=http_port, grpc_port=grpc_port, metrics_endpoint=None, parallel_workers=0
    )
    model = ModelSettings(
        name=name,
        implementation=Denoiser,
        max_batch_size=MAX_BATCH,
        max_batch_time=0.01,
        parameters=ModelParameters(uri=graph),
        inputs=signature(session.get_inputs()),
        outputs=signature(session.get_outputs()),
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    LOG = Path(sys.argv[5])
    asyncio.run(serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
