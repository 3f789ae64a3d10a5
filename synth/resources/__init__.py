"""What a cartridge is made of: every resource gives named sections of text, and one string of them all."""
