"""Rows of whatever a split names: a file, every file of a folder, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lorakit.errors import DataError, MissingDependencyError, listing
from lorakit.train.data_sections import TableFormat, TextRows
from lorakit.train.data_source import HubSplit
from lorakit.train.tables import ENDINGS, Place, Row, ending_of, file_rows


def source_rows(
    source: Path | HubSplit,
    kind: TableFormat = "auto",
    most: int | None = None,
    *,
    texts: TextRows | None = None,
    setting: str = "data.format",
) -> Iterator[Row]:
    """The rows of a split, each with its place.

    Args:
        source: What the recipe names. Of a folder the files are read in the order of their names; those whose ending
            tells nothing, such as a README, are left alone.
        kind: How files are written; ``auto`` tells by their endings.
        most: Read only so many rows.
        texts: What a row of a plain text file is; None where plain text is of no use.
        setting: The key of the recipe that names the kind, for messages.

    Raises:
        DataError: Something is missing, empty, cut off or malformed.
        ConfigError: The ending of a file tells nothing.
        MissingDependencyError: Parquet needs pyarrow, the hub needs datasets.
    """
    if isinstance(source, HubSplit):
        return islice(_hub(source), most)
    if source.is_dir():
        return islice(_folder(source, kind, texts, setting), most)
    return file_rows(source, _kind(source, kind, texts), most, texts=texts or "paragraph", setting=setting)


def _kind(path: Path, kind: TableFormat, texts: TextRows | None) -> TableFormat:
    return "txt" if kind == "auto" and texts is not None and ending_of(path) == ".txt" else kind


def _folder(folder: Path, kind: TableFormat, texts: TextRows | None, setting: str) -> Iterator[Row]:
    known = {*ENDINGS, *([".txt"] if texts is not None else [])}
    inside = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [path for path in inside if kind != "auto" or ending_of(path) in known]
    if not files:
        found = f"It holds {listing([path.name for path in inside])}." if inside else "It is empty."
        raise DataError(f"The folder {folder} holds no data files ({listing(sorted(known))}). {found}")
    for path in files:
        yield from file_rows(path, _kind(path, kind, texts), texts=texts or "paragraph", setting=setting)


def _hub(source: HubSplit) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {source} needs datasets. Install it with: pip install 'lorakit[data]'"
        ) from error
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision
        )
    except Exception as error:  # its errors have no common root, and come from several libraries
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise DataError(
            f"{source} could not be loaded from the hub: {reason}. Check the name, the split and the network; or "
            "download the files and name their folder."
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    if not len(loaded):
        raise DataError(f"{source} is empty: it has no rows.")
    return ((Place(str(source), "row", number), dict(row)) for number, row in enumerate(loaded, 1))
