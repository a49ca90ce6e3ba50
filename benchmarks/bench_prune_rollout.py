"""Rollouts with pruned images: time of the prefill, bytes of KV, samples that fit into memory, tokens per second.

    python benchmarks/bench_prune_rollout.py --output benchmarks/results/prune_rollout.jsonl

On a CPU the tiny Qwen2.5-VL of bench_rollout.py, on a GPU a random model of Qwen2.5-VL-3B's shape. For each batch size
and for sharing on and off, engines of all methods and keep ratios take turns; the first round is a warm-up.

    sharing    the batch is groups of up to 8 samples, each of one request with a picture of its own: a group's prompt
               is computed and held once
    without    every sample is a request of its own, with n = 1 and another first token, so that no keys are shared; 8
               samples look at one picture, which is encoded once, as in a group
    encode_s   tower and selection at the encoder. prefill_s: the language model up to the first token of every sample,
               with what methods inside the model select. decode_s: the other tokens
    tokens_per_second, decode_tokens_per_second: of the whole run, of its decode steps
    kv_bytes   pages in use after a step, at most; kv_prompt_bytes: when all first tokens are drawn
    fits       samples that run to their last token without a preemption in kv_memory, which is what the batch takes
               without pruning and sharing
    prefill_speedup, speedup   against the engine without pruning in the same round, of prefill_s and of the whole run

Before anything is timed, each method at keep 1.0 must give the tokens of an engine without pruning: greedy, on a CPU in
deterministic mode and with equal log-probs too. Every run checks how many tokens its plan keeps. Rows are medians.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from bench_rollout import tiny_vl
from common import Options, append_rows, options_of, parser
from machine import environment
from pruned_rollouts import PAGE_SIZE, Contender, Setting, Times, check_keeping_all, plain_memory
from torch import nn

from foveate.rollout.config import PruneConfig

METHODS = ("visionzip", "divprune", "fastv", "pyramiddrop", "random")
KEEPS = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Size:
    """What is measured. images: rows and columns of tokens of the picture, by batch size. pairs, seconds: of a setting,
    rounds after the first one, and after how long no further one begins.
    """

    images: dict[int, tuple[int, int]]
    new_tokens: int
    pairs: int
    seconds: float


CPU = Size({1: (20, 20), 8: (20, 20), 64: (8, 8)}, new_tokens=16, pairs=3, seconds=120)
GPU = Size({1: (36, 36), 8: (36, 36), 64: (36, 36)}, new_tokens=64, pairs=5, seconds=20)
QUICK = Size({1: (4, 6), 8: (4, 6)}, new_tokens=4, pairs=1, seconds=0)


def measure(model: nn.Module, setting: Setting, cases: Sequence[PruneConfig | None], size: Size) -> list[dict]:
    """A row for each case. cases: the first one is the engine without pruning."""
    memory = plain_memory(model, setting)
    contenders = [Contender(model, setting, case, memory) for case in cases]
    rounds: list[list[Times]] = []
    start = time.perf_counter()
    while len(rounds) < 2 or (len(rounds) <= size.pairs and time.perf_counter() - start < size.seconds):
        places = sorted(range(len(cases)), key=lambda place: (place - len(rounds)) % len(cases))  # another begins
        times = {place: contenders[place].run() for place in places}
        rounds.append([times[place] for place in range(len(cases))])
    rounds = rounds[1:]
    return [
        {
            "benchmark": "prune_rollout",
            "method": case.method if case else "none",
            "keep": case.keep if case else 1.0,
            "sharing": setting.sharing,
            "batch": setting.batch,
            "n": setting.n,
            "image_tokens": setting.image_tokens,
            "prompt_tokens": len(contenders[0].requests[0].prompt),
            "new_tokens": setting.new_tokens,
            "page_size": PAGE_SIZE,
            "pairs": len(rounds),
            **summary(setting, [times[place] for times in rounds], [times[0] for times in rounds]),
            "fits": contenders[place].fits(),
            "kv_memory": memory,
        }
        for place, case in enumerate(cases)
    ]


def summary(setting: Setting, ours: Sequence[Times], plain: Sequence[Times]) -> dict[str, float | int]:
    """Medians over the rounds, of ratios too."""

    def median(value: Callable[[Times], float]) -> float:
        return statistics.median(map(value, ours))

    pairs = list(zip(ours, plain, strict=True))
    decoded = setting.batch * (setting.new_tokens - 1)
    found = {
        "encode_s": median(lambda t: t.encode),
        "prefill_s": median(lambda t: t.prefill),
        "decode_s": median(lambda t: t.decode),
        "tokens_per_second": median(lambda t: setting.batch * setting.new_tokens / t.total),
        "decode_tokens_per_second": median(lambda t: decoded / t.decode),
        "prefill_speedup": statistics.median(b.prefill / a.prefill for a, b in pairs),
        "speedup": statistics.median(b.total / a.total for a, b in pairs),
    }
    bytes_ = {"kv_bytes": max(t.kv_most for t in ours), "kv_prompt_bytes": max(t.kv_prompt for t in ours)}
    return {**{name: float(f"{value:.4g}") for name, value in found.items()}, **bytes_}


def name_of(setting: Setting, case: PruneConfig | None) -> str:
    """The name that --filter is matched against."""
    method, keep = (case.method, case.keep) if case else ("none", 1.0)
    return f"{method} keep={keep} sharing={setting.sharing} batch={setting.batch}"


def settings(size: Size) -> list[Setting]:
    """With batches of one sample there is nothing to share."""
    both = [(batch, sharing) for batch in size.images for sharing in (True, False) if sharing or batch > 1]
    return [Setting(sharing, batch, size.images[batch], size.new_tokens) for batch, sharing in both]


def cases_of(setting: Setting, options: Options) -> list[PruneConfig | None]:
    """Those that the filter selects, behind the engine without pruning; empty if it selects none."""
    every = [None, *(PruneConfig(method, keep) for method in METHODS for keep in KEEPS)]
    found = [case for case in every if re.search(options.filter, name_of(setting, case))]
    return [None, *(case for case in found if case is not None)] if found else []


def qwen_3b(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A random model of the shape of Qwen2.5-VL-3B."""
    ids = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = dict(vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36)
    text |= dict(num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=128_000, rope_parameters=rope)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048)
    vision |= dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    config.text_config.tie_word_embeddings = True
    with torch.device(device):
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def main(argv: Sequence[str] | None = None) -> None:
    found = parser(__doc__)
    found.add_argument("--pairs", type=int, help="rounds of a setting that count; default: 3 on a CPU, 5 on a GPU")
    found.add_argument("--seconds", type=float, help="no further round begins after that; default: 120 and 20")
    arguments = found.parse_args(argv)
    options = options_of(arguments)
    transformers.logging.set_verbosity_error()
    if options.compare:
        print("rollouts are compared with the engine without pruning, and with nothing else")
    is_large = options.device.type == "cuda" and not options.quick
    size = QUICK if options.quick else GPU if is_large else CPU
    given = {name: value for name in ("pairs", "seconds") if (value := getattr(arguments, name)) is not None}
    size = replace(size, **given)
    wanted = [(setting, cases) for setting in settings(size) if (cases := cases_of(setting, options))]
    if not wanted:
        return
    model = qwen_3b(options.device) if is_large else tiny_vl()[0].to(options.device)
    about = {"model": "Qwen2.5-VL-3B shape" if is_large else "tiny-vl", **environment(options.device)}
    methods = list(dict.fromkeys(case.method for _, cases in wanted for case in cases if case))
    check_keeping_all(model, methods, Setting(True, 2, (4, 6), 8))
    for setting, cases in wanted:
        for row in measure(model, setting, cases, size):
            print(json.dumps(row), flush=True)
            append_rows(options.output, [{**row, **about, "quick": options.quick}])


if __name__ == "__main__":
    main()
