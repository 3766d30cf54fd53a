"""Drafting: token trie, drafts, row budget, verification, memory of answers. Needs no model."""
