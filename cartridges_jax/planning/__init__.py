"""What a compiled program needs, read from the program."""
