"""Whether a model can learn to stop: a stop token that the base never saw cannot be told from other unseen ones.

Tokens that never occur in pretraining all receive the same push, so that their rows in the output head end up all but
parallel. With the head frozen, no adapter below it can raise one of them above the others: a model with n such twins
of its stop token never gives it more than 1/(n + 1), and its answers do not end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lorakit.attach.attachments import attachments_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# SmolLM2's <|im_end|>, which its instruction tuning did train, is at 0.991 from the reserved tokens and is learnt well.
_PARALLEL = 0.999
_ROWS_AT_ONCE = 4096  # of the output layer, which may be the largest matrix of a model


def stop_token_warning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: int, adapter: str
) -> str | None:
    """What to tell about the token that ends answers, or None when it can be learnt.

    Args:
        model: With the adapter attached.
        tokenizer: Its tokenizer.
        stop: The token's id.
        adapter: The adapter's name; one that changes the head or the embedding is taken to know what it does.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return None
    adapted = {id(slot.target.module) for slot in attachments_of(model).adapter(adapter).slots.values()}
    if adapted & {id(head), id(embedding)}:
        return None
    with torch.no_grad():
        own = F.normalize(head.weight[stop].float(), dim=0)
        parts = (F.normalize(rows.float(), dim=1) for rows in head.weight.split(_ROWS_AT_ONCE))
        twins = sum(int((rows @ own > _PARALLEL).sum()) for rows in parts) - 1
    if twins < 1:
        return None
    path = next(path for path, module in model.named_modules() if module is embedding).rsplit(".", 1)[-1]
    token = tokenizer.convert_ids_to_tokens(stop)
    return (
        f"WARNING: the stop token {token!r} has all but the same output vector as {twins} other tokens, so it was "
        "never trained, and with the head frozen the answers will not learn to end. Train its row along: "
        f"adapter.groups: {{all-linear: {{method: lora}}, {path}: {{method: token_rows, ids: [{stop}]}}}}"
    )
