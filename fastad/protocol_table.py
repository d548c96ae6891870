"""Results in the layout of the papers' tables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from fastad.errors import InputError
from fastad.evaluation import Evaluation
from fastad.training.protocols import Protocol, find_protocol

HEADS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """An `Evaluation` from the JSON that ``fastad evaluate --json`` printed.

    Raises:
        InputError: no such file, or not such JSON.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        return TypeAdapter(Evaluation).validate_python(tree)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: expected the output of `fastad evaluate --json` ({reason})"
        ) from error


def protocol_results(
    name: str, evaluations: Mapping[str, Evaluation | Sequence[Evaluation]]
) -> dict[str, Any]:
    """The figures of `protocol_table` as plain JSON values, AUROC and AUPRO in 0..1.

    Args:
        name: One of `PROTOCOLS`.
        evaluations: By label, such as a method's name: one evaluation for a unified model, or
            several where each category or split has a model of its own.

    Returns:
        ``rows`` in the papers' order and ``means`` of groups and of all, each by label and metric;
        None where nothing was measured. A mean is over the ``count`` rows that were measured.

    Raises:
        InputError: a category that the protocol does not have, or that one label has twice.
    """
    protocol = find_protocol(name)
    scores = {label: _by_category(protocol, label, given) for label, given in evaluations.items()}
    groups = protocol.groups or {
        "mean": tuple(dict.fromkeys(category for found in scores.values() for category in found))
    }
    everything = tuple(row for group in groups.values() for row in group)
    rows = {
        row: {
            label: {metric: getattr(found.get(row), metric, None) for metric in protocol.metrics}
            for label, found in scores.items()
        }
        for row in everything
    }
    means = {**groups, "mean": everything}
    return {
        "protocol": name,
        "title": protocol.title,
        "source": protocol.source,
        "note": protocol.note,
        "labels": list(scores),
        "metrics": list(protocol.metrics),
        "rows": rows,
        "groups": {group: list(members) for group, members in means.items()},
        "means": {
            group: {
                label: {m: _mean([rows[r][label][m] for r in members]) for m in protocol.metrics}
                for label in scores
            }
            for group, members in means.items()
        },
    }


def _by_category(
    protocol: Protocol, label: str, given: Evaluation | Sequence[Evaluation]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for evaluation in given if isinstance(given, Sequence) else (given,):
        for scores in evaluation.categories:
            if protocol.groups and scores.category not in protocol.rows:
                raise InputError(
                    f"{label}: {scores.category} is no category of {protocol.title}; expected "
                    f"{', '.join(protocol.rows)}"
                )
            if scores.category in found:
                raise InputError(f"{label}: {scores.category} was evaluated more than once")
            found[scores.category] = scores
    return found


def _mean(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {"value": sum(known) / len(known) if known else None, "count": len(known)}


def protocol_table(
    name: str, evaluations: Mapping[str, Evaluation | Sequence[Evaluation]]
) -> Table:
    """Results as the papers print them: percent, rows in their order, means below, '-' for none.

    A mean over fewer rows than the protocol has is followed by how many of them it covers, such as
    ``96.5 (13/15)``: it compares with no published mean. Arguments and errors are those of
    `protocol_results`.
    """
    results = protocol_results(name, evaluations)
    labels, metrics, groups = results["labels"], results["metrics"], results["groups"]
    table = Table(title=f"{results['title']}, in %", caption=results["note"] or None)
    table.add_column("category")
    for label in labels:
        for metric in metrics:
            head = HEADS[metric] if len(labels) == 1 else f"{label}\n{HEADS[metric]}"
            table.add_column(head, justify="right")

    def mean_row(group: str) -> list[str]:
        total = len(groups[group])
        means = results["means"][group]
        return [_mean_cell(means[label][m], total) for label in labels for m in metrics]

    printed = [group for group in groups if group != "mean"] or ["mean"]
    for group in printed:
        for row in groups[group]:
            cells = results["rows"][row]
            table.add_row(row, *(_percent(cells[label][m]) for label in labels for m in metrics))
        table.add_section()
        if group != "mean":
            table.add_row(f"mean of {group}", *mean_row(group))
            table.add_section()
    table.add_row("mean", *mean_row("mean"))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _mean_cell(mean: dict[str, Any], total: int) -> str:
    covers = f" ({mean['count']}/{total})" if 0 < mean["count"] < total else ""
    return _percent(mean["value"]) + covers
