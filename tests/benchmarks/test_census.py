"""Gates that need no GPU: FLOPs, bytes and launches of a block, no read of a device by the host.

They hold the design, not the speed: bandwidth, launch gaps and clocks are not in them.
"""

import dataclasses
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import census, flops
from benchmarks.census import CORE, EAGER, PRODUCT, Scenario, per_block
from mixflow_fast import MixFlow
from mixflow_fast.kernels.activations.gelu import gelu
from mixflow_fast.models import build
from mixflow_fast.models.sit import repa_alignment_loss

BF16 = torch.bfloat16
# GFLOP an image: forward, training; percent of training that is attention. From a performance
# model made before the code, to its printed digits.
PUBLISHED = {
    "SiT-B/2 256": ("46.01", "138.0", "5.3"),
    "SiT-B/2 512": ("212.8", "638.3", "18.2"),
    "SiT-L/2 256": ("161.4", "484.2", "4.0"),
    "SiT-L/2 512": ("722.0", "2165.9", "14.3"),
    "SiT-XL/2 256": ("237.2", "711.7", "3.6"),
    "SiT-XL/2 512": ("1049.1", "3147.2", "12.9"),
    "REPA XL/2 256": ("241.4", "724.2", "3.5"),
    "REPA XL/2 512": ("1065.7", "3197.0", "12.7"),
    "DiTDH-XL 256": ("323.2", "968.2", "3.0"),
    "DiTDH-XL 512": ("1405.6", "4211.9", "10.9"),
}


def inputs(net, batch):
    with torch.device("meta"):
        x = torch.zeros(batch, net.in_channels, net.input_size, net.input_size)
        return x, torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)


# FLOPs


def counted(net, batch):
    """(forward, forward and backward) as PyTorch counts them; no gradient of the input."""
    with FlopCounterMode(display=False, depth=0) as counter:
        out = net(*inputs(net, batch))
        forward = counter.get_total_flops()
        outs = [out[0], *out[1]] if isinstance(out, tuple) else [out]
        torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])
    return forward, counter.get_total_flops()


def shallow(label, **options):
    depth = {"depth": (2, 2)} if label.startswith("DiTDH") else {"depth": 2}
    depth |= {"encoder_depth": 1} if label.startswith("REPA") else {}
    return flops.on_meta(label, **depth, **options)


@pytest.mark.parametrize("label", flops.NETWORKS)
def test_formulas_are_what_torch_counts(label) -> None:
    net = shallow(label)
    expected = flops.count(net)
    assert counted(net, 2) == (2 * expected.forward, 2 * expected.train)
    net.set_execution(mode="fused", compiled=False)
    expected = flops.count(net, padded=True)
    # The product of proj and v's bias: once a step, whatever the batch is.
    forward, train = 2 * expected.forward, 2 * expected.train
    assert counted(net, 2) == (forward + expected.per_step, train + 3 * expected.per_step)


@pytest.mark.parametrize("label", ["SiT-XL/2 256", "DiTDH-XL 256"])
def test_formulas_at_full_depth(label) -> None:
    net = flops.on_meta(label)
    expected = flops.count(net)
    assert counted(net, 1) == (expected.forward, expected.train)


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("SiT-S/2 256", {"qk_norm": True, "learn_sigma": False, "mlp_ratio": 3.0}),
        ("REPA XL/2 256", {"z_dims": [768, 1024], "projector_dim": 640}),
        ("DiTDH-S 256", {"use_swiglu": False, "wo_shift": True, "hidden_size": 384}),
        ("DiTDH-S 256", {"use_rope": False, "use_rmsnorm": False, "use_qknorm": True}),
    ],
)
def test_formulas_of_variants(label, options) -> None:
    net = shallow(label, **options)
    expected = flops.count(net)
    assert counted(net, 3) == (3 * expected.forward, 3 * expected.train)


