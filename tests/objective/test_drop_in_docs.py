"""docs/drop-in.md, executed: both sides of every diff, every block, every line that must raise."""

import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixflow_fast import MixFlow, Moments, mixflow_loss
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.models import SiT
from tests.support.drop_in_trainers import (
    IMPLS,
    OTHER,
    TOLERANCE,
    TRAINERS,
    Gradients,
    Trainer,
    assert_same,
    images,
    loss_and_gradients,
    relative,
    sit,
    spread,
    trained_gradients,
    with_mixflow,
)

Names = dict[str, Any]
DOC = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"^```([^\n]*)\n(.*?)^```$", section, re.M | re.S)
    for section in re.split(r"^## ", DOC, flags=re.M)[1:]
}


def blocks(section: str, kind: str) -> list[str]:
    return [text for info, text in SECTIONS[section] if info == kind]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on tensors this small mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes each implementation in turn the one that MixFlow(...) takes when none is named."""
    monkeypatch.setattr(MixFlow, "__init__", partialmethod(MixFlow.__init__, impl=request.param))
    return request.param


def sides(diff: str) -> tuple[str, str]:
    """The lines before and after a diff."""
    lines = diff.splitlines()
    assert {line[:1] for line in lines} <= {"+", "-", " ", ""}
    before, after = ("\n".join(x[1:] for x in lines if x[:1] != sign) for sign in "+-")
    return before, after


def trainer_names(trainer: Trainer) -> tuple[nn.Module, Names]:
    """The network, and the names that a trainer's own script has where the diff begins."""
    model, b = trainer.build()
    row = (b["x1"], *(b[k] for k in ("y", "zs", "text", "pooled") if k in b))
    return model, trainer.names | {
        "torch": torch,
        "math": math,
        "model": model,
        "transformer": model,
        "loader": [row],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),  # leaves the gradients
        "compute_density_for_timestep_sampling": compute_density_for_timestep_sampling,
        "compute_loss_weighting_for_sd3": compute_loss_weighting_for_sd3,
    }


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_both_sides_of_every_diff(
    trainer: Trainer, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same noise and times the same loss and gradients; with the other clock not."""
    (diff,) = blocks(trainer.section, "diff")
    before, after = sides(diff)
    model, names = trainer_names(trainer)
    torch.manual_seed(1)  # not the seed of the images
    exec(before, names)
    plain = names["loss"].detach(), trained_gradients(model)
    drawn = names.get("transport", names.get("loss_fn"))
    x0, t = (drawn.x0, drawn.t) if drawn else (names["noise"], names["sigmas"])

    model, names = trainer_names(trainer)
    exec(after, names)  # as it stands, with its own draws
    assert names["loss"].isfinite() and names["loss"] != plain[0]
    assert names["mix"].schedule == MixFlow(**trainer.options).schedule
    prepare = MixFlow.prepare
    monkeypatch.setattr(MixFlow, "prepare", partialmethod(prepare, x0=x0, t=t, slowed_t=t))
    exec(after, names)
    assert_same((names["loss"].detach(), trained_gradients(model)), plain)

    clock = trainer.options["clock"]
    exec(after.replace(clock, OTHER[clock]), names)
    assert abs(names["loss"] / plain[0] - 1) > 1000 * TOLERANCE
    with pytest.raises(ValueError, match="clock is required"):
        exec(after.replace(f', clock="{clock}"', ""), names)


def sit_names() -> Names:
    """What the blocks of the document take for granted: a SiT, a batch, a MixFlow."""
    model, b = sit()
    mix = MixFlow(gamma=0.8, clock=DATA_AT_1)
    b = {key: value[:2] for key, value in b.items()}
    it = mix.prepare(b["x1"], ids=torch.arange(2))
    return {
        "torch": torch,
        "F": F,
        "checkpoint": checkpoint,
        "MixFlow": MixFlow,
        "mixflow_loss": mixflow_loss,
        "Moments": Moments,
        "compute_loss_weighting_for_sd3": compute_loss_weighting_for_sd3,
        "mix": mix,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "x1": b["x1"],
        "y": b["y"],
        "t": torch.tensor([0.2, 0.7]),
        "ids": torch.arange(2) + 100,
        "it": it,
        "pred": model(it.x, it.t, b["y"]),
    }


def by_hand(names: Names, ids: Tensor) -> tuple[Tensor, Gradients]:
    """Loss and gradients of one plain step of `names` with these ids."""
    loss = with_mixflow(names["mix"], names["model"], names, ids=ids)
    return loss_and_gradients(names["model"], loss)


def check_clock(code: list[str], names: Names) -> None:
    direction, usual = code
    names |= {"x1": 0.3 * images(6, 4, 8, 8), "y": None}
    exec(direction, names)
    with pytest.raises(AssertionError, match="wrong way round"):
        exec(direction, names | {"mix": MixFlow(clock=NOISE_AT_1)})

    def trained(x: Tensor, t: Tensor, y: None) -> Tensor:
        """The best velocity for data from N(0, 0.3^2)."""
        a, s = spread(t), spread(1 - t)
        return (0.09 * a - s) / (0.09 * a**2 + s**2) * x

    printed: list[Tensor] = []
    names |= {"model": trained, "print": printed.append}
    exec(usual, names)
    exec(usual.replace(DATA_AT_1, NOISE_AT_1), names)
    assert 2 * printed[0] < printed[1]


def check_preconditioning(code: list[str], names: Names) -> None:
    """The error of the data is sigma times the velocity's, with the sigma of the input."""
    names |= {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "latents": names["x1"]}
    names["network"] = lambda x, t: torch.tanh(x) + spread(t)
    exec(code[0], names)
    it = names["it"]
    error = names["network"](it.x, it.t) - (it.x0() - names["x1"])
    plain = (spread(it.slowed_t / it.t) ** 2 * error**2).mean()
    torch.testing.assert_close(names["loss"], plain, rtol=1e-5, atol=0)


def check_ids(code: list[str], names: Names) -> None:
    """Two steps, two micro-batches, two ranks: the positions 0..15 once, each its own draw."""
    whole = names["mix"].prepare(names["x1"].repeat(8, 1, 1, 1), ids=torch.arange(16))
    seen = []
    for step, micro, rank in [(s, a, r) for s in (0, 1) for a in (0, 1) for r in (0, 1)]:
        names |= {"step": step, "micro": micro, "rank": rank, "world_size": 2, "accumulation": 2}
        exec(code[0], names)
        seen.append(names["it"])
    for name in ("ids", "t", "slowed_t", "x"):
        assert torch.equal(torch.cat([getattr(it, name) for it in seen]), getattr(whole, name))


def check_accumulation(code: list[str], names: Names) -> None:
    """By weight and by dividing the loss: the gradient of one large batch."""
    x1, y = images(4, 4, 8, 8), torch.arange(4)
    truth = by_hand(names | {"x1": x1, "y": y}, ids=torch.arange(4) + 40)
    names |= {"first": 40, "micro_batches": list(zip(x1.split(2), y.split(2), strict=True))}
    divided = code[0].replace(", weight=1 / len(micro_batches)", "")
    divided = divided.replace("loss.backward()", "(loss / len(micro_batches)).backward()")
    assert "weight" not in divided
    for text in (code[0], divided):
        names["model"].zero_grad(set_to_none=True)
        exec(text, names)
        assert_same((truth[0], trained_gradients(names["model"])), truth)


def check_checkpointing(code: list[str], names: Names) -> None:
    for text in code:
        exec(text, names)
        got = loss_and_gradients(names["model"], names["loss"])
        assert_same(got, by_hand(names, ids=names["it"].ids))
    with pytest.warns(UserWarning, match="requires_grad"):
        exec(code[1].replace(".requires_grad_()", ""), names)
    assert not names["loss"].requires_grad

    def inside(ids: Tensor | None) -> Tensor:
        return with_mixflow(names["mix"], names["model"], names, ids=ids)

    loss = checkpoint(inside, names["ids"], use_reentrant=False)
    assert_same(loss_and_gradients(names["model"], loss), by_hand(names, names["ids"]))
    next_ids = names["mix"].prepare(names["x1"]).ids + 2
    loss = checkpoint(inside, None, use_reentrant=False)
    got, truth = loss_and_gradients(names["model"], loss), by_hand(names, next_ids)
    assert torch.equal(got[0], truth[0])  # the first forward pass is right, the second is not
    weight = "final_layer.linear.weight"
    assert relative(got[1][weight], truth[1][weight]) > 0.01


def check_compile(code: list[str], names: Names) -> None:
    torch._dynamo.reset()
    model = SiT(8, 2, 4, 32, 1, 2, num_classes=10, learn_sigma=False)
    nn.init.normal_(model.final_layer.linear.weight)
    names |= {"model": model, "backend": "aot_eager"}
    exec(code[0], names)
    got = names["loss"].detach(), trained_gradients(names["model"])
    assert_same(got, by_hand(names, names["ids"]))
    names["ids"] += 2
    repeated = names["training_loss"](names["x1"], names["y"], names["ids"]).detach()
    torch.testing.assert_close(repeated, by_hand(names, names["ids"])[0], rtol=TOLERANCE, atol=0)


def check_cuda_graphs(code: list[str], names: Names) -> None:
    """Where there is no GPU a graph that repeats the step stands in for a captured one."""
    if torch.cuda.is_available():
        names["model"].cuda()
        names |= {k: names[k].cuda() for k in ("x1", "y", "ids")}
        names["mix"] = MixFlow(gamma=0.8, clock=DATA_AT_1, impl="auto")
    else:
        cuda = SimpleNamespace(
            Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
            current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
            stream=lambda stream: nullcontext(),
            graph=lambda graph: nullcontext(),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: names.update(loss=names["step"]())),
        )
        names["torch"] = SimpleNamespace(cuda=cuda)
    losses: list[Tensor] = []
    names["optimizer"] = SimpleNamespace(
        zero_grad=names["model"].zero_grad,
        step=lambda: losses.append(names["loss"].detach().clone()),
    )
    names["loader"] = [(images(2, 4, 8, 8, seed=s), torch.tensor([s, 9])) for s in (5, 6)]
    first = names["ids"].clone()
    exec(code[0], names)
    for step, (x1, y) in enumerate(names["loader"]):
        batch = names | {"x1": x1.to(first.device), "y": y.to(first.device)}
        truth = by_hand(batch, first + 2 * step)[0]
        torch.testing.assert_close(losses[step], truth, rtol=1e-5, atol=0)
    assert len(losses) == 2


