import dataclasses
import math

import pytest

from htr_pipeline.core.config import UserError, config, setting


@config("training")
class Settings:
    max_epochs: int = setting(default=30, minimum=1)
    learning_rate: float = setting(default=1e-3, minimum=0.0, maximum=1.0)
    optimiser: str = setting(default="adam", choices=("adam", "sgd"))
    tolerance: float = setting(default=1.0)
    mixed_precision: bool = setting(default=False)
    patience_epochs: int | None = setting(default=None, minimum=1)
    splits: list[str] = setting(default=["train"])
    shares: dict[str, float] = setting(default={})


def test_defaults_hold_where_nothing_is_given():
    settings = Settings(max_epochs=5)
    assert (settings.max_epochs, settings.learning_rate, settings.patience_epochs) == (5, 1e-3, None)


def test_settings_are_frozen_and_do_not_share_their_defaults():
    first, second = Settings(), Settings()
    first.splits.append("test")
    assert second.splits == ["train"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.max_epochs = 3


def test_values_at_the_limits_and_whole_numbers_for_floats_are_allowed():
    settings = Settings(max_epochs=1, learning_rate=1, patience_epochs=1, optimiser="sgd", shares={"train": 0.8})
    assert settings.learning_rate == 1


def test_misspelt_key_is_named_with_the_one_that_was_meant():
    with pytest.raises(UserError, match=r"training\.max_epoch = 5: .*Did you mean training\.max_epochs\?.*Allowed: "):
        Settings(max_epoch=5)


def test_unknown_key_without_a_likeness_lists_what_is_allowed():
    with pytest.raises(UserError, match=r"training\.zzz = 1: there is no such setting\. Allowed: .*learning_rate, "):
        Settings(zzz=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_epochs": 0}, r"training\.max_epochs = 0: expected a whole number of at least 1\."),
        ({"max_epochs": 2.5}, r"training\.max_epochs = 2\.5: expected a whole number"),
        ({"max_epochs": "5"}, r"training\.max_epochs = '5': expected a whole number"),
        ({"max_epochs": True}, r"training\.max_epochs = True: expected a whole number"),
        ({"max_epochs": None}, r"training\.max_epochs = None: expected a whole number"),
        ({"learning_rate": 1.5}, r"training\.learning_rate = 1\.5: expected a number from 0\.0 to 1\.0\."),
        ({"learning_rate": float("nan")}, r"training\.learning_rate = nan: expected a finite number"),
        ({"tolerance": math.inf}, r"training\.tolerance = inf: expected a finite number\."),
        ({"optimiser": "adma"}, r"training\.optimiser = 'adma': expected one of 'adam', 'sgd'\."),
        ({"mixed_precision": 1}, r"training\.mixed_precision = 1: expected true or false\."),
        ({"patience_epochs": 0}, r"training\.patience_epochs = 0: expected a whole number or null of at least 1\."),
        ({"splits": "train"}, r"training\.splits = 'train': expected a list\."),
        ({"shares": [0.8]}, r"training\.shares = \[0\.8\]: expected a mapping\."),
    ],
)
def test_wrong_value_is_named_with_what_is_expected(values, message):
    with pytest.raises(UserError, match=message):
        Settings(**values)


def test_all_mistakes_are_reported_together():
    with pytest.raises(UserError) as caught:
        Settings(max_epochs=0, optimiser="x", epochs=3)
    assert len(str(caught.value).splitlines()) == 3


def test_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
