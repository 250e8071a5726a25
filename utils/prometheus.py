"""Prometheus metrics as numbers: read an endpoint twice, and the difference says what happened in between."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import httpx
from prometheus_client.parser import text_string_to_metric_families

from utils.errors import CourseError

# A sample's name and labels.
Series = tuple[str, frozenset[tuple[str, str]]]


class MetricsError(CourseError):
    """An endpoint of metrics cannot be read."""


@dataclass(frozen=True)
class Reading:
    """What the endpoints said, or the difference of two readings.

    Attributes:
        seconds: when it was read, by a clock that begins anywhere; of a difference: the time between.
        values: each sample by its name and labels.
    """

    seconds: float
    values: Mapping[Series, float]

    def __sub__(self, before: Reading) -> Reading:
        """What counters and histograms gained since `before`; one that is smaller now has begun again at zero."""
        gained = {}
        for series, now in self.values.items():
            then = before.values.get(series, 0.0)
            gained[series] = now - then if now >= then else now
        return Reading(self.seconds - before.seconds, gained)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name that have these labels, whatever others they have; 0 without one."""
        return sum(value for _, value in self._matching(name, labels))

    def mean(self, name: str, **labels: str) -> float:
        """The mean of what a histogram or a summary observed, in its unit; NaN if it observed nothing."""
        count = self.total(f"{name}_count", **labels)
        return self.total(f"{name}_sum", **labels) / count if count else math.nan

    def quantile(self, share: float, name: str, **labels: str) -> float:
        """As PromQL's histogram_quantile: interpolated within the bucket that holds it, in the histogram's unit.

        Args:
            share: 0 to 1; 0.95 is the 95th percentile.

        Returns:
            NaN if nothing was observed; the last bound if the quantile lies beyond it.
        """
        counts: dict[float, float] = {}
        for of_sample, value in self._matching(f"{name}_bucket", labels):
            bound = float(of_sample["le"])
            counts[bound] = counts.get(bound, 0.0) + value
        bounds = sorted(counts)
        if not bounds or not counts[bounds[-1]]:
            return math.nan
        wanted, low, below = share * counts[bounds[-1]], 0.0, 0.0
        for bound in bounds:
            if counts[bound] >= wanted and counts[bound] > below:
                return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (counts[bound] - below)
            low, below = bound, counts[bound]
        return low

    @cached_property
    def _by_name(self) -> Mapping[str, list[tuple[frozenset[tuple[str, str]], float]]]:
        found: dict[str, list[tuple[frozenset[tuple[str, str]], float]]] = {}
        for (name, pairs), value in self.values.items():
            found.setdefault(name, []).append((pairs, value))
        return found

    def _matching(self, name: str, labels: Mapping[str, str]) -> Iterable[tuple[dict[str, str], float]]:
        for pairs, value in self._by_name.get(name, []):
            if labels.items() <= pairs:
                yield dict(pairs), value


def read(*urls: str, timeout: float = 10) -> Reading:
    """Read endpoints; a sample that several of them have, such as the roles of a cluster, is added up.

    Raises:
        MetricsError: one of them does not answer, or not with metrics.
    """
    values: dict[Series, float] = {}
    for url in urls:
        try:
            answer = httpx.get(url, timeout=timeout, trust_env=False).raise_for_status()
            families = list(text_string_to_metric_families(answer.text))
        except httpx.HTTPStatusError as error:
            raise MetricsError(f"{url} answers {error.response.status_code}: correct the address.") from None
        except (httpx.HTTPError, httpx.InvalidURL):
            raise MetricsError(f"No metrics can be read at {url}: start what should answer there.") from None
        except (ValueError, KeyError):
            raise MetricsError(f"What {url} answers are no Prometheus metrics: correct the address.") from None
        named = set(re.findall(r"^[^#{\s]+", answer.text, re.MULTILINE))
        for sample in (sample for family in families for sample in family.samples):
            # The parser ends the name of every counter in _total, also where the server does not; Prometheus does not.
            name = sample.name if sample.name in named else sample.name.removesuffix("_total")
            series = (name, frozenset(sample.labels.items()))
            values[series] = values.get(series, 0.0) + sample.value
    return Reading(time.monotonic(), values)
