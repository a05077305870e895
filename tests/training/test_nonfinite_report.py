"""Gradient norms by module."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.training.nonfinite_report import grad_norms


def test_grad_norms_by_module() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    net.frozen = torch.nn.Parameter(torch.ones(2))
    net(torch.ones(5, 3)).square().sum().backward()
    found = grad_norms({name: p.grad for name, p in net.named_parameters()})
    assert set(found) == {"0", "1"}
    for name in found:
        expected = torch.cat([p.grad.flatten() for p in net[int(name)].parameters()]).norm()
        assert found[name] == pytest.approx(float(expected), rel=1e-6)
