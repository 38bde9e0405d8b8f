"""Loads and engines of the serving benchmarks: the same requests, in the same order, for everybody."""
