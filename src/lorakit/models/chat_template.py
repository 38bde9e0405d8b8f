"""The chat template that an adapter was trained with: kept beside its weights, and checked where it is used.

| file | holds |
|---|---|
| ``chat_template.jinja`` | the template, under transformers' name for it; missing where rows were rendered plainly |
| ``rendering.json`` | SHA-256 of the template and of the tokens of a fixed text; the token that ends answers |

An adapter answers best to the prompts it was trained on. So its own template is the one to render with, whatever
template the base's tokenizer has got since; and a tokenizer that cuts text into other tokens is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import AdapterFileError, AdapterMismatchError, ConfigError, listing
from lorakit.models.conversation import stop_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
RENDERING_FILE = "rendering.json"

# Words, digits, spaces, line breaks, several scripts and an emoji: tokenizers that differ at all differ here.
_PROBE = "The 12,345 quick foxes\n\n\tsaid: déjà-vu?! 안녕하세요 мир 你好 🙂 if (x >= 0) { return f(x); }"


@dataclass(frozen=True)
class OwnTemplate:
    """How the rows of an adapter's training were rendered.

    Attributes:
        text: The template; None for plain rendering.
        tokens_sha256: Of the tokens that its tokenizer made of a fixed text.
    """

    text: str | None
    tokens_sha256: str


def own_template(folder: str | Path) -> OwnTemplate | None:
    """The template that lies in an adapter's folder; None where its training left no word of one.

    Raises:
        AdapterFileError: The files are damaged, or the template was changed after training.
    """
    folder = Path(folder)
    record = _read_record(folder)
    if record is None:
        return None
    return OwnTemplate(_checked_template(folder, record), str(record.get("tokens_sha256")))


def template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's chat template; None where it has none. Of several it is the default one."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return str(template) if template else None


def rendering_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What ``rendering.json`` says of a tokenizer and its template.

    Raises:
        DataError: The chat template does not render a prompt as the beginning of the whole.
    """
    text, stop = template_text(tokenizer), stop_id(tokenizer)
    return {
        "format": 1,
        "template_sha256": None if text is None else _sha256(text),
        "tokens_sha256": tokens_sha256(tokenizer),
        "stop_id": stop,
        "stop_token": tokenizer.convert_ids_to_tokens(stop),
    }


def save_template(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the template, and what identifies it, into an adapter's folder; files of another one are replaced.

    Raises:
        DataError: The chat template does not render a prompt as the beginning of the whole.
    """
    folder, text = Path(folder), template_text(tokenizer)
    record = rendering_of(tokenizer)
    if text is None:
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        _replace(folder / TEMPLATE_FILE, text)
    _replace(folder / RENDERING_FILE, json.dumps(record, indent=2) + "\n")


def adapter_template(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to render with for an adapter: its own, else the tokenizer's; None for plain rendering.

    Args:
        folder: The adapter's.
        tokenizer: The base model's.

    Raises:
        AdapterFileError: The files are damaged, or the template was changed after training.
        AdapterMismatchError: The tokenizer is not the one that the adapter was trained with.
    """
    folder = Path(folder)
    own = own_template(folder)
    if own is None:
        return template_text(tokenizer)
    if own.tokens_sha256 != tokens_sha256(tokenizer):
        raise AdapterMismatchError(
            f"The adapter {folder} was trained with another tokenizer: this one makes other tokens of the same text. "
            f"Load it on the base model that its adapter_config.json names; or, if you know that it fits, remove "
            f"{folder / RENDERING_FILE}."
        )
    return own.text


def adopt_template(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Make a tokenizer render as an adapter was trained; see `adapter_template`, which says what can go wrong.

    Returns:
        Whether the tokenizer's own template was another one.
    """
    text = adapter_template(folder, tokenizer)
    if text == template_text(tokenizer):
        return False
    tokenizer.chat_template = text
    return True


def adopt_common_template(folders: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Make a tokenizer render as all of several adapters were trained, which will be one model.

    Raises:
        ConfigError: They were trained with different templates.
        AdapterFileError: See `adapter_template`.
        AdapterMismatchError: See `adapter_template`.
    """
    if len({adapter_template(folder, tokenizer) for folder in folders}) > 1:
        raise _different([str(folder) for folder in folders])
    return adopt_template(folders[0], tokenizer)


def carry_template(folders: Sequence[str | Path], merged: Path) -> None:
    """Give a merged model's folder the template that its adapters were trained with, for all who load it.

    Raises:
        ConfigError: They were trained with different templates.
        AdapterFileError: See `adapter_template`.
    """
    found = {}
    for folder in folders:
        record = _read_record(Path(folder))
        if record is not None:
            found[str(folder)] = _checked_template(Path(folder), record)
    if len(set(found.values())) > 1:
        raise _different(list(found))
    text = next(iter(found.values()), None)
    if text is not None:
        _replace(merged / TEMPLATE_FILE, text)


def copy_template(adapter: str | Path, folder: Path) -> None:
    """Carry the template's files along into another folder of the same adapter.

    Raises:
        AdapterFileError: See `adapter_template`.
    """
    adapter = Path(adapter)
    record = _read_record(adapter)
    if record is None:
        return
    text = _checked_template(adapter, record)
    if text is not None:
        _replace(folder / TEMPLATE_FILE, text)
    _replace(folder / RENDERING_FILE, (adapter / RENDERING_FILE).read_text(encoding="utf-8"))


def read_template(path: str | Path) -> str:
    """A template from a Jinja file.

    Raises:
        ConfigError: There is no such file, or it is empty; what is wrong inside is told where it renders.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no chat template {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}.") from error
    if not text.strip():
        raise ConfigError(f"The chat template {path} is empty.")
    return text


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RENDERING_FILE
    if not path.is_file():  # PEFT's adapters, and those in a single file
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != 1:
        raise AdapterFileError(f"{path} is of a format that this lorakit does not know; a newer one may.")
    return record


def _checked_template(folder: Path, record: Mapping[str, Any]) -> str | None:
    """The template in a folder, which must be the one that the record is about; None for plain rendering."""
    path = folder / TEMPLATE_FILE
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        text = None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error
    if (None if text is None else _sha256(text)) != record.get("template_sha256"):
        raise AdapterFileError(
            f"{path} is not the template that the adapter was trained with ({RENDERING_FILE} has another SHA-256). "
            "Put the old file back; or, if you mean to answer with another template than was trained, remove "
            f"{RENDERING_FILE}."
        )
    return text


def _different(folders: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{listing(folders)} were trained with different chat templates, so no prompt would fit all of them. If you "
        f"know better, remove {RENDERING_FILE} and {TEMPLATE_FILE} from all but one."
    )


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(text.encode("utf-8"))
    part.replace(path)


def tokens_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies how a tokenizer cuts text: SHA-256 of the tokens of a fixed one."""
    return _sha256(json.dumps(tokenizer(_PROBE, add_special_tokens=True)["input_ids"]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
