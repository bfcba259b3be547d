"""The bundled model: complete, small, loadable offline; its training script resumes to the same bits."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from dmqexport.errors import ModelError
from dmqexport.models import emoji
from dmqexport.models.emoji_stages import TrainingRecipe, build_tokenizer
from dmqexport.models.emoji_training import evaluate, train
from dmqexport.models.training_state import TrainingState, batch_rows, cosine_rate
from dmqexport.report.retrieval import retrieval_accuracy

TINY = TrainingRecipe(
    pictures=6, autoencoder_iterations=4, autoencoder_batch=2, denoiser_iterations=4, denoiser_batch=2, warm_up=2
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny batches gain nothing from threads, and lose much where other test workers hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded = StableDiffusionPipeline.from_pretrained(emoji.pipeline_folder(), low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_importing_the_package_loads_no_framework() -> None:
    probe = (
        "import sys, dmqexport.models.emoji; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_pictures_and_captions_belong_together() -> None:
    pictures, captions = emoji.images(), emoji.captions()
    assert (pictures.shape, pictures.dtype, len(captions)) == ((1355, 64, 64, 3), np.uint8, 1355)
    assert all(captions)
    with pytest.raises(ValueError, match="read-only"):
        pictures[0] = 0
    # A row that anyone can judge: the red heart is red, on white.
    heart = pictures[captions.index("heavy black heart")]
    assert heart[32, 32, 0] > 180
    assert heart[32, 32, 1] < 100
    assert heart[0, 0].tolist() == [255, 255, 255]


def test_licence_notices_travel_with_the_weights() -> None:
    folder = emoji.pipeline_folder().parent
    assert "Apache License" in (folder / "NOTICE").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE" in (folder / "LICENSE.noto-emoji.txt").read_text(encoding="utf-8")


def test_model_fits_in_16_megabytes() -> None:
    assert sum(file.stat().st_size for file in emoji.pipeline_folder().parent.rglob("*") if file.is_file()) < 16 * 2**20


def test_retrieval_indices_are_a_fixed_prefix() -> None:
    assert emoji.retrieval_indices(3).tolist() == [761, 603, 12]
    assert emoji.retrieval_indices()[:3].tolist() == [761, 603, 12]
    assert len(set(emoji.retrieval_indices(1355).tolist())) == 1355
    with pytest.raises(ModelError, match="1356"):
        emoji.retrieval_indices(1356)


def test_training_pictures_retrieve_themselves_and_survive_noise() -> None:
    gallery, rows = emoji.images(), emoji.retrieval_indices(50)
    assert retrieval_accuracy(gallery[rows], rows, gallery) == 1.0
    noise = np.random.default_rng(1).normal(0.0, 20.0, gallery[rows].shape)
    noisy = np.clip(gallery[rows] + noise, 0, 255).astype(np.uint8)
    assert retrieval_accuracy(noisy, rows, gallery) >= 0.96
    assert retrieval_accuracy(255 - gallery[rows], rows, gallery) <= 0.04


def test_pipeline_draws_a_picture_as_it_is_loaded(pipeline: Any) -> None:
    drawn = pipeline("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    assert drawn.images.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn.images).all()


def test_pipeline_is_single_precision_without_being_asked(pipeline: Any) -> None:
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


def test_pipeline_knows_every_caption(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    assert tokenizer.model_max_length == 16
    encoded = tokenizer(emoji.captions(), padding="max_length", truncation=True)["input_ids"]
    assert {len(tokens) for tokens in encoded} == {16}
    assert not any(tokenizer.unk_token_id in tokens for tokens in encoded)
    assert tokenizer("Unheard-of apple").input_ids[1] == tokenizer.unk_token_id


def test_training_builds_the_bundled_tokenizer(pipeline: Any) -> None:
    assert build_tokenizer(emoji.captions()).get_vocab() == pipeline.tokenizer.get_vocab()


@pytest.mark.slow
def test_bundled_model_retrieves_its_pictures() -> None:
    assert evaluate(emoji.pipeline_folder(), count=20, batch=20).top1 >= 0.75


class _KilledError(Exception):
    """Stands for a killed process."""


def _silent(stage: str, done: int, total: int, loss: float) -> None:
    assert 0 < done <= total
    assert np.isfinite(loss)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), TINY, _silent, checkpoint_every=2)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}.{name}": tensor
        for file in folder.glob("*/*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_training_writes_the_same_files_and_configuration_as_the_bundle(uninterrupted: Path) -> None:
    bundled, trained = emoji.pipeline_folder(), uninterrupted
    names = {file.relative_to(bundled) for file in bundled.rglob("*") if file.is_file()}
    assert {file.relative_to(trained) for file in trained.rglob("*") if file.is_file()} == names
    ours, theirs = _weights(trained), _weights(bundled)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_interrupted_training_resumes_to_the_same_bits(tmp_path: Path, uninterrupted: Path, stage: str) -> None:
    def killed_after_three(at: str, done: int, total: int, loss: float) -> None:
        if (at, done) == (stage, 3):
            raise _KilledError

    with pytest.raises(_KilledError):
        train(tmp_path, TINY, killed_after_three, checkpoint_every=2)
    seen: list[tuple[str, int]] = []
    resumed = train(tmp_path, TINY, lambda at, done, total, loss: seen.append((at, done)), checkpoint_every=2)
    assert seen[0] == (stage, 3), "the iteration after the last checkpoint comes again, and none before it"
    expected, got = _weights(uninterrupted), _weights(resumed)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    _linear_state().save(path, {"seed": 0})
    with pytest.raises(ModelError, match="seed was 0, now 1"):
        _linear_state().resume(path, {"seed": 1})


def test_half_written_checkpoint_is_refused_and_leftovers_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.with_name(path.name + ".partial").write_bytes(b"left by a killed run")
    assert not _linear_state().resume(path, {})
    path.write_bytes(b"\x10")
    with pytest.raises(ModelError, match="cannot be read"):
        _linear_state().resume(path, {})


def _linear_state() -> TrainingState:
    return TrainingState({"layer": torch.nn.Linear(2, 2)}, weight_decay=0.0, ema_decay=0.9)


def test_batches_visit_every_picture_once_an_epoch() -> None:
    rows = np.concatenate([batch_rows(7, 3, 0, 0, iteration) for iteration in range(7)])
    assert [sorted(epoch) for epoch in rows.reshape(3, 7).tolist()] == [list(range(7))] * 3


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [cosine_rate(1.0, iteration, 100, warm_up=10) for iteration in range(101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == max(rates) == 1.0
    assert rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_evaluating_a_folder_without_a_pipeline_teaches(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        evaluate(tmp_path)
