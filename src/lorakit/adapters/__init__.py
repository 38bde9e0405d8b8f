"""Adapters as data: what can be said of one, and made of several, with no model in memory."""

from lorakit.adapters.amplification import Amplification, amplification
from lorakit.adapters.analysis import Analysis, analyse
from lorakit.adapters.beside import Beside, beside
from lorakit.adapters.checkpoints import Extracted, from_checkpoints
from lorakit.adapters.combine import WAYS, combine, negated, scaled
from lorakit.adapters.compare import Comparison, Likeness, compare, orthogonalised
from lorakit.adapters.fit import Fitted, Residual, energy_rank
from lorakit.adapters.ranks import Ranks, choose_ranks
from lorakit.adapters.resize import resize
from lorakit.adapters.search import Searched, search_weights
from lorakit.adapters.spectrum import Spectrum, spectrum
from lorakit.adapters.subspaces import Similarity, similarity, subspace_similarity
from lorakit.adapters.truncate import truncate

__all__ = [
    "WAYS",
    "Amplification",
    "Analysis",
    "Beside",
    "Comparison",
    "Extracted",
    "Fitted",
    "Likeness",
    "Ranks",
    "Residual",
    "Searched",
    "Similarity",
    "Spectrum",
    "amplification",
    "analyse",
    "beside",
    "choose_ranks",
    "combine",
    "compare",
    "energy_rank",
    "from_checkpoints",
    "negated",
    "orthogonalised",
    "resize",
    "scaled",
    "search_weights",
    "similarity",
    "spectrum",
    "subspace_similarity",
    "truncate",
]
