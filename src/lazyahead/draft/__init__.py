"""Guessing ahead: token trie, drafts, row budget, verification, memory of answers. Knows no model."""