def check_half_precision(code: list[str], names: Names) -> None:
    exec(code[0], names)
    it, pred = names["it"], names["pred"]
    assert pred.dtype == torch.bfloat16 and names["loss"].dtype == torch.float32
    truth = ((pred.float() - (names["x1"] - it.x0())) ** 2).mean()
    torch.testing.assert_close(names["loss"], truth, rtol=TOLERANCE, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = names["mix"].prepare(names["x1"], ids=it.ids)
        loss = names["mix"].loss(pred, inside)
    assert torch.equal(inside.x, it.x) and torch.equal(loss, names["loss"])


def check_reductions(code: list[str], names: Names) -> None:
    names["keep"] = torch.tensor([0.0, 1.0])
    exec(code[0], names)
    it, pred = names["it"], names["pred"]
    error = (pred - (names["x1"] - it.x0()))[1:]
    assert names["losses"].shape == (2,) and names["losses"].dtype == torch.float32
    torch.testing.assert_close(names["loss"], (error**2).mean(), rtol=TOLERANCE, atol=0)


def check_layouts(code: list[str], names: Names) -> None:
    whole, tokens = code
    heads: list[Tensor] = []

    def two_heads(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        heads.append(torch.cat([torch.tanh(x), 5 + x], dim=1).requires_grad_())
        return heads[-1]

    names["two_heads"] = two_heads
    exec(whole, names)
    names["loss"].backward()
    velocity, unused = heads[0].grad.chunk(2, dim=1)
    pred = heads[0].detach().chunk(2, dim=1)[0].requires_grad_()
    loss = names["mix"].loss(pred, names["it"])
    torch.testing.assert_close(names["loss"], loss, rtol=TOLERANCE, atol=0)
    (truth,) = torch.autograd.grad(loss, pred)
    assert relative(velocity, truth) < TOLERANCE and not unused.any()

    exec(tokens, names)
    assert names["it"].x.shape == (2, 16, 16) and names["model"].learn_sigma
    loss, grads = loss_and_gradients(names["model"], names["loss"])
    truth = by_hand(names, names["it"].ids)
    # A convolution and a matrix product add up in different orders.
    torch.testing.assert_close(loss, truth[0], rtol=1e-5, atol=0)
    errors = {k: relative(grads[k], g, floor=1e-3) for k, g in truth[1].items()}
    assert max(errors.values()) < 1e-5, errors


def check_moments(code: list[str], names: Names) -> None:
    """What is left of x once noise and mean are taken away is a standard normal of its own."""
    mean, std = images(2, 4, 8, 8, seed=7), images(2, 4, 8, 8, seed=8).exp()
    names |= {"mean": mean, "std": std}
    exec(code[0], names)
    it = names["it"]
    data, noise = spread(it.slowed_t), spread(1 - it.slowed_t)
    x0 = it.x0()
    posterior = (((it.x - noise * x0) / data / 0.18215 - mean) / std)[it.slowed_t > 0.1].flatten()
    assert abs(posterior.mean()) < 5 / len(posterior) ** 0.5
    assert abs(posterior.std() - 1) < 5 / (2 * len(posterior)) ** 0.5
    pair = torch.stack([posterior, x0[it.slowed_t > 0.1].flatten()])
    assert abs(torch.corrcoef(pair)[0, 1]) < 5 / len(posterior) ** 0.5
    fixed = names["mix"].prepare(Moments(mean, 0 * std, 0.18215), ids=names["ids"])
    plain = names["mix"].prepare(mean * 0.18215, ids=names["ids"])
    assert relative(fixed.x, plain.x) < TOLERANCE


def check_source(code: list[str], names: Names) -> None:
    """Both networks get the gradient of the loss that the formulas say."""
    torch.manual_seed(0)
    exec(code[0], names)
    it, mix = names["it"], names["mix"]
    got = [part.grad.clone() for part in names["predictor"].parameters()]
    assert all(part.abs().max() > 0 for part in got)
    in_optimizer = {id(p) for g in names["optimizer"].param_groups for p in g["params"]}
    assert {id(p) for p in names["predictor"].parameters()} < in_optimizer

    mean, log_var = names["predictor"](names["x1"]).chunk(2, dim=1)
    w = spread(it.source.w)
    eps = MixFlow(gamma=0, clock=DATA_AT_1).prepare(names["x1"], ids=names["ids"]).x0()
    x0 = w * mean + (1 + w * torch.expm1(log_var)).sqrt() * eps
    t = spread(it.t)
    x = t * names["x1"] + (1 - t) * x0
    mse = ((names["model"](x, it.t, names["y"]) - (names["x1"] - x0)) ** 2).mean()
    kl = (mean**2 + torch.expm1(log_var) - log_var).mean() / 2
    torch.testing.assert_close(names["loss"], mse + 0.3 * kl, rtol=1e-5, atol=0)
    truth = torch.autograd.grad(mse + 0.3 * kl, list(names["predictor"].parameters()))
    assert max(relative(a, b) for a, b in zip(got, truth, strict=True)) < 1e-4
    assert names["health"]["kl_per_dim"].item() == pytest.approx(kl.item(), rel=1e-4)

    names["predictor"].requires_grad_(False)
    frozen = MixFlow(gamma=0.4, clock=DATA_AT_1, source=mix.source)
    assert frozen.prepare(names["x1"], ids=names["ids"]).source.kl_weight == 0


CHECKS = {
    "Which clock": check_clock,
    "SD3 and Flux with diffusers": check_preconditioning,
    "Ids: ranks and resume": check_ids,
    "Gradient accumulation": check_accumulation,
    "Activation checkpointing": check_checkpointing,
    "torch.compile": check_compile,
    "CUDA graphs": check_cuda_graphs,
    "bf16 and fp16": check_half_precision,
    "Weights and reductions": check_reductions,
    "learn_sigma, token layout": check_layouts,
    "Cached VAE moments": check_moments,
    "A source that is trained along": check_source,
}


def test_every_block_of_the_document_is_executed() -> None:
    assert {s for s in SECTIONS if blocks(s, "diff")} == {t.section for t in TRAINERS.values()}
    assert {s for s in SECTIONS if blocks(s, "python")} == set(CHECKS)
    kinds = {info for section in SECTIONS.values() for info, _ in section}
    assert kinds == {"diff", "python", "python raises"}
    assert DOC.count("```") == 2 * sum(map(len, SECTIONS.values()))


@pytest.mark.parametrize("section", CHECKS)
def test_blocks(section: str, impl: str) -> None:
    CHECKS[section](blocks(section, "python"), sit_names())


def test_lines_that_raise(impl: str) -> None:
    names = sit_names() | {"zs": []}
    (code,) = blocks("What raises", "python raises")
    for line in code.splitlines():
        call, message = line.split("  # ")
        with pytest.raises(ValueError, match=re.escape(message)):
            exec(call, names)
