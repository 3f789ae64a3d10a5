"""The cartridge: its arrays, its file, its provenance, and how several are composed."""
