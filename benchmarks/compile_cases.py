"""What `compile_report` compiles: every kind of launch at least once, not every product of kinds.

The operators and their inputs are those that `mixflow_fast/diagnostics` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mixflow_fast.diagnostics.block_cases import EPS, VARIANTS, BlockCase
from mixflow_fast.diagnostics.kernel_cases import ObjectiveCase, Setting
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.attention.qk_norm_rope import QkOptions, finish, prepare

CPU = torch.device("cpu")
SIT, RAE, ODD = (256, 4, 32, 32), (32, 768, 16, 16), (3, 7, 9, 5)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call whose launches are compiled.

    Attributes:
        op: the operator's name.
        variant: what is particular about this call.
        call: makes it, and calls its argument where what went before was only preparation.
        quick: whether `--quick` has it.
        kernels: those of its launches that are the operator's; all, if empty.
    """

    op: str
    variant: str
    call: Callable[[Callable[[], None]], object]
    quick: bool = False
    kernels: tuple[str, ...] = ()


def _objective(variant: str, quick: bool, case: ObjectiveCase) -> list[Case]:
    """A case for each operator that `MixFlow` calls, with the kernels that are its own."""
    kernels = {
        "interpolate": ("_interpolate_kernel",),
        "velocity_loss": ("_velocity_loss_kernel", "_reduce_kernel"),
        "scale_gradient_": ("_scale_gradient_kernel",),
    }
    return [Case(op, variant, partial(_launch, case), quick, own) for op, own in kernels.items()]


def _block(case: BlockCase, quick: bool = False) -> Case:
    words = [case.variant, "x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")]
    words += ["recompute"] if case.mode == "recompute" else []
    words += [f"no {name}" for name in case.without] + [f"frozen {n}" for n in case.frozen]
    words += [f"vectors {case.vector_dtype}"] if case.vector_dtype else []
    return Case(case.op, " ".join(words), partial(_launch, case), quick)


def _launch(case: ObjectiveCase | BlockCase, mark: Callable[[], None]) -> None:
    call = case.call(case.inputs(CPU, empty=True), "triton")
    mark()
    call()


def _around_attention(case: BlockCase, packed: bool, quick: bool = False) -> Case:
    """What stands around a backend of `attention`; `packed`: which writes packed gradients."""

    def call(mark: Callable[[], None]) -> None:
        given = case.inputs(CPU, empty=True).tensors
        given = {name: tensor.detach() for name, tensor in given.items()}
        qkv, norm = given["qkv"], VARIANTS[case.variant].norm or "none"
        tensors = {name: given.get(name) for name in QkOptions._fields[:6]}
        options = QkOptions(**tensors, norm=norm, eps=EPS)
        if case.variant != "plain":
            prepare(qkv, options, "triton")
        out = torch.empty_like(qkv)
        gradients = tuple(torch.empty(case.shape, dtype=case.dtype) for _ in range(3))
        finish(out.unbind(2)[:2] if packed else gradients, out, qkv, options, "triton")

    name = _block(case).variant + (", packed" if packed else "")
    return Case("attention", name, call, quick)


def _normal(shape: tuple[int, ...], mark: Callable[[], None]) -> None:
    numel = torch.Size(shape[1:]).numel()
    philox.normal(0, philox.Stream.NOISE, torch.arange(shape[0]), numel, impl="triton")


