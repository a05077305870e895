"""Where samples begin: the official test-time source, its formulas, and who is told which class."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast.flow.source import MixedSource, StandardSource, mixed_moments
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.models import SongUNet, SourceUNet, build
from mixflow_fast.sampling import PreparedSampling, Sampler, sample, sample_source, sampling_noise
from mixflow_fast.sampling.draws import draw_labels
from mixflow_fast.sampling.guidance import Guidance
from tests.support.golden import load
from tests.support.networks import relative
from tests.support.recorded_draws import use_recorded, words_of

SHAPE = (2, 3, 4)
IDS = torch.tensor([0, 3, 17, 2**33])
MODES = {"D": "moments", "S": "samples"}


class Table(nn.Module):
    """Recognisable moments of a class: mean 10 y + channel, log-variance -y."""

    def __init__(self, num_classes: int = 3, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        self.config = {"num_classes": num_classes}
        self.shape, self.seen = shape, []
        self.register_parameter("unused", nn.Parameter(torch.zeros(1)))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        assert y.dtype == torch.int64 and int(y.max()) < self.config["num_classes"]
        assert not self.training
        self.seen += y.tolist()
        row = y.view(-1, 1, 1, 1).float()
        channel = torch.arange(self.shape[0]).view(1, -1, 1, 1)
        flat = torch.zeros(len(y), *self.shape)
        return flat + 10 * row + channel, flat - row


def eps(stream: Stream = Stream.SAMPLE_NOISE, seed: int = 5, ids: Tensor = IDS) -> Tensor:
    return philox.normal(seed, stream, ids, math.prod(SHAPE)).view(-1, *SHAPE)


def shifting(z: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * z + 1, 0.5 * z


def official_predictor(name: str, golden: dict[str, Tensor], config: dict) -> SourceUNet:
    """The network of the file, with its weights."""
    made = config["predictor"]
    classes = {"num_classes": 5, "size": made["sample_size"]} if name == "class" else {}
    widths, layers = made["block_out_channels"], made["layers_per_block"]
    net = SourceUNet(made["in_channels"], widths=widths, layers=layers, **classes)
    prefix = "state.network."
    net.load_state_dict(
        {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    )
    return net.eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["noise_only", "class"])
@pytest.mark.parametrize("by", ["recorded moments", "network"])
@torch.no_grad()
def test_official_source_at_test_time(monkeypatch, name: str, mode: str, by: str) -> None:
    """Given the recorded weights and draws: at a weight each, and at w = 0.5 for all."""
    golden, config = load(f"mixed_train_{name}")
    asked = []
    network = official_predictor(name, golden, config)

    def predictor(kappa: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        asked.append(kappa)
        return network(kappa) if by == "network" else (golden["mean"], golden["log_var"])

    drawn = use_recorded(
        monkeypatch,
        {
            Stream.SAMPLE_NOISE: golden["eps2"],
            Stream.SAMPLE_SOURCE_NOISE: golden["eps1"],
            Stream.SAMPLE_SIGNAL: golden.get("z", torch.empty(0)),
            Stream.SAMPLE_WEIGHT: golden["w"],
        },
    )
    kappa = "class" if name == "class" else "noise"
    source = MixedSource(predictor, kappa=kappa, mode=MODES[mode], lam=1.0)
    key = f"source_{'noise_only_' if name == 'class' else ''}{mode}.x0"
    shape, ids = tuple(golden["x1"].shape[1:]), torch.arange(4)
    x0 = sampling_noise(source, 0, ids, shape, y=golden["label"])
    tolerance = 1e-5 if by == "network" else 1e-6
    assert relative(x0, golden[key]) < tolerance
    assert torch.equal(asked[0], golden["label" if kappa == "class" else "z"])
    expected = [Stream.SAMPLE_NOISE, Stream.SAMPLE_SIGNAL, Stream.SAMPLE_WEIGHT]
    expected += [Stream.SAMPLE_SOURCE_NOISE] if mode == "S" else []
    assert drawn == [s for s in expected if kappa == "noise" or s != Stream.SAMPLE_SIGNAL]
    if name == "noise_only":
        x0 = sampling_noise(source, 0, ids, shape, w=0.5)
        assert relative(x0, golden[f"{key}_w0.5"]) < tolerance


@pytest.mark.parametrize("w", [0.0, 0.25, 1.0, None])
@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("kappa", ["class", "noise"])
def test_formula_in_float64(kappa: str, mode: str, w: float | None) -> None:
    """Every draw has a stream of its own, and none of them is training's."""
    predictor = Table().eval() if kappa == "class" else shifting
    source = MixedSource(predictor, kappa=kappa, mode=mode, lam=1.0)
    y = torch.tensor([2, 0, 1, 1])
    mean, log_var = predictor(y if kappa == "class" else eps(Stream.SAMPLE_SIGNAL))
    weight = (
        philox.uniform(5, Stream.SAMPLE_WEIGHT, IDS)[:, 0] if w is None else torch.full((4,), w)
    )
    weight = weight.double().view(-1, 1, 1, 1)
    mean, log_var = mean.double(), log_var.double()
    noise, own = eps().double(), eps(Stream.SAMPLE_SOURCE_NOISE).double()
    if mode == "moments":
        expected = weight * mean + (1 + weight * torch.expm1(log_var)).sqrt() * noise
    else:
        expected = weight * (mean + (log_var / 2).exp() * own) + (1 - weight) * noise
    x0 = sampling_noise(source, 5, IDS, SHAPE, y=y, w=w)
    assert x0.dtype == torch.float32 and relative(x0, expected) < 1e-6
    if w == 0.0:
        assert torch.equal(x0, eps())
    # A sample does not depend on those beside it.
    alone = sampling_noise(source, 5, IDS[2:3], SHAPE, y=y[2:3], w=w)
    assert torch.equal(alone, x0[2:3])
    assert not torch.equal(x0, sampling_noise(source, 6, IDS, SHAPE, y=y, w=w))


