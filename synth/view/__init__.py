"""A local page on which a dataset can be looked at: `python -m synth.view RUN`."""
