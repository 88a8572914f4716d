"""Scores of any classifier, and probes on frozen features."""
