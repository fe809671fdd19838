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


def of_quality(result: dict) -> str:
    """A row for each trained model: what it is, how it was trained, and its BLEU."""
    rows = result["rows"]
    first = next(iter(rows.values()))
    lines = [
        f"BLEU on {result['source']} ({result['sentences']} sentences, beam {result['beam_size']}), trained on "
        f"{result['machine']['processor']}, {result['date']} (`python -m bench.quality`): as written "
        f"`{first['signature']}`, in lower case `{first['signature_lower_cased']}`, and as papers on "
        f"Multi30k report it, in lower case over Moses's tokens, `{first['signature_tokenised']}`.",
        "",
        "| layers | parameters | steps | averaged | minutes | target tokens a second | BLEU | lower case | Moses |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.1f} million | {row['steps']} | {row['averaged']} | "
            f"{row['minutes']} | {row['tokens_per_second']:,} | {row['bleu']:.2f} | {row['bleu_lower_cased']:.2f} | "
            f"**{row['bleu_tokenised']:.2f}** |"
        )
    return "\n".join(lines)


# By the folder of bench/results, which names README's marks too.
SECTIONS = {"training": of_training, "quality": of_quality}
