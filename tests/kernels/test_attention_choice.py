"""The choice of a backend: results that the self-test rejects, and calls for GPUs on stand-ins."""

import re
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from mixflow_fast.kernels.attention import backends, choice, packages
from mixflow_fast.kernels.attention.backends import (
    REGISTRY,
    Backend,
    as_packed,
    math_backward,
    math_forward,
    run_backward,
    run_forward,
)
from mixflow_fast.kernels.attention.choice import BACKENDS, choose_backend
from mixflow_fast.kernels.attention.op import attention
from tests.support import attention_stand_ins
from tests.support.attention import exact, problem, run
from tests.support.kernels import DEVICE, ON_GPU, relative_rms

pytestmark = pytest.mark.skipif(ON_GPU, reason="backends of the CPU, and stand-ins on it")
SHAPE = (2, 7, 2, 16)


@pytest.fixture(autouse=True)
def fresh():
    """Answers about these tests' backends are not kept."""
    choice.reset_choices()
    yield
    choice.reset_choices()


def choose(dtype=torch.float32, **options):
    B, N, H, K = SHAPE
    return choose_backend(B, N, H, K, dtype, DEVICE, **options)


def put(monkeypatch, name: str, forward=math_forward, backward=math_backward, **options) -> None:
    monkeypatch.setitem(
        REGISTRY, name, Backend(name, lambda device, dtype: "", forward, backward, **options)
    )


def test_cpu_takes_flash_then_math(monkeypatch) -> None:
    found = choose()
    assert found.backend == "flash" and found.tested["flash"] == "ok, same bits twice"
    assert found.tested["flash3"] == found.tested["flash2"] == "not installed"
    assert found.tested["cudnn"] == "refused: needs a CUDA device"
    assert found.tested["math"] == "not tested: flash comes first"
    assert tuple(found.tested) == BACKENDS
    assert choose(candidates=("efficient", "math")).backend == "math"
    monkeypatch.setattr(choice, "_self_test", None)
    assert choose() is found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_sound_backends_pass(dtype, tokens) -> None:
    for name in ("flash", "math"):
        found = choose_backend(3, tokens, 2, 72, dtype, DEVICE, candidates=(name,))
        assert found.tested == {name: "ok, same bits twice"}


def nan_in_dq(*arguments):
    dq, dk, dv = math_backward(*arguments)
    dq[-1, -1, -1, -1] = torch.nan
    return dq, dk, dv


def one_percent_off(*arguments):
    dq, dk, dv = math_backward(*arguments)
    return dq, dk * 1.01, dv


def last_sample_wrong(q, k, v, scale):
    out, lse = math_forward(q, k, v, scale)
    out[-2:] = 0
    return out, lse


def odd_samples_wrong(*arguments):
    gradients = math_backward(*arguments)
    for gradient in gradients:
        gradient[1::2] = 0
    return gradients


def overflows(dout, q, k, v, out, lse, scale):
    """A key beyond the last one, of score 0: exp(0 - lse) is infinite where lse is far below."""
    dq, dk, dv = math_backward(dout, q, k, v, out, lse, scale)
    return dq + ((-lse).exp() * 0).transpose(1, 2)[..., None], dk, dv


def as_if_packed(q, k, v, scale):
    """Takes v's strides for q's."""
    q = q.as_strided(q.shape, v.stride(), q.storage_offset())
    return math_forward(q, k, v, scale)


def raises(*arguments):
    raise RuntimeError("no\nkernel")


