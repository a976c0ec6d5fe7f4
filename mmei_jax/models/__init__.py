"""MMEI itself: fusion (Eq. 1-3), heads (Eq. 4-5) and their assembly."""
