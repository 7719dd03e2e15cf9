"""Quantile sketches against the truth, against DataSketches, and against themselves in another process."""
import re
import subprocess
import sys

import numpy as np
import pytest
from datasketches import kll_doubles_sketch

from income_mlops.quantiles import Quantiles, pack, unpack

K = 512
QUERIES = np.linspace(0.01, 0.99, 99)


def sketched(parts):
    "One sketch of all parts, merged one after another."
    whole = Quantiles(K)
    for part in parts:
        one = Quantiles(K)
        one.update(part)
        whole.merge(one)
    return whole


def worst(sketch, x):
    "Largest error of a cumulative share at 99 places."
    values, weights = sketch.points()
    cumulative = np.append(0.0, np.cumsum(weights)) / weights.sum()
    at = np.quantile(x, QUERIES)
    return abs(cumulative[np.searchsorted(values, at, "right")]
               - np.searchsorted(np.sort(x), at, "right") / len(x)).max()


@pytest.mark.parametrize("parts", [1, 7, 100])
def test_within_the_stated_error_and_no_worse_than_datasketches(parts):
    ours, theirs = [], []
    for seed in range(120):
        x = np.random.default_rng(seed).gamma(0.7, size=20_000)
        split = np.array_split(x, parts)
        ours.append(worst(sketched(split), x))
        other = kll_doubles_sketch(K)
        for part in split:
            one = kll_doubles_sketch(K)
            one.update(part)
            other.merge(one)
        at = np.quantile(x, QUERIES)
        theirs.append(abs(np.array(other.get_cdf(at.tolist(), True)[:-1])
                          - np.searchsorted(np.sort(x), at, "right") / len(x)).max())
    stated = kll_doubles_sketch(K).normalized_rank_error(False)
    assert Quantiles(K).rank_error == pytest.approx(stated, rel=1e-9)
    # 99 places at once, so that the 99 % of a single place may be missed a little more often
    assert np.mean(np.array(ours) > stated) <= 0.05
    assert np.mean(ours) <= 1.1 * np.mean(theirs)


def test_what_is_kept_adds_up():
    rng = np.random.default_rng(3)
    x = np.concatenate([np.zeros(30_000), rng.normal(size=20_000)])  # a heavy value
    rng.shuffle(x)
    whole = sketched(np.array_split(x, 13))
    values, weights = whole.points()
    assert weights.sum() == whole.n == len(x) and (np.diff(values) > 0).all() and set(values) <= set(x)
    assert sum(map(len, whole.levels)) < 3.3 * K
    assert weights[values == 0][0] / len(x) == pytest.approx(0.6, abs=2 * whole.rank_error)
    few = Quantiles(K)
    few.update(np.array([2.0, 1.0, 2.0]))
    assert [p.tolist() for p in few.points()] == [[1.0, 2.0], [1.0, 2.0]]
    assert unpack(pack(Quantiles(K))).n == 0
    with pytest.raises(ValueError, match="k = 64"):
        whole.merge(Quantiles(64))


def test_another_process_gives_the_same_to_the_last_bit():
    code = ("import numpy as np, sys; sys.path.insert(0, 'tests'); from test_quantiles import sketched, pack\n"
            "print(pack(sketched(np.array_split(np.random.default_rng(1).normal(size=50_000), 9))))")
    texts = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
             for _ in range(2)}
    here = sketched(np.array_split(np.random.default_rng(1).normal(size=50_000), 9))
    assert texts == {pack(here) + "\n"}


def test_two_analyses_of_the_same_tables_are_equal(tmp_path):
    "Also where columns are sketched: what a replay compares does not depend on the process."
    code = ("import sys; from income_mlops.settings import load_settings\n"
            "from income_mlops.data import read_table; from income_mlops.verdict import analyze\n"
            "s = load_settings(); t = s.path(s.dataset.origin_path)\n"
            "read_table(t)[5000:20000].write_parquet(sys.argv[1])\n"
            "a = analyze(sys.argv[1], t, s); print(a.model_dump_json(exclude={'seconds'}))")
    told = {subprocess.run([sys.executable, "-c", code, tmp_path / "new.parquet"], capture_output=True, text=True,
                           check=True).stdout for _ in range(3)}
    assert len(told) == 1 and len(re.findall('"sketch":"', told.pop())) == 2
