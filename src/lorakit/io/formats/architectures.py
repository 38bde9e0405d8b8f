"""The layers of the diffusion models that kohya's and cloneofsimo's files are for, from a few numbers each.

The paths are diffusers'; for Flux's transformer they are those of its first implementation, which kohya keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

from lorakit.io.formats.names import PREFIXES, Names, Size

Layer = tuple[str, Size]
_EMBEDDED_TIME = 1280


@cache
def sd15() -> Names:
    """Stable Diffusion 1.x."""
    return _stable_diffusion("Stable Diffusion 1.5", encoder=(12, 768, 3072), square_projections=True)


@cache
def sd2() -> Names:
    """Stable Diffusion 2.x."""
    return _stable_diffusion("Stable Diffusion 2", encoder=(23, 1024, 4096), square_projections=False)


def _stable_diffusion(title: str, encoder: tuple[int, int, int], *, square_projections: bool) -> Names:
    unet = Unet((320, 640, 1280, 1280), (1, 1, 1, 0), 1, encoder[1], square_projections)
    sizes = {**_under("unet", unet.layers()), **_under("text_encoder", clip(*encoder))}
    attention = ("k_proj", "v_proj", "q_proj", "out_proj")
    numbered = {
        "unet": (
            frozenset({"CrossAttention", "Attention", "GEGLU"}),
            tuple(f"unet.{path}" for path in unet.attention_order()),
        ),
        "text_encoder": (
            frozenset({"CLIPAttention"}),
            tuple(
                f"text_encoder.text_model.encoder.layers.{n}.self_attn.{leaf}"
                for n in range(encoder[0])
                for leaf in attention
            ),
        ),
    }
    return Names(title, sizes, numbered=numbered)


@cache
def sdxl() -> Names:
    """Stable Diffusion XL, whose UNet kohya calls by the names of its first implementation."""
    unet = Unet((320, 640, 1280), (0, 2, 10), 10, 2048, False, pooled=2816)
    sizes = {
        **_under("unet", unet.layers()),
        **_under("text_encoder", clip(12, 768, 3072)),
        **_under("text_encoder_2", clip(32, 1280, 5120)),
    }
    other = {f"unet.{path}": first for path in dict(unet.layers()) if (first := unet.first_name(path))}
    prefixes = {**PREFIXES, "text_encoder": ("lora_te1",)}
    return Names("Stable Diffusion XL", sizes, prefixes, other)


@cache
def flux() -> Names:
    """Flux.1: CLIP-L and T5-XXL beside a transformer with fused projections."""
    sizes = {
        **_under("transformer", _flux_transformer()),
        **_under("text_encoder", clip(12, 768, 3072)),
        **_under("text_encoder_2", t5(24, 4096, 10240)),
    }
    prefixes = {**PREFIXES, "text_encoder": ("lora_te1",), "text_encoder_2": ("lora_te3", "lora_te2")}
    return Names("Flux.1", sizes, prefixes)


ARCHITECTURES: Mapping[str, Callable[[], Names]] = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl, "flux": flux}


def _under(part: str, layers: Iterator[Layer]) -> dict[str, Size]:
    return {f"{part}.{path}": size for path, size in layers}


class Unet:
    """diffusers' ``UNet2DConditionModel``: its linear layers and convolutions.

    Args:
        widths: Channels of each block on the way down.
        depths: Transformer blocks in each of its attentions; 0 for a block without attention.
        middle: The same in the middle.
        cross: Width of the text's vectors.
        square_projections: Whether the projections around an attention are 1 x 1 convolutions.
        pooled: Width of what is added to the embedded time, if anything is.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        middle: int,
        cross: int,
        square_projections: bool,
        pooled: int = 0,
    ) -> None:
        self.widths, self.depths, self.middle, self.cross = widths, depths, middle, cross
        self.square_projections, self.pooled = square_projections, pooled

    def layers(self) -> Iterator[Layer]:
        """Path and size of every weight that can be adapted."""
        first, last = self.widths[0], self.widths[-1]
        yield "conv_in", (first, 4, 3, 3)
        yield "time_embedding.linear_1", (_EMBEDDED_TIME, first)
        yield "time_embedding.linear_2", (_EMBEDDED_TIME, _EMBEDDED_TIME)
        if self.pooled:
            yield "add_embedding.linear_1", (_EMBEDDED_TIME, self.pooled)
            yield "add_embedding.linear_2", (_EMBEDDED_TIME, _EMBEDDED_TIME)
        before = first
        for b, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for j in range(2):
                yield from self._attention(f"down_blocks.{b}.attentions.{j}", width, depth)
                yield from self._resnet(f"down_blocks.{b}.resnets.{j}", width, before)
                before = width
            if b < len(self.widths) - 1:
                yield f"down_blocks.{b}.downsamplers.0.conv", (width, width, 3, 3)
        yield from self._attention("mid_block.attentions.0", last, self.middle)
        for j in range(2):
            yield from self._resnet(f"mid_block.resnets.{j}", last, last)
        up, depths = list(reversed(self.widths)), list(reversed(self.depths))
        for b, (width, depth) in enumerate(zip(up, depths, strict=True)):
            deeper, wider = up[max(b - 1, 0)], up[min(b + 1, len(up) - 1)]
            for j in range(3):
                yield from self._attention(f"up_blocks.{b}.attentions.{j}", width, depth)
                joined = (deeper if j == 0 else width) + (wider if j == 2 else width)
                yield from self._resnet(f"up_blocks.{b}.resnets.{j}", width, joined)
            if b < len(up) - 1:
                yield f"up_blocks.{b}.upsamplers.0.conv", (width, width, 3, 3)
        yield "conv_out", (4, first, 3, 3)

    def attention_order(self) -> Iterator[str]:
        """The layers as cloneofsimo numbers them: block by block with the middle at the end.

        The class set the middle aside before it built the way up and filled it in afterwards; in a transformer block
        the feed-forward network's first projection stands between the two attentions.
        """
        blocks = [p.removesuffix(".attn1.to_q") for p, _ in self.layers() if p.endswith(".attn1.to_q")]
        blocks.sort(key=lambda path: path.startswith("mid_block"))
        for block in blocks:
            for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{block}.attn1.{leaf}"
            yield f"{block}.ff.net.0.proj"
            for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{block}.attn2.{leaf}"

    def _attention(self, path: str, width: int, depth: int) -> Iterator[Layer]:
        if not depth:
            return
        square = (width, width, 1, 1) if self.square_projections else (width, width)
        yield f"{path}.proj_in", square
        for n in range(depth):
            block = f"{path}.transformer_blocks.{n}"
            for which, seen in (("attn1", width), ("attn2", self.cross)):
                yield f"{block}.{which}.to_q", (width, width)
                yield f"{block}.{which}.to_k", (width, seen)
                yield f"{block}.{which}.to_v", (width, seen)
                yield f"{block}.{which}.to_out.0", (width, width)
            yield f"{block}.ff.net.0.proj", (8 * width, width)
            yield f"{block}.ff.net.2", (width, 4 * width)
        yield f"{path}.proj_out", square

    def _resnet(self, path: str, width: int, seen: int) -> Iterator[Layer]:
        yield f"{path}.conv1", (width, seen, 3, 3)
        yield f"{path}.time_emb_proj", (width, _EMBEDDED_TIME)
        yield f"{path}.conv2", (width, width, 3, 3)
        if seen != width:
            yield f"{path}.conv_shortcut", (width, seen, 1, 1)

    def first_name(self, path: str) -> str:
        """What the first implementation of the model calls a layer."""
        if path in _OUTER:
            return _OUTER[path]
        place, rest = self._place(path)
        for ours, theirs in _RESNET.items():
            rest = rest.replace(ours, theirs) if rest == ours else rest
        return f"{place}.{rest}" if rest else place

    def _place(self, path: str) -> tuple[str, str]:
        words = path.split(".")
        if words[0] == "mid_block":
            at = 1 if words[1] == "attentions" else 2 * int(words[2])
            return f"middle_block.{at}", ".".join(words[3:])
        block, kind, j, rest = int(words[1]), words[2], int(words[3]), ".".join(words[4:])
        if words[0] == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{3 * block + 3}.0.op", ""
            return f"input_blocks.{3 * block + j + 1}.{int(kind == 'attentions')}", rest
        if kind == "upsamplers":
            attends = self.depths[len(self.depths) - 1 - block] > 0
            return f"output_blocks.{3 * block + 2}.{1 + int(attends)}.conv", ""
        return f"output_blocks.{3 * block + j}.{int(kind == 'attentions')}", rest


