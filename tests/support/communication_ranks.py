"""What the settings of communication do on real ranks, several cases in one start of them.

torchrun ... -m tests.support.communication_ranks runs OUT '[["name", ["section.field=value"]]]'
    trains OUT/name with each list of settings
torchrun ... -m tests.support.communication_ranks graphs OUT '[["name", ["section.field=value"]]]'
    the same in model.mode=eager and, on a stand-in for CUDA graphs, in model.mode=graph; steps
    after the first must be replays
torchrun ... -m tests.support.communication_ranks errors FILE '[2]'
    the error of a step's mean gradient by ZeRO stage (or "ddp") and train.reduce_dtype
torchrun ... -m tests.support.communication_ranks gathered FILE '[["bf16", 2]]'
    how many broadcasts `Engine.gathered` took; its bits are compared with DeepSpeed's own here
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from benchmarks.recorded_step import Recorder
from mixflow_fast.config.schema import OptimConfig, TrainConfig
from mixflow_fast.distributed import process_group
from mixflow_fast.models import SiT
from mixflow_fast.training import build, ddp_engine, gathering
from mixflow_fast.training.build import build_engine
from mixflow_fast.training.engines import Engine
from mixflow_fast.training.trainer import train
from tests.support.recording import RecorderStandIn
from tests.support.runs import tiny

BETA1 = 0.9


class Odd(SiT):
    """With a parameter of 13 elements before all others; ZeRO pads it to 16 bytes, or not."""

    def __init__(self, **size: int) -> None:
        super().__init__(**size)
        self.odd = torch.nn.Parameter(torch.zeros(13))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t, y) + self.odd.square().sum()


def small_network(kind: type[SiT] = SiT) -> SiT:
    """Every parameter takes part: as it is built, SiT's last layer and gates are zero."""
    torch.manual_seed(0)
    net = kind(input_size=4, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return net


def loss_of(net: object, rank: int) -> torch.Tensor:
    """The mean square of the output for this rank's own examples."""
    g = torch.Generator().manual_seed(rank)
    x, t = torch.randn(2, 4, 4, 4, generator=g), torch.rand(2, generator=g)
    return net(x, t, torch.tensor([rank, 9])).float().square().mean()


def mean_gradient(net: SiT) -> dict[str, torch.Tensor]:
    """The float64 mean of what the ranks' bf16 networks give, without any engine."""
    loss_of(net, dist.get_rank()).backward()
    means = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.bfloat16
            means[name] = parameter.grad.double()
            dist.all_reduce(means[name])
            means[name] /= dist.get_world_size()
    return means


def engine_of(model: SiT, **train: object) -> Engine:
    """The engine of a step of two examples a rank."""
    batch = 2 * dist.get_world_size()
    config = TrainConfig(global_batch_size=batch, microbatch_size=2, device="cpu", **train)
    engine = build_engine(config, OptimConfig(beta1=BETA1, grad_clip=0.0, impl="foreach"), 2, model)
    engine.start(None)
    return engine


def error_of(stage: int | str, reduce_dtype: str) -> float:
    """Relative RMS error of the mean gradient that reaches the optimizer.

    After one step Adam's first moment is (1 - beta1) times the gradient.
    """
    model = small_network()
    cast = copy.deepcopy(model).bfloat16()
    for name in model.float32_names:
        cast.get_parameter(name).data = model.get_parameter(name).data.clone()
    how = {"engine": "ddp", "zero_stage": 0} if stage == "ddp" else {"zero_stage": stage}
    engine = engine_of(model, **how, reduce_dtype=reduce_dtype)
    truth = mean_gradient(cast)  # now: ZeRO 3 has put its own F.linear into the process
    engine.backward(loss_of(engine, dist.get_rank()))
    engine.step()
    wrong, size = 0.0, 0.0
    for name, moment in engine.gathered("exp_avg", stepped=True):
        gradient = moment.double() / (1 - BETA1)
        wrong += (gradient - truth[name]).square().sum().item()
        size += truth[name].square().sum().item()
    engine.close()
    assert size > 0
    return (wrong / size) ** 0.5


def broadcasts_of(precision: str, stage: int) -> int:
    """Calls that put the weights together; weights and moments have the bits that DeepSpeed finds.

    Buffers are so small that parameters of one do not fit into the next, and some are larger.
    """
    gathering.plan.__defaults__ = (3000,)
    engine = engine_of(small_network(Odd), precision=precision, zero_stage=stage)
    engine.backward(loss_of(engine, dist.get_rank()))
    engine.step()
    recorder = Recorder()
    with recorder:
        weights = dict(engine.gathered("model", stepped=True))
    moments = dict(engine.gathered("exp_avg", stepped=True))
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            assert weights[name].is_contiguous() and weights[name].dtype == torch.float32
            assert weights[name].untyped_storage().nbytes() == weights[name].nbytes
            assert torch.equal(weights.pop(name), safe_get_full_fp32_param(parameter)), name
            theirs = safe_get_full_optimizer_state(parameter, "exp_avg")
            assert theirs.any() and torch.equal(moments.pop(name), theirs), name
    assert not weights and not moments
    engine.close()
    return sum(one.kind == "broadcast" for one in recorder.collectives)


def train_with_graphs(where: Path, name: str, overrides: list[str]) -> None:
    """OUT/name_eager and OUT/name_graph."""
    recorder = RecorderStandIn()
    torch.compile = lambda function, **_: function
    build.check_device = lambda device: None
    ddp_engine.CudaRecorder = lambda device: recorder
    for mode in ("eager", "graph"):
        own = [*overrides, f"model.mode={mode}"]
        result = train(tiny(where / f"{name}_{mode}", "train.device=cpu", *own), quiet=True)
    assert recorder.steps == result.step - 1 > 1, recorder.steps


def main() -> None:
    torch.set_num_threads(1)
    what, where, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if what == "runs":
        for name, overrides in cases:
            train(tiny(where / name, "train.device=cpu", *overrides), quiet=True)
        return
    if what == "graphs":
        for case in cases:
            train_with_graphs(where, *case)
        return
    process_group.init_process_group("cpu")
    if what == "gathered":
        counts = [broadcasts_of(*case) for case in cases]
        if dist.get_rank() == 0:
            where.write_text(json.dumps(counts))
        return
    errors = {f"{s} {dtype}": error_of(s, dtype) for s in cases for dtype in ("bf16", "fp32")}
    if dist.get_rank() == 0:
        where.write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
