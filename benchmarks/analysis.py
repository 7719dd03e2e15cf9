"""Analysis of new data, side by side: ours, Evidently's drift and summary presets, a profiling comparison.

Each contestant runs in a process of its own on the same Parquet files: it starts, imports what it needs, reads both
tables, compares them and writes its report. Seconds are those of the whole process and, in brackets, without the
imports; memory is the process's peak (resident). The tables are Adult's train and test data, and a million rows of
either, resampled with noise in the numbers.

    python benchmarks/analysis.py            everything (some ten minutes, most of them Evidently's)
    python benchmarks/analysis.py --quick    the small tables only
    python benchmarks/analysis.py --only ours
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl

from income_mlops.data import read_table
from income_mlops.settings import load_settings

SHARED = """
import resource, sys, time
start = time.perf_counter()
old_file, new_file, out = sys.argv[1:]
def done(imported):
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print('{"seconds": %.3f, "work": %.3f, "peak": %d}' % (end - start, end - imported, peak))
"""

OURS = SHARED + """
from income_mlops.report import save_report
from income_mlops.settings import load_settings
from income_mlops.verdict import analyze
settings = load_settings()
imported = time.perf_counter()
save_report(analyze(new_file, old_file, settings), out)
done(imported)
"""

EVIDENTLY = SHARED + """
import warnings
warnings.filterwarnings("ignore")
import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset, DataSummaryPreset
imported = time.perf_counter()
old, new = pd.read_parquet(old_file), pd.read_parquet(new_file)
numbers = [c for c in old.columns if pd.api.types.is_numeric_dtype(old[c])]
kinds = DataDefinition(numerical_columns=numbers, categorical_columns=[c for c in old.columns if c not in numbers])
made = Report([DataDriftPreset(), DataSummaryPreset()]).run(
    Dataset.from_pandas(new, data_definition=kinds), Dataset.from_pandas(old, data_definition=kinds))
made.save_html(out)
done(imported)
"""

PROFILING = SHARED + """
import warnings
warnings.filterwarnings("ignore")
import pandas as pd
from data_profiling import ProfileReport, compare
imported = time.perf_counter()
reports = [ProfileReport(pd.read_parquet(f), title=t, progress_bar=False) for f,
           t in ((old_file, "old"), (new_file, "new"))]
compare(reports).to_file(out, silent=True)
done(imported)
"""

CONTESTANTS = {"ours": OURS, "evidently": EVIDENTLY, "profiling": PROFILING}


def resampled(table: pl.DataFrame, rows: int, seed: int) -> pl.DataFrame:
    "Rows drawn again and again, their numbers moved a little: as many values as in a table that has grown."
    rng = np.random.default_rng(seed)
    drawn = table[rng.integers(0, table.height, rows)]
    whole = [s.name for s in table if s.dtype.is_integer()]
    return drawn.with_columns((pl.col(c) + pl.Series(rng.integers(-1, 2, rows)) * (pl.col(c) > 0)).alias(c)
                              for c in whole)


def run(name: str, old: Path, new: Path, folder: Path) -> dict[str, float]:
    "One contestant in a process of its own."
    environment = {k: v for k,
                   v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # imports as of a second start
    environment |= {"DO_NOT_TRACK": "1", "YDATA_PROFILING_NO_ANALYTICS": "1", "MPLBACKEND": "agg"}
    report = folder / f"{name}.html"
    done = subprocess.run([sys.executable, "-c", CONTESTANTS[name], str(old), str(new), str(report)],
                          capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "html": report.stat().st_size}


def show(size: str, name: str, seen: dict[str, float], ours: dict[str, float] | None) -> None:
    ratio = ""
    if ours and name != "ours":
        ratio = (f"   ours: {seen['seconds'] / ours['seconds']:.1f} × faster ({seen['work'] / ours['work']:.1f} ×), "
                 f"{seen['peak'] / ours['peak']:.1f} × less memory")
    print(f"{size:>9}  {name:10} {seen['seconds']:7.2f} s ({seen['work']:6.2f} s)  {seen['peak'] / 1e6:7.0f} MB  "
          f"{seen['html'] / 1e6:5.2f} MB{ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small tables only")
    parser.add_argument("--only", choices=CONTESTANTS, nargs="+", default=list(CONTESTANTS), help="some contestants")
    parser.add_argument("--runs", type=int, default=3, help="runs of the small tables; the best counts")
    args = parser.parse_args()
    names = [n for n in CONTESTANTS if n in args.only]
    missing = [n for n, module in (("evidently", "evidently"), ("profiling", "data_profiling"))
               if n in names and find_spec(module) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (pip install -e '.[bench]')")
    settings = load_settings()
    source = [read_table(settings.path(f), settings.dataset.columns.missing)
              for f in (settings.dataset.origin_path, settings.dataset.holdout_path) if f]
    print("     rows  contestant  process (without imports)  peak memory  report")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        growth = {}
        for size, rows in (("32k/16k", None), *([] if args.quick else [("1M/1M", 10**6), ("10M/1M", 10**7)])):
            old, new = folder / "old.parquet", folder / "new.parquet"
            if rows is None:
                source[0].write_parquet(old)
                source[1].write_parquet(new)
            elif rows == 10**6:
                resampled(source[0], rows, 1).write_parquet(old)
                resampled(source[1], rows, 2).write_parquet(new)
            else:
                resampled(source[0], rows, 1).write_parquet(old)
            ours = None
            for name in names:
                if rows and name == "profiling":
                    print(f"{size:>9}  {name:10} left out: it takes many minutes there")
                    continue
                if rows == 10**7 and name != "ours":
                    continue
                seen = min((run(name, old, new, folder) for _ in range(1 if rows else args.runs)),
                           key=lambda s: s["seconds"])
                ours = seen if name == "ours" else ours
                if name == "ours":
                    growth[rows] = seen
                show(size, name, seen, ours)
        if 10**7 in growth:
            small, large = growth[10**6], growth[10**7]
            print(f"ours, from 2 to 11 million rows (5.5 ×): {large['work'] / small['work']:.1f} × the time, "
                  f"{large['peak'] / small['peak']:.1f} × the memory")


if __name__ == "__main__":
    main()
