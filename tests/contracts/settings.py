"""One or more canonical settings of every registered method: what the contracts are checked with."""

from __future__ import annotations

from dataclasses import dataclass

import lorakit as lk
from lorakit.core import Method


@dataclass(frozen=True)
class Setting:
    """A method with its settings.

    Attributes:
        method: The method.
        parameter: The parameter of the layer to name, for methods that adapt parameters; by default the kind's own.
    """

    method: Method
    parameter: str | None = None


SETTINGS: dict[str, Setting] = {
    "lora": Setting(lk.LoRA(r=2, alpha=3)),
    "rslora": Setting(lk.LoRA(r=2, alpha=3, scaling="rslora", init="gaussian")),
    "lorabias": Setting(lk.LoRA(r=2, alpha=3, bias=True)),
    "dora": Setting(lk.DoRA(lk.LoRA(r=2, alpha=3))),
    "dora_rslora": Setting(lk.DoRA(lk.LoRA(r=1, alpha=2, scaling="rslora"))),
    "dora_full_gradient": Setting(lk.DoRA(lk.LoRA(r=2, alpha=3), detach_norm=False)),
    "dora_input": Setting(lk.InputDoRA(lk.LoRA(r=2, alpha=3))),
    "orthogonal": Setting(lk.LoRA(r=2, alpha=3, init="orthogonal")),
    "pissa": Setting(lk.LoRA(r=2, alpha=3, init="pissa")),
    "olora": Setting(lk.LoRA(r=2, alpha=3, init="olora")),
    "dora_pissa": Setting(lk.DoRA(lk.LoRA(r=2, alpha=2, scaling="rslora", init="pissa"))),
    "full": Setting(lk.FullFineTuning()),
    "bitfit": Setting(lk.BitFit(), parameter="bias"),
    "houlsby": Setting(lk.Houlsby(size=3)),
    "pfeiffer": Setting(lk.Pfeiffer(reduction=2, activation="silu")),
    "parallel": Setting(lk.ParallelAdapter(size=5, scale=2.5)),
    "token_rows": Setting(lk.TokenRows(ids=(4, 1))),
    "adalora": Setting(lk.AdaLoRA(init_r=2, target_r=1, alpha=3)),
    "dora_adalora": Setting(lk.DoRA(lk.AdaLoRA(init_r=2, target_r=1, alpha=3))),
    "dylora": Setting(lk.DyLoRA(r=2, alpha=3)),
    "lora_fa": Setting(lk.LoRAFA(r=2, alpha=3)),
    "ia3": Setting(lk.IA3()),
    "ia3_input": Setting(lk.IA3(side="input")),
    "vera": Setting(lk.VeRA(r=5)),
    "dora_vera": Setting(lk.DoRA(lk.VeRA(r=5, d_initial=0.5))),
    "loha": Setting(lk.LoHa(r=2, alpha=3)),
    "loha_tucker": Setting(lk.LoHa(r=2, alpha=3, init="lycoris", tucker=True)),
    "dora_loha": Setting(lk.DoRA(lk.LoHa(r=2, alpha=3))),
    "lokr": Setting(lk.LoKr(r=1, alpha=0.5)),
    "lokr_tucker": Setting(lk.LoKr(r=1, alpha=3, factor=2, init="lycoris", scaling="lycoris", tucker=True)),
    "dora_lokr": Setting(lk.DoRA(lk.LoKr(r=4, alpha=3, scaling="lycoris"))),
    "lora_c": Setting(lk.LoRAC(r=1, alpha=2)),
    "lora_c_view": Setting(lk.LoRAC(r=2, alpha=3, rank="r", reshape="view")),
    "prefix": Setting(lk.PrefixTuning(length=3)),
    "prefix_mlp": Setting(lk.PrefixTuning(length=2, mlp=5)),
    "prompt": Setting(lk.PromptTuning(length=3)),
    "prompt_pooled": Setting(lk.PromptTuning(length=2, init="uniform", pooled="prompt")),
}
