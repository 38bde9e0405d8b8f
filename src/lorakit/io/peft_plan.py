"""Which of PEFT's rules says what of an adapter, and what none of them can say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lorakit.core.adapter import AdapterState
from lorakit.core.method import Method
from lorakit.core.selection import split_part
from lorakit.core.target import Shape
from lorakit.io.outline import Outline
from lorakit.io.peft_families import Family
from lorakit.io.peft_naming import Naming
from lorakit.io.peft_rules import (
    ATTENTION_IN,
    ATTENTION_OUT,
    CONV,
    EMBEDDING,
    LINEAR,
    RESERVED,
    Rule,
    convention,
)
from lorakit.methods import DoRA, FullFineTuning, LoRA, TokenRows

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Plan:
    """The targets of an adapter, each under its rule.

    Attributes:
        hints: What reading PEFT's file has left in ``spec.info["peft"]``.
        layers: Path to rule, for the targets that ``target_modules`` names.
        attentions: The ``nn.MultiheadAttention`` modules that are adapted as a whole.
        bare: Module to its adapted parameters, innermost first.
        full: Paths of whole parameters.
        rows: Paths of tables with token rows.
        naming: PEFT's paths.
        family: The type of PEFT's files, if it is not LoRA.
        own: The targets of that type.
        reasons: What PEFT has no words for; when there is any, the rest is not to be used.
    """

    def __init__(self, state: AdapterState, outline: Outline | None, family: Family | None = None) -> None:
        self.state, self.outline, self.family = state, outline, family
        peft = state.spec.info.get("peft", {})
        self.hints: Mapping[str, Any] = peft if isinstance(peft, Mapping) else {}
        self.layers: dict[str, Rule] = {}
        self.attentions: list[str] = []
        self.bare: dict[str, list[str]] = {}
        self.full: list[str] = []
        self.rows: list[str] = []
        self.own: dict[str, Method] = {}
        self.reasons: list[str] = []
        self.naming = Naming({})
        self._sort()
        self._check_full()

    def _sort(self) -> None:
        """Give every target its rule, collecting reasons."""
        methods, shapes = self.state.spec.methods, self.state.spec.shapes
        low_rank = {path: lora for path, m in methods.items() if (lora := lora_of(m)) is not None}
        self._check_paths()
        for path, method in methods.items():
            if path in low_rank:
                self._sort_low_rank(path, shapes[path])
            elif self.family is not None and type(method) is self.family.method:
                self._sort_own(path, shapes[path], method)
            elif type(method) is FullFineTuning:
                self.full.append(path)
            elif isinstance(method, TokenRows) and self.family is None:
                self.rows.append(path)
            else:
                self._no(f"PEFT's {self._type} files have no place for {method.name!r}, as at {path!r}")
        if self.family is None:
            if not low_rank:
                self._no("PEFT's LoRA files need at least one LoRA target")
            self._check_settings(low_rank)
        else:
            for path in low_rank:
                self._no(
                    f"PEFT has one type of adapter in a file, and {path!r} has another than {self._type}"
                )
            self.reasons += self.family.why_not(self.own, {path: shapes[path] for path in self.own})
        for module in self.bare:
            self._order(module)
        self.naming = Naming(
            wrappers={
                **{m: len(names) for m, names in self.bare.items()},
                **dict.fromkeys(self.attentions, 1),
            }
        )
        for path in self.rows:
            if self.naming.inside_wrapper(path):
                self._no(f"PEFT cannot train token rows of {path!r}, which lies in a module that it wraps")
            self._check_ending(path, self.rows, self.outline.modules if self.outline else ())
        bare = [f"{module}.{name}" for module, names in self.bare.items() for name in names]
        for path in bare:
            self._check_ending(
                "." + path, ["." + p for p in bare], self.outline.sizes if self.outline else ()
            )

    @property
    def _type(self) -> str:
        return "LoRA" if self.family is None else self.family.peft_type

    def _sort_own(self, path: str, shape: Shape, method: Method) -> None:
        """A target of a type of its own: a plain layer of a kind that PEFT has the type for."""
        assert self.family is not None
        if shape.kind not in self.family.kinds or shape.batch:
            groups = f" in {shape.batch[0]} groups" if shape.batch else ""
            self._no(f"PEFT has no {self._type} for a target of kind {shape.kind!r}{groups}, as {path!r} is")
        elif (
            self.outline is not None and path in self.outline.transposed_layers and not self.family.transposes
        ):
            self._no(f"PEFT has no {self._type} for transformers' Conv1D, as {path!r} is")
        self.layers[path] = CONV if shape.kind == "conv" else LINEAR
        self.own[path] = method

    def _check_paths(self) -> None:
        for path in self.state.spec.methods:
            parts = path.split(".")
            if "" in parts:
                self._no(f"PEFT cannot adapt the model itself, only modules in it (target {path!r})")
            if split_part(path)[1]:
                self._no(f"PEFT adapts whole layers and parameters, and {path!r} is a slice of one")
            if not path.isprintable():
                self._no(f"{path!r} has characters that PEFT's patterns cannot match")
            odd = [part for part in parts if part in RESERVED or part.startswith("lora_")]
            if odd:
                self._no(
                    f"{path!r} has {odd[0]!r} in its path, a word with a meaning of its own in PEFT's keys"
                )

    def _check_ending(self, path: str, ours: Collection[str], held: Collection[str]) -> None:
        """PEFT takes these names as endings: no other name of the model may end so."""
        other = next(
            (name for name in held if name.endswith(path) and name != path and name not in ours), None
        )
        if other is not None and other != path.removeprefix("."):
            self._no(f"PEFT names {path.removeprefix('.')!r} by its ending, which {other!r} shares")

    def _check_settings(self, low_rank: Mapping[str, LoRA]) -> None:
        """One LoRA configuration holds for all targets of a file, but for rank and alpha."""
        methods = self.state.spec.methods
        for what in ("scaling", "dropout", "init", "bias"):
            values = {getattr(lora, what) for lora in low_rank.values()}
            if len(values) > 1:
                self._no(
                    f"PEFT has one {what} for all targets of an adapter; this one has "
                    f"{sorted(values, key=str)}"
                )
        if len({isinstance(methods[path], DoRA) for path in low_rank}) > 1:
            self._no("PEFT has either LoRA or DoRA for all targets of an adapter; this one has both")
        if any(lora.rank_pattern or lora.alpha_pattern for lora in low_rank.values()):
            self._no("its patterns are not resolved: use method.for_path(path) for each target")

    def _sort_low_rank(self, path: str, shape: Shape) -> None:
        methods = self.state.spec.methods
        method, lora = methods[path], lora_of(methods[path])
        assert lora is not None
        module, _, name = path.rpartition(".")
        if shape.kind == "linear":
            if name == "out_proj" and f"{module}.in_proj_weight" in methods:
                self.layers[path] = ATTENTION_OUT
            elif name == "out_proj" and self._in_attention(module):
                self._no(
                    "PEFT adapts in_proj and out_proj of an nn.MultiheadAttention together or not at all, "
                    f"and here {path!r} alone "
                    "or with separate weights for query, key and value"
                )
            else:
                self.layers[path] = LINEAR
        elif shape.kind == "conv":
            self.layers[path] = CONV
            if shape.batch:
                self._no(
                    f"{path!r} is a convolution in {shape.batch[0]} groups: PEFT's A mixes all input "
                    "channels there, which is "
                    "another set of functions"
                )
        elif shape.kind == "embedding":
            self.layers[path] = EMBEDDING
            if lora.bias:
                self._no(f"PEFT has no bias for LoRA on an embedding, as {path!r} is")
        else:
            if lora.dropout or lora.bias or isinstance(method, DoRA):
                self._no(f"PEFT has no dropout, bias or DoRA for a bare weight, as {path!r} is")
            partner = methods.get(f"{module}.out_proj")
            if name == "in_proj_weight" and partner is not None and lora_of(partner) is not None:
                self.layers[path] = ATTENTION_IN
                self.attentions.append(module)
                other = lora_of(partner)
                assert other is not None
                if (other.r, other.alpha) != (lora.r, lora.alpha):
                    self._no(f"PEFT has one rank and alpha for the in_proj and out_proj of {module!r}")
            elif len(shape.stored) not in (2, 3):
                self._no(
                    f"PEFT adapts bare weights of two or three dimensions; {path!r} has {len(shape.stored)}"
                )
            else:
                self.bare.setdefault(module, []).append(name)
                if not module:
                    self._no(f"PEFT cannot adapt a parameter of the model itself, as {path!r} is")
                elif module in methods:
                    self._no(f"PEFT cannot adapt {module!r} and its parameter {name!r} both")

    def _in_attention(self, module: str) -> bool:
        names = ("in_proj_weight", *_SEPARATE)
        held = self.state.spec.methods if self.outline is None else self.outline.sizes
        return any(f"{module}.{name}" in held for name in names)

    def _order(self, module: str) -> None:
        """PEFT numbers the adapted parameters of a module in the order in which the module holds them."""
        names = self.bare[module]
        if self.outline is not None and module in self.outline.owned:
            self.bare[module] = [n for n in self.outline.owned[module] if n in names]
            return
        ordered = convention(names)
        if ordered is None:
            self._no(
                f"PEFT's files number the adapted parameters of {module!r} in the order in which the module "
                "holds them, which is not "
                "known here: save it from the model (lorakit.save(model, ...))"
            )
        else:
            self.bare[module] = ordered

    # ---- whole parameters
    def place_of(self, path: str) -> str:
        """Where PEFT keeps a whole parameter.

        ``"table"`` and ``"bias inside"`` under the layer that it wraps, ``"aside"`` where it is with no word in the
        configuration, ``"bias"`` where it is with ``bias="all"``, ``"saved"`` with ``modules_to_save``.
        """
        owner, _, leaf = path.rpartition(".")
        wrapped = owner in self.layers or owner in self.rows
        if path in self.hints.get("whole_tables", ()) and not wrapped:
            return "aside"
        if wrapped and leaf in ("weight", "bias"):
            return "bias inside" if leaf == "bias" and owner in self.layers else "table"
        if leaf == "bias" and f"{owner}.weight" not in self.full and not self._listed(path):
            return "bias"
        return "saved"

    @property
    def bias(self) -> str:
        """PEFT's ``bias`` setting."""
        places = {self.place_of(path) for path in self.full}
        inside = "lora_only" if self.family is None else self.family.bias_word or "lora_only"
        return "all" if "bias" in places else inside if "bias inside" in places else "none"

    @property
    def saved(self) -> list[str]:
        """The modules that ``modules_to_save`` must name."""
        owners = [path.rpartition(".")[0] for path in self.full if self.place_of(path) == "saved"]
        return list(dict.fromkeys(owners))

    def _check_full(self) -> None:
        if self.bias != "none" and self.family is not None and self.family.bias_word is None:
            self._no(f"PEFT trains no biases beside {self._type}, other than in whole modules")
        for path in self.full:
            if self.place_of(path) == "saved" and (reason := self._why_not_saved(path)) is not None:
                self._no(reason)

    def _listed(self, path: str) -> bool:
        """Whether the ``modules_to_save`` that the adapter was read with cover a parameter."""
        parts = path.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts))]
        return any(
            module.endswith(entry) for module in modules for entry in self.hints.get("modules_to_save") or ()
        )

    def _why_not_saved(self, path: str) -> str | None:
        """Why a parameter cannot go with ``modules_to_save``, which PEFT saves and wants whole."""
        owner, _, leaf = path.rpartition(".")
        wrapped = {*self.layers, *self.rows, *self.attentions, *self.bare}
        if not owner:
            return f"PEFT cannot save {path!r}, a parameter of the model itself"
        if self.naming.inside_wrapper(owner) or any(w == owner or w.startswith(owner + ".") for w in wrapped):
            return f"PEFT cannot both adapt {owner!r} and save its {leaf!r} whole"
        if self.outline is not None:
            shared = [m for m in self.outline.modules if m.endswith(owner) and m != owner]
            if others := [p for m in shared for p in self.outline.under(m) if p not in self.full]:
                return f"PEFT names the module {owner!r} by its ending, which that of {others[0]!r} shares"
        if self._listed(path):
            return None
        if self.outline is not None:
            lacking = [p for p in self.outline.under(owner) if p not in self.full]
            if lacking:
                return f"PEFT saves whole modules, and the adapter has {path!r} without {lacking[0]!r}"
        elif leaf not in ("weight", "bias"):
            return (
                f"PEFT saves whole modules, and {path!r} may not be all of its module: save it from the model"
            )
        return None

    def _no(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def lora_of(method: Method) -> LoRA | None:
    """The LoRA of a plain LoRA or of a DoRA over it."""
    inner = method.inner if type(method) is DoRA else method
    return inner if type(inner) is LoRA else None
