"""Scaling of clusters; not built yet."""
