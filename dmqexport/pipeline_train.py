"""Training stages between the plan and the graphs: block by block, then the network as a whole."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.block_distill import distill_blocks
from calib.network_distill import distill_network, teacher_outputs
from calib.sampling import CalibrationSet
from calib.trainable import Rates, TrainableModel, TrainOptions, trainable
from dmqexport.errors import RecipeError
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_parts import chunks, make_parts
from dmqexport.pipeline_reallocate import Reallocating
from dmqexport.pipeline_trajectories import TRAINING_SEED
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import WEIGHT_CODES, QuantWeights
from dmqexport.recipe_training import RatesRecipe
from dmqexport.workspace import StageRecord

_WHOLE_TRAJECTORIES = 512  # kept call by call; of more trajectories, as many calls in all
_TARGET_PARTS = 64
_STATE = "state.safetensors"


class Training(Reallocating):
    """Calibration, and what is trained on top of its plan."""

    @property
    def _stride(self) -> int:
        """Of the calls along training trajectories, every so many-th is kept."""
        training = self.recipe.training
        # A sum over steps needs all of them; otherwise more captions are worth more than more calls of each.
        return 1 if training.network.coherence else max(1, training.trajectories // _WHOLE_TRAJECTORIES)

    @property
    def kept_stride(self) -> int | None:
        """As of `Drawing`: trajectories that are drawn for their ends anyway are not drawn twice."""
        return self._stride if self.recipe.keeps_calls else None

    @cached_property
    def training_trajectories(self) -> StageRecord:
        """Float trajectories to train on, `calibration.safetensors`."""
        if self.kept_stride is not None:
            return self.trajectory_ends
        recipe, stride = self.recipe, self._stride
        count = recipe.training.trajectories
        prompts = self.prompts_for(count)
        key = {
            **self.base_key("training-set"),
            "prompts": prompts,
            "size": count,
            "seed": recipe.seed,
            **({"stride": stride} if stride > 1 else {}),
        }

        def build(folder: Path) -> None:
            seed = TRAINING_SEED + recipe.seed * 100_003
            with self.workspace.partial("training-set", key) as scratch:
                parts = self.sampled(scratch, count, prompts, seed, stride, self.workspace.reporter.progress)
                if self.workspace.ranks.rank == 0:
                    data = CalibrationSet.concatenate([CalibrationSet.load(part) for part in parts])
                    data.save(folder / "calibration.safetensors")

        return self.workspace.stage("training-set", key, build, shared=True)

    @cached_property
    def training_targets(self) -> StageRecord:
        """The float model's answers to `training_set`, `targets.safetensors`."""
        key = {"version": STAGE_VERSIONS["targets"], "data": self.training_trajectories.fingerprint}

        def build(folder: Path) -> None:
            ranks, data, batch = self.workspace.ranks, self.training_set, 2 * self.batch_size
            pieces = chunks(-(-len(data) // batch), _TARGET_PARTS)

            def answer(number: int, path: Path) -> None:
                last = min(pieces[number].stop * batch, len(data))
                some = data.at(torch.arange(pieces[number].start * batch, last))
                with self.computing():
                    targets = teacher_outputs(some, self._denoise, batch)
                save_file({"targets": targets}, str(path))

            with self.workspace.partial("targets", key) as scratch:
                name = f"targets-by-{batch}"
                answers = make_parts(ranks, scratch, name, len(pieces), answer, self.workspace.reporter.progress)
                if ranks.rank == 0:
                    targets = torch.cat([load_file(str(part))["targets"] for part in answers])
                    save_file({"targets": targets}, str(folder / "targets.safetensors"))

        return self.workspace.stage("targets", key, build, shared=True)

    @cached_property
    def training_set(self) -> CalibrationSet:
        """The recorded trajectories."""
        return CalibrationSet.load(self.training_trajectories.path / "calibration.safetensors")

    @property
    def refining_set(self) -> CalibrationSet:
        """What second-order rounding fits weights to: calibration's trajectories, or training's, of more captions.

        With measured rows, steps weigh half alike, half by what their errors do to pictures.
        """
        quantization, seed = self.recipe.quantization, self.recipe.seed
        data = self.training_set if quantization.refine_on == "training" else self.calibration_set
        if self._refining_shares is None:
            return data.subset(quantization.refine_entries, seed)
        return data.drawn(quantization.refine_entries, seed, torch.tensor(self._refining_shares))

    @property
    def refining_key(self) -> dict[str, Any]:
        """What the plan then depends on."""
        training = self.recipe.quantization.refine_on == "training"
        shares = self._refining_shares
        return {
            **({"refined_on": self.training_trajectories.fingerprint} if training else {}),
            **({"refined_by": shares} if shares is not None else {}),
        }

    @property
    def _refining_shares(self) -> list[float] | None:
        """How much each step weighs in the fit, sum 1; None: as they come."""
        quantization = self.recipe.quantization
        if quantization.row_bits != "measured" or quantization.rounding != "second-order":
            return None
        shares = self.step_errors.shares
        return [0.5 * share + 0.5 / len(shares) for share in shares]

    @property
    def step_weights(self) -> tuple[Tensor, Tensor]:
        """(how much each call's error counts, what share of the calls is drawn), float32 [calls a trajectory] each."""
        count = int(self.training_set.step.max()) + 1  # multi-step samplers call more than `steps` times
        if self.recipe.training.network.step_weights == "equal":
            return torch.ones(count), torch.full((count,), 1 / count)
        return torch.tensor(self.step_errors.training_weights), torch.tensor(self.step_errors.shares)

    @property
    def trained_plan(self) -> StageRecord:
        """The last stage that made a plan: training's, or calibration's when nothing is trained."""
        training = self.recipe.training
        if training.network.iterations:
            return self.network_trained
        return self.blocks_trained if training.blocks.iterations else self.planned

    @cached_property
    def blocks_trained(self) -> StageRecord:
        """Plan and codes after block-wise distillation."""
        training, blocks = self.recipe.training, self.recipe.training.blocks
        key = {
            "version": STAGE_VERSIONS["blocks"],
            "plan": self.planned.fingerprint,
            "data": self.training_trajectories.fingerprint,
            "options": self.shared_options(),
            "blocks": blocks.model_dump(mode="json"),
            "seed": self.recipe.seed,
        }
        if blocks.weights == "adapter":
            key["rank"] = training.network.rank

        def build(folder: Path) -> None:
            options = self.train_options(blocks.weights, training.network.rank, blocks.rates)
            with self.trainable(self.planned, options) as model, self.workspace.partial("blocks", key) as scratch:
                result = distill_blocks(
                    self.model.denoiser,
                    model,
                    self.training_set.subset(blocks.entries + blocks.held_out, self.recipe.seed),
                    self._answer,
                    iterations=blocks.iterations,
                    batch_size=blocks.batch_size,
                    held_out=blocks.held_out,
                    mix_until=blocks.mix_until,
                    max_ram=training.max_ram_bytes or (self.working_bytes if self.recipe.max_ram else None),
                    scratch=scratch,
                    seed=self.recipe.seed,
                    progress=self.workspace.reporter.progress,
                    units=self.model.family.blocks,
                    ranks=self.workspace.ranks,
                )
                if self.workspace.ranks.rank == 0:
                    save_trained(model, folder)
                    document = [asdict(block) for block in result.blocks]
                    (folder / "blocks.json").write_text(json.dumps(document, indent=1), encoding="utf-8")

        return self.workspace.stage("blocks", key, build, shared=True)

    @cached_property
    def network_trained(self) -> StageRecord:
        """Plan and codes after distillation of the whole denoiser."""
        network = self.recipe.training.network
        before = self.blocks_trained if self.recipe.training.blocks.iterations else self.planned
        answered = self.training_targets
        key = {
            "version": STAGE_VERSIONS["network"],
            "plan": before.fingerprint,
            "data": self.training_trajectories.fingerprint,
            "options": self.shared_options(),
            "network": network.model_dump(mode="json"),
            "step_weights": [values.tolist() for values in self.step_weights],
            "seed": self.recipe.seed,
        }

        def build(folder: Path) -> None:
            weights, shares = self.step_weights
            options = self.train_options(network.weights, network.rank, network.rates)
            targets = load_file(str(answered.path / "targets.safetensors"))["targets"]
            with self.trainable(before, options) as model, self.workspace.partial("network", key) as scratch:
                if self._continues:
                    model.adopt_weights(load_file(str(before.path / _STATE)))
                result = distill_network(
                    model,
                    self.training_set,
                    targets,
                    self._answer,
                    names=self._selected(model, network.layers),
                    guidance=self.guidance,
                    guided_share=network.guided_share,
                    step_weights=weights,
                    step_shares=shares,
                    coherence=network.coherence,
                    guidance_length=network.guidance_length,
                    iterations=network.iterations,
                    batch_size=network.batch_size,
                    seed=self.recipe.seed,
                    checkpoint=scratch / "checkpoint.pt",
                    progress=self.workspace.reporter.progress,
                    ranks=self.workspace.ranks,
                )
                document = {"first_loss": result.first, "last_loss": result.last, "losses": result.losses}
                self.keep_trained(model, folder / "network.json", document)

        return self.workspace.stage("network", key, build, shared=True)

    def keep_trained(self, model: TrainableModel, path: Path, document: Mapping[str, Any]) -> None:
        """Fix every rounding; rank 0 then writes plan, codes and state beside `path`, and `document` there, as JSON."""
        model.harden()
        if self.workspace.ranks.rank == 0:
            save_trained(model, path.parent)
            path.write_text(json.dumps(document), encoding="utf-8")

    @property
    def _continues(self) -> bool:
        """Whether the network's training goes on with what lies behind the blocks' codes: both move the same thing."""
        blocks, network = self.recipe.training.blocks, self.recipe.training.network
        return blocks.iterations > 0 and blocks.weights == network.weights

    def _selected(self, model: TrainableModel, patterns: tuple[str, ...]) -> list[str] | None:
        """Names of the layers that any pattern matches, None for all; RecipeError for a pattern that matches none."""
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in model.layers):
                raise RecipeError(
                    f"training.network.layers: {pattern!r} matches no quantized layer of {self.model.name}",
                    hint=f"layers are named like {', '.join(list(model.layers)[:3])}",
                )
        if "*" in patterns:
            return None
        return [name for name in model.layers if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def trainable(self, record: StageRecord, options: TrainOptions) -> AbstractContextManager[TrainableModel]:
        """The denoiser with the planned layers of a stage's plan made trainable, inside a with block."""
        plan, weights = QuantPlan.load(record.path), QuantWeights(record.path / WEIGHT_CODES)
        return trainable(self.model.denoiser, plan, weights, self.probe_result, options)

    def train_options(
        self, weights: Any, rank: int, rates: RatesRecipe, optimizer: Literal["adam", "muon"] = "adam"
    ) -> TrainOptions:
        """What a stage trains: its own weights and rates, and what all stages share."""
        training = self.recipe.training
        return TrainOptions(
            weights=weights,
            weight_scales=training.weight_scales,
            activations=training.activations,
            biases=training.biases,
            rank=rank,
            optimizer=optimizer,
            rates=Rates(**rates.model_dump()),
        )

    def shared_options(self) -> dict[str, Any]:
        """The recipe's keys that every training stage depends on."""
        return self.recipe.training.model_dump(mode="json", include={"activations", "weight_scales", "biases"})

    def _answer(self, inputs: Any) -> Tensor:
        """The denoiser's output, with a gradient where one is asked for."""
        return self.model.family.call(self.model.denoiser, inputs)


def save_trained(model: TrainableModel, folder: Path) -> None:
    """Plan, codes, and the training state from which a later stage goes on."""
    plan, codes = model.freeze()
    plan.save(folder)
    QuantWeights.save(folder / WEIGHT_CODES, codes)
    save_file({key: value.contiguous() for key, value in model.state().items()}, str(folder / _STATE))
