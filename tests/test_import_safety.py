"""Importing foveate needs no extra, changes nothing global, and lives beside Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import foveate

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ["PIL", "rich", "tensorboard", "math_verify", "sklearn", "scipy", "matplotlib", "tyro", "accelerate"]
EXTRAS += ["hypothesis", "kernels", "pytest", "pytest_benchmark", "peft", "torchvision"]
# Everything but the trainer, which needs the extra [train].
CORE_NAMES = sorted(set(foveate.__all__) - {"GRPOConfig", "Trainer"})

HIDE = """
import sys
class Hiding:
    '''All finders of before, for which the hidden packages do not exist.'''
    def __init__(self, finders, hidden):
        self.finders, self.hidden = list(finders), set(hidden)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.hidden:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)
    def find_distributions(self, *args, **kwargs):
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*args, **kwargs)
def hide(names):
    sys.meta_path[:] = [Hiding(sys.meta_path, names)]
"""

SNAPSHOT = """
import atexit, hashlib, locale, logging, os, random, signal, sys, threading, warnings
import numpy, torch
def digest(data):
    return hashlib.sha256(data).hexdigest()
def snapshot():
    '''Everything of the process that a library must leave alone, as text.'''
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch rng": digest(torch.get_rng_state().numpy().tobytes()),
        "numpy rng": digest(repr(numpy.random.get_state()).encode()),
        "python rng": digest(repr(random.getstate()).encode()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "cuda": torch.cuda.is_initialized(),
        "atexit": atexit._ncallbacks(),
        "warnings": [str(entry) for entry in warnings.filters],
        "loggers": [str(handler) for handler in logging.root.handlers] + [logging.root.level, logging.root.disabled],
        "transformers log level": logging.getLogger("transformers").level,
        "environment": dict(os.environ),
        "sys.path": list(sys.path),
        "finders": [str(finder) for finder in sys.meta_path],
        "hooks": [str(sys.excepthook), str(sys.displayhook), str(threading.excepthook)],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "threads alive": threading.active_count(),
        "directory": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "print options": str(torch._tensor_str.PRINT_OPTS),
    }
"""

IMPORT_CORE = """
import importlib, foveate
for name in {names!r}:
    getattr(foveate, name)
for family in ("paged_attention", "policy_loss", "sampling"):
    importlib.import_module("foveate.kernels." + family)
"""


def run_child(code: str, *options: str, cwd: Path | None = None) -> str:
    """Standard output of `code` in a fresh interpreter; its errors fail the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_hidden_packages_are_really_hidden():
    run_child(f"""{HIDE}
import importlib.util
hide(["numpy"])
assert importlib.util.find_spec("numpy") is None and importlib.util.find_spec("torch") is not None
try:
    import numpy
except ModuleNotFoundError:
    sys.exit(0)
sys.exit(1)
""")


def test_import_needs_no_extra():
    loaded = run_child(f"""{HIDE}
hide({EXTRAS!r})
{IMPORT_CORE.format(names=CORE_NAMES)}
print(*sys.modules)
""").split()
    assert "foveate.rollout.engine" in loaded
    assert not {name for name in loaded if name.split(".")[0] in EXTRAS}


def test_bare_import_is_light():
    loaded = run_child("import sys, foveate; print(*sys.modules)").split()
    assert "foveate" in loaded
    assert not {"torch", "transformers", "numpy", "triton"} & set(loaded)


def test_public_names():
    assert set(foveate.__all__) <= set(dir(foveate))
    for name in set(foveate.__all__) - {"__version__"}:
        assert getattr(foveate, name).__name__ == name
    assert foveate.__version__ == importlib.metadata.version("foveate")
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = foveate.Engin


