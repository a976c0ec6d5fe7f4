"""MMEI in JAX: emotion and intent from face, voice and words, and what to recommend for them."""
