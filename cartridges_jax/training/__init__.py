"""Distils conversations into a cartridge."""
