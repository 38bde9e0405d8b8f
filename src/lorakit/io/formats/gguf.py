"""llama.cpp's adapters: a GGUF file with ``blk.0.attn_q.weight.lora_a`` and one alpha, for Llama, Qwen2 and GPT-2.

llama.cpp takes each target's scale to be alpha divided by the target's own rank. For Llama it keeps the rows of the
query and key projections in another order (pairs of a rotation side by side), and ``lora_b`` with them: undoing that
needs the number of heads. Source: ``convert_lora_to_gguf.py`` in ggml-org/llama.cpp, as a description of the format.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, MissingDependencyError, listing
from lorakit.io.formats.format import Format, Hints, Tensors, Written
from lorakit.io.formats.modules import plainest
from lorakit.io.peft_keys import Found
from lorakit.io.safetensors_file import damaged
from lorakit.io.single_file import publish_file
from lorakit.io.strictness import Complaints
from lorakit.methods import LoRA

_LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2 = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "llama": ("model.layers", _LLAMA),
    "qwen2": ("model.layers", _LLAMA),
    "gpt2": ("transformer.h", _GPT2),
}
"""llama.cpp's name of a model family to the path of its layers and llama.cpp's names within one."""

_KEY = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.weight\.lora_(a|b)")
_ARCHITECTURE, _ALPHA, _HEADS, _KEY_HEADS = (
    "general.architecture", "adapter.lora.alpha", "lorakit.head_count", "lorakit.head_count_kv",
)  # fmt: skip
_FACTORS = {"a": "lora_A", "b": "lora_B"}
_FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_LEAST_ENTRY_BYTES = 12


def recognises(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Whether the file says that it is an adapter."""
    return metadata.get("adapter.type") == "lora"


