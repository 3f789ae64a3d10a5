"""Initial states: the cartridge before training."""
