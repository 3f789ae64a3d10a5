"""What a run needs on devices that are not here: programs compiled for them, and arithmetic."""
