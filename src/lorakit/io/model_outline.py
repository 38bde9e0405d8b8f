"""Drawing up a model's outline: the only place in `lorakit.io`, beside saving and loading, that sees a model."""

from __future__ import annotations

from torch import nn

from lorakit.core.target import stock_class
from lorakit.core.walk import base_modules, join
from lorakit.io.outline import Outline, Transformer
from lorakit.targets.attention import AttentionTarget, attentions
from lorakit.targets.model import ModelTarget, inputs

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def outline_of(model: nn.Module) -> Outline:
    """The outline of a model, the adapters on it left out.

    Args:
        model: With or without adapters.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    transposed, embeddings, transposed_layers = set(), set(), set()
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sizes[join(path, name)] = tuple(parameter.shape)
        if getattr(module, "is_transposed", False):
            transposed.add(path)
        if isinstance(module, nn.Embedding):
            embeddings.add(path)
        if stock_class(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            transposed_layers.add(path)
    return Outline(
        sizes, frozenset(transposed), frozenset(embeddings), frozenset(transposed_layers), _transformer(model)
    )


def _transformer(model: nn.Module) -> Transformer | None:
    """The facts of a model that reads tokens, or None of any other."""
    target = inputs(model).get("")
    if not isinstance(target, ModelTarget):
        return None
    name = stock_class(model).__name__
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    if task is None and target.module is model:
        task = "FEATURE_EXTRACTION"
    found = attentions(model)
    sound = {path: (t.shape.out, t.heads) for path, t in found.items() if isinstance(t, AttentionTarget)}
    return Transformer(sound, task, target.pools_first)
