"""Finding the strongest pruning that leaves a model's answers to one's own prompts as they are."""
