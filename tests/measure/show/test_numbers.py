import math

import pytest
import yaml

from sparity.measure.data.report import Spread
from sparity.measure.show import numbers


@pytest.mark.parametrize(("fraction", "text"), [(0.5017, "50.2 %"), (0, "0.0 %"), (-0.0001, "0.0 %"), (1, "100.0 %")])
def test_percent(fraction, text):
    assert numbers.percent(fraction) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.162, "+16.2 %"),
        (-0.004, "-0.4 %"),
        (-0.0001, "+0.0 %"),
        (2.4, "+240.0 %"),
        (123.0, "124x"),
        (7.7e7, "7.7e7x"),
        (math.inf, "inf"),
    ],
)
def test_change(fraction, text):
    assert numbers.change(fraction) == text


@pytest.mark.parametrize(
    ("value", "text"), [(13.07, "13.07"), (1620.4, "1,620"), (1e9, "1.0e9"), (math.inf, "inf"), (math.nan, "nan")]
)
def test_perplexity(value, text):
    assert numbers.perplexity(value) == text


@pytest.mark.parametrize(("value", "text"), [(9.124, "9.12"), (11.92, "11.9"), (1234.5, "1,234")])
def test_rate_has_three_significant_digits(value, text):
    assert numbers.rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0085, "8.5 ms"),
        (0.85, "850 ms"),
        (12.34, "12.3 s"),
        (725, "12 min 05 s"),
        (3599.9, "1 h 00 min"),
        (12000, "3 h 20 min"),
        (math.inf, "inf s"),
    ],
)
def test_seconds(value, text):
    assert numbers.seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (988_097_824, "988.1 MB"), (999_960_000, "1.0 GB"), (2.5e12, "2.5 TB")]
)
def test_size(count, text):
    assert numbers.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12_345, "12,345"), (494_032_768, "494.0 million"), (999_999_999, "1.0 billion"), (1_100_000_000, "1.1 billion")],
)
def test_amount(count, text):
    assert numbers.amount(count) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Spread(0.87, 0.85, 0.9), "0.87x, slower"),
        (Spread(1.31, 1.29, 1.34), "1.31x, faster"),
        (Spread(0.87, 0.85, 1.01), "0.87x, on par"),
        (Spread(1.2, 0.99, 1.3), "1.20x, on par"),
        (Spread(0.998, 0.997, 0.999), "1.00x, on par"),
    ],
)
def test_a_ratio_is_called_faster_or_slower_only_when_every_round_says_so(ratio, text):
    assert numbers.speed_ratio(ratio) == text


def test_spread():
    assert numbers.spread(Spread(9.12, 8.8, 9.4), numbers.rate) == "9.12 [8.80-9.40]"


def test_recipe_keeps_its_order_and_values():
    recipe = {"stages": [{"prune": {"score": "wanda", "block": (16, 16)}}], "accept": {"perplexity": "+5%"}}
    text = numbers.recipe_yaml(recipe)
    assert text.startswith("stages:")
    assert yaml.safe_load(text) == {
        "stages": [{"prune": {"score": "wanda", "block": [16, 16]}}],
        "accept": {"perplexity": "+5%"},
    }


@pytest.mark.parametrize(
    ("value", "text"), [(4.0, "4 bits"), (1.0, "1 bit"), (4.5, "4.5 bits"), (4.571, "4.57 bits"), (16, "16 bits")]
)
def test_bits(value, text):
    assert numbers.bits(value) == text


def test_shares_have_a_line_each():
    assert numbers.shares(0.5, None, None) == "50.0 %"
    assert numbers.shares(0.0, 0.75, None) == "0.0 %\n75.0 % left"
    assert numbers.shares(0.5, 0.75, 0.398) == "50.0 %\n75.0 % left\n39.8 % skipped"
