"""Tools that either side of a conversation may use."""
