"""Weights that were one parameter and differ after a merge: saying so, and saying it back.

transformers ties weights in loading by one word of the config, and saves one name of those that are one tensor. So when
one tie of a model is broken, the word has to go, and all its other ties with it: each use gets a tensor of its own, or
loading the saved model would find none for it.
"""

from __future__ import annotations

import torch
from torch import nn

from lorakit.attach.attachments import Attachments
from lorakit.core.walk import base_modules
from lorakit.targets.dense import DenseStorage

_WORD = "tie_word_embeddings"


def untie(model: nn.Module, attachments: Attachments) -> None:
    """After a merge: where it broke a tie of a transformers model, no tie of it is left, nor the word for them."""
    config = getattr(model, "config", None)
    if getattr(config, _WORD, None) is not True or not _breaks(model, attachments):
        return
    setattr(config, _WORD, False)
    attachments.ties_broken = True
    seen: set[int] = set()
    for _, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in seen:
                seen.add(id(parameter))
                continue
            attachments.ties.append((module, name, parameter))
            module._parameters[name] = nn.Parameter(
                parameter.detach().clone(), requires_grad=parameter.requires_grad
            )


def tie_again(model: nn.Module, attachments: Attachments) -> None:
    """Undo `untie`, once the merged weights are those of the base again."""
    for module, name, parameter in attachments.ties:
        DenseStorage().restore(module, name, parameter)
    if attachments.ties_broken:
        setattr(model.config, _WORD, True)
    forget_ties(attachments)


def forget_ties(attachments: Attachments) -> None:
    """Let what is broken stay so."""
    attachments.ties, attachments.ties_broken = [], False


def _breaks(model: nn.Module, attachments: Attachments) -> bool:
    """Whether what was one parameter has other values in one place than in another."""
    now: dict[int, list[torch.Tensor]] = {}
    for item in attachments.merged:
        module, biased = item.target.module, item.bias_changed and item.bias is not None
        for old, name in ((item.weight, item.target.parameter), (item.bias if biased else None, "bias")):
            new = module._parameters.get(name)
            if isinstance(old, nn.Parameter) and new is not None:
                now.setdefault(id(old), []).append(new)
    if any(id(p) in now for _, module in base_modules(model) for p in module._parameters.values()):
        return True
    return any(not torch.equal(first, other) for first, *others in now.values() for other in others)
