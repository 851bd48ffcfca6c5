"""Algorithms and plumbing of AffinityNet that know nothing of data sets or networks."""
