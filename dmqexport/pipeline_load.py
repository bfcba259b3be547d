"""The start of a build: the float model, what it costs, how it is sampled, and the prompts it is sampled with."""

import logging
import time
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from calib.rotation import rotate_feed_forward, rotated_layers
from dmqexport.bundle import is_replaceable
from dmqexport.errors import ModelError, RecipeError
from dmqexport.models.device import DTYPES, find_device, on_device
from dmqexport.models.footprint import Footprint, measure_footprint
from dmqexport.models.loading import LoadedModel, load_model
from dmqexport.pipeline_checks import check_recipe
from dmqexport.pipeline_limits import working_bytes
from dmqexport.pipeline_size import batch_within
from dmqexport.recipe import Recipe, without_measurements
from dmqexport.target import PROFILES
from dmqexport.workspace import Workspace

logger = logging.getLogger(__name__)


class Loading:
    """From a recipe to its float model."""

    def __init__(self, recipe: Recipe, output: Path, workspace: Workspace) -> None:
        """Raises RecipeError when `output` holds something that is not a bundle, and for choices that contradict."""
        if not is_replaceable(output):
            raise RecipeError(
                f"{output} exists and is not a dmqexport bundle; nothing was touched",
                hint="choose another -o/--output, or remove the folder yourself",
            )
        self.recipe = without_measurements(recipe)
        self.output = output
        self.workspace = workspace
        workspace.memory_limit = self.recipe.max_ram_bytes

    @property
    def profile(self) -> Any:
        """The target's profile."""
        return PROFILES[self.recipe.target]

    # load

    @cached_property
    def model(self) -> LoadedModel:
        """The float model."""
        _ = self.device
        _ = self.working_bytes  # refused before anything is loaded, rather than hours into it
        reporter, start = self.workspace.reporter, time.perf_counter()
        reporter.started("load")
        sampling = self.recipe.sampling
        loaded = load_model(
            self.recipe.model,
            scheduler=sampling.scheduler,
            revision=self.recipe.revision,
            variant=self.recipe.variant,
            embeddings=self.recipe.calibration.embeddings,
            weights=self.recipe.weights,
            size=sampling.latent_size,
            loras=self.recipe.lora,
            absent=self.recipe.drawn and self.recipe.weights == "random",
        )
        check_recipe(self.recipe, loaded)
        if self.recipe.rotates:
            rotate_feed_forward(loaded.denoiser)
            if self.recipe.quantization.rotation != "auto" and not rotated_layers(loaded.denoiser):
                raise RecipeError(
                    f"quantization.rotation: no feed-forward of {loaded.name} is built as diffusers' are",
                    hint="leave it at auto or none",
                )
        loaded.denoiser.register_forward_hook(self._count)
        reporter.finished("load", time.perf_counter() - start, False)
        return loaded

    @property
    def rotation_key(self) -> dict[str, Any]:
        """What the model's weights and inner tensors depend on beside its fingerprint."""
        rotated = rotated_layers(self.model.denoiser)
        return {"rotated": rotated} if rotated else {}

    def _count(self, module: object, args: object, output: Any) -> None:
        """Every stage says how many samples the float model answered in it."""
        answer = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if not torch.compiler.is_compiling() and not answer.is_meta:  # not while it is exported or only counted
            self.workspace.forwards += len(answer)

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """What the bundle says of the denoiser."""
        return self.model.denoiser_config

    @cached_property
    def footprint(self) -> Footprint | None:
        """What a forward costs; None for a module of the user's own that cannot be counted."""
        try:
            return measure_footprint(self.model.denoiser, self.model.family, self.model.tokens)
        except ModelError as error:
            logger.info("%s", error)
            return None

    @property
    def batch_size(self) -> int:
        """Samples that calibration runs at once: what the recipe says, or fewer where that would not fit."""
        return batch_within(self.recipe.calibration.batch_size, self.footprint, self.working_bytes)

    @cached_property
    def device(self) -> torch.device:
        """Where the float model runs; raises BackendMissingError when it is not here."""
        return find_device(self.recipe.calibration.device)

    def computing(self, *, reduced: bool = False) -> AbstractContextManager[None]:
        """The float model on its device inside the block, and on the CPU again after it.

        reduced: in the precision that the recipe allows for trajectories; otherwise in float32.
        """
        dtype = DTYPES[self.recipe.calibration.dtype] if reduced else torch.float32
        return on_device(self.model.denoiser, self.model.pipeline, self.device, dtype)

    @cached_property
    def working_bytes(self) -> int:
        """Memory for activations and moments, beside the weights.

        Raises ResourceError when --max-ram or --max-disk cannot be kept to, or a large model does not fit this machine.
        """
        return working_bytes(self.recipe, self.workspace.root)

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return self.recipe.sampling.steps or self.model.default_steps

    @property
    def guidance(self) -> float:
        """Guidance scale."""
        chosen = self.recipe.sampling.guidance
        return self.model.default_guidance if chosen is None else chosen

    @cached_property
    def calibration_prompts(self) -> tuple[str, ...]:
        """One prompt a calibration trajectory (repeated when there are fewer); empty for unconditional models."""
        return self.prompts_for(self.recipe.calibration.size)

    def prompts_for(self, count: int) -> tuple[str, ...]:
        """`count` prompts of calibration's, repeated when there are fewer; empty for unconditional models."""
        path = self.recipe.calibration.prompts
        # The last ones of the model's own are for evaluation.
        own = self.model.default_prompts
        kept = len(own) - (self.recipe.validation.images or 16)
        prompts = own[:kept] if kept >= len(own) // 2 else own
        if path is not None:
            try:
                lines = Path(path).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"calibration prompts {path} cannot be read: {error}") from error
            prompts = tuple(line.strip() for line in lines if line.strip())
            if not prompts:
                raise RecipeError(f"calibration prompts {path}: no line with text")
        return tuple(prompts[index % len(prompts)] for index in range(count)) if prompts else ()
