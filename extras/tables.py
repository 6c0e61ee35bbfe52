"""The tables of evaluate.py: means over questions with their intervals, as numbers and as Markdown.

rows: lines of predictions.jsonl; metrics: evaluate.METRICS, {name: (title, function of a row)}.
"""

import json
from collections import Counter
from pathlib import Path

from extras.intervals import interval, percent
from runtime.files import write_whole


def summarise(rows: list[dict], metrics: dict) -> dict:
    """{"all": {"n": questions, metric: {mean, low, high, n} or None, …}, "supercategory": {name: the same},
    "category": {…}, "wording": {…}, "refusals": {reason: count}}"""

    def part(chosen: list[dict]) -> dict:
        result = {"n": len(chosen)}
        for key in metrics:
            defined = [value[key] for value in chosen if value[key] is not None]
            result[key] = interval(defined)._asdict() | {"n": len(defined)} if defined else None
        return result

    values = [{key: metric(row) for key, (_, metric) in metrics.items()} for row in rows]
    summary = {"all": part(values)}
    for name in ("supercategory", "category", "wording"):
        groups = sorted({row[name] for row in rows if row[name]})
        summary[name] = {
            group: part([value for row, value in zip(rows, values) if row[name] == group])
            for group in groups
        }
    problems = Counter(c["problem"] for row in rows for c in row["completions"] if c["problem"])
    return {**summary, "refusals": dict(problems.most_common())}


def table(summary: dict, metrics: dict) -> str:
    """The summary as Markdown, in percent."""
    keys = [key for key in metrics if summary["all"][key]]

    def line(name: str, group: dict) -> str:
        return (
            f"| {name} | {group['n']} | " + " | ".join(percent(group[key]) for key in keys) + " |"
        )

    lines = [
        "Percent, mean over questions [95 % bootstrap interval; – for fewer than 5].",
        "",
        "| | n | " + " | ".join(metrics[key][0] for key in keys) + " |",
        "|---" * (len(keys) + 2) + "|",
        line("all", summary["all"]),
    ]
    for name in ("supercategory", "wording", "category"):
        if summary[name]:
            lines.append(f"| *by {name.replace('super', 'super-')}* |" + " |" * (len(keys) + 1))
            lines += [line(*item) for item in summary[name].items()]
    reasons = [f"- {count} × {reason}" for reason, count in summary["refusals"].items()]
    return "\n".join([*lines, "", "Refusals:" if reasons else "Refusals: none.", *reasons]) + "\n"


def report(rows: list[dict], metrics: dict, folder: Path) -> None:
    """Write and print the tables of an evaluation."""
    summary = summarise(rows, metrics)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_whole(folder / "table.md", table(summary, metrics))
    print(table(summary, metrics).split("| *by category*")[0].rstrip())
    print(f"tables {folder / 'table.md'}, numbers {folder / 'summary.json'}")
