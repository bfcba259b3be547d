"""Assemble the deployable folder and put it in place in one rename."""

import json
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

import dmqexport
from dmqexport.bundle import ANSWERS, ENGINE_GRAPH, GRAPH, GRID, OWN_FOLDER, RECIPE, check_replaceable, write_manifest
from dmqexport.models.quiet import quiet
from dmqexport.onnx_export import OPSET
from dmqexport.pipeline import Build, Stage, copy_graph
from dmqexport.pipeline_report import ReportBuilder, environment
from dmqexport.pipeline_unjudged import validation_of
from dmqexport.pipeline_validate import KEPT_ANSWERS
from dmqexport.report.html import write_report
from dmqexport.report.pictures import picture_grid
from dmqexport.target import Target
from dmqexport.workspace import replacing, writable_folder

#: Folders of a diffusers pipeline that a deployed denoiser still needs.
_TEXT = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")
_COMPANIONS = ("scheduler", *_TEXT, "vae", "vqvae", "class_embedder")
_SKIPPED_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
_PICTURE_PIXELS = 256


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle. failed_gates: names of gates that did not pass; missing: message of a missing backend."""

    path: Path
    document: dict[str, Any]
    failed_gates: tuple[str, ...]
    missing: str | None


def run_build(build: Build) -> BuildResult:
    """Run every stage and write the bundle. The bundle is written even when a gate fails, and says so."""
    check_replaceable(build.output)
    writable_folder(build.output.resolve().parent)  # now, not after hours of calibration
    build.run(Stage.COMPILE)
    validation = validation_of(build)
    report = ReportBuilder(build, validation)
    _ = validation.measured  # a stage of its own, before the report that reads it
    reporter, start = build.workspace.reporter, time.perf_counter()
    reporter.started(Stage.BUNDLE)
    document = report.document()
    with replacing(build.output) as folder:
        _copy_companions(build, folder)
        _copy_denoiser(build, folder)
        own = folder / OWN_FOLDER
        own.mkdir()
        build.plan.save(own)
        (folder / RECIPE).write_text(build.recipe.to_yaml(), encoding="utf-8")
        pictures = report.pictures()
        write_report(document, pictures, own)
        if pictures is not None:
            scale = max(1, _PICTURE_PIXELS // 4 // pictures.fp.shape[2])
            picture_grid(pictures, scale, labels=("FP32", build.plan.bits.upper())).save(folder / GRID)
        if build.recipe.target in (Target.TRT, Target.TRT_RTX):
            answers = validation.measured.path / KEPT_ANSWERS
            if answers.is_file():  # a build whose statistics were drawn has none
                shutil.copyfile(answers, folder / ANSWERS)
            _write_finish_script(build, folder, ANSWERS if answers.is_file() else None)
        write_manifest(folder, _manifest(build, report))
    reporter.finished(Stage.BUNDLE, time.perf_counter() - start, False)
    failed = tuple(gate["name"] for gate in report.gates if gate["passed"] is False)
    return BuildResult(build.output, document, failed, build.compiled.missing)


def _copy_companions(build: Build, folder: Path) -> None:
    """Everything of the pipeline but the denoiser; the scheduler is the one calibrated, which may have been swapped."""
    source, pipeline = build.model.folder, build.model.pipeline
    for name in () if build.model.family.returns_tensor else _COMPANIONS:
        if (source / name).is_dir() and name != "scheduler":
            shutil.copytree(source / name, folder / name, ignore=_ignored)
    for name in sorted({part for lora in build.model.loras for part in lora.parts} - {build.model.family.component}):
        # An adapter was fused into this text encoder too: the folder's own weights are not what calibration saw.
        shutil.rmtree(folder / name)
        with quiet():
            getattr(pipeline, name).save_pretrained(folder / name)
    if pipeline.scheduler is not None:
        pipeline.scheduler.save_pretrained(folder / "scheduler")
    if build.model.family.returns_tensor:
        return  # an adapter's pipeline is code of its user's
    index = source / "model_index.json"
    components: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    if not components and build.model.random_embeddings:
        return  # a bare conditional UNet has no text encoder: its bundle is a component, not a pipeline
    components["_class_name"] = type(pipeline).__name__
    components["scheduler"] = ["diffusers", type(pipeline.scheduler).__name__]
    components.setdefault(build.model.family.component, ["diffusers", build.model.family.class_name])
    components.pop("_name_or_path", None)
    (folder / index.name).write_text(json.dumps(components, indent=1) + "\n", encoding="utf-8")


def _ignored(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(_SKIPPED_SUFFIXES) or name.startswith(".")]


def _copy_denoiser(build: Build, folder: Path) -> None:
    component = folder / build.model.family.component
    component.mkdir()
    (component / "config.json").write_text(
        json.dumps(
            {"_class_name": build.model.family.class_name, **build.denoiser_config},
            indent=1,
            sort_keys=True,
            default=list,
        )
        + "\n",
        encoding="utf-8",
    )
    copy_graph(build.deployed_graph, component, GRAPH)
    if build.engine_graph != build.deployed_graph:
        copy_graph(build.engine_graph, component, ENGINE_GRAPH)
    if build.compiled.engine is not None:
        target = component / "engines" / engine_folder(build)
        target.mkdir(parents=True)
        for file in (build.compiled.engine, *build.compiled.companions):
            shutil.copyfile(file, target / file.name)


def engine_folder(build: Build) -> str:
    """`<target>-<arch>-<version>`; RTX engines are built for every architecture the builder supports, and an IR says
    for which device its int8 was proven.
    """
    document = build.compiled.document
    return f"{document['target']}-{document.get('arch', 'any')}-{document['version']}"


def _write_finish_script(build: Build, folder: Path, answers: str | None) -> None:
    from engines.trt import TrtFlavor, write_finish_script

    component = build.model.family.component
    flavor = TrtFlavor.RTX if build.recipe.target is Target.TRT_RTX else TrtFlavor.TRT
    write_finish_script(
        folder,
        f"{component}/{build.engine_graph.name}",
        flavor=flavor,
        profiles=build.profiles,
        expected=build.engine_types,
        engines_relpath=f"{component}/engines",
        options=build.build_options,
        reference_relpath=answers,
    )


def _kernels(build: Build) -> dict[str, Any]:
    """Who chose the kernels, and the layers that the integer product does not multiply; no times, which vary."""
    tuned = build.tuned
    chosen = {name: entry["kernel"] for name, entry in tuned["kernels"].items()}
    return {**{key: tuned[key] for key in ("mode", "cpu", "runtime") if key in tuned}, "other": chosen}


_TYPES = {ir.DataType.FLOAT: "tensor(float)", ir.DataType.INT64: "tensor(int64)"}


def _signature(value: ir.Value) -> dict[str, Any]:
    """Name, type and shape of an input in ONNX Runtime's words; dimensions that vary by name."""
    assert value.dtype is not None
    assert value.shape is not None
    shape = [int(size) if isinstance(size, int) else size.value for size in value.shape]
    return {"name": value.name, "type": _TYPES[value.dtype], "shape": shape}


