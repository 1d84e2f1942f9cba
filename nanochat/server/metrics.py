"""Counts and times of the server in Prometheus' text format. No client library: four kinds of line."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)  # seconds

COUNTERS = {
    "requests_finished_total": "Requests that are over, by how they ended.",
    "requests_rejected_total": "Requests that were refused, by status.",
    "tokens_in_total": "Tokens of prompts.",
    "tokens_out_total": "Tokens of answers, forced ones included.",
    "prefix_tokens_queried_total": "Prompt tokens that were looked up in the cache.",
    "prefix_tokens_hit_total": "Prompt tokens that were found in the cache.",
}
HISTOGRAMS = {
    "first_token_seconds": "From the request to its first token.",
    "token_seconds": "Mean time between the tokens of an answer.",
    "request_seconds": "From the request to its end.",
}


class ServerMetrics:
    """Used by the event loop alone."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._buckets = {name: [0] * (len(BUCKETS) + 1) for name in HISTOGRAMS}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def count(self, name: str, by: float = 1, label: str = "") -> None:
        """Add to a counter; `label` is like 'reason="stop"'."""
        assert name in COUNTERS, name
        self._counts[name, label] += by  # type: ignore[assignment]

    def observe(self, name: str, seconds: float) -> None:
        self._buckets[name][bisect_left(BUCKETS, seconds)] += 1
        self._sums[name] += seconds

    def text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """All of it, with `gauges` {name: (help, value)} measured now."""
        lines: list[str] = []

        def head(name: str, kind: str, words: str) -> None:
            lines.extend((f"# HELP nanochat_{name} {words}", f"# TYPE nanochat_{name} {kind}"))

        for name, (words, value) in gauges.items():
            head(name, "gauge", words)
            lines.append(f"nanochat_{name} {value:g}")
        for name, words in COUNTERS.items():
            head(name, "counter", words)
            found = {label: value for (counter, label), value in self._counts.items() if counter == name}
            for label, value in sorted(found.items()) or [("", 0)]:
                lines.append(f"nanochat_{name}{f'{{{label}}}' if label else ''} {value}")
        for name, words in HISTOGRAMS.items():
            head(name, "histogram", words)
            total = 0
            for edge, number in zip((*map("{:g}".format, BUCKETS), "+Inf"), self._buckets[name]):
                total += number
                lines.append(f'nanochat_{name}_bucket{{le="{edge}"}} {total}')
            lines.append(f"nanochat_{name}_sum {self._sums[name]:.6f}")
            lines.append(f"nanochat_{name}_count {total}")
        return "\n".join(lines) + "\n"