def test_import_changes_nothing_global():
    """Third-party packages are imported first: what they change by themselves is theirs."""
    everything = IMPORT_CORE.format(names=foveate.__all__)
    loaded = run_child(f"{everything}\nimport sys, json; print(json.dumps(list(sys.modules)))")
    others = [name for name in json.loads(loaded.splitlines()[-1]) if name.split(".")[0] not in ("foveate", "__main__")]
    run_child(f"""{SNAPSHOT}
import importlib, json
for name in {others!r}:
    if not name.startswith("__"):
        try:
            importlib.import_module(name)
        except Exception:  # some entries are made while another module is imported and cannot be asked for alone
            pass
before = snapshot()
{everything}
after = snapshot()
changed = {{key: (before[key], after[key]) for key in before if before[key] != after[key]}}
assert not changed, changed
""")


RUN_ENGINE = """
import numpy
from foveate import Engine, EngineConfig, Request, SamplingParams
from foveate.rollout.testing import tiny_model, tiny_processor
torch.set_num_threads(1)
config = EngineConfig(kv_memory=1 << 22)
message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
image = numpy.arange(56 * 84 * 3, dtype=numpy.uint8).reshape(56, 84, 3)
requests = [Request(message, images=(image,), n=2, sampling=SamplingParams(max_tokens=3, seed=1))]
processor, model = tiny_processor(), tiny_model("qwen2_5_vl")
# For what torch and transformers set up by themselves when first used.
model.generate(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4), max_new_tokens=2, do_sample=False)
before = snapshot()
engine = Engine(model, processor, config)
groups = engine.generate(requests)
engine.update_weights()
groups += engine.generate(requests)
assert all(group.error is None and len(group.rollouts) == 2 for group in groups), groups
after = snapshot()
"""


def test_running_the_engine_changes_nothing_global():
    run_child(f"""{SNAPSHOT}{RUN_ENGINE}
changed = {{key: (before[key], after[key]) for key in before if before[key] != after[key]}}
assert not changed, changed
""")


@pytest.mark.parametrize(
    "change",
    [
        "torch.manual_seed(1)",
        "torch.set_default_dtype(torch.float64)",
        "torch.set_grad_enabled(False)",
        "torch.set_num_threads(2)",
        "atexit.register(print)",
        "warnings.filterwarnings('ignore')",
        "logging.basicConfig()",
        "os.environ['TOKENIZERS_PARALLELISM'] = 'false'",
        "sys.path.append('x')",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",
    ],
)
@pytest.mark.slow
def test_snapshot_sees_a_change(change):
    run_child(f"{SNAPSHOT}\nbefore = snapshot()\n{change}\nassert snapshot() != before")


@pytest.mark.parametrize("options", [("-P",), ()], ids=["root off sys.path", "root on sys.path"])
def test_beside_hugging_face_kernels(options):
    """Whichever `kernels` is found first, foveate gets its own and transformers' integration imports."""
    pytest.importorskip("kernels")
    run_child(
        f"""{IMPORT_CORE.format(names=CORE_NAMES)}
import importlib.util, os, sys
import transformers.integrations.hub_kernels
from transformers.utils.import_utils import is_kernels_available
ours = os.path.join(os.getcwd(), "kernels", "__init__.py")
assert foveate.kernels.sampling.__file__.startswith(os.path.dirname(ours))
assert "rollout" not in sys.modules
assert is_kernels_available("0.0", "99")  # any version that is installed
if {bool(options)}:
    from kernels import get_kernel, LayerRepository
    assert sys.modules["kernels"].__file__ != ours
else:
    assert importlib.util.find_spec("kernels").origin == ours
""",
        *options,
        cwd=ROOT,
    )


def test_folder_is_harmless_when_found_as_kernels():
    run_child("import kernels; names = {n for n in vars(kernels) if n[:2] != '__'}; assert not names, names", cwd=ROOT)


def test_rollout_refuses_its_bare_name():
    code = """
try:
    import rollout
except ImportError as error:
    assert "foveate.rollout" in str(error)
else:
    raise SystemExit("imported a second copy")
"""
    run_child(code, cwd=ROOT)


def test_python_m_pytest_finds_the_right_kernels():
    """`python -m pytest` in the root puts it on sys.path; conftest.py takes it off again."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    target = "tests/test_conftest.py::test_root_is_not_on_the_import_path"
    result = subprocess.run([*command, target], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
