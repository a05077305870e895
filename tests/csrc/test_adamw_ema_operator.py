"""`torch.ops.mixflow_fast.adamw_ema_` on the CPU; the GPU's walk through its table in plain C++."""

import ctypes
import itertools
import math
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mixflow_fast.optim.step_calls import CONSTANTS
from tests.support.csrc_library import (
    SETTINGS,
    assert_same_bits,
    call,
    copy_of,
    make_tensors,
    require_library,
)

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
SIZES = (1, 3, 0, 1023, 65537)


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    require_library()


def truth(lists: dict, decays: list[float], step: int, scale: float = 1.0) -> dict:
    """One step in float64, from the formulas."""
    wide = {name: [x.double() for x in tensors] for name, tensors in lists.items()}
    s, n = SETTINGS, len(wide["params"])
    for i, w in enumerate(wide["params"]):
        g, m, v = scale * wide["grads"][i], wide["exp_avgs"][i], wide["exp_avg_sqs"][i]
        m.mul_(s["beta1"]).add_((1 - s["beta1"]) * g)
        v.mul_(s["beta2"]).add_((1 - s["beta2"]) * g * g)
        denominator = (v / (1 - s["beta2"] ** step)).sqrt() + s["eps"]
        w.mul_(1 - s["lr"] * s["weight_decay"])
        w.sub_(s["lr"] / (1 - s["beta1"] ** step) * m / denominator)
        for k, decay in enumerate(decays):
            wide["emas"][k * n + i].mul_(decay).add_((1 - decay) * w)
    return wide


@pytest.mark.parametrize("emas", [0, 1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_against_float64(emas: int, dtype: torch.dtype) -> None:
    lists = make_tensors(SIZES, emas, dtype)
    expected = truth(lists, [0.9, 0.3, 0.999, 0.0, 0.5][:emas], step=7, scale=0.37)
    copies = [torch.full((n,), math.nan, dtype=torch.bfloat16) for n in SIZES]
    grads = [g.clone() for g in lists["grads"]]
    call(lists, torch.tensor(0.37), copies)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas"):
        for x, y in zip(lists[name], expected[name], strict=True):
            if x.numel():
                error = (x.double() - y).norm() / y.norm()
                assert error < 2e-7, (name, x.numel(), error)
    for w, copy in zip(lists["params"], copies, strict=True):
        assert torch.equal(copy, w.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(lists["grads"], grads, strict=True))


def test_no_factor_is_a_factor_of_one() -> None:
    a = make_tensors(SIZES, 2)
    b = copy_of(a)
    call(a)
    call(b, torch.tensor([1.0]))
    assert_same_bits(a, b)


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf, 3e38, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("walk", ["cpu", "gpu"])
def test_a_norm_that_is_not_finite_writes_nothing(
    emulator: ctypes.CDLL, walk: str, dtype: torch.dtype, norm: float
) -> None:
    """With a finite one: the bits of the step that does not look at it. Gradients say nothing."""
    lists = make_tensors(SIZES, 3, dtype)
    lists["grads"][-1][5] = math.nan
    copies = [torch.full((n,), 0.5, dtype=torch.bfloat16) for n in SIZES]
    before, expected = (copy_of({**lists, "copies": copies}) for _ in range(2))
    if math.isfinite(norm):
        call(expected, torch.tensor(0.25), expected["copies"])
    if walk == "cpu":
        call(lists, torch.tensor(0.25), copies, grad_norm=torch.tensor(norm))
    else:
        emulate(emulator, lists, copies, torch.tensor(0.25), torch.tensor(norm))
    after = {**lists, "copies": copies}
    for name, tensors in after.items():
        for i, x in enumerate(tensors):
            # As bits: NaN is not equal to itself.
            bits = torch.int32 if x.dtype == torch.float32 else torch.int16
            assert torch.equal(x.view(bits), expected[name][i].view(bits)), (name, i)
    changed = not torch.equal(lists["params"][0], before["params"][0])
    assert changed == math.isfinite(norm)


def test_special_numbers() -> None:
    """NaN and infinity stay where they are and reach the copy; a decay of 0 is the weight."""
    lists = make_tensors((37,), 4)
    lists["grads"][0][3] = math.nan
    lists["grads"][0][33] = math.inf
    copy = torch.zeros(37, dtype=torch.bfloat16)
    call(lists, copies=[copy])
    (w,) = lists["params"]
    assert w.isnan().nonzero().flatten().tolist() == [3, 33]
    assert torch.equal(copy.isnan(), w.isnan())
    assert torch.equal(lists["emas"][3].nan_to_num(), w.nan_to_num())


def test_bfloat16_copy_rounds_as_pytorch() -> None:
    """Ties both ways, subnormals, the largest numbers: the step leaves the weights as they are."""
    bits = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x00008000])
    w = torch.cat([bits, ties.to(torch.int32)]).view(torch.float32)
    w = w[w.isfinite()].contiguous()
    zeros = [torch.zeros_like(w) for _ in range(3)]
    copy = torch.empty_like(w, dtype=torch.bfloat16)
    lists = dict(params=[w], grads=[zeros[0]], exp_avgs=[zeros[1]], exp_avg_sqs=[zeros[2]], emas=[])
    before = w.clone()
    call(lists, copies=[copy], lr=0.0)
    assert torch.equal(w, before)
    assert torch.equal(copy.view(torch.int16), w.bfloat16().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whatever_the_threads_and_the_place(dtype: torch.dtype) -> None:
    n = 300_001
    lists = make_tensors((n,), 3, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 2, 3):
            torch.set_num_threads(number)
            results.append(copy_of(lists))
            call(results[-1], torch.tensor(0.5))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0], other)
    # As ZeRO cuts it, at places that are multiples of nothing: views of the same memory.
    parts = copy_of(lists)
    for a, b in ((0, 1), (1, 1000), (1000, 65_539), (65_539, n)):
        call({k: [x[a:b] for x in tensors] for k, tensors in parts.items()}, torch.tensor(0.5))
    assert_same_bits(results[0], parts)


