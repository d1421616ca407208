"""Moves pages between tiers."""
