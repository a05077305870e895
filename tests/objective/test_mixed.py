"""`MixFlow(source=MixedSource(...))`: draws, bits of plain MixFlow, what is refused.

Faults that were found in the published implementation, and the test that would show each here
(without a folder: in this file):

* the predictor is used at test time for one kappa only, w has no effect without a word:
  flow/test_source.py::test_kappa_is_made_of_what_it_names
  sampling/test_source.py::test_formula_in_float64
  ::test_data_are_not_known
* mode "moments" draws twice and uses one; statistics of another sample than the one used:
  test_mixed_golden.py::test_training_step (streams drawn)
  test_source_health.py::test_of_the_noise_in_use
* statistics that grow with the batch:
  test_source_health.py::test_does_not_depend_on_the_size_of_the_batch
* the KL's weight depends on the resolution:
  test_lam_is_the_same_at_every_resolution
* no clamp on the log-variance:
  flow/test_source.py::test_log_variances_are_clamped_without_a_gradient
  test_an_overflow_shows_in_its_own_sample
* a detached source becomes N(0, I):
  test_mixed_gradients.py::test_detach_leaves_the_source_its_kl_alone
  test_mixed_source_toy.py
* images and labels in the order of a directory listing:
  data/preparation/test_source.py::test_the_list_is_sorted_by_class_and_name
* 2N - 1 evaluations documented as N:
  sampling/test_mixed_source_solvers.py::test_evaluations_are_counted_as_the_documentation_says
* no seed:
  test_draws_are_functions_of_seed_and_position
* a last batch of another size, labels of the whole one:
  sampling/test_source.py::test_the_last_batch_has_its_own_classes
* w = 1 is never drawn from discrete weights:
  test_discrete_weights
  sampling/test_source.py::test_discrete_weights_reach_both_ends
* a number in [0, 1] is divided by n:
  test_a_number_is_the_weight
  sampling/test_source.py::test_a_weight_is_the_same_number_whatever_training_drew
* w as an integer, time as a number:
  test_a_number_is_the_weight
  models/test_songunet.py::test_mixing_weight_in_every_form
* class and guidance settings that do nothing, or fail late:
  models/test_songunet.py::test_refusals
  ::test_labels_are_not_looked_at
  training/test_songunet_run.py::test_refusals
* building a network changes its configuration:
  models/test_songunet.py::test_published_sizes (built again from its own)
  models/test_source_predictor.py::test_released_size_and_config
* a class table of a fixed size:
  models/test_source_predictor.py::test_classes_of_the_official_network
  ::test_refusals
* one solver stands for another; tolerances cannot be set; all states are kept:
  sampling/test_mixed_source_solvers.py (a_name_that_is_unknown
  a_method_never_stands_for_another
  smaller_tolerances
  keeps_one_state)
* an average of the denoiser alone:
  training/test_source.py::test_network_and_source_move_and_both_have_an_average
* waits for the device at every step:
  test_compiles_in_one_piece
  training/test_source.py::test_a_step_reads_nothing_from_the_device
* attention of its own, no bf16, no channels_last:
  models/test_songunet.py::test_dtypes_and_channels_last

Its remaining faults are of its trainer's logging, files and statistics, which share nothing with
ours.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast import MixFlow, Moments, mixflow_loss
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.flow.source import MixedSource, StandardSource
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.objective.rollout import roll_in

CLOCKS = (DATA_AT_1, NOISE_AT_1)


def net(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    return torch.tanh(0.7 * x) + 0.3 * t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def predictor(channels: int = 3) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, 6, 3, padding=1)


def of_class(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = y.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    return mean, torch.zeros_like(mean)


def plain(**options) -> MixFlow:
    return MixFlow(**{"gamma": 0, "timesteps": "uniform", "clock": DATA_AT_1, **options})


def mixed(predict=None, **options) -> MixFlow:
    return plain(source=MixedSource(predict or predictor(), **{"lam": 0.3, **options}))


def data(dtype: torch.dtype = torch.float32, n: int = 4) -> Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["w = 0, moments", "w = 0, samples", "zero moments"])
def test_bits_of_plain_mixflow(clock: str, path: str, dtype: torch.dtype, case: str) -> None:
    x1, ids = data(dtype), torch.arange(4)
    if case == "zero moments":
        zero = torch.zeros(4, 6, 4, 4)
        source = MixedSource(lambda x1: zero, lam=0.3)
    else:
        source = MixedSource(predictor(), mode=case.removeprefix("w = 0, "), w=0, lam=0.0)
    ours, theirs = plain(clock=clock, path=path, source=source), plain(clock=clock, path=path)
    for patch_size in (None, 2):
        a = ours.prepare(x1, ids, patch_size=patch_size)
        b = theirs.prepare(x1, ids, patch_size=patch_size)
        for name in ("x", "t", "slowed_t"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert getattr(a, name).dtype == getattr(b, name).dtype
        assert torch.equal(a.x0(), b.x0())
        pred = net(b.x, b.t)
        for reduction in ("none", "sum", "mean"):
            loss = theirs.loss(pred, b, reduction=reduction)
            assert torch.equal(ours.loss(pred, a, reduction=reduction), loss)


def test_the_standard_source_is_none() -> None:
    sources = None, StandardSource()
    a, b = (plain(source=source).prepare(data(), torch.arange(4)) for source in sources)
    assert torch.equal(a.x, b.x) and a.source is None and b.source is None


def test_slowed_times_and_their_options_are_those_of_plain_mixflow() -> None:
    frozen = predictor().requires_grad_(False)
    options = {"gamma": 0.4, "timesteps": "beta21", "shift": 2.0, "clock": NOISE_AT_1}
    for interval in ("shifted", "raw", "full"):
        theirs = MixFlow(**options, interval=interval)
        ours = MixFlow(**options, interval=interval, source=MixedSource(frozen, lam=1.0))
        a, b = (mix.prepare(data(), torch.arange(4)) for mix in (ours, theirs))
        assert torch.equal(a.t, b.t) and torch.equal(a.slowed_t, b.slowed_t)
        assert not torch.equal(a.x, b.x)


@pytest.mark.parametrize("mode", ["moments", "samples"])
def test_mirror_of_the_two_clocks(mode: str) -> None:
    a, b = (
        plain(clock=clock, path="gvp", source=MixedSource(predictor(), mode=mode, lam=0.3))
        for clock in CLOCKS
    )
    t = torch.tensor([0.125, 0.25, 0.5, 0.75])
    ia = a.prepare(data(), torch.arange(4), t=t)
    ib = b.prepare(data(), torch.arange(4), t=1 - t)
    assert torch.equal(ia.x0(), ib.x0()) and torch.equal(ia.x, ib.x)
    pred = net(ia.x, t)
    torch.testing.assert_close(a.loss(pred, ia), b.loss(-pred, ib), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("mode", ["moments", "samples"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_gradients_reach_the_predictor(clock: str, mode: str, prediction: str) -> None:
    source = MixedSource(predictor(), mode=mode, lam=0.3)
    mix = plain(clock=clock, source=source, prediction=prediction)
    it = mix.prepare(data(), torch.arange(4))
    assert it.x.requires_grad and it.x0().requires_grad and it.source.kl.shape == (4,)
    mix.loss(net(it.x, it.t), it).backward()
    assert source.predictor.weight.grad.abs().min() > 0


@pytest.mark.parametrize("mode", ["moments", "samples"])
def test_tokens_and_learn_sigma(mode: str) -> None:
    """Another layout of input and prediction: the same loss and the same gradient."""
    found = []
    for tokens in (None, 2):
        mix = mixed(mode=mode)
        it = mix.prepare(data(), torch.arange(4), patch_size=tokens)
        pred = net(it.x, it.t)
        second = torch.full_like(pred, torch.nan)
        if tokens:
            # Features of a token are (row, column, channel), so the second half lies in each group.
            pred, second = (part.view(4, 4, 4, 3) for part in (pred, second))
            pred = torch.cat([pred, second], dim=-1).view(4, 4, 24)
        else:
            pred = torch.cat([pred, second], dim=1)
        loss = mix.loss(pred, it, learn_sigma=True)
        loss.backward()
        found.append((loss.detach(), mix.source.predictor.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


def test_moments_of_a_posterior_show_the_predictor_the_sample_in_use() -> None:
    seen = []

    def watch(x1: Tensor) -> Tensor:
        seen.append(x1)
        return torch.zeros(4, 6, 4, 4)

    latents = Moments(data(torch.float16), torch.full((4, 3, 4, 4), 0.5).half(), 0.18215)
    it = mixed(watch).prepare(latents, torch.arange(4), dtype=torch.bfloat16)
    assert torch.equal(seen[0], it.x1) and it.x.dtype == torch.bfloat16
    assert torch.equal(it.x, plain().prepare(latents, torch.arange(4), dtype=torch.bfloat16).x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    mix = mixed()
    it = mix.prepare(data(dtype), torch.arange(4))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draw = it.source
    assert it.x.dtype == dtype
    assert {p.dtype for p in (it.x0(), draw.mean, draw.log_var, draw.w, draw.kl)} == {wide}
    loss, samples = mix.loss_and_samples(net(it.x, it.t), it)
    assert loss.dtype == samples.dtype == wide and not samples.requires_grad
    given = mix.prepare(data(dtype), torch.arange(4), dtype=torch.float64)
    assert given.x.dtype == torch.float64 and given.x0().dtype == wide


def test_other_shapes_of_data() -> None:
    for shape in ((2,), (3, 5), (3, 2, 4, 4)):
        x1 = torch.ones(4, *shape)
        mix = mixed(lambda x1: torch.cat([x1, x1], dim=1))
        it = mix.prepare(x1, torch.arange(4))
        assert it.x.shape == x1.shape and it.source.mean.shape == x1.shape
        assert mix.loss(it.x, it).isfinite()


def test_an_empty_batch() -> None:
    mix = mixed()
    it = mix.prepare(data(n=0), torch.arange(0))
    assert it.x.shape == (0, 3, 4, 4) and it.source.kl.shape == (0,)
    assert mix.loss(net(it.x, it.t), it, reduction="sum") == 0
    with pytest.raises(ValueError, match="the batch is empty"):
        mix.loss(net(it.x, it.t), it)


@pytest.mark.parametrize("mode", ["moments", "samples"])
@pytest.mark.parametrize("kappa", ["data", "noise", "data+noise", "class"])
def test_draws_are_functions_of_seed_and_position(kappa: str, mode: str) -> None:
    """Not of the place in the batch, nor of what else is in it."""
    predict = of_class if kappa == "class" else predictor(6 if kappa == "data+noise" else 3)
    source = MixedSource(predict, kappa=kappa, mode=mode, lam=0.3)
    x1, y, ids = data(), torch.tensor([3, 1, 0, 2]), torch.tensor([5, 2**40, 0, 9])
    whole = plain(source=source).prepare(x1, ids, y=y)
    order = torch.tensor([2, 0])
    part = plain(source=source).prepare(x1[order], ids[order], y=y[order])
    assert torch.equal(part.source.w, whole.source.w[order])
    torch.testing.assert_close(part.x0(), whole.x0()[order], rtol=0, atol=1e-6)
    other = plain(source=source, seed=1).prepare(x1, ids, y=y)
    assert not (other.source.w == whole.source.w).any()
    assert whole.source.w.unique().numel() == 4
    if "noise" in kappa:
        assert not torch.equal(other.source.mean, whole.source.mean)


def test_streams_are_apart() -> None:
    """w, t, eps, eps1 and z share no number: none predicts another."""
    ids = torch.arange(4096)
    seen = []

    def watch(z: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(z)
        return torch.zeros_like(z), torch.zeros_like(z)

    mix = mixed(watch, kappa="noise", mode="samples")
    it = mix.prepare(torch.zeros(4096, 1), ids)
    w, (z,) = it.source.w, seen
    eps = plain().prepare(torch.zeros(4096, 1), ids).x0()
    eps1 = (it.x0() - (1 - w[:, None]) * eps) / w[:, None]
    columns = torch.stack([w, it.t, z[:, 0], eps[:, 0], eps1[:, 0]])
    correlation = torch.corrcoef(columns) - torch.eye(5)
    assert correlation.abs().max() < 5 / 64
    assert eps1[w > 0.1].var().item() == pytest.approx(1, rel=0.1)


def test_calls_without_ids_go_on() -> None:
    mix = mixed()
    first, second = mix.prepare(data()), mix.prepare(data())
    assert first.ids.tolist() == [0, 1, 2, 3] and second.ids.tolist() == [4, 5, 6, 7]
    assert not torch.equal(first.source.w, second.source.w)


def test_uniform_weights() -> None:
    mix = mixed(lambda x1: x1.repeat(1, 2))
    w = mix.prepare(torch.zeros(20_000, 1), torch.arange(20_000)).source.w
    assert 0 < w.min() and w.max() < 1
    counts = torch.histc(w, 10, 0, 1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


@pytest.mark.parametrize("n", [1, 4, 1000])
def test_discrete_weights(n: int) -> None:
    """k / n with k uniform in 0..n: both ends as often as the others."""
    mix = mixed(lambda x1: x1.repeat(1, 2), w=f"discrete({n})")
    w = mix.prepare(torch.zeros(40_000, 1), torch.arange(40_000)).source.w
    k = w * n
    assert torch.equal(k.round() / n, w) and w.min() == 0 and w.max() == 1
    counts = torch.bincount(k.round().long(), minlength=n + 1)
    expected = 40_000 / (n + 1)
    assert len(counts) == n + 1 and (counts - expected).abs().max() < 5.5 * expected**0.5


@pytest.mark.parametrize("w", [0, 0.5, 1])
def test_a_number_is_the_weight(w: float) -> None:
    one = torch.ones(1, 3, 4, 4)
    it = mixed(lambda x1: (2 * one, -0.5 * one), w=w).prepare(data(n=1), torch.arange(1))
    assert it.source.w.tolist() == [w] and it.source.w.dtype == torch.float32
    eps = philox.normal(0, Stream.NOISE, torch.arange(1), 48).view(1, 3, 4, 4)
    expected = w * 2 + (1 - w + w * torch.tensor(-0.5).exp()).sqrt() * eps
    torch.testing.assert_close(it.x0(), expected, rtol=1e-6, atol=1e-6)


def test_lam_is_the_same_at_every_resolution() -> None:
    """The same picture at twice the size: mse and lam KL / D are what they were, beta KL is not."""
    small = data(n=2)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    kl = {}
    for size, x1 in (("small", small), ("large", large)):
        for weight in ("lam", "beta"):
            mix = plain(source=MixedSource(lambda x1: (x1, 0.3 * x1), **{weight: 0.01}))
            it = mix.prepare(x1, torch.arange(2))
            kl[size, weight] = mix.loss(it.x, it, reduction="none", weight=0.0)
    torch.testing.assert_close(kl["large", "lam"], kl["small", "lam"], rtol=1e-5, atol=0)
    torch.testing.assert_close(kl["large", "beta"], 4 * kl["small", "beta"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("part", [0, 1])
def test_an_overflow_shows_in_its_own_sample(part: int) -> None:
    zero = torch.zeros(4, 6, 4, 4)
    zero[2, 3 * part] = torch.inf
    mix = mixed(lambda x1: zero)
    it = mix.prepare(data(), torch.arange(4))
    losses = mix.loss(net(it.x, it.t), it, reduction="none")
    assert losses.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("clock", CLOCKS)
def test_mixflow_loss_hands_the_labels_through(clock: str) -> None:
    y = torch.tensor([0, 1, 2, 3])
    seen = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return net(x, t)

    source = MixedSource(of_class, kappa="class", lam=0.3)
    options = {"gamma": 0, "timesteps": "uniform", "clock": clock, "source": source}
    ids = torch.arange(4)
    losses = mixflow_loss(network, data(), y, ids=ids, reduction="none", **options)
    mix = MixFlow(**options)
    it = mix.prepare(data(), ids, y=y)
    assert torch.equal(losses, mix.loss(net(it.x, it.t), it, reduction="none"))
    assert torch.equal(seen[0], y) and torch.equal(it.source.mean[:, 0, 0, 0], y.float())


def test_labels_of_any_integer_type() -> None:
    mix = mixed(of_class, kappa="class")
    wide = mix.prepare(data(), torch.arange(4), y=torch.arange(4))
    small = mix.prepare(data(), torch.arange(4), y=torch.arange(4).to(torch.uint8))
    assert torch.equal(wide.x, small.x)


def test_input_perturbation_adds_to_the_input_alone() -> None:
    source = MixedSource(predictor(), lam=0.3)
    a = plain(source=source).prepare(data(), torch.arange(4))
    b = plain(source=source, input_perturbation=0.1).prepare(data(), torch.arange(4))
    assert torch.equal(a.x0(), b.x0()) and b.x.requires_grad
    added = (b.x - a.x).detach() / (1 - a.t.view(-1, 1, 1, 1))
    assert added.std().item() == pytest.approx(0.1, rel=0.2)


def test_without_gradients() -> None:
    mix = mixed()
    with torch.no_grad():
        it = mix.prepare(data(), torch.arange(4))
        assert mix.loss(net(it.x, it.t), it).isfinite() and not it.x.requires_grad
    with torch.inference_mode():
        again = mix.prepare(data(), torch.arange(4))
    assert torch.equal(it.x, again.x)


def test_compiles_in_one_piece() -> None:
    mix = mixed()

    def step(x1: Tensor, ids: Tensor) -> Tensor:
        it = mix.prepare(x1, ids)
        return mix.loss(net(it.x, it.t), it)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    ids = torch.arange(4)
    torch.testing.assert_close(compiled(data(), ids), step(data(), ids), rtol=1e-6, atol=0)


def test_only_an_unfrozen_source_is_warned_about_slowed_times() -> None:
    network = predictor()
    source = MixedSource(network, lam=0.3)
    with pytest.warns(UserWarning, match=r'gamma=0\.4.*gamma=0, timesteps="uniform" first, then'):
        MixFlow(gamma=0.4, clock=DATA_AT_1, source=source)
    with pytest.warns(UserWarning, match="slowed times"):
        plain(interval="full", source=source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(source=source)
        network.requires_grad_(False)
        MixFlow(gamma=0.4, clock=DATA_AT_1, source=source)


def classes(**given) -> object:
    return mixed(of_class, kappa="class").prepare(data(), torch.arange(4), **given)


REFUSED = {
    "not a source": (lambda: plain(source="mixed"), "source must be None.*got 'mixed'"),
    "score": (
        lambda: plain(prediction="score", source=MixedSource(of_class, lam=1)),
        'prediction="score" has no meaning for a mixed source',
    ),
    "given noise": (
        lambda: mixed().prepare(data(), x0=data()),
        "x0 must not be given beside a mixed source.*leave x0 out",
    ),
    "no labels": (classes, r'kappa="class" needs y, the \(B,\) = \(4,\) classes.*got NoneType'),
    "too few labels": (lambda: classes(y=torch.arange(3)), r"y must be \(B,\) = \(4,\) integers"),
    "labels that are no integers": (lambda: classes(y=torch.ones(4)), "got .* torch.float32"),
    "labels that are truths": (lambda: classes(y=torch.ones(4).bool()), "got .* torch.bool"),
    "predictor of another shape": (
        lambda: mixed(nn.Conv2d(3, 3, 1)).prepare(data()),
        r"must return mean and log-variance, \(4, 6, 4, 4\).*got \(4, 3, 4, 4\)",
    ),
    "rollout": (
        lambda: roll_in(mixed(), net, mixed().prepare(data(), torch.arange(4)), None, 4),
        "a mixed source does not: use source=None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