def test_runs_on_more_than_one_thread() -> None:
    """Other threads work as well: a build without OpenMP would pass every other test."""
    lists = make_tensors((2_000_000,), 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        call(lists)
        own, all_of_them = time.thread_time(), time.process_time()
        for _ in range(20):
            call(lists)
        own, all_of_them = time.thread_time() - own, time.process_time() - all_of_them
    finally:
        torch.set_num_threads(threads)
    assert all_of_them > 1.4 * own, (own, all_of_them)


def test_counts_writes() -> None:
    lists = make_tensors((4,), 1)
    before = {name: tensors[0]._version for name, tensors in lists.items()}
    call(lists)
    changed = {name for name, tensors in lists.items() if tensors[0]._version > before[name]}
    assert changed == {"params", "exp_avgs", "exp_avg_sqs", "emas"}


def wrong(**changes) -> dict:
    return {"lists": {}, "options": {}, **changes}


REFUSED = {
    "grads count": (wrong(lists={"grads": []}), r"grads must hold 2 tensors .* got 0"),
    "emas count": (wrong(options={"ema_decays": [0.9, 0.8]}), r"emas must hold 4 tensors"),
    "copies count": (wrong(copies=[torch.zeros(5)]), r"copies must hold 2 tensors"),
    "dtype": (
        wrong(lists={"exp_avgs": [torch.zeros(5).double(), torch.zeros(2, 3)]}),
        r"exp_avgs\[0\] must be Float, got Double",
    ),
    "gradients": (
        wrong(lists={"grads": [torch.zeros(5).half(), torch.zeros(2, 3).half()]}),
        r"grads must be all Float or all BFloat16, got Half",
    ),
    "mixed gradients": (
        wrong(lists={"grads": [torch.zeros(5), torch.zeros(2, 3).bfloat16()]}),
        r"grads\[1\] must be Float, got BFloat16",
    ),
    "device": (
        wrong(lists={"exp_avgs": [torch.zeros(5, device="meta"), torch.zeros(2, 3)]}),
        r"exp_avgs\[0\] must be on cpu like the parameters, got meta",
    ),
    "shape": (
        wrong(lists={"exp_avg_sqs": [torch.zeros(5), torch.zeros(3, 2)]}),
        r"exp_avg_sqs\[1\] must have its parameter's shape \[2, 3\], got \[3, 2\]",
    ),
    "contiguity": (
        wrong(lists={"grads": [torch.zeros(5), torch.zeros(3, 2).t()]}),
        r"grads\[1\] must be contiguous, .* strides \[1, 2\]: call .contiguous\(\)",
    ),
    "copy dtype": (
        wrong(copies=[torch.zeros(5), torch.zeros(2, 3)]),
        r"copies\[0\] must be BFloat16, got Float",
    ),
    "factor": (wrong(scale=torch.ones(2)), r"grad_scale must be one Float on cpu, got 2 of Float"),
    "factor dtype": (wrong(scale=torch.ones(1).double()), r"got 1 of Double on cpu"),
    "norm": (
        wrong(options={"grad_norm": torch.ones(3)}),
        r"grad_norm must be one Float on cpu, got 3 of Float on cpu",
    ),
    "norm device": (
        wrong(options={"grad_norm": torch.ones((), device="meta")}),
        r"grad_norm must be one Float on cpu, got 1 of Float on meta",
    ),
    "step": (wrong(options={"step": 0}), r"step must be 1 or more, got 0"),
    "lr": (wrong(options={"lr": -1.0}), r"lr must be in \[0, inf\), got -1"),
    "lr nan": (wrong(options={"lr": math.nan}), r"lr must be in"),
    "beta1": (wrong(options={"beta1": 1.0}), r"beta1 must be in \[0, 1\), got 1"),
    "decay": (wrong(options={"ema_decays": [1.0]}), r"each of ema_decays must be in \[0, 1\)"),
    "many": (wrong(options={"ema_decays": [0.5] * 17}), r"at most 16 decays, got 17"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_came(case: str) -> None:
    changes, message = REFUSED[case]

    def zeros() -> list[torch.Tensor]:
        return [torch.zeros(5), torch.zeros(2, 3)]

    lists = {name: zeros() for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")}
    before = copy_of(lists)
    lists = {**lists, **changes["lists"]}
    with pytest.raises(ValueError, match=message):
        call(lists, changes.get("scale"), changes.get("copies", ()), **changes["options"])
    for name in before.keys() - changes["lists"].keys():
        assert all(torch.equal(a, b) for a, b in zip(lists[name], before[name], strict=True))


def test_shared_memory_is_refused() -> None:
    lists = make_tensors((8,), 1)
    lists["emas"] = lists["params"]
    with pytest.raises(ValueError, match=r"params\[0\] and emas\[0\] share memory"):
        call(lists)


def test_parts_of_one_buffer_may_not_overlap() -> None:
    lists = make_tensors((8, 5), 1)
    flat = torch.zeros(32)
    lists["exp_avgs"] = [flat[:8], flat[8:13]]
    lists["params"] = [flat[13:21], flat[21:26]]
    call(lists)
    before = flat.clone()
    lists["params"] = [flat[13:21], flat[20:25]]
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        call(lists)
    lists["params"] = [flat[12:20], flat[21:26]]
    with pytest.raises(ValueError, match=r"exp_avgs\[1\] and params\[0\] share memory"):
        call(lists)
    assert torch.equal(flat, before)


def test_gradients_may_share_memory() -> None:
    lists = make_tensors((8, 8), 1)
    lists["grads"] = [lists["grads"][0]] * 2
    expected = {**copy_of(lists), "grads": [g.clone() for g in lists["grads"]]}
    call(lists)
    call(expected)
    assert_same_bits(lists, expected)


def test_copies_on_write_are_made() -> None:
    """Tensors that share memory until one of them is written."""
    lists = make_tensors((8,), 1)
    lists["emas"] = [lists["params"][0]._lazy_clone()]
    expected = {**copy_of(lists), "emas": [lists["params"][0].clone()]}
    call(lists)
    call(expected)
    assert_same_bits(lists, expected)


def test_traces_without_data() -> None:
    lists = {k: [x.to("meta") for x in v] for k, v in make_tensors(SIZES, 2).items()}
    call(lists, torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="grads must hold"):
        call({**lists, "grads": []})
    with FakeTensorMode() as mode:
        fakes = {k: [mode.from_tensor(x) for x in v] for k, v in make_tensors(SIZES, 2).items()}
        call(fakes)
    g = make_tensors((5, 7), 2)
    torch.library.opcheck(
        torch.ops.mixflow_fast.adamw_ema_,
        (*g.values(), [], torch.tensor(0.5)),
        {**SETTINGS, "step": 3, "ema_decays": [0.9, 0.5], "grad_norm": torch.tensor(1.0)},
        test_utils=("test_schema", "test_faketensor"),
    )
    constants = torch.zeros(CONSTANTS)
    torch.library.opcheck(
        torch.ops.mixflow_fast.adamw_constants_,
        (constants,),
        {**SETTINGS, "step": 3, "ema_decays": [0.9, 0.5]},
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.mixflow_fast.adamw_ema_from_constants_,
        (*g.values(), [], torch.tensor(0.5)),
        {"constants": constants, "grad_norm": torch.tensor(1.0)},
        test_utils=("test_schema", "test_faketensor"),
    )


EMULATOR = r"""
#include "adamw_ema_table.h"
#include "adamw_ema_cpu.h"

static int launches;
static uint64_t aligned;

extern "C" uint64_t aligned_rows() { return aligned; }

// As the kernel's grid does, one thread after another.
extern "C" const char* mixflow_adamw_ema_cuda(const mixflow::Table* t, int bfloat16, void*) {
  ++launches;
  aligned = t->aligned;
  for (int32_t block = 0; block < t->blocks; ++block) {
    for (int thread = 0; thread < mixflow::kThreads; ++thread) {
#define WALK(G, K, STORED) mixflow::update_chunk<G, K, STORED>(*t, block, thread, mixflow::kThreads)
#define CASE(K) \
  case K: \
    if (bfloat16 && t->stored) WALK(uint16_t, K, true); \
    else if (bfloat16) WALK(uint16_t, K, false); \
    else if (t->stored) WALK(float, K, true); \
    else WALK(float, K, false); \
    break;
      switch (t->emas < 4 ? t->emas : -1) { CASE(0) CASE(1) CASE(2) CASE(3) CASE(-1) }
    }
  }
  return nullptr;
}

extern "C" int run(int64_t count, const int64_t* sizes, void** w, void** g, void** m, void** v,
                   void** e, void** copies, int emas, const double* decays, int bfloat16,
                   const double* s, int64_t step, const float* factor, const float* norm,
                   const mixflow::Constants* stored) {
  mixflow::Constants constants{mixflow::make_adamw(s[0], s[1], s[2], s[3], s[4], step)};
  for (int k = 0; k < emas; ++k) constants.ema_weights[k] = static_cast<float>(1.0 - decays[k]);
  const mixflow::Tensors tensors{count, sizes, w, g, m, v, e, copies, emas, bfloat16 != 0};
  launches = 0;
  mixflow::for_each_table(
      tensors, constants, stored, factor, norm,
      [&](const mixflow::Table& table) { mixflow_adamw_ema_cuda(&table, bfloat16, nullptr); });
  return launches;
}
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "emulator.cpp").write_text(EMULATOR)
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{SOURCES}",
        "-ffp-contract=off",
    ]
    command += [str(folder / "emulator.cpp"), "-o", str(folder / "emulator.so")]
    subprocess.run(command, check=True, timeout=60)
    return ctypes.CDLL(str(folder / "emulator.so"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_access_only_where_every_address_allows_it(
    emulator: ctypes.CDLL, dtype: torch.dtype
) -> None:
    """One tensor of a row, of each role in turn, starts some elements late; bit i is row i."""
    emulator.aligned_rows.restype = ctypes.c_uint64
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "copies"]
    for late, elements in itertools.product(names, (0, 1, 2, 4)):
        lists = make_tensors([16, 16], 1, dtype)
        lists["copies"] = [torch.zeros(16, dtype=torch.bfloat16) for _ in range(2)]
        whole = lists[late][1]
        lists[late][1] = torch.cat([whole[:elements], whole])[elements:]
        assert emulate(emulator, lists, lists["copies"], None) == 1
        assert emulator.aligned_rows() == (0b01 if elements % 4 else 0b11), (late, elements)


def pointers(tensors: list[torch.Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * max(len(tensors), 1))(*(x.data_ptr() for x in tensors))


def emulate(
    library: ctypes.CDLL,
    lists: dict,
    copies: list,
    factor: torch.Tensor | None,
    norm: torch.Tensor | None = None,
    stored: torch.Tensor | None = None,
) -> int:
    """Runs the GPU's walk on the CPU; returns the number of launches.

    With `stored` constants the numbers that travel with the launch are others, which must not be
    used.
    """
    sizes = [w.numel() for w in lists["params"]]
    emas = len(lists["emas"]) // len(sizes)
    decays = [0.9, 0.3, 0.999, 0.0, 0.5][:emas]
    settings = [SETTINGS[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay")]
    if stored is not None:
        decays, settings = [0.25] * emas, [0.5 * value for value in settings]
    return library.run(
        ctypes.c_int64(len(sizes)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        *(pointers(lists[k]) for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")),
        pointers(copies) if copies else None,
        emas,
        (ctypes.c_double * 5)(*decays),
        int(lists["grads"][0].dtype == torch.bfloat16),
        (ctypes.c_double * 5)(*settings),
        ctypes.c_int64(7),
        *(None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (factor, norm, stored)),
    )


@pytest.mark.parametrize("emas", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_the_gpus_walk_reaches_every_element_once(
    emulator: ctypes.CDLL, emas: int, dtype: torch.dtype, offset: int
) -> None:
    """Many tensors (several tables), empty ones, remainders; addresses that are not aligned."""
    sizes = [1, 3, 0, 4095, 4096, 4097, 12_290, *range(5, 120, 2)]
    lists = make_tensors([n + offset for n in sizes], emas, dtype)
    lists = {name: [x[offset:] for x in tensors] for name, tensors in lists.items()}
    expected = copy_of(lists)
    factor = torch.tensor(0.25) if emas != 2 else None
    copies = [torch.zeros(n, dtype=torch.bfloat16) for n in sizes] if emas != 1 else []
    others = [c.clone() for c in copies]
    launches = emulate(emulator, lists, copies, factor)
    call(expected, factor, others)
    rows = min(384 // (5 + emas), 48)
    assert launches == math.ceil((len(sizes) - 1) / rows) >= 2
    assert_same_bits(expected, lists)
    assert all(torch.equal(a, b) for a, b in zip(copies, others, strict=True))


@pytest.mark.parametrize("emas", [0, 1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("walk", ["cpu", "gpu"])
def test_constants_in_memory_are_those_of_the_call(
    emulator: ctypes.CDLL, walk: str, emas: int, dtype: torch.dtype
) -> None:
    """The halves of a captured step: the bits of the whole one, with the numbers of its own."""
    lists = make_tensors(SIZES, emas, dtype)
    expected, constants = copy_of(lists), torch.full((CONSTANTS,), math.nan)
    copies, others = ([torch.zeros(n, dtype=torch.bfloat16) for n in SIZES] for _ in range(2))
    norm, factor = torch.tensor(3.0), torch.tensor(0.25)
    decays = [0.9, 0.3, 0.999, 0.0, 0.5][:emas]
    for step, lr in ((1, 0.01), (2, 0.3), (1000, 1e-5)):
        own = {**SETTINGS, "step": step, "lr": lr}
        version = constants._version
        torch.ops.mixflow_fast.adamw_constants_(constants, **own, ema_decays=decays)
        assert constants._version > version and not constants.isnan().any()
        if walk == "cpu":
            from_constants(lists, constants, factor, copies, norm)
        else:
            emulate(emulator, lists, copies, factor, norm, constants)
        call(expected, factor, others, step=step, lr=lr, grad_norm=norm)
        assert_same_bits(expected, lists)
        assert all(torch.equal(a, b) for a, b in zip(copies, others, strict=True))


def from_constants(
    lists: dict, constants: torch.Tensor, factor: torch.Tensor | None = None, copies=(), norm=None
) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")
    torch.ops.mixflow_fast.adamw_ema_from_constants_(
        *(lists[name] for name in names), list(copies), factor, constants=constants, grad_norm=norm
    )


@pytest.mark.parametrize("bad", [torch.zeros(22), torch.zeros(23).double(), torch.zeros(46)[::2]])
def test_constants_that_do_not_fit_are_refused(bad: torch.Tensor) -> None:
    lists = make_tensors((8,), 1)
    with pytest.raises(ValueError, match="constants must be 23 contiguous Float, got 2"):
        from_constants(lists, bad)
    with pytest.raises(ValueError, match="constants must be 23 contiguous Float, got 2"):
        torch.ops.mixflow_fast.adamw_constants_(bad, **SETTINGS, step=1, ema_decays=[])
    with pytest.raises(ValueError, match="constants must be on cpu, got meta"):
        from_constants(lists, torch.zeros(23, device="meta"))
    with pytest.raises(ValueError, match="at most 16 averages of each parameter, got 17"):
        from_constants({**lists, "emas": lists["emas"] * 17}, torch.zeros(23))
    with pytest.raises(ValueError, match="step must be 1 or more"):
        torch.ops.mixflow_fast.adamw_constants_(torch.zeros(23), **SETTINGS, step=0, ema_decays=[])
