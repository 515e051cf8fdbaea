"""Faults put one at a time into the code of special cases, to see whether a test notices."""
