"""Other programs' adapter files: kohya, LyCORIS, diffusers, cloneofsimo, loralib, GGUF. One table of them."""

from lorakit.io.formats.convert import FORMATS, Converted, convert, read_any, write_as
from lorakit.io.formats.format import Format, Hints, Written
from lorakit.io.formats.names import Names, read_names

__all__ = [
    "FORMATS",
    "Converted",
    "Format",
    "Hints",
    "Names",
    "Written",
    "convert",
    "read_any",
    "read_names",
    "write_as",
]
