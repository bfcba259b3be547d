"""Make a bundle fit the machine it was brought to, from the ONNX graph that it keeps; nothing is calibrated again."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dmqexport.bundle import ENGINE_GRAPH, ENGINES, GRAPH, MANIFEST, SEAL, Bundle, open_bundle, write_manifest
from dmqexport.errors import BundleError
from dmqexport.onnx_export import save_model
from dmqexport.pipeline_openvino import engine_graph
from dmqexport.recipe_sections import LoweringRecipe
from dmqexport.runtime import machine_misfit, needs_vnni
from dmqexport.target import Target
from dmqexport.workspace import replacing
from passes.bind import bind
from passes.lower.openvino import LowerOpenVINO
from passes.lower.portable import MakePortable
from passes.lower.tensorrt import product_types

Fields = dict[str, Any]


def engine_misfit(bundle: Bundle) -> str | None:
    """Why what the bundle deploys does not fit this machine; None when it does.

    Unlike `machine_misfit` this minds TensorRT engines, which are not what `dmqexport run` executes.
    """
    reason, engine = machine_misfit(bundle), bundle.manifest.get("engine")
    if reason is not None or bundle.manifest["target"] not in (Target.TRT, Target.TRT_RTX):
        return reason
    from engines.trt import TrtFlavor, flavor_version, gpu_architecture

    flavor = TrtFlavor(bundle.manifest["target"])
    if engine is None:
        return f"its {flavor.module} engine was never built"
    installed, arch = flavor_version(flavor), str(engine["arch"])
    if installed != engine["version"]:
        return f"its engine was built by {flavor.module} {engine['version']}; here is {installed or 'none'}"
    if arch not in ("any", gpu_architecture()):
        return f"its engine was built for {arch}; here is {gpu_architecture() or 'no GPU'}"
    return None


def rebuild(path: Path, say: Callable[[str], None] = lambda _: None) -> Bundle:
    """Open the bundle at `path`, rebuilt first when it does not fit this machine; `say` is told what was done and why.

    Every file is verified before anything is built from it, and the bundle is replaced in one rename, with a manifest
    and a seal of its own: a rebuild that fails leaves it as it was. Its report stays the first build's.

    Raises BundleError for a bundle that was changed or cannot be rebuilt, BackendMissingError without its builder,
    EngineError when the builder refuses, or a layer is not proven.
    """
    opened = open_bundle(path)
    reason = engine_misfit(opened)
    if reason is None:
        return opened
    opened = open_bundle(path, verify=True)
    fields = {key: value for key, value in opened.manifest.items() if key not in ("schema_version", "files")}
    with replacing(path) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True, copy_function=_share)
        for name in (MANIFEST, SEAL):
            (folder / name).unlink()  # a shared file must not be written to: it is the old bundle's too
        target = opened.manifest["target"]
        if target == Target.ORT_CPU:
            fields |= _portable(opened, folder)
        elif target == Target.OPENVINO:
            fields |= _openvino(opened, folder)
        else:
            fields |= _tensorrt(opened, folder)
        write_manifest(folder, fields)
    say(f"{path}: rebuilt for this machine, since {reason}")
    return open_bundle(path)


def _share(source: str, target: str) -> None:
    """One file in two folders without a second copy, where the file system can and nobody minds: onnx_ir reads no
    tensors from a file that has two names."""
    if not source.endswith(".data"):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _portable(bundle: Bundle, folder: Path) -> Fields:
    """Integer products that are exact without VNNI."""
    return _without_vnni(bundle, folder, MakePortable())


def _without_vnni(bundle: Bundle, folder: Path, lowering: ir.passes.InPlacePass) -> Fields:
    """Replace the graph in `folder` by the bundle's, lowered once more."""
    model = ir.load(bundle.graph)
    lowering(model)
    graph = folder / bundle.component / GRAPH
    for file in (graph, graph.with_name(graph.name + ".data")):
        file.unlink(missing_ok=True)
    save_model(model, graph)
    return {"session": {**bundle.manifest["session"], "cpu_features": []}}


