"""The tiny pipelines that other tests begin with are official ones: diffusers runs them."""

import diffusers
import pytest

from tests.support.text_to_image import write_pipeline

PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "z_image": "ZImagePipeline",
}


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_loads_and_runs_what_is_written(family, tmp_path):
    folder = write_pipeline(tmp_path / "model", family)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == PIPELINES[family]
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red fox", height=64, width=48, num_inference_steps=2, max_sequence_length=32
    ).images[0]
    assert image.size == (48, 64) and len(image.getcolors(64 * 48)) > 100


def test_sd3_loads_without_its_t5(tmp_path):
    folder = write_pipeline(tmp_path / "model", t5=False)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    assert pipeline.text_encoder_3 is None and pipeline.text_encoder is not None
