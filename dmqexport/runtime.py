"""A bundle as a drop-in component of diffusers pipelines.

    pipe = load_pipeline("out/emoji-w4a4")            # a ready pipeline
    pipe.unet = load_denoiser("out/emoji-w4a4")       # or only the denoiser, in a pipeline of your own

Works with every scheduler (the timestep table is keyed on the timestep's value) and with batches that mix timesteps.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from dmqexport.bundle import Bundle, open_bundle, read_json
from dmqexport.errors import BundleError, EngineError
from dmqexport.target import cpu_has_vnni
from engines.ort import OrtRunner


class QuantizedDenoiser(nn.Module):
    """Runs a deployed graph in ONNX Runtime behind the call signature of a diffusers denoiser.

    Accepts what diffusers pipelines pass: tensors by position or name, scalar or per-sample timesteps (float ones are
    rounded), and optional arguments of other features as long as they are None.
    """

    def __init__(self, runner: OrtRunner, config: dict[str, Any], num_timesteps: int) -> None:
        """config: the denoiser's diffusers config; num_timesteps: length of the timestep table."""
        super().__init__()
        self.runner = runner
        self.num_timesteps = num_timesteps
        self.config = _Config(config)
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
        """Predict. sample [B, C, H, W], timestep scalar, [1] or [B]; returns an object with `.sample`, or a 1-tuple.

        Raises BundleError for inputs the graph was not built for and for timesteps outside its table.
        """
        names = self.runner.input_names
        positional = dict(zip(names, args, strict=False))
        # Optional arguments may follow by position too, as long as they are not used.
        twice = [name for name in kwargs if name in positional]
        if twice or any(value is not None for value in args[len(names) :]):
            what = f"{twice} is given twice" if twice else f"{len(args)} positional arguments"
            raise BundleError(f"{what}; the inputs of the deployed graph are {list(names)}")
        named = {**positional, **kwargs}
        extra = [name for name, value in named.items() if name not in self.runner.input_names and value is not None]
        if extra:
            raise BundleError(
                f"the deployed graph has no input for {extra}; its inputs are {list(self.runner.input_names)}",
                hint="ControlNet residuals, added conditions and the like need a graph exported with them",
            )
        missing = [name for name in names if named.get(name) is None]
        if missing:
            raise BundleError(f"input {', '.join(map(repr, missing))} is missing, got {sorted(named)}")
        sample = named["sample"]
        batch = sample.shape[0]
        inputs: dict[str, np.ndarray[Any, Any]] = {}
        for name in names:
            value = named[name]
            if name == "timestep":
                inputs[name] = self._timestep(value, batch)
            else:
                inputs[name] = value.detach().to("cpu", torch.float32).contiguous().numpy()
        output = torch.from_numpy(self.runner.run(inputs)[self.runner.output_names[0]])
        output = output.to(sample.device, sample.dtype)
        return SimpleNamespace(sample=output) if return_dict else (output,)

    def _timestep(self, timestep: object, batch: int) -> np.ndarray[Any, Any]:
        tensor = torch.as_tensor(timestep).detach().cpu()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BundleError(f"timestep {tensor.tolist()} is not finite")
        values = (tensor.round() if tensor.is_floating_point() else tensor).to(torch.int64).reshape(-1)
        if values.numel() not in (1, batch):
            raise BundleError(f"{values.numel()} timesteps for a batch of {batch}")
        if int(values.min()) < 0 or int(values.max()) >= self.num_timesteps:
            outside = values.min() if int(values.min()) < 0 else values.max()
            raise BundleError(
                f"timestep {int(outside)} outside 0 to {self.num_timesteps - 1}",
                hint="the scheduler's num_train_timesteps differs from the model's",
            )
        return values.expand(batch).contiguous().numpy()


class _Config(dict[str, Any]):
    """diffusers configs are read both as mappings and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def load_denoiser(bundle: str | Path, *, threads: int | None = None, verify: bool = False) -> QuantizedDenoiser:
    """Open a bundle's denoiser for ONNX Runtime on CPU.

    Raises BundleError when the bundle is broken or needs a CPU feature this machine lacks.
    """
    opened = open_bundle(Path(bundle), verify=verify)
    check_machine(opened)
    config = read_json(opened.path / opened.component / "config.json")
    return QuantizedDenoiser(open_runner(opened, threads), config, int(opened.manifest["num_timesteps"]))


def open_runner(bundle: Bundle, threads: int | None = None) -> OrtRunner:
    """The deployed graph in ONNX Runtime; raises BundleError when it is damaged, naming what differs."""
    try:
        return OrtRunner(bundle.graph, threads=threads, config=bundle.session_config)
    except EngineError as error:
        open_bundle(bundle.path, verify=True)  # says which file has changed, if one has
        raise BundleError(
            f"{bundle.graph}: the installed ONNX Runtime does not load this graph: {error.message}",
            hint="the bundle is as it was built: install a newer onnxruntime, or rebuild it here",
        ) from error


def check_machine(bundle: Bundle) -> None:
    """Raise BundleError when this machine would compute wrong results with the bundle's graph."""
    needs = bundle.manifest["session"].get("cpu_features", [])
    if "vnni" in needs and not cpu_has_vnni():
        raise BundleError(
            f"{bundle.path}: built for CPUs with VNNI; here its 8-bit products could saturate",
            hint="rebuild with --set lowering.cpu_isa=portable",
        )


def load_pipeline(bundle: str | Path, *, threads: int | None = None) -> Any:
    """A ready diffusers pipeline around the quantized denoiser; BundleError when the bundle is not a pipeline."""
    from dmqexport.models.loading import pipeline_from_folder

    path = Path(bundle)
    opened = open_bundle(path)
    denoiser = load_denoiser(path, threads=threads)
    return pipeline_from_folder(path, {opened.component: denoiser})
