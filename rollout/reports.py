"""What an engine has done and what it holds, in numbers."""

from __future__ import annotations

from foveate.rollout.desk import Desk
from foveate.rollout.models.weights import Weights
from foveate.rollout.runner import Runner
from foveate.rollout.scheduler import Scheduler
from foveate.rollout.segments import SegmentTree
from foveate.rollout.selection import selection_stats
from foveate.rollout.types import Versions
from foveate.rollout.vision import vision_stats


class Reports:
    """Counters and bytes of an engine."""

    num_requests: int
    _versions: Versions
    _desk: Desk
    _num_prefilled: int
    _num_tokens: int
    _num_steps: int
    _seconds: float
    _runner: Runner
    _scheduler: Scheduler
    _tree: SegmentTree
    _weights: Weights

    def stats(self) -> dict[str, int | float]:
        """Counters since the engine was made; a difference of two calls is of what ran between them.

        requests, finished, failed: groups. tokens: drawn so far, those of samples that still run or have failed
        included. prefilled_tokens: computed in chunks, those computed again included; shared_segments: prompt segments
        found instead. preempted: how often a sample's pages were taken. steps, seconds: steps that ended, and their
        wall time. tokens_per_second: tokens over seconds. images_encoded, image_hits, image_evictions, image_bytes: of
        the vision cache (`foveate.rollout.vision.vision_stats`). image_tokens, image_tokens_dropped: of images that
        went to prompts (`foveate.rollout.selection.selection_stats`). running: samples now; waiting: groups of which a
        sample waits. weight_version, vision_version.
        """
        return {
            "requests": self.num_requests,
            **self._desk.counts,
            "tokens": self._num_tokens,
            "prefilled_tokens": self._num_prefilled,
            "steps": self._num_steps,
            "seconds": self._seconds,
            "tokens_per_second": self._num_tokens / self._seconds if self._seconds else 0.0,
            "shared_segments": self._tree.num_shared,
            "preempted": self._scheduler.num_preempted,
            **vision_stats(self._runner.vision),
            **selection_stats(self._runner.selector),
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "weight_version": self._versions.weights,
            "vision_version": self._versions.vision,
        }

    def memory_report(self) -> dict[str, int | float]:
        """Bytes by owner.

        kv_capacity, kv_used: the page pool and its pages in use; kv_pages, kv_pages_used: their number. held_hidden:
        hidden states of prompts that are pruned between layers and still lack their last token.
        vision_cache. shadow_weights: copies the engine owns. shared_weights: decoder parameters read in place.
        """
        pool, runner = self._tree.pool, self._runner
        return {
            "kv_capacity": runner.kv_pool.nbytes,
            "kv_used": runner.kv_pool.nbytes // pool.num_pages * pool.num_used,
            "kv_pages": pool.num_pages,
            "kv_pages_used": pool.num_used,
            "held_hidden": self._tree.held_bytes,
            "vision_cache": runner.vision.used_bytes if runner.vision else 0,
            "shadow_weights": self._weights.shadow_bytes,
            "shared_weights": self._weights.shared_bytes,
        }
