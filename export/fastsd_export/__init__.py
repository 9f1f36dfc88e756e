"""The export stage: from a checkpoint to verified engines (it arrives with the engines)."""
