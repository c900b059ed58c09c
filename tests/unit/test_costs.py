"""Dollars, energy and CO2: identities by property, one published footprint, and no figure without a date."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.catalogue import read_data
from estimator.describe.checks import ConfigError
from estimator.hardware.accelerators import Accelerator, accelerator, accelerators
from estimator.pricing.money import KINDS, cost, price_range, prices

PRICED = [id_ for id_ in accelerators() if price_range(id_)]
POWERED = [id_ for id_ in accelerators() if accelerator(id_).power]
seconds_st = st.floats(0, 1e9)
DATE = re.compile(r"20\d\d(-(0[1-9]|1[0-2])(-[0-3]\d)?)?")


def test_nothing_is_undated_or_without_a_source():
    data = read_data("prices")
    for entry in data["price"]:
        assert DATE.fullmatch(entry["date"])
        assert entry["accelerator"] in accelerators()
        assert entry["kind"] in KINDS
        assert 0.05 < entry["usd_per_hour"] < 50
        assert entry["verified"] == (entry["source"] != "recalled")
    assert {entry["source"] for entry in data["price"]} == set(data["source"])
    for table in read_data("energy").values():
        assert table["default"] in table
        for name, entry in table.items():
            if name != "default":
                assert DATE.fullmatch(entry["date"])
                assert entry["source"]
                assert isinstance(entry["verified"], bool)


def test_prices_as_their_sources_say():
    aws = next(p for p in prices("h100 sxm", "on-demand") if p.provider == "aws")
    assert (aws.usd_per_hour, aws.date, aws.count) == (6.88, "2026-11-09", 8)  # $55.04 for the 8 of a p5.48xlarge
    assert aws.usd_per_hour * aws.count == pytest.approx(55.04)
    assert [p.usd_per_hour for p in prices("tpu v5e")] == [1.2]
    assert prices("apple-m3-max-128gb") == ()


@given(st.sampled_from(accelerators()), st.sampled_from(KINDS))
def test_prices_are_sorted_and_split_by_kind(id_, kind):
    every = prices(id_)
    assert [p.usd_per_hour for p in every] == sorted(p.usd_per_hour for p in every)
    assert set(prices(id_, kind)) == {p for p in every if p.kind == kind}
    found = price_range(id_, kind)
    if found is None:
        assert not any(p.verified for p in prices(id_, kind))
    else:
        (asked, used) = found
        assert asked.low <= asked.median <= asked.high
        assert all(p.verified and p in prices(id_, kind) for p in used)
        assert {p.provider for p in used} == {p.provider for p in prices(id_, kind) if p.verified}


def test_of_each_offer_only_the_newest_price_counts():
    _, used = price_range("h100 sxm")
    secure = [p for p in used if (p.provider, p.offer) == ("runpod", "secure")]
    assert [(p.date, p.usd_per_hour) for p in secure] == [("2026-11-09", 3.99)]
    assert len([p for p in prices("h100 sxm") if (p.provider, p.offer) == ("runpod", "secure")]) == 2


def test_a_recalled_price_is_listed_and_not_used():
    recalled = [p for p in prices("h200 sxm") if not p.verified]
    assert recalled
    assert not set(recalled) & set(price_range("h200 sxm")[1])


@given(st.sampled_from(PRICED), seconds_st, st.integers(1, 100_000))
def test_every_figure_is_proportional_to_time_and_count(id_, seconds, count):
    one, many = cost(id_, 3600), cost(id_, seconds, count)
    scale = count * seconds / 3600
    assert many.accelerator_hours == pytest.approx(scale)
    assert many.dollars.low <= many.dollars.median <= many.dollars.high
    for part in ("low", "median", "high"):
        assert getattr(many.dollars, part) == pytest.approx(getattr(one.dollars, part) * scale)
    if accelerator(id_).power:
        assert many.energy_joules == pytest.approx(one.energy_joules * scale)
        assert many.co2_kg == pytest.approx(one.co2_kg * scale)
    assert not many.missing or "power" in many.missing[0]


@given(
    id_=st.sampled_from(POWERED),
    seconds=st.floats(1, 1e8),
    utilisation=st.floats(0.01, 1),
    server=st.floats(1, 3),
    pue=st.floats(1, 3),
    grid=st.floats(0, 1.5),
    price=st.floats(0, 100),
)
def test_the_users_own_numbers_are_taken_as_they_are(*, id_, seconds, utilisation, server, pue, grid, price):
    c = cost(id_, seconds, 3, price=price, utilisation=utilisation, server=server, pue=pue, grid=grid)
    assert c.dollars.low == c.dollars.median == c.dollars.high == pytest.approx(3 * seconds / 3600 * price)
    watts = accelerator(id_).power * utilisation * server * pue
    assert c.kilowatt_hours == pytest.approx(3 * seconds / 3600 * watts / 1000)
    assert c.co2_kg == pytest.approx(c.kilowatt_hours * grid)
    assert (c.prices, c.missing) == ((), ())
    assert all(said.endswith("(given)") for said in c.assumptions)


@given(st.sampled_from(POWERED), st.floats(1, 2), st.floats(0, 1))
def test_energy_rises_with_every_factor(id_, factor, grid):
    base = cost(id_, 3600, pue=1.2, utilisation=0.4, server=1.5, grid=grid)
    for change in ({"pue": 1.2 * factor}, {"utilisation": 0.4 * factor}, {"server": 1.5 * factor}):
        given_ = {"pue": 1.2, "utilisation": 0.4, "server": 1.5, "grid": grid, **change}
        assert cost(id_, 3600, **given_).energy_joules == pytest.approx(base.energy_joules * factor)


# Touvron et al. 2023, "LLaMA", table 15: 1,022,362 A100-80GB hours at 400 W, PUE 1.1, 0.385 kg/kWh: 449 MWh and 173 t.
def test_llama_65b_as_published():
    c = cost(
        "a100-80gb-sxm",
        1_022_362 * 3600,
        utilisation="rated",
        server="accelerators-only",
        pue=1.1,
        grid=0.385,
    )
    assert c.kilowatt_hours / 1000 == pytest.approx(449, abs=1)
    assert c.co2_kg / 1000 == pytest.approx(173, abs=0.5)


# A node of 8 H100 under heavy training drew 76 % of its 10.2 kW (arXiv:2506.14551): the defaults say the same.
def test_the_defaults_reproduce_the_measured_node():
    c = cost("h100 sxm", 3600, 8, pue="none")
    assert c.kilowatt_hours == pytest.approx(0.76 * 10.2, rel=1e-3)


def test_the_defaults_are_said_with_their_date():
    c = cost("h100 sxm", 3600)
    said = " ".join(c.assumptions)
    for part in ("utilisation = 0.76 (training, 2025:", "pue = 1.54 (industry, 2025:", "grid = 0.445 (world, 2024:"):
        assert part in said
    assert (c.utilisation, c.pue, c.grid) == (0.76, 1.54, 0.445)
    assert cost("h100 sxm", 3600, pue="aws", grid="france").co2_kg < c.co2_kg


def test_a_missing_price_is_said_and_never_guessed():
    c = cost("rtx-3090", 3600)
    assert c.dollars is None
    assert c.missing == (
        "dollars: no on-demand price is on file for rtx-3090-24gb; on file are prices of the kinds marketplace",
    )
    assert cost("rtx-3090", 3600, price="marketplace").dollars.median == 0.18
    assert "give your own" in cost("gb200", 3600).missing[0]
    assert "no spot price" in cost("gb200", 3600, price="spot").missing[0]
    own = Accelerator("mine", "mine", 10**10, 1e11, (("fp32", 1e12),))
    assert cost(own, 3600).missing[0].startswith("dollars: no on-demand price is on file for mine")


def test_a_power_that_is_not_published_is_said_and_never_guessed():
    c = cost("tpu v5e", 3600)
    assert (c.energy_joules, c.kilowatt_hours, c.co2_kg) == (None, None, None)
    assert c.missing == ("energy: the power of tpu-v5e-16gb is not published",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": -1}, "seconds = -1: must be a finite number of at least 0"),
        ({"seconds": float("inf")}, "seconds = inf"),
        ({"seconds": float("nan")}, "seconds = nan"),
        ({"seconds": "3600"}, "seconds = '3600'"),
        ({"seconds": True}, "seconds = True"),
        ({"seconds": 10**400}, "seconds = 1000"),
        ({"count": 0}, "count = 0"),
        ({"price": -3.0}, "price = -3.0"),
        ({"price": "spott"}, "kind of price = 'spott': did you mean spot?"),
        ({"pue": 0.9}, "pue = 0.9: must be a finite number of at least 1"),
        ({"pue": "amazon"}, "pue = 'amazon':"),
        ({"server": 0.5}, "server = 0.5"),
        ({"utilisation": 0}, "utilisation = 0: must be a finite number above 0 and at most 1"),
        ({"utilisation": 1.1}, "utilisation = 1.1"),
        ({"grid": -0.1}, "grid = -0.1"),
        ({"grid": "atlantis"}, "allowed are world, us"),
        ({"name": "H100"}, "accelerator = 'H100': could be any of"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        cost(**{"name": "t4", "seconds": 3600, **arguments})
