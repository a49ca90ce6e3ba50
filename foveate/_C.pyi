"""Native parts of foveate, built from csrc/ and bindings/."""

from collections.abc import Sequence
from typing import Any

COMPILER: str
CUDA_VERSION: str | None  # of nvcc; None without CUDA
CUDA_ARCHS: str  # chips the kernels were compiled for, "80 90a 100"
RMS_NORM_GRADIENT_ROWS: int
ATTENTION_CHUNK_KEYS: int
ATTENTION_TILE_COLUMNS: int
ATTENTION_MAX_HEAD_DIM: int
MAX_PLANES: int  # of one copy_rows
TILE_IDS: int  # of sample_from_hidden, and what it leaves of a row and tile, without and with `allowed`
TILE_FIELDS: int
MASKED_TILE_FIELDS: int

# Tensors are torch's; a stream is the address of a cudaStream_t. Raise ValueError where a tensor does not fit.
def rms_norm(x: Any, weight: Any, eps: float, out: Any, scale: Any, stream: int = 0) -> None: ...
def rms_norm_backward(
    grad: Any, x: Any, weight: Any, scale: Any, grad_x: Any, grad_weight: Any, stream: int = 0
) -> None: ...
def rope_store_kv(
    queries: Any,
    keys: Any,
    values: Any,
    cos: Any,
    sin: Any,
    key_pool: Any,
    value_pool: Any,
    slots: Any,
    out: Any,
    stream: int = 0,
) -> None: ...
def decode_attention(
    queries: Any,
    key_pool: Any,
    value_pool: Any,
    pages: Any,
    tiles: Any,
    rows: Any,
    row_parts: Any,
    part_offsets: Any,
    workspace: Any,
    out: Any,
    scale: float,
    stream: int = 0,
) -> None: ...
def group_advantage(
    rewards: Any,
    group_offsets: Any,
    kind: str,
    weights: Any | None,
    ddof: int,
    eps: float,
    scorable: Any | None,
    lengths: Any | None,
    workspace: Any,
    out: Any,
    stream: int = 0,
) -> None: ...
def group_advantage_workspace(kind: str, samples: int, groups: int) -> int: ...
def sample(
    logits: Any,
    temperature: Any,
    top_k: Any | None,
    top_p: Any | None,
    min_p: Any | None,
    seeds: Any | None,
    steps: Any | None,
    allowed: Any | None,
    given: Any | None,
    token_ids: Any | None,
    values: Any,
    stream: int = 0,
) -> None: ...
def sample_from_hidden(
    hidden: Any,
    lm_head: Any,
    bias: Any | None,
    temperature: Any,
    seeds: Any,
    steps: Any,
    allowed: Any | None,
    partials: Any,
    best_ids: Any,
    token_ids: Any,
    values: Any,
    stream: int = 0,
) -> None: ...
def select_topk(
    scores: Any, offsets: Any, counts: Any, forced: Any | None, indices: Any, kept_offsets: Any, stream: int = 0
) -> None: ...
def select_maxmin(
    features: Any,
    offsets: Any,
    counts: Any,
    longest: int,
    long_spans: Sequence[tuple[int, int, int]],
    units: Any,
    cosines: Any,
    squares: Any,
    closest: Any,
    maxima: Any,
    choices: Any,
    indices: Any,
    kept_offsets: Any,
    stream: int = 0,
) -> None: ...
def maxmin_unit_elements(total: int, spans: int, dim: int) -> int: ...
def maxmin_maxima_elements(tokens: int) -> int: ...
def maxmin_choice_elements(tokens: int) -> int: ...
def copy_rows(
    sources: Sequence[Any], targets: Sequence[Any], source_rows: Any, target_rows: Any | None, stream: int = 0
) -> None: ...

class OutOfPages(RuntimeError):
    """Fewer pages are free than were asked for."""

class PagePool:
    def __init__(self, num_pages: int) -> None: ...
    def allocate(self, n: int) -> list[int]: ...
    def free(self, pages: Sequence[int]) -> None: ...
    def is_used(self, page: int) -> bool: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...
