"""The few classes that diffusers lacks and this package brings: where they live, as model_index.json names them."""

import importlib
from typing import Any, Final

COMPONENTS: Final[dict[str, str]] = {
    "FixedHeadsUNet2DModel": "dmqexport.models.fixed_heads_unet",
    "ClassEmbedder": "dmqexport.models.class_pipeline",
}
PIPELINES: Final[dict[str, str]] = {"LdmClassPipeline": "dmqexport.models.class_pipeline"}


def is_own(library: str, class_name: str) -> bool:
    """Whether model_index.json's entry [library, class_name] is one of ours; nothing else of any library is run."""
    return COMPONENTS.get(class_name) == library


def model_class(class_name: str) -> Any:
    """The class of a denoiser, another component or a pipeline by name: ours, else diffusers'; None when unknown."""
    import diffusers

    module = {**COMPONENTS, **PIPELINES}.get(class_name)
    return getattr(importlib.import_module(module) if module else diffusers, class_name, None)
