"""The compiled runner against the one that runs transformers' own layers: the same logits, whatever is in the batch."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lorakit as lk
from lorakit.core.adapter import AdapterState
from lorakit.errors import AdapterIncompatibleError, ConfigError, ModelError
from lorakit.ops.native.decoder import Kernel, PackedWeight, kernel
from lorakit.serve.native_runner import NativeRunner
from lorakit.serve.runner import Piece, Segment, StepBatch
from lorakit.serve.transformers_runner import TransformersRunner
from lorakit.serve.versions import AdapterVersion

pytestmark = pytest.mark.skipif(not isinstance(kernel(), Kernel), reason="the compiled step is not built")

SIZES = {
    "vocab_size": 515,  # not a multiple of a vector
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 32})),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all linear": (lk.LoRA(r=5, alpha=8), LINEAR),
    "q and v, rsLoRA": (lk.LoRA(r=9, alpha=4, scaling="rslora"), ["q_proj", "v_proj"]),
    "up only": (lk.LoRA(r=2), ["up_proj"]),
    "with bias": (lk.LoRA(r=3, bias=True), ["k_proj", "down_proj"]),
    "DoRA": (lk.DoRA(lk.LoRA(r=4)), LINEAR),
    "VeRA": (lk.VeRA(r=16), ["q_proj", "gate_proj"]),
    "AdaLoRA": (lk.AdaLoRA(init_r=4, target_r=2), ["o_proj", "down_proj"]),
    "embedding and head": (lk.LoRA(r=3), ["embed_tokens", "lm_head", "v_proj"]),
    "DoRA at both ends": (lk.DoRA(lk.LoRA(r=3)), ["embed_tokens", "lm_head"]),
}


def model_of(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:  # biases start at zero and norms at one: neither would be missed
            p.data += 0.3 * torch.randn_like(p)
        if name.endswith("weight") and p.dim() == 2:
            p.data *= 4
    return model


def version_of(model, label, seed=0):
    return version_with(model, *ADAPTERS[label], label, seed)


def version_with(model, method, targets, label, seed=0):
    fresh = copy.deepcopy(model)
    lk.attach(fresh, method, targets=targets, name="a", seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for name, p in fresh.named_parameters():
        if not p.requires_grad:
            continue
        scale = 0.02 if "magnitude" in name else 0.3
        p.data += scale * torch.randn(p.shape, generator=draw)
    state = lk.extract(fresh, "a")
    return AdapterVersion(f"{label}-{seed}", state, label, 1, state.nbytes, 1, "made")


def steps_of(runner, versions, seed=0):
    """Three steps: a chunk each, single tokens, and a mix of both; None is the base."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [int(n) for n in torch.randint(1, 40, (len(versions),), generator=draw)]
    slabs = [runner.arena.reserve(160) for _ in versions]
    past = [0] * len(versions)
    for kind in ("chunks", "singles", "mixed", "mixed"):
        counts = [
            1 if kind == "singles" or (kind == "mixed" and i % 2) else length
            for i, length in enumerate(lengths)
        ]
        tokens, positions, pieces, segments, start = [], [], [], [], 0
        for i, n in enumerate(counts):
            tokens.append(torch.randint(0, runner.vocabulary, (n,), generator=draw))
            positions.append(torch.arange(past[i], past[i] + n))
            pieces.append(Piece(start, start + n, past[i], slabs[i]))
            if segments and segments[-1].version is versions[i]:
                segments[-1] = segments[-1]._replace(end=start + n)
            else:
                segments.append(Segment(start, start + n, versions[i]))
            past[i] += n
            start += n
        last = torch.tensor([piece.end - 1 for piece in pieces])
        yield runner.step(StepBatch(torch.cat(tokens), torch.cat(positions), segments, pieces, last))
    for slab in slabs:
        slab.free()


