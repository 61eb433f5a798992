"""The order of the samples: a pure function of (seed, position), with no memory of what came before."""

import hashlib
import struct

import numpy as np

ROUNDS = 6  # of the Feistel network; four already look random, two more are free beside reading the data


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, independent of those for any other purpose or seed.

    `purpose` names what is drawn, for example ("dropout", step, micro_batch).
    """
    text = repr((seed, *purpose)).encode()
    (number,) = struct.unpack("<Q", hashlib.blake2b(text, digest_size=8).digest())
    return int(number >> 1)


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each of `positions` (int64, in [0, size)) goes under the permutation of [0, size) named by `key`.

    A balanced Feistel network over the next power of four, walked until it lands inside (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002, the cycle-walking cipher). Needs no memory proportional to
    `size`; each position costs at most four walks on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(derive_seed(key, "feistel", r)) for r in range(ROUNDS)]
    places = _feistel(positions.astype(np.uint64), half, round_keys)
    while (outside := places >= size).any():
        places[outside] = _feistel(places[outside], half, round_keys)
    return places.astype(np.int64)


def _feistel(values: np.ndarray, half: int, round_keys: list[np.uint64]) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << np.uint64(half)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
