"""Random numbers as a function of names."""

import numpy as np

from train.util import seeding


def test_generators_of_equal_keys_are_equal_and_others_differ():
    def draw(*key):
        return seeding.generator(*key).random(1000)

    assert np.array_equal(draw(1, "init", "a"), draw(1, "init", "a"))
    for other in ((2, "init", "a"), (1, "mask", "a"), (1, "init", "b")):
        assert abs(np.corrcoef(draw(1, "init", "a"), draw(*other))[0, 1]) < 0.1


def test_seeds_equal_those_of_earlier_versions():
    # a change here is a change of every run's weights and samples
    drawn = seeding.generator(0, "init", "backbone.embed.weight")
    assert drawn.standard_normal(3, np.float32).tolist() == [
        0.6433622241020203,
        -0.006798960268497467,
        0.3580714762210846,
    ]
