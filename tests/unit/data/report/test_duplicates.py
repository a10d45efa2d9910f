"""Near duplicates: every pair within the bounds is found, and no other."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.report.duplicates import _BLOCKS, fingerprint, group
from tests.unit.data.report.pictures import jpeg, opened, picture


def near(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """bool [n, n], of all pairs, one by one."""
    n = len(hashes)
    found = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            bits = (int(hashes[i]) ^ int(hashes[j])).bit_count()
            apart = [abs((int(colours[i]) >> shift & 255) - (int(colours[j]) >> shift & 255)) for shift in (0, 8, 16)]
            found[i, j] = bits <= 3 and max(apart) <= 10
    return found


def closed(pairs: np.ndarray) -> list[int]:
    """The first of each one's group."""
    reached = pairs.astype(int)
    while ((wider := (reached @ reached > 0).astype(int)) != reached).any():
        reached = wider
    return [int(row.argmax()) for row in reached]


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 1 << 64, 25, np.uint64)
    flips = (rng.random((150, 64)) < rng.choice([0.0, 0.02, 0.04, 0.06], (150, 1))).astype(np.uint64)
    hashes = centres[rng.integers(0, 25, 150)] ^ (flips << np.arange(64, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    hashes[:20] = 0  # flat images: only their colours tell them apart
    channels = rng.choice([20, 26, 36, 200], (150, 3))
    colours = (channels << [16, 8, 0]).sum(axis=1).astype(np.uint32)
    colours[60:] = colours[60]
    pairs = near(hashes, colours)
    assert 150 < pairs.sum() < 150**2 / 2, "some are near, and some are not"
    assert group(hashes, colours).tolist() == closed(pairs)


def test_the_blocks_are_the_whole_hash() -> None:
    assert sum(_BLOCKS) == (1 << 64) - 1
    assert group(np.empty(0, np.uint64), np.empty(0, np.uint32)).tolist() == []


def test_a_thousand_copies_cost_no_million_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    count = np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda bits: compared.append(len(bits)) or count(bits))
    assert set(group(np.full(3000, 7, np.uint64), np.full(3000, 7, np.uint32)).tolist()) == {0}
    assert sum(compared) == 0


def test_copies_that_were_resaved_or_resized_and_others() -> None:
    originals = [picture(seed, (160, 120)) for seed in range(12)]
    copies = [opened(jpeg(image, 40)) for image in originals]
    copies += [image.resize((96, 72), Image.Resampling.BICUBIC) for image in originals]
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in originals]
    hashes, colours = zip(*map(fingerprint, [*originals, *copies, *mirrored]), strict=True)
    found = group(np.array(hashes, np.uint64), np.array(colours, np.uint32)).tolist()
    assert found == [*range(12), *range(12), *range(12), *range(36, 48)]


def test_noise_of_compression_on_a_flat_background_is_not_seen() -> None:
    drawing = Image.new("RGB", (32, 32), "orange")
    ImageDraw.Draw(drawing).ellipse((8, 6, 25, 22), fill="white", outline="black")
    one, other = fingerprint(drawing)[0], fingerprint(opened(jpeg(drawing, 75)))[0]
    assert (one ^ other).bit_count() <= 3
