"""Judge the deployed graph against the float graph: layer by layer, timestep by timestep, picture by picture."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from calib.sampling import TIMESTEP, CalibrationSet
from dmqexport.models import emoji
from dmqexport.models.picture_features import DIMENSION, EXTRACTOR, picture_features
from dmqexport.models.sampling import sample_images, set_denoiser
from dmqexport.pipeline import Build
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_size import ValidationSize, validation_size
from dmqexport.report.document import CAP_DB
from dmqexport.report.frechet import enough_pictures, fit_gaussian, frechet_distance
from dmqexport.report.retrieval import retrieval_accuracy
from dmqexport.runtime import QuantizedDenoiser
from dmqexport.target import Target
from dmqexport.workspace import StageRecord
from engines.bench import interleaved
from engines.openvino_ir import OpenVinoRunner, open_ir
from engines.ort import Optimization, OrtRunner, available_cores
from engines.runner import Runner
from passes.tap import TapOutputs, layer_outputs

Array = np.ndarray[Any, Any]
_EMOJI = "emoji"
#: In the folder of `Validation.measured`, for targets whose engine another machine runs.
KEPT_ANSWERS = "answers.npz"
_KEPT_SAMPLES = 16


@dataclass(frozen=True)
class Evaluation:
    """What the float model does on the evaluation prompts: pictures uint8 [n, H, W, 3] and trajectory points."""

    prompts: list[str]
    seeds: list[int]
    images: Array
    entries: CalibrationSet


class Validation:
    """Metrics of one build. Everything is measured on the deployed graph, on prompts that calibration never saw."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.recipe = build.recipe.validation

    @cached_property
    def size(self) -> ValidationSize:
        """What is judged, and how much of it at once."""
        build = self.build
        halves = 2 if build.guidance > 1 else 1
        return validation_size(self.recipe, build.footprint, build.steps * halves, build.working_bytes)

    # Float reference

    @property
    def judges_retrieval(self) -> bool:
        """Whether the bundled model's retrieval metric applies."""
        preset = self.build.model.preset
        return preset is not None and preset.name == _EMOJI and self.recipe.retrieval > 0

    @cached_property
    def prompts_and_seeds(self) -> tuple[list[str], list[int]]:
        """Evaluation prompts (empty for unconditional models) and seeds, disjoint from calibration's."""
        count, seed = self.size.images, self.build.recipe.seed
        if self.judges_retrieval:
            rows = emoji.retrieval_indices(max(self.recipe.retrieval, count))
            captions = emoji.captions()
            return [captions[row] for row in rows], [int(row) + seed * 10_007 for row in rows]
        prompts = list(self.build.model.default_prompts)
        # Calibration and training take theirs from the front.
        chosen = [prompts[-1 - index % len(prompts)] for index in range(count)] if prompts else []
        return chosen, [seed * 10_007 + index for index in range(count)]

    @cached_property
    def referenced(self) -> StageRecord:
        """Float pictures and trajectory points, cached for every bit width."""
        build, size = self.build, self.size
        prompts, seeds = self.prompts_and_seeds
        key = {**build.base_key("reference"), "prompts": prompts, "seeds": seeds, "recorded": size.images}

        def run(folder: Path) -> None:
            first = min(size.images, len(seeds))
            images = []
            for start, stop, record in ((0, first, True), (first, len(seeds), False)):
                if stop <= start:
                    continue
                with build.computing():
                    result = sample_images(
                        build.model,
                        prompts[start:stop] or None,
                        seeds[start:stop],
                        steps=build.steps,
                        guidance=build.guidance,
                        batch_size=min(size.batch_size, build.batch_size),
                        record=record,
                        progress=_offset(build, start, len(seeds)),
                    )
                images.append(result.images)
                if result.calibration is not None:
                    result.calibration.save(folder / "entries.safetensors")
            np.save(folder / "images.npy", np.concatenate(images))

        return build.workspace.stage("reference", key, run)

    @cached_property
    def reference(self) -> Evaluation:
        """What the float model does."""
        folder = self.referenced.path
        entries = CalibrationSet.load(folder / "entries.safetensors")
        subset = entries.subset(self.size.entries, self.build.recipe.seed)
        return Evaluation(*self.prompts_and_seeds, np.load(folder / "images.npy"), subset)

    # Deployed graph

    @cached_property
    def runner(self) -> Runner:
        """What is deployed, in its runtime (for TensorRT targets: the graph the engine is built from, on the CPU)."""
        engine = self.build.compiled.engine if self.build.recipe.target is Target.OPENVINO else None
        return self._open(self.build.deployed_graph) if engine is None else open_ir(engine.parent)

    def _open(self, graph: Path, config: Mapping[str, str] | None = None) -> Runner:
        """A form of the deployed graph in the target's runtime; config: of ONNX Runtime's session."""
        target = self.build.recipe.target
        if target is Target.OPENVINO:
            return OpenVinoRunner(graph, device=self.build.recipe.lowering.openvino_device)
        # Fusions of Q/DQ graphs may saturate on some CPUs; only the graph lowered for this runtime may use them.
        level = Optimization.FAST if target is Target.ORT_CPU else Optimization.REFERENCE
        return OrtRunner(graph, optimization=level, config=config)

    @cached_property
    def measured(self) -> StageRecord:
        """`metrics.json` and `images.npy`."""
        build, recipe = self.build, self.recipe
        key = {
            "version": 4,
            "passes": build.passed.fingerprint,
            "reference": self.referenced.fingerprint,
            "validation": recipe.model_dump(mode="json", exclude={"gates", "latency_batch", "latency_runs"}),
            "size": asdict(self.size),
            "seed": build.recipe.seed,
        }
        if build.recipe.target is Target.OPENVINO:
            key["runtime"] = [build.compiled.document[name] for name in ("arch", "version")]
        reference = self.reference
        if self.judges_frechet:
            _ = self.training_features  # a stage of its own, not inside this one's time

        def run(folder: Path) -> None:
            eps = self._predicted_noise(reference.entries, folder)
            layers = self._layers(reference.entries)
            images = self._images(reference)
            np.save(folder / "images.npy", images)
            document = {**eps, "layers": layers, **self.picture_metrics(reference, images)}
            (folder / "metrics.json").write_text(json.dumps(document), encoding="utf-8")

        return build.workspace.stage("validate", key, run)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What `measured` wrote."""
        document: dict[str, Any] = json.loads((self.measured.path / "metrics.json").read_text(encoding="utf-8"))
        return document

    @cached_property
    def images(self) -> Array:
        """Pictures of the deployed graph, uint8 [n, H, W, 3]."""
        loaded: Array = np.load(self.measured.path / "images.npy")
        return loaded

    def _predicted_noise(self, entries: CalibrationSet, folder: Path) -> dict[str, Any]:
        """SQNR of the deployed graph's output over all entries and by timestep, and its distance to canonical.

        A few answers stay in `folder` where a GPU host is to compare its engine's with them.
        """
        # One after the other: three sessions at once hold a large model three times.
        expected = self._answers(lambda: OrtRunner(self.build.float_graph), entries, 0)
        exact = self._answers(
            lambda: OrtRunner(self.build.canonical_graph, optimization=Optimization.REFERENCE), entries, 1
        )
        actual = self._answers(lambda: self.runner, entries, 2)
        axes = tuple(range(1, expected.ndim))
        all_signal = (expected.astype(np.float64) ** 2).sum(axis=axes)
        all_noise = ((actual - expected).astype(np.float64) ** 2).sum(axis=axes)
        apart = actual - exact
        order = _mixed_order(entries)
        if self.build.recipe.target in (Target.TRT, Target.TRT_RTX):
            few = order[:_KEPT_SAMPLES]
            inputs = {f"input:{name}": value for name, value in _arrays(entries, torch.from_numpy(few)).items()}
            output = ir.load(self.build.deployed_graph).graph.outputs[0].name
            answers = {f"float:{output}": expected[: len(few)], f"exact:{output}": exact[: len(few)]}
            np.savez(folder / KEPT_ANSWERS, allow_pickle=False, **inputs, **answers)
        timesteps = entries.timesteps.numpy()[order]
        row_map = self.build.plan.row_map
        by_timestep = [
            {
                "timestep": int(value),
                "row": int(row_map[value]),
                "eps_sqnr_db": sqnr_db(all_signal[timesteps == value].sum(), all_noise[timesteps == value].sum()),
                "samples": int((timesteps == value).sum()),
            }
            for value in np.unique(timesteps)
        ]
        return {
            "eps_sqnr_db": sqnr_db(all_signal.sum(), all_noise.sum()),
            "by_timestep": by_timestep,
            "canonical_max_rel_error": float(np.abs(apart).max()) / max(float(np.abs(exact).max()), 1e-30),
            "canonical_sqnr_db": sqnr_db(all_signal.sum(), (apart.astype(np.float64) ** 2).sum()),
        }

    def _answers(self, open_graph: Callable[[], Runner], entries: CalibrationSet, part: int) -> Array:
        """float32 [entries, ...] of one graph in the fixed mixed order; the graph is closed again. part: of three."""
        runner, found = open_graph(), []
        for index, inputs in _mixed_batches(entries, self.size.batch_size):
            found.append(_single(runner, inputs))
            self.build.workspace.reporter.progress(part * len(entries) + int(index), 3 * len(entries))
        return np.concatenate(found)

    @property
    def _lean(self) -> dict[str, str]:
        """Session options that keep the weights of a large model in their file, where two sessions are open at once."""
        footprint = self.build.footprint
        large = footprint is not None and 4 * footprint.parameters > self.build.working_bytes
        return {"session.disable_prepacking": "1"} if large else {}

    def _layers(self, entries: CalibrationSet) -> dict[str, Any]:
        """SQNR of every layer's output, in all and by row, from the graphs' own intermediate values."""
        float_model = ir.load(self.build.float_graph)
        names = layer_outputs(float_model)
        plan = self.build.plan
        wanted = {layer.name: names[layer.name] for layer in plan.layers}
        tapped = {}
        for label, source in (("float", self.build.float_graph), ("deployed", self.build.deployed_graph)):
            model = ir.load(source)
            TapOutputs(wanted.values())(model)
            # Beside the graph it is of: weights that lie outside the graph are shared, not copied.
            tapped[label] = source.with_name(f".tap-{os.getpid()}-{label}.onnx")
            ir.save(model, tapped[label])
        # One graph at a time, the float results on disk meanwhile: two open graphs of a large model are too much.
        kept = self.build.workspace.root / f".layers-{os.getpid()}"
        kept.mkdir(parents=True, exist_ok=True)
        try:
            level = Optimization.REFERENCE if self._lean else Optimization.FAST
            rows = np.asarray(plan.row_map)[entries.timesteps.numpy()]
            chosen = _spread_over_rows(rows, self.size.layer_entries)
            signal = {name: np.zeros(plan.rows) for name in wanted}
            noise = {name: np.zeros(plan.rows) for name in wanted}
            outputs = sorted(set(wanted.values()))
            parts = [chosen[i : i + self.size.layer_batch] for i in range(0, len(chosen), self.size.layer_batch)]
            runner: Runner = OrtRunner(tapped["float"], optimization=level, config=self._lean)
            for number, index in enumerate(parts):
                expected = runner.run(_arrays(entries, torch.from_numpy(index)), outputs)
                for position, value in enumerate(outputs):
                    np.save(kept / f"{number}-{position}.npy", expected.pop(value))
            del runner
            runner = self._open(tapped["deployed"], self._lean)
            for number, index in enumerate(parts):
                actual = runner.run(_arrays(entries, torch.from_numpy(index)), outputs)
                for name, value in wanted.items():
                    stored = np.load(kept / f"{number}-{outputs.index(value)}.npy")
                    left = stored.reshape(len(index), -1).astype(np.float64)
                    right = actual[value].reshape(len(index), -1).astype(np.float64)
                    np.add.at(signal[name], rows[index], (left**2).sum(axis=1))
                    np.add.at(noise[name], rows[index], ((right - left) ** 2).sum(axis=1))
        finally:
            shutil.rmtree(kept, ignore_errors=True)
            for path in tapped.values():
                path.unlink(missing_ok=True)
        return {
            name: {
                "sqnr_db": sqnr_db(signal[name].sum(), noise[name].sum()),
                "by_row": [
                    sqnr_db(signal[name][row], noise[name][row]) if signal[name][row] > 0 else None
                    for row in range(plan.rows)
                ],
            }
            for name in wanted
        }

    def _images(self, reference: Evaluation) -> Array:
        """Pictures through the deployed graph, same prompts and seeds."""
        build = self.build
        component = build.model.family.component
        original = getattr(build.model.pipeline, component)
        denoiser = QuantizedDenoiser(self.runner, build.model.family, build.denoiser_config, build.model.num_timesteps)
        set_denoiser(build.model.pipeline, denoiser)
        try:
            result = sample_images(
                build.model,
                reference.prompts or None,
                reference.seeds,
                steps=build.steps,
                guidance=build.guidance,
                batch_size=self.size.batch_size,
                progress=build.workspace.reporter.progress,
            )
        finally:
            set_denoiser(build.model.pipeline, original)
        return result.images

    def picture_metrics(self, reference: Evaluation, images: Array) -> dict[str, Any]:
        """What `images` uint8 [n, H, W, 3] are worth beside the float model's of the same seeds.

        PSNR (mean over pictures, and of the pooled error), SSIM, and where the model is the bundled one retrieval
        accuracy and Fréchet distances of both models.
        """
        error = ((images.astype(np.float64) - reference.images.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
        with np.errstate(divide="ignore"):
            psnr = np.minimum(CAP_DB, 10 * np.log10(255.0**2 / error))
            pooled = min(CAP_DB, float(10 * np.log10(255.0**2 / error.mean())))
        left, right = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (images, reference.images))
        ssim = structural_similarity_index_measure(left, right, data_range=1.0)
        result: dict[str, Any] = {
            "image_psnr_db": float(psnr.mean()),
            "image_psnr_pooled_db": pooled,
            "image_ssim": float(torch.as_tensor(ssim)),
            "image_count": len(images),
        }
        if self.judges_retrieval:
            expected = emoji.retrieval_indices(len(images))
            gallery = emoji.images()
            result["retrieval_accuracy"] = retrieval_accuracy(images, expected, gallery)
            result["retrieval_accuracy_fp"] = retrieval_accuracy(reference.images, expected, gallery)
            result["retrieval_count"] = len(images)
        if self.judges_frechet:
            result.update(self._frechet(reference, images))
        return result

    @property
    def judges_frechet(self) -> bool:
        """Whether there are a training set, features and enough pictures for Fréchet distances."""
        wanted = self.judges_retrieval and self.recipe.frechet
        return wanted and enough_pictures(max(self.recipe.retrieval, self.size.images), DIMENSION)

    def _frechet(self, reference: Evaluation, images: Array) -> dict[str, Any]:
        """Distance of both models' pictures to the training set, and of the quantized model's to the float model's."""
        trained = fit_gaussian(self.training_features)
        quantized, original = (
            fit_gaussian(picture_features(self.build.model, pictures)) for pictures in (images, reference.images)
        )
        distance, distance_fp = (frechet_distance(side, trained) for side in (quantized, original))
        return {
            "frechet_train": distance,
            "frechet_train_fp": distance_fp,
            "frechet_train_ratio": distance / max(distance_fp, 1e-30),
            "frechet_float": frechet_distance(quantized, original),
            "frechet_extractor": EXTRACTOR,
            "frechet_features": DIMENSION,
            "frechet_count": len(images),
        }

    @cached_property
    def training_features(self) -> Array:
        """float64 [1355, 40], of the pictures that the bundled model was trained on; kept in the work folder."""
        build = self.build
        key = {"version": STAGE_VERSIONS["features"], "model": build.model.fingerprint, "extractor": EXTRACTOR}

        def run(folder: Path) -> None:
            np.save(folder / "features.npy", picture_features(build.model, emoji.images()))

        loaded: Array = np.load(build.workspace.stage("features", key, run).path / "features.npy")
        return loaded

    # Speed

    @cached_property
    def latency(self) -> dict[str, Any] | None:
        """FP32 against quantized in the target's runtime, on the same inputs; None where it cannot run here."""
        target = self.build.recipe.target
        if target not in (Target.ORT_CPU, Target.OPENVINO):
            return None
        batch = self.recipe.latency_batch
        index = torch.arange(batch) % len(self.reference.entries)
        inputs = _arrays(self.reference.entries, index)
        inputs[TIMESTEP] = np.full_like(inputs[TIMESTEP], inputs[TIMESTEP][0])  # as samplers call
        runners = {"fp32": self._open(self.build.float_baseline), "quantized": self.runner}
        result = interleaved(runners, inputs, runs=self.recipe.latency_runs)
        return {
            "fp32_ms": result.median_ms["fp32"],
            "quantized_ms": result.median_ms["quantized"],
            "ratio": result.ratio("quantized", "fp32"),
            "batch": batch,
            "threads": available_cores(),
            "runs": result.runs,
        }


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal energy / noise energy), capped; None without a signal."""
    if signal <= 0:
        return None
    return CAP_DB if noise <= 0 else float(np.clip(10 * np.log10(signal / noise), -CAP_DB, CAP_DB))


def _offset(build: Build, start: int, total: int) -> Callable[[int, int], None]:
    """Progress of one part of a longer list."""
    return lambda done, _: build.workspace.reporter.progress(start + done, total)


def _single(runner: Runner, inputs: dict[str, Array]) -> Array:
    return runner.run(inputs)[runner.output_names[0]]


def _mixed_order(entries: CalibrationSet) -> Array:
    """A fixed shuffle, so that every batch mixes timesteps as a server's batches do."""
    return np.random.default_rng(0).permutation(len(entries))


def _mixed_batches(entries: CalibrationSet, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
    order = _mixed_order(entries)
    for start in range(0, len(order), size):
        index = order[start : start + size]
        yield start + len(index), _arrays(entries, torch.from_numpy(index))


def _arrays(entries: CalibrationSet, index: torch.Tensor) -> dict[str, Array]:
    return {name: value.numpy() for name, value in entries.select(index).items()}


def _spread_over_rows(rows: Array, count: int) -> Array:
    """At most `count` entry indices, as evenly over the rows as they come."""
    order = np.argsort(rows, kind="stable")
    within = np.concatenate([np.arange(n) for n in np.unique(rows, return_counts=True)[1]])
    return np.sort(order[np.argsort(within, kind="stable")][:count])