def read(tensors: Tensors, metadata: Mapping[str, str], hints: Hints) -> AdapterState:
    """An adapter from llama.cpp's tensors.

    Raises:
        AdapterFileError: The family is not known, a tensor is not one of its layers, or the heads were not said.
    """
    family = metadata.get(_ARCHITECTURE, "")
    if family not in ARCHITECTURES:
        raise AdapterFileError(
            f"The adapter is for the architecture {family!r}; known here: {listing(ARCHITECTURES)}."
        )
    layers, names = ARCHITECTURES[family]
    complaints = Complaints(list(tensors), "llama.cpp has for this architecture")
    groups: dict[str, dict[str, Found]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in names:
            complaints.unexpected.append(key)
        else:
            path = f"{layers}.{match[1]}.{names[match[2]]}"
            groups.setdefault(path, {})[_FACTORS[match[3]]] = Found(key, tensor)
    heads = hints.heads or _own_heads(metadata)
    alpha = _number(metadata, _ALPHA)
    methods: dict[str, Method] = {}
    shapes: dict[str, Shape] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for path, group in groups.items():
        complaints.missing += [f"{path}.{name}" for name in ("lora_A", "lora_B") if name not in group]
        if len(group) < 2:
            continue
        A, B = group["lora_A"].tensor, group["lora_B"].tensor
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
            complaints.misshaped.append(
                f"{path}: lora_a {tuple(A.shape)} and lora_b {tuple(B.shape)} are no pair of factors"
            )
            continue
        r = A.shape[0]
        methods[path] = LoRA(r=r, alpha=alpha or float(r))
        shapes[path] = Shape("linear", out=B.shape[0], in_=A.shape[1])
        held[path] = {"lora_A": A, "lora_B": _turned(family, path, B, heads, back=True)}
    complaints.check()
    base = metadata.get("general.base_model.0.name")
    info: dict[str, Any] = {"family": family}
    if family == "llama" and heads:
        info["heads"] = list(heads)
    return AdapterState(AdapterSpec(methods, shapes, base, info), held)


def write(state: AdapterState, hints: Hints) -> Written:
    """llama.cpp's tensors of an adapter.

    Raises:
        AdapterFileError: The format cannot hold it.
    """
    plain = state.plain()
    family = _family(list(plain.spec.methods), hints.family or state.spec.info.get("family"))
    layers, names = ARCHITECTURES[family]
    known = state.spec.info.get("heads")
    heads = hints.heads or (tuple(known) if known else None)
    losses: list[str] = []
    loras: dict[str, tuple[LoRA, dict[str, Tensor]]] = {}
    for path, method in plain.spec.methods.items():
        shape = plain.spec.shapes[path]
        method, p = plainest(path, method, shape, plain.parameters(path), losses)
        if not isinstance(method, LoRA) or method.bias or shape.kind != "linear" or shape.batch:
            raise AdapterFileError(
                f"{path!r} is {method.name} on {shape.kind}; llama.cpp's adapters are LoRA of linear layers, no bias."
            )
        loras[path] = method, p
    alphas = [method.scale * method.r for method, _ in loras.values()]
    alpha = max(set(alphas), key=lambda a: (alphas.count(a), a))
    if alpha == 0:
        raise AdapterFileError(
            "llama.cpp takes an alpha of zero for one that is not set: leave such targets out."
        )
    if float(torch.tensor(alpha, dtype=torch.float32)) != alpha:
        losses.append(f"alpha={alpha!r} beyond the digits of float32")
    tensors: dict[str, Tensor] = {}
    for (path, (_, p)), own in zip(loras.items(), alphas, strict=True):
        _, at, rest = re.split(rf"^{re.escape(layers)}\.(\d+)\.", path)
        theirs = next(key for key, name in names.items() if name == rest)
        B = p["lora_B"]
        if own != alpha:
            B = (B.double() * (own / alpha)).to(B.dtype)
            losses.append(
                f"alphas other than {alpha:g}: the file has one, so the rest is multiplied into lora_b"
            )
        key = f"blk.{at}.{theirs}.weight"
        tensors[f"{key}.lora_a"] = p["lora_A"]
        tensors[f"{key}.lora_b"] = _turned(family, path, B, heads, back=False)
    metadata = {"general.type": "adapter", "adapter.type": "lora", _ARCHITECTURE: family, _ALPHA: repr(alpha)}
    if family == "llama" and heads:
        metadata |= {_HEADS: str(heads[0]), _KEY_HEADS: str(heads[1])}
    if state.spec.base:
        metadata["general.base_model.0.name"] = state.spec.base
    return Written(tensors, metadata, list(dict.fromkeys(losses)))


# ---- the model's facts
def model_facts(path: Path) -> tuple[str, tuple[int, int]]:
    """llama.cpp's family and the query and key heads of a model, from its ``config.json`` or the folder of it.

    Raises:
        AdapterFileError: There is none, or the family is not known here.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_bytes())
        kind = config["model_type"]
        heads = int(config["n_head"] if kind == "gpt2" else config["num_attention_heads"])
        key_heads = int(config.get("num_key_value_heads") or heads)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(
            f"{file} is not the config.json of a transformers model: {error!r}."
        ) from error
    if kind not in _FAMILIES or heads < 1 or key_heads < 1:
        raise AdapterFileError(
            f"{file} is of a {kind!r} model; adapters for llama.cpp can be written for {listing(_FAMILIES)}."
        )
    return _FAMILIES[kind], (heads, key_heads)


def _family(paths: list[str], said: str | None) -> str:
    """The family whose layers all targets are."""
    fitting = []
    for family, (layers, names) in ARCHITECTURES.items():
        pattern = re.compile(rf"{re.escape(layers)}\.\d+\.({'|'.join(map(re.escape, names.values()))})")
        odd = [path for path in paths if not pattern.fullmatch(path)]
        if not odd:
            fitting.append(family)
        elif family == said:
            raise AdapterFileError(f"{listing(odd, most=3)} is no linear layer of a {family} block.")
    if said in fitting:
        return str(said)
    if len(fitting) == 1 and said is None:
        return fitting[0]
    if fitting:
        raise AdapterFileError(
            f"The paths fit {listing(fitting)}, and llama.cpp orders the rows of q and k differently in each: say "
            "which model it is for (--config FOLDER with its config.json)."
        )
    raise AdapterFileError(
        f"{listing(paths, most=3)}: these are not linear layers in the blocks of {listing(ARCHITECTURES)}."
    )


def _turned(family: str, path: str, B: Tensor, heads: tuple[int, int] | None, *, back: bool) -> Tensor:
    """The rows of ``B`` for q and k of a Llama in llama.cpp's order, (head, pair, half), or back."""
    leaf = path.rpartition(".")[2]
    if family != "llama" or leaf not in ("q_proj", "k_proj"):
        return B
    if heads is None:
        raise AdapterFileError(
            "llama.cpp keeps the rows of a Llama's q and k in another order, head by head: say how many heads the "
            "model has (--config FOLDER with its config.json)."
        )
    count, (rows, r) = heads[leaf == "k_proj"], B.shape
    if rows % (2 * count):
        raise AdapterFileError(f"{path!r} has {rows} outputs, which {count} heads of pairs do not divide.")
    half = rows // count // 2
    split = (count, half, 2, r) if back else (count, 2, half, r)
    return B.reshape(split).transpose(1, 2).reshape(rows, r)


def _own_heads(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """The heads in a file that we wrote."""
    if _HEADS not in metadata:
        return None
    return int(_number(metadata, _HEADS)), int(_number(metadata, _KEY_HEADS))


def _number(metadata: Mapping[str, str], key: str) -> float:
    try:
        return float(metadata.get(key, 0))
    except ValueError:
        raise AdapterFileError(f"{key} in the file is {metadata[key][:40]!r}, which is no number.") from None


# ---- the container
def load_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a GGUF file, and its fields as text.

    Raises:
        MissingDependencyError: The package ``gguf`` is not installed.
        AdapterFileError: The file is damaged, or holds quantised tensors.
    """
    gguf = _package()
    try:
        with path.open("rb") as file:
            head, size = file.read(24), path.stat().st_size
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    counts = int.from_bytes(head[8:16], "little"), int.from_bytes(head[16:24], "little")
    if len(head) < 24 or head[:4] != b"GGUF" or max(counts) > size // _LEAST_ENTRY_BYTES:
        raise damaged(path, "it is no GGUF file, or says that it holds more than it has room for")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: _text(each.contents()) for name, each in reader.fields.items()}
        return {entry.name: _tensor(path, entry) for entry in reader.tensors}, fields
    except AdapterFileError:
        raise
    except Exception as error:  # the package has no error of its own: it stumbles over what is damaged
        raise damaged(path, f"the GGUF reader stopped at it ({type(error).__name__}: {error})") from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _tensor(path: Path, entry: Any) -> Tensor:
    dtype = _DTYPES.get(entry.tensor_type.name)
    if dtype is None:
        raise AdapterFileError(
            f"{path}: {entry.name} is kept as {entry.tensor_type.name}; adapters are read from {listing(_DTYPES)}."
        )
    size = tuple(int(n) for n in reversed(entry.shape))
    held = torch.frombuffer(bytearray(entry.data.tobytes()), dtype=torch.uint8)
    return held.view(dtype).reshape(size)


def save_gguf(path: Path, written: Written) -> None:
    """Put a GGUF file in place, whole or not at all.

    Raises:
        MissingDependencyError: The package ``gguf`` is not installed.
        AdapterFileError: A tensor has a dtype that GGUF lacks, or the file could not be written.
    """
    gguf = _package()
    kinds = {dtype: getattr(gguf.GGMLQuantizationType, name) for name, dtype in _DTYPES.items()}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(made, written.metadata[_ARCHITECTURE])
        for key, value in written.metadata.items():
            if key == _ALPHA:
                writer.add_float32(key, float(value))
            elif key in (_HEADS, _KEY_HEADS):
                writer.add_uint32(key, int(value))
            elif key != _ARCHITECTURE:
                writer.add_string(key, value)
        for name, tensor in written.tensors.items():
            if tensor.dtype not in kinds:
                raise AdapterFileError(f"{name} is {tensor.dtype}; GGUF holds {listing(_DTYPES)}.")
            flat = tensor.detach().cpu().contiguous()
            array = flat.view(torch.uint8).numpy()
            writer.add_tensor(name, array, raw_dtype=kinds[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        publish_file(path, [made.read_bytes()])


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files are read and written with the package gguf: pip install 'lorakit[gguf]'."
        ) from error
    return gguf


GGUF = Format("gguf", "llama.cpp's LoRA adapters", recognises, read, write, "gguf")
