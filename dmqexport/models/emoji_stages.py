"""The two training stages of the bundled model `emoji`, and the diffusers folder they end in.

First an autoencoder turns 64 × 64 pictures into 4 × 8 × 8 latents; then a UNet and a text encoder learn together to
remove noise from those latents, given the caption. Both start from random weights.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from dmqexport.models.training_state import TrainingState, batch_rows, cosine_rate, iteration_rng

TOKENS: Final = 16
UNKNOWN, START, END = "<unk>", "<|startoftext|>", "<|endoftext|>"
_WORD: Final = "[a-z0-9]+"
_AUTOENCODER, _DENOISER = 0, 1  # the stage number in the seeds

Report = Callable[[str, int, int, float], None]
"""Called after every iteration with the stage's name, the iterations done, all iterations, and the loss."""


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that decides the weights; a checkpoint is only resumed by an equal recipe."""

    seed: int = 0
    pictures: int = 1355  # the first ones of the bundled set; fewer only to try the script out
    autoencoder_iterations: int = 4000
    autoencoder_batch: int = 16
    autoencoder_rate: float = 2e-3
    autoencoder_ema: float = 0.995
    latent_noise: float = 0.05  # on latents of unit variance: smooth enough for a denoiser's small errors
    latent_penalty: float = 0.05  # keeps every latent channel near zero mean and unit variance
    denoiser_iterations: int = 16000
    denoiser_batch: int = 48
    denoiser_rate: float = 1e-3
    denoiser_ema: float = 0.999
    warm_up: int = 200
    weight_decay: float = 1e-3
    caption_drop: float = 0.1  # trains the unconditional branch of classifier-free guidance


def build_tokenizer(captions: Sequence[str]) -> Any:
    """A word-level tokenizer over every word of `captions`, padded to 16 tokens between start and end."""
    words = sorted({word for caption in captions for word in re.findall(_WORD, caption.lower())})
    vocabulary = {token: row for row, token in enumerate([UNKNOWN, START, END, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )


def new_autoencoder() -> Any:
    """An untrained AutoencoderTiny: pictures [N, 3, 64, 64] in [-1, 1] to latents [N, 4, 8, 8]; 0.52 M parameters."""
    widths = (40, 40, 40, 40)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1, 2),
        num_decoder_blocks=(2, 1, 1, 1),
    )


def new_text_encoder(vocabulary_size: int) -> Any:
    """An untrained CLIPTextModel: tokens [N, 16] to states [N, 16, 128]; 0.58 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )


def new_unet() -> Any:
    """An untrained UNet2DConditionModel on latents [N, 4, 8, 8]; 4.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def new_scheduler() -> Any:
    """Stable Diffusion's noise schedule, for training and for sampling alike."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def to_tensor(pictures: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1], channels last: convolutions on CPUs want that layout."""
    pixels = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return pixels.to(device, memory_format=torch.channels_last)


def train_autoencoder(
    pixels: torch.Tensor, recipe: TrainingRecipe, checkpoint: Path, checkpoint_every: int, report: Report
) -> Any:
    """Train, or go on training, the autoencoder on `pixels` float32 [N, 3, 64, 64]; returns it in evaluation mode."""
    torch.manual_seed(recipe.seed)
    autoencoder = new_autoencoder().to(pixels.device)
    state = TrainingState({"vae": autoencoder}, weight_decay=recipe.weight_decay, ema_decay=recipe.autoencoder_ema)
    state.resume(checkpoint, asdict(recipe))
    total, batch = recipe.autoencoder_iterations, min(recipe.autoencoder_batch, len(pixels))
    while state.iteration < total:
        rows = batch_rows(len(pixels), batch, recipe.seed, _AUTOENCODER, state.iteration)
        wanted = pixels[torch.from_numpy(rows).to(pixels.device)].contiguous(memory_format=torch.channels_last)
        latents = autoencoder.encode(wanted).latents
        noise = iteration_rng(recipe.seed, _AUTOENCODER, state.iteration).standard_normal(
            tuple(latents.shape), dtype=np.float32
        )
        noisy = latents + recipe.latent_noise * torch.from_numpy(noise).to(pixels.device)
        loss = _reconstruction_loss(autoencoder.decode(noisy).sample, wanted)
        loss = loss + recipe.latent_penalty * _moment_penalty(latents)
        state.update(loss, cosine_rate(recipe.autoencoder_rate, state.iteration, total, recipe.warm_up), max_norm=1.0)
        if state.iteration % checkpoint_every == 0 or state.iteration == total:
            state.save(checkpoint, asdict(recipe))
        report("autoencoder", state.iteration, total, loss.item())
    state.use_averages()
    autoencoder.eval()
    # The scheduler's noise has unit variance; the factor brings the latents to the same.
    autoencoder.register_to_config(scaling_factor=1.0 / encode(autoencoder, pixels).std().item())
    return autoencoder