@pytest.mark.parametrize("kappa", ["data", "data+noise"])
def test_data_are_not_known(kappa: str) -> None:
    """N(0, I), as published, without a call of the predictor; and w is refused, with the reason."""

    def predictor(x1: Tensor) -> Tensor:
        raise AssertionError("asked")

    source = MixedSource(predictor, kappa=kappa, lam=1.0)
    assert torch.equal(sampling_noise(source, 5, IDS, SHAPE), eps())
    assert sample_source(source) is None
    with pytest.raises(ValueError, match=re.escape(f"w = 0.5 has no effect: the source sees the "
                                                   f"data (kappa='{kappa}')")):  # fmt: skip
        sampling_noise(source, 5, IDS, SHAPE, w=0.5)


@pytest.mark.parametrize("source", [None, StandardSource()])
def test_without_a_source(source: StandardSource | None) -> None:
    assert torch.equal(sampling_noise(source, 5, IDS, SHAPE), eps())
    with pytest.raises(ValueError, match="trained without a mixed source"):
        sample_source(source, 0.0)


@pytest.mark.parametrize("mode", MODES.values())
def test_a_weight_is_the_same_number_whatever_training_drew(mode: str) -> None:
    """The official code divides w = 0.5 by the number of weights where these are discrete."""
    found = [
        sampling_noise(MixedSource(shifting, "noise", mode, w, lam=1.0), 5, IDS, SHAPE, w=0.5)
        for w in ("uniform", "discrete", "discrete(7)", 0.9)
    ]
    assert all(torch.equal(x0, found[0]) for x0 in found)
    mean, std = mixed_moments(*shifting(eps(Stream.SAMPLE_SIGNAL)), 0.5)
    if mode == "moments":
        assert relative(found[0], mean + std * eps()) < 1e-6


def test_discrete_weights_reach_both_ends() -> None:
    """The official code never tests w = 1, and fails where none is given."""
    ids = torch.arange(4000)
    source = MixedSource(lambda z: (torch.ones_like(z), 0 * z), "noise", w="discrete(4)", lam=1.0)
    x0 = sampling_noise(source, 1, ids, (1, 1, 1)).flatten()
    noise = philox.normal(1, Stream.SAMPLE_NOISE, ids, 1).flatten()
    weights = ((x0 - noise) * 4).round().long()  # mean 1, deviation 1: x0 = w + eps
    assert torch.allclose(x0 - noise, weights / 4, atol=1e-5)
    counts = torch.bincount(weights, minlength=5)
    assert counts.shape == (5,) and int(counts.min()) > 700


