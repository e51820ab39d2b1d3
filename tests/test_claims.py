"""The claim language: what parses, what does not and says why, and what its verdicts mean."""

from __future__ import annotations

import numpy as np
import pytest

from stepmark.claims import ClaimError, Reference, parse, verdict

B = 500


def constant(value):
    return [np.full(B, float(value))]


def table(**figures):
    """A lookup of `metric__method__rung=resamples`."""
    known = {tuple(key.split("__")): rows for key, rows in figures.items()}
    return lambda metric, method, rung: known[metric, method, str(rung)]


@pytest.mark.parametrize(
    ("check", "references"),
    [
        ("fid[lcm,4] <= 1.1 * fid[ddim_cfg,50]", [("fid", "lcm", 4), ("fid", "ddim_cfg", 50)]),
        ("nfe[a,4] == 4", [("nfe", "a", 4)]),
        ("1 <= x[a,1] / x[b,1] <= 2 and x[a,1] != 3", [("x", "a", 1), ("x", "b", 1)]),
        ("abs(x[a,1] - x[b,1]) < -(-0.5)", [("x", "a", 1), ("x", "b", 1)]),
        ("max(x[a,1], x[a,2], 3) > min(x[b,1], 1e3)", [("x", "a", 1), ("x", "a", 2), ("x", "b", 1)]),
        ("  (x[a,1] >=\n 2)  ", [("x", "a", 1)]),
    ],
)
def test_what_parses(check, references):
    assert parse(check).references() == tuple(Reference(*reference) for reference in references)


