"""Schedulers by short name, and the scheduler that a model folder brings along."""

import difflib
from pathlib import Path
from typing import Any, Final

from dmqexport.errors import ModelError
from dmqexport.models.weight_files import read_json

SCHEDULERS: Final[dict[str, str]] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}

UNCONDITIONAL: Final[tuple[str, ...]] = ("ddim", "ddpm", "dpm-solver")
"""Those that the unconditional pipelines drive right; they scale no input, and the others need that."""


def scheduler_class(name: str) -> str:
    """The diffusers class of a short name (a class name is taken too); raises ModelError with the known names."""
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    if name in SCHEDULERS.values():
        return name
    close = difflib.get_close_matches(name.lower(), SCHEDULERS, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    raise ModelError(f"unknown scheduler {name!r}", hint=f"{guess}known: {', '.join(SCHEDULERS)}")


def build_scheduler(folder: Path, swap: str | None) -> Any:
    """The scheduler of `folder`/scheduler_config.json; with `swap`, that class from the same noise schedule.

    Raises ModelError when the file is missing or unreadable, or names no scheduler of diffusers.
    """
    import diffusers

    path = folder / "scheduler_config.json"
    config = read_json(path)
    own = config.get("_class_name")
    name = own if swap is None else scheduler_class(swap)
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ModelError(
            f"{path}: _class_name is {name!r}, which is no scheduler of diffusers {diffusers.__version__}",
            hint=f"choose one with --scheduler: {', '.join(SCHEDULERS)}",
        )
    if isinstance(own, str) and _is_flow(own) != _is_flow(kind.__name__):
        kinds = ("flow matching", "noise prediction") if _is_flow(own) else ("noise prediction", "flow matching")
        fitting = ", ".join(short for short, known in SCHEDULERS.items() if _is_flow(known) == _is_flow(own))
        raise ModelError(
            f"{path}: {own} is for {kinds[0]}, {name} for {kinds[1]}: it would misread what the network predicts",
            hint=f"choose one of the model's own kind with --scheduler: {fitting}",
        )
    try:
        scheduler: Any = kind.from_config(config)  # type: ignore[attr-defined]  # every SchedulerMixin has it
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise ModelError(f"{path}: {name} refuses this configuration: {error}") from error
    if not isinstance(scheduler.config.get("num_train_timesteps"), int):
        raise ModelError(
            f"{path}: {name} has no num_train_timesteps; only schedulers with discrete training steps are supported",
            hint=f"choose one with --scheduler: {', '.join(SCHEDULERS)}",
        )
    return scheduler


def _is_flow(class_name: str) -> bool:
    return class_name.startswith("FlowMatch")