BROKEN = {
    "nan": (dict(backward=nan_in_dq), "NaN in dq"),
    "wrong": (dict(backward=one_percent_off), "error 1.0e-02 > .* in dk"),
    "odd sample": (dict(backward=odd_samples_wrong), "error .* in dq"),
    "last sample": (dict(forward=last_sample_wrong), "error .* in out"),
    "overflow": (dict(backward=overflows), "NaN in dq"),
    "layout": (dict(forward=as_if_packed), "error .* in out|refused: RuntimeError"),
    "raises": (dict(forward=raises), "refused: RuntimeError: no kernel"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_backends_are_never_chosen(monkeypatch, fault) -> None:
    functions, message = BROKEN[fault]
    put(monkeypatch, "flash", **functions)
    found = choose()
    assert found.backend == "math"
    assert re.match(message, found.tested["flash"])
    qkv = problem(SHAPE)[0]
    with pytest.raises(ValueError, match=f"flash: ({message})") as caught:
        attention(qkv.requires_grad_(), backend="flash")
    assert "passed: math" in str(caught.value) and "K=16" in str(caught.value)
    # The operator goes on with another.
    assert torch.equal(attention(qkv), attention(qkv, backend="math"))


def test_the_last_samples_of_a_large_batch_count(monkeypatch) -> None:
    """Where only they are wrong: offsets beyond what an index holds."""
    put(monkeypatch, "flash", forward=last_sample_wrong)
    B, N, H, K = SHAPE
    key = choice._key(B, N, H, K, torch.float32, DEVICE, False)
    for sound in (True, False):
        name = "math" if sound else "flash"
        assert choice._self_test(name, key._replace(batch=8)).ok == sound


def test_gradients_of_sums_reach_a_backend_contiguous(monkeypatch) -> None:
    def strict(dout, *rest):
        assert dout.is_contiguous()
        return math_backward(dout, *rest)

    put(monkeypatch, "flash", backward=strict)
    qkv = problem(SHAPE)[0].requires_grad_()
    attention(qkv, backend="flash").sum().backward()
    assert qkv.grad.abs().sum() > 0


def test_only_what_is_needed_is_tested(monkeypatch) -> None:
    """A backend whose backward pass is broken serves inference."""
    put(monkeypatch, "flash", backward=nan_in_dq)
    assert choose(backward=False).backend == "flash"
    assert choose(backward=True).backend == "math"


def test_the_same_bits_come_first(monkeypatch) -> None:
    noise = iter(range(1, 100))

    def restless(*arguments):
        dq, dk, dv = math_backward(*arguments)
        return dq * (1 + 1e-7 * next(noise)), dk, dv

    put(monkeypatch, "flash", backward=restless)
    found = choose()
    # "math" would repeat them, and is too slow to be anybody's first choice.
    assert found.backend == "flash" and found.tested["flash"] == "ok, other bits in a second run"
    assert choose(candidates=("math", "flash")).backend == "flash"
    torch.use_deterministic_algorithms(True)
    try:
        found = choose()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.backend == "math" and "deterministic mode" in found.tested["flash"]


def test_the_fastest_is_taken_where_it_is_timed(monkeypatch) -> None:
    texts = {"flash3": 3.0, "flash2": 1.0, "cudnn": 0.0, "flash": 2.0, "efficient": 0.5}

    def result(name, key):
        ms = texts.get(name, 0.0)
        same = name != "efficient"
        return choice._Result(f"ok {ms}" if ms else "NaN in dq", bool(ms), ms, same)

    monkeypatch.setattr(choice, "_result", result)
    found = choose_backend(8, 256, 16, 72, torch.bfloat16, "cuda:0")
    assert found.backend == "flash2" and found.tested["cudnn"] == "NaN in dq"
    assert found.tested["math"].startswith("not tested")
    # Where nobody repeats its bits, the fastest, and still not "math".
    unsteady = choose_backend(
        8, 256, 16, 72, torch.bfloat16, "cuda:0", candidates=("math", "efficient", "cudnn")
    )
    assert unsteady.backend == "efficient"


def test_want_of_memory_is_not_remembered(monkeypatch) -> None:
    def hungry(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    put(monkeypatch, "flash", forward=hungry)
    found = choose()
    assert found.backend == "math" and found.tested["flash"] == "not tested: out of memory"
    put(monkeypatch, "flash")
    assert choose().backend == "flash"


def test_want_of_memory_everywhere_is_want_of_memory(monkeypatch) -> None:
    """Who halves batches waits for that error, and there is one backend that cannot serve."""

    def hungry(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("flash", "math"):
        put(monkeypatch, name, forward=hungry)
    with pytest.raises(torch.OutOfMemoryError, match="flash: not tested: out of memory"):
        choose()
    with pytest.raises(ValueError, match="cudnn: refused"):
        choose(candidates=("cudnn",))


def test_the_device_of_the_data_is_current_in_the_test(monkeypatch) -> None:
    """Events are recorded on the current device's stream; another's would time nothing."""
    current, seen = [], []

    @contextmanager
    def device(index):
        current.append(torch.device(index))
        yield
        current.pop()

    def tested(name, key):
        seen.append((name, *current))
        return choice._Result("ok 1.000 ms", True, 1.0, True)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: not current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append(("synchronize", *current)))
    monkeypatch.setattr(choice, "_self_test", tested)
    shape = (8, 256, 16, 72, torch.bfloat16)
    assert choose_backend(*shape, "cuda:1", candidates=("flash",)).backend == "flash"
    one = torch.device("cuda", 1)
    assert seen == [("synchronize", one), ("flash", one)] and not current


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device) -> None:
    with torch.device(device):
        assert choose().backend == "flash"


def test_choices_hold_up_to_a_power_of_two_and_draw_nothing(monkeypatch) -> None:
    keys = []

    def result(name, key):
        keys.append((name, key.batch))
        return choice._Result("ok", True, 1.0)

    monkeypatch.setattr(choice, "_result", result)
    for batch in (200, 256, 257):
        choose_backend(batch, 4, 2, 8, torch.bfloat16, "cuda:0", candidates=("flash",))
    assert keys == [("flash", 256), ("flash", 512)]
    monkeypatch.undo()
    choice.reset_choices()
    state = torch.get_rng_state()
    choose()
    assert torch.equal(state, torch.get_rng_state())


def test_no_test_inside_a_capture(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"call choose_backend\(batch=4, tokens=7"):
        choose_backend(4, 7, 2, 16, torch.bfloat16, "cuda:0")


def test_bad_candidates() -> None:
    for candidates in (("xformers",), ()):
        with pytest.raises(ValueError, match="backend must be one of"):
            choose(candidates=candidates)


def test_as_packed_knows_its_slots() -> None:
    packed = torch.randn(2, 5, 3, 4, 8)
    found = as_packed(*packed.unbind(2))
    assert torch.equal(found, packed) and found.data_ptr() == packed.data_ptr()
    q, k, v = packed.unbind(2)
    for others in ((q, v, k), (q, k, v.clone()), (q, k, v.contiguous()), (k, q, v)):
        assert isinstance(as_packed(*others), tuple)


def stand_in(monkeypatch, name: str) -> str:
    """Makes one backend run here; returns its name."""
    if name in ("efficient", "cudnn"):
        forward, backward = {
            "efficient": ("_efficient_attention_forward", "_efficient_attention_backward"),
            "cudnn": (
                "_scaled_dot_product_cudnn_attention",
                "_scaled_dot_product_cudnn_attention_backward",
            ),
        }[name]
        stub = {
            forward: getattr(attention_stand_ins, f"{name}_forward"),
            backward: getattr(attention_stand_ins, f"{name}_backward"),
        }
        monkeypatch.setattr(backends, "aten", SimpleNamespace(**stub))
        core = REGISTRY[name]
    else:
        kind, style = name.split()
        module = attention_stand_ins.package(style)
        pair = packages.package_pair(lambda: module)
        core = Backend(kind, None, *pair, packs=True, multiple=8)
        name = kind
    put(monkeypatch, name, core.forward, core.backward, packs=core.packs, multiple=core.multiple)
    return name


STAND_INS = ["efficient", "cudnn", "flash2 old", "flash2 new", "flash3 hopper"]


@pytest.mark.parametrize("backend", STAND_INS)
@pytest.mark.parametrize(("norm", "rotated"), [(None, False), (None, True), ("layer", False)])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_calls_fit_the_signatures(monkeypatch, backend, norm, rotated, impl) -> None:
    """And packed gradients are turned in place, separate ones on the way into the packed one."""
    given = problem(SHAPE, torch.float32, norm, rotated)
    name = stand_in(monkeypatch, backend)
    found = run(attention, *given[:3], backend=name, impl=impl, **given[3])
    truth = exact(*given)
    assert found["dqkv"].is_contiguous()
    for what, value in found.items():
        if what != "dk_bias":
            assert relative_rms(value, truth[what]) < 3e-6, what


@pytest.mark.parametrize("backend", [*STAND_INS, "flash"])
def test_odd_heads_are_padded(monkeypatch, backend) -> None:
    """K = 36: zeros behind, the scale of 36; out and gradients without them."""
    name = backend if backend == "flash" else stand_in(monkeypatch, backend)
    monkeypatch.setattr(Backend, "padding", lambda self, K, device: -K % self.multiple)
    qkv, _, upstream, _ = problem((2, 5, 2, 36))
    core, (q, k, v) = REGISTRY[name], qkv.unbind(2)
    out, lse = run_forward(core, q, k, v)
    assert out.shape == q.shape and out.is_contiguous() and lse.shape == (2, 2, 5)
    dout = upstream.view(q.shape)
    gradients = run_backward(core, dout, q, k, v, out, lse)
    expected = math_backward(dout, q, k, v, *math_forward(q, k, v, 36**-0.5), 36**-0.5)
    for value, truth in zip(gradients, expected, strict=True):
        assert value.shape == q.shape and relative_rms(value, truth) < 1e-6
    found = choose_backend(2, 5, 2, 36, torch.float32, DEVICE, candidates=(name,))
    assert "head_dim 36 padded to 40" in found.tested[name]


@pytest.mark.parametrize("name", ["flash", "cudnn"])
@pytest.mark.parametrize("K", [72, 36])
def test_pytorchs_own_meta_functions_take_the_calls(name, K) -> None:
    """Shapes and strides, without a device. (That of efficient's backward pass lacks `out`.)"""
    qkv = torch.empty(2, 40, 3, 4, K, device="meta", dtype=torch.bfloat16)
    separate = torch.empty(2, 40, 2, 4, K, device="meta", dtype=torch.bfloat16)
    for q, k in (qkv.unbind(2)[:2], separate.unbind(2)):
        v = qkv[:, :, 2]
        out, lse = run_forward(REGISTRY[name], q, k, v)
        assert out.shape == (2, 40, 4, K) and out.is_contiguous()
        assert lse.shape == (2, 4, 40) and lse.dtype == torch.float32
        gradients = run_backward(REGISTRY[name], torch.empty_like(out), q, k, v, out, lse)
        assert all(x.shape == q.shape and x.stride(-1) == 1 for x in gradients)


def test_efficients_forward_meta_function() -> None:
    q, k, v = torch.empty(2, 40, 3, 4, 72, device="meta", dtype=torch.bfloat16).unbind(2)
    out, lse = run_forward(REGISTRY["efficient"], q, k, v)
    assert out.is_contiguous() and lse.shape == (2, 4, 40)
