"""Rows on their way into SwanLab: on disk, or in its cloud."""
