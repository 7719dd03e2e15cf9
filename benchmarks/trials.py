"""Seconds per trial of a study: the plain loop against cached folds, without and with pruning.

The plain loop refits the whole pipeline for every trial and fold, with all threads in the classifier and, for boosted
trees, the same early stopping on the fold's validation rows. All three ways get the same trial parameters, the same
folds and run in turn, so that a busy machine slows them alike.
"""
import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from income_mlops.datasets import original
from income_mlops.models import ForestLearner, ModelFactory
from income_mlops.processing import to_frame, to_labels
from income_mlops.settings import load_settings
from income_mlops.tuning import column_kinds, make_folds, score


def plain_trial(model, X, y, splits, params):
    "Cross-validated log loss of one trial, everything refitted."
    losses = []
    for train, valid in splits:
        custom, pre = model.customprocessor(), model.preprocessor()
        rows = X.iloc[train]
        a = pre.fit_transform(custom.fit_transform(rows), y[train])
        b = pre.transform(custom.transform(X.iloc[valid]))
        if model.name == "XGBoost":
            growth = model.growth
            classifier = model.classifier(params, 1, column_kinds(pre, True)).set_params(
                n_estimators=growth.stages * 25, early_stopping_rounds=growth.patience, n_jobs=model.threads)
            classifier.fit(a, y[train], eval_set=[(b, y[valid])], verbose=False)
            clip = 0.0
        else:
            classifier = model.classifier(params, 0, []).set_params(n_estimators=ForestLearner.sizes[-1])
            classifier.fit(a, y[train])
            clip = 1e-3
        losses.append(log_loss(y[valid], np.clip(classifier.predict_proba(b)[:, 1], clip, 1 - clip)))
    return float(np.mean(losses))


def timed(f, *args):
    start = time.perf_counter()
    try:
        value = f(*args)
    except optuna.TrialPruned:
        value = None
    return time.perf_counter() - start, value


def study(model, X, y, trials):
    "Times and values of all three ways for each trial of one study."
    o = model.settings.optimization
    splits = list(StratifiedKFold(o.n_folds, shuffle=True, random_state=o.seed).split(X, y))
    start = time.perf_counter()
    folds = make_folds(X, y, [model.customprocessor(), model.preprocessor()], model.encoded, o.n_folds, o.seed)
    caching = time.perf_counter() - start
    times, values = {"plain": [], "cached": [], "pruned": []}, {"plain": [], "cached": [], "pruned": []}

    def objective(trial):
        params = model.space(trial)
        fixed = optuna.trial.FixedTrial(trial.params)
        with ThreadPoolExecutor(model.threads) as pool:
            ways = {
                "pruned": lambda: score(trial, [model.learner(params, f) for f in folds], model.growth, pool),
                "cached": lambda: score(fixed, [model.learner(params, f) for f in folds], model.growth, pool),
                "plain": lambda: plain_trial(model, X, y, splits, params)}
            for name, way in ways.items():
                seconds, value = timed(way)
                times[name].append(seconds)
                values[name].append(value)
        print(f"  trial {trial.number + 1}/{trials}: " + ", ".join(
            f"{n} {t[-1]:.2f} s" + ("" if values[n][-1] is None else f" ({values[n][-1]:.5f})")
            for n, t in times.items()), flush=True)
        if values["pruned"][-1] is None:
            raise optuna.TrialPruned
        return values["pruned"][-1]

    search = optuna.create_study(sampler=model.sampler(0), pruner=model.pruner())
    search.enqueue_trial(model.default)
    search.optimize(objective, n_trials=trials)
    return times, values, caching


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", type=int, default=12)
    trials = arguments.parse_args().trials
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = load_settings()
    with tempfile.TemporaryDirectory() as d:
        settings = settings.model_copy(update={"paths": settings.paths.model_copy(update={"state": Path(d)})})
        dataset = original(settings)
        X, y = to_frame(dataset.train, dataset.schema), to_labels(dataset.train, dataset.schema)
        for model in ModelFactory(settings, dataset.schema).make_all():
            print(f"{model.name}: {trials} trials, {settings.optimization.n_folds} folds, {model.threads} threads")
            times, values, caching = study(model, X, y, trials)
            plain, cached, pruned = (float(np.median(times[n])) for n in ("plain", "cached", "pruned"))
            best = {n: min(v for v in vs if v is not None) for n, vs in values.items()}
            print(f"  median seconds per trial: plain {plain:.2f}, cached {cached:.2f}, cached and pruned {pruned:.2f} "
                  f"(folds encoded once in {caching:.1f} s)")
            print(f"  ratio {plain / pruned:.1f} x; without pruning {plain / cached:.1f} x, pruning alone "
                  f"{cached / pruned:.1f} x")
            print(f"  means: {np.mean(times['plain']) / np.mean(times['pruned']):.1f} x; without pruning "
                  f"{np.mean(times['plain']) / np.mean(times['cached']):.1f} x")
            print(f"  best cross-validated log loss: plain {best['plain']:.5f}, ours {best['pruned']:.5f} "
                  f"(difference {best['pruned'] - best['plain']:+.5f})")


if __name__ == "__main__":
    main()
