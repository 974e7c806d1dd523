"""A model that is as simple as torch.optim.Muon needs it, for the tests of its groups."""

from __future__ import annotations

from torch import nn


class Layers(nn.Module):
    """Wide, tall and square matrices beside vectors."""

    def __init__(self, width=32):
        super().__init__()
        self.hparams = {"width": width}
        sides = {"stem": (8, width), "up": (width, 3 * width), "down": (3 * width, width), "head": (width, 8)}
        for name, (fan_in, fan_out) in sides.items():
            setattr(self, name, nn.Linear(fan_in, fan_out))
