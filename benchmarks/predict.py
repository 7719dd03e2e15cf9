"""What predicting a large file costs, side by side with the model itself and with pandas.

A million rows (the hold-out again and again, as Parquet and as CSV) are predicted in four ways, which take turns:

- `income-mlops predict` from the start of its process to its end: importing, asking the registry which model, reading,
  encoding, predicting with all cores, writing labels and probabilities as CSV;
- the same functions in a process that already runs (`batch.predictions` and `batch.write`);
- the bare model: XGBoost's or scikit-learn's own prediction, with all cores, of an array that is encoded already;
  nothing is read or written;
- pandas and the pipeline in a process that already runs: `read_csv` or `read_parquet`, `predict_proba` with all cores
  in chunks of 100,000 rows, `to_csv`.

Seconds are medians, and so are the ratios' parts. A command copies its model once, with MLflow's client; that first
one is shown apart. RandomForest, which is not the better model and so not the command's, gets a tenth of the rows.
Memory is the highest resident memory of the command, for a tenth of the rows, for all and for three times as many.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
from _fitted import fit, project, register_all

from income_mlops.batch import predictions, table_model, write
from income_mlops.gate import store_compiled
from income_mlops.predictor import Predictor
from income_mlops.processing import to_frame


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def command(settings: Any, file: Path, out: Path) -> tuple[float, float]:
    "Seconds and highest memory in MB of `income-mlops predict`."
    # not getrusage: its maximum starts with the memory of the process that started the command
    code = "import re, sys; from income_mlops.cli import main\n" \
           "try: main(sys.argv[1:])\n" \
           "finally:\n" \
           "    peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n" \
           "    print('MEMORY', int(peak) // 1024, file=sys.stderr)"
    words = [sys.executable, "-c", code, "--settings", str(settings.root / "settings.ini"), "predict", str(file),
             "--out", str(out)]
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return took, float(done.stderr.rpartition("MEMORY")[2].split()[0])


def with_pandas(pipeline: Any, schema: Any, file: Path, out: Path) -> None:
    numbers = schema.names("number")
    if file.suffix == ".parquet":
        table = pd.read_parquet(file, columns=schema.names())
    else:
        table = pd.read_csv(file, usecols=schema.names(), na_values=["?"], keep_default_na=False)
    table = table.astype(dict.fromkeys(numbers, "float64"))
    p = np.concatenate([pipeline.predict_proba(table.iloc[i:i + 100_000])[:, 1] for i in range(0, len(table), 100_000)])
    labels = np.where(p >= 0.5, schema.classes[1], schema.classes[0])
    pd.DataFrame({"prediction": labels, "probability": p}).to_csv(out, index=False)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rows", type=int, default=1_000_000)
    words.add_argument("--rounds", type=int, default=3)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as d:
        measure(Path(d), given.rows, given.rounds)


def measure(folder: Path, rows: int, rounds: int) -> None:
    settings = project(folder / "project")
    dataset, pipelines = fit(settings)
    register_all(settings, dataset, pipelines)
    holdout, out = dataset.holdout.drop(dataset.schema.target), folder / "out.csv"
    table = pl.concat([holdout] * (rows // holdout.height + 1)).head(rows)
    files = {}
    for n in (rows, rows // 10):
        files[n] = {"Parquet": folder / f"{n}.parquet", "CSV": folder / f"{n}.csv"}
        table.head(n).write_parquet(files[n]["Parquet"])
        table.head(n).write_csv(files[n]["CSV"])
    first, _ = command(settings, files[rows // 10]["CSV"], out)
    print(f"\nMedian of {rounds} rounds, seconds; {os.cpu_count()} cores; the first command, which copies the model "
          f"with MLflow's client, took {first:.1f} s for {rows // 10:,} rows")
    print(f"{'':33}{'predict':>9}{'in process':>12}{'bare model':>12}{'pandas':>9}{'predict / bare':>16}"
          f"{'in process / bare':>19}{'pandas / predict':>18}")
    for family, n in (("XGBoost", rows), ("RandomForest", rows // 10)):
        contest(family, pipelines[family], dataset, files[n], n, rounds, settings, out)
    longer = pl.concat([table] * 3)
    files[3 * rows] = {"Parquet": folder / "longer.parquet", "CSV": folder / "longer.csv"}
    longer.write_parquet(files[3 * rows]["Parquet"])
    longer.write_csv(files[3 * rows]["CSV"])
    for kind in ("Parquet", "CSV"):
        used = {n: command(settings, files[n][kind], out)[1] for n in sorted(files)}
        print(f"Highest memory of the command, {kind}: "
              + ", ".join(f"{mb:.0f} MB for {n:,} rows" for n, mb in used.items()))


def contest(family: str, pipeline: Any, dataset: Any, files: dict[str, Path], rows: int, rounds: int, settings: Any,
            out: Path) -> None:
    "All ways in turn, some rounds; a line per kind of file."
    schema, frame = dataset.schema, to_frame(dataset.holdout, dataset.schema)
    store_compiled(pipeline, schema, frame, out.parent / family)
    model = table_model(Predictor.load(out.parent / family), schema)
    encoded = np.tile(np.asarray(pipeline[:-1].transform(frame), dtype=np.float32), (rows // len(frame) + 1, 1))[:rows]
    pipeline.set_params(classifier__n_jobs=os.cpu_count())
    bare = pipeline[-1].get_booster().inplace_predict if family == "XGBoost" else pipeline[-1].predict_proba
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        found.setdefault("bare", []).append(seconds(lambda: bare(encoded)))
        for kind, file in files.items():
            if family == "XGBoost":  # the best one, which the command takes
                found.setdefault(f"predict {kind}", []).append(command(settings, file, out)[0])
            found.setdefault(f"process {kind}", []).append(
                seconds(lambda f=file: write(predictions(f, model, schema), out)))
            found.setdefault(f"pandas {kind}", []).append(seconds(lambda f=file: with_pandas(pipeline, schema, f, out)))
    m = {k: statistics.median(v) for k, v in found.items()}
    for kind in files:
        whole, process, pandas = (m.get(f"{way} {kind}") for way in ("predict", "process", "pandas"))
        shown = [f"{whole:9.2f}" if whole else f"{'':9}", f"{process:12.2f}{m['bare']:12.2f}{pandas:9.2f}",
                 f"{whole / m['bare']:16.2f}" if whole else f"{'':16}", f"{process / m['bare']:19.2f}",
                 f"{pandas / (whole or process):18.2f}"]
        print(f"{f'{family}, {kind}, {rows:,} rows':33}", *shown, sep="", flush=True)


if __name__ == "__main__":
    main()
