"""What runs the trees: ONNX Runtime, XGBoost in place, scikit-learn, treelite and tl2cgen, on encoded rows.

Each is given arrays in the form that it likes best and uses one thread; the encoding, which is ours for all of them, is
left out. They take turns; milliseconds are the median. `difference` is from the classifier's own `predict_proba`.

treelite and tl2cgen are no dependency: they are measured where they can be imported. tl2cgen compiles C, for minutes.
"""
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from _fitted import fit, project

from income_mlops.compiling import compile_pipeline
from income_mlops.predictor import Predictor
from income_mlops.processing import to_frame

Engine = Callable[[Any], Any]
SIZES = (1, 1000, 100_000)


def onnx_runtime(pipeline: Any, schema: Any, frame: Any) -> tuple[Any, Engine]:
    "Our form of the rows and what `Predictor` calls."
    with tempfile.TemporaryDirectory() as d:
        compile_pipeline(pipeline, schema).save(Path(d))
        predictor = Predictor.load(d)
    columns = {str(c): frame[c].tolist() for c in frame}
    form = predictor.form
    numbers = [np.array(columns[n], dtype=np.float64) for n in form.numbers]
    rows = predictor._matrix(numbers, [e.indices(columns[e.name]) for e in predictor._encoders])
    return rows, predictor._run


def in_place(booster: Any) -> Engine:
    booster.set_param({"nthread": 1})
    return lambda x: booster.inplace_predict(x)


def sklearns(classifier: Any) -> Engine:
    classifier.set_params(n_jobs=1)
    return lambda x: classifier.predict_proba(x)[:, 1]


def with_treelite(classifier: Any) -> dict[str, Engine]:
    "Its own interpreter, and C made of the trees by tl2cgen; nothing where they are not installed."
    found: dict[str, Engine] = {}
    with suppress(ImportError):
        import treelite
        if hasattr(classifier, "get_booster"):
            with tempfile.TemporaryDirectory() as d:
                classifier.get_booster().save_model(Path(d) / "model.json")
                model = treelite.frontend.load_xgboost_model(Path(d) / "model.json")
        else:
            model = treelite.sklearn.import_model(classifier)
        found["treelite"] = lambda x: treelite.gtil.predict(model, x, nthread=1)
        import tl2cgen
        made = tempfile.mkdtemp()
        tl2cgen.export_lib(model, toolchain="gcc", libpath=f"{made}/model.so", params={"parallel_comp": 8})
        compiled = tl2cgen.Predictor(f"{made}/model.so", nthread=1)
        found["tl2cgen"] = lambda x: compiled.predict(tl2cgen.DMatrix(x, dtype="float32"))
    return found


def positive(answer: Any) -> Any:
    "(n,) probabilities of the positive class, however an engine shapes them."
    flat = np.asarray(answer)
    return flat.reshape(len(flat), -1)[:, -1].astype(np.float64)


def measured(engine: Engine, rows: Any, seconds: float) -> float:
    "Milliseconds for all rows, median."
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        engine(rows)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--seconds", type=float, default=1, help="of each measurement")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as d:
        dataset, pipelines = fit(project(Path(d)))
        frame = to_frame(dataset.holdout, dataset.schema)
    frame = frame.iloc[np.random.default_rng(0).integers(len(frame), size=max(SIZES))].reset_index(drop=True)
    for family, pipeline in pipelines.items():
        classifier = pipeline[-1]
        codes = np.ascontiguousarray(pipeline[:-1].transform(frame), dtype=np.float32)
        ours, run = onnx_runtime(pipeline, dataset.schema, frame)
        engines: dict[str, tuple[Any, Engine]] = {"ONNX Runtime": (ours, run)}
        if hasattr(classifier, "get_booster"):
            engines["inplace_predict"] = codes, in_place(classifier.get_booster())
        engines["scikit-learn's predict_proba"] = codes, sklearns(classifier)
        engines |= {name: (codes, engine) for name, engine in with_treelite(classifier).items()}
        wanted = positive(classifier.predict_proba(codes[:20_000]))
        print(f"\n{family}, one thread, ms for that many rows, median of {given.rounds} × {given.seconds:g} s")
        print(f"{'':30}" + "".join(f"{n:>12,}" for n in SIZES) + f"{'difference':>14}")
        times = {(name, n): [] for name in engines for n in SIZES}  # type: ignore[var-annotated]
        for _ in range(given.rounds):
            for n in SIZES:
                for name, (rows, engine) in engines.items():
                    times[name, n].append(measured(engine, rows[:n], given.seconds))
        for name, (rows, engine) in engines.items():
            off = np.abs(positive(engine(rows[:20_000])) - wanted).max()
            print(f"{name:30}" + "".join(f"{statistics.median(times[name, n]):12.3f}" for n in SIZES) + f"{off:14.1e}",
                  flush=True)


if __name__ == "__main__":
    main()
