"""``lorakit sign`` and ``lorakit verify``: who vouches for an adapter, and whether it is still what was signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sign_command(
    directory: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    key: Annotated[Path, typer.Option("--key", help="The private key, an Ed25519 key in PEM.")],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make the key first; the file must not exist.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="The base model that it is for: a folder, a weight file or a built-in name."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Sign an adapter: write lorakit-manifest.json with a SHA-256 of each of its files and an Ed25519 signature.

    With --base, the digest of that model's weights is signed too, and a server with other weights refuses the adapter.
    The public key that is printed goes into the file of trusted keys of who serves the adapter. Needs 'lorakit[sign]'.

    [bold]Examples[/bold]

        lorakit sign runs/sql/adapter --key me.pem --new-key
        lorakit sign runs/sql/adapter --key me.pem --base smollm2
    """
    from lorakit.cli.output import say_json, say_pairs
    from lorakit.serve.manifest import MANIFEST, make_key, sign

    base_digest, base_name = _base(base)
    if new_key:
        make_key(key)
    manifest = sign(directory, key, base_digest=base_digest, base_name=base_name)
    if as_json:
        say_json({"manifest": str(directory / MANIFEST), **manifest.to_json()})
        return
    pairs = [
        ("files", ", ".join(sorted(manifest.files))),
        ("base", f"{base_name} ({base_digest})" if base_digest else "any (give --base to sign for one)"),
        ("signed at", manifest.signed_at),
        ("public key", manifest.key),
    ]
    say_pairs(f"{directory / MANIFEST} was written", pairs)


def verify_command(
    directory: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    trusted: Annotated[
        Path, typer.Option("--trusted", help="The trusted public keys, a line each: ed25519:... and a name.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Also check that it was signed for this base model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check that a trusted key signed an adapter, and that its files are what was signed. Exit code 2 if not.

    [bold]Examples[/bold]

        lorakit verify adapters/sql --trusted keys.txt
        lorakit verify adapters/sql --trusted keys.txt --base smollm2
    """
    from lorakit.cli.output import say_json, say_pairs
    from lorakit.errors import AdapterBaseMismatchError
    from lorakit.serve.manifest import TrustedKeys, uncovered_files, verify_files

    keys = TrustedKeys.read(trusted)
    manifest = verify_files(directory, keys)
    digest, _ = _base(base)
    if digest is not None and manifest.base_digest != digest:
        signed_for = f"the base with digest {manifest.base_digest}" if manifest.base_digest else "no base"
        raise AdapterBaseMismatchError(
            f"{directory} was signed for {signed_for}; {base} has the digest {digest}."
        )
    loose = uncovered_files(directory, manifest)
    if as_json:
        signer = keys.keys[manifest.key]
        say_json({"verified": True, "signer": signer, "uncovered": loose, **manifest.to_json()})
        return
    pairs = [
        ("signed by", f"{keys.keys[manifest.key]}, {manifest.signed_at}"),
        ("files", ", ".join(sorted(manifest.files))),
    ]
    if manifest.base_digest:
        pairs.append(("base", f"{manifest.base_name} ({manifest.base_digest})"))
    if loose:
        pairs.append(("not covered", f"{', '.join(loose)}: added after signing, and never read by a server"))
    say_pairs(f"{directory} is what was signed", pairs)


def _base(name: str | None) -> tuple[str | None, str | None]:
    """The digest of a base's weights, and its name."""
    if name is None:
        return None, None
    from lorakit.errors import ConfigError
    from lorakit.models import resolve
    from lorakit.serve.base_facts import digest_of_weights

    if Path(name).is_file():
        return digest_of_weights(name), Path(name).name
    found = resolve(name)
    if found.path is None:
        raise ConfigError(f"{name!r} is not on this disk. Download it and give its folder.")
    return digest_of_weights(found.path), found.name