_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def clip(count: int, width: int, inner: int) -> Iterator[Layer]:
    """Transformers' ``CLIPTextModel``."""
    for n in range(count):
        layer = f"text_model.encoder.layers.{n}"
        for leaf in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"{layer}.self_attn.{leaf}", (width, width)
        yield f"{layer}.mlp.fc1", (inner, width)
        yield f"{layer}.mlp.fc2", (width, inner)


def t5(count: int, width: int, inner: int) -> Iterator[Layer]:
    """Transformers' ``T5EncoderModel`` with gated feed-forward networks."""
    for n in range(count):
        block = f"encoder.block.{n}.layer"
        for leaf in ("q", "k", "v", "o"):
            yield f"{block}.0.SelfAttention.{leaf}", (width, width)
        yield f"{block}.1.DenseReluDense.wi_0", (inner, width)
        yield f"{block}.1.DenseReluDense.wi_1", (inner, width)
        yield f"{block}.1.DenseReluDense.wo", (width, inner)


def _flux_transformer(width: int = 3072) -> Iterator[Layer]:
    for n in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{n}.{side}"
            yield f"{block}_mod.lin", (6 * width, width)
            yield f"{block}_attn.qkv", (3 * width, width)
            yield f"{block}_attn.proj", (width, width)
            yield f"{block}_mlp.0", (4 * width, width)
            yield f"{block}_mlp.2", (width, 4 * width)
    for n in range(38):
        yield f"single_blocks.{n}.modulation.lin", (3 * width, width)
        yield f"single_blocks.{n}.linear1", (7 * width, width)
        yield f"single_blocks.{n}.linear2", (width, 5 * width)
    yield "img_in", (width, 64)
    yield "txt_in", (width, 4096)
    for what, seen in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        yield f"{what}.in_layer", (width, seen)
        yield f"{what}.out_layer", (width, width)
    yield "final_layer.adaLN_modulation.1", (2 * width, width)
    yield "final_layer.linear", (64, width)
