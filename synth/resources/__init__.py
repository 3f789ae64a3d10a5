"""What a cartridge is made of: each resource gives one text."""
