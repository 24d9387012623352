"""Modules that connect this library with trainers, each imported by its name."""
