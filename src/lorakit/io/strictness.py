"""One error that tells all that does not fit in an adapter's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lorakit.errors import AdapterFileError, listing, near_matches
from lorakit.io.peft_keys import Found


class Complaints:
    """What is missing, unexpected and of another size, collected while a file is read.

    Attributes:
        missing: Keys that should be there.
        unexpected: Keys that should not.
        misshaped: Sentences on tensors of another size.
    """

    def __init__(self, known: Sequence[str] = (), described: str = "its configuration describes") -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshaped: list[str] = []
        self._known, self._described = known, described

    def fits(
        self,
        start: str,
        want: Mapping[str, tuple[int, ...]],
        have: Mapping[str, Found],
        remark: str = "",
        keys: Mapping[str, str] | None = None,
    ) -> bool:
        """Whether a group has the tensors that are wanted, in the sizes that are wanted; else it is noted.

        Args:
            start: What the group's keys start with.
            want: Name to size.
            have: The group's tensors by name.
            remark: What is said after a size that is not wanted.
            keys: Name to the rest of the key, where that is not the name itself.
        """
        if want == {name: found.tensor.shape for name, found in have.items()}:
            return True
        missing = [f"{start}.{keys[name] if keys else name}" for name in want if name not in have]
        unexpected = [found.key for name, found in have.items() if name not in want]
        wrong = [
            f"{have[name].key} is {tuple(have[name].tensor.shape)}, not {size}{remark}"
            for name, size in want.items()
            if name in have and tuple(have[name].tensor.shape) != size
        ]
        self.missing += missing
        self.unexpected += unexpected
        self.misshaped += wrong
        return False

    def check(self) -> None:
        """Raise one `AdapterFileError` for all of it, if there is anything."""
        if not (self.missing or self.unexpected or self.misshaped):
            return
        parts = []
        if self.missing:
            hints = "".join(near_matches(self.missing[0], self.unexpected))
            parts.append(f"{len(self.missing)} missing: {listing(self.missing)}{hints or '.'}")
        if self.unexpected:
            known = [key for key in self._known if key not in self.unexpected]
            hints = near_matches(self.unexpected[0], known, n=1)
            parts.append(f"{len(self.unexpected)} unexpected: {listing(self.unexpected)}{hints or '.'}")
        if self.misshaped:
            parts.append(f"{len(self.misshaped)} of another size: {listing(self.misshaped)}.")
        raise AdapterFileError(
            f"The adapter's tensors are not those that {self._described}. "
            + " ".join(part[0].upper() + part[1:] for part in parts)
            + " Nothing was read: an adapter that is only partly there computes something else."
        )


def floating(key: str, tensor: Tensor) -> Tensor:
    """The tensor, if an adapter can hold it.

    Raises:
        AdapterFileError: It holds whole numbers.
    """
    if not tensor.is_floating_point():
        raise AdapterFileError(
            f"{key} holds {str(tensor.dtype).removeprefix('torch.')} numbers. An adapter holds floating-point "
            "parameters only; this may be a buffer, such as the running statistics of a batch norm in "
            "modules_to_save."
        )
    return tensor
