"""What the Grafana dashboards are made of: panels, and the PromQL that they are about."""

from dataclasses import dataclass

SYSTEM = 'system=~"$system"'
"""Every query is about the systems that are chosen at the top of the dashboard."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. `queries` are (legend, PromQL) pairs."""

    title: str
    unit: str
    """As Grafana names it: s, short, percentunit, reqps, Bps."""
    queries: tuple[tuple[str, str], ...]
    text: str
    """What a person reads from it."""


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, by: str = "", **labels: str) -> str:
    """Per second, summed, over the last minute."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{selector(labels)}[1m]))"


def total(metric: str, by: str = "", **labels: str) -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({metric}{selector(labels)})"


def highest(metric: str, **labels: str) -> str:
    """Of what several processes say alike."""
    return f"max ({metric}{selector(labels)})"


def quantiles(metric: str, by: str = "", **labels: str) -> tuple[tuple[str, str], ...]:
    """p50, p90 and p99 of a histogram over the last minute."""
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (f"p{share * 100:.0f}{legend}", _quantile(share, metric, by, labels)) for share in (0.5, 0.9, 0.99)
    )


def quantile(share: float, metric: str, by: str, **labels: str) -> tuple[tuple[str, str], ...]:
    """One of a histogram over the last minute, for every value of a label."""
    return ((f"{{{{{by}}}}}", _quantile(share, metric, by, labels)),)


def _quantile(share: float, metric: str, by: str, labels: dict[str, str]) -> str:
    grouping = f"{by}, le" if by else "le"
    buckets = f"sum by ({grouping}) (rate({metric}_bucket{selector(labels)}[1m]))"
    return f"histogram_quantile({share}, {buckets})"


def ratio(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def kept_share(metric: str, by: str) -> str:
    """Of a counter with the label `result`: the share of what was kept, over the last five minutes."""
    return ratio(rate(metric, by, result="kept"), rate(metric, by)).replace("[1m]", "[5m]")


def selector(labels: dict[str, str]) -> str:
    return "{" + ", ".join([SYSTEM, *(f'{name}="{value}"' for name, value in labels.items())]) + "}"
