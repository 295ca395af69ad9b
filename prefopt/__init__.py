"""prefopt: an instrument for comparing preference-optimization algorithms."""

__version__ = "0.1.0"
