"""Writing a prefix or prompt in the form of PEFT's PREFIX_TUNING and PROMPT_TUNING, or the reasons why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import AdapterState
from lorakit.errors import listing
from lorakit.io.outline import Outline, Transformer
from lorakit.io.peft_form import PeftForm
from lorakit.io.peft_prompts import CLASSIFIER, KEPT, KEY, PREFIX, PROMPT, PROMPTS, START
from lorakit.io.peft_rules import natural
from lorakit.methods import FullFineTuning, PrefixTuning, PromptTuning

_HEADS = ["classifier", "score"]


def to_prompts(state: AdapterState, outline: Outline | None) -> PeftForm:
    """A prefix or prompt in PEFT's terms, or the reasons why not."""
    spec = state.spec
    hints = spec.info.get("peft", {})
    heads = [path for path, method in spec.methods.items() if type(method) is FullFineTuning]
    places = {path: method for path, method in spec.methods.items() if path not in heads}
    transformer = None if outline is None else outline.transformer
    reasons: list[str] = []
    kinds = {type(method) for method in places.values()}
    if len(kinds) > 1:
        names = sorted({method.name for method in places.values()})
        reasons.append(f"PEFT has one type of adapter in a file; this one has {listing(names)}")
        return PeftForm(reasons=reasons)
    kind = PREFIX if kinds == {PrefixTuning} else PROMPT
    task = hints.get("task_type") or (None if transformer is None else transformer.task)
    if task is None:
        reasons.append(
            "PEFT must be told what the model is for, which only the model's class says: save it from the model"
        )
    write = _write_prefix if kind == PREFIX else _write_prompt
    settings, table = write(state, list(places), transformer, task, reasons)
    owners = _whole_modules(heads, outline, reasons)
    if reasons:
        return PeftForm(reasons=reasons)
    assert table is not None
    saved = (
        hints.get("modules_to_save") or list(dict.fromkeys([*owners, *(_HEADS if owners else [])])) or None
    )
    config = {
        **PROMPTS[kind],
        **{key: hints[key] for key in KEPT if key in hints and key in PROMPTS[kind]},
        **settings,
        "base_model_name_or_path": spec.base,
        "modules_to_save": saved,
        "num_virtual_tokens": table.shape[0],
        "task_type": task,
    }
    tensors = {KEY: table}
    for path in heads:
        tensors[START + path] = state.tensors[path]["value"].reshape(spec.shapes[path].stored)
    of = {path: spec.shapes[path] for path in places}
    shapes: dict[str, tuple[str, int, int, tuple[int, ...]]] = {
        path: (shape.kind, shape.out, shape.in_, shape.kernel) for path, shape in of.items()
    }
    return PeftForm(config, tensors, shapes=shapes)


def _write_prompt(
    state: AdapterState,
    paths: list[str],
    transformer: Transformer | None,
    task: str | None,
    reasons: list[str],
) -> tuple[dict[str, Any], Tensor | None]:
    if paths != [""]:
        reasons.append(
            f"PEFT puts a prompt in front of the model itself, not of a part of it ({listing(paths)})"
        )
        return {}, None
    method, table = state.spec.methods[""], state.tensors[""]["prompt"]
    assert isinstance(method, PromptTuning)
    pools = transformer is None or transformer.pools_first
    if task == CLASSIFIER and pools and method.pooled == "token":
        reasons.append(
            "PEFT's classifiers pool the prompt's first vector, and this adapter was trained to pool the first token"
        )
    if task not in (CLASSIFIER, None) and pools and method.pooled == "prompt":
        reasons.append(f"PEFT pools the prompt's first vector in classifiers, and this adapter is for {task}")
    init = "SAMPLE_VOCAB" if method.init == "vocab" else "RANDOM"
    return {
        "prompt_tuning_init": state.spec.info.get("peft", {}).get("prompt_tuning_init", init),
        "num_layers": None if transformer is None else len(transformer.attentions),
        "token_dim": table.shape[1],
    }, table


def _write_prefix(
    state: AdapterState,
    paths: list[str],
    transformer: Transformer | None,
    task: str | None,
    reasons: list[str],
) -> tuple[dict[str, Any], Tensor | None]:
    if transformer is None:
        reasons.append(
            "PEFT must be told the number of heads, which only the model says: save it from the model"
        )
        return {}, None
    known = transformer.attentions
    widths = sorted(set(known.values()))
    lengths = sorted({m.length for m in state.spec.methods.values() if isinstance(m, PrefixTuning)})
    if list(known) != sorted(known, key=natural):
        reasons.append(
            "PEFT numbers the layers of a prefix, and this model's are not in the order of their names"
        )
    if sorted(paths) != sorted(known):
        reasons.append(
            f"PEFT has a prefix at every attention of the model, {len(known)}; this one is at {len(paths)}"
        )
    if len(widths) > 1:
        reasons.append(
            "PEFT has one width and number of heads for all attentions; those of this model differ"
        )
    if len(lengths) > 1:
        reasons.append(f"PEFT has one length for all attentions; this adapter has {lengths}")
    if reasons:
        return {}, None
    width, heads = widths[0]
    own = [state.tensors[path][name] for path in known for name in ("prefix_k", "prefix_v")]
    first = state.spec.methods[paths[0]]
    assert isinstance(first, PrefixTuning)
    return {
        "encoder_hidden_size": state.spec.info.get("peft", {}).get("encoder_hidden_size", width),
        "init_weights": "zero" if first.init == "zero" else None,
        "num_attention_heads": heads,
        "num_layers": len(known),
        "token_dim": width,
    }, torch.cat([t.to(own[0].dtype) for t in own], dim=1)


def _whole_modules(heads: list[str], outline: Outline | None, reasons: list[str]) -> list[str]:
    """The modules that these parameters are, as PEFT names them; or a reason why they are no whole modules."""
    if not heads:
        return []
    if outline is None:
        reasons.append(
            "PEFT saves whole modules, and what they hold only the model says: save it from the model"
        )
        return []
    found: dict[str, None] = {}
    for path in heads:
        parts = path.split(".")[:-1]
        above = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        whole = next((module for module in above if set(outline.under(module)) <= set(heads)), None)
        if whole is None:
            reasons.append(
                f"PEFT saves whole modules, and only a part of the one that holds {path!r} is trained"
            )
            return []
        found[whole] = None
    for module in found:
        others = [name for name in outline.modules if name != module and name.endswith(module)]
        if others:
            reasons.append(f"PEFT would take {module!r} for {listing(others)} too")
    return list(found)
