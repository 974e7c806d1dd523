"""Sorting tokens by expert."""
