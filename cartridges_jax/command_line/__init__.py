"""What every command shares: its config, its one-sentence errors, its progress, its files."""