@pytest.mark.parametrize(
    ("check", "piece", "mend"),
    [
        ("", "empty", "write a comparison"),
        (3, "int", "in quotes"),
        ("fid[lcm] < 3", "'fid[lcm]'", "write fid[lcm,4]"),
        ("fid < 3", "'fid'", "fid[method,4]"),
        ("fid[lcm,4]", "'fid[lcm,4]'", "compare it"),
        ("fid[lcm,4] + 1", "'fid[lcm,4] + 1'", "compare it"),
        ("1 < 2", "no measured figure", "metric[method,rung]"),
        ("fid[image.lcm,4] < 3", "'image.lcm'", "bare name"),
        ("fid['lcm',4] < 3", "\"'lcm'\"", "bare name"),
        ("fid[lcm,'4'] < 3", "\"'4'\"", "plain integer"),
        ("fid[lcm,4.0] < 3", "'4.0'", "plain integer"),
        ("fid[lcm,-4] < 3", "'-4'", "plain integer"),
        ("fid[lcm,2*2] < 3", "'2*2'", "plain integer"),
        ("fid[lcm,True] < 3", "'True'", "plain integer"),
        ("fid[lcm,n] < 3", "'n'", "plain integer"),
        ("fid[lcm,4,5] < 3", "'fid[lcm,4,5]'", "fid[method,rung]"),
        ("fid[ddim-cfg,4] < 3", "'ddim-cfg'", "bare name"),
        ("fid[1:2] < 3", "'fid[1:2]'", "fid[method,rung]"),
        ("fid[a,1][b,2] < 3", "'fid[a,1][b,2]'", "begin with a metric"),
        ("fid[a,9999999999999999] < 3", "rung", "up to"),
        ("a.b < 3", "'a.b'", "bare names"),
        ("x[a,1].real < 3", "'x[a,1].real'", "bare names"),
        ("x[a,1] < 3 or x[a,1] > 5", "`or`", "its own claim"),
        ("not x[a,1] < 3", "`not`", "turn the comparison"),
        ("x[a,1] ** 2 < 3", "power", "product"),
        ("x[a,1] ** 99999999 < 3", "power", "product"),
        ("x[a,1] % 2 == 0", "operator", "+ - * /"),
        ("x[a,1] // 2 == 0", "operator", "+ - * /"),
        ("x[a,1] << 2 == 0", "operator", "+ - * /"),
        ("x[a,1] @ 2 == 0", "operator", "+ - * /"),
        ("+x[a,1] < 3", "'+x[a,1]'", "use"),
        ("~x[a,1] < 3", "'~x[a,1]'", "use"),
        ("x[a,1] is 3", "comparison", "use <"),
        ("x[a,1] in 3", "comparison", "use <"),
        ("(x[a,1] < 3) < 2", "'x[a,1] < 3'", "join comparisons"),
        ("(x[a,1] < 3) + 1 > 2", "'x[a,1] < 3'", "join comparisons"),
        ("x[a,1] < 3 and x[a,1]", "'x[a,1]'", "compare it"),
        ("x[a,1] < 'three'", "\"'three'\"", "plain number"),
        ("x[a,1] < True", "'True'", "plain number"),
        ("x[a,1] < None", "'None'", "plain number"),
        ("x[a,1] < 2j", "'2j'", "plain number"),
        ("x[a,1] < ...", "'...'", "plain number"),
        ("x[a,1] < 1e999", "'1e999'", "up to 1e+12"),
        ("x[a,1] < " + "9" * 400, "too large", "up to 1e+12"),
        ("x[a,1] < 0x" + "f" * 300, "too large", "up to 1e+12"),
        ("x[a,1] < f'{x}'", "joinedstr", "use"),
        ("x[a,1] < (lambda: 3)", "lambda", "use"),
        ("(y := x[a,1]) < 3", "namedexpr", "use"),
        ("x[a,1] < (3 if x[b,1] else 4)", "ifexp", "use"),
        ("x[a,1] < [3]", "list", "use"),
        ("x[a,1] < {3}", "set", "use"),
        ("x[a,1] < {3: 4}", "dict", "use"),
        ("x[a,1] < (3, 4)", "tuple", "use"),
        ("[x[a,1] < i for i in y]", "listcomp", "use"),
        ("(yield x[a,1])", "yield", "use"),
        ("(await x[a,1]) < 2", "await", "use"),
        ("__import__('os').system('true') == 0", "call", "abs, min, max"),
        ("round(x[a,1]) < 3", "'round(x[a,1])'", "abs, min, max"),
        ("abs(x[a,1], 2) < 3", "2 arguments", "takes one"),
        ("abs() < 3", "0 arguments", "takes one"),
        ("min(x[a,1]) < 3", "1 arguments", "two or more"),
        ("min(*x) < 3", "'min(*x)'", "write min(x, y)"),
        ("max(x[a,1], 3, key=abs) < 3", "plainly", "write max(x, y)"),
        ("x[a,1] < 3 # ok", "'#'", "says"),
        ("x[a,1] < \u0663", "ASCII", "ASCII"),
        ("x[a,1] \u2264 3", "ASCII", "<="),
        ("x[a,1] < 3\0", "ASCII", "ASCII"),
        ("x[a,1] <", "'x[a,1] <'", "a claim is"),
        ("x[a,1] = 3", "does not parse", "a claim is"),
        ("x[a,1] < 3; x[a,1] < 4", "does not parse", "a claim is"),
        ("import os", "does not parse", "a claim is"),
        ("(" * 230 + "x[a,1]" + ")" * 230 + " < 3", "parse", "a claim is"),
        ("-" * 450 + "x[a,1] < 3", None, None),
        ("x[a,1] < 3" + " and x[a,1] < 3" * 40, "characters", "split"),
    ],
)
def test_what_does_not_parse_says_why(check, piece, mend):
    if piece is None:  # deep, but within the language: it must parse or be refused, never overflow
        assert parse(check).references() == (Reference("x", "a", 1),)
        return
    with pytest.raises(ClaimError) as caught:
        parse(check)
    message = str(caught.value)
    assert piece in message, message
    assert mend in message, message
    assert "\n" not in message
    assert len(message) < 250


def test_verdicts_of_constants():
    lookup = table(nfe__a__4=constant(4), nfe__b__8=constant(8))
    found = verdict("nfe[a,4] == 4 and 2 * nfe[a,4] == nfe[b,8]", lookup)
    assert (found.state, found.fraction, found.holds, found.spoilt) == ("reproduced", 1.0, True, 0)
    assert found.values == {"nfe[a,4]": 4.0, "nfe[b,8]": 8.0}
    assert "reproduced: holds in 100.0 %" in found.text
    assert "nfe[b,8] = 8" in found.text
    assert verdict("nfe[a,4] != 4", lookup).state == "not reproduced"
    assert verdict("nfe[a,4] == 4.0000001", lookup).state == "not reproduced"
    assert verdict("abs(nfe[a,4] - nfe[b,8]) == max(4, nfe[a,4] / 2) ", lookup).state == "reproduced"
    assert verdict("-nfe[a,4] < min(nfe[b,8], 0 - 3) < -2", lookup).state == "reproduced"
    assert verdict("3 < nfe[a,4] < 4", lookup).state == "not reproduced"


def test_large_counts_stay_exact():
    count = 2**52 + 1
    assert verdict("n[a,1] == n[b,1] + 1", table(n__a__1=[[count]], n__b__1=[[count - 1]])).state == "reproduced"


