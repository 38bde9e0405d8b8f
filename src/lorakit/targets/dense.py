"""Weights kept as they are: an ordinary floating-point parameter."""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.core.target import Storage


class DenseStorage(Storage):
    """A floating-point ``nn.Parameter``.

    ``store`` puts a new parameter object in place, so a second layer that is tied to the old one keeps the
    old values, and ``restore`` puts the old object back: the tie comes back with it.
    """

    def load(self, module: nn.Module, name: str) -> Tensor:
        """The parameter's values."""
        return self._parameter(module, name).detach()

    def store(self, module: nn.Module, name: str, value: Tensor) -> None:
        """A new parameter with the old one's dtype, device and ``requires_grad``."""
        old = self._parameter(module, name)
        new = value.to(device=old.device, dtype=old.dtype).contiguous()
        if new.data_ptr() == value.data_ptr():
            new = new.clone()
        module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)

    def snapshot(self, module: nn.Module, name: str) -> nn.Parameter:
        """The parameter object itself."""
        return self._parameter(module, name)

    def restore(self, module: nn.Module, name: str, snapshot: nn.Parameter) -> None:
        """The old object; converted first if the model was moved or cast in the meantime."""
        now = self._parameter(module, name)
        if snapshot.dtype != now.dtype or snapshot.device != now.device:
            snapshot.data = snapshot.data.to(device=now.device, dtype=now.dtype)
        module._parameters[name] = snapshot

    @staticmethod
    def _parameter(module: nn.Module, name: str) -> nn.Parameter:
        parameter = module._parameters[name]
        assert parameter is not None
        return parameter
