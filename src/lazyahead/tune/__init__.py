"""Finding the strongest pruning under which a model's answers to given prompts stay the same."""
