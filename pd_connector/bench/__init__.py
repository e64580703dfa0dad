"""Measurements that people run on their own machines: ``pdc bench``."""
