"""Experiments that the library runs on itself: families compared by measurement."""
