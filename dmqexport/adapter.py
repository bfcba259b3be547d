"""Any denoiser: what a factory named with `-m package.module:factory` returns.

    def factory() -> Adapter:
        denoiser = MyDenoiser()
        denoiser.load_state_dict(safetensors.torch.load_file("mine.safetensors"))
        return Adapter(
            module=denoiser,
            inputs={"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor([0, 999])},
            scheduler=DDIMScheduler(num_train_timesteps=1000),
            boundary=("stem", "head", "time.*"),
        )

The module's forward takes the inputs by name and returns the prediction as one tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


class Denoise(Protocol):
    """Calls the denoiser, float or quantized, with its inputs by name; returns the prediction."""

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The prediction, of the sample's shape."""
        ...


Sampler = Callable[[Denoise, Sequence[int], int, float], Tensor]
"""(denoise, seeds, steps, guidance) → samples [len(seeds), ...]; calls `denoise` with whole batches, step by step."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A denoiser in PyTorch and what calibration must know of it.

    module: float32; forward(**inputs) → tensor. inputs: named example inputs in the order of forward, [batch, ...] with
    a batch of at least 2; the first is the sample; one is called `timestep`, [batch], int64 or float32.
    dynamic_axes: input → axis → name, of axes beside the batch that may vary at run time.
    boundary: shell globs of the first and last layers and those of the time embedding, which keep 8 bits.
    num_timesteps, timestep_scale: the timestep table has one key for each of round(timestep · timestep_scale) in
    [0, num_timesteps); for time from 0 to 1 in a thousand parts these are 1001 and 1000.

    scheduler: a diffusers scheduler that drives the usual loop; or sample: a sampler of your own (`Sampler`).
    conditions: seeds → the inputs beside sample and timestep, [len(seeds), ...]; left out, seeded unit-normal vectors
    stand in for them. null_conditions: the same for the unguided half of classifier-free guidance.
    decode: samples [n, ...] → pictures [n, C, H, W] in [0, 1]; left out, the sample is shown.
    blocks: modules that are distilled as one unit, in any order; left out, they are found by their class names.
    first_layers: shell globs of those layers of `boundary` that read the sample; they see it in 16 bits, by two int8
    products (the recipe's quantization.remainder).
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    boundary: tuple[str, ...]
    scheduler: Any = None
    sample: Sampler | None = None
    conditions: Callable[[Sequence[int]], Mapping[str, Tensor]] | None = None
    null_conditions: Callable[[Sequence[int]], Mapping[str, Tensor]] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    num_timesteps: int = 1000
    timestep_scale: float = 1.0
    steps: int = 50
    guidance: float = 1.0
    blocks: tuple[str, ...] = ()
    first_layers: tuple[str, ...] = ()
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
