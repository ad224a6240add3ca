"""Solvers: one file a family. Each is a plugin; `bilevel` does not import them by itself."""
