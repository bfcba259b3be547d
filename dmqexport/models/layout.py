"""What a model folder says it is: its pipeline class and the folder, class and files of each component."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmqexport.errors import ModelError
from dmqexport.models.family import check_family, family_of
from dmqexport.models.own_classes import COMPONENTS, is_own
from dmqexport.models.pipeline_kinds import KINDS, PipelineKind, kind_of
from dmqexport.models.weight_files import WeightFiles, check_safetensors, file_errors, find_weights, read_json

_STEMS: Final = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclass(frozen=True)
class Component:
    """One part of a pipeline; `weights` is None for schedulers and tokenizers."""

    name: str
    library: str
    class_name: str
    folder: Path
    weights: WeightFiles | None


@dataclass(frozen=True)
class Layout:
    """A checked model folder. kind: None for a bare denoiser; labels: names of classes, by number in words."""

    folder: Path
    kind: PipelineKind | None
    components: dict[str, Component]
    denoiser: str
    labels: dict[str, str] | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file that makes up the model, as (name that does not depend on the place, path), in a fixed order."""
        for name, component in sorted(self.components.items()):
            if component.weights is not None:
                paths = [component.folder / "config.json", *component.weights.files]
            elif name == "scheduler":
                paths = [component.folder / "scheduler_config.json"]
            else:
                paths = sorted(path for path in component.folder.iterdir() if path.is_file())
            for path in paths:
                yield f"{name}/{path.name}", path


def read_layout(folder: Path, replaced: frozenset[str] = frozenset(), variant: str | None = None) -> Layout:
    """Read `folder`'s index and check every weight file's header; nothing is loaded.

    replaced: components that come from elsewhere and need no weights here; of a bare denoiser, any means itself.
    variant: "fp16" or "bf16" to take where there are several; the denoiser must have it.

    Raises ModelError for a folder that is no model, an unsupported pipeline or denoiser, missing, pickled, truncated
    or damaged files, and components whose class is custom code.
    """
    with file_errors(folder):
        if (folder / "model_index.json").is_file():
            layout = _pipeline(folder, replaced, variant)
        elif (folder / "config.json").is_file():
            layout = _bare(folder, variant, weights=not replaced)
        else:
            raise ModelError(
                f"{folder} is no model folder: it has neither model_index.json nor config.json",
                hint="give the folder that diffusers' save_pretrained wrote",
            )
    stored = layout.components[layout.denoiser].weights
    if variant is not None and stored is not None and stored.variant != variant:
        raise ModelError(
            f"{folder} has no {variant} weights of its {layout.denoiser}, only {stored.variant or 'plain'} ones",
            hint="leave --variant out",
        )
    for component in layout.components.values():
        for path in component.weights.files if component.weights is not None else ():
            check_safetensors(path)
    return layout


def _pipeline(folder: Path, replaced: frozenset[str], variant: str | None) -> Layout:
    index_path = folder / "model_index.json"
    index = read_json(index_path)
    kind = kind_of(index.get("_class_name"))
    if kind is None:
        raise ModelError(
            f"{index_path}: pipeline {index.get('_class_name')!r} is not supported",
            hint=f"supported: {', '.join(KINDS)}; or give the folder of its denoiser alone",
        )
    components = {}
    for name in (*kind.components, *kind.optional):
        entry = index.get(name)
        if name in kind.optional and (entry is None or entry == [None, None]):
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            raise ModelError(
                f"{index_path} names no {name}; {kind.class_name} needs one", hint="copy the complete folder"
            )
        library, class_name = entry
        if library not in _STEMS and not is_own(library, class_name):
            raise ModelError(
                f"{index_path}: {name} is {library}.{class_name}; code that comes with a model is not run",
                hint="only components of diffusers and transformers are supported",
            )
        # Early hub models keep the files of their single network beside the index, without component folders.
        place = folder / name if (folder / name).is_dir() else folder
        if place == folder and len(kind.components) > 2:
            raise ModelError(f"{folder} has no folder {name}", hint="copy the complete diffusers folder")
        weights = None
        if name != "scheduler" and not name.startswith("tokenizer"):
            if name == kind.denoiser:
                check_family(class_name)
            stem = _STEMS.get(library, _STEMS["diffusers"])
            weights = find_weights(place, stem, variant) if name not in replaced else None
        components[name] = Component(name, library, class_name, place, weights)
    if not (components["scheduler"].folder / "scheduler_config.json").is_file():
        raise _no_scheduler(folder, [components["scheduler"].folder])
    labels = index.get("id2label")
    return Layout(folder, kind, components, kind.denoiser, labels if isinstance(labels, dict) else None)


def _bare(folder: Path, variant: str | None, *, weights: bool) -> Layout:
    config = read_json(folder / "config.json")
    class_name = str(config.get("_class_name"))
    check_family(class_name)
    family = family_of(class_name, config)
    places = [folder / "scheduler", folder, folder.parent / "scheduler"]
    scheduler = next((place for place in places if (place / "scheduler_config.json").is_file()), None)
    if scheduler is None:
        raise _no_scheduler(folder, places)
    library = COMPONENTS.get(class_name, "diffusers")
    stored = find_weights(folder, _STEMS["diffusers"], variant) if weights else None
    components = {
        family.component: Component(family.component, library, class_name, folder, stored),
        "scheduler": Component("scheduler", "diffusers", "", scheduler, None),
    }
    return Layout(folder, None, components, family.component)


def _no_scheduler(folder: Path, places: list[Path]) -> ModelError:
    looked = ", ".join(str(place / "scheduler_config.json") for place in places)
    return ModelError(
        f"{folder} has no scheduler: looked for {looked}",
        hint="the noise schedule is part of the model and is not guessed; save the one it was trained with: "
        f"DDPMScheduler(num_train_timesteps=..., beta_schedule=...).save_pretrained({str(folder / 'scheduler')!r})",
    )
