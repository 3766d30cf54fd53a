"""Reading lazily: which prompt tokens go on, which wait, which come back (LazyLLM, arXiv
2407.14057)."""
