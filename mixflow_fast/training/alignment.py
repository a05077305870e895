"""REPA's alignment term of a training run: the network's tokens against a frozen teacher's.

    L_align = - mean over samples and tokens of cos(projection, teacher)

The projection is that of the training forward, of x_m at the label t, which costs nothing more; or,
with `objective.alignment_input: label`, that of x_t with the same noise, from a second pass through
the first `encoder_depth` blocks. The features come from a file or from the teacher itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixflow_fast.config.schema import ObjectiveConfig
from mixflow_fast.data import Batch
from mixflow_fast.models import repa_alignment_loss
from mixflow_fast.models.teacher import Teacher
from mixflow_fast.objective.mixflow import Interpolation, MixFlow


class Alignment:
    """The term; zero where the configuration has none.

    Args:
        section: its weight, and whether it looks at x_m or at x_t.
        teacher: the encoder that is run at each step, still on the CPU; None where the features
            come with the batch, or without the term.
        mix: the objective, which prepares x_t for `alignment_input: label`.
        device: where the batches come.

    Attributes:
        weight: what the trainer multiplies the term by.
        teacher: as given.
    """

    def __init__(
        self, section: ObjectiveConfig, teacher: Teacher | None, mix: MixFlow, device: torch.device
    ) -> None:
        self.weight, self.teacher = section.alignment_weight, teacher
        self._mix, self._device = mix, device
        self._at_label = section.alignment_input == "label"
        self._nothing = torch.zeros((), device=device)

    def move_teacher(self) -> None:
        """Take the teacher to the device, once it is sure that the run begins there."""
        if self.teacher is not None:
            self.teacher.model.to(self._device)

    def __call__(
        self, net: nn.Module, zs: list[Tensor] | None, batch: Batch, it: Interpolation
    ) -> Tensor:
        """The term of a micro-batch, not yet weighted.

        Args:
            net: the network itself, not DeepSpeed's engine around it.
            zs: the projections of the training forward, (B, N, z_dim) each; None without any.
            batch: as the training forward saw it; with features, or with what the teacher looks
                at: its images, else the data themselves.
            it: what the training forward was fed.

        Returns:
            float32 scalar on the device, in [-1, 1].
        """
        if not self.weight:
            if zs is None:
                return self._nothing
            # The projectors stay out of the loss; a zero keeps their gradients defined.
            return 0.0 * torch.stack([z.float().sum() for z in zs]).sum()
        if self._at_label:
            # The same ids draw the same noise.
            at_label = self._mix.prepare(
                it.data, ids=batch.positions, t=it.t, slowed_t=it.t, dtype=it.x.dtype
            )
            zs = net.projections(at_label.x, at_label.t, batch.y)
        return repa_alignment_loss(zs, [self._features(batch, it)])

    def _features(self, batch: Batch, it: Interpolation) -> Tensor:
        if self.teacher is None:
            return batch.features
        # A model of pixels trains on what the teacher has to see, flips and all.
        return self.teacher(it.x1 if batch.images is None else batch.images)
