"""From an `AdapterState` to PEFT's configuration and tensors, or the reasons why PEFT has no words for it."""

from __future__ import annotations

from torch import Tensor

from lorakit.core.adapter import AdapterState
from lorakit.core.endings import smallest_pattern
from lorakit.core.target import Shape
from lorakit.io.outline import Outline
from lorakit.io.peft_config import DEFAULTS, KEPT
from lorakit.io.peft_families import FAMILIES, Family
from lorakit.io.peft_form import PeftForm
from lorakit.io.peft_naming import (
    module_list,
    number,
    parameter_list,
    target_modules,
    token_indices,
)
from lorakit.io.peft_plan import Plan, lora_of
from lorakit.io.peft_prompts_writer import to_prompts
from lorakit.io.peft_rules import (
    ATTENTION_IN,
    ATTENTION_OUT,
    LINEAR,
    PARAMETER,
    PREFIX,
    TOKEN_ROWS_KEY,
    transposed_pair,
)
from lorakit.methods import DoRA, PrefixTuning, PromptTuning, TokenRows


def to_peft(state: AdapterState, outline: Outline | None = None) -> PeftForm:
    """The adapter in PEFT's terms, or the reasons why not.

    What is measured from its start is written as PEFT converts it: a LoRA of twice the rank for the stock base.
    """
    state = state.plain()
    of = {type(method) for method in state.spec.methods.values()}
    if of & {PrefixTuning, PromptTuning}:
        return to_prompts(state, outline)
    family = next((family for family in FAMILIES.values() if family.method in of), None)
    plan = Plan(state, outline, family)
    if plan.reasons:
        return PeftForm(reasons=plan.reasons)
    return (_Writer(plan) if family is None else _FamilyWriter(plan, family)).form