def test_discrete_weights_as_they_are_drawn(monkeypatch) -> None:
    k = torch.tensor([0, 250, 999, 1000])
    words = words_of(k, 1000).view(-1, 1)
    use_recorded(monkeypatch, {Stream.SAMPLE_WEIGHT: words, Stream.SAMPLE_NOISE: torch.zeros(4, 1),
                               Stream.SAMPLE_SIGNAL: torch.zeros(4, 1)})  # fmt: skip
    source = MixedSource(lambda z: (torch.ones_like(z), 0 * z), "noise", w="discrete", lam=1.0)
    x0 = sampling_noise(source, 0, torch.arange(4), (1, 1, 1))
    assert x0.flatten().tolist() == pytest.approx([0.0, 0.25, 0.999, 1.0])


@pytest.mark.parametrize(
    ("y", "got"),
    [
        (None, "got None"),
        (torch.zeros(3, dtype=torch.int64), "got \\(3,\\) torch.int64"),
        (torch.zeros(4), "got \\(4,\\) torch.float32"),
    ],
)
def test_classes_that_do_not_fit(y: Tensor | None, got: str) -> None:
    source = MixedSource(Table().eval(), "class", lam=1.0)
    with pytest.raises(ValueError, match=f"one whole class for each of 4 samples, {got}"):
        sampling_noise(source, 5, IDS, SHAPE, y=y)


@pytest.mark.parametrize("w", [-0.1, 1.5, float("nan"), True, "uniform"])
def test_weights_that_are_none(w: object) -> None:
    source = MixedSource(shifting, "noise", lam=1.0)
    with pytest.raises(ValueError, match="w must be a number in"):
        sampling_noise(source, 5, IDS, SHAPE, w=w)


class Still(nn.Module):
    """A network whose samples are what they began at, and which notes its inputs."""

    path, in_channels, input_size = "linear", SHAPE[0], 4

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.config = {"in_channels": 2, "input_size": (3, 4), "num_classes": num_classes}
        self.num_classes, self.clock, self.seen = num_classes, "data_at_1", []

    @property
    def null_class(self) -> int:
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.seen.append((x.clone(), None if y is None else y.tolist()))
        return torch.zeros_like(x)


def begin(num: int, batch_size: int, num_classes: int = 3, **options) -> tuple[Tensor, Table]:
    table = Table()
    source = sample_source(MixedSource(table, "class", lam=1.0), w=1.0)
    found = sample(
        Still(num_classes), num=num, steps=1, batch_size=batch_size, source=source, **options
    )
    assert table.training
    return found.x, table


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_the_last_batch_has_its_own_classes(batch_size: int) -> None:
    """Seven samples: the official code gives a shorter last batch the labels of a whole one."""
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 1])
    found, table = begin(7, batch_size, labels=labels)
    ids = torch.arange(7)
    expected = sampling_noise(
        MixedSource(Table().eval(), "class", lam=1.0), 0, ids, (2, 3, 4), y=labels, w=1.0
    )
    assert torch.equal(found, expected)
    assert table.seen[:7] == labels.tolist() and len(table.seen) % batch_size == 0


def test_labels_that_are_drawn_are_the_sources_too() -> None:
    table = Table()
    source = sample_source(MixedSource(table, "class", lam=1.0), w=1.0)
    for balanced in (False, True):
        table.seen.clear()
        found = sample(
            Still(3), num=6, steps=1, batch_size=6, source=source, balanced=balanced, seed=4
        )
        assert table.seen == found.labels.tolist()


