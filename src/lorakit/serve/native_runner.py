"""Runs steps of decoders of the Llama kind in one compiled call: the fast way on a CPU, where a compiler is at hand.

The weights are cut into blocks once, and the model's own copies are let go of. Adapters become patches that are
applied inside the same tiles as the base product, at their true ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.errors import KernelError, ModelError
from lorakit.ops.native.decoder import Kernel, NativeDecoder, Rows, kernel
from lorakit.serve.kv import BLOCK, KVArena
from lorakit.serve.native_model import Storage, read_model, why_not
from lorakit.serve.native_patches import Prepared, add_to_lookup, prepare_patches, segments_of_last
from lorakit.serve.runner import Piece, Segment, StepBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.serve.versions import AdapterVersion

_PROBE = 24
_TOLERANCE = 1e-3  # of the largest logit; float32 in another order differs by about 1e-6


class NativeRunner:
    """The compiled step behind the engine's contract.

    Attributes:
        arena: The keys and values; keys are kept in blocks.
        vocabulary: Width of the logits.
        context: The most tokens of one request.
        storage: How weights are kept.
        threads: How many work on a step.
        off: How far the logits of a probe were from the model's own, as a share of the largest.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_tokens: int = 16_384,
        context: int | None = None,
        storage: Storage = "fp32",
        threads: int | None = None,
    ) -> None:
        """Cut a model into blocks, and compare one step with what the model itself computes.

        Args:
            model: A causal language model; its weights are let go of.
            kv_tokens: Room for keys and values, in tokens, of all running requests together.
            context: The most tokens of one request; by default what the model allows.
            storage: ``"fp32"``; ``"int8"`` rounds weights once and what they are multiplied with at every product.
            threads: By default as many as torch uses.

        Raises:
            KernelError: The compiled step is not there, and why.
            ModelError: It cannot run this model, and why; the model is as it was.
        """
        compiled = kernel()
        if not isinstance(compiled, Kernel):
            raise KernelError(f"The compiled engine is not there: {compiled}.")
        reason = why_not(model, compiled)
        if reason is not None:
            raise ModelError(f"The compiled engine does not run this model: {reason}.")
        self.storage, self.threads = storage, threads or torch.get_num_threads()
        allowed = int(model.config.max_position_embeddings)
        self.context = min(kv_tokens // BLOCK * BLOCK, allowed if context is None else min(context, allowed))
        self._native = read_model(model, compiled, storage)
        sizes = self._native.sizes
        self.vocabulary = sizes.vocabulary
        self.arena = KVArena(len(self._native.layers), sizes.kv_heads, sizes.head_dim, kv_tokens)
        self._decoder = NativeDecoder(
            compiled,
            sizes,
            self._native.layers,
            self._native.norm,
            self._native.head,
            self.arena.keys,
            self.arena.values,
        )
        self._embedding = model.get_input_embeddings().weight.detach().float()
        scale = getattr(model.model.embed_tokens, "embed_scale", None)
        self._embedding_scale = self._scale_of(model) if scale is None else float(scale)
        self._rotary = model.model.rotary_emb
        self._prepared: dict[str, Prepared] = {}
        self.off = self._compare(model)
        if storage == "fp32" and not self.off <= _TOLERANCE:
            raise ModelError(
                f"The compiled engine does not run this {type(model).__name__}: its logits are off by "
                f"{self.off:.1e} of the largest, so the model does something that is not known here."
            )
        for layer in model.model.layers:
            layer.to("meta")

    @staticmethod
    def _scale_of(model: PreTrainedModel) -> float:
        return float(model.config.hidden_size) ** 0.5 if model.config.model_type == "gemma" else 1.0

    @torch.inference_mode()
    def _compare(self, model: PreTrainedModel) -> float:
        """How far the last logits of two texts, one of them in two pieces, are from the model's own."""
        generator = torch.Generator().manual_seed(0)
        n = min(_PROBE, self.context // 2)
        texts = [torch.randint(self.vocabulary, (k,), generator=generator) for k in (n, n // 2)]
        own = [model(input_ids=text[None], use_cache=False).logits[0, -1].float() for text in texts]
        slabs = [slab for slab in (self.arena.reserve(n), self.arena.reserve(n // 2)) if slab is not None]
        cut, total = n // 3, n - n // 3 + n // 2
        place = torch.arange(n)
        one = [Segment(0, cut, None)], [Piece(0, cut, 0, slabs[0])]
        self.step(StepBatch(texts[0][:cut], place[:cut], *one, place[:1]))
        two = Piece(0, n - cut, cut, slabs[0]), Piece(n - cut, total, 0, slabs[1])
        tokens, positions = torch.cat([texts[0][cut:], texts[1]]), torch.cat([place[cut:], place[: n // 2]])
        last = torch.tensor([n - cut - 1, total - 1])
        found = self.step(StepBatch(tokens, positions, [Segment(0, total, None)], two, last))
        for slab in slabs:
            slab.free()
        return max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
            for a, b in zip(found, own, strict=True)
        )

    # ---- adapters
    def prepare(self, version: AdapterVersion) -> None:
        """Turn an adapter into patches; does nothing when it is.

        Raises:
            AdapterIncompatibleError: It changes something that patches cannot say, or does not fit the base.
        """
        if version.digest not in self._prepared:
            self._prepared[version.digest] = prepare_patches(
                version.name, version.state, self._native, self._embedding
            )

    def forget(self, version: AdapterVersion) -> None:
        """Let go of its patches."""
        self._prepared.pop(version.digest, None)

    def prepared_bytes(self, version: AdapterVersion) -> int:
        """Bytes of its patches; 0 when there are none."""
        prepared = self._prepared.get(version.digest)
        return 0 if prepared is None else prepared.nbytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the base's weights in blocks."""
        return sum(weight.nbytes for weight in self._decoder.weights)

    # ---- a step
    @torch.inference_mode()
    def step(self, batch: StepBatch) -> Tensor:
        """Logits ``(n, vocabulary)`` in float32 of the rows ``batch.last``; writes keys and values of all rows."""
        x = torch.nn.functional.embedding(batch.tokens, self._embedding)
        cos, sin = self._rotary(x[None], batch.positions[None])
        changed = [
            (s.start, s.end, self._prepared[s.version.digest])
            for s in batch.segments
            if s.version is not None
        ]
        for start, end, prepared in changed:
            if prepared.lookup is not None:
                add_to_lookup(x[start:end], batch.tokens[start:end], prepared.lookup)
        if self._embedding_scale != 1:  # an adapter of the embedding is scaled with it
            x.mul_(self._embedding_scale)
        rows = [Rows(start, end, prepared.patches) for start, end, prepared in changed]
        at_head = [row for row in rows if row.patches is not None and row.patches.touches_last]
        spans = segments_of_last([(r.start, r.end) for r in at_head], batch.last) if at_head else []
        last_rows = [Rows(a, b, r.patches) for (a, b), r in zip(spans, at_head, strict=True) if b > a]
        pieces = torch.tensor([(p.start, p.end, p.past, p.slab.start) for p in batch.pieces])
        return self._decoder.run(
            x,
            cos[0].float().contiguous(),
            sin[0].float().contiguous(),
            pieces,
            batch.last.contiguous(),
            rows,
            last_rows,
            self.threads,
        )
