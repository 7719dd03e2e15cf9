"""Uploads with one thing wrong each, made from the official data."""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from income_mlops.batches import pour
from income_mlops.settings import load_settings

ROOT = Path(__file__).parent.parent
SETTINGS = load_settings(ROOT / "settings.ini")
COLUMNS = SETTINGS.dataset.columns
TRAIN = SETTINGS.path(SETTINGS.dataset.origin_path)
TEST = SETTINGS.path(SETTINGS.dataset.holdout_path)


class Kept:
    "A sink that keeps every batch."

    def __init__(self) -> None:
        self.parts: list[pl.DataFrame] = []

    def add(self, batch: pl.DataFrame) -> None:
        self.parts.append(batch)


def read(path: Path) -> pl.DataFrame:
    "A table with its missing markers as they are."
    return pl.concat(pour(path, Kept).parts)


def some(share: float, seed: int = 0) -> pl.Expr:
    "A mask of a random share of the rows."
    return pl.lit(pl.Series(np.random.default_rng(seed).random(100_000) < share)).head(pl.len())


def put(column: str, value: object, share: float = 1.0, seed: int = 0) -> Callable[[pl.DataFrame], pl.DataFrame]:
    "A fault: `value` (an expression or a literal) in a random share of a column."
    new = value if isinstance(value, pl.Expr) else pl.lit(value)
    return lambda t: t.with_columns(pl.when(some(share, seed)).then(new).otherwise(pl.col(column)).alias(column))


def swap(a: str, b: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    "A fault: two columns under each other's name."
    return lambda t: t.rename({a: b, b: a}).select(t.columns)


def resample(mask: pl.Expr, share: float) -> Callable[[pl.DataFrame], pl.DataFrame]:
    "A fault: rows of a mask make up another share of the table, whose size stays."
    def fault(t: pl.DataFrame) -> pl.DataFrame:
        inside, outside = t.filter(mask), t.filter(~mask)
        n = min(int(inside.height / share), int(outside.height / (1 - share)))
        return pl.concat([inside.sample(int(n * share), seed=1), outside.sample(n - int(n * share), seed=1)]).sample(
            fraction=1, shuffle=True, seed=1)
    return fault
