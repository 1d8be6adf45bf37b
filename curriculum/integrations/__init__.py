"""Adapters for other trainers, one module each. Importing one imports its library; nothing else here does."""
