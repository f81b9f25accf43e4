"""Tests of models.interop."""
