"""Theorems 1 and 2 of the paper, checked on a problem that satisfies their assumptions: `datps bench theory`."""
