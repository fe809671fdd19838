"""Results as a table on the terminal, and as README's table and figure.

    python -m bench.report [bench/results/X.json ...]     rewrites README.md between <!-- bench:begin --> and its end,
                                                          and between <!-- gpu:begin --> and its end

Without files: the newest result of each processor or GPU that bench/results holds. Nothing is left out: a row where
another implementation is quicker stays, in the table and in the figure. Numbers in README.md are never typed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from datetime import date
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile

from bench import report_decoding, report_growth, report_training

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"  # results of a GPU have a heading of their own


def results_of(machine: dict, rooflines: dict, rows: list[dict], curves: list[dict], memory: list[dict]) -> dict:
    """One run, as its JSON has it."""
    head = {"machine": machine, "date": f"{date.today():%Y-%m-%d}", "rooflines": rooflines}
    return {**head, "rows": rows, "curves": curves, "memory": memory}


def refusal_of_folder(folder: Path) -> str | None:
    """None, or the sentence why results can't be written there. The folder is made: nothing else tells for certain."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return None
    except FileExistsError:
        return f"{folder} is a file and no folder"
    except OSError as error:
        return f"{folder} can't be written to: {error.strerror or error}"


def write_results(folder: Path, results: dict, *, complete: bool = True) -> Path:
    """Write one run as JSON; the file is named after the processor or GPU, and the day. One that is not complete has
    another name, and README is never made of it: a row missing would mislead."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = results["machine"]
    end = "" if complete else "_incomplete"
    path = folder / f"{slug(machine.get('gpu') or machine['processor'])}_{results['date']}{end}.json"

    def one(value) -> str:
        if not isinstance(value, list):
            return json.dumps(value)
        return "[\n" + ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value) + "\n ]"

    # A line a row: diffs stay readable. By way of another name: a disk that fills up leaves no half of a result.
    text = "{\n" + ",\n".join(f" {json.dumps(key)}: {one(value)}" for key, value in results.items()) + "\n}\n"
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_comparison(name: str, result: dict, output: Path | None = None) -> None:
    """Write what a program of its own measured to `output`, or to bench/results/<name>, which README tells of."""
    path = output or ROOT / "bench" / "results" / name / f"{slug(result['machine']['processor'])}_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


# ---------------------------------------------------------------- one row


def others(row: dict) -> dict[str, float]:
    """Median of each alternative divided by ours: above 1, ours is quicker."""
    own = row["times"][row["ours"]]["median_us"]
    return {name: times["median_us"] / own for name, times in row["times"].items() if not is_ours(name, row)}


def is_ours(label: str, row: dict) -> bool:
    """Whether a label is ours: as it chooses itself, or "fused triton" and the like, on a backend that was forced."""
    return label == row["ours"] or label.startswith(f"{row['ours']} ")


def forced(row: dict) -> dict[str, float]:
    """Median of ours on a backend, or by a kernel, that it did not choose itself, divided by ours."""
    own = row["times"][row["ours"]]["median_us"]
    labels = [label for label in row["times"] if is_ours(label, row) and label != row["ours"]]
    return {label: row["times"][label]["median_us"] / own for label in labels}


def fastest_other(row: dict) -> tuple[str, float] | None:
    ratios = others(row)
    return min(ratios.items(), key=lambda item: item[1]) if ratios else None


def duration(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.1f} µs"


def rate(row: dict) -> str:
    """What ours moves or computes a second, and its share of what the machine was measured to do in the same run; the
    memory it holds at most, and naive's, where they were measured.
    """
    peaks = row.get("peak_bytes")
    memory = f"; {peaks[row['ours']] / 1e6:.0f} MB, naive {peaks['naive'] / 1e6:.0f} MB" if peaks else ""
    return _rate(row) + memory


def _rate(row: dict) -> str:
    copies = "gb_per_s" in row and row["share_of_copy"] > row.get("share_of_matmul", 0)  # the limit that is nearer
    if "gflop_per_s" in row and not copies:
        return f"{row['gflop_per_s']:.0f} GFLOP/s ({row['share_of_matmul']:.0%} of matmul)"
    if "gb_per_s" in row:
        return f"{row['gb_per_s']:.1f} GB/s ({row['share_of_copy']:.0%} of copy)"
    if "tokens_per_s" in row:
        return f"{row['tokens_per_s']:,} tokens/s"
    return ""


def apart(row: dict) -> str:
    """On a GPU, the device alone and the host alone (bench/apart.py): ours, on other backends too, and the quickest
    alternative's of each."""
    told = []
    for key, name in (("graph_us", "device"), ("host_us", "host")):
        times = row.get(key, {})
        rest = {label: time for label, time in times.items() if not is_ours(label, row)}
        if row["ours"] in times:
            best = min(rest, key=lambda label: rest[label]) if rest else None
            mine = f"{name} {duration(times[row['ours']])}"
            for label in (label for label in times if is_ours(label, row) and label != row["ours"]):
                mine += f", {label.removeprefix(row['ours'] + ' ')} {duration(times[label])}"
            told.append(mine + (f" ({best} {duration(rest[best])})" if best else ""))
    return "; ".join(told)


