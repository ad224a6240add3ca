"""Problems: one file or folder each. Each is a plugin; `bilevel` does not import them by itself."""
