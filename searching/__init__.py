"""Searches over curricula and settings: what is tried next. scripts/search.py is their command line."""
