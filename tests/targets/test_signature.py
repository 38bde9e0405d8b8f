"""Names of the parameters of a module's forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.targets.signature import by_name, parameter_names


class Layer(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *rest: Tensor, scale: float = 1.0) -> Tensor:
        return x


def test_names_by_position() -> None:
    assert parameter_names(Layer()) == ("x", "mask")
    assert parameter_names(nn.Linear(2, 2)) == ("input",)
    assert parameter_names(torch.jit.script(nn.Linear(2, 2))) == ()


def test_arguments_by_name() -> None:
    assert by_name(("x", "mask"), (1,), {"mask": 2, "scale": 3}) == {"x": 1, "mask": 2, "scale": 3}
