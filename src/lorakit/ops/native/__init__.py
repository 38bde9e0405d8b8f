"""The compiled products for the CPU: optional, built on request, and equal to the plain operations.

| file | holds |
|---|---|
| `products.cpp` | the loops; they know neither torch nor threads |
| `low_rank.cpp` | what of torch they are run on, in which threads, and the derivative |
| `layer.cpp` | the same from a layer's hook in the usual case, without Python's functions between |
| `vectors.h`, `tiles.h` | vectors as wide as the processor has, and tiles of a matrix product |
| `decoder.cpp`, `decoder.py` | one step of a decoder of the Llama kind, each row with its own adapter: for serving |
| `patches.h`, `team.h` | what adapters add to a tile of that step, and how its threads share the work |
| `pages.py` | memory in large pages, where that step's weights lie |
| `training.cpp`, `attention.h`, `training.py` | norms, gates, attention, losses and their derivatives: for training |
| `on_tensors.h` | the loops on torch's tensors, in its threads |
| `lookup.cpp` | the change of an embedding table, and its derivative |
| `nf4.cpp` | the decoding of NF4, loops and threads |
| `build.py` | making a library of them and putting it into the user's cache |
| `check.py` | whether a library computes what it should |
| `load.py` | finding and loading it; `product`, `layer` and `decode_nf4` are what is called |
"""
