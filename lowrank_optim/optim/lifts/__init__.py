"""Lifts: from a direction to an update of the whole weight."""
