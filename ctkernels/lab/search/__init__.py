"""Searches for the curvature (beta) at which a frozen network fits new data best."""
