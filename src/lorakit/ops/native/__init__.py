"""The compiled products for the CPU: optional, built on request, and equal to the plain operations.

| file | holds |
|---|---|
| `products.cpp` | the loops; they know neither torch nor threads |
| `low_rank.cpp` | what of torch they are run on, in which threads, and the derivative |
| `nf4.cpp` | the decoding of NF4, loops and threads |
| `build.py` | making a library of them and putting it into the user's cache |
| `check.py` | whether a library computes what it should |
| `load.py` | finding and loading it; `product` is what `add_low_rank` calls, `decode_nf4` what `NF4` does |
"""