def test_guidance_shares_the_state_and_the_source_sees_the_true_class() -> None:
    """Both halves of the doubled batch are one x_t; only the network's label is dropped."""
    table, net = Table(), Still(3)
    source = sample_source(MixedSource(table, "class", lam=1.0), w=1.0)
    labels = torch.tensor([2, 1])
    prepared = PreparedSampling(
        net, Sampler("euler", 1), Guidance(2.0, None), batch_size=2, source=source
    )
    found = prepared.draw(torch.arange(2), labels)
    (x, y), = net.seen  # fmt: skip
    assert sorted(y) == [1, 2, 3, 3] and table.seen == [2, 1]
    assert torch.equal(x[:2], x[2:]) and torch.equal(x[:2], found.x)
    assert float(found.x[0].mean()) > 15 and float(found.x[1].mean()) < 15


def test_the_null_class_begins_at_the_source_of_a_drawn_class() -> None:
    """Training hides the label from the network and not from the source."""
    labels = torch.full((40,), 3)
    found, table = begin(40, 40, labels=labels)
    drawn = draw_labels(0, torch.arange(40), 3)
    assert table.seen == drawn.tolist() and set(table.seen) == {0, 1, 2}
    assert float(found[drawn == 2].mean()) > 19


def test_a_network_without_classes_and_a_source_with_them() -> None:
    found, table = begin(9, 4, num_classes=0)
    assert table.seen[:9] == draw_labels(0, torch.arange(9), 3).tolist()
    given, table = begin(3, 3, num_classes=0, labels=torch.tensor([2, 2, 0]))
    assert table.seen == [2, 2, 0]


@pytest.mark.parametrize("kappa", ["class", "noise"])
def test_the_official_networks_together(kappa: str) -> None:
    """SongUNet, which has no classes, from a SourceUNet, whose classes may be more than one."""
    torch.manual_seed(0)
    net = SongUNet(8, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    classes = {"num_classes": 5, "size": 8} if kappa == "class" else {}
    predictor = SourceUNet(3, widths=(8,), layers=1, groups=4, **classes)
    source = MixedSource(predictor, kappa, lam=1.0)
    found = sample(net, num=6, steps=1, batch_size=4, seed=1, source=sample_source(source, 1.0))
    y = draw_labels(1, torch.arange(6), 5)
    with torch.no_grad():
        x0 = sampling_noise(source, 1, torch.arange(6), (3, 8, 8), y=y, w=1.0)
        x = x0 + net.eval()(x0, torch.zeros(6))
    assert relative(found.x, x) < 1e-5 and found.labels is None and len(set(y.tolist())) > 2
    chosen = sample(
        net, num=2, steps=1, labels=torch.tensor([4, 0]), source=sample_source(source, 1.0)
    )
    own = torch.tensor([4, 0])
    with torch.no_grad():
        x0 = sampling_noise(source, 0, torch.arange(2), (3, 8, 8), y=own, w=1.0)
        assert relative(chosen.x, x0 + net(x0, torch.zeros(2))) < 1e-5


def test_samples_of_a_source_do_not_depend_on_batches_and_numbers() -> None:
    torch.manual_seed(0)
    net = build("SiT-S/8", input_size=8, depth=1, num_classes=3, in_channels=4)
    nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    source = sample_source(MixedSource(Table(shape=(4, 8, 8)), "class", lam=1.0))
    few = sample(net, num=3, steps=2, batch_size=4, source=source)
    many = sample(net, num=6, steps=2, batch_size=4, source=source)
    plain = sample(net, num=3, steps=2, batch_size=4)
    assert torch.equal(few.x, many.x[:3]) and relative(few.x, plain.x) > 0.1
    still = sample(net, num=3, steps=2, batch_size=4, source=sample_source(source.source, 0.0))
    assert torch.equal(still.x, plain.x)


def test_records_and_descriptions() -> None:
    source = MixedSource(shifting, "noise", "samples", "discrete(10)", lam=1.0)
    assert sample_source(source).to_record() == {
        "kind": "mixed", "kappa": "noise", "mode": "samples", "w": "discrete(10)",
    }  # fmt: skip
    assert sample_source(source, 1).to_record()["w"] == 1.0
    assert sample_source(source, 0.25).describe() == (
        "mixed source, kappa noise, mode samples, w 0.25"
    )
    assert sample_source(source).describe().endswith("w discrete(10), as in training")
