"""The cartridge: its arrays, its file, where it comes from, and how several are put together."""
