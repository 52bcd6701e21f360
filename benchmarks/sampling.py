"""Tokens a second of autoregressive sampling, beside transformers' Llama of the same shape and its own `generate`.

    OMP_NUM_THREADS=2 python benchmarks/sampling.py [--sizes b l] [--batches 1 16] [--tokens 256] [--out folder]

LlamaGen's shapes with random weights and heads, 16384 codes, float32 on the CPU. Both sides draw from the whole
distribution at temperature 1, without guidance and with classifier-free guidance (which costs a second sequence for
each sample: here a doubled batch, there a second pass). Measured in alternation in one run after one warm-up; times
are medians of wall time. `uncached` is a pass over all tokens so far for every token, timed at a few lengths;
coarse-to-fine is 512 clusters by the same shape and then one pass of the L shape. Writes sampling.json and sampling.md
into the folder, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tessella.attention import sampling
from tessella.generators.ar import AR
from tessella.generators.base import Generator
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.generators.sampling import generators
from tessella.tokenizer import TokenSpace
from tessella.transformer import default_hidden

SHAPES = {"b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1280, 36, 20)}  # dim, layers, heads
CODEBOOK_SIZE = 16384
NUM_CLUSTERS = 512
NUM_CLASSES = 1000
GUIDANCE = 2.0
UNCACHED_LENGTHS = 4

CONDITIONER = {"name": "label", "num_classes": NUM_CLASSES}


def token_space(tokens: int) -> TokenSpace:
    return TokenSpace((tokens // 16, 16), 1, CODEBOOK_SIZE, "benchmark")


def with_random_heads(generator: Generator) -> Generator:
    """A zero head would make every distribution uniform."""
    for name, module in generator.named_modules():
        if name.endswith("head") and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    return generator.eval()


def shape_of(size: str) -> dict[str, int]:
    dim, num_layers, num_heads = SHAPES[size]
    return {"dim": dim, "num_layers": num_layers, "num_heads": num_heads}


def ours(size: str, tokens: int) -> AR:
    model = AR(token_space(tokens), conditioner=CONDITIONER, rotary="grid_zero_prefix", **shape_of(size))
    with_random_heads(model)
    return model


def coarse_to_fine(size: str, tokens: int) -> CoarseToFine:
    model = CoarseToFine(
        token_space(tokens), num_clusters=NUM_CLUSTERS, conditioner=CONDITIONER,
        coarse={"name": "ar", "rotary": "grid_zero_prefix", **shape_of(size)}, fine=shape_of("l"),
    )  # fmt: skip
    with_random_heads(model)
    # Which codes share a cluster does not change the work; clustering 16384 random codes would take minutes.
    model.labels.copy_(torch.arange(CODEBOOK_SIZE) % NUM_CLUSTERS)
    model.fitted.fill_(True)
    return model


def peer(size: str, tokens: int) -> LlamaForCausalLM:
    dim, num_layers, num_heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=CODEBOOK_SIZE, hidden_size=dim, intermediate_size=default_hidden(dim, "swiglu"),
        num_hidden_layers=num_layers, num_attention_heads=num_heads, max_position_embeddings=tokens + 1,
        rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sample(model: Generator, batch: int, guidance: float) -> Callable[[], Any]:
    condition = torch.arange(batch) % NUM_CLASSES
    return lambda: model.sample(condition, rng=generators(range(batch)), guidance=guidance)


def peer_sample(model: LlamaForCausalLM, batch: int, tokens: int, guidance: float) -> Callable[[], Any]:
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": tokens}
    start = torch.zeros(batch, 1, dtype=torch.int64)
    extra: dict[str, Any] = {}
    if guidance != 1:
        how["guidance_scale"] = guidance
        extra = {"negative_prompt_ids": start + 1, "negative_prompt_attention_mask": torch.ones_like(start)}
    config = GenerationConfig(**how, pad_token_id=0)
    return lambda: model.generate(start, attention_mask=torch.ones_like(start), generation_config=config, **extra)


@sampling()
def uncached_seconds(model: AR, batch: int, tokens: int) -> float:
    """Seconds of all passes over the tokens so far, from the mean of a few lengths."""
    width = model.embedding.embedding_dim
    times = []
    for part in range(UNCACHED_LENGTHS):
        length = max(1, round((part + 0.5) / UNCACHED_LENGTHS * tokens))
        x = torch.randn(batch, length, width)
        times.append(seconds(lambda x=x: model.head(model.transformer(x)[:, -1])))
    return statistics.mean(times) * tokens


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in alternation after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            took = seconds(run)
            if repeat:
                times[name].append(took)
    return {name: statistics.median(kept) for name, kept in times.items()}


def measure(size: str, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, other, ctf = ours(size, tokens), peer(size, tokens), coarse_to_fine(size, tokens)
    rows = []
    for guidance in (1.0, GUIDANCE):
        runs = {
            "ours": sample(model, batch, guidance),
            "transformers": peer_sample(other, batch, tokens, guidance),
            "coarse_to_fine": sample(ctf, batch, guidance),
        }
        took = compare(runs, repeats)
        if guidance == 1:
            took["uncached"] = uncached_seconds(model, batch, tokens)
        rates = {name: batch * tokens / one for name, one in took.items()}
        row = {"size": size, "batch": batch, "guidance": guidance, "tokens_per_s": rates,
               "ratio": rates["ours"] / rates["transformers"]}  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| shape | batch | guidance | ours, tokens/s | transformers | times as fast | coarse-to-fine | uncached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = {name: f"{value:.1f}" for name, value in row["tokens_per_s"].items()}
        lines.append(
            f"| {row['size'].upper()} | {row['batch']} | {row['guidance']:g} | {rate['ours']} | {rate['transformers']} "
            f"| {row['ratio']:.2f} | {rate['coarse_to_fine']} | {rate.get('uncached', '')} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["b", "l"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=256, help="a multiple of 16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        for batch in arguments.batches:
            rows += measure(size, batch, arguments.tokens, arguments.repeats)
    summary = {
        "torch": torch.__version__,
        "peer": f"transformers {version('transformers')}",
        "threads": torch.get_num_threads(),
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    lines = table(rows)
    lines += ["", f"{arguments.tokens} tokens, medians of {arguments.repeats}, {summary['threads']} threads, "
              f"{summary['peer']}, torch {torch.__version__}."]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "sampling.json").write_text(json.dumps(summary, indent=2) + "\n")
    (arguments.out / "sampling.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
