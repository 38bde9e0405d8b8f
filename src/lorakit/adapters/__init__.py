"""Adapters as data: what can be said of one with no model in memory."""

from lorakit.adapters.spectrum import Spectrum, spectrum

__all__ = ["Spectrum", "spectrum"]
