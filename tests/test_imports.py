"""What `import lorakit` loads: torch, safetensors and lorakit's core; everything else waits until it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lorakit as lk

WAITS = (
    "accelerate", "fastapi", "gguf", "httpx", "huggingface_hub", "matplotlib", "peft", "pydantic", "requests", "rich",
    "sacrebleu", "tokenizers", "tqdm", "transformers", "typer", "uvicorn", "yaml",
)  # fmt: skip
CORE = {"adapters", "attach", "core", "errors", "io", "methods", "ops", "targets"}


def loaded_after(code: str) -> set[str]:
    """The modules of a fresh interpreter after running some code."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    source = str(Path(lk.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_loads_torch_safetensors_and_the_core_and_nothing_else() -> None:
    torch_alone = loaded_after("import torch, safetensors.torch")
    everything = loaded_after("import lorakit")
    new = everything - torch_alone
    assert not [name for name in new if name.partition(".")[0] in WAITS]
    assert ("numpy" in everything) <= ("numpy" in torch_alone)
    ours = {name for name in new if name.partition(".")[0] == "lorakit"}
    assert {name.split(".")[1] for name in ours if "." in name} <= CORE
    # Beside our own: a few small modules of the standard library and of torch. A compiler would not be few.
    others = new - ours
    assert len(others) < 40, sorted(others)
    assert len(ours) < 80, sorted(ours)
    assert not [
        name
        for name in others
        if name.startswith(("torch._dynamo", "torch._inductor", "torch.onnx", "sympy"))
    ]


def test_a_whole_session_needs_no_more() -> None:
    """Attaching, training, saving, loading, merging and reporting with the core alone."""
    session = """
import tempfile, torch, lorakit as lk
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
lk.attach(model, lk.DoRA(lk.LoRA(r=2)), name="a")
model(torch.ones(1, 4)).sum().backward()
with torch.no_grad():
    for parameter in lk.trainable(model).values():
        parameter -= 0.1 * parameter.grad
with tempfile.TemporaryDirectory() as folder:
    lk.save(model, folder)
    lk.load(model, folder, name="b")
with lk.use(model, rows=["a"]), torch.no_grad():
    model(torch.ones(1, 4))
str(lk.report(model)); lk.merge(model, "a"); lk.detach(model)
"""
    new = loaded_after(session) - loaded_after("import torch")
    assert not [name for name in new if name.partition(".")[0] in WAITS]


def test_all_that_is_promised_is_there() -> None:
    assert sorted(lk.__all__) == sorted(set(lk.__all__))
    assert not [name for name in lk.__all__ if not hasattr(lk, name)]
