"""Readers of weight files. Each gives a mapping from the tensor's stored name to a lazy, sliceable tensor."""
