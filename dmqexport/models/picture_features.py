"""What the bundled model's own autoencoder sees in a picture: the features that its Fréchet distance is taken over."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dmqexport.errors import ModelError
from dmqexport.models.loading import LoadedModel

EXTRACTOR: Final = "emoji-autoencoder-40"
"""Last feature map of the bundled autoencoder's encoder (40 channels, 8 × 8), averaged over the picture: 40 features.

The usual extractor (InceptionV3) was trained on photographs and takes 2,048 features, ten times as many as there are
pictures. This one was trained on the very pictures that the model learns, needs no download, and pools like the
64-feature variant of the usual one.
"""

DIMENSION: Final = 40
_BATCH: Final = 64


def picture_features(loaded: LoadedModel, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Features float64 [N, 40] of uint8 [N, H, W, 3]; raises ModelError for another autoencoder or other pictures."""
    autoencoder: Any = getattr(loaded.pipeline, "vae", None)
    layers = getattr(getattr(autoencoder, "encoder", None), "layers", None)
    if layers is None or getattr(layers[-1], "in_channels", None) != DIMENSION:
        raise ModelError(
            f"{loaded.name} has no autoencoder with {DIMENSION} features, which {EXTRACTOR} reads",
            hint="only the bundled model has a Fréchet distance",
        )
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or len(pictures) == 0:
        raise ModelError(
            f"pictures are {pictures.dtype} {list(pictures.shape)}, expected uint8 [N, H, W, 3] with N of at least 1"
        )
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), _BATCH):
            part = torch.from_numpy(pictures[start : start + _BATCH].copy())
            pixels = part.permute(0, 3, 1, 2).to(torch.float32) / 255  # the encoder's own range, [0, 1]
            found.append(layers[:-1](pixels).mean(dim=(2, 3)).double().numpy())
    return np.concatenate(found)
