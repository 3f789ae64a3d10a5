"""The parts of `accelerator.py`: a module each, whose `measure(options)` yields each finding as it is known."""
