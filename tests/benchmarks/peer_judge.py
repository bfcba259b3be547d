"""The judge of `peers.py`: makes the shared folder, judges artefacts in their runtime, times them against float32.

    python peer_judge.py prepare|judge|time job.json

Everything is `dmqexport validate`'s own: calibration points are those a build records, evaluation points, prompts and
seeds those it is judged on.

* Predicted noise: 10 log10(sum ref² / sum (quantized - ref)²), pooled over all evaluation points.
* Image PSNR: against the float model's picture of the same seed, after a whole sampling run, mean over pictures.
* Retrieval: share of captions whose training picture is nearest to the picture drawn from it.
* Latency: one call, medians of runs that alternate with the same runtime's float32, in one process; processor time too.
"""

import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_job import CALIBRATION, FLOAT, FLOAT_FAST, MODEL, UNET

from dmqexport.bundle import open_bundle
from dmqexport.pipeline_ablate import Judge
from dmqexport.pipeline_validate import sqnr_db
from dmqexport.recipe import load_recipe
from dmqexport.runtime import QuantizedDenoiser, open_runner
from engines.bench import LatencyResult, interleaved
from engines.openvino_ir import OpenVinoRunner
from engines.ort import OrtRunner
from engines.runner import Runner

_METRICS = ("eps_sqnr_db", "image_psnr_db", "image_ssim", "retrieval_accuracy", "frechet_train_ratio")


def judge_of(job: Mapping[str, Any]) -> Judge:
    """The judge that a job describes: model, settings and work folder."""
    # Without factors the graph that peers are given is the float model as it was loaded.
    recipe = load_recipe(None, {"model": job["model"]}, [*job["settings"], "scaling.method=none"])
    judge = Judge(recipe, Path(job["work"]))
    if job["pictures"]:
        judge.prepare()
    else:
        _ = judge.noise
    return judge


def metrics_of(judge: Judge, denoiser: Any, pictures: bool) -> dict[str, Any]:
    """What a denoiser is worth; without pictures, its predicted noise alone."""
    if pictures:
        found, _ = judge.judge(denoiser)
        return {name: found.get(name) for name in _METRICS}
    expected = judge.noise.double()
    error = judge.predict(denoiser).double() - expected
    return {"eps_sqnr_db": sqnr_db(float(expected.square().sum()), float(error.square().sum()))}


def prepare(job: Mapping[str, Any]) -> dict[str, Any]:
    """Write the float graph, the float UNet and the calibration points; say what they are."""
    judge, shared = judge_of(job), Path(job["shared"])
    build = judge.build
    for source in build.float_graph.parent.iterdir():
        if source.name.startswith("float"):  # graphs, and weights that lie beside them
            shutil.copy2(source, shared / source.name)
    assert (shared / FLOAT).is_file()
    build.model.denoiser.save_pretrained(shared / UNET)
    points = {name: value.numpy() for name, value in build.calibration_set.inputs.items()}
    np.savez(shared / CALIBRATION, **points)
    layers = [layer.name for layer in build.probe_result.layers]
    described = {"layers": layers, "boundary": list(build.model.family.boundary)}
    (shared / MODEL).write_text(json.dumps(described) + "\n", encoding="utf-8")
    metrics = judge.validation.picture_metrics(judge.validation.reference, judge.validation.reference.images)
    parameters = sum(weight.numel() for weight in build.model.denoiser.parameters())
    return {
        "name": build.model.name,
        "parameters": parameters,
        "calibration_points": len(build.calibration_set),
        "evaluation_points": len(judge.noise),
        "steps": build.steps,
        "guidance": build.guidance,
        "layers": len(layers),
        "retrieval_accuracy": metrics.get("retrieval_accuracy") if job["pictures"] else None,
        "pictures": len(judge.validation.reference.images) if job["pictures"] else 0,
    }


def judge_artefact(job: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one artefact, executed by its runtime."""
    judge = judge_of(job)
    build = judge.build
    runner = _open(job["runtime"], Path(job["artefact"]))
    denoiser = QuantizedDenoiser(runner, build.model.family, build.denoiser_config, build.model.num_timesteps)
    return metrics_of(judge, denoiser, bool(job["pictures"]))


def time_artefacts(job: Mapping[str, Any]) -> dict[str, Any]:
    """By key, ratios against the runtime's own float32: of medians of wall-clock and of processor time, one thread.

    Every artefact alternates with float32, and all have their turn in each round: what slows a round slows them all.
    """
    shared = Path(job["shared"])
    inputs = _inputs(shared, int(job["batch"]))
    graphs = {timed["runtime"]: FLOAT_FAST if timed["runtime"] == "onnxruntime" else FLOAT for timed in job["timed"]}
    floats = {runtime: _open(runtime, shared / graph) for runtime, graph in graphs.items()}
    own = {timed["key"]: _open(timed["runtime"], Path(timed["artefact"])) for timed in job["timed"]}
    rounds: dict[str, list[tuple[LatencyResult, float]]] = {key: [] for key in own}
    for _ in range(int(job["repeats"])):
        for timed in job["timed"]:
            runners = {"fp32": floats[timed["runtime"]], "own": own[timed["key"]]}
            result = interleaved(runners, inputs, runs=int(job["runs"]))
            rounds[timed["key"]].append((result, os.getloadavg()[0]))
    return {key: _median(measured) for key, measured in rounds.items()}


def _median(rounds: Sequence[tuple[LatencyResult, float]]) -> dict[str, Any]:
    """Of all rounds of one artefact, each with the machine's load at its end."""
    results = [result for result, _ in rounds]
    ratios = [result.ratio("own", "fp32") for result in results]
    return {
        "fp32_ms": statistics.median(result.median_ms["fp32"] for result in results),
        "ms": statistics.median(result.median_ms["own"] for result in results),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "processor_ratio": statistics.median(r.processor_ms["own"] / r.processor_ms["fp32"] for r in results),
        "load": round(statistics.median(load for _, load in rounds), 1),
    }


def _open(runtime: str, artefact: Path) -> Runner:
    """One thread. artefact: a graph, an IR, or a bundle's folder."""
    if artefact.is_dir():
        return open_runner(open_bundle(artefact), 1)
    return OrtRunner(artefact, threads=1) if runtime == "onnxruntime" else OpenVinoRunner(artefact, threads=1)


def _inputs(shared: Path, batch: int) -> dict[str, np.ndarray]:
    """A batch of one timestep, as samplers call."""
    with np.load(shared / CALIBRATION) as stored:
        count = len(stored["timestep"])
        index = np.random.default_rng(1).choice(count, size=batch, replace=count < batch)
        inputs = {name: stored[name][index] for name in stored.files}
    return {**inputs, "timestep": np.full_like(inputs["timestep"], inputs["timestep"][0])}


def main() -> None:
    """Do what the command line says; the answer goes to `answer.json` beside the job."""
    torch.set_num_threads(1)
    path = Path(sys.argv[2])
    verbs = {"prepare": prepare, "judge": judge_artefact, "time": time_artefacts}
    answer = verbs[sys.argv[1]](json.loads(path.read_text(encoding="utf-8")))
    path.with_name("answer.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
