"""The engine and the GRPO loop; the public names are re-exported by `foveate`."""

if __name__ != "foveate.rollout":
    raise ImportError(f"expected to be imported as foveate.rollout, got {__name__}: install the package first")