def test_train_flops_of_a_toy_are_those_that_torch_counts() -> None:
    with torch.device("meta"):
        net = build("SiT-S/2", input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    assert counted(net, 3)[1] == 3 * flops.train_flops(net)


@pytest.mark.parametrize("label", PUBLISHED)
def test_the_published_table(label) -> None:
    found = flops.count(flops.on_meta(label))
    assert flops.train_flops(flops.on_meta(label)) == found.train
    values = found.forward / 1e9, found.train / 1e9, 300 * found.attention / found.train
    for value, text in zip(values, PUBLISHED[label], strict=True):
        digits = len(text.partition(".")[2])
        assert f"{value:.{digits}f}" == text


def test_padding_counts_only_where_there_is_padding() -> None:
    head, sit = flops.on_meta("DiTDH-XL 256"), flops.on_meta("SiT-XL/2 256")
    zeros = 2 * 6 * 256 * 2048 * (5504 - 5461)
    assert flops.count(head, padded=True).forward == flops.count(head).forward + zeros
    assert flops.count(sit, padded=True) == flops.count(sit)


# Bytes and launches of a block

SIT = Scenario("SiT-XL/2 256", 256)
FUSED = census.FUSED_FLASH
CUDNN = dataclasses.replace(FUSED, attention="cudnn")
RECOMPUTE = dataclasses.replace(FUSED, checkpointing="elementwise")
# Launches (besides products and attention) and passes over the residual stream, both directions.
# A design that moves less lowers the number here.
MOVED = {
    (SIT, EAGER): (43, 101.19),
    (SIT, FUSED): (24, 42.26),
    (SIT, CUDNN): (25, 48.26),
    (SIT, RECOMPUTE): (24, 48.27),
    (Scenario("SiT-XL/2 256", 32), EAGER): (43, 101.20),
    (Scenario("SiT-XL/2 256", 32), FUSED): (24, 42.69),
    (Scenario("SiT-XL/2 512", 64), FUSED): (24, 42.12),
    (Scenario("DiTDH-XL 256", 256), EAGER): (127, 338.57),
    (Scenario("DiTDH-XL 256", 256), FUSED): (26, 52.63),
    (Scenario("DiTDH-XL 256", 256, part=1), EAGER): (121, 372.37),
    (Scenario("DiTDH-XL 256", 256, part=1), FUSED): (38, 90.18),
    (Scenario("DiTDH-XL 256", 256, part=1), RECOMPUTE): (38, 96.86),
}


def name_of(key) -> str:
    scenario, execution = key
    return f"{scenario} {execution.mode} {execution.attention} {execution.checkpointing}"


@pytest.mark.parametrize("key", MOVED, ids=name_of)
def test_a_block_moves_no_more_than_it_did(key) -> None:
    launches, passes = MOVED[key]
    scenario, execution = key
    block = per_block(scenario, execution)
    assert block.launches() == launches
    assert block.passes() == pytest.approx(passes, abs=0.06)


def test_gate_of_the_eager_block() -> None:
    block = per_block(SIT, EAGER)
    assert block.passes("forward") == pytest.approx(30.1, abs=0.1)
    assert block.passes("backward") == pytest.approx(71.2, abs=0.1)
    # 20 and 40 with the products and attention.
    every = [
        sum(block.launches(p, kind) for kind in (census.REST, PRODUCT, CORE))
        for p in ("forward", "backward")
    ]
    assert every == [20, 40]


def test_gate_of_the_fused_block() -> None:
    packed = per_block(SIT, FUSED)
    assert packed.passes() <= 43 and packed.launches() <= 30
    # Of the 18 products, 3 are bias @ weight and its backward pass.
    assert packed.launches(kind=PRODUCT) == 18 and packed.launches(kind=CORE) == 2
    # Partial sums are in: without them the residual norms' backward passes would be 12.
    residual_norms = packed.table["backward", "residual_norm_backward"]
    assert 12.5 < residual_norms.bytes / packed.unit < 13.5 and residual_norms.launches == 2 * 3
    separate = per_block(SIT, CUDNN)
    assert separate.passes() - packed.passes() == pytest.approx(6)


def test_backends_that_pack_cost_the_same() -> None:
    one, other = (
        per_block(SIT, dataclasses.replace(FUSED, attention=name))
        for name in ("flash2", "efficient")
    )
    assert one.table == other.table


# What autograd holds of a block between the passes, in passes over the residual stream.
HEAD, ENCODER = (Scenario("DiTDH-XL 256", 256, part=part) for part in (1, 0))
KEPT = {
    (SIT, EAGER): 20.07,
    (SIT, FUSED): 18.06,
    (SIT, RECOMPUTE): 12.06,
    (ENCODER, FUSED): 20.06,
    (ENCODER, RECOMPUTE): 15.39,
    (HEAD, FUSED): 26.33,
    (HEAD, RECOMPUTE): 21.65,
}


@pytest.mark.parametrize("key", KEPT, ids=name_of)
def test_a_block_keeps_no_more_than_it_did(key) -> None:
    scenario, execution = key
    block = per_block(scenario, execution)
    assert block.kept / block.unit == pytest.approx(KEPT[key], abs=0.02)


# The census itself


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def cost_of(call):
    with census.Census() as mode:
        call()
    return {op: (cost.launches, cost.bytes) for (_, op), cost in mode.table.items()}


def test_plain_operators_count_what_they_touch() -> None:
    x, row = meta(4, 8, 16), meta(16)
    size = x.nbytes
    assert cost_of(lambda: x * row) == {"mul": (1, 2 * size + row.nbytes)}
    assert cost_of(lambda: x * row.expand(4, 8, 16)) == {"mul": (1, 2 * size + row.nbytes)}
    assert cost_of(lambda: x * x) == {"mul": (1, 2 * size)}
    assert cost_of(lambda: x.view(32, 16).t()[None]) == {}
    assert cost_of(lambda: x.add_(1)) == {"add_": (1, 2 * size)}
    assert cost_of(lambda: x.copy_(row)) == {"copy_": (1, size + row.nbytes)}
    assert cost_of(lambda: x.float().sum()) == {"_to_copy": (1, 3 * size), "sum": (1, 2 * size + 4)}
    assert cost_of(lambda: torch.cat([x, x[:1]])) == {"cat": (1, 2 * (size + size // 4))}
    assert cost_of(lambda: x @ meta(16, 5)) == {"mm": (1, 0)}


def test_hidden_copies_count() -> None:
    x, turned = meta(64, 32), meta(32, 64).t()
    (plain,), (copied,) = (cost_of(lambda x=x: gelu(x)).values() for x in (x, turned))
    assert copied == (plain[0] + 1, plain[1] + 2 * x.nbytes)


def test_a_formula_that_forgets_a_tensor_is_refused(monkeypatch) -> None:
    short = census._activation(lambda x, bias, backward, with_y: x.nbytes)
    monkeypatch.setitem(census.FUSED, "gelu", short)
    with pytest.raises(AssertionError, match="gelu"):
        cost_of(lambda: gelu(meta(64, 32)))


def test_an_operator_without_a_formula_is_refused(monkeypatch) -> None:
    monkeypatch.delitem(census.FUSED, "gelu")
    with pytest.raises(ValueError, match="no formula for the operator mixflow_fast::gelu"):
        cost_of(lambda: gelu(meta(64, 32)))


def test_mode_fused_needs_a_named_backend_and_no_compiler() -> None:
    with pytest.raises(ValueError, match="by name in mode fused, got auto"):
        per_block(SIT, dataclasses.replace(FUSED, attention="auto"))
    with pytest.raises(ValueError, match="uncompiled"):
        per_block(SIT, dataclasses.replace(FUSED, compiled=True))


def test_commands(monkeypatch, capsys) -> None:
    monkeypatch.setattr(census, "SCENARIOS", (Scenario("DiTDH-S 256", 2, part=1),))
    assert census.main(["--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["attention"] for row in rows} == {"auto", "flash2", "cudnn"}
    assert {row["checkpointing"] for row in rows} == {"none", "elementwise"}
    packed = [
        row
        for row in rows
        if (row["attention"], row["checkpointing"], row["kind"]) == ("flash2", "none", "rest")
    ]
    assert sum(row["launches"] for row in packed) == 38
    assert census.main([]) == 0
    assert "DiTDH-S 256 head, B=2, fused, attention flash2" in capsys.readouterr().out
    monkeypatch.setattr(flops, "NETWORKS", {k: flops.NETWORKS[k] for k in ("DiTDH-XL 256",)})
    assert flops.main([]) == 0
    assert "(969.0)" in capsys.readouterr().out


# No read of the device by the host

SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}


class HostSync(RuntimeError):
    pass


class SyncScan(TorchDispatchMode):
    """Refuses what makes the host wait for the device; also meta tensors refuse to be read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        masked = name == "index" and any(i.dtype == torch.bool for i in census.tensors_in(args[1]))
        if name in SYNCS or masked:
            raise HostSync(name)
        kwargs = kwargs or {}
        devices = {x.device.type for x in census.tensors_in([*args, *kwargs.values()])}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
        if len(devices) > 1:
            raise HostSync(f"{name} between devices")
        return func(*args, **kwargs)


def training_step(net, objective, batch=2) -> None:
    x1, _, y = inputs(net, batch)
    ids = torch.empty(batch, dtype=torch.int64, device="meta")
    with SyncScan():
        it = objective.prepare(x1, ids=ids)
        out = net(it.x, it.t, y)
        if isinstance(out, tuple):
            loss = objective.loss(out[0], it)
            loss = loss + 0.5 * repa_alignment_loss(out[1], [torch.empty_like(z) for z in out[1]])
        else:
            loss = objective.loss(out, it)
        loss.backward()


NETS = {
    "sit": ("SiT-S/2", {"depth": 2}),
    "repa": ("SiT-S/2", {"depth": 2, "encoder_depth": 1, "z_dims": [64], "qk_norm": True}),
    "ditdh": ("DiTDH-S", {"depth": (1, 1), "hidden_size": (384, 384)}),
}
EXECUTIONS = [
    {"mode": "eager"},
    {"mode": "fused", "compiled": False},
    {"mode": "fused", "compiled": False, "checkpointing": "selective"},
    {"mode": "fused", "compiled": False, "checkpointing": "elementwise"},
]


@pytest.mark.parametrize("execution", EXECUTIONS, ids=lambda e: "-".join(map(str, e.values())))
@pytest.mark.parametrize("kind", NETS)
def test_a_training_step_never_waits_for_the_device(kind, execution) -> None:
    name, options = NETS[kind]
    with torch.device("meta"):
        net = build(name, **options).set_execution(**execution)
    training_step(net, MixFlow(gamma=0.4, clock=net.clock))
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize(
    ("what", "reads"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: x.register_hook(lambda grad: int(grad.argmax()))),
        ("is_nonzero|_local_scalar_dense", lambda x: bool((x > 0).all())),
        ("index", lambda x: x[x > 0]),
        ("nonzero", lambda x: x.nonzero()),
        ("equal", lambda x: torch.equal(x, x + 1)),
        ("between devices", lambda x: x.cpu()),
        ("between devices", lambda x: x.to("cpu", non_blocking=True)),
    ],
)
def test_the_scan_sees_a_wait(what, reads, mode) -> None:
    with torch.device("meta"):
        net = build("SiT-S/2", depth=1).set_execution(mode=mode, compiled=False)
    net.t_embedder.register_forward_hook(lambda module, args, out: reads(out) and None)
    with pytest.raises(HostSync, match=what):
        training_step(net, MixFlow(gamma=0.4, clock=net.clock))
