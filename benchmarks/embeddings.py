"""What do a LoRA and new token rows cost at an embedding table of 49152 x 576?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.forward import plain
from benchmarks.harness import BASE, LORAKIT, PEFT, Benchmark, Side, start
from benchmarks.subjects import Holder, both, check_changes, check_equal, folder, with_lorakit, with_peft

VOCABULARY, WIDTH, TOKENS = 49152, 576, 128
IDS = [5, 77, 1234, 40000]


def step(layer: nn.Module, ids: Tensor) -> Side:
    """Forward and backward to the adapter."""
    wanted = [p for p in layer.parameters() if p.requires_grad]
    direction = torch.ones(*ids.shape, WIDTH)

    def run() -> None:
        torch.autograd.grad(layer(ids), wanted, direction)

    return Side(run)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("embeddings", __doc__ or "", argv)
    torch.manual_seed(0)
    # PEFT's token rows come with a LoRA, which is put on a layer beside the embedding that never runs.
    model = Holder(embed=nn.Embedding(VOCABULARY, WIDTH), other=nn.Linear(1, 1)).requires_grad_(False)
    ids = torch.randint(VOCABULARY, (1, TOKENS))
    ids[0, : len(IDS)] = torch.tensor(IDS)

    ours, theirs = both(model, ["embed"], training=True, r=8, lora_alpha=16)
    compare(bench, "embedding LoRA", model.embed, ours.embed, theirs.base_model.model.embed, ids)

    ours, theirs = with_token_rows(model)
    compare(bench, "embedding with 4 token rows", model.embed, ours.embed, theirs.base_model.model.embed, ids)
    bench.finish()
    return bench


def with_token_rows(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both sides with the same new values for a few tokens."""
    theirs = with_peft(model, ["other"], r=1, trainable_token_indices={"embed": IDS})
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                p.normal_()
    with folder() as directory:
        theirs.save_pretrained(directory)
        ours = with_lorakit(model, directory, trainable=True)
    return ours, theirs


def compare(
    bench: Benchmark, what: str, base: nn.Module, ours: nn.Module, theirs: nn.Module, ids: Tensor
) -> None:
    with torch.no_grad():
        check_equal(ours(ids), theirs(ids), what)
        check_changes(ours(ids), base(ids), what)
    layers = {BASE: base, LORAKIT: ours, PEFT: theirs}
    bench.add(
        f"{what}, forward, T={TOKENS}",
        bench.measure({n: plain(m, ids) for n, m in layers.items()}, rounds=30),
    )
    steps = {n: step(m, ids) for n, m in layers.items() if n != BASE}
    bench.add(f"{what}, step, T={TOKENS}", bench.measure(steps, rounds=30))


if __name__ == "__main__":
    main()
