"""Bulk data: how bytes of leased blocks reach the reader."""