class _Writer:
    """Fills the form by a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.state = plan, plan.state
        self.form = PeftForm()
        self._build()

    def _build(self) -> None:
        """Fill the form."""
        spec, hints = self.state.spec, self.plan.hints
        loras = {path: lora for path, m in spec.methods.items() if (lora := lora_of(m)) is not None}
        first = next(iter(loras.values()))
        settled = {self._settled_at(path): lora for path, lora in loras.items()}
        r, rank_pattern = smallest_pattern({path: lora.r for path, lora in settled.items()})
        alpha, alpha_pattern = smallest_pattern({path: number(lora.alpha) for path, lora in settled.items()})
        for path in loras:
            self._low_rank(path)
        for path in self.plan.rows:
            shape = spec.shapes[path]
            self.form.tables[path] = (shape.kind, shape.out, shape.in_)
            self._tensor(f"{self.plan.naming.start(path)}.{TOKEN_ROWS_KEY}", self.state.tensors[path]["rows"])
        self._full()
        init = {"gaussian": "gaussian", "kaiming": hints.get("init_lora_weights", True)}
        layers = [
            path for path in self.plan.layers if self.plan.layers[path] not in (ATTENTION_IN, ATTENTION_OUT)
        ]
        self.form.config = {
            **DEFAULTS,
            **{key: hints[key] for key in KEPT if key in hints},
            **target_modules([*layers, *self.plan.attentions], hints, self.plan.outline),
            "alpha_pattern": alpha_pattern,
            "base_model_name_or_path": spec.base,
            "bias": self.plan.bias,
            "init_lora_weights": init.get(first.init, True),
            "lora_alpha": alpha,
            "lora_bias": first.bias,
            "lora_dropout": first.dropout,
            "modules_to_save": module_list(self.plan.saved, hints),
            "r": r,
            "rank_pattern": rank_pattern,
            "target_parameters": parameter_list(
                [f"{module}.{name}" for module, names in self.plan.bare.items() for name in names], hints
            ),
            "trainable_token_indices": token_indices(
                {
                    path: list(m.ids)
                    for path in self.plan.rows
                    if isinstance(m := spec.methods[path], TokenRows)
                },
                hints,
            ),
            "use_dora": any(isinstance(m, DoRA) for m in spec.methods.values()),
            "use_rslora": first.scaling == "rslora",
        }
        if "fan_in_fan_out" not in hints and self._transposed_linear():
            self.form.config["fan_in_fan_out"] = True

    def _settled_at(self, path: str) -> str:
        rule = self.plan.layers.get(path)
        return path.rpartition(".")[0] if rule in (ATTENTION_IN, ATTENTION_OUT) else path

    def _low_rank(self, path: str) -> None:
        spec, tensors = self.state.spec, self.state.tensors[path]
        shape = spec.shapes[path]
        module, _, name = path.rpartition(".")
        rule = self.plan.layers.get(path, PARAMETER)
        start = self.plan.naming.start(path)
        if rule is ATTENTION_IN:
            start = self.plan.naming.start(module)
        elif rule is PARAMETER:
            names = self.plan.bare[module]
            start = self.plan.naming.start(module) + ".base_layer" * (len(names) - 1 - names.index(name))
            swap = self._is_transposed(path, module, shape)
            if swap:
                A, B = transposed_pair(tensors["lora_A"], tensors["lora_B"])
                tensors, shape = (
                    {"lora_A": A, "lora_B": B},
                    Shape(shape.kind, shape.in_, shape.out, shape.batch),
                )
            held = self.form.parameters.setdefault(module, [])
            held.append((name, spec.shapes[path].stored, swap))
            held.sort(key=lambda entry: names.index(entry[0]))
        sizes = rule.sizes({n: tuple(t.shape) for n, t in tensors.items()}, shape)
        for tensor_name, tensor in tensors.items():
            key = f"{start}.{rule.keys[tensor_name]}"
            self._tensor(key, rule.to_file(tensor_name, tensor, sizes[tensor_name]))

    def _is_transposed(self, path: str, module: str, shape: Shape) -> bool:
        if len(shape.stored) != 3:
            return False
        if self.plan.outline is not None and module in self.plan.outline.owned:
            return module in self.plan.outline.transposed
        return path in self.plan.hints.get("transposed", ())

    def _full(self) -> None:
        for path in self.plan.full:
            value = self.state.tensors[path]["value"].reshape(self.state.spec.shapes[path].stored)
            owner, _, leaf = path.rpartition(".")
            module = self.plan.naming.start(owner)
            if self.plan.place_of(path) in ("table", "bias inside"):
                module += ".token_adapter.base_layer" if owner in self.plan.rows else ".base_layer"
            self._tensor(f"{module}.{leaf}" if module else leaf, value)

    def _transposed_linear(self) -> bool:
        """Whether the linear layers are transformers' ``Conv1D``, as far as their sizes tell."""
        if self.plan.outline is None:
            return False
        verdicts = set()
        for path, rule in self.plan.layers.items():
            shape, size = self.state.spec.shapes[path], self.plan.outline.sizes.get(f"{path}.weight")
            if rule is LINEAR and shape.out != shape.in_ and size is not None:
                verdicts.add(size == (shape.in_, shape.out))
        return verdicts == {True}

    def _tensor(self, key: str, tensor: Tensor) -> None:
        self.form.tensors[PREFIX + key] = tensor


class _FamilyWriter(_Writer):
    """Fills the form of one of PEFT's types beside LoRA."""

    def __init__(self, plan: Plan, family: Family) -> None:
        self.family = family
        super().__init__(plan)

    def _build(self) -> None:
        family, spec, hints, own = self.family, self.state.spec, self.plan.hints, self.plan.own
        shapes = {path: spec.shapes[path] for path in own}
        for path, method in own.items():
            shape, start = shapes[path], self.plan.naming.start(path)
            sizes = family.in_file(method, method.shapes(shape), shape)
            self.form.shapes[path] = (shape.kind, shape.out, shape.in_, shape.kernel)
            for name, tensor in self.state.tensors[path].items():
                self._tensor(f"{start}.{name}", tensor.reshape(sizes[name]))
        for name, tensor in self.state.shared.items():
            self.form.tensors[f"base_model.{name}"] = tensor
        self._full()
        self.form.config = {
            **family.defaults,
            **{key: hints[key] for key in family.kept if key in hints},
            **target_modules(list(own), hints, self.plan.outline),
            **family.settings(own, shapes, hints),
            "base_model_name_or_path": spec.base,
            "modules_to_save": module_list(self.plan.saved, hints),
        }
        if "bias" in family.defaults:
            self.form.config["bias"] = self.plan.bias
        if (
            "fan_in_fan_out" in family.defaults
            and "fan_in_fan_out" not in hints
            and self._transposed_linear()
        ):
            self.form.config["fan_in_fan_out"] = True
