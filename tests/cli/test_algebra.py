"""``lorakit combine``, ``resize``, ``diff`` and ``extract``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorakit as lk
from lorakit.cli.resize import bytes_of
from lorakit.errors import ConfigError
from lorakit.io import write
from tests.adapters.states import change, linear, random_state
from tests.cli.conftest import Lorakit


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters on disk."""
    shapes = {"model.layers.0.q_proj": linear(40, 30), "model.layers.0.v_proj": linear(20, 30)}
    for n, r in ((0, 6), (1, 4)):
        state = random_state(
            dict.fromkeys(shapes, lk.LoRA(r=r, alpha=8)), shapes, seed=n, dtype=torch.float32
        )
        write(state, tmp_path / "ab"[n])
    return tmp_path / "a", tmp_path / "b"


def test_a_weight_may_be_negative(lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = lorakit("combine", folders[0], "-w", -1, "-o", tmp_path / "minus")
    assert outcome.code == 0, outcome.err
    assert torch.equal(change(lk.read(tmp_path / "minus"), PATH), -change(lk.read(folders[0]), PATH))


PATH = "model.layers.0.q_proj"


def test_combine_is_the_weighted_sum(lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = lorakit("combine", *folders, "-w", 0.5, "-w", 2, "-o", tmp_path / "c")
    assert outcome.code == 0
    assert "nothing: exact up to one rounding" in outcome.out
    made, a, b = (lk.read(p) for p in (tmp_path / "c", *folders))
    torch.testing.assert_close(
        change(made, PATH), 0.5 * change(a, PATH) + 2 * change(b, PATH), rtol=1e-5, atol=1e-5
    )
    assert made.spec.info["combined"] == {"how": "sum", "weights": [0.5, 2.0]}
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_combine_tells_what_a_cut_left_out(
    lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ["combine", *folders, "--rank", 3, "--dtype", "bfloat16", "-o", tmp_path / "c"]
    assert "% of the norm of the change" in lorakit(*words).out
    result = json.loads(lorakit(*words, "--json", "--overwrite").out)
    assert 0 < result["relative_error"] < 1
    assert result["targets"][PATH]["r"] == 3
    assert result["targets"][PATH]["lost"] < result["targets"][PATH]["norm"]
    assert lk.read(tmp_path / "c").tensors[PATH]["lora_A"].dtype == torch.bfloat16
    assert lorakit("combine", *folders, "--how", "ties", "--density", 0.3, "-o", tmp_path / "t").code == 0


def test_resize_to_a_rank_an_energy_and_a_size(
    lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert lorakit("resize", folders[0], "--rank", 2, "-o", out, "--overwrite").code == 0
    assert lk.read(out).spec.methods[PATH].r == 2  # type: ignore[attr-defined]
    assert lorakit("resize", folders[0], "--energy", 0.8, "-o", out, "--overwrite").code == 0
    assert 1 < lk.read(out).spec.methods[PATH].r < 6  # type: ignore[attr-defined]
    for most in ("4kB", "5KiB"):
        outcome = lorakit("resize", folders[0], "--size", most, "-o", out, "--overwrite")
        assert outcome.code == 0, outcome.err
        assert (out / "adapter_model.safetensors").stat().st_size <= bytes_of(most)
    assert "too few" in lorakit("resize", folders[0], "--size", 10, "-o", out, "--overwrite").err
    assert (
        "leave --rank"
        in lorakit("resize", folders[0], "--size", "4kB", "--rank", 2, "-o", out, "--overwrite").err
    )


def test_sizes() -> None:
    assert [bytes_of(s) for s in ("10", "2kB", "1.5MB", "1 MiB", "3G")] == [
        10,
        2000,
        1_500_000,
        1 << 20,
        3 * 10**9,
    ]
    with pytest.raises(ConfigError, match="'big' is no size"):
        bytes_of("big")


def test_diff(lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path) -> None:
    lorakit("resize", folders[0], "--rank", 8, "-o", tmp_path / "same")
    outcome = lorakit("diff", folders[0], tmp_path / "same")
    assert "1.0000" in outcome.out
    assert "all together" in outcome.out
    result = json.loads(lorakit("diff", *folders, "--json").out)
    a, b = (lk.read(p) for p in folders)
    assert result["targets"][PATH]["distance"] == pytest.approx(
        (change(a, PATH) - change(b, PATH)).norm().item()
    )
    assert abs(result["whole"]["cosine"]) < 0.5


def test_extract(lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path) -> None:
    a = lk.read(folders[0])
    base = {f"{p}.weight": torch.randn(s.out, s.in_) for p, s in a.spec.shapes.items()} | {
        "norm.weight": torch.ones(4)
    }
    tuned = {n: W + change(a, n[:-7]).float() if "proj" in n else 2 * W for n, W in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    outcome = lorakit("extract", tmp_path / "base", tmp_path / "tuned", "-r", 6, "-o", tmp_path / "x")
    assert outcome.code == 0, outcome.err
    assert "1 more tensors differ (norm), such as norm.weight (2)" in outcome.out
    made = lk.read(tmp_path / "x")
    torch.testing.assert_close(change(made, PATH), change(a, PATH), rtol=1e-3, atol=1e-4)
    fast = [
        "extract",
        tmp_path / "base",
        tmp_path / "tuned",
        "-r",
        2,
        "--fast",
        "--json",
        "-o",
        tmp_path / "y",
    ]
    result = json.loads(lorakit(*fast, "--base-name", "org/base", "-t", "q_proj", "--rest", "save").out)
    assert result["not_held"] == {}
    assert set(result["targets"]) == set(base) - {f"{PATH}.weight"} | {PATH}
    assert lk.read(tmp_path / "y").spec.base == "org/base"


def test_mistakes(lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "Did you mean 'ties'" in lorakit("combine", *folders, "--how", "tie", "-o", out).err
    assert "No dtype is called 'half'" in lorakit("combine", *folders, "--dtype", "half", "-o", out).err
    assert (
        "There is no checkpoint" in lorakit("extract", tmp_path / "x", tmp_path / "y", "-r", 1, "-o", out).err
    )
    assert not out.exists()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_extracted_adapter_makes_the_tuned_model_of_the_base(
    family: str, lorakit: Lorakit, tmp_path: Path
) -> None:
    """Through transformers' own files; GPT-2 keeps its linear weights transposed, also where they are square."""
    import transformers as tf

    torch.manual_seed(0)
    if family == "gpt2":
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=19, n_positions=16)
        )
        targets = ["c_attn", "h.0.attn.c_proj"]
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=19, **sizes))
        targets = ["q_proj", "down_proj"]
    model.eval().save_pretrained(tmp_path / "base", max_shard_size="3KB")
    lk.attach(model, lk.LoRA(r=3), targets=targets, seed=0)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_()
    lk.merge(model, permanent=True)
    model.save_pretrained(tmp_path / "tuned")
    ids = torch.arange(6).view(1, 6)
    wanted = model(ids).logits
    outcome = lorakit("extract", tmp_path / "base", tmp_path / "tuned", "-r", 3, "-o", tmp_path / "x")
    assert outcome.code == 0, outcome.err
    base = type(model).from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(base(ids).logits, wanted, atol=1e-2)
    lk.load(base, tmp_path / "x")
    torch.testing.assert_close(base(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_dora_is_taken_as_what_it_changes_in_the_base(lorakit: Lorakit, tmp_path: Path) -> None:
    shapes = {PATH: linear(40, 30), "model.layers.0.v_proj": linear(20, 30)}
    base = {f"{path}.weight": torch.randn(shape.out, shape.in_) for path, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    save_file({**base, "model.norm.weight": torch.ones(30)}, tmp_path / "base" / "model.safetensors")
    for n in (0, 1):
        methods = dict.fromkeys(shapes, lk.DoRA(lk.LoRA(r=3, alpha=6)))
        write(random_state(methods, shapes, seed=n, dtype=torch.float32), tmp_path / "ab"[n])
    folders = tmp_path / "a", tmp_path / "b"
    assert "--base" in lorakit("combine", *folders, "--rank", 3, "-o", tmp_path / "c").err
    words = ("combine", *folders, "-w", 0.5, "-w", -2, "--base", tmp_path / "base", "--energy", 1)
    made = lorakit(*words, "-o", tmp_path / "c")
    assert made.code == 0, made.err
    W = base[f"{PATH}.weight"].double()

    def true_change(folder: Path) -> torch.Tensor:
        p = {name: t.double() for name, t in lk.read(folder).tensors[PATH].items()}
        V = W + 2.0 * p["lora_B"] @ p["lora_A"]
        return p["magnitude"].unsqueeze(-1) * V / V.norm(dim=-1, keepdim=True) - W

    a, b = (true_change(folder) for folder in folders)
    torch.testing.assert_close(change(lk.read(tmp_path / "c"), PATH), 0.5 * a - 2 * b, rtol=1e-4, atol=1e-4)
    assert "--base" in lorakit("diff", *folders).err
    found = json.loads(lorakit("diff", *folders, "--base", tmp_path / "base", "--json").out)
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    assert found["targets"][PATH]["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert found["targets"][PATH]["distance"] == pytest.approx(float((a - b).norm()), rel=1e-6)
    (tmp_path / "other").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "other" / "model.safetensors")
    assert (
        "holds no weight that the adapters change"
        in lorakit("diff", *folders, "--base", tmp_path / "other").err
    )


@pytest.mark.parametrize("words", [("combine", "--rank", 2), ("resize", "--rank", 2)])
def test_what_is_there_is_replaced_only_when_told_to(
    lorakit: Lorakit, folders: tuple[Path, Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    a, b = folders
    before = {path.name: path.read_bytes() for path in b.iterdir()}
    outcome = lorakit(*words, a, "-o", b)
    assert outcome.code == 2
    assert "exists and is not empty" in outcome.err
    assert {path.name: path.read_bytes() for path in b.iterdir()} == before
    assert lorakit(*words, a, "-o", b, "--overwrite").code == 0
    assert {path.name: path.read_bytes() for path in b.iterdir()} != before
    (tmp_path / "file").touch()
    assert "is a file" in lorakit(*words, a, "-o", tmp_path / "file", "--overwrite").err