def _objective_cases() -> Iterator[Case]:
    for name, shape in (("rae", RAE), ("sit", SIT)):
        for short, dtype in (("bf16", BF16), ("fp32", FP32)):
            yield from _objective(
                f"{name} {short}", True, ObjectiveCase(shape=shape, dtype=dtype, drawn=True)
            )
    rest = {"prediction": "score", "path": "vp", "loss_weight": "likelihood", "sigma": True}
    noise = {"prediction": "noise", "path": "gvp", "loss_weight": "velocity", "weight": "sample"}
    logit = {"timesteps": "logit-normal", "shift": 6.93, "clock": "noise_at_1"}
    settings = (
        (SIT, FP16, Setting()),
        (ODD, FP16, Setting()),
        (RAE, BF16, Setting(patch_size=1)),
        (SIT, BF16, Setting(patch_size=2)),
        (SIT, BF16, Setting(patch_size=2, sigma=True)),
        ((3, 7, 9, 6), FP32, Setting(patch_size=3)),
        (ODD, FP32, Setting(patch_size=1)),
        (SIT, FP16, Setting(moments=True, patch_size=2)),
        (SIT, BF16, Setting(path="gvp", interval="full", moments=True, clock="noise_at_1")),
        (RAE, BF16, Setting(**logit)),
        (ODD, FP16, Setting(path="vp", timesteps="uniform", interval="raw", shift=2.0)),
        (SIT, BF16, Setting(prediction="data")),
        (SIT, BF16, Setting(**rest)),
        (SIT, FP16, Setting(**noise)),
        (SIT, BF16, Setting(weight="mask")),
    )
    cases = [ObjectiveCase(shape=s, setting=o, dtype=d, drawn=True) for s, d, o in settings]
    cases += [
        ObjectiveCase(shape=RAE, dtype=FP32, pred_dtype=BF16, drawn=True),
        ObjectiveCase(shape=(64, 3, 256, 256), mode="forward", drawn=True),
        ObjectiveCase(shape=RAE, noise_dtype=BF16, setting=Setting(ids=False)),
    ]
    for case in cases:
        quick = case.setting.sigma and case.setting.patch_size is not None
        yield from _objective(case.label, quick, case)
    yield Case("normal", "sit", partial(_normal, SIT), True)
    yield Case("normal", "odd", partial(_normal, ODD))


def _norm_cases() -> Iterator[Case]:
    sample, rms, rms_token = "layer per sample", "rms per sample", "rms per token"
    xl, head, wide = (256, 256, 1152), (64, 256, 2048), (8, 256, 4096)
    bare, no_shift = ("h_bias",), ("shift",)
    norm = partial(BlockCase, op="residual_norm")
    alone = partial(BlockCase, op="modulated_norm")
    yield _block(norm(variant=sample, shape=xl, without=bare), quick=True)
    yield _block(norm(variant=sample, shape=xl, without=bare, dtype=FP32), quick=True)
    yield _block(norm(variant=rms_token, shape=head, without=bare), quick=True)
    yield _block(alone(variant=sample, shape=xl), quick=True)
    frozen = ("shift", "scale", "gate")
    yield _block(norm(variant=sample, shape=xl, without=bare, frozen=frozen))
    yield _block(norm(variant="layer per token", shape=head, without=bare))
    yield _block(norm(variant="layer per token", shape=wide, without=bare))
    yield _block(norm(variant=rms_token, shape=(3, 7, 33), without=bare, dtype=FP32))
    yield _block(norm(variant=rms_token, shape=head, without=bare + no_shift, dtype=FP32))
    yield _block(norm(variant=sample, shape=xl, without=bare, dtype=FP32, vector_dtype=BF16))
    yield _block(norm(variant=rms, shape=(64, 256, 1152), without=no_shift, dtype=FP32))
    yield _block(norm(variant=sample, shape=(256, 256, 384)))
    yield _block(norm(variant=sample, shape=(256, 256, 768), dtype=FP16))
    yield _block(norm(variant=sample, shape=head))
    yield _block(norm(variant=rms, shape=head, dtype=FP32))
    yield _block(alone(variant=sample, shape=xl, mode="recompute"))
    # Without a branch, and x' is used elsewhere.
    branch = ("h", "gate", "h_bias")
    yield _block(norm(variant=sample, shape=xl, mode="recompute", without=branch))
    yield _block(alone(variant=rms_token, shape=head))
    # Forward and backward pass, and the backward pass that recomputes y.
    for mode in ("full", "recompute"):
        yield _block(norm(variant=sample, shape=xl, mode=mode), quick=True)
        yield _block(norm(variant=sample, shape=xl, mode=mode, dtype=FP32))
        yield _block(norm(variant=sample, shape=(256, 256, 1024), mode=mode))
        yield _block(norm(variant=rms, shape=(64, 256, 1152), mode=mode))
        yield _block(norm(variant=rms_token, shape=head, mode=mode))
        yield _block(norm(variant=rms, shape=wide, mode=mode, dtype=FP32))
        yield _block(norm(variant=rms_token, shape=wide, mode=mode, dtype=FP32))
        yield _block(norm(variant=sample, shape=(3, 7, 1023), mode=mode, dtype=FP16))
        yield _block(norm(variant=sample, shape=wide, mode=mode))
    recompute = partial(norm, mode="recompute", dtype=FP32)
    yield _block(recompute(variant=sample, shape=xl, vector_dtype=BF16))
    yield _block(recompute(variant=rms_token, shape=head, without=no_shift))


