"""Policies behind one protocol, their heads and adapters."""
