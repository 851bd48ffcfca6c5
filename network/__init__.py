"""Backbones and the two heads: every ``*_cls`` and ``*_aff`` module offers a class ``Net``."""
