"""Variance-aware data selection: score each training sample by repeated responses, then pick those that teach."""
