"""PEFT's PiSSA, OLoRA, CorDA and LoRA-GA as they are saved without conversion: two adapters that belong to one.

PEFT takes ``s B_0 A_0`` from the base weight when training begins, so a trained file of it is meant for a base that
nobody has. With the adapter as it was saved before training the change of the stock base is known:
``s (B A - B_0 A_0)``.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from lorakit.core.adapter import AdapterState
from lorakit.core.method import Method
from lorakit.errors import AdapterFileError, ConfigError, listing
from lorakit.io.peft_plan import lora_of
from lorakit.methods import DoRA
from lorakit.methods.init import init_called


def with_start(trained: AdapterState, initial: AdapterState, init: object) -> AdapterState:
    """The trained adapter, measured from the initial one: for the stock base.

    Args:
        trained: As PEFT saved it.
        initial: The same adapter before training.
        init: ``init_lora_weights`` of the trained one.

    Raises:
        AdapterFileError: The two are not the same adapter at two times.
    """
    methods: dict[str, Method] = dict(trained.spec.methods)
    tensors: dict[str, dict[str, Tensor]] = {path: dict(group) for path, group in trained.tensors.items()}
    low_rank = {path: lora for path, method in methods.items() if (lora := lora_of(method)) is not None}
    known = {path for path, method in initial.spec.methods.items() if lora_of(method) is not None}
    if odd := sorted(known ^ set(low_rank)):
        raise AdapterFileError(
            f"The initial adapter and the trained one adapt different layers: {listing(odd)}."
        )
    name = init if isinstance(init, str) and _is_subtracted(init) else "given"
    for path, lora in low_rank.items():
        before = lora_of(initial.spec.methods[path])
        assert before is not None
        if (
            dataclasses.replace(before, init=lora.init) != lora
            or initial.spec.shapes[path] != trained.spec.shapes[path]
        ):
            raise AdapterFileError(
                f"The initial adapter is not the trained one before training: at {path!r} it has {before} and not "
                f"{lora}."
            )
        method, started = methods[path], dataclasses.replace(lora, init=name)
        methods[path] = dataclasses.replace(method, inner=started) if isinstance(method, DoRA) else started
        tensors[path] |= {f"start_{factor}": initial.tensors[path][f"lora_{factor}"] for factor in "AB"}
    info = dict(trained.spec.info)
    info["peft"] = {key: v for key, v in info.get("peft", {}).items() if key != "init_lora_weights"}
    spec = dataclasses.replace(trained.spec, methods=methods, info=info)
    return AdapterState(spec, tensors, trained.shared)


def _is_subtracted(init: str) -> bool:
    try:
        return init_called(init).subtracted
    except ConfigError:
        return False
