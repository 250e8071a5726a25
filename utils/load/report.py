"""What the requests of a load say: throughput and latency, second by second, and how long an outage was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from utils.load.generator import OK, LoadError, Request

BIN = 0.5  # seconds that an outage is measured in
SLOW = 3.0  # so many times the usual latency is no longer service as usual


def summary(requests: Sequence[Request], begin: float, end: float) -> dict[str, float]:
    """The figures of a load between two of its seconds; before `begin` it warms up.

    Returns:
        offered: requests due per second.
        throughput: right answers per second. Below `offered` a queue grows.
        p50 ms, p95 ms: of the right answers to requests due in this time, whenever they came; NaN without any.
        failed %: of the requests due in this time.
        late ms: how late the generator sent the latest of them; much more than 10 says that it was too slow itself.
    """
    due = [request for request in requests if begin <= request.scheduled < end]
    answered = [1000 * request.latency for request in due if request.outcome == OK]
    p50, p95 = np.percentile(answered, [50, 95]) if answered else (np.nan, np.nan)
    ended = sum(request.outcome == OK and begin <= request.ended < end for request in requests)
    return {
        "offered": len(due) / (end - begin),
        "throughput": ended / (end - begin),
        "p50 ms": float(p50),
        "p95 ms": float(p95),
        "failed %": 100 * (1 - len(answered) / len(due)) if due else 0.0,
        "late ms": 1000 * max((request.started - request.scheduled for request in due), default=0.0),
    }


def timeline(requests: Sequence[Request], width: float = BIN) -> pd.DataFrame:
    """One row for each `width` seconds, its index when it begins, by when requests were due.

    Columns: `answered` and `failed` requests, and the median latency `p50 ms` of all of them, failed ones included; of
    two middle ones the higher, so that a server out of two that hangs is seen.
    """
    rows = pd.DataFrame(
        {
            "second": [width * (request.scheduled // width) for request in requests],
            "ok": [request.outcome == OK for request in requests],
            "ms": [1000 * request.latency for request in requests],
        }
    )
    grouped = rows.groupby("second")
    answered = grouped["ok"].sum()
    return pd.DataFrame(
        {
            "answered": answered,
            "failed": grouped.size() - answered,
            "p50 ms": grouped["ms"].quantile(interpolation="higher"),
        }
    )


def outage(requests: Sequence[Request], at: float) -> float | None:
    """Seconds from `at`, when something was broken, until service was as usual again; 0 if nobody noticed.

    As usual means: from then on, in every half second, no request that was due failed, and their median latency was at
    most 3 times that before `at`. None if it was not until the end.

    Raises:
        LoadError: no request was due long enough before `at` to say what is usual.
    """
    bins = timeline(requests)
    before = bins[bins.index < at - BIN]
    if before.empty:
        raise LoadError(f"Nothing was due before second {at - BIN:g}, so nobody knows what is usual: break it later.")
    usual = before["p50 ms"].median()
    after = bins[bins.index >= at - BIN]
    bad = after[(after["failed"] > 0) | (after["p50 ms"] > SLOW * usual)]
    if bad.empty:
        return 0.0
    if bad.index[-1] == after.index[-1]:
        return None
    return max(float(bad.index[-1]) + BIN - at, 0.0)
