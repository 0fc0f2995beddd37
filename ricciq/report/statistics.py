"""Statistics of paired runs over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

CONFIDENCE = 0.95
Row = dict[str, Any]


def summarize(
    rows: Sequence[Row], methods: Sequence[str], lr_scales: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Compare methods over seeds, at each learning rate.

    Differences are from the first method, paired by seed; their interval is Student's, at 95 %
    confidence. `drop` is the method's accuracy at the first learning rate minus this one.

    Args:
        rows: one for each run, with method, lr_scale, seed, top1, train_loss and diverged.
        methods: the methods; the first one is the baseline.
        lr_scales: factors of the learning rate.

    Yields:
        A row for each learning rate and method.
    """
    top1 = {(row["method"], row["lr_scale"], row["seed"]): row["top1"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    for scale in lr_scales:
        for method in methods:
            mine = [row for row in rows if (row["method"], row["lr_scale"]) == (method, scale)]
            values = [top1[method, scale, seed] for seed in seeds]
            others = [top1[methods[0], scale, seed] for seed in seeds]
            differences = [a - b for a, b in zip(values, others, strict=True)]
            spread = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1))
            margin = spread * stdev(differences) / math.sqrt(len(seeds))
            losses = [row["train_loss"] for row in mine if row["train_loss"] is not None]
            first = fmean(top1[method, lr_scales[0], seed] for seed in seeds)
            yield {
                "method": method,
                "lr_scale": scale,
                "seeds": len(seeds),
                "mean": fmean(values),
                "std": stdev(values),
                "difference": fmean(differences),
                "low": fmean(differences) - margin,
                "high": fmean(differences) + margin,
                "train_loss": fmean(losses) if losses else None,
                "drop": first - fmean(values),
                "divergences": sum(row["diverged"] for row in mine),
            }
