"""The benchmark of the transformer-block ops: cells, providers, and checks that can be red."""

import importlib.machinery
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import block_checks, block_providers, checks, kernel_suite, replay
from benchmarks.block_ops import BLOCK_OPS, MAIN, MORE, SMOKE, BlockCase, block_cases
from benchmarks.block_providers import NotThere
from benchmarks.block_providers_plain import plain_modulated_norm
from benchmarks.rows import Deadline, Writer, read

CPU = torch.device("cpu")
# Where kernels run: on the CPU in Triton's interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}
LARGER = {
    "residual_norm": (4, 8, 64),
    "modulated_norm": (4, 8, 64),
    "gelu": (4, 8, 64),
    "swiglu": (4, 8, 64),
    "qk_norm_rope": (4, 9, 2, 16),
    "attention": (4, 9, 2, 16),
}


def _case(op: str, variant: str = "", mode: str = "full", **options) -> BlockCase:
    first = next(case.variant for case in MAIN if case.op == op)
    return BlockCase(op=op, mode=mode, variant=variant or first, shape=LARGER[op], **options)


def test_cells_name_every_op_most_telling_first() -> None:
    assert {case.op for case in MAIN} == {case.op for case in SMOKE} == set(BLOCK_OPS)
    cells = [*MAIN, *MORE]
    assert len(set(cells)) == len(cells)
    assert {case.op for case in cells if case.mode == "forward"} == set(BLOCK_OPS)
    residual_norms = {(case.variant, case.shape) for case in cells if case.op == "residual_norm"}
    assert {("layer per sample", (B, N, 1152)) for B, N in ((256, 256), (32, 256), (64, 1024))} < (
        residual_norms
    )
    assert {
        ("rms per sample", (64, 256, 1152)),
        ("rms per token", (64, 256, 2048)),
    } < residual_norms
    inner = {case.shape[-1] // 2 for case in cells if case.op == "swiglu"}
    assert inner == {3072, 5461, 5504}
    heads = {(c.shape[1], c.shape[3]) for c in cells if c.op == "attention" and c.mode == "full"}
    assert heads == set(itertools.product((256, 1024), (72, 128, 64)))
    main, more = block_cases(("gelu", "interpolate"))
    assert {case.op for case in (*main, *more)} == {"gelu"}


def test_bytes_are_those_of_one_pass() -> None:
    def units(op: str, mode: str, shape: tuple[int, ...], variant: str = "") -> float:
        case = replace(_case(op, variant, mode), shape=shape)
        return case.algorithmic_bytes / (2 * case.elements)

    # Vectors, statistics and partial sums are the rest.
    assert units("residual_norm", "forward", (256, 256, 1152)) == pytest.approx(4, rel=0.02)
    assert units("residual_norm", "full", (256, 256, 1152)) == pytest.approx(4 + 6, rel=0.06)
    assert units("modulated_norm", "full", (256, 256, 1152)) == pytest.approx(2 + 3, rel=0.06)
    # shift, scale and gate of each token, and their gradients
    per_token = units("residual_norm", "full", (64, 256, 2048), "rms per token")
    assert per_token == pytest.approx(4 + 6 + 3 + 5, rel=0.06)
    assert units("gelu", "full", (256, 256, 4608)) == pytest.approx(2 + 3, rel=0.02)
    assert units("swiglu", "full", (64, 256, 11008)) == pytest.approx(1.5 + 2.5, rel=0.03)
    # Upstream gradient, input, its gradient, and the output recomputed.
    assert units("gelu", "recompute", (256, 256, 4608)) == pytest.approx(4, rel=0.02)
    assert units("swiglu", "recompute", (64, 256, 11008)) == pytest.approx(3, rel=0.03)
    assert units("qk_norm_rope", "forward", (2, 4, 2, 8)) == 4
    assert units("qk_norm_rope", "full", (2, 4, 2, 8), "rope") == 4 + 5
    assert units("qk_norm_rope", "full", (2, 4, 2, 8), "rms, rope") == 4 + 7
    assert units("attention", "full", (2, 4, 2, 8)) == 4 + 8
    attention = replace(_case("attention"), shape=(2, 4, 3, 8))
    # q k^T and p v, and twice as many products in the backward pass, two FLOPs a multiply-add.
    assert attention.flops == 3 * 2 * (2 * 3 * (4 * 4 * 8 * 2))
    assert _case("gelu").flops is None


VARIANTS = sorted({(case.op, case.variant) for case in (*MAIN, *MORE)})


@pytest.mark.parametrize("mode", ["full", "forward"])
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_providers_agree_with_float64(op, variant, mode) -> None:
    """What torch.compile is given adds the bias itself; eager's was added before."""
    case = _case(op, variant, mode)
    inputs = block_providers.make_inputs(case, CPU)
    calls = {
        "eager": block_providers.plain_call(case, inputs),
        "compile": block_providers.plain_call(case, inputs, lambda function: function),
        "mixflow_fast": block_providers.mixflow_call(case, inputs, "reference"),
    }
    for name, call in calls.items():
        made = call()
        assert block_providers.verify(case, inputs, made, name) == []
        assert any(tensor.startswith("d") for tensor in made) == (mode == "full")
    # Plain lines in float32 are those of our reference: nothing but the precision is different.
    single = replace(case, dtype=torch.float32)
    inputs = block_providers.make_inputs(single, CPU)
    plain = block_providers.plain_call(single, inputs)()
    assert block_providers.verify(single, inputs, plain, "eager") == []


@pytest.mark.parametrize("op", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_recomputed_activations_agree_with_float64(op, dtype) -> None:
    case = _case(op, mode="recompute", dtype=dtype)
    assert {c.op for c in (*MORE,) if c.mode == "recompute"} == {"gelu", "swiglu"}
    assert case.providers == ("eager", "compile", "mixflow_fast")
    inputs = block_providers.make_inputs(case, CPU)
    made = {
        "eager": block_providers.plain_call(case, inputs)(),
        "compile": block_providers.plain_call(case, inputs, lambda function: function)(),
        "mixflow_fast": block_providers.mixflow_call(case, inputs, "reference")(),
    }
    for name, tensors in made.items():
        assert set(tensors) == {"out", "dx", "dbias"}
        assert not any(tensor.requires_grad for tensor in tensors.values())
        assert block_providers.verify(case, inputs, tensors, name) == []
        for tensor in tensors:
            wrong = tensors | {tensor: tensors[tensor] * 1.05}
            assert block_providers.verify(case, inputs, wrong, name) != []
    assert block_providers.note(case, inputs, "triton") == f"{op}_recompute(impl='triton')"


@pytest.mark.parametrize("op", BLOCK_OPS)
def test_verify_finds_what_is_wrong_in_each_tensor(op) -> None:
    case = _case(op)
    inputs = block_providers.make_inputs(case, CPU)
    made = block_providers.plain_call(case, inputs)()
    for name in made:
        for wrong in (made[name] * 1.05, made[name].double(), made[name] * float("nan")):
            lines = block_providers.verify(case, inputs, made | {name: wrong}, "eager")
            assert len(lines) == 1 and lines[0].startswith(f"{name}"), (name, lines)


def test_backends_and_liger_that_are_not_there_say_why(monkeypatch) -> None:
    case = _case("attention")
    inputs = block_providers.make_inputs(case, CPU)
    monkeypatch.setattr(block_providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotThere, match="not installed"):
        block_providers.other_call("flash2", case, inputs, "reference")
    with pytest.raises(NotThere, match="needs a CUDA device"):
        block_providers.other_call("cudnn", case, inputs, "reference")
    call, note = block_providers.other_call("flash", case, inputs, "reference")
    assert "ok" in note and block_providers.verify(case, inputs, call(), "flash") == []
    with pytest.raises(NotThere, match="liger_kernel is not installed"):
        block_providers.other_call("liger", _case("swiglu", mode="forward"), inputs, "reference")


def test_liger_only_where_it_computes_the_same(monkeypatch) -> None:
    with_liger = {(c.op, c.mode, c.norm if c.op != "swiglu" else None)
                  for c in (*MAIN, *MORE) if "liger" in c.providers}  # fmt: skip
    assert with_liger == {
        ("modulated_norm", "full", "rms"),
        ("modulated_norm", "forward", "rms"),
        ("swiglu", "forward", None),
    }

    class Modulated:
        @staticmethod
        def apply(x, weight, scale, shift, eps, offset, casting_mode, in_place):
            assert (offset, casting_mode, in_place) == (0.0, "llama", False)
            return plain_modulated_norm(x, shift, scale, weight)

    class SiluMul:
        apply = staticmethod(lambda a, b: torch.nn.functional.silu(a) * b)

    package = types.ModuleType("liger_kernel")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    ops = types.ModuleType("liger_kernel.ops")
    ops.LigerModulatedRMSNormFunction, ops.LigerSiLUMulFunction = Modulated, SiluMul
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    for case in (_case("modulated_norm"), _case("swiglu", mode="forward")):
        inputs = block_providers.make_inputs(case, CPU)
        call, _ = block_providers.other_call("liger", case, inputs, "reference")
        assert block_providers.verify(case, inputs, call(), "liger") == []


def test_a_wrong_backend_does_not_take_the_others_along(monkeypatch, tmp_path) -> None:
    whole = block_providers.other_call

    def wrong(provider, case, inputs, impl):
        call, note = whole(provider, case, inputs, impl)
        return lambda: {name: value * 1.1 for name, value in call().items()}, note

    monkeypatch.setattr(block_providers, "other_call", wrong)
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = kernel_suite.KernelSuite(CPU, writer, Deadline(), "reference", smoke=True)
    suite.run([case for case in SMOKE if case.op == "attention"][:1])
    found = {r["provider"]: r for r in read(writer.path) if r["metric"] == "latency_ms"}
    assert found["flash"]["p50"] is None and "wrong result: flash: out" in found["flash"]["note"]
    assert found["mixflow_fast"]["p50"] > 0 and not suite.refused


class Wrong:
    """A reference with an error in its second call, or in all."""

    def __init__(self, op: str, error: str) -> None:
        self._reference, self._error, self._calls = block_providers.OPS[op][1], error, 0

    def __call__(self, x, *rest, impl="", **options):
        self._calls += 1
        y = self._reference(x, *rest, **options)
        if self._error == "value":
            y = y * 1.02
        if self._error == "another run" and self._calls == 4:
            y = y + 1
        if self._error == "unwritten":
            y = y + torch.empty((), dtype=y.dtype) * 0
        if self._error == "place in the batch":
            y = y * len(x)
        return y


@pytest.mark.parametrize(
    ("error", "check"),
    [
        ("another run", "two runs"),
        ("unwritten", "buffers full of NaN"),
        ("place in the batch", "alone and in"),
        ("", ""),
    ],
)
def test_bits_are_red_on_a_wrong_kernel(monkeypatch, error, check) -> None:
    ops = {"gelu": (Wrong("gelu", error), block_providers.OPS["gelu"][1])}
    monkeypatch.setattr(block_providers, "OPS", ops)
    found = list(block_checks.same_bits(_case("gelu"), CPU, "triton"))
    failed = {finding.check for finding in found if not finding.passed}
    assert any(check in name for name in failed) if error else not failed
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_are_red_on_a_wrong_kernel(monkeypatch, dtype) -> None:
    case = _case("gelu", dtype=dtype)
    assert all(f.passed for f in block_checks.errors(case, DEVICE, "triton"))
    ops = {"gelu": (Wrong("gelu", "value"), block_providers.OPS["gelu"][1])}
    monkeypatch.setattr(block_providers, "OPS", ops)
    found = list(block_checks.errors(case, CPU, "triton"))
    assert {f.tensor for f in found if not f.passed} == {"out", "dx", "dbias"}


def test_levels_of_the_checks(monkeypatch) -> None:
    def names(level: str, device: str = "cpu") -> list[str]:
        return [n for n, _ in block_checks.tasks(torch.device(device), "triton", level, BLOCK_OPS)]

    timed, full = names("timed"), names("full")
    assert full[: len(timed)] == timed and len(timed) == len(block_checks.CPU_TIMED)
    for op, dtype in itertools.product(BLOCK_OPS, ("bfloat16", "float16", "float32")):
        assert any(name.startswith(op) and name.endswith(dtype) for name in full)
        assert any(name.startswith(op) and name.endswith(dtype) for name in names("full", "cuda"))
    # The very widths that are timed.
    widths = {(c.op, c.variant, c.shape[2:]) for c in MAIN}
    assert {(c.op, c.variant, c.shape[2:]) for c in block_checks.GPU_TIMED} == widths
    assert names("full", "cuda")[-1] == "torch.compile of a block"
    assert not list(block_checks.tasks(CPU, "triton", "full", ("interpolate",)))


def test_families_write_files_of_their_own(tmp_path) -> None:
    """Two processes of the suite write at the same time. With the kernels themselves."""
    options = [
        "--device",
        DEVICE.type,
        "--family",
        "blocks",
        "--level",
        "timed",
        "--out",
        str(tmp_path),
    ]
    assert checks.main(options) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["correctness_blocks.jsonl"]
    text = (tmp_path / "correctness_blocks.jsonl").read_text()
    assert all(f'"check": "{op}' in text for op in BLOCK_OPS) and "velocity" not in text


def test_graph_and_compiled_blocks_are_red_on_wrong_numbers(monkeypatch) -> None:
    found = list(block_checks.graph_replays(CPU, "reference"))
    assert len(found) == 6 and all(finding.passed for finding in found)
    found = list(block_checks.compiled(CPU, "reference", backend="eager"))
    assert len(found) == 18 and all(finding.passed for finding in found)
    monkeypatch.setattr(replay, "capture", lambda step, device: (step(), lambda: None))
    assert not any(finding.passed for finding in block_checks.graph_replays(CPU, "reference"))
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *a: 1.01 * call(*a))
    found = list(block_checks.compiled(CPU, "reference"))
    assert not any(finding.passed for finding in found)
