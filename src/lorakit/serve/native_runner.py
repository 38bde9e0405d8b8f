"""Runs steps of decoders of the Llama kind in one compiled call: the fast way on a CPU, where a compiler is at hand.

The weights are cut into blocks once, and the model's own copies are let go of. Adapters become patches that are
applied inside the same tiles as the base product, at their true ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.errors import KernelError, ModelError
from lorakit.ops.native.decoder import Kernel, NativeDecoder, Rows, kernel
from lorakit.serve.inspection import context_of, off_by, own_logits, packed_logits, probe_texts
from lorakit.serve.kv import BLOCK, KVArena
from lorakit.serve.native_model import Storage, read_model, why_not
from lorakit.serve.native_patches import Prepared, add_to_lookup, prepare_patches
from lorakit.serve.runner import StepBatch
from lorakit.serve.spans import Spans, of_rows, spans_of

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
        allowed = context_of(model.config)
        self.context = min(kv_tokens // BLOCK * BLOCK, allowed if context is None else min(context, allowed))
        self._native = read_model(model, compiled, storage)
        sizes = self._native.sizes
        self.vocabulary = sizes.vocabulary
        # What is compared first is two texts, each with a block of its own.
        room = max(kv_tokens, 2 * BLOCK) if kv_tokens >= BLOCK else kv_tokens
        self.arena = KVArena(len(self._native.layers), sizes.kv_heads, sizes.head_dim, room)
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
        self._embedding_scale = float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))
        self._rotary = model.model.rotary_emb
        self._prepared: dict[str, Prepared] = {}
        if storage == "fp32":
            self._check_against(model)
        for layer in model.model.layers:
            layer.to("meta")

    def _check_against(self, model: PreTrainedModel) -> None:
        texts = probe_texts(min(_PROBE, self.context), self.vocabulary)
        found = packed_logits(self.step, self.arena, texts)
        off = max(off_by(a, b) for a, b in zip(found, own_logits(model, texts), strict=True))
        if off > _TOLERANCE:
            raise ModelError(
                f"The compiled engine does not run this {type(model).__name__}: its logits are off by {off:.1e} of the "
                "largest, so the model does something that is not known here."
            )

    # ---- adapters
    def prepare(self, version: AdapterVersion) -> None:
        """Turn an adapter into patches; does nothing when it is.

        A version with the same content as one before takes that one's place, whose tensors can then be freed.

        Raises:
            AdapterIncompatibleError: It changes something that patches cannot say, or does not fit the base.
        """
        before = self._prepared.get(version.digest)
        if before is None or before.state is not version.state:
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
        spans = spans_of(batch.segments)
        changed = list(self._changed(spans))
        for start, end, prepared in changed:
            if prepared.lookup is not None:
                add_to_lookup(x[start:end], batch.tokens[start:end], prepared.lookup)
        if self._embedding_scale != 1:  # an adapter of the embedding is scaled with it
            x.mul_(self._embedding_scale)
        at_head = any(prepared.patches.touches_last for _, _, prepared in changed)
        last_changed = self._changed(of_rows(spans, batch.last)) if at_head else ()
        pieces = torch.tensor([(p.start, p.end, p.past, p.slab.start) for p in batch.pieces])
        return self._decoder.run(
            x,
            cos[0].float().contiguous(),
            sin[0].float().contiguous(),
            pieces,
            batch.last.contiguous(),
            [Rows(start, end, prepared.patches) for start, end, prepared in changed],
            [Rows(start, end, prepared.patches) for start, end, prepared in last_changed],
            self.threads,
        )

    def _changed(self, spans: Spans) -> Iterator[tuple[int, int, Prepared]]:
        """First row, end and patches of each adapter; the rows of the base are left out."""
        start = 0
        for end, digest in spans:
            if digest is not None:
                yield start, end, self._prepared[digest]
            start = end
