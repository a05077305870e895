"""REPA training with a frozen teacher on real DeepSpeed: the loss, exactness, and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.config.validate import validate
from mixflow_fast.data import BatchLoader
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import SiT
from mixflow_fast.models.teacher import Teacher
from mixflow_fast.training.build import build_model, check
from mixflow_fast.training.trainer import Trainer, train
from tests.support.runs import (
    CountReads,
    Prefetched,
    assert_same_bits,
    checkpoint_leaves,
    first_positions,
)
from tests.support.teacher import images, save_teacher
from tests.support.train_ranks import TINY

REPA = [
    *TINY,
    "model.z_dims=[32]",
    "model.encoder_depth=1",
    "model.projector_dim=16",
    "objective.alignment_weight=0.5",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def repa(out: Path, teacher: Path, *overrides: str) -> Config:
    """A tiny REPA SiT of 4 x 4 tokens on photo crops, and the teacher that sees 56 x 56 pixels."""
    return load_config(
        "photos", [*REPA, "train.images=24", f"teacher.path={teacher}", f"out={out}", *overrides]
    )


def latents(root: Path, teacher: Path) -> list[str]:
    """Latents with images, and the features of these images: the overrides to train on them."""
    g = np.random.default_rng(0)
    pixels = images(16, 32, seed=3)
    labels = np.arange(16) % 2
    np.savez(root / "set.npz", latents=g.normal(size=(16, 4, 8, 8)).astype("f4"), labels=labels)
    np.save(root / "images.npy", pixels.numpy())
    np.save(root / "features.npy", Teacher(teacher, 4)(pixels).numpy())
    return [
        "model={name: SiT-S/2, input_size: 8, in_channels: 4, num_classes: 2, depth: 2, "
        "hidden_size: 32, num_heads: 2, z_dims: [32], encoder_depth: 1, projector_dim: 16}",
        f"data={{kind: latents, path: {root / 'set.npz'}}}",
    ]


def rows(out: Path) -> list[dict]:
    return read_metrics(out / "metrics.jsonl")


def test_the_loss_is_flow_plus_half_the_alignment_and_goes_down(
    tmp_path: Path, teacher: Path
) -> None:
    config = repa(tmp_path / "on", teacher, "train.images=320", "optim.lr=3e-3")
    trainer = Trainer(config, quiet=True)
    trainer.run()
    found = rows(tmp_path / "on")
    plain = ["objective.alignment_weight=0", "teacher.path=null", "train.images=8"]
    train(repa(tmp_path / "off", teacher, *plain), quiet=True)
    (flow,) = rows(tmp_path / "off")
    assert "alignment" not in flow

    batch = trainer.examples.get(*first_positions(trainer), seed=0)
    assert not torch.equal(batch.x, batch.x.flip(-1))
    model = build_model(config.model)
    it = trainer.mix.prepare(batch.x, ids=batch.positions)
    z = model(it.x, it.t, batch.y)[1][0]
    # What the crops become without going through the library's preprocessing.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    unit = ((batch.x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    pixels = F.interpolate(unit, (56, 56), mode="bicubic")
    target = Teacher(teacher, 4).model(pixel_values=pixels).last_hidden_state[:, 1:]
    expected = -F.cosine_similarity(z.double(), target.double(), dim=-1).mean().item()
    assert found[0]["alignment"] == pytest.approx(expected, abs=1e-6)
    assert found[0]["loss"] == pytest.approx(flow["loss"] + 0.5 * expected, abs=1e-6)

    def mean_of(key: str, part: slice) -> float:
        return sum(row[key] for row in found[part]) / len(found[part])

    assert len(found) == 40
    for key, least in (("loss", 0.1), ("alignment", 0.1)):
        assert mean_of(key, slice(-8, None)) < mean_of(key, slice(0, 4)) - least


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 2)])
def test_resume_is_bit_identical_and_no_checkpoint_holds_the_teacher(
    tmp_path: Path, teacher: Path, precision: str, stage: int
) -> None:
    extra = [f"train.precision={precision}", f"train.zero_stage={stage}", "train.keep_last=1"]
    extra += ["train.microbatch_size=4", "optim.grad_clip=0.5", "objective.alignment_input=label"]
    whole = Trainer(repa(tmp_path / "whole", teacher, *extra), quiet=True)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {p.dtype for p in whole.alignment.teacher.model.parameters()} == {dtype}
    before = [p.clone() for p in whole.alignment.teacher.model.parameters()]
    result = whole.run()
    train(repa(tmp_path / "parts", teacher, *extra, "train.images=16"), quiet=True)
    train(repa(tmp_path / "parts", teacher, *extra), quiet=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    for a, b in zip(*(rows(tmp_path / name) for name in ("whole", "parts")), strict=True):
        assert (a["step"], a["loss"], a["alignment"]) == (b["step"], b["loss"], b["alignment"])

    content = torch.load(result.weights, weights_only=True)
    names = build_model(whole.config.model).state_dict().keys()
    assert content["model"].keys() == content["ema"].keys() == names
    sizes = sum(leaf.numel() for leaf in content["model"].values())
    moments = [leaf for key, leaf in checkpoint_leaves(whole.out).items() if "exp_avg_sq" in key]
    # ZeRO pads the flat partition by a few numbers; the teacher has 30 thousand.
    assert 0 < sum(leaf.numel() for leaf in moments) < sizes + 64
    after = whole.alignment.teacher.model.parameters()
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now) and now.grad is None


def test_features_from_a_file_and_from_the_teacher_train_alike(
    tmp_path: Path, teacher: Path
) -> None:
    common = [*latents(tmp_path, teacher), "train.microbatch_size=4"]
    ways = {
        "online": [f"data.images={tmp_path / 'images.npy'}"],
        "file": ["teacher.path=null", f"data.features={tmp_path / 'features.npy'}"],
    }
    for name, way in ways.items():
        train(repa(tmp_path / name, teacher, *common, *way), quiet=True)
    assert len(rows(tmp_path / "online")) == 3
    for a, b in zip(rows(tmp_path / "online"), rows(tmp_path / "file"), strict=True):
        for key in ("loss", "alignment", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6)
        assert 1e-3 < abs(a["alignment"]) < 1


def test_the_teacher_sees_the_crops_that_the_model_trains_on(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(repa(tmp_path / "run", teacher, "train.images=8"), quiet=True)
    seen, trained = [], []
    features, prepare = Teacher.__call__, trainer.mix.prepare
    monkeypatch.setattr(Teacher, "__call__", lambda t, x: (seen.append(x), features(t, x))[1])
    monkeypatch.setattr(
        trainer.mix,
        "prepare",
        lambda x1, **options: (trained.append(x1), prepare(x1, **options))[1],
    )
    trainer.run()
    assert len(seen) == len(trained) == 1 and torch.equal(seen[0], trained[0])
    unflipped = trainer.dataset.get(*first_positions(trainer), seed=1).x  # another seed's flips
    flipped = (seen[0] != unflipped).flatten(1).any(1)
    assert 0 < flipped.sum() < len(flipped)
    torch.testing.assert_close(seen[0][flipped], unflipped[flipped].flip(-1), rtol=0, atol=0)


def test_label_input_projects_x_at_the_label_with_the_same_noise(
    tmp_path: Path, teacher: Path
) -> None:
    """Its gradient too: all stages of ZeRO that may run it agree, and with one plain backward."""
    label = ["objective.alignment_input=label", "train.images=16", "train.microbatch_size=4"]
    found = {}
    for stage in (0, 1, 2):
        config = repa(tmp_path / str(stage), teacher, *label, f"train.zero_stage={stage}")
        trainer = Trainer(config, quiet=True)
        trainer.run()
        found[stage] = rows(tmp_path / str(stage))
    batch = trainer.examples.get(*first_positions(trainer), seed=0)
    y = batch.y
    it = trainer.mix.prepare(batch.x, ids=batch.positions)
    assert trainer.mix.clock == "noise_at_1" and (it.t != it.slowed_t).all()
    t = it.t.view(-1, 1, 1, 1)
    x_t = (1 - t) * batch.x + t * it.x0()
    model = build_model(config.model)
    z = model(x_t, it.t, y)[1][0]
    target = Teacher(teacher, 4)(batch.x)
    expected = -F.cosine_similarity(z, target, dim=-1).mean()
    loss = trainer.mix.loss(model(it.x, it.t, y)[0], it) + 0.5 * expected
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    norm = torch.stack([g.double().norm() for g in gradients]).norm().item()
    for first, second in found.values():
        assert first["alignment"] == pytest.approx(expected.item(), abs=1e-6)
        assert first["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for key in ("loss", "alignment", "grad_norm"):
            assert second[key] == pytest.approx(found[0][1][key], rel=1e-5)
    train(repa(tmp_path / "slowed", teacher, "train.images=8"), quiet=True)
    assert abs(rows(tmp_path / "slowed")[0]["alignment"] - expected.item()) > 1e-4


def test_zero_3_aligns_like_zero_0(tmp_path: Path, teacher: Path) -> None:
    for stage in (0, 3):
        config = repa(tmp_path / str(stage), teacher, f"train.zero_stage={stage}")
        train(config, quiet=True)
        assert torch.nn.functional.linear is torch._C._nn.linear
    for a, b in zip(rows(tmp_path / "0"), rows(tmp_path / "3"), strict=True):
        for key in ("loss", "alignment", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)


def test_a_step_with_a_teacher_reads_nothing_from_the_device(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GPU only: the label range and the times are checked on the CPU.
    monkeypatch.setattr(SiT, "_check_inputs", lambda *_: None)
    trainer = Trainer(repa(tmp_path / "run", teacher), quiet=True)
    loader = BatchLoader(trainer.examples, seed=0, global_batch_size=8, microbatch_size=8)
    ready = Prefetched(loader, 2)
    trainer.train_step(ready)
    with CountReads() as counter:
        losses = trainer.train_step(ready)
        assert counter.reads == 0
    assert losses.shape == (2,) and not losses.requires_grad


REFUSED = [
    (["teacher.path=null"], r"needs a teacher: add teacher.path=FOLDER .*data.features"),
    (["data={kind: latents, path: x}"], "images of the latents: add data.images=PATH"),
    (["data={kind: latents, path: x}", "teacher.path=null"], "FOLDER`?.* and data.images=PATH"),
    (["data={kind: latents, path: x, images: y, features: z}"], "both give the alignment"),
    (
        ["data={kind: latents, path: x, features: z}", "teacher={path: null, precision: fp32}"],
        "teacher.precision has no meaning with data.features",
    ),
    (["data.images=y"], "data.images has no meaning for data.kind=photos"),
    (["data.features=y"], "data.features has no meaning for data.kind=photos"),
    (["objective.alignment_weight=0"], "teacher.path has no meaning without"),
    (
        ["objective.alignment_weight=0", "teacher.path=null", "objective.alignment_input=label"],
        "alignment_input has no meaning without",
    ),
    (
        [
            *("objective.alignment_weight=0", "teacher.path=null"),
            "data={kind: latents, path: x, images: y}",
        ],
        "data.images has no meaning .* without objective.alignment_weight and teacher.path",
    ),
    (["objective.alignment_input=both"], "alignment_input must be one of"),
    (["objective.alignment_input=label", "train.zero_stage=3"], "set train.zero_stage=2"),
    (["teacher.precision=fp16"], "teacher.precision must be one of"),
    (["teacher.positions=own"], "teacher.positions must be one of"),
    (["model.z_dims=[32, 32]"], "one REPA projector"),
    (["data={kind: digits}", "model.in_channels=1"], "teacher sees RGB .* got .* = 1"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_impossible_combinations(
    tmp_path: Path, teacher: Path, overrides: list[str], message: str
) -> None:
    validate(repa(tmp_path, teacher))
    with pytest.raises(ValueError, match=message):
        validate(repa(tmp_path, teacher, *overrides))


UNFIT = [
    (["model.z_dims=[16]"], r"has 32 channels, .* projector 16: set model.z_dims=\[32\]"),
    (["teacher.resolution=112"], r"gives 64 tokens .* has 16: set teacher.resolution=56"),
    (["teacher.path=nowhere"], "facebook/dinov2-base"),
]


@pytest.mark.parametrize(("overrides", "message"), UNFIT)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, teacher: Path, overrides: list[str], message: str
) -> None:
    config = repa(tmp_path / "run", teacher, *overrides)
    for refuse in (check, Trainer):
        with pytest.raises(ValueError, match=message):
            refuse(config)
    assert not (tmp_path / "run").exists()


def test_the_recipe_says_what_is_missing(teacher: Path) -> None:
    def refusal(*overrides: str) -> str:
        given = ["data.path=latents", "train.init=w.pt", *overrides]
        try:
            check(load_config("repa-xl2-256", given))
        except ValueError as error:
            return str(error)
        return ""

    for given, missing in (
        ([], "teacher.path=FOLDER"),
        ([f"teacher.path={teacher}"], "data.images=PATH"),
        (["teacher.path=nowhere", "data.images=png"], "teacher.path nowhere does not exist: "),
        (["teacher.path=nowhere", "data.images=png"], "hf download facebook/dinov2-base"),
        ([f"teacher.path={teacher}", "data.images=png"], "has 32 channels"),
    ):
        assert missing in refusal(*given)
    for given in (
        [f"teacher.path={teacher}", "data.images=png", "model.z_dims=[32]"],
        ["data.features=features.npy"],
        ["objective.alignment_weight=0"],
    ):
        assert refusal(*given) == ""
