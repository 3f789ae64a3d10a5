"""Where a cartridge starts from (design §6)."""
