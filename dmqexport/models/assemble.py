"""From a checked folder to float32 modules and a callable diffusers pipeline."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dmqexport.errors import BackendMissingError, ModelError, ResourceError
from dmqexport.models.family import family_of
from dmqexport.models.layout import Component, Layout
from dmqexport.models.own_classes import is_own, model_class
from dmqexport.models.pipeline_kinds import check_parts
from dmqexport.models.schedulers import SCHEDULERS, UNCONDITIONAL, build_scheduler, scheduler_class
from dmqexport.models.weight_files import read_json


def assemble(
    layout: Layout,
    swap: str | None,
    replacements: Mapping[str, Any] | None = None,
    size: tuple[int, int] | None = None,
) -> Any:
    """The diffusers pipeline of `layout`, float32, eval, without gradients; `swap` names another scheduler.

    replacements: component name → object to use in its place. size: (height, width) of a bare denoiser's latents.

    Raises ModelError for weights that do not fit their configuration or hold NaN or infinity, and for schedulers that
    the pipeline cannot drive; ResourceError when memory runs out; BackendMissingError when a library is missing.
    """
    scheduler = build_scheduler(layout.components["scheduler"].folder, swap)
    given = dict(replacements or {})
    stored = layout.components.items()
    parts = {name: given[name] if name in given else _load(part) for name, part in stored if name != "scheduler"}
    denoiser, kind = parts[layout.denoiser], layout.kind
    if kind is None or kind.conditions == "none":
        family = family_of(layout.components[layout.denoiser].class_name, denoiser.config, size)
        if len(family.input_names) > 2:
            from dmqexport.models.denoising_loop import DenoisingLoop

            return DenoisingLoop(family, denoiser, scheduler)
    if kind is None or kind.class_name in ("DDPMPipeline", "DDIMPipeline"):
        return _unconditional_pipeline(layout, denoiser, scheduler, swap)
    check_parts(parts, kind)
    if layout.labels is not None:
        parts["id2label"] = layout.labels
    return kind.build(parts, scheduler)


def _unconditional_pipeline(layout: Layout, unet: nn.Module, scheduler: Any, swap: str | None) -> Any:
    import diffusers

    drivable = [SCHEDULERS[name] for name in UNCONDITIONAL]
    if type(scheduler).__name__ not in drivable:
        raise ModelError(
            f"unconditional pipelines cannot drive {type(scheduler).__name__}: they do not scale the model's input",
            hint=f"choose one of these with --scheduler: {', '.join(UNCONDITIONAL)}",
        )
    # DDIMPipeline turns any scheduler into DDIM; the folder's own word counts unless the user asked for another.
    own = layout.kind is not None and layout.kind.class_name == "DDIMPipeline"
    ddim = type(scheduler).__name__ == scheduler_class("ddim") or (swap is None and own)
    return (diffusers.DDIMPipeline if ddim else diffusers.DDPMPipeline)(unet=unet, scheduler=scheduler)


def _load(component: Component) -> Any:
    """One component, loaded from its folder alone; third-party failures become ours, naming the folder."""
    kind = _class(component)
    where = f"{component.folder} ({component.class_name})"
    if component.weights is None:
        try:
            return kind.from_pretrained(str(component.folder), local_files_only=True)
        except ImportError as error:
            raise BackendMissingError(f"{where} needs a library that is missing: {error}") from error
        except Exception as error:
            # The vendors raise anything here, down to KeyError and bare Exception of their Rust parts.
            raise ModelError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    options: dict[str, Any] = {"dtype": torch.float32} if component.library == "transformers" else _diffusers_options()
    try:
        model, info = kind.from_pretrained(
            str(component.folder),
            local_files_only=True,
            use_safetensors=True,
            variant=component.weights.variant,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise BackendMissingError(f"{where} needs a library that is missing: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(f"not enough memory to load {where}", hint="close other programs") from error
        raise ModelError(
            f"{where} cannot be loaded: {type(error).__name__}: {_first_lines(error)}",
            hint="config.json and the weights must be of the same model",
        ) from error
    _check_complete(where, info, strict=component.name in ("unet", "transformer"))
    module: nn.Module = model.float().eval().requires_grad_(False)
    _check_finite(where, module)
    if component.class_name == "VQModel" and "scaling_factor" not in read_json(component.folder / "config.json"):
        # Latents of vector-quantized autoencoders are not scaled; diffusers' default is Stable Diffusion's 0.18215,
        # which CompVis/ldm-celebahq-256 must not take (huggingface/diffusers#6725).
        module.register_to_config(scaling_factor=1.0)  # type: ignore[operator]  # every ModelMixin has it
    return module


def _class(component: Component) -> Any:
    import diffusers
    import transformers

    if component.library == "diffusers":
        library, base = diffusers, diffusers.ModelMixin
    elif component.weights is None:
        library, base = transformers, transformers.PreTrainedTokenizerBase
    else:
        library, base = transformers, transformers.PreTrainedModel
    try:
        kind = getattr(library, component.class_name, None)
        if is_own(component.library, component.class_name):
            kind, base = model_class(component.class_name), diffusers.ModelMixin
    except ImportError as error:
        raise BackendMissingError(f"{component.class_name} needs a library that is missing: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ModelError(
            f"{component.folder}: {component.library} {library.__version__} has no {component.name} class "
            f"{component.class_name!r}",
            hint=f"check model_index.json, or install the release of {component.library} that made it",
        )
    return kind


def _diffusers_options() -> dict[str, Any]:
    from diffusers.utils import is_accelerate_available

    # Without accelerate the low-memory path is refused with a warning; say so ourselves.
    return {"torch_dtype": torch.float32, "low_cpu_mem_usage": bool(is_accelerate_available())}


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error means that memory ran out; torch raises a plain RuntimeError for it on the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])


def _check_complete(where: str, info: dict[str, Any], *, strict: bool) -> None:
    """Refuse a module with tensors left at random, which the libraries only warn about."""
    problems = [("lack", sorted(info.get("missing_keys", ())))]
    problems.append(("have the wrong shape in", sorted(str(key) for key in info.get("mismatched_keys", ()))))
    if strict:
        problems.append(("hold what the configuration does not know:", sorted(info.get("unexpected_keys", ()))))
    for what, names in problems:
        # Buffers of old text encoders that are computed, not learned.
        names = [name for name in names if not name.endswith("position_ids")]
        if names:
            raise ModelError(
                f"{where}: the weights {what} {len(names)} tensors, first {names[0]}",
                hint="config.json and the weights must be of the same model",
            )


def _check_finite(where: str, module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{where}: {name} holds {bad} NaN or infinite values of {tensor.numel()}",
                hint="the training diverged or the file is damaged; take an earlier checkpoint",
            )
