"""Helpers of the tests: tiny models, small posteriors, fake servers, data."""