def same(model, versions, seed=0):
    native = NativeRunner(copy.deepcopy(model), kv_tokens=8192, threads=2)
    stock = TransformersRunner(copy.deepcopy(model), kv_tokens=8192)
    for runner in (native, stock):
        for version in {id(v): v for v in versions if v is not None}.values():
            runner.prepare(version)
    for found, want in zip(steps_of(native, versions, seed), steps_of(stock, versions, seed), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
def test_the_base_and_two_adapters_of_every_kind_of_model(kind):
    model = model_of(kind)
    a, b = version_of(model, "all linear"), version_of(model, "q and v, rsLoRA", 1)
    same(model, [None, a, a, b, None])


@pytest.mark.parametrize("label", ADAPTERS)
def test_every_kind_of_adapter_beside_the_base(label):
    model = model_of("llama-bias")
    same(model, [version_of(model, label), None, version_of(model, label, 1)])


@pytest.mark.parametrize("label", ["embedding and head", "DoRA at both ends"])
def test_adapters_of_a_scaled_embedding(label):
    model = model_of("gemma")
    same(model, [version_of(model, label), None])


@pytest.mark.parametrize("requests", [1, 13, 40])
def test_many_adapters_at_once(requests):
    model = model_of("llama")
    pool = [version_of(model, label, i) for i, label in enumerate(ADAPTERS)]
    same(
        model,
        [[*pool, None][i % (len(pool) + 1)] for i in sorted(range(requests), key=lambda i: i % 10)],
        requests,
    )


def test_an_adapter_changes_something():
    model = model_of("llama")
    runner = NativeRunner(copy.deepcopy(model), kv_tokens=4096, threads=1)
    version = version_of(model, "all linear")
    runner.prepare(version)
    plain, changed = (list(steps_of(runner, [v])) for v in (None, version))
    assert all(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(plain, changed, strict=True))


def test_the_number_of_threads_changes_no_bit():
    model = model_of("llama")
    version = version_of(model, "all linear")
    outputs = []
    for threads in (1, 2):
        runner = NativeRunner(copy.deepcopy(model), kv_tokens=4096, threads=threads)
        runner.prepare(version)
        outputs.append(list(steps_of(runner, [None, version, None])))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_row_does_not_depend_on_who_is_beside_it():
    model = model_of("llama")
    version, other = version_of(model, "all linear"), version_of(model, "DoRA", 1)
    runner = NativeRunner(copy.deepcopy(model), kv_tokens=8192, threads=2)
    for v in (version, other):
        runner.prepare(v)
    slabs = [runner.arena.reserve(64) for _ in range(3)]
    token = torch.tensor([7])
    alone = runner.step(
        StepBatch(token, token * 0, [Segment(0, 1, version)], [Piece(0, 1, 0, slabs[0])], token * 0)
    )
    segments = [Segment(0, 1, None), Segment(1, 2, version), Segment(2, 3, other)]
    pieces = [Piece(i, i + 1, 0, slabs[i]) for i in range(3)]
    tokens = torch.tensor([9, 7, 11])
    beside = runner.step(StepBatch(tokens, tokens * 0, segments, pieces, torch.arange(3)))
    torch.testing.assert_close(beside[1:2], alone, rtol=1e-5, atol=1e-6)


def test_a_step_in_which_no_prompt_ends_has_no_logits():
    runner = NativeRunner(model_of("llama"), kv_tokens=4096, threads=1)
    slab = runner.arena.reserve(64)
    rows = torch.arange(5)
    none = torch.empty(0, dtype=torch.int64)
    assert runner.step(StepBatch(rows, rows, [Segment(0, 5, None)], [Piece(0, 5, 0, slab)], none)).shape == (
        0,
        515,
    )


def test_int8_is_near_and_runs_adapters():
    model = model_of("qwen2")
    version = version_of(model, "all linear")
    exact = NativeRunner(copy.deepcopy(model), kv_tokens=4096)
    rounded = NativeRunner(copy.deepcopy(model), kv_tokens=4096, storage="int8")
    assert rounded.weight_bytes < 0.4 * exact.weight_bytes
    for runner in (exact, rounded):
        runner.prepare(version)
    for found, want in zip(steps_of(rounded, [None, version]), steps_of(exact, [None, version]), strict=True):
        assert float((found - want).norm() / want.norm()) < 0.1


def test_int8_keeps_codes_of_groups_with_a_scale_each():
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(37, 53, generator=draw)
    packed = PackedWeight([(W, None)], kernel().width, "int8")
    groups = torch.nn.functional.pad(W, (0, 11)).view(37, 2, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / scale).round() * scale).view(37, 64)[:, :53]
    torch.testing.assert_close(packed.part(0), rounded)


