"""Analyses of trained models and of the operators. scripts/analyze.py is their command line."""