def _manifest(build: Build, report: ReportBuilder) -> dict[str, Any]:
    graph = ir.load(build.deployed_graph).graph  # opening it in a runtime would unpack a large model's weights
    component = build.model.family.component
    packages = environment()["packages"]
    return {
        "dmqexport_version": dmqexport.__version__,
        "model": {
            "name": build.model.name,
            "source": build.model.source,
            "family": build.model.family.class_name,
            "fingerprint": build.model.fingerprint,
            "lora": [
                {"file": lora.file, "sha256": lora.sha256, "scale": lora.scale, "parts": list(lora.parts)}
                for lora in build.model.loras
            ],
            "weights": build.recipe.weights,
        },
        "statistics": build.recipe.calibration.statistics,
        "component": component,
        "bits": build.plan.bits,
        "target": build.recipe.target.value,
        "rows": build.plan.rows,
        "num_timesteps": len(build.plan.row_map),
        "plan_fingerprint": build.plan.fingerprint,
        "inputs": [_signature(value) for value in graph.inputs],
        "outputs": [value.name for value in graph.outputs],
        "kernels": _kernels(build),
        "session": {"config": build.session_config, "cpu_features": ["vnni"] if build.vnni else []},
        "sampling": {
            "steps": build.steps,
            "guidance": build.guidance,
            "latent_size": None if build.model.size is None else list(build.model.size),
        },
        "engine": {
            "folder": f"{component}/engines/{engine_folder(build)}",
            "arch": build.compiled.document.get("arch", "any"),
            **{key: build.compiled.document[key] for key in ("target", "version", "layers_proven", "layers_planned")},
        }
        if build.compiled.document
        else None,
        "finish_command": "python finish_on_gpu.py" if build.compiled.missing is not None else None,
        # Latency differs from build to build; the manifest holds what the recipe determines.
        "gates_passed": not any(gate["passed"] is False for gate in report.gates if gate["name"] != "latency_ratio"),
        "recipe": build.recipe.model_dump(mode="json"),
        "seed": build.recipe.seed,
        "opset": OPSET,
        "architecture": platform.machine(),
        "packages": packages,
    }
