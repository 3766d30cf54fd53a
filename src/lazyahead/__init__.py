"""lazyahead."""
