"""Training: from a dataset of conversations to a cartridge."""
