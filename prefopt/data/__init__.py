"""Preference data: records, sources and row roles."""
