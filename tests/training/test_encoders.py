"""Runs whose latents an encoder makes of images: what they train on, exactness, and refusals."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mixflow_fast.config.data_sections import EncoderConfig
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.data.dataset import mirrored, without_flips
from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import list_source
from mixflow_fast.kernels.interpolate import Moments, sample_moments
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import load_model
from mixflow_fast.models.autoencoders.rae import RAEEncoder
from mixflow_fast.models.autoencoders.sdvae import SDVAE
from mixflow_fast.models.teacher import Teacher
from mixflow_fast.objective import MixFlow
from mixflow_fast.reports.previews import preview_file, write_preview
from mixflow_fast.reports.run_report import write_run_report
from mixflow_fast.training.build import build_data, build_model, check
from mixflow_fast.training.encoders import build_encoder, image_size
from mixflow_fast.training.nonfinite_guard import TrainingDiverged
from mixflow_fast.training.rehearsal import rehearse
from mixflow_fast.training.trainer import Trainer, train
from tests.support.autoencoder import write_autoencoder
from tests.support.configs import preview_options
from tests.support.runs import assert_same_bits, checkpoint_leaves, first_positions
from tests.support.teacher import WIDTH, save_teacher
from tests.support.train_ranks import TINY

SIDE, SIZE = 2, 32  # of a latent and of an image
MODEL = (
    f"model={{name: DiTDH-S, input_size: {SIDE}, in_channels: {WIDTH}, num_classes: 2, "
    "depth: [1, 1], hidden_size: [32, 32], num_heads: [2, 1]}"
)

IMAGES_OF_64 = ["data.kind=images", "model.input_size=4", "encoder.stats=null"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in class folders, an encoder and its statistics."""
    root = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    for name, count in (("cat", 5), ("dog", 4)):
        (root / "images" / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    save_teacher(root / "encoder", "dinov2_with_registers")
    g = torch.Generator().manual_seed(0)
    shape = (WIDTH, SIDE, SIDE)
    stats = {"mean": torch.randn(shape, generator=g), "var": torch.rand(shape, generator=g) + 0.1}
    torch.save(stats, root / "stat.pt")
    return root


def rae(out: Path, files: Path, *overrides: str) -> Config:
    """A tiny DiT-DH on latents of 2 x 2 places that are made in each step."""
    own = [
        MODEL,
        f"data={{kind: folder, path: {files / 'images'}, flip: true}}",
        f"encoder={{kind: rae, path: {files / 'encoder'}, stats: {files / 'stat.pt'}}}",
        "train.images=24",
        f"out={out}",
    ]
    tiny = [setting for setting in TINY if not setting.startswith("model.")]
    return load_config("photos", [*tiny, *own, *overrides])


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 2)])
def test_resume_is_bit_identical_and_no_checkpoint_holds_the_encoder(
    tmp_path: Path, files: Path, precision: str, stage: int
) -> None:
    extra = [f"train.precision={precision}", f"train.zero_stage={stage}", "train.keep_last=1"]
    extra += ["train.microbatch_size=4", f"encoder.precision={precision}"]
    if watched := stage == 0:
        extra += ["train.validate_every=2", "train.validate_examples=2", "train.preview_every=2"]
        extra += ["train.preview_steps=2", "train.previews=2"]
    whole = Trainer(rae(tmp_path / "whole", files, *extra), quiet=True)
    before = [p.clone() for p in whole.inputs.encoder.model.parameters()]
    result = whole.run()
    train(rae(tmp_path / "parts", files, *extra, "train.images=16"), quiet=True)
    train(rae(tmp_path / "parts", files, *extra), quiet=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    rows = [
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert (tmp_path / "whole/previews/step_00000002.png").is_file() == watched
    content = torch.load(result.weights, weights_only=True)
    assert content["model"].keys() == build_model(whole.config.model).state_dict().keys()
    sizes = sum(leaf.numel() for leaf in content["model"].values())
    moments = [leaf for key, leaf in checkpoint_leaves(whole.out).items() if "exp_avg_sq" in key]
    # ZeRO pads the flat partition by a few numbers; the encoder has 30 thousand.
    assert 0 < sum(leaf.numel() for leaf in moments) < sizes + 64
    for was, now in zip(before, whole.inputs.encoder.model.parameters(), strict=True):
        assert torch.equal(was, now) and now.grad is None and not now.requires_grad


def test_it_trains_on_latents_of_the_images_mirrored_as_they_are(
    tmp_path: Path, files: Path
) -> None:
    trainer = Trainer(rae(tmp_path / "run", files), quiet=True)
    seen = []
    trainer.on_step = lambda step, made, means: seen.extend(made)
    trainer.run()
    indices, positions = first_positions(trainer)
    names = sorted((files / "images").rglob("*.png"))
    pixels = torch.stack(
        [torch.from_numpy(np.array(Image.open(names[i]))) for i in indices.tolist()]
    ).permute(0, 3, 1, 2)
    flips = mirrored(positions, trainer.config.train.seed)
    assert 0 < flips.sum() < len(flips)
    pixels = torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
    encoder = RAEEncoder(files / "encoder", SIDE, stats=files / "stat.pt")
    assert torch.equal(seen[0].it.x1, encoder(pixels))
    assert not torch.allclose(seen[0].it.x1, encoder(pixels.flip(-1)), atol=0.1)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert f"rae {files / 'encoder'}, " in text and "latents 32 x 2 x 2, normalised by" in text


def test_a_run_is_that_on_latents_which_were_encoded_before(tmp_path: Path, files: Path) -> None:
    """Also what it validates on, which is not mirrored."""
    how = ["data.flip=false", "train.validate_every=3", "train.validate_examples=4"]
    train(rae(tmp_path / "images", files, *how), quiet=True)
    config = rae(tmp_path / "latents", files, *how[1:])
    dataset = build_data(config.data, config.model, config.encoder)
    every = torch.arange(len(dataset))
    batch = without_flips(dataset).get(every, every, 0)
    encoder = RAEEncoder(files / "encoder", SIDE, stats=files / "stat.pt")
    np.savez(tmp_path / "set.npz", latents=encoder(batch.images), labels=batch.y)
    data = f"data={{kind: latents, path: {tmp_path / 'set.npz'}}}"
    tiny = [setting for setting in TINY if not setting.startswith(("model.", "data."))]
    given = [*tiny, MODEL, data, *how[1:], "train.images=24", f"out={tmp_path / 'latents'}"]
    train(load_config("photos", given), quiet=True)
    both = [tmp_path / name / "metrics.jsonl" for name in ("images", "latents")]
    losses = [[row["loss"] for row in read_metrics(path)] for path in both]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    seen = [read_metrics(path, "validation") for path in both]
    losses = [[row["model"]["loss_by_t"] for row in rows] for rows in seen]
    assert np.shape(losses) == (2, 2, 16)
    assert np.allclose(losses[0], losses[1], rtol=1e-5)


def test_prepared_images_are_encoded_as_those_of_the_folder(tmp_path: Path, files: Path) -> None:
    prepare(list_source(files / "images"), tmp_path / "set", Settings(size=SIZE), threads=1)
    seen = []
    for kind, path in (("folder", files / "images"), ("images", tmp_path / "set")):
        config = rae(tmp_path / kind, files, f"data.kind={kind}", f"data.path={path}")
        trainer = Trainer(config, quiet=True)
        trainer.on_step = lambda step, made, means: seen.append(made[0])
        trainer.run()
    for one, other in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(one.it.x1, other.it.x1) and torch.equal(one.loss, other.loss)
    with pytest.raises(ValueError, match="prepared at 32 pixels, asked for are 64"):
        rehearse(rae(tmp_path / "images", files, *IMAGES_OF_64, f"data.path={tmp_path / 'set'}"))


def sdvae(out: Path, files: Path, *overrides: str) -> Config:
    """A tiny REPA SiT on latents of 16 x 16 places, whose teacher sees the same images."""
    own = [
        f"model={{name: SiT-S/4, input_size: {SIZE // 2}, in_channels: 4, num_classes: 2, "
        "depth: 2, hidden_size: 32, num_heads: 2, encoder_depth: 1, projector_dim: 16, "
        f"z_dims: [{WIDTH}]}}",
        f"encoder={{kind: sdvae, path: {files / 'vae'}}}",
        f"teacher.path={files / 'encoder'}",
        "objective.alignment_weight=0.5",
    ]
    return rae(out, files, *own, *overrides)


def test_the_sdvaes_posterior_is_drawn_by_position_and_a_teacher_sees_the_same_images(
    tmp_path: Path, files: Path
) -> None:
    write_autoencoder(files / "vae")
    watched = ["train.preview_every=1", "train.previews=1", "train.preview_steps=1"]
    watched += [f"train.preview_decoder={files / 'vae'}"]
    config = sdvae(tmp_path / "run", files, *watched)
    trainer = Trainer(config, quiet=True)
    seen = []
    trainer.on_step = lambda step, made, means: seen.extend(made)
    trainer.run()
    indices, positions = first_positions(trainer)
    batch = trainer.dataset.get(indices, positions, config.train.seed)
    moments = SDVAE(files / "vae", SIZE)(batch.images)
    x1 = sample_moments(moments, config.train.seed, positions)
    assert isinstance(moments, Moments) and x1.shape == (8, 4, SIZE // 2, SIZE // 2)
    it = MixFlow(gamma=0.5, clock=trainer.model.clock).prepare(x1, ids=positions)
    assert torch.allclose(seen[0].it.x, it.x, atol=1e-5)
    features = Teacher(files / "encoder", 4, precision=config.train.precision)(batch.images)
    (z,) = build_model(config.model)(seen[0].it.x, seen[0].it.t, seen[0].y)[1]
    expected = -F.cosine_similarity(z.double(), features.double(), dim=-1).mean().item()
    assert seen[0].alignment.item() == pytest.approx(expected, abs=1e-5)

    options, picture = preview_options(config), preview_file(tmp_path / "run", trainer.step)
    net = load_model(tmp_path / "run", "ema")
    write_preview(net, options, tmp_path / "again.png", options.load_decoder())
    assert picture.read_bytes() == (tmp_path / "again.png").read_bytes()
    assert Image.open(picture).size == (2 * SIZE, 2 * SIZE)
    page = write_run_report(tmp_path / "run")
    assert "decoded by vae" in page.read_text()


def test_without_the_decoder_of_its_previews_a_run_goes_on(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_autoencoder(files / "vae")
    lost = ["train.preview_every=1", "train.images=8", f"train.preview_decoder={tmp_path / 'x'}"]
    result = train(sdvae(tmp_path / "run", files, *lost))
    assert result.weights is not None
    assert (
        "warning: no preview of step 1 (ValueError: train.preview_decoder "
        in capsys.readouterr().err
    )


def test_latents_of_an_sdvae_that_do_not_fit(tmp_path: Path, files: Path) -> None:
    write_autoencoder(files / "vae")
    config = sdvae(tmp_path, files, "data.size=64")
    with pytest.raises(ValueError, match=r"\(3, 64, 64\), encoder.kind=sdvae needs \(3, 32, 32\)"):
        rehearse(config)
    with pytest.raises(
        ValueError, match=r"latents of \(4, 16, 16\), the model takes \(8, 16, 16\)"
    ):
        check(sdvae(tmp_path, files, "model.in_channels=8"))


def test_a_rehearsal_names_the_encoder_and_its_memory(tmp_path: Path, files: Path) -> None:
    encoder = RAEEncoder(files / "encoder", SIDE)
    count = sum(p.numel() for p in encoder.model.parameters())
    lines = rehearse(rae(tmp_path / "run", files, "encoder.precision=bf16"))
    (line,) = (line for line in lines if line.startswith("encoder: "))
    assert f"{count:,} parameters, {2 * count / 2**20:,.1f} MiB per rank in bf16" in line
    assert list(tmp_path.iterdir()) == []


def test_a_bad_step_is_examined_with_the_latents_it_saw(tmp_path: Path, files: Path) -> None:
    config = rae(tmp_path / "run", files, "optim.lr=1e36", "train.images=80")
    with pytest.raises(TrainingDiverged, match=re.escape("sample")):
        train(config, quiet=True)
    (file,) = (tmp_path / "run/nonfinite").rglob("rank_0.pt")
    content = torch.load(file, weights_only=True)
    assert content["x1"].shape == (8, WIDTH, SIDE, SIDE) and content["x1"].isfinite().all()


def test_sizes_follow_from_the_models(tmp_path: Path, files: Path) -> None:
    config = rae(tmp_path, files)
    assert image_size(config.encoder, config.model) == SIZE
    assert image_size(EncoderConfig(), config.model) == SIDE
    assert build_data(config.data, config.model, config.encoder).shape == (3, SIZE, SIZE)
    assert build_encoder(config.encoder, config.model).shape == (WIDTH, SIDE, SIDE)
    assert build_encoder(EncoderConfig(), config.model) is None


def test_latents_that_are_not_the_models_are_refused(tmp_path: Path, files: Path) -> None:
    config = rae(tmp_path, files, "model.in_channels=16")
    message = r"makes latents of \(32, 2, 2\), the model takes \(16, 2, 2\): set model.in_channels="
    for find in (check, rehearse):
        with pytest.raises(ValueError, match=message + "32"):
            find(config)
    with pytest.raises(ValueError, match=r"stat.pt.* the latents are \(32, 4, 4\)"):
        rehearse(rae(tmp_path, files, "model.input_size=4"))
    with pytest.raises(ValueError, match="encoder.path .*does not exist"):
        check(rae(tmp_path, files, "encoder.path=nowhere"))