@pytest.mark.parametrize(
    ("share", "state"),
    [(1.0, "reproduced"), (0.97, "reproduced"), (0.9, "inconclusive"), (0.1, "inconclusive"), (0.02, "not reproduced")],
)
def test_state_follows_the_share_of_resamples(share, state):
    resamples = [(np.arange(B) >= share * B).astype(float)]
    found = verdict("x[a,1] < 0.5", table(x__a__1=resamples))
    assert found.state == state
    assert found.fraction == pytest.approx(share, abs=0.02)


def test_draws_are_paired_over_items_and_seeds():
    rng = np.random.default_rng(0)
    a = [rng.normal(10 * s, 3.0, B) for s in range(4)]
    b = [row + 0.1 for row in a]
    assert verdict("x[a,1] < x[b,1]", table(x__a__1=a, x__b__1=b)).fraction == 1.0
    # The same figures with the seeds in another order overlap: pairing is what decided.
    assert verdict("x[a,1] < x[b,1]", table(x__a__1=a, x__b__1=b[::-1])).state == "inconclusive"


def test_every_seed_weighs_the_same():
    lookup = table(x__a__1=[np.zeros(B), np.zeros(B), np.zeros(B), np.ones(B)])
    assert verdict("x[a,1] < 0.5", lookup, B=8000).fraction == pytest.approx(0.75, abs=0.02)


def test_resamples_are_all_reached_and_draws_repeat():
    seen = table(x__a__1=[np.arange(100.0)])
    assert verdict("0 <= x[a,1] <= 99", seen).fraction == 1.0
    first = verdict("x[a,1] < 50", seen, seed=3)
    assert first == verdict("x[a,1] < 50", seen, seed=3)
    assert first.fraction == pytest.approx(0.5, abs=0.04)
    assert first.fraction != verdict("x[a,1] < 50", seen, seed=4).fraction


def test_points_replace_the_mean_of_the_resamples():
    lookup = table(x__a__1=[np.full(B, 6.0)])
    assert verdict("x[a,1] < 5", lookup, points=lambda *reference: 4.0).holds is True
    assert verdict("x[a,1] < 5", lookup).holds is False


def test_division_by_zero_counts_as_false_and_is_said():
    lookup = table(x__a__1=constant(1), x__b__1=[np.repeat([0.0, 1.0], B // 2)])
    found = verdict("x[a,1] / x[b,1] > 0", lookup)
    assert found.state == "inconclusive"
    assert found.spoilt > 0
    assert found.fraction + found.spoilt / 2000 == pytest.approx(1.0)
    assert "no finite value" in found.text
    # min hides the infinity, != would even be true of a nan: neither may rescue the draw.
    assert verdict("min(1, x[a,1] / x[b,1]) > 0", lookup).spoilt == found.spoilt
    nothing = table(x__a__1=constant(0), x__b__1=constant(0))
    assert verdict("x[a,1] / x[b,1] != 3", nothing).state == "not reproduced"
    assert verdict("x[a,1] != 3", table(x__a__1=[np.full(B, np.nan)])).state == "not reproduced"


def test_not_run_gives_its_reasons():
    def lookup(metric, method, rung):
        return constant(1) if method == "a" else f"{method} was skipped: needs\na GPU"

    found = verdict("x[a,1] < x[b,2] + x[c,3]", lookup)
    assert (found.state, found.fraction, found.holds) == ("not run", None, None)
    assert found.text == ("not run: x[b,2]: b was skipped: needs a GPU; x[c,3]: c was skipped: needs a GPU")
    assert verdict("x[a,1] < 1", lambda *reference: []).state == "not run"


def test_unpaired_figures_are_not_judged():
    seeds = verdict("x[a,1] < x[b,1]", table(x__a__1=constant(1) * 3, x__b__1=constant(1) * 2))
    assert seeds.state == "not run"
    assert "3 seeds" in seeds.text
    rows = verdict("x[a,1] < x[b,1]", table(x__a__1=[np.zeros(9)], x__b__1=[np.zeros(8)]))
    assert rows.state == "not run"
    assert "not paired" in rows.text
    # One entry is a deterministic figure and pairs with any number of resamples.
    assert verdict("x[a,1] < x[b,1]", table(x__a__1=[[0.0]], x__b__1=[np.ones(8)])).state == "reproduced"


def test_percentages_do_not_round_to_certainty():
    nearly = np.zeros(B)
    nearly[0] = 1.0
    found = verdict("x[a,1] < 0.5", table(x__a__1=[np.concatenate([nearly, np.zeros(9 * B)])]), B=20_000)
    assert 0.999 < found.fraction < 1.0
    assert "100.0 %" not in found.text
