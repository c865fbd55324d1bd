import numpy as np

from htr_pipeline.core.augmentation import AugmentationConfig, augment_line, augmented_width
from htr_pipeline.core.image import ImageConfig, normalise_line
from tests.core.test_image import strokes

PIXELS = normalise_line(strokes(), ImageConfig()).pixels


def augmented(seed, **settings):
    return augment_line(PIXELS, np.random.default_rng(seed), AugmentationConfig(**settings))


def test_the_same_seed_distorts_alike_and_another_does_not():
    assert np.array_equal(augmented(1), augmented(1))
    assert augmented(1).shape != augmented(2).shape or not np.array_equal(augmented(1), augmented(2))


def test_height_stays_and_width_within_its_bounds():
    shapes = [augmented(seed, shear=0.0).shape for seed in range(50)]
    assert {height for _, height in shapes} == {64}
    widths = np.array([width for width, _ in shapes]) / PIXELS.shape[0]
    assert widths.min() >= 0.84
    assert widths.max() <= 1.16


def test_the_width_is_known_beforehand():
    for seed in range(20):
        config = AugmentationConfig(enabled=seed % 4 > 0)
        width = augmented_width(*PIXELS.shape, np.random.default_rng(seed), config)
        assert width == augment_line(PIXELS, np.random.default_rng(seed), config).shape[0]


def test_no_ink_is_lost_at_the_ends():
    for seed in range(20):
        distorted = augmented(seed, stroke_probability=0.0, noise=0.0, ink_gain=0.0, waviness=0.0, rotation_degrees=0.0)
        assert distorted[0].max() <= 60
        assert distorted[-1].max() <= 60


def test_elastic_distortion_moves_letters_against_each_other():
    still = {"width_scale": 0.0, "height_scale": 0.0, "shear": 0.0, "rotation_degrees": 0.0, "waviness": 0.0}
    plain = {**still, "stroke_probability": 0.0, "ink_gain": 0.0, "noise": 0.0}
    assert np.array_equal(augmented(1, **plain, elastic=0.0), PIXELS)
    moved = augmented(1, **plain, elastic=0.2)
    assert moved.shape == PIXELS.shape
    assert not np.array_equal(moved, PIXELS)
    # No shift of the line as a whole brings the old picture back.
    assert all(np.abs(np.roll(moved, shift, axis=0).astype(int) - PIXELS).max() > 40 for shift in range(-4, 5))


def test_switched_off_nothing_changes():
    assert augmented(1, enabled=False) is PIXELS


def test_in_the_last_fifth_of_training_all_distortions_are_weaker():
    config = AugmentationConfig(shear=0.2, final_strength=0.5)
    assert config.at(0.79) == config
    late = config.at(0.8)
    assert (late.shear, late.noise, late.enabled) == (0.1, 0.02, True)
    still = AugmentationConfig(final_strength=0.0).at(1.0)
    assert np.array_equal(augment_line(PIXELS, np.random.default_rng(1), still), PIXELS)
