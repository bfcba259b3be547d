"""A bundle as a drop-in component of diffusers pipelines.

    pipe = load_pipeline("out/emoji-w4a4")            # a ready pipeline
    pipe.unet = load_denoiser("out/emoji-w4a4")       # or only the denoiser, in a pipeline of your own

Works with every scheduler (the timestep table is keyed on the timestep's value) and with batches that mix timesteps.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmqexport.bundle import ENGINES, Bundle, open_bundle, read_json
from dmqexport.errors import BundleError, EngineError, ModelError
from dmqexport.models.family import Family, bind_call, family_of, table_keys
from dmqexport.target import Target, cpu_has_vnni
from engines import openvino_ir
from engines.openvino_ir import open_ir
from engines.ort import OrtRunner
from engines.runner import Runner

logger = logging.getLogger(__name__)


class QuantizedDenoiser(nn.Module):
    """Runs a deployed graph in its runtime behind the call signature of a diffusers denoiser.

    Accepts what diffusers pipelines pass: tensors by position or name, scalar or per-sample timesteps (float ones are
    rounded), and optional arguments of other features as long as they are None.
    """

    def __init__(self, runner: Runner, family: Family, config: Mapping[str, Any], num_timesteps: int) -> None:
        """config: the denoiser's diffusers config; num_timesteps: length of the timestep table."""
        super().__init__()
        self.runner = runner
        self.family = family
        self.num_timesteps = num_timesteps
        self.config = _Config(config)
        if "text_embeds" in family.input_names:
            # Stable Diffusion XL's pipeline reads the width of its conditions here.
            self.add_embedding = SimpleNamespace(
                linear_1=SimpleNamespace(in_features=int(config["projection_class_embeddings_input_dim"]))
            )
        self.register_buffer("_anchor", torch.zeros(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype pipelines create latents in."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where inputs must live."""
        return torch.device("cpu")

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict. sample [B, ...], timestep scalar, [1] or [B]; returns an object with `.sample`, or a 1-tuple.

        Raises BundleError for inputs the graph was not built for and for timesteps outside its table.
        """
        try:
            named = bind_call(self.family, args, kwargs)
        except ModelError as error:
            raise BundleError(error.message, hint=error.hint) from error
        sample = named[self.family.input_names[0]]
        inputs: dict[str, np.ndarray[Any, Any]] = {}
        for name in self.runner.input_names:
            dtype = torch.int64 if self.family.is_index(name) else torch.float32
            inputs[name] = named[name].detach().to("cpu", dtype).contiguous().numpy()
        self._check_timestep(named["timestep"])
        output = torch.from_numpy(self.runner.run(inputs)[self.runner.output_names[0]])
        output = output.to(sample.device, sample.dtype)
        if self.family.returns_tensor:
            return output
        return SimpleNamespace(sample=output) if return_dict else (output,)

    def _check_timestep(self, timestep: Tensor) -> None:
        keys = table_keys(self.family, timestep)
        if int(keys.min()) < 0 or int(keys.max()) >= self.num_timesteps:
            outside = keys.min() if int(keys.min()) < 0 else keys.max()
            raise BundleError(
                f"timestep {int(outside)} outside 0 to {self.num_timesteps - 1}",
                hint="the scheduler's num_train_timesteps differs from the model's",
            )

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pipelines name what they compute (conditional or not) for caches; here there is none."""
        yield


class _Config(dict[str, Any]):
    """diffusers configs are read both as mappings and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def load_denoiser(
    bundle: str | Path, *, threads: int | None = None, verify: bool = False, rebuild: bool = False
) -> QuantizedDenoiser:
    """Open a bundle's denoiser: for OpenVINO if that is its target, else for ONNX Runtime on CPU.

    A TensorRT bundle runs its engine where a GPU is and the engine was built for it, else its graph on the CPU, slowly;
    a warning says so. rebuild: a bundle that does not fit this machine is built anew, in place, from the graph that it
    keeps.

    Raises BundleError when the bundle is broken or does not fit this machine, BackendMissingError when its runtime is
    not installed.
    """
    if rebuild:
        from dmqexport import pipeline_rebuild

        pipeline_rebuild.rebuild(Path(bundle))
    opened = open_bundle(Path(bundle), verify=verify)
    check_machine(opened)
    if opened.manifest.get("statistics") == "drawn":
        logger.warning(
            "%s was built with --random-statistics: it proves size and structure only, what it draws is noise", bundle
        )
    config = read_json(opened.path / opened.component / "config.json")
    size = opened.manifest["sampling"].get("latent_size")
    family = family_of(str(opened.manifest["model"]["family"]), config, tuple(size) if size else None)
    runner = _on_gpu(opened) or open_runner(opened, threads)
    return QuantizedDenoiser(runner, family, config, int(opened.manifest["num_timesteps"]))


def _on_gpu(bundle: Bundle) -> Runner | None:
    """The TensorRT engine, ready to run; None for other targets, and where it cannot run here."""
    if bundle.manifest["target"] not in (Target.TRT, Target.TRT_RTX):
        return None
    from engines.trt import FINISH_SCRIPT, TrtFlavor, TrtRunner, find_engine, gpu_present

    flavor = TrtFlavor(bundle.manifest["target"])
    if not gpu_present():
        logger.warning("%s: no NVIDIA GPU here; the graph that its engine is built from runs on the CPU", bundle.path)
        return None
    engine = find_engine(bundle.path / bundle.component / ENGINES, flavor)
    if engine is None:
        raise BundleError(
            f"{bundle.path} has no {flavor.module} engine for this machine",
            hint=f"python {bundle.path / FINISH_SCRIPT} builds it here; it needs pip install {flavor.package}",
        )
    return TrtRunner(engine, flavor)


def open_runner(bundle: Bundle, threads: int | None = None) -> Runner:
    """What is deployed, on the CPU or OpenVINO's device; raises BundleError when it is damaged, naming what differs."""
    runtime = "openvino" if bundle.manifest["target"] == Target.OPENVINO else "onnxruntime"
    try:
        if bundle.engine_folder is not None and runtime == "openvino":
            return open_ir(bundle.engine_folder, threads=threads)
        return OrtRunner(bundle.graph, threads=threads, config=bundle.session_config)
    except EngineError as error:
        open_bundle(bundle.path, verify=True)  # says which file has changed, if one has
        raise BundleError(
            f"{bundle.path}: the installed {runtime} does not load this network: {error.message}",
            hint=f"the bundle is as it was built: install a newer {runtime}, or rebuild it here",
        ) from error


def check_machine(bundle: Bundle) -> None:
    """Raise BundleError when this machine would refuse the bundle or compute wrong results with it."""
    reason = machine_misfit(bundle)
    if reason is not None:
        raise BundleError(
            f"{bundle.path}: {reason}",
            hint=f"dmqexport inspect {bundle.path} --rebuild makes it fit, from the graph that it keeps",
        )


def machine_misfit(bundle: Bundle) -> str | None:
    """Why what `dmqexport run` would execute does not fit this machine; None when it does."""
    if needs_vnni(bundle):
        return "built for CPUs with VNNI; here its 8-bit products could saturate"
    engine = bundle.manifest.get("engine")
    if bundle.manifest["target"] != Target.OPENVINO or engine is None:
        return None
    installed = openvino_ir.version()
    # Without OpenVINO there is nothing to rebuild with: opening the bundle says what to install.
    if installed is not None and _numbers(installed) < _numbers(str(engine["version"])):
        return f"built by OpenVINO {engine['version']}; here is {installed}, which may not read it"
    return None


def needs_vnni(bundle: Bundle) -> bool:
    """Whether the bundle's 8-bit products need VNNI and this CPU has none."""
    return "vnni" in bundle.manifest["session"].get("cpu_features", []) and not cpu_has_vnni()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("-")[0].split(".") if part.isdigit())


def load_pipeline(bundle: str | Path, *, threads: int | None = None, rebuild: bool = False) -> Any:
    """A ready diffusers pipeline around the quantized denoiser; BundleError when the bundle is not a pipeline.

    rebuild: see `load_denoiser`.
    """
    from dmqexport.models.loading import pipeline_from_folder

    path = Path(bundle)
    denoiser = load_denoiser(path, threads=threads, rebuild=rebuild)
    opened = open_bundle(path)
    return pipeline_from_folder(path, {opened.component: denoiser})