def grouped(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    order = list(dict.fromkeys(row["group"] for row in rows))
    ordered = sorted(rows, key=lambda row: order.index(row["group"]))
    return [(group, list(members)) for group, members in groupby(ordered, key=lambda row: row["group"])]


def machine_line(machine: dict, rooflines: dict) -> str:
    matmul = ", ".join(f"{dtype} {gflops:.0f}" for dtype, gflops in rooflines["matmul_gflop_per_s"].items())
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}"
    rates = f"copy {rooflines['copy_gb_per_s']:.1f} GB/s" + (f", matmul {matmul} GFLOP/s" if matmul else "")
    return f"{where}; torch {machine['torch']}; commit {machine['commit'] or 'unknown'}; {rates}"


# ---------------------------------------------------------------- on the terminal


def text_table(results: dict) -> list[str]:
    """One block for each group: our time, each other implementation as a multiple of it, and our rate; then curves and
    memory.
    """
    rows = results["rows"]
    lines = [machine_line(results["machine"], results["rooflines"])]
    lines += _rows_table(rows) if rows else []
    return lines + report_growth.text(results.get("curves", []), results.get("memory", []))


def _rows_table(rows: list[dict]) -> list[str]:
    lines = ["× is an other implementation's time over ours: above 1, ours is quicker"]
    for group, members in grouped(rows):
        labels = list(dict.fromkeys(label for of in (forced, others) for row in members for label in of(row)))
        width = max(len(row["name"]) for row in members)
        lines += ["", f"{group:<{width}}  {'ours':>10}" + "".join(f"  {label:>12}" for label in labels)]
        for row in members:
            ratios = forced(row) | others(row)
            cells = [f"{ratios[label]:.2f}×" if label in ratios else "-" for label in labels]
            own = duration(row["times"][row["ours"]]["median_us"])
            lines.append(
                f"{row['name']:<{width}}  {own:>10}" + "".join(f"  {cell:>12}" for cell in cells) + f"  {rate(row)}"
            )
            lines += [f"  {apart(row)}"] if apart(row) else []
            lines += [f"  {label} refused: {reason}" for label, reason in row["refused"].items()]
    lost = [row for row in rows if (best := fastest_other(row)) and best[1] < 1]
    lines += [
        "",
        f"{len(rows)} rows; another implementation is quicker in {len(lost)}:" if lost else f"{len(rows)} rows",
    ]
    lines += [f"  {row['group']} {row['name']}: {fastest_other(row)[0]} {fastest_other(row)[1]:.2f}×" for row in lost]
    return lines


# ---------------------------------------------------------------- in README


