"""Locally connected click models (LC-DNN) as a Spark batch pipeline."""

__version__ = "0.1.0"
