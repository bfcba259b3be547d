"""Before a build starts: what it will take, and whether that is within --max-ram and --max-disk."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dmqexport.bundle import OWN_FOLDER
from dmqexport.errors import ModelError, ResourceError
from dmqexport.models.architecture import find_architecture
from dmqexport.models.footprint import Footprint
from dmqexport.models.random_weights import architectures
from dmqexport.pipeline_estimate import Estimate, Plan, estimate
from dmqexport.pipeline_size import WORKING_BYTES, validation_size
from dmqexport.pipeline_speed import MachineSpeed, measure_speed
from dmqexport.recipe import Recipe, without_measurements
from dmqexport.report.document import ReportError, Stage, read_report
from dmqexport.report.wording import duration, size

_SMALLEST_WORKING = 2**27
_LARGE_FILES = 2 * 2**30
# where only bytes are asked for
_INSTANT = MachineSpeed(
    macs=math.inf, products=math.inf, candidates=math.inf, copied=math.inf, drawn=math.inf, written=math.inf, call=0.0
)


def estimate_build(recipe: Recipe, folder: Path | None) -> Estimate:
    """What a build of `recipe` takes, without loading its model. folder: where writing is timed; None times nothing.

    Raises ModelError where the model's configuration is not on this machine.
    """
    return _estimates(recipe, folder, (working_bytes(recipe),))[0]


def working_bytes(recipe: Recipe, work: Path | None = None) -> int:
    """Memory for activations and moments: as much as --max-ram leaves beside the weights, at most the usual.

    work: where a build is about to start; a large model must then fit this machine where the recipe names no limit.
    Raises ResourceError when a build of `recipe` does not fit --max-ram or --max-disk however little it is given.
    """
    limit, disk = recipe.max_ram_bytes, recipe.max_disk_bytes
    if work is not None and _is_large(recipe.model):
        _check_machine(recipe, work)
    if limit is None and disk is None:
        return WORKING_BYTES
    choices = [WORKING_BYTES]
    while choices[-1] > _SMALLEST_WORKING:
        choices.append(choices[-1] // 2)
    try:
        found = _estimates(recipe, None, choices)
    except ModelError as error:
        raise ResourceError(
            f"--max-ram and --max-disk need an estimate, and there is none: {error.message}",
            hint="leave them out, or give the model's folder",
        ) from error
    if disk is not None and found[-1].disk > disk:
        raise _refusal("--max-disk", disk, found[-1].disk, found[-1], recipe)
    for working, candidate in zip(choices, found, strict=True):
        if limit is None or candidate.memory <= limit:
            return working
    raise _refusal("--max-ram", limit or 0, found[-1].memory, found[-1], recipe)


def measured_stages(recipe: Recipe, bundle: Path) -> tuple[Stage, ...]:
    """What the stages of `bundle` took; nothing where it is not there or was built from another recipe."""
    try:
        report = read_report(bundle / OWN_FOLDER / "report.json")
    except ReportError:
        return ()
    same = report.recipe == without_measurements(recipe).model_dump(mode="json")
    return tuple(report.stages) if same else ()


def report_lines(found: Estimate, measured: Sequence[Stage] = ()) -> list[str]:
    """The estimate as people read it; measured: what a build recorded, to stand beside it stage by stage."""
    rows: list[tuple[str, ...]] = [("stage", "time", "of it the model", "memory", "disk")]
    rows += [
        (item.name, duration(item.seconds), duration(item.forward_seconds), size(item.memory), size(item.disk))
        for item in found.stages
    ]
    forwards = sum(item.forward_seconds for item in found.stages)
    rows.append(("all", duration(found.seconds), duration(forwards), size(found.memory), size(found.disk)))
    if measured:
        left = list(measured)
        beside = [_taken(next((left.pop(i) for i, own in enumerate(left) if own.name == row[0]), None)) for row in rows]
        beside[0] = ("took", "processor", "memory", "disk")
        rows = [(*row, *others) for row, others in zip(rows, beside, strict=True)]
        rows += [(own.name, "", "", "", "", *_taken(own)) for own in left]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"result: {size(found.result)} deployed, {size(found.canonical)} as packed codes")
    return lines


def _taken(stage: Stage | None) -> tuple[str, str, str, str]:
    """A finished stage as people read it; empty for one that is not recorded."""
    if stage is None:
        return "", "", "", ""
    given = (
        (stage.seconds, duration),
        (stage.cpu_seconds, duration),
        (stage.peak_rss_bytes, size),
        (stage.disk_bytes, size),
    )
    time, processor, memory, disk = ("" if value is None else form(value) for value, form in given)
    return time, processor, memory, disk


def _estimates(recipe: Recipe, folder: Path | None, choices: Sequence[int]) -> list[Estimate]:
    found = find_architecture(recipe.model, random=recipe.weights == "random", size=recipe.sampling.latent_size)
    cost: Footprint = found.footprint
    guidance = found.guidance if recipe.sampling.guidance is None else recipe.sampling.guidance
    steps, halves = recipe.sampling.steps or found.steps, 2 if guidance > 1 else 1
    speed = _INSTANT if folder is None else measure_speed(cost, folder)
    random = recipe.weights == "random"
    return [
        estimate(
            recipe,
            cost,
            speed,
            Plan(steps, halves, working, random, found.companions, found.feature_macs),
            validation_size(recipe.validation, cost, steps * halves, working),
        )
        for working in choices
    ]


def _is_large(model: str) -> bool:
    """Whether it is worth a look at what a build takes: named by a preset, or gigabytes on this machine."""
    if model in architectures():
        return True
    folder = Path(model).expanduser()
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors")] if folder.is_dir() else []
    return sum(sizes) > _LARGE_FILES


def _check_machine(recipe: Recipe, work: Path) -> None:
    """Refuse what this machine cannot hold, unless the recipe says how much it may take."""
    try:
        least = _estimates(recipe, None, (_SMALLEST_WORKING,))[0]
    except ModelError:
        return  # loading it says what is wrong
    memory, disk = machine_memory(), shutil.disk_usage(work).free
    for option, given, needed, there, what in (
        ("--max-ram", recipe.max_ram, least.memory, memory, "memory"),
        ("--max-disk", recipe.max_disk, least.disk, disk, "free disk"),
    ):
        if given is None and there and needed > there:
            hints = [f"{option} {size(needed)} starts it all the same"]
            if not recipe.drawn and recipe.weights == "random":
                hints.append("--random-statistics needs no memory for the model")
            raise ResourceError(
                f"this build is estimated to need {size(needed)} of {what}, and this machine has {size(there)}",
                hint="; ".join([*hints, "--dry-run shows every stage"]),
            )


def machine_memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _refusal(option: str, limit: int, needed: int, found: Estimate, recipe: Recipe) -> ResourceError:
    needs = [(item.memory if option == "--max-ram" else item.disk, item.name) for item in found.stages]
    where = ", ".join(f"{name} {size(need)}" for need, name in sorted(needs, reverse=True)[:3])
    hints = [f"give {size(needed)}"]
    if option == "--max-ram" and recipe.target.value == "trt-rtx":
        hints.append("--target onnx builds no engine")
    if option == "--max-ram" and recipe.training.trains:
        hints.append("--recipe default trains nothing")
    return ResourceError(
        f"{option} is {size(limit)}, and this build is estimated to need {size(needed)}: {where}",
        hint="; ".join(hints) + "; --dry-run shows every stage",
    )
