"""The page docs/explanation/performance.md and its plots, from what a run has measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from lab import CHECKOUT
from remetal.units import format_bytes

PAGE = CHECKOUT / "docs" / "explanation" / "performance.md"
PLOTS = PAGE.parent / "performance"
MEMORY = PAGE.with_name("memory.md")
_MEASURED = "<!-- measured by `make bench` -->"
_REASONS = Path(__file__).with_name("reasons.md")

pyplot.rcParams.update(
    {"svg.hashsalt": "remetal", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
)
_OURS, _LIMIT, _OTHER = "#0b6e4f", "#c8553d", "#8d99ae"
_CORES = (1, 2, 4, 8, 16)
"""For these the throughput is computed, if the machine has fewer."""


def write_page(record: Mapping[str, Any]) -> Path:
    """Write the page and the plots; return the page's path. The same record gives the same bytes."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    _plot_ratios(record["findings"])
    _plot_parts(record["parts"])
    _plot_cores([each for each in record["findings"] if each["work"] == "capture by cores"])
    _plot_choices(record["choices"])
    machine = record["machine"]
    head = (
        "# Performance\n\nThis page is made by `make bench` from what it has measured: "
        f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}. Every figure is the median of "
        f"{record['rounds']} rounds in which all took turns. A ratio is remetal's figure as a part of its peer's.\n\n"
    )
    ratios = "![remetal as a part of its peers](performance/ratios.svg)\n"
    parts = [head, _table(record["findings"]), ratios, _limits(record), _REASONS.read_text(), _settings(record)]
    PAGE.write_text("\n".join(parts))
    _write_memory([each for each in record["findings"] if each["work"].startswith("memory: ")])
    return PAGE