def _reconstruction_loss(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squares for the colours that retrieval measures, absolute values and edge differences for sharp outlines."""
    error = got - wanted
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    return 4.0 * error.square().mean() + error.abs().mean() + 0.5 * edges


def _moment_penalty(latents: torch.Tensor) -> torch.Tensor:
    """How far each latent channel is from zero mean and unit variance."""
    means = latents.mean(dim=(0, 2, 3))
    log_variances = torch.log(latents.var(dim=(0, 2, 3)) + 1e-6)
    return means.square().sum() + log_variances.square().sum()


@torch.no_grad()
def encode(autoencoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents float32 [N, 4, 8, 8] of `pixels` [N, 3, 64, 64], before the scaling factor."""
    return torch.cat([autoencoder.encode(part).latents for part in torch.split(pixels, 128)])


@torch.no_grad()
def reconstruction_psnr(autoencoder: Any, pixels: torch.Tensor) -> float:
    """PSNR in dB, of the mean squared error over all of `pixels`, after a trip through the latents."""
    total = 0.0
    for part in torch.split(pixels, 128):
        got = autoencoder.decode(autoencoder.encode(part).latents).sample.clamp(-1, 1)
        total += ((got - part) / 2).square().sum().item()
    return float(-10.0 * np.log10(total / pixels.numel()))


def train_denoiser(
    latents: torch.Tensor,
    captions: Sequence[str],
    tokenizer: Any,
    recipe: TrainingRecipe,
    checkpoint: Path,
    checkpoint_every: int,
    report: Report,
) -> tuple[Any, Any]:
    """Train, or go on training, UNet and text encoder on scaled `latents` [N, 4, 8, 8]; both return in eval mode."""
    torch.manual_seed(recipe.seed + 1)
    device = latents.device
    unet, text_encoder = new_unet().to(device), new_text_encoder(len(tokenizer)).to(device)
    state = TrainingState(
        {"unet": unet, "text_encoder": text_encoder},
        weight_decay=recipe.weight_decay,
        ema_decay=recipe.denoiser_ema,
    )
    state.resume(checkpoint, asdict(recipe))
    encoded = tokenizer([*captions, ""], padding="max_length", max_length=TOKENS, truncation=True)
    tokens = torch.tensor(encoded["input_ids"], device=device)
    scheduler = new_scheduler()
    timesteps_count = int(scheduler.config.num_train_timesteps)
    total, batch = recipe.denoiser_iterations, min(recipe.denoiser_batch, len(latents))
    while state.iteration < total:
        rng = iteration_rng(recipe.seed, _DENOISER, state.iteration)
        rows = batch_rows(len(latents), batch, recipe.seed, _DENOISER, state.iteration)
        # One timestep from each of `batch` equal slices: the loss varies far less than with independent draws.
        slices = (rng.permutation(batch) + rng.random(batch)) / batch
        timesteps = torch.from_numpy((slices * timesteps_count).astype(np.int64)).to(device)
        noise = torch.from_numpy(rng.standard_normal((batch, *latents.shape[1:]), dtype=np.float32)).to(device)
        spoken = np.where(rng.random(batch) < recipe.caption_drop, len(captions), rows)
        noisy = scheduler.add_noise(latents[torch.from_numpy(rows).to(device)], noise, timesteps)
        states = text_encoder(tokens[torch.from_numpy(spoken).to(device)])[0]
        loss = F.mse_loss(unet(noisy, timesteps, states).sample, noise)
        state.update(loss, cosine_rate(recipe.denoiser_rate, state.iteration, total, recipe.warm_up), max_norm=1.0)
        if state.iteration % checkpoint_every == 0 or state.iteration == total:
            state.save(checkpoint, asdict(recipe))
        report("denoiser", state.iteration, total, loss.item())
    state.use_averages()
    return unet.eval(), text_encoder.eval()


def write_pipeline(folder: Path, autoencoder: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> None:
    """Write a StableDiffusionPipeline folder in fp16 that both transformers 4 and 5 open; replaces `folder` whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (unet, autoencoder, text_encoder):
        module.cpu().half()  # each on its own: the pipeline's own `to` warns that no CPU runs half precision
    pipeline.save_pretrained(partial)
    # transformers 5 renamed the tokenizer class and dropped a prefix from CLIP's weight names; version 4 knows only the
    # old names, version 5 reads both.
    _edit_json(partial / "model_index.json", {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    _edit_json(partial / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    weights = partial / "text_encoder" / "model.safetensors"
    save_file(
        {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(weights).items()},
        weights,
        metadata={"format": "pt"},
    )
    # A declared float16 would make a plain from_pretrained mix half and single precision, which no CPU runs.
    _edit_json(partial / "text_encoder" / "config.json", {"dtype": "float32"})
    # diffusers saves an attribute that it then warns about when it reads the file back.
    _edit_json(partial / "vae" / "config.json", {}, drop=("block_out_channels",))
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes files that only their owner reads
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _edit_json(path: Path, changes: dict[str, object], drop: Sequence[str] = ()) -> None:
    """Change some keys of a JSON file and leave the rest as it is."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    for key in drop:
        content.pop(key, None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
