"""What torch-fidelity computes, recorded as tests/golden/torch_fidelity.safetensors.

    python -m tests.support.torch_fidelity_golden

It was run once with torch-fidelity 0.4.0 and torch 2.13 on a CPU. torch-fidelity is in no extra: it
needs torchvision, whose wheel does not import beside a CPU build of torch. Here modules without
content stand in for torchvision, of which these functions use nothing.
"""

import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, normal, uniform

SIZES = (32, 320)  # of the images: enlarged and reduced


def random_inception(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Weights by name: large enough that no layer dies, and no two of batch norm's are alike."""
    state = {}
    for layer, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        flat = normal(3, Stream.INIT, torch.tensor([layer]), shape.numel()).view(shape)
        if name.endswith("running_var"):
            flat = (0.3 * flat).exp()
        elif name.endswith("bn.weight"):
            flat = 1 + 0.2 * flat
        elif len(shape) > 1:
            flat = flat * (2 / shape[1:].numel()) ** 0.5
        else:
            flat = 0.2 * flat
        state[name] = flat
    return state


def images(size: int) -> Tensor:
    """(2, 3, size, size) uint8: noise on large squares."""
    coarse = uniform(4, Stream.NOISE, torch.arange(2), 3 * 16).view(2, 3, 4, 4)
    fine = uniform(5, Stream.NOISE, torch.arange(2), 3 * size * size).view(2, 3, size, size)
    large = coarse.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
    return (255 * (0.7 * large + 0.3 * fine)).to(torch.uint8)


def features(seed: int) -> Tensor:
    """(200, 24) float32, correlated, not centred, as they were recorded: seed 1 or 2."""
    from tests.support.golden import load

    return load("torch_fidelity")[0][f"features_{seed}"]


def _features(seed: int, count: int = 200, dim: int = 24) -> Tensor:
    mix = normal(99, Stream.NOISE, torch.arange(dim), dim) * 0.3 + torch.eye(dim)
    rows = normal(seed, Stream.NOISE, torch.arange(count), dim)
    return rows * (1 + 0.1 * (seed % 2)) @ mix + 0.2 * (seed % 3)


def _without_torchvision() -> None:
    for name in ("", ".datasets", ".transforms", ".transforms.functional", ".models"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(sys.modules["torchvision.datasets"], name, object)


def main() -> None:
    """Record everything."""
    _without_torchvision()
    from safetensors.torch import save_file
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    from mixflow_fast.evaluation.features.inception import InceptionV3
    from tests.support.golden import FOLDER

    state = random_inception({k: v.shape for k, v in InceptionV3().state_dict().items()})
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "w.pth")
        network = FeatureExtractorInceptionV3(
            "x", ["2048", "logits_unbiased"], str(Path(folder) / "w.pth")
        )
    spatial: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, out: spatial.append(out))
    recorded = {}
    for size in SIZES:
        pool, logits = network(images(size))
        recorded |= {f"pool_{size}": pool, f"logits_{size}": logits}
        recorded[f"spatial_{size}"] = spatial[-1][:, :7].contiguous()
    a, b = _features(1), _features(2)
    statistics = []
    for rows in (a.double(), b.double()):
        statistics.append({"mu": rows.mean(0).numpy(), "sigma": rows.T.cov().numpy()})
    fid = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    score = isc_features_to_metric(a, 2, False)
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    mmd = kernel_mmd(a.double().numpy(), b.double().numpy(), kid_kernel_poly_coef0=1, **kernel)
    precision, recall = calculate_precision_recall_full(a, b)
    numbers = {
        "fid": fid,
        "is": score["inception_score_mean"],
        "is_sd": score["inception_score_std"],
        "kid": mmd,
        "precision": precision,
        "recall": recall,
    }
    recorded |= {name: torch.tensor(float(v), dtype=torch.float64) for name, v in numbers.items()}
    # The numbers are of these bits; logarithms and cosines differ in the last ones between CPUs.
    recorded |= {"features_1": a, "features_2": b}
    save_file(recorded, FOLDER / "torch_fidelity.safetensors")
    print(numbers, {k: float(v.std()) for k, v in recorded.items() if v.ndim > 1})


if __name__ == "__main__":
    main()
