"""Evaluators: what a model can do, measured on every rank together, in a run and after it."""
