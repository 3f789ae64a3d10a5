"""What a cartridge is asked while it trains: losses, answers, and what it does to everything else."""
