"""The ways to train a network: their weights, recipes and ladder."""

import itertools

import torch

from benchmarks import step_variants as variants
from benchmarks.step_optimizers import Weights
from mixflow_fast.kernels.attention.backends import BACKENDS
from mixflow_fast.models.execution import Execution

CPU = torch.device("cpu")


def test_arms_train_the_same_weights() -> None:
    """Twins hold the very parameters, run on their own, and give the same numbers."""
    weights = Weights(variants.network(variants.workloads(smoke=True)[0], CPU))
    half = weights.half
    fused = variants.twin(half, variants.RECIPES["mixflow_fast"])
    plain = variants.twin(half, variants.RECIPES["eager_bf16"])
    for p, q, r in zip(half.parameters(), fused.parameters(), plain.parameters(), strict=True):
        assert p is q is r and p.dtype == torch.bfloat16
    assert fused.execution.mode == "fused" and plain.execution.mode == "eager"
    assert half.execution == Execution()
    x, y = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(
        fused(x, torch.ones(2), y), plain(x, torch.ones(2), y), rtol=0.05, atol=0.05
    )
    rae = variants.network(variants.workloads(smoke=True)[1], CPU)
    modules = variants.twin(rae, variants.RECIPES["compile_unpadded"]).modules()
    assert [m.padded for m in modules if isinstance(m, variants.SwiGLU)] == [False, False]
    assert variants.backends(half, 2) in BACKENDS


def test_ladder_adds_one_technique_a_row() -> None:
    recipes = [variants.RECIPES[name] for name in variants.LADDER]
    fields = ("execution", "objective", "optimizer", "half", "reads_loss", "padded")
    for before, after in itertools.pairwise(recipes):
        changed = {f for f in fields if getattr(before, f) != getattr(after, f)}
        # The optimizer's row takes `loss.item()` away, compilation has the objective's lines, too.
        assert len(changed - {"reads_loss"}) == 1 or changed == {"execution", "objective"}
        assert after.adds
    shown = {name for w in variants.workloads(smoke=False) for name in w.arms}
    assert shown == set(variants.RECIPES)
    tuned = [r for r in variants.RECIPES.values() if r.execution.mode != "eager"]
    assert {r.optimizer for r in tuned} == {"tuned", "adamwema"} and all(r.half for r in tuned)


def test_activations_are_recomputed_in_their_arm_only() -> None:
    made = {n for n, r in variants.RECIPES.items() if r.execution.checkpointing != "none"}
    assert made == {"mixflow_fast_recompute"}
    assert "checkpointing elementwise" in variants.RECIPES["mixflow_fast_recompute"].note
    # Where the batch fits at once, so that peak memory compares, the row before is there, too.
    both = {"mixflow_fast_adamwema", "mixflow_fast_recompute"}
    assert all(both <= set(workload.arms) for workload in variants.workloads(smoke=False)[:2])


def test_arms_name_the_operators_that_they_run() -> None:
    """So that an operator with wrong results takes away no other arm's speed."""
    recipes = variants.RECIPES
    assert recipes["compile"].ops(variants.SiT) == recipes["eager_bf16"].ops(variants.SiT) == set()
    assert recipes["fused"].ops(variants.SiT) == set(variants.FUSED_OPS[variants.SiT])
    head = recipes["mixflow_fast"].ops(variants.DiTDH)
    assert {"swiglu", "qk_norm_rope", "objective"} < head and "gelu" not in head
