"""What a session keeps: keys and values, hidden states of deferred tokens."""