def test_what_patches_cannot_say_is_refused_with_a_way_out():
    model = model_of("llama")
    fresh = copy.deepcopy(model)
    lk.attach(fresh, lk.LoHa(r=2), targets=["q_proj"], name="a")
    state = lk.extract(fresh, "a")
    runner = NativeRunner(copy.deepcopy(model), kv_tokens=4096)
    with pytest.raises(
        AdapterIncompatibleError, match=r"loha at 'model.layers.0.self_attn.q_proj'.*--runner transformers"
    ):
        runner.prepare(AdapterVersion("d", state, "a", 1, state.nbytes, 2, "made"))
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 48})).eval()
    lk.attach(other, lk.LoRA(r=2), targets=["q_proj"], name="a")
    state = lk.extract(other, "a")
    with pytest.raises(AdapterIncompatibleError, match="64 x 48; this base has 64 x 72"):
        runner.prepare(AdapterVersion("e", state, "a", 1, state.nbytes, 2, "made"))


def test_other_models_are_refused_and_left_as_they_were():
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50)).eval()
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not of the kinds llama"):
        NativeRunner(gpt)
    odd = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    with pytest.raises(ModelError, match="sliding window of 8"):
        NativeRunner(odd)
    assert next(odd.parameters()).device.type == "cpu"
    odd(input_ids=torch.tensor([[1, 2]]))


def test_the_context_is_that_of_the_other_runner():
    """Positions that turn otherwise once the longest text of a row is long: texts of a row must stay short."""
    rope = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval()
    other = TransformersRunner(copy.deepcopy(model), kv_tokens=4096)
    assert NativeRunner(model, kv_tokens=4096).context == other.context == 128


def test_a_plain_lora_takes_no_memory_beside_its_tensors():
    model = model_of("llama")
    version = version_of(model, "all linear")
    runner = NativeRunner(model, kv_tokens=4096)
    runner.prepare(version)
    assert runner.prepared_bytes(version) == 0
    before = [t.clone() for _, _, t in version.state.all_tensors()]
    for _ in steps_of(runner, [version, None, version]):
        pass
    assert all(torch.equal(a, t) for a, (_, _, t) in zip(before, version.state.all_tensors(), strict=True))


