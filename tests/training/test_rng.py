"""Addresses of random numbers: fixed for ever, and none shared."""

from training.rng import IMAGE, MIXING, TRANSFORM, generator


def test_numbers_at_an_address_never_change():
    """Every pre-trained model and every resumed run rests on them."""
    assert generator(IMAGE, 0, 1, 2, 3).random(3).tolist() == [
        0.5431732740536501,
        0.44980680543485163,
        0.2829482195664563,
    ]
    assert generator(TRANSFORM, 2**64 - 1, 5).integers(1000, size=3).tolist() == [838, 536, 839]


def test_every_word_of_the_address_counts():
    addresses = [(TRANSFORM, 0), (MIXING, 0), (TRANSFORM, 1), (TRANSFORM, 0, 1), (TRANSFORM, 0, 0, 1)]
    addresses += [(TRANSFORM, 0, 0, 0, 1), (TRANSFORM, 0, 2**63), (TRANSFORM, -1)]
    streams = [generator(*address).random(1000) for address in addresses]
    numbers = {number for stream in streams for number in stream}
    assert len(numbers) == 1000 * len(addresses)
