"""CompVis' class-conditional latent diffusion as a diffusers pipeline; diffusers has none of that kind."""

from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ClassEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers comes without types
    """A vector a class; the last class means none (CompVis' `ClassEmbedder`)."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        """`num_classes` counts the class that means none."""
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Class numbers int64 [N] → encoder_hidden_states float32 [N, 1, embedding_dim]."""
        vectors: Tensor = self.embedding(labels)
        return vectors[:, None]


class LdmClassPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers comes without types
    """Pictures of a class, sampled in the latent space of a vector-quantized autoencoder."""

    def __init__(self, vqvae: Any, class_embedder: Any, unet: Any, scheduler: Any) -> None:
        """Register the four components under these names."""
        super().__init__()
        self.register_modules(vqvae=vqvae, class_embedder=class_embedder, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        output_type: str = "np",
    ) -> ImagePipelineOutput:
        """One picture a label; images are [N, H, W, 3] in [0, 1], or latents [N, C, h, w] for output_type "latent".

        guidance_scale: classifier-free, off at 1 or below; the unguided half is the first of a batch. Raises
        ValueError for a label that is no class.
        """
        null = int(self.class_embedder.config.num_classes) - 1
        wrong = [label for label in class_labels if not 0 <= label < null]
        if wrong:
            raise ValueError(f"class {wrong[0]} does not exist, this model has 0 to {null - 1}")
        guided = guidance_scale > 1
        labels = torch.tensor(([null] * len(class_labels) if guided else []) + list(class_labels))
        context = self.class_embedder(labels)
        config = self.unet.config
        latents = _noise((len(class_labels), config.in_channels, config.sample_size, config.sample_size), generator)
        latents = latents * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = torch.cat([latents, latents]) if guided else latents
            model_input = self.scheduler.scale_model_input(model_input, t)
            noise = self.unet(model_input, t, encoder_hidden_states=context, return_dict=False)[0]
            if guided:
                without, with_class = noise.chunk(2)
                noise = without + guidance_scale * (with_class - without)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        pictures = self.vqvae.decode(latents / self.vqvae.config.scaling_factor, return_dict=False)[0]
        pictures = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(pictures) if output_type == "pil" else pictures)


def _noise(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    if isinstance(generator, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=one) for one in generator])
    return torch.randn(shape, generator=generator)
