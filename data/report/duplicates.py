"""Near-duplicate images, by a perceptual hash of 64 bits (dHash: whether it gets brighter from one cell of a 9 x 8 grid
to the next) and the mean colour.

Two images are near duplicates where at most 3 bits of their hashes differ and their mean colours are alike. All such
pairs are found: of the 6 blocks into which a hash is cut, 3 differing bits leave at least 3 as they are, so each pair
is seen when the hashes are sorted by the right 3 blocks, of which there are 20 choices (Manku, Jain, Das Sarma,
"Detecting near-duplicates for web crawling", WWW 2007). Memory: about 70 bytes for each image.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from PIL import Image

HASH_SIDE = 64  # pixels of the shorter side from which a hash can be taken
BITS = 3  # that may differ
_COLOUR = 10  # of 255, by which each of red, green and blue of the mean may differ
_BRIGHTER = (
    3  # of 255, by which a cell must be brighter: less is noise of the compression, on a flat background above all
)
_BLOCKS = [(1 << high) - (1 << low) for low, high in ((0, 11), (11, 22), (22, 33), (33, 44), (44, 54), (54, 64))]


def fingerprint(image: Image.Image) -> tuple[int, int]:
    """(dHash, 64 bits; the mean colour, 0xRRGGBB) of an RGB image."""
    grid = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    bits = np.packbits(np.diff(grid, axis=1) > _BRIGHTER)
    red, green, blue = image.resize((1, 1), Image.Resampling.BOX).tobytes()
    return int.from_bytes(bits.tobytes(), "big"), red << 16 | green << 8 | blue


def group(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Groups of near duplicates, closed under chains of them. hashes: uint64 [n]; colours: uint32 [n], 0xRRGGBB.

    -> int64 [n]: the first image of each one's group, its own number where it has no near duplicate.
    """
    order = np.lexsort((colours, hashes))  # equal ones are joined first: a thousand copies are no million pairs
    same = (np.diff(hashes[order]) == 0) & (np.diff(colours[order].astype(np.int64)) == 0)
    kind = np.concatenate([[0], np.cumsum(~same)]) if len(order) else np.empty(0, np.int64)
    firsts = order[np.flatnonzero(np.diff(kind, prepend=-1))]  # lexsort is stable: of equal ones the first
    kind_of = np.empty_like(order)
    kind_of[order] = kind
    labels = _joined(hashes[firsts], colours[firsts].astype(np.int64))
    least = np.full(len(firsts), len(hashes))
    np.minimum.at(least, labels, firsts)
    return least[labels[kind_of]]


def _joined(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """int64 [n]: a number that all of a group have, of images that are all different."""
    labels = np.arange(len(hashes))
    for blocks in combinations(_BLOCKS, 3):
        keys = hashes & np.uint64(sum(blocks))
        order = np.argsort(keys)
        keys = keys[order]
        distance, at = 1, np.arange(len(keys) - 1)
        while len(at := at[: np.searchsorted(at, len(keys) - distance)]):
            at = at[keys[at] == keys[at + distance]]  # sorted: where these differ, so do those farther away
            one, other = order[at], order[at + distance]
            near = (np.bitwise_count(hashes[one] ^ hashes[other]) <= BITS) & _alike(colours[one], colours[other])
            _join(labels, one[near], other[near])
            distance += 1
    return labels


def _alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    channels = [(one >> shift & 255) - (other >> shift & 255) for shift in (0, 8, 16)]
    return np.abs(channels).max(axis=0, initial=0) <= _COLOUR


def _join(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Give each pair one label, in place. labels: each the label of itself."""
    while len(apart := np.flatnonzero(labels[one] != labels[other])):
        a, b = labels[one[apart]], labels[other[apart]]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        while (labels != (next_labels := labels[labels])).any():
            labels[:] = next_labels
