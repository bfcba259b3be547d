"""Builds whose statistics are drawn: what calibration gets by running the float model, from its shapes and a seed."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from calib.drawn import draw_statistics, probe_shapes
from calib.observer import save_statistics
from calib.probe import ProbeResult
from calib.sampling import TIMESTEP
from calib.timestep_table import PER_STEP, equal_groups, per_step
from dmqexport.errors import ModelError
from dmqexport.pipeline_load import Loading
from dmqexport.workspace import StageRecord

#: What everybody is told who looks at such a bundle.
DRAWN_WARNING = (
    "STATISTICS WERE DRAWN AT RANDOM, NOT MEASURED: this bundle proves size and structure only; its pictures are noise "
    "and it must not be deployed"
)
_VERSION = 1


class Drawing(Loading):
    """The float model, and what stands in for running it where the recipe says `statistics: drawn`."""

    @cached_property
    def drawn_probe(self) -> ProbeResult:
        """What can be quantized, from shapes alone. Raises ModelError for a module whose forward needs values."""
        model = self.model
        inputs = {name: value.to("meta") for name, value in model.example_inputs(2).items()}
        state = {**dict(model.denoiser.named_parameters()), **dict(model.denoiser.named_buffers())}
        shadow = {name: value.detach().to("meta") for name, value in state.items()}

        def forward(**arguments: Any) -> Any:
            return functional_call(model.denoiser, shadow, (), arguments, tie_weights=False, strict=False)

        varying = [inputs[model.family.input_names[0]], inputs[TIMESTEP]]
        try:
            return probe_shapes(model.denoiser, lambda: model.family.call(forward, inputs), varying)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ModelError(
                f"the forward of {model.name} cannot be followed by shapes alone: {error}",
                hint="leave --random-statistics out: a model whose forward depends on values must be run",
            ) from error

    @cached_property
    def drawn_row_map(self) -> np.ndarray[Any, Any]:
        """int64 [training timesteps], timestep value → row, as if sampling used evenly spaced timesteps."""
        calibration, total = self.recipe.calibration, self.model.num_timesteps
        if calibration.row_assignment == PER_STEP:
            return per_step(total, np.linspace(0, total - 1, self.steps).round().astype(np.int64))
        return equal_groups(total, calibration.rows)

    def drawn_statistics(self, found: ProbeResult) -> StageRecord:
        """Statistics of every tensor of `found`, drawn: `statistics.safetensors`."""
        recipe = self.recipe
        attention = recipe.quantization.attention_bits is not None
        key = {
            "version": _VERSION,
            "statistics": "drawn",
            "model": self.model.fingerprint,
            **self.rotation_key,
            "rows": self.drawn_row_map.tolist(),
            "attention": attention,
            "split_concat": recipe.quantization.split_concat,
            "seed": recipe.seed,
            "torch": torch.__version__,
        }

        def build(folder: Path) -> None:
            rows = int(self.drawn_row_map.max()) + 1
            drawn = draw_statistics(found, rows, recipe.seed, attention=attention)
            save_statistics(folder / "statistics.safetensors", drawn)

        return self.workspace.stage("statistics", key, build)
