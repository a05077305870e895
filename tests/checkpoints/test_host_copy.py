from collections import OrderedDict
from pathlib import Path

import torch

from mixflow_fast.checkpoints.host_copy import host_copy


def test_a_copy_keeps_its_values_while_the_state_changes() -> None:
    weight = torch.arange(6.0).view(2, 3)
    state = {"module": OrderedDict(w=weight), "groups": [{"lr": 0.1, "params": (weight[0], 3)}]}
    copied = host_copy(state)
    weight.zero_()
    state["groups"][0]["lr"] = 0.2
    assert type(copied["module"]) is OrderedDict
    assert copied["module"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["groups"][0]["lr"] == 0.1
    assert copied["groups"][0]["params"][0].tolist() == [0, 1, 2]


def test_a_tensor_that_stands_twice_is_copied_once() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    copied = host_copy([weight, {"again": weight}])
    assert copied[0] is copied[1]["again"] and not copied[0].requires_grad


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    flat = torch.arange(1_000_000.0)
    torch.save(host_copy({"part": flat[10:20]}), tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < 10_000
    part = torch.load(tmp_path / "part.pt", weights_only=True)["part"]
    assert torch.equal(part, flat[10:20])


def test_objects_of_other_classes_are_copied_too() -> None:
    class Scaler:
        def __init__(self) -> None:
            self.scales = [1.0]

    state = {"scaler": Scaler(), "none": None}
    copied = host_copy(state)
    state["scaler"].scales.append(2.0)
    assert copied["scaler"].scales == [1.0] and copied["none"] is None
