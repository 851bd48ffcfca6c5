"""Backbones and heads: every ``*_cls``, ``*_aff`` and ``*_seg`` module offers a class ``Net``."""
