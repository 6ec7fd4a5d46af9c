"""Drafters on the Hub: other libraries' formats, model cards, uploads. What is read from there is in `modeling`."""
