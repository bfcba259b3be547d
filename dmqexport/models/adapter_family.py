"""The family of a denoiser that its user adapted: everything it must say is in the bundle's config.json."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.family import ADAPTER, Config, DiffusersFamily
from dmqexport.models.shapes import ExampleInputs


class AdapterFamily(DiffusersFamily):
    """A module whose forward takes its inputs by name and returns one tensor. Made from `adapter_config`."""

    class_name = ADAPTER
    component = "denoiser"
    returns_tensor = True

    def __init__(self, config: Config, size: tuple[int, int] | None = None) -> None:
        """Raises ModelError for a chosen size: the example inputs have one."""
        if size is not None:
            raise ModelError("an adapter's example inputs give its sizes; sampling.latent_size does not change them")
        self._inputs: dict[str, Mapping[str, Any]] = {item["name"]: item for item in config["inputs"]}
        self.input_names: tuple[str, ...] = tuple(self._inputs)
        self.positional: tuple[str, ...] = self.input_names
        self.boundary: tuple[str, ...] = tuple(config["boundary"])
        self.blocks = tuple(config.get("blocks", ()))
        self.first_layers = tuple(config.get("first_layers", ()))
        self.dynamic_axes = {
            name: {int(axis): str(label) for axis, label in axes.items()}
            for name, axes in config.get("dynamic_axes", {}).items()
        }
        self.float_timestep = self._inputs["timestep"]["dtype"] == "float32"
        self.timestep_scale = float(config["timestep_scale"])
        self._num_timesteps = int(config["num_timesteps"])
        self.embeddings = tuple(
            name
            for name, item in self._inputs.items()
            if name not in (self.input_names[0], "timestep") and item["dtype"] == "float32"
        )

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """The example inputs' shapes and types, seeded: unit normal, timesteps of the table, other integers 0."""
        draw, inputs = ExampleInputs(batch), {}
        for name, item in self._inputs.items():
            if name == "timestep":
                keys = draw.integers(self._num_timesteps)
                inputs[name] = keys.float() / self.timestep_scale if self.float_timestep else keys
            elif item["dtype"] == "int64":
                inputs[name] = torch.zeros((batch, *item["shape"]), dtype=torch.int64)
            else:
                inputs[name] = draw.normal(*item["shape"])
        return inputs

    def is_index(self, name: str) -> bool:
        """Whether the example input is int64."""
        return bool(self._inputs[name]["dtype"] == "int64")

    def call(self, denoiser: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """By name."""
        output: Tensor = denoiser(**inputs)
        return output

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The module itself."""
        return denoiser