def markdown(results: dict, figure: str) -> str:
    lines = [f"![Each benchmark's time against the fastest alternative's]({figure})", "", "<details>"]
    lines += [f"<summary>{machine_line(results['machine'], results['rooflines'])}; {results['date']}</summary>"]
    lines += ["", results["note"]] if "note" in results else []
    for group, rows in grouped(results["rows"]):
        both = any(apart(row) for row in rows)
        lines += [
            "",
            f"| {group} | ours | fastest other | | against naive | our rate |" + (" apart |" if both else ""),
            "|---|--:|---|--:|--:|---|" + ("---|" if both else ""),
        ]
        for row in rows:
            best, ratios = fastest_other(row), others(row)
            own = duration(row["times"][row["ours"]]["median_us"])
            other = (
                f"{best[0]} {duration(row['times'][best[0]]['median_us'])} | **{best[1]:.2f}×**" if best else "- | -"
            )
            naive = f"{ratios['naive']:.2f}×" if "naive" in ratios else "-"
            line = f"| {row['name']} | {own} | {other} | {naive} | {rate(row)} |"
            lines.append(line + (f" {apart(row)} |" if both else ""))
    lines += report_growth.markdown(results.get("curves", []), results.get("memory", []))
    return "\n".join([*lines, "", "</details>"])


def write_figure(results: dict, path: Path) -> None:
    """A line for each group, on it a dot for each row: how many times as long as ours the fastest alternative takes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    groups = grouped([row for row in results["rows"] if others(row)])
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.26 * len(groups)), layout="constrained")
    for place, (_, rows) in enumerate(groups):
        ratios = [fastest_other(row)[1] for row in rows]
        colours = ["#2a7f62" if ratio >= 1 else "#b5483b" for ratio in ratios]
        axes.plot([min(ratios), max(ratios)], [place, place], color="#bbbbbb", linewidth=1.5, zorder=1)
        axes.scatter(ratios, [place] * len(rows), color=colours, s=26, zorder=2)
        middle = statistics.median(ratios)
        axes.annotate(f"{middle:.2f}×", (1, place), (4, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
    axes.set_yticks(range(len(groups)), [group for group, _ in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("time of the fastest alternative / ours; a dot is a shape, right of the line ours is quicker")
    axes.set_title("median", loc="right", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def newest(folder: Path) -> list[Path]:
    """The latest file of each processor or GPU, the latest of all first; names end with the day."""
    latest = {path.stem.rpartition("_")[0]: path for path in sorted(folder.glob("*_????-??-??.json"))}
    return sorted(latest.values(), key=lambda path: path.stem.rpartition("_")[2], reverse=True)


def update_readme(readme: Path, section: str, begin: str = BEGIN, end: str = END) -> None:
    text = readme.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{readme.name} has no {begin} ... {end} to write between")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    readme.write_text(f"{before}\n{section}\n{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition("\n\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: the newest of each processor)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--print", action="store_true", help="print the tables and change nothing")
    options = parser.parse_args(arguments)
    files = options.results or newest(ROOT / "bench" / "results")
    if not files:
        parser.error("bench/results holds no results: run python -m bench first")
    sections: dict[str, list[str]] = {"cpu": [], "cuda": []}
    for path in files:
        results = json.loads(path.read_text())
        if options.print:
            print("\n".join(text_table(results)))
            continue
        figure = path.with_suffix(".svg")
        write_figure(results, figure)
        told = markdown(results, figure.resolve().relative_to(options.readme.resolve().parent).as_posix())
        sections[results["machine"].get("device", "cpu")].append(told)
    for device, marks in (("cpu", (BEGIN, END)), ("cuda", (GPU_BEGIN, GPU_END))):
        if sections[device]:
            update_readme(options.readme, "\n\n".join(sections[device]), *marks)
    if options.results or options.print:
        return
    for name, section in {**report_decoding.SECTIONS, **report_training.SECTIONS}.items():
        files = newest(ROOT / "bench" / "results" / name)
        if files:
            marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            told = [section(json.loads(path.read_text())) for path in files]
            update_readme(options.readme, "\n\n".join(told), *marks)
    from bench import aims  # which asks this module what the fastest alternative of a row is

    told = "\n".join(aims.table(aims.newest()))
    update_readme(ROOT / "bench" / "README.md", told, "<!-- aims:begin -->", "<!-- aims:end -->")


if __name__ == "__main__":
    main()
