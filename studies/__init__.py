"""Searches over curricula and settings, and analyses of finished runs; scripts/search.py and analyze.py run them."""
