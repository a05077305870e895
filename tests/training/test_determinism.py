"""`train.deterministic`: what it switches, when it is too late, what a resumed run compares."""

import json
from pathlib import Path

import pytest
import torch
from torch.backends import cuda, cudnn

from mixflow_fast.checkpoints.run_folder import newest_checkpoint, read_state
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models.inductor import block_options
from mixflow_fast.training import attention, determinism
from mixflow_fast.training.determinism import Determinism, describe_determinism
from mixflow_fast.training.rehearsal import rehearse
from mixflow_fast.training.trainer import Trainer, train
from tests.support.runs import assert_same_bits, tiny

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
ON = "train.deterministic=true"


def switches() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def test_everything_is_switched_and_put_back() -> None:
    before = switches()
    for wanted in (False, True):
        one = Determinism(wanted)
        with one.on():
            inside = switches()
        assert switches() == inside  # it lasts as long as the run
        one.off()
        one.off()
        assert switches() == before
        expected = (True, False, False, True, False, False, False)
        assert inside == (expected if wanted else before)
    with pytest.raises(KeyError), Determinism(True).on():
        raise KeyError
    assert switches() == before


def test_the_workspace_of_cublas_is_set_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before CUDA starts; afterwards only a setting that was there counts."""
    monkeypatch.delenv(VARIABLE)
    Determinism(False)
    assert VARIABLE not in determinism.os.environ
    Determinism(True)
    assert determinism.os.environ[VARIABLE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    Determinism(True)
    monkeypatch.setenv(VARIABLE, ":16:8")
    Determinism(True)
    monkeypatch.setenv(VARIABLE, ":4096:2")
    with pytest.raises(ValueError, match=r"to be :4096:8 or :16:8, got ':4096:2': unset it"):
        Determinism(True)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ValueError, match="came too late: .* export CUBLAS_WORKSPACE_CONFIG=:4096"):
        Determinism(True)


def test_the_compiler_chooses_nothing_by_timing() -> None:
    """An option of our compilations, as long as the process asks for it."""
    assert "deterministic" not in (block_options() or {})
    one = Determinism(True)
    with one.on():
        known = "deterministic" in torch._inductor.config.get_config_copy()
        assert (block_options() or {}).get("deterministic", False) is known
        assert "deterministic" in (block_options("2.13.0") or {}) or not known
    one.off()
    assert "deterministic" not in (block_options() or {})


def test_a_run_records_it_and_goes_on_with_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = switches()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    own = [ON, "train.zero_stage=2", "train.precision=bf16", "train.keep_last=1"]
    train(tiny(whole, *own, "train.images=32"), quiet=True)
    train(tiny(parts, *own, "train.images=16"), quiet=True)
    state = read_state(newest_checkpoint(parts))
    assert state.bits is not None and state.bits["torch"] == torch.__version__
    assert state.bits["ranks"] == "1" and state.bits["engine"] == "ZeRO 2"
    trainer = Trainer(tiny(parts, *own, "train.images=32"))
    assert torch.are_deterministic_algorithms_enabled()
    trainer.run()
    assert switches() == before
    said = capsys.readouterr().err
    assert "deterministic: on a CPU it changes nothing" in said and "other last bits" not in said
    assert_same_bits(whole, parts)
    starts = read_metrics(parts / "metrics.jsonl", "start")
    assert len(starts) == 2 and all(row["environment"]["deterministic"] for row in starts)
    with pytest.raises(ValueError, match=r"train.deterministic: True -> False"):
        train(tiny(parts, *own[1:], "train.images=48"), quiet=True)
    assert switches() == before


def test_a_run_says_what_changes_its_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(tiny(out, ON, "train.zero_stage=0", "train.images=16"), quiet=True)
    train(tiny(out, ON, "train.zero_stage=0", "train.images=24", "train.microbatch_size=4"))
    said = capsys.readouterr().err
    assert "deterministic, but from here on with other last bits: micro-batch 8 -> 4" in said


def test_without_it_nothing_is_recorded(tmp_path: Path) -> None:
    train(tiny(tmp_path, "train.zero_stage=0", "train.images=8"), quiet=True)
    assert read_state(newest_checkpoint(tmp_path)).bits is None


def test_an_attention_backend_that_is_gone_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would have other bits: without the setting it is taken, and said."""
    own = ["model.mode=fused", "objective.impl=reference", "train.zero_stage=0"]
    for more in ([], [ON]):
        out = tmp_path / f"run{len(more)}"
        train(tiny(out, *own, *more, "train.images=8"), quiet=True)
        state = newest_checkpoint(out) / "state.json"
        assert json.loads(state.read_text())["attention"] == ["flash"]
    find = attention.agree_on_attention

    def another(model, shape, group, before):
        return find(model, shape, group, before and ["cudnn"])

    monkeypatch.setattr("mixflow_fast.training.trainer.agree_on_attention", another)
    train(tiny(tmp_path / "run0", *own, "train.images=16"), quiet=True)
    with pytest.raises(ValueError, match="no attention backend for .* cudnn"):
        train(tiny(tmp_path / "run1", *own, ON, "train.images=16"), quiet=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_it_does_is_said_before_it_runs(tmp_path: Path) -> None:
    words = describe_determinism(True, torch.device("cuda", 0))
    assert "attention by flash or math" in words and VARIABLE in words
    assert describe_determinism(False, torch.device("cuda", 0)) == ""
    for more, said in (([ON], True), ([], False)):
        lines = rehearse(tiny(tmp_path / "run", *more))
        assert any(line.startswith("deterministic: on a CPU it changes") for line in lines) is said
