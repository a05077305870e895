"""Processes and devices: one process without a launcher, many under torchrun or deepspeed."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def init_process_group(device: str = "auto", timeout_s: float = 1800.0) -> torch.device:
    """Join the launcher's process group, or make a group of one; return this rank's device.

    Under `torchrun` or `deepspeed` the environment names rank and peers. Without a launcher no port
    is opened. A group that exists already is used as it is.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".
        timeout_s: after which a collective that a dead rank left waiting fails.

    Raises:
        ValueError: "cuda" without a usable GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU; use train.device=cpu or auto")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    return chosen


def rank() -> int:
    """This process's number; 0 without a process group."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are; known from the launcher before the group exists."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))
