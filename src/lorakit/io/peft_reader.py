"""From a PEFT LoRA configuration and its tensors to an `AdapterState`: strict, and without a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.io.embedded import Embedded
from lorakit.io.outline import Outline
from lorakit.io.peft_config import SELECTION, check_config, kept_settings, settings_error
from lorakit.io.peft_keys import Found, Keys, sort_keys
from lorakit.io.peft_rules import CONV, EMBEDDING, LINEAR, PARAMETER, transposed_pair
from lorakit.io.peft_sites import Patterns, Site, find_sites
from lorakit.io.peft_whole import read_token_rows, read_whole_parameters
from lorakit.io.strictness import Complaints, floating
from lorakit.methods import DoRA, LoRA


def read_peft(
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    embedded: Embedded | None = None,
    outline: Outline | None = None,
    ignore: Collection[str] = (),
    start_known: bool = False,
) -> AdapterState:
    """The adapter that a configuration and tensors of PEFT's describe.

    With ``start_known`` the factors may be such that PEFT took their start from the base, see `lorakit.io.peft_start`.

    Raises:
        AdapterFileError: A setting cannot be honoured, or a tensor is missing, unexpected or of another size.
    """
    config = check_config(raw, ignore, start_known=start_known)
    if not tensors:
        raise AdapterFileError("The adapter's file holds no tensors.")
    keys = sort_keys(tensors.items())
    try:
        reader = _Reader(config, keys)
        for site in find_sites(keys.factors, config, embedded, outline):
            reader.low_rank(site)
        for path, method, shape, found in read_token_rows(keys, config, embedded, outline):
            reader.whole(path, method, shape, "rows", found)
        whole = read_whole_parameters(keys, config)
    except ConfigError as error:
        raise settings_error(error) from error
    for path, method, shape, found in whole.targets:
        reader.whole(path, method, shape, "value", found)
    reader.unexpected += whole.unexpected
    reader.missing += whole.missing
    reader.check()
    spec = AdapterSpec(
        reader.methods, reader.shapes, config["base_model_name_or_path"], _info(config, whole.tables, reader)
    )
    return AdapterState(spec, reader.tensors)


def asks_the_model(raw: Mapping[str, Any]) -> bool:
    """Whether `read_peft` would look at an outline: for the order of bare parameters, for the size of a table."""
    return bool(raw.get("target_parameters") or raw.get("trainable_token_indices"))


class _Reader(Complaints):
    """Collects targets, and everything that is wrong, so that one error can tell it all."""

    def __init__(self, config: Mapping[str, Any], keys: Keys) -> None:
        super().__init__([found.key for group in keys.factors.values() for found in group.values()])
        self.config = config
        self.keys = keys
        self.ranks = Patterns(config["rank_pattern"], config["r"])
        self.alphas = Patterns(config["alpha_pattern"], config["lora_alpha"])
        self.methods: dict[str, Method] = {}
        self.shapes: dict[str, Shape] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.transposed: list[str] = []
        self._made: dict[tuple[Any, ...], Method] = {}

    def low_rank(self, site: Site) -> None:
        """LoRA, or DoRA over it, at one site."""
        rule, group = site.rule, site.group
        other = {"lora_A": "embedding_A", "lora_B": "embedding_B"} if rule is EMBEDDING else {}
        named = {name: other.get(name, name) for name in rule.keys}
        have = {name: group[key] for name, key in named.items() if key in group}
        self.unexpected += [found.key for key, found in group.items() if key not in named.values()]
        r, alpha = self.ranks[site.settled_at], self.alphas[site.settled_at]
        bias = self.config["lora_bias"] and rule in (LINEAR, CONV)
        method = self._method(site, r, alpha, bias)
        if "lora_A" not in have or "lora_B" not in have:
            self.missing += [f"{site.start}.{rule.keys[n]}" for n in ("lora_A", "lora_B") if n not in have]
            return
        A, B = have["lora_A"].tensor, have["lora_B"].tensor
        if (
            min(A.dim(), B.dim()) < 2
            or not A.numel()
            or not B.numel()
            or (rule is not CONV and max(A.dim(), B.dim()) > 2)
        ):
            self.misshaped.append(
                f"{have['lora_A'].key} {tuple(A.shape)} and {have['lora_B'].key} {tuple(B.shape)} are no "
                "pair of factors "
                "(shards of a distributed run that were not gathered?)"
            )
            return
        if rule is CONV:
            self._refuse_grouped(have, A, B)
        shape = self._parameter_shape(site, A, B, r) if rule is PARAMETER else rule.shape(A, B)
        if shape is None:
            return
        in_file = _swap(shape) if site.transposed else shape
        sizes = method.shapes(in_file)
        remark = f" (by the configuration r={r} there)"
        if not self.fits(site.start, rule.sizes(sizes, in_file), have, remark, rule.keys):
            return
        values = {
            name: rule.from_file(name, floating(have[name].key, have[name].tensor), size)
            for name, size in sizes.items()
        }
        if site.transposed:
            values["lora_A"], values["lora_B"] = transposed_pair(values["lora_A"], values["lora_B"])
            self.transposed.append(site.path)
        self._put(site.path, method, shape, values, have["lora_A"].key)

    def whole(self, path: str, method: Method, shape: Shape, name: str, found: Found) -> None:
        """A target with one tensor that stands in for what the model has."""
        want = method.shapes(shape)[name]
        if found.tensor.numel() != math.prod(want) or (name == "rows" and tuple(found.tensor.shape) != want):
            self.misshaped.append(f"{found.key} is {tuple(found.tensor.shape)}, not {want}")
            return
        self._put(path, method, shape, {name: floating(found.key, found.tensor).reshape(want)}, found.key)

    def _put(self, path: str, method: Method, shape: Shape, tensors: dict[str, Tensor], key: str) -> None:
        if path in self.methods:
            raise AdapterFileError(
                f"The file changes {path!r} in two ways ({self.methods[path].name} and {method.name}, "
                f"{key!r})."
            )
        self.methods[path], self.shapes[path], self.tensors[path] = method, shape, tensors

    def _method(self, site: Site, r: Any, alpha: Any, bias: bool) -> Method:
        dora = self.config["use_dora"]
        if dora and "magnitude" not in site.rule.keys:
            raise AdapterFileError(
                f"use_dora is set, but PEFT has no DoRA for a {site.rule.name}, as {site.path!r} is."
            )
        made = self._made.get((r, alpha, bias))
        if made is None:
            lora = LoRA(
                r=r,
                alpha=alpha,
                scaling="rslora" if self.config["use_rslora"] else "lora",
                dropout=self.config["lora_dropout"],
                init="gaussian" if self.config["init_lora_weights"] == "gaussian" else "kaiming",
                bias=bias,
            )
            made = self._made[r, alpha, bias] = DoRA(lora) if dora else lora
        return made

    def _parameter_shape(self, site: Site, A: Tensor, B: Tensor, r: int) -> Shape | None:
        """As the module stores it; from the model's outline where there is one, else from the factors."""
        if site.stored is not None:
            size = site.stored
            return Shape("parameter", out=size[-2], in_=size[-1], batch=size[:-2], stored=size)
        experts, rest = divmod(A.shape[0], r)
        if rest or A.shape[0] != B.shape[1]:
            self.misshaped.append(
                f"{site.start}.lora_A.weight {tuple(A.shape)} and {site.start}.lora_B.weight "
                f"{tuple(B.shape)} are no stack of factors "
                f"of rank {r}"
            )
            return None
        out, in_ = B.shape[0], A.shape[1]
        batch = (experts,) if experts > 1 else ()
        return Shape("parameter", out=out, in_=in_, batch=batch, stored=(*batch, out, in_))

    def _refuse_grouped(self, have: Mapping[str, Found], A: Tensor, B: Tensor) -> None:
        if A.shape[0] != B.shape[1] and B.shape[1] and A.shape[0] % B.shape[1] == 0:
            raise AdapterFileError(
                f"{have['lora_B'].key} belongs to a convolution in {A.shape[0] // B.shape[1]} groups. "
                "PEFT's A mixes all input "
                "channels there and its B does not, so the change is no convolution with those groups, and "
                "cannot be merged "
                "into one. lorakit's LoRA keeps to the groups: train it anew."
            )


def _swap(shape: Shape) -> Shape:
    """The transposed matrices, as PEFT's factors of transposed experts see them."""
    return Shape(shape.kind, out=shape.in_, in_=shape.out, batch=shape.batch)


def _info(config: Mapping[str, Any], tables: list[str], reader: _Reader) -> dict[str, Any]:
    """What is not in the methods and would be lost: kept settings, and how the targets were named."""
    peft = kept_settings(config)
    if config["init_lora_weights"] not in (True, "gaussian") or config["init_lora_weights"] is False:
        peft["init_lora_weights"] = config["init_lora_weights"]
    for key in (*SELECTION, "target_parameters", "modules_to_save", "trainable_token_indices"):
        if config[key] not in (None, []):
            peft[key] = config[key]
    if tables:
        peft["whole_tables"] = tables
    if reader.transposed:
        peft["transposed"] = reader.transposed
    return {"peft": peft} if peft else {}