def _write_memory(findings: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table of what was measured in the page about memory."""
    measured = [each for each in findings if "computed" not in each["data"]]
    rows = [f"| {each['work'].removeprefix('memory: ')} | {each['ours']:.0f} MiB |" for each in measured]
    table = "\n".join(["| work | greatest resident size |", "|---|---:|", *rows])
    before, mark, rest = MEMORY.read_text().partition(_MEASURED)
    after = rest[rest.index("\n\n", 2) :]
    MEMORY.write_text(f"{before}{mark}\n\n{table}{after}")


def _limits(record: Mapping[str, Any]) -> str:
    """Return how the limit of the hardware compares with the fastest peer."""
    captures = {
        each["data"]: each for each in record["findings"] if each["work"] == "full capture" and "zstd" in each["peer"]
    }
    rows = [
        "| data | the limit | with decoding | remetal | partclone \\| zstd | limit / partclone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for each in record["parts"]:
        four = sum(each[part] for part in ("read", "blake3", "zstd", "aes")) / record["machine"]["cores"]
        five = four + each["verify"] / record["machine"]["cores"]
        found = captures[each["data"]]
        cells = [f"{seconds:.1f} s" for seconds in (four, five, found["ours"], found["theirs"])]
        rows.append(f"| {' | '.join([each['data'], *cells, format(four / found['theirs'], '.2f')])} |")
    return "\n".join(rows) + "\n"


def _settings(record: Mapping[str, Any]) -> str:
    """Return what a full capture takes with other constants than ours."""
    rows = ["| setting | value | full capture | repository | |", "|---|---:|---:|---:|---|"]
    for each in record["settings"]:
        value = format_bytes(each["value"]) if each["what"].startswith("bytes") else str(each["value"])
        cells = [each["what"], value, f"{each['seconds']:.2f} s", format_bytes(each["stored"])]
        rows.append(f"| {' | '.join(cells)} | {'ours' if each['default'] else ''} |")
    return "\n".join(rows) + "\n"


def _table(findings: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| work | data | remetal | peer | | ratio | goal | |", "|---|---|---:|---:|---|---:|---:|---|"]
    for each in findings:
        goal = f"{'≥' if each['at_least'] else '≤'} {each['goal']:.2f}"
        ours, theirs = (f"{each[side]:.2f} {each['unit']}" for side in ("ours", "theirs"))
        reached = "reached" if each["reached"] else "missed"
        cells = [each["work"], each["data"], ours, theirs, each["peer"], f"{each['ratio']:.2f}", goal, reached]
        rows.append(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in cells)} |")
    return "\n".join(rows) + "\n"


def _plot_ratios(findings: Sequence[Mapping[str, Any]]) -> None:
    rows = [each for each in findings if not each["at_least"]][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.34 * len(rows) + 1))
    axes.barh(range(len(rows)), [each["ratio"] for each in rows], color=_OURS, height=0.6)
    for number, each in enumerate(rows):
        axes.plot([each["goal"]] * 2, [number - 0.4, number + 0.4], color=_LIMIT, linewidth=2)
    axes.set_yticks(
        range(len(rows)),
        [f"{', '.join(filter(None, (each['work'], each['data'])))} / {each['peer']}" for each in rows],
        fontsize=8,
    )
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes.set_xlabel("remetal as a part of its peer (less is better); the mark is the goal")
    _save(figure, "ratios")


def _plot_parts(parts: Sequence[Mapping[str, Any]]) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 2.4))
    names = ("read", "blake3", "zstd", "aes", "verify")
    labels = ("reading", "BLAKE3", "zstd -1", "AES-GCM and the pack's hash", "decoding it again")
    colours = (_OTHER, "#3d5a80", _OURS, "#e0a458", _LIMIT)
    left = [0.0] * len(parts)
    for name, label, colour in zip(names, labels, colours, strict=True):
        widths = [each[name] / each["used"] * 1e9 for each in parts]
        axes.barh([each["data"] for each in parts], widths, left=left, label=label, color=colour, height=0.55)
        left = [sum(pair) for pair in zip(left, widths, strict=True)]
    axes.set_xlabel("seconds of one core for 1 GB")
    axes.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    _save(figure, "parts")


def _plot_cores(rows: Sequence[Mapping[str, Any]]) -> None:
    figure, axes = pyplot.subplots(figsize=(5, 3))
    counts = [int(each["peer"].split()[0]) for each in rows]
    axes.plot(counts, [each["ours"] for each in rows], "o-", color=_OURS, label="remetal")
    axes.plot(_CORES, [rows[0]["ours"] * count for count in _CORES], ":", color=_OTHER, label="in proportion")
    if len(rows) > 1:
        speeds = [rows[0]["ours"] * _speedup(_serial(rows), count) for count in _CORES]
        axes.plot(_CORES, speeds, "--", color=_LIMIT, label="computed from these (Amdahl)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(_CORES, [str(count) for count in _CORES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cores")
    axes.set_ylabel("MiB/s captured")
    axes.legend(frameon=False)
    _save(figure, "cores")


def _serial(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the part of the work on one core that more cores do not make faster, from the first and last row."""
    count = int(rows[-1]["peer"].split()[0])
    return max(0.0, (count * float(rows[0]["ours"]) / float(rows[-1]["ours"]) - 1) / (count - 1))


def _speedup(serial: float, count: int) -> float:
    """Return how many times as fast `count` cores are as one (Amdahl's law)."""
    return 1 / (serial + (1 - serial) / count)


def _plot_choices(choices: Sequence[Mapping[str, Any]]) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for chunk in sorted({each["chunk"] for each in choices}):
        rows = [each for each in choices if each["chunk"] == chunk]
        left.plot(
            [each["speed"] for each in rows], [each["stored"] for each in rows], "o-", label=f"{chunk >> 10} KiB chunks"
        )
        for each in rows:
            left.annotate(
                str(each["level"]),
                (each["speed"], each["stored"]),
                fontsize=7,
                xytext=(3, 3),
                textcoords="offset points",
            )
    left.set_xlabel("MB/s compressed by one core; the numbers are zstd's levels")
    left.set_ylabel("stored bytes per byte")
    left.legend(fontsize=8, frameon=False)
    rows = [each for each in choices if each["level"] == 1]
    right.plot([each["chunk"] >> 10 for each in rows], [each["rewritten"] for each in rows], "o-", color=_LIMIT)
    right.set_xscale("log", base=2)
    right.set_xticks([each["chunk"] >> 10 for each in rows], [str(each["chunk"] >> 10) for each in rows])
    right.set_xlabel("KiB per chunk")
    right.set_ylabel("part of all chunks that is stored again\nafter 1 % scattered 4 KiB writes")
    _save(figure, "choices")


def _save(figure: Figure, name: str) -> None:
    figure.savefig(PLOTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
