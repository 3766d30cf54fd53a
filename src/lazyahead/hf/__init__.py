"""The fence: only here is anything known about transformers."""