def _openvino(bundle: Bundle, folder: Path) -> Fields:
    """The IR, converted and proven by the OpenVINO that is here; of products that do not saturate without VNNI."""
    from engines import openvino_ir

    engine, plan, changed = bundle.manifest["engine"], bundle.plan, {}
    device = str(engine["arch"]).upper()
    openvino_ir.check_device(device)
    graph = folder / bundle.component / GRAPH
    if needs_vnni(bundle):
        changed = _without_vnni(bundle, folder, LowerOpenVINO(plan, vnni=False))
    nodes = bind(ir.load(graph), plan).layers
    expected = {
        name: [str(node.name) for node in item.compute]
        for name, item in nodes.items()
        if plan.layer(name).activation_bits is not None
    }
    rest = _shapes(bundle)
    batches = {
        batch: {name: (batch, *shape) for name, shape in rest.items()} for batch in {1, _lowering(bundle).max_batch}
    }
    name = f"{Target.OPENVINO.value}-{device.lower()}-{openvino_ir.version()}"
    place = _engine_folder(bundle, folder, name)
    with engine_graph(graph, place) as source:
        built = openvino_ir.build_ir(source, place, batches, device=device, expected=expected)
    proven = len({proof.layer for proof in built.proofs})
    return changed | _engine(
        bundle, name, version=built.version, arch=device.lower(), proven=proven, planned=len(expected)
    )


def _tensorrt(bundle: Bundle, folder: Path) -> Fields:
    """The engine, built and proven by the TensorRT that is here."""
    from engines.precision import prove_types
    from engines.trt import BuildOptions, Hardware, ShapeRange, TrtFlavor, build_engine, gpu_architecture

    flavor, lowering = TrtFlavor(bundle.manifest["target"]), _lowering(bundle)
    own = bundle.graph.with_name(ENGINE_GRAPH)
    graph = own if own.is_file() else bundle.graph
    types = product_types(ir.load(graph), bundle.plan)
    tuned = min(lowering.opt_batch, lowering.max_batch)
    work = folder / bundle.component / ".engine"
    result = build_engine(
        graph,
        work / "engine.plan",
        flavor=flavor,
        profiles={
            name: ShapeRange((1, *shape), (tuned, *shape), (lowering.max_batch, *shape))
            for name, shape in _shapes(bundle).items()
        },
        log_path=work / "build.log",
        options=BuildOptions(
            timing_cache=None if lowering.timing_cache is None else Path(lowering.timing_cache),
            hardware=Hardware(lowering.hardware),
            version_compatible=lowering.version_compatible,
            refit=lowering.refit,
        ),
    )
    proven = len({proof.layer for proof in (prove_types(result.layers, types) if types else [])})
    arch = (gpu_architecture() or "any") if flavor.needs_gpu else "any"
    name = f"{flavor.value}-{arch}-{result.version}"
    place = _engine_folder(bundle, folder, name)
    (work / "engine.plan").rename(place / "engine.plan")
    shutil.rmtree(work)
    return _engine(bundle, name, version=result.version, arch=arch, proven=proven, planned=len(types))


def _engine_folder(bundle: Bundle, folder: Path, name: str) -> Path:
    """An empty folder for the new engine; those of other machines go, since the manifest names one."""
    place = folder / bundle.component / ENGINES
    shutil.rmtree(place, ignore_errors=True)
    (place / name).mkdir(parents=True)
    return place / name


def _engine(bundle: Bundle, name: str, *, version: str, arch: str, proven: int, planned: int) -> Fields:
    engine = {
        "folder": f"{bundle.component}/{ENGINES}/{name}",
        "arch": arch,
        "target": bundle.manifest["target"],
        "version": version,
        "layers_proven": proven,
        "layers_planned": planned,
    }
    return {"engine": engine, "finish_command": None}


def _lowering(bundle: Bundle) -> LoweringRecipe:
    recipe = bundle.manifest.get("recipe")
    known = recipe.get("lowering", {}) if isinstance(recipe, dict) else {}
    return LoweringRecipe.model_validate({key: known[key] for key in LoweringRecipe.model_fields if key in known})


def _shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """Every input's shape behind the batch."""
    shapes = {str(item["name"]): tuple(item["shape"][1:]) for item in bundle.manifest["inputs"]}
    loose = [name for name, shape in shapes.items() if not all(isinstance(extent, int) for extent in shape)]
    if loose:
        raise BundleError(
            f"{bundle.path}: inputs {loose} have free sizes, which the bundle does not say the range of",
            hint="build it from its recipe on this machine",
        )
    return shapes
