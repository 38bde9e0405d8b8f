"""PEFT's PREFIX_TUNING and PROMPT_TUNING: one tensor ``prompt_embeddings``, and heads that were trained along.

A prefix stands in the file as ``(length, layers x 2 x width)``: for each layer its keys, then its values. Of a training
network PEFT's files hold what it makes. They name no modules: a prompt belongs to the model's input, and where a prefix
belongs is found on the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, ConfigError, listing
from lorakit.io.embedded import Embedded
from lorakit.io.outline import Outline
from lorakit.io.peft_config import PEFT_VERSION, check_settings, kept_settings, settings_error
from lorakit.io.peft_rules import natural
from lorakit.io.peft_whole import parameter_shape
from lorakit.io.strictness import Complaints, floating
from lorakit.methods import FullFineTuning, PrefixTuning, PromptTuning

PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
KEY = "prompt_embeddings"
START = "base_model."
CLASSIFIER = "SEQ_CLS"
_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
    "token_dim": None,
}
PROMPTS: dict[str, dict[str, Any]] = {
    PREFIX: {
        **_COMMON,
        "peft_type": PREFIX,
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    },
    PROMPT: {
        **_COMMON,
        "peft_type": PROMPT,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
}
"""``peft_type`` to every setting that it has, with PEFT's default."""
KEPT = (
    "auto_mapping", "encoder_hidden_size", "inference_mode", "init_weights", "num_attention_heads", "peft_version",
    "prompt_tuning_init", "prompt_tuning_init_text", "revision", "task_type", "tokenizer_kwargs",
    "tokenizer_name_or_path",
)  # fmt: skip
INITS = {"RANDOM": "normal", "SAMPLE_VOCAB": "vocab", "TEXT": "vocab"}


def read_prompts(
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    embedded: Embedded | None = None,
    outline: Outline | None = None,
    ignore: Collection[str] = (),
) -> AdapterState:
    """The prefix or prompt that a configuration and tensors of PEFT's describe.

    Raises:
        AdapterFileError: A setting cannot be honoured, a tensor is missing, unexpected or of another size, or a prefix
            is read without the model that it belongs to.
    """
    config = check_settings(raw, PROMPTS[raw["peft_type"]], {}, ignore)
    if config["num_transformer_submodules"] not in (1, None):
        raise AdapterFileError(
            f"num_transformer_submodules is {config['num_transformer_submodules']}: the adapter belongs to an "
            "encoder-decoder, for which lorakit has no prefixes and prompts."
        )
    complaints = Complaints()
    given = tensors.get(KEY)
    if given is None or given.dim() != 2:
        found = "is missing" if given is None else f"has size {tuple(given.shape)}"
        raise AdapterFileError(f"{KEY} {found}; it should be (virtual tokens, width).")
    table = floating(KEY, given)
    length = config["num_virtual_tokens"]
    if length is not None and length != table.shape[0]:
        complaints.misshaped.append(f"{KEY} has {table.shape[0]} rows, and num_virtual_tokens is {length}")
    complaints.check()
    try:
        read = _read_prefix if raw["peft_type"] == PREFIX else _read_prompt
        methods, shapes, own = read(config, table, embedded, outline)
    except ConfigError as error:
        raise settings_error(error) from error
    _read_heads(config, tensors, complaints, methods, shapes, own)
    complaints.check()
    peft = kept_settings(config, KEPT, PROMPTS[raw["peft_type"]])
    if config["modules_to_save"]:
        peft["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))
    info = {"peft": peft} if peft else {}
    return AdapterState(AdapterSpec(methods, shapes, config["base_model_name_or_path"], info), own)


Read = tuple[dict[str, Method], dict[str, Shape], dict[str, dict[str, Tensor]]]


def _read_prompt(
    config: Mapping[str, Any], table: Tensor, embedded: Embedded | None, outline: Outline | None
) -> Read:
    init = INITS.get(str(config["prompt_tuning_init"]))
    if init is None:
        raise AdapterFileError(
            f"prompt_tuning_init is {config['prompt_tuning_init']!r}; known: {listing(INITS)}."
        )
    pooled = "prompt" if config["task_type"] == CLASSIFIER else "token"
    width = table.shape[1]
    vocabulary = 0
    if embedded is not None and "" in embedded.shapes:
        vocabulary = int(embedded.shapes[""][2])
    shape = Shape("model", out=width, in_=vocabulary)
    return {"": PromptTuning(table.shape[0], init=init, pooled=pooled)}, {"": shape}, {"": {"prompt": table}}


def _read_prefix(
    config: Mapping[str, Any], table: Tensor, embedded: Embedded | None, outline: Outline | None
) -> Read:
    length = table.shape[0]
    shapes = _prefix_shapes(config, table, embedded, outline)
    method = PrefixTuning(length, init="zero" if config["init_weights"] == "zero" else "normal")
    halves = table.split([size for shape in shapes.values() for size in (shape.out, shape.out)], dim=1)
    own = {
        path: {"prefix_k": keys, "prefix_v": values}
        for path, keys, values in zip(shapes, halves[::2], halves[1::2], strict=True)
    }
    return dict.fromkeys(shapes, method), shapes, own


def _prefix_shapes(
    config: Mapping[str, Any], table: Tensor, embedded: Embedded | None, outline: Outline | None
) -> dict[str, Shape]:
    """The attentions that a prefix belongs to, in order: as our own file or the model says."""
    if outline is not None and outline.transformer is not None:
        ours = {} if embedded is None else embedded.shapes
        shapes = {
            path: Shape("attention", out=width, in_=ours[path][2] if path in ours else 0)
            for path, (width, _) in outline.transformer.attentions.items()
        }
    elif embedded is not None and embedded.shapes:
        shapes = {
            path: Shape(kind, out=out, in_=in_)
            for path, (kind, out, in_, _) in sorted(
                embedded.shapes.items(), key=lambda item: natural(item[0])
            )
        }
    elif outline is not None:
        raise AdapterFileError(
            "The adapter is a prefix, and the model has no attentions to put it in front of."
        )
    else:
        raise AdapterFileError(
            "PEFT's file of a prefix does not say which modules it belongs to; that is found on the model: load it "
            "with lorakit.load(model, ...)."
        )
    width = sum(2 * shape.out for shape in shapes.values())
    if width != table.shape[1] or config["num_layers"] not in (None, len(shapes)):
        raise AdapterFileError(
            f"{KEY} has {table.shape[1]} columns for {config['num_layers']} layers; the model has {len(shapes)} "
            f"attentions, which take {width}. The adapter belongs to another base model."
        )
    return shapes


def _read_heads(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    complaints: Complaints,
    methods: dict[str, Method],
    shapes: dict[str, Shape],
    own: dict[str, dict[str, Tensor]],
) -> None:
    """The modules that were trained along."""
    saved = config["modules_to_save"] or []
    for key, tensor in tensors.items():
        if key == KEY:
            continue
        path = key.removeprefix(START)
        if not any(f".{name}." in f".{path}" for name in saved):
            complaints.unexpected.append(key)
            continue
        value = floating(key, tensor)
        method, shape = FullFineTuning(), parameter_shape(value)
        methods[path], shapes[path] = method, shape
        own[path] = {"value": value.reshape(method.shapes(shape)["value"])}