@pytest.mark.parametrize("r", [1, 3, 4, 7, 8, 12, 16, 17, 32, 33, 48, 60])
def test_every_rank(r):
    """Those that fill a vector, or several rows of which do, go other ways than the rest; so do few and many rows."""
    model = model_of("llama-bias")
    method, targets = lk.LoRA(r=r, alpha=r), ["q_proj", "o_proj", "gate_proj"]
    versions = [version_with(model, method, targets, "this rank", seed) for seed in range(3)]
    same(model, [versions[0], None, versions[1], versions[1], versions[2]])


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_a_row_is_the_same_to_the_last_bit_whatever_else_is_in_the_step(storage):
    model = model_of("llama")
    one, other = version_of(model, "all linear"), version_of(model, "DoRA", 1)
    runner = NativeRunner(model, kv_tokens=8192, threads=1, storage=storage)
    for version in (one, other):
        runner.prepare(version)
    tokens = torch.arange(7, 20)

    def logits(before, after):
        """Of one text beside texts of one token."""
        owners = [*before, one, *after]
        pieces, segments, rows, start = [], [], [], 0
        for i, owner in enumerate(owners):
            mine = tokens if i == len(before) else tokens[i % 5 :][:1]
            rows.append(mine)
            pieces.append(Piece(start, start + len(mine), 0, runner.arena.reserve(64)))
            if segments and segments[-1].version is owner:
                segments[-1] = segments[-1]._replace(end=start + len(mine))
            else:
                segments.append(Segment(start, start + len(mine), owner))
            start += len(mine)
        where = pieces[len(before)].start
        last = torch.arange(where, where + len(tokens))
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        found = runner.step(StepBatch(torch.cat(rows), positions, segments, pieces, last))
        for piece in pieces:
            piece.slab.free()
        return found

    alone = logits([], [])
    for before, after in (([None], []), ([], [one] * 9), ([None] * 30, [one, one, other]), ([other], [])):
        assert torch.equal(logits(before, after), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_read_in_the_dtype_of_their_file(dtype):
    """Every finite number means what torch says it means, and nothing is copied."""
    model = model_of("llama")
    version = version_of(model, "all linear")
    tensors = {
        path: {name: t.to(dtype) for name, t in group.items()}
        for path, group in version.state.tensors.items()
    }
    tiny = torch.finfo(dtype).smallest_normal
    first = tensors["model.layers.0.self_attn.q_proj"]["lora_A"]
    first[0, :4] = torch.tensor([0.0, -0.0, tiny / 4, -tiny]).to(dtype)
    state = version.state
    rounded = AdapterVersion("rounded", AdapterState(state.spec, tensors), "rounded", 1, 0, 5, "made")
    wide = {p: {name: t.float() for name, t in group.items()} for p, group in tensors.items()}
    plain = AdapterVersion("wide", AdapterState(state.spec, wide), "wide", 1, 0, 5, "made")
    runner = NativeRunner(model, kv_tokens=8192, threads=1)
    for one in (rounded, plain):
        runner.prepare(one)
    assert runner.prepared_bytes(rounded) == 0
    found = list(steps_of(runner, [rounded, None, rounded]))
    want = list(steps_of(runner, [plain, None, plain]))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_prepared_adapters_are_let_go_of():
    model = model_of("llama")
    version = version_of(model, "DoRA")
    runner = NativeRunner(model, kv_tokens=4096)
    runner.prepare(version)
    assert 0 < runner.prepared_bytes(version) < version.bytes
    runner.forget(version)
    runner.forget(version)
    assert runner.prepared_bytes(version) == 0


def test_a_content_that_is_read_again_lets_the_first_reading_go():
    model = model_of("llama")
    first, second = version_of(model, "all linear"), version_of(model, "all linear")
    runner = NativeRunner(model, kv_tokens=4096)
    assert first.digest == second.digest
    runner.prepare(first)
    want = next(iter(steps_of(runner, [first])))
    tensor = weakref.ref(next(t for _, _, t in first.state.all_tensors()))
    runner.prepare(second)
    del first
    gc.collect()
    assert tensor() is None
    assert torch.equal(next(iter(steps_of(runner, [second]))), want)


def test_the_smallest_room_there_is():
    model = model_of("llama")
    runner = NativeRunner(copy.deepcopy(model), kv_tokens=64, threads=1)
    assert (runner.context, runner.arena.capacity, runner.arena.used) == (64, 128, 0)
    slab, rows = runner.arena.reserve(64), torch.arange(5)
    found = runner.step(StepBatch(rows, rows, [Segment(0, 5, None)], [Piece(0, 5, 0, slab)], rows[4:]))
    with torch.no_grad():
        want = model(input_ids=rows[None]).logits[0, 4:]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="the least is 64"):
        NativeRunner(model, kv_tokens=63, threads=1)
