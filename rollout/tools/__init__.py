"""Commands for those who run the engine: `foveate doctor`."""