def _activation_cases() -> Iterator[Case]:
    for op, width, narrow, odd in (("gelu", 4608, 1536, 1023), ("swiglu", 11008, 4096, 2046)):
        row, wide = partial(BlockCase, op=op, variant="bias"), (32, 256, width)
        recompute = partial(row, mode="recompute")
        yield _block(row(shape=wide), quick=True)
        yield _block(row(shape=wide, dtype=FP32), quick=True)
        yield _block(row(shape=wide, vector_dtype=FP32))
        yield _block(row(shape=wide, without=("bias",)))
        yield _block(row(shape=wide, frozen=("bias",)))
        yield _block(row(shape=(32, 256, narrow), dtype=FP16))
        yield _block(row(shape=(1, 256, width)))
        yield _block(row(shape=(2, 7, odd)))
        yield _block(recompute(shape=wide), quick=True)
        yield _block(recompute(shape=wide, dtype=FP32))
        for shape in ((2, 7, 2046), (257, 257, width), (1, 1, width)):
            yield _block(recompute(shape=shape))
    yield _block(BlockCase(op="swiglu", variant="bias", shape=(32, 256, 2 * 2730)))


def _attention_cases() -> Iterator[Case]:
    xl, b, odd = (32, 256, 16, 72), (32, 256, 12, 64), (2, 5, 3, 10)
    row = partial(BlockCase, op="attention")
    for variant in ("rope", "layer"):
        yield _around_attention(row(variant=variant, shape=xl), packed=False, quick=True)
        yield _around_attention(row(variant=variant, shape=b, dtype=FP16), packed=False)
    for shape in (xl, odd):
        yield _around_attention(row(variant="rms, rope", shape=shape), packed=False)
    head = (32, 256, 16, 128)
    yield _around_attention(row(variant="rope", shape=xl), packed=True)
    yield _around_attention(row(variant="rope", shape=xl, dtype=FP32), packed=False)
    yield _around_attention(row(variant="rope", shape=head), packed=False)
    yield _around_attention(row(variant="rope", shape=odd, dtype=FP16), packed=False)
    yield _around_attention(row(variant="layer", shape=xl, vector_dtype=FP32), packed=False)
    yield _around_attention(row(variant="layer", shape=xl, dtype=FP32), packed=True)
    yield _around_attention(row(variant="layer", shape=(2, 5, 3, 33), dtype=FP32), packed=False)
    yield _around_attention(row(variant="rms, rope", shape=head), packed=False)
    yield _around_attention(row(variant="rms, rope", shape=xl, dtype=FP32), packed=True)
    yield _around_attention(row(variant="plain", shape=xl), packed=False)


CASES = [*_objective_cases(), *_norm_cases(), *_activation_cases(), *_attention_cases()]
