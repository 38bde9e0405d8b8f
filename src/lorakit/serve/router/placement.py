"""Which replica answers for which adapter: rendezvous hashing with bounded loads.

Every pair of a key and a replica has a score; a key belongs to the replica where its score is highest (Thaler and
Ravishankar 1998). When a replica goes, its keys alone move, and to different others; when it is back, they come back.
A replica that has more than its share in hand passes new requests on to the key's next best replica (the bound of
Mirrokni, Thorup and Zadimoghaddam 2018), so that one hot adapter is answered by several.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

OVER_MEAN = 1.25
"""A replica takes up to this many times the mean of the requests in hand."""

AT_LEAST = 4
"""It takes this many in any case: a few requests share their steps, and moving one of them would win nothing."""


def rendezvous(key: str, replicas: Iterable[int]) -> list[int]:
    """The replicas from a key's best to its worst; the same on every machine and in every run."""

    def score(replica: int) -> bytes:
        return hashlib.blake2b(f"{replica}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    return sorted(replicas, key=score, reverse=True)


def bound(in_hand: int, replicas: int) -> int:
    """The most requests in hand at a replica that still gets another one.

    Args:
        in_hand: Requests in hand at all replicas, without the one to be placed.
        replicas: How many take requests.
    """
    return max(AT_LEAST, math.ceil(OVER_MEAN * (in_hand + 1) / replicas))


def preference(key: str | None, loads: Mapping[int, int]) -> list[int]:
    """The replicas in the order in which they should be asked.

    Args:
        key: What the request needs in memory; None if every replica has it, so that the idlest is the best.
        loads: Requests in hand by replica, of those that take requests.
    """
    if key is None:
        return sorted(loads, key=lambda replica: (loads[replica], replica))
    if not loads:
        return []
    most = bound(sum(loads.values()), len(loads))
    return sorted(rendezvous(key, loads), key=lambda replica: loads[replica] >= most)  # stable: best first
