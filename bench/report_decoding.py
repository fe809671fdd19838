"""README's sections about decoding, from the results of bench.ctranslate2, bench.step and bench.trained."""

from __future__ import annotations

# Column heads, and the contestant that each is about.
COLUMNS = {
    "CTranslate2 float32": "ctranslate2 float32",
    "ours float32": "fused float32",
    "token by token": "one_by_one float32",
    "CTranslate2 int8": "ctranslate2 int8",
    "ours bfloat16": "fused bfloat16",
    "ours int8": "fused int8",
}


def of_ctranslate2(result: dict) -> str:
    """A row for each batch, beam size and thread count: tokens a second, and how many times CTranslate2's float32."""
    machine = result["machine"]
    model = result["model"]
    columns = {head: name for head, name in COLUMNS.items() if any(name in row["engines"] for row in result["rows"])}
    lines = [
        f"Tokens a second on {machine['processor']}, {result['date']}, CTranslate2 {machine['ctranslate2']}, "
        f"torch {machine['torch']}: {model['num_encoder_layers']} + {model['num_decoder_layers']} layers of "
        f"{model['d_model']}, {model['target_vocab_size']:,} subwords, random weights, exactly "
        f"{result['rows'][0]['length']} tokens out of 8 to 60; medians of turns. In brackets: the share of the least "
        "time that reading all weights and multiplying by them takes at this machine's own rates (above 100 %: weights "
        "that stay in the cache, or need not be read, or are read once for several tokens)." + _earlier(result),
        "",
        "| work | " + " | ".join(columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    lines += [f"| {row['name']} | " + " | ".join(_cell(row, name) for name in columns.values()) + " |"
              for row in result["rows"]]  # fmt: skip
    lines += ["", _agreement(result["rows"]), "", _processes(result["processes"])]
    return "\n".join(lines)


def _earlier(result: dict) -> str:
    """What is to be said of a result from before `bench.contestant`, or from before decoding looked ahead."""
    told = ""
    if not result.get("processes_of_their_own"):
        told = (
            " All engines ran in one process, where with 2 threads each is in the others' way: up to half as fast as "
            "alone."
        )
    if not result.get("looks_ahead"):
        told += " Measured before decoding looked ahead: float32 at batch 1 is quicker since."
    return told


def _cell(row: dict, name: str) -> str:
    figures = row["engines"].get(name)
    if figures is None:
        return "-"
    faster = "" if name == "ctranslate2 float32" else f", {figures['speedup']:.2f}×"
    return f"{figures['tokens_per_second']:,.0f}{faster} ({figures['share_of_limit']:.0%})"


def _agreement(rows: list[dict]) -> str:
    def count(name: str, what: str) -> int:
        return sum(row["engines"][name][what] for row in rows if name in row["engines"])

    told = []
    for title, name in COLUMNS.items():
        if name != "ctranslate2 float32" and count(name, "sentences"):
            told.append(f"{title} {count(name, 'same')} of {count(name, 'sentences')}")
    return (
        "The same translation as CTranslate2's float32 (random weights leave many tokens nearly as likely as the "
        f"best): {'; '.join(told)}."
    )


def _processes(processes: dict[str, dict]) -> str:
    told = []
    for title, name in COLUMNS.items():
        if name in processes:
            own = processes[name]
            took = own["peak_megabytes"] - own["before_megabytes"]
            told.append(f"{title} {own['load_seconds']:.2f} s and {took:.0f} MB")
    return f"Loading, and memory at most beyond the libraries' own: {'; '.join(told)}."


def of_step(result: dict) -> str:
    """What README says of `bench.step`: each part as its share of the step."""
    shares = ("products", "attention", "norms", "rest", "vocabulary", "search")
    apart = ""
    if any(row["rest"] < 0 for row in result["rows"]):
        apart = (
            " Products, attention and norms were timed as calls of their own here, which take longer than within the "
            "step: `rest` is what they are too much."
        )
    lines = [
        f"A step on {result['machine']['processor']}, {result['date']}, {result['position']} tokens into sources of "
        f"{result['source']}; shares of it, and the least time for its products at this machine's own rates "
        f"(`python -m bench.step`; above 100 %: weights that stay in the cache, or need not be read).{apart}",
        "",
        "| step | ms | " + " | ".join(shares) + " | limit |",
        "|---|--:|" + "--:|" * (len(shares) + 1),
    ]
    for row in result["rows"]:
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        name = f"{row['weights']}, batch {row['batch']}, {row['beams']} beam{'s' * (row['beams'] > 1)}, {threads}"
        cells = [f"{row[part] / row['whole']:.0%}" for part in (*shares, "limit")]
        lines.append(f"| {name} | {row['whole'] / 1e3:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_trained(result: dict) -> str:
    """What README says of `bench.trained`: BLEU of each kind of weights, and how many sentences are the same."""
    rows = [row for row in result["rows"] if row["length_penalty"] == 1.0]
    told = "; ".join(
        f"{'CTranslate2' if row['engine'] == 'ctranslate2' else 'ours'} {row['weights']} {row['bleu']:.2f}"
        for row in rows
    )
    same = next(row["same"] for row in rows if (row["engine"], row["weights"]) == ("fused", "float32"))
    return (
        f"The small model above after {result['step']} steps, given {result['source']} with {result['beam_size']} "
        f"beams and CTranslate2's rules: ours in float32 finds the very translation of CTranslate2 for {same} of "
        f"{result['sentences']} sentences (`python -m bench.trained`). sacreBLEU by weights: {told}."
    )


# By the folder of bench/results, which names README's marks too.
SECTIONS = {"ctranslate2": of_ctranslate2, "step": of_step, "trained": of_trained}
