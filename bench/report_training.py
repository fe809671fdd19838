"""README's section about training, from the results of bench.training."""

from __future__ import annotations

PARTS = ("products", "attention", "norms", "embedding", "loss", "optimizer", "rest")


def of_training(result: dict) -> str:
    """Two tables: a step of ours beside torch.nn's, eager and compiled; and what a step of ours is made of."""
    machine, rates = result["machine"], result["rooflines"]
    lines = [
        f"A training step on {machine['processor']}, {result['rows'][0]['threads']} threads, {result['date']}, torch "
        f"{machine['torch']}: forward, loss, backward and Adam in float32, sentences in random order "
        "(`python -m bench.training`).",
        "",
        "| step | padding | ours | target tokens a second | torch.nn | torch.nn, torch.compile |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        own = row["times"]["fused"]["median_us"]
        others = [
            f"{row['times'][label]['median_us'] / own:.2f}×" if label in row["times"] else "-"
            for label in ("torch.nn", "torch.nn compiled")
        ]
        rate = f"{row['tokens'] / own * 1e6:,.0f}"
        lines.append(
            f"| {row['shape']} | {row['padding']:.0%} | {own / 1e3:.0f} ms | {rate} | " + " | ".join(others) + " |"
        )
    lines += [
        "",
        "Where the time of ours goes, by the profiler, and in brackets the least time for a part, at a large product's "
        f"{rates['matmul_gflop_per_s']:.0f} GFLOP/s and a copy's {rates['copy_gb_per_s']:.1f} GB/s:",
        "",
        "| step | " + " | ".join(PARTS) + " |",
        "|---|" + "--:|" * len(PARTS),
    ]
    for row in result["rows"]:
        lines.append(f"| {row['shape']} | " + " | ".join(_part(row, part) for part in PARTS) + " |")
    return "\n".join(lines)


def _part(row: dict, part: str) -> str:
    whole, own = sum(row["parts"].values()), row["parts"][part]
    least = f" ({row['limits'][part] / 1e3:.1f})" if part in row["limits"] else ""
    return f"{own / 1e3:.1f} ms{least}, {own / whole:.0%}"


BLEUS = {"bleu": "as written", "bleu_lower_cased": "in lower case", "bleu_tokenised": "Moses's tokens in lower case"}


def of_quality(result: dict) -> str:
    """A row for each trained model: what it is, how it was trained, and its BLEU."""
    rows = result["rows"]
    signatures = next(iter(rows.values()))["signatures"]
    shown = [name for name in BLEUS if name in signatures]
    lines = [
        f"BLEU on {result['source']} ({result['sentences']} sentences, beam {result['beam_size']}), trained on "
        f"{result['machine']['processor']}, {result['date']} (`python -m bench.quality`): "
        + "; ".join(f"{BLEUS[name]}, `{signatures[name]}`" for name in shown)
        + ".",
        "",
        "| layers | parameters | steps | averaged | minutes | target tokens a second | "
        + " | ".join(BLEUS[name] for name in shown)
        + " |",
        "|---|" + "--:|" * (5 + len(shown)),
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.1f} million | {row['steps']} | {row['averaged']} | "
            f"{row['minutes']} | {row['tokens_per_second']:,} | "
            + " | ".join(f"{row[bleu]:.2f}" for bleu in shown)
            + " |"
        )
    return "\n".join(lines)


# By the folder of bench/results, which names README's marks too.
SECTIONS = {"training": of_training, "quality": of_quality}
